"""Benchmarks of ``cacr_kernels`` and the training demo."""
