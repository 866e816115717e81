"""Recipes: `recipe` the value, `reading` and `mergekit` its files, `source` an input, `rules`
weights and options for some tensors, `blocks` the parts of a model, `coefficients` files of
weights.
"""
