"""Compiles the fake CUDA, once until a source changes, and says in which environment a program sees it."""

from __future__ import annotations

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

from tests.building import ROOT, kept
from tests.cuda_emulation.building import INCLUDES, tool

HERE = Path(__file__).resolve().parent
NATIVE = HERE / "native"
BUILD = ROOT / "build" / "fake_cuda"
HERE_SOURCES = "tests/fake_cuda/native"
KERNELS = ("csrc/cuda/phases", "csrc/cuda/tile")
COMMON = ["-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def _torch() -> Path:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _cuda_headers() -> str:
    """Of the toolkit that nvcc belongs to."""
    said = subprocess.run(
        [tool("nvcc"), "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    )
    return str(Path(re.findall(r"^#\$ TOP=(.*)$", said.stderr, re.MULTILINE)[0], "include").resolve())


def _shared(name: str, sources: list[str], flags: list[str], places: tuple[str, ...] = (HERE_SOURCES,)) -> Path:
    given = [str(NATIVE / s) if "/" not in s else str(ROOT / s) for s in sources]
    return kept(BUILD / name, [tool("g++"), *COMMON, "-shared", *flags[:1], *given, *flags[1:]], places)


def runtime() -> Path:
    """The stand-in for libcudart, to be loaded before everything else."""
    flags = ["-O1", "-isystem", _cuda_headers(), "-ldl", "-pthread"]
    return _shared("libfake_cudart.so", ["cudart.cpp", "device.cpp"], flags)


def driver() -> Path:
    """A libcuda that is found; its folder is for LD_LIBRARY_PATH."""
    return _shared("libcuda.so.1", ["driver.cpp"], ["-O1"])


def allocations() -> Path:
    """What watches torch's allocator."""
    torch = _torch()
    include = ["-isystem", str(torch / "include"), "-isystem", _cuda_headers()]
    return _shared("liballocations.so", ["allocations.cpp"], ["-O1", *include, f"-L{torch / 'lib'}", "-lc10_cuda"])


def cuda_library() -> Path:
    """``_C_cuda`` with the product's own binding and kernels, which the emulation runs."""
    torch, places = _torch(), ("csrc/common", "tests/cuda_emulation", HERE_SOURCES)
    of_kernels = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc/cuda").glob("*.*h"))
    flags = ["-c", "-O2", "-fvisibility=hidden", *INCLUDES]
    source = str(NATIVE / "emulated.cpp")
    kernels = kept(BUILD / "emulated.o", [tool("g++"), *COMMON, *flags, source], (*of_kernels, *KERNELS, *places))
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    include = ["-isystem", str(torch / "include"), "-isystem", _cuda_headers(), *INCLUDES[1:]]
    link = [str(kernels), f"-L{torch / 'lib'}", "-ltorch_cpu", "-ldl"]
    flags = ["-O1", "-fvisibility=hidden", target, *include, *link]
    return _shared("_C_cuda.abi3.so", ["csrc/cuda/binding.cpp", "library.cpp"], flags, ("csrc/cuda", *places))


def environment(**variables: str) -> dict[str, str]:
    """The environment of a program that has the two devices."""
    built = {
        "LD_PRELOAD": str(runtime()),
        "FAKE_CUDA": "1",
        "FAKE_CUDA_ALLOCATIONS": str(allocations()),
        "FAKE_CUDA_LIBRARY": str(cuda_library()),
        "TRITON_CACHE_DIR": str(BUILD / "triton"),
        "CACR_CACHE_DIR": str(BUILD / "verdicts"),
    }
    first = {"LD_LIBRARY_PATH": str(driver().parent), "PYTHONPATH": f"{HERE / 'site'}:{ROOT}"}
    paths = {name: ":".join(filter(None, [path, os.environ.get(name)])) for name, path in first.items()}
    return os.environ | {"OMP_NUM_THREADS": "1"} | built | paths | variables
