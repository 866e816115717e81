"""Recipes: `recipe` the value, `reading` and `mergekit` its files, `source` an input, `rules`
weights and options for some tensors, `weight_files` weights in files, `foreign_names` names and
options of other programs.
"""
