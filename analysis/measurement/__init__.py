"""The measurement: gradients by bin of timesteps and group of samples, until a map is whole.

options      what is measured, and how        gradients    model, data and options; the cost
samples      what gradients are measured on   backward     one gradient, in pieces
sketch       what shortens it                 collector    the cells, one after the other
fisher       their squares, by range          budget       how many groups are enough
checkpoint   finished parts                   run          measure(model, data, options)
"""
