"""``make gpu-check``: is the package right on the GPU of this machine, and how fast? One folder to attach to an issue.

environment.json   versions, device, which backends can run
verify.json/.log   every backend that runs on the GPU against the float64 reference
tests.log          the tests of the losses, on the backends of the GPU
benchmark/         the quick suite, timed
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path

import torch

TESTS = (
    "device/test_gpu.py",
    "losses/test_vectors.py",
    "losses/test_functional.py",
    "losses/test_functional_numbers.py",
)


def steps(out: Path, device: str) -> dict[str, list[str]]:
    """What is run, by the name of its log."""
    tests = [str(Path("tests") / name) for name in TESTS]
    return {
        "environment": ["-m", "cacr_kernels", "--json"],
        "verify": ["-m", "cacr_kernels.verify", "--device", device, "--json", str(out / "verify.json")],
        "tests": ["-m", "pytest", "-q", *tests, "-k", "triton or cuda"],
        "benchmark": ["-m", "benchmarks", "--device", device, "--suite", "quick", "--out", str(out / "benchmark")],
    }


def run(name: str, arguments: list[str], out: Path) -> bool:
    """One step, its output in a file; whether it succeeded."""
    path = out / (f"{name}.json" if "--json" in arguments and name == "environment" else f"{name}.log")
    print(f"{name}: {' '.join(arguments)}", flush=True)
    with path.open("w", encoding="utf-8") as file:
        status = subprocess.run([sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT).returncode
    print(f"{name}: {'all right' if status == 0 else f'FAILED, exit status {status}'}, see {path}", flush=True)
    return status == 0


def main(argv: list[str] | None = None) -> int:
    """Runs all steps whatever the others found; exit status 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the report (%(default)s)")
    parser.add_argument("--device", default="cuda", help="device to check (%(default)s)")
    options = parser.parse_args(argv)
    if options.device != "cpu" and not torch.cuda.is_available():
        print("gpu-check: torch finds no GPU here; install a CUDA or ROCm build of it", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    good = [run(name, arguments, options.out) for name, arguments in steps(options.out, options.device).items()]
    archive = options.out.with_suffix(".tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(options.out, arcname=options.out.name)
    print(f"report: {archive}; please attach it to an issue, whatever it says")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
