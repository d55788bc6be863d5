"""The parts of the training demo, ``python -m benchmarks.demo``."""
