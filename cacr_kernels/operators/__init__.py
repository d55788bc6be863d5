"""The operators ``torch.ops.cacr_kernels.*``, one file each."""
