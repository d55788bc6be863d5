"""Backend "triton": importing this package registers its operators, and imports Triton when one of them first runs.

ops.py            registration and the entry of the table
contrast.py       the general path, detached_keys.py and cacr.py the other two operators: which kernels are launched
blocks.py         gradients of many features, by blocks of stored coefficients
launch.py         how a kernel is launched
pairs.py          pairs of a query set and a key set, as the kernels take them
table.py          launch configurations by processor and size
tuning.py         faster ones, if asked for
kernels/          what runs on the device
"""

from .ops import BACKEND

__all__ = ["BACKEND"]
