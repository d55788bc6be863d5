"""``python -m benchmarks.codegen``: the report of compiled code."""

import sys

from .report import main

if __name__ == "__main__":
    sys.exit(main())
