"""What nvcc makes of the CUDA kernels: nothing in local memory, tensor cores and asynchronous copies at work.

The kernels are those of the library named by ``CACR_CUDA_LIBRARY``, for all its architectures, or else a few that are
compiled here.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from benchmarks.codegen.cuda_code import ARITHMETIC, Kernel, kernels
from tests.cuda_emulation.building import by_nvcc, tool

pytestmark = pytest.mark.exhaustive

ROOT = Path(__file__).resolve().parents[2]
ON_TENSOR_CORES = ("bf16", "f16", "tf32", "tf32x3")
LIBRARY = os.environ.get("CACR_CUDA_LIBRARY")


read = cache(kernels)  # half a minute for a library


@pytest.fixture(scope="module", params=list(ARITHMETIC) if LIBRARY else ["bf16"])
def compiled(request) -> list[Kernel]:
    tool("cuobjdump")
    source = ROOT / "csrc/cuda/instances" / f"{request.param}.cu"
    path = Path(LIBRARY) if LIBRARY else by_nvcc(str(source), "cubin")
    found = [kernel for kernel in read(path) if kernel.arithmetic == request.param]
    assert found, f"no kernel of {request.param} in {path}"
    return found


def test_nothing_spills(compiled):
    assert [kernel for kernel in compiled if kernel.spills] == []


def test_instructions(compiled):
    for kernel in compiled:
        wanted = {"LDGSTS"} | ({"HMMA", "LDSM"} if kernel.arithmetic in ON_TENSOR_CORES else set())
        assert wanted <= set(kernel.instructions), kernel
