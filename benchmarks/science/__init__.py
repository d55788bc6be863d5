"""What the loss does to representations, ``python -m benchmarks.science``: an experiment that could fail."""
