"""The operators ``torch.ops.cacr_kernels.*``."""
