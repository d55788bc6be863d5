"""The kernels, one file for each formula. Symbols and derivations: ``cacr_kernels/reference.py``.

tile.py           what all of them do with a tile of inner products; the idea is explained there
norms.py          squared lengths of embeddings
unit.py           rows that are made unit rows: their factors, and gradients of the raw rows
statistics.py     row statistics of one or two softmaxes over a split of the keys
merge.py          value and lse of those of all splits together, in float64
coefficients.py   what a row's gradient multiplies its weights with
gradient.py       gradient of embeddings, as queries, as keys or as both
blocks.py         the same of more features than a program holds: stored coefficients, and products with them
total.py          sums over splits of gradients, and the derivative of the temperatures
detached_keys.py  statistics and gradient in one sweep, where the keys carry no gradient
aligned.py        attraction of cacr_loss
loss.py           cacr_loss from the statistics of its rows
"""
