"""Cutting a map into ranges, and how far to believe the cut; a map on disk is enough.

`segmentation` makes a cut out of scores, `search` finds the best one exactly, `blocks` says where noise leaves one to be found,
`evidence` and `crossfit` what samples that did not choose it say of it, `ranges` is the command `demerge ranges`.
`benefit` says what training experts of a cut promises, `needed` how many groups would resolve what noise hides, `layers` which
layers gain from it; that is the command `demerge layers`. `cut_plots` and `layer_plots` draw them.
"""
