"""Backend "triton". Importing this package imports Triton; ``cacr_kernels.backends`` does not."""
