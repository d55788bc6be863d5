"""Backend "reference": the definition itself, ``cacr_kernels/reference.py``."""

from .entry import Backend, any_device

BACKEND = Backend(
    "reference", "the definition in plain PyTorch; N x M arrays, any device", any_device, n_by_m_arrays=True
)
