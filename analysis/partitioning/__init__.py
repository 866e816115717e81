"""Partitioning: where to cut [0, T) into ranges by a map, and how far to believe it.

map_reading        a map with one score, read once: what all questions about it share
resolution         the blocks of bins that noise leaves, and how many groups would resolve more
objective, search  what a partition gains, and the best one, exactly
bootstrap, cross_validation   what samples that did not choose the cuts say of them
expected_gain      what training experts of the ranges promises
"""
