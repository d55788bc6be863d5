"""Planted faults: does the test suite notice the slips of a tired engineer?

``catalogue/`` holds one file per layer. Each fault is a small change of the code that changes results. ``make planted``
(``python -m tests.planted``) applies them one at a time in a copy of the tree and runs the tests that should notice.
"""
