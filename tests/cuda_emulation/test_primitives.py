"""Every wrapper of ptx.cuh and every warp operation against its statement in statements.py, on two platforms.

"emulation" is what the kernels are tested with; "ptx" is what nvcc makes of the same source, run by tests/ptx: an
operand in the wrong place of an asm text can be seen there only.
"""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest

from tests import ptx

from . import warps
from .building import by_nvcc, disassembly, emulated_library
from .statements import STATEMENTS, Words

pytestmark = pytest.mark.exhaustive

SEEDS = range(6)
TILE_BYTES = 1024  # primitives.cuh


def run_emulated(kernel: str, words: Words, outputs: int, nearest: bool = False) -> Words:
    """The output words, which are the same whatever the schedule."""
    library = ctypes.CDLL(str(emulated_library("primitives.cpp")))
    words, out, message = np.ascontiguousarray(words), np.empty((len(SEEDS), outputs), np.uint32), bytes(1000)
    for seed in SEEDS:
        pointers = ctypes.c_void_p(words.ctypes.data), ctypes.c_void_p(out[seed].ctypes.data)
        how = ctypes.c_uint64(seed), ctypes.c_bool(nearest)
        library.run(kernel.encode(), *pointers, *how, message, ctypes.c_size_t(len(message)))
        assert message.rstrip(b"\0") == b""
    assert (out == out[0]).all()
    return out[0]


def sum_of(products: list[float], start: float, nearest: bool) -> float:
    """``start`` plus products of bfloat16, as a tensor core adds them up: one row of A against one column of B."""
    a = np.zeros((16, 16), np.float32)
    a[0, : len(products)] = products
    b, d = np.ones((16, 8), np.float32), np.zeros((16, 8), np.float32)
    d[0, 0] = start
    words = [
        warps.fragments((a.view(np.uint32) >> 16).astype(np.uint16), warps.a_16x16, 8).view(np.uint32),
        warps.fragments((b.view(np.uint32) >> 16).astype(np.uint16), warps.b_16x8, 4).view(np.uint32),
        warps.fragments(d, warps.element_16x8, 4).view(np.uint32),
    ]
    return float(run_emulated("mma_bf16", np.concatenate(words, axis=1), 128, nearest).view(np.float32)[0])


# One unit in the last place of 1 is 2^-23.
TRUNCATED = {
    "nothing is lost": ([0.5, 2.0**-23], 1.0, 1.5 + 2.0**-23, 1.5 + 2.0**-23),
    "towards zero": ([1.5 * 2.0**-23], 1.0, 1 + 2.0**-23, 1 + 2.0**-22),
    "towards zero from below": ([-1.5 * 2.0**-23], -1.0, -1 - 2.0**-23, -1 - 2.0**-22),
    "each before the sum": ([0.75 * 2.0**-24] * 8, 1.0, 1.0, 1 + 3 * 2.0**-23),
    "one bit more is kept": ([2.0**-24] * 2, 1.0, 1 + 2.0**-23, 1 + 2.0**-23),
    "a second group": ([1.0] + [0.0] * 7 + [2.0**-24] * 2, 0.0, 1 + 2.0**-23, 1 + 2.0**-23),
    "not finite": ([np.inf, 1.0], 1.0, np.inf, np.inf),
}


@pytest.mark.parametrize("name", TRUNCATED)
def test_truncation(name: str) -> None:
    """What tensor_cores.h says of the hardware, and the other way to round."""
    products, start, truncated, nearest = TRUNCATED[name]
    assert sum_of(products, start, nearest=False) == truncated
    assert sum_of(products, start, nearest=True) == nearest


