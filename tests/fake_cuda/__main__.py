"""``python -m tests.fake_cuda ARGUMENTS``: what ``python ARGUMENTS`` does, with two GPUs that are not there."""

from __future__ import annotations

import os
import sys

from .building import environment


def main() -> None:
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())


if __name__ == "__main__":
    main()
