"""Cutting a map into ranges, and how far to believe the cut; a map on disk is enough.

`segmentation` makes a cut out of scores, `search` finds the best one exactly, `blocks` says where noise leaves one to be found,
`evidence` and `crossfit` what samples that did not choose it say of it, `ranges` is the command `demerge ranges`.
"""
