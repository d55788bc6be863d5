"""Backend "triton": importing this package registers its operators, and imports Triton when one of them first runs.

ops.py        registration and the entry of the table
launch.py     the general path, frozen.py and cacr.py the other two operators: launches of kernels
problem.py    a problem as the kernels take it
table.py      launch configurations by processor and size
tuning.py     faster ones, if asked for
kernels/      what runs on the device
"""

from .ops import BACKEND

__all__ = ["BACKEND"]
