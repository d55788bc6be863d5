"""The kernels, one per file. Symbols and derivations: ``cacr_kernels/reference.py``; tiles: ``tile.py``.

norms.py         squared lengths of embeddings
statistics.py    row statistics of one or two softmaxes over a share of the keys
merge.py         those of all shares together, in float64
coefficients.py  what a row's gradient multiplies its weights with
gradient.py      gradient of embeddings, as queries, as keys or as both
total.py         sums of shares of gradients, and the derivative of the temperatures
"""
