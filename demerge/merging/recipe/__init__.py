"""What is asked of a merge, as a value, a file and a text, before anything is opened.

`recipe` the value and its JSON, `asked` its keyword arguments, `documents` YAML and JSON read without trust, `paths` how
inputs are named in it; `rules` which tensors have weights and options of their own, `blocks` the names for parts of a
model, `coefficients` weights read from a file; `names` and `mergekit` what other programs call it; `card` the model card.
"""