@pytest.mark.parametrize("kernel", ["mma_bf16", "mma_f16", "mma_tf32"])
def test_the_interpreter_cuts_off_the_same(run_ptx: RunPtx, kernel: str) -> None:
    """Sums of numbers of many sizes, to the last bit: six words of A and B, four of the sum."""
    rng = np.random.default_rng(0)
    numbers = 2.0 ** rng.integers(-6, 7, (32, 10, 2)) * rng.normal(size=(32, 10, 2))
    words = numbers[..., 0].astype(np.float32).view(np.uint32)
    if kernel != "mma_tf32":
        upper = (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        halves = upper if kernel == "mma_bf16" else numbers.astype(np.float16).view(np.uint16)
        words[:, :6] = halves.view(np.uint32)[:, :6, 0]
    np.testing.assert_array_equal(run_emulated(kernel, words, 128), run_ptx(kernel, words, 128))


def ptx_text() -> str:
    return by_nvcc("primitives.cu", "ptx").read_text()


class RunPtx:
    """The same by a PTX text."""

    def __init__(self, text: str) -> None:
        self.kernels = ptx.load(text)

    def __call__(self, kernel: str, words: Words, outputs: int) -> Words:
        out = np.empty(outputs, np.uint32)
        arguments = [ptx.Struct([("u64", np.ascontiguousarray(words).view(np.uint32)), ("u64", out)])]
        self.kernels.launch(kernel, (1,), (32,), arguments, shared_bytes=TILE_BYTES)
        return out


@pytest.mark.parametrize("kernel", STATEMENTS)
def test_emulation(kernel: str) -> None:
    STATEMENTS[kernel](run_emulated)


@pytest.fixture(scope="module")
def run_ptx() -> RunPtx:
    return RunPtx(ptx_text())


@pytest.mark.parametrize("kernel", STATEMENTS)
def test_ptx(run_ptx: RunPtx, kernel: str) -> None:
    STATEMENTS[kernel](run_ptx)


# Mistakes that an asm text can have: what stands in it, and what would stand there instead.
REGISTER = r"(%\w+)"
MISTAKES = {
    "two rows of A": ("mma_bf16", rf"f32 (\{{.*?\}}), \{{{REGISTER},{REGISTER},", r"f32 \1, {\3,\2,"),
    "B upside down": ("mma_f16", rf"\{{{REGISTER},{REGISTER}\}}, (\{{%f)", r"{\2,\1}, \3"),
    "two columns of A": ("mma_tf32", rf"\{{{REGISTER},{REGISTER},{REGISTER},", r"{\1,\3,\2,"),
    "two matrices": ("ldmatrix_x4", rf"b16 \{{{REGISTER},{REGISTER},", r"b16 {\2,\1,"),
    "not transposed": ("ldmatrix_x4_trans", r"\.trans", ""),
    "transposed": ("ldmatrix_x4", r"\.m8n8\.x4", ".m8n8.x4.trans"),
    "no zeros": ("cp_async_16", r", 16, %\w+;", ", 16;"),
    "a smaller copy": ("cp_async_16", r"\.cg\.shared\.global (.*), 16, ", r".ca.shared.global \1, 8, "),
    "no wait": ("cp_async_16", r"cp\.async\.wait_group 0", "cp.async.wait_group 1"),
    "high for low": ("arithmetic", rf"bf16x2\.f32 {REGISTER}, {REGISTER}, {REGISTER}", r"bf16x2.f32 \1, \3, \2"),
    "truncation": ("arithmetic", r"cvt\.rna\.tf32\.f32", "mov.b32"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_the_text_of_an_instruction(mistake: str) -> None:
    kernel, right, wrong = MISTAKES[mistake]
    before, entry, rest = ptx_text().partition(f".entry {kernel}(")
    body, end, after = rest.partition("\n}")
    changed, count = re.subn(right, wrong, body)
    assert count >= 1
    run = RunPtx(before + entry + changed + end + after)
    with pytest.raises((AssertionError, ptx.PtxError)):
        STATEMENTS[kernel](run)


# ---- machine code ----------------------------------------------------------------------------------------------------
INSTRUCTIONS = {
    "ldmatrix_x4": ["LDSM.16.M88.4"],
    "ldmatrix_x4_trans": ["LDSM.16.MT88.4"],
    "mma_bf16": ["HMMA.16816.F32.BF16"],
    "mma_f16": ["HMMA.16816.F32 "],
    "mma_tf32": ["HMMA.1688.F32.TF32"],
    "cp_async_16": ["LDGSTS.E.BYPASS.128.ZFILL", "LDGDEPBAR", "DEPBAR.LE"],
    "arithmetic": ["MUFU.EX2", "F2FP.BF16.PACK_AB", "F2FP.PACK_AB"],
    "shuffles": ["SHFL.IDX", "SHFL.BFLY", "SHFL.UP", "SHFL.DOWN", "VOTE.ANY", "VOTE.ALL"],
}


def test_every_wrapper_becomes_its_instruction() -> None:
    code = disassembly(by_nvcc("primitives.cu", "cubin"))
    assert code.keys() == INSTRUCTIONS.keys()
    missing = {k: i for k, wanted in INSTRUCTIONS.items() for i in wanted if i not in code[k]}
    assert not missing
