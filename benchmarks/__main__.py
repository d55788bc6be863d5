"""``python -m benchmarks``: the suite of timings."""

import sys

from .suite.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
