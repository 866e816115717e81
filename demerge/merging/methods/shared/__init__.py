"""What several merge methods share, no methods themselves.

`selection` exact k-th magnitudes, `geometry` Gram matrices and norms, `stages` the linear or TIES
merge at the end, `spectral` singular values through Gram matrices.
"""
