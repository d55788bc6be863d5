"""``ldmatrix`` and ``mma`` against matrix products: fragments are filled and read by the formulas of the PTX ISA."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from . import launch
from .errors import PtxError
from .schedule import Lockstep, Random
from .snippet import execute, kernel
from .test_arithmetic import bfloat, pack

pytestmark = pytest.mark.exhaustive

WARPS = 2
THREADS = 32 * WARPS


class Format(NamedTuple):
    """How numbers of a type get into registers: rounding, bits, elements per register, size of a register."""

    rounded: Callable[[np.ndarray], np.ndarray]
    bits: Callable[[np.ndarray], np.ndarray]
    per_register: int
    bytes: int


def cut_tf32(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32).view(np.uint32) >> 13 << 13).view(np.float32)


FORMATS = {
    "bf16": Format(bfloat, pack, 2, 4),
    "f16": Format(lambda x: x.astype(np.float16), lambda x: x.astype(np.float16).view(np.uint16), 2, 4),
    "tf32": Format(lambda x: x.astype(np.float32), lambda x: x.astype(np.float32).view(np.uint32), 1, 4),
    "f32": Format(lambda x: x.astype(np.float32), lambda x: x.astype(np.float32).view(np.uint32), 1, 4),
    "f64": Format(lambda x: x, lambda x: x.view(np.uint64), 1, 8),
}


def position(matrix: str, shape: str, kind: str, lane: int, i: int) -> tuple[int, int]:
    """Row and column of the ``i``-th element a thread holds, as the ISA has it for each shape."""
    group, thread = lane >> 2, lane % 4
    if shape == "m8n8k4":
        return {"a": (group, thread), "b": (thread, group), "c": (group, thread * 2 + i)}[matrix]
    if matrix == "c":
        return (group if i < 2 else group + 8), thread * 2 + (i & 1)
    if kind == "f64":
        if matrix == "a":
            return (group if i % 2 == 0 else group + 8), thread + (2 * i if i % 2 == 0 else 2 * i - 2)
        return thread + 4 * i, group
    if kind == "tf32":
        if matrix == "a":
            return (group if i % 2 == 0 else group + 8), (thread if i < 2 else thread + 4)
        return (thread if i == 0 else thread + 4), group
    if shape == "m16n8k8":
        if matrix == "a":
            return (group if i < 2 else group + 8), thread * 2 + (i & 1)
        return thread * 2 + i, group
    if matrix == "a":
        return (group if i in (0, 1, 4, 5) else group + 8), thread * 2 + (i & 1) + (0 if i < 4 else 8)
    return thread * 2 + (i & 1) + (0 if i < 2 else 8), group


def fragments(x: np.ndarray, matrix: str, shape: str, kind: str, form: Format) -> np.ndarray:
    """``[thread, register]`` from ``[warp, row, column]``."""
    count = x[0].size // 32
    lanes = [[[w[position(matrix, shape, kind, lane, i)] for i in range(count)] for lane in range(32)] for w in x]
    bits = form.bits(np.array(lanes, x.dtype).reshape(THREADS, count))
    return np.ascontiguousarray(bits).view(f"u{form.bytes}")


def multiply(
    shape: str, types: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, registers: str = "", **options: object
) -> np.ndarray:
    """``mma`` of matrices ``[warp, row, column]``, by registers in memory; ``registers`` overrides the operands."""
    to, kind = types.split(".")[:2]
    parts = [fragments(x, m, shape, kind, FORMATS[f]) for x, m, f in ((a, "a", kind), (b, "b", kind), (c, "c", to))]
    d = np.zeros_like(parts[2])
    loads, names = "", []
    for number, (letter, part) in enumerate(zip("abcd", [*parts, d], strict=True)):
        size = part.dtype.itemsize
        own = [f"%{letter}{i}" for i in range(part.shape[1])]
        loads += f".reg .b{8 * size} %{letter}<8>; ld.param.u64 %rd1, [p{number}];"
        loads += f"mad.wide.u32 %rd{4 + number}, %r2, {size * len(own)}, %rd1;"
        if letter != "d":
            loads += "".join(f"ld.global.b{8 * size} {r}, [%rd{4 + number}+{size * i}];" for i, r in enumerate(own))
        names.append("{" + ", ".join(own) + "}")
    operands = registers or ", ".join([names[3], *names[:3]])
    body = f"{loads}\nmma.sync.aligned.{shape}.row.col.{types} {operands};\n"
    body += "".join(
        f"st.global.b{8 * d.dtype.itemsize} [%rd7+{d.dtype.itemsize * i}], %d{i};" for i in range(d.shape[1])
    )
    kernels = launch.load(kernel(body, ", ".join(f".param .u64 p{i}" for i in range(4))))
    kernels.launch("snippet", (1,), (THREADS,), [*parts, d], **options)
    elements = {"f32": d.view(np.float32), "f16": d.view(np.float16), "f64": d.view(np.float64)}[to].reshape(
        WARPS, 32, -1
    )
    found = np.full(c.shape, np.nan)
    for lane in range(32):
        for i in range(elements.shape[2]):
            found[(slice(None), *position("c", shape, kind, lane, i))] = elements[:, lane, i]
    return found


def matrices(shape: str, kind: str, to: str) -> list[np.ndarray]:
    m, n, k = (int(x) for x in shape.replace("m", "").replace("n", " ").replace("k", " ").split())
    rng = np.random.default_rng(0)
    sizes = ((m, k), (k, n), (m, n))
    return [FORMATS[f].rounded(rng.normal(size=(WARPS, *s))) for s, f in zip(sizes, (kind, kind, to), strict=True)]


SHAPES = [
    ("m16n8k16", "f32.bf16.bf16.f32"),
    ("m16n8k16", "f32.f16.f16.f32"),
    ("m16n8k16", "f16.f16.f16.f16"),
    ("m16n8k8", "f32.bf16.bf16.f32"),
    ("m16n8k8", "f32.f16.f16.f32"),
    ("m16n8k8", "f32.tf32.tf32.f32"),
    ("m16n8k4", "f32.tf32.tf32.f32"),
    ("m8n8k4", "f64.f64.f64.f64"),
    ("m16n8k4", "f64.f64.f64.f64"),
    ("m16n8k8", "f64.f64.f64.f64"),
    ("m16n8k16", "f64.f64.f64.f64"),
]
EPS = {"f32": 2**-22, "f16": 2**-11, "f64": 2**-50}  # of float32 sums every term is cut off
FORMATS["f16 result"] = FORMATS["f16"]


@pytest.mark.parametrize(("shape", "types"), SHAPES)
@pytest.mark.parametrize("schedule", [Lockstep(), Random(1)], ids=str)
def test_products(shape: str, types: str, schedule: Lockstep) -> None:
    to, kind = types.split(".")[:2]
    a, b, c = matrices(shape, kind, to)
    left, right = (cut_tf32(x) if kind == "tf32" else x for x in (a, b))
    exact = left.astype(np.float64) @ right.astype(np.float64) + c
    size = np.abs(left).astype(np.float64) @ np.abs(right) + np.abs(c)
    found = multiply(shape, types, a, b, c, schedule=schedule)
    assert (np.abs(found - exact) <= EPS[to] * size).all()


def test_tf32_reads_ten_bits() -> None:
    """Cut, not rounded: just below the next number is the number."""
    a, b, c = matrices("m16n8k8", "tf32", "f32")
    a[:] = np.nextafter(np.float32(1 + 2**-10), np.float32(0))
    b[:], c[:] = 0, 0
    b[:, 0] = 1
    assert (multiply("m16n8k8", "f32.tf32.tf32.f32", a, b, c) == 1).all()


def test_infinite_and_nan() -> None:
    a, b, c = matrices("m16n8k16", "bf16", "f32")
    a[0, 3, 5], c[1, 2, 1] = np.inf, np.nan
    found = multiply("m16n8k16", "f32.bf16.bf16.f32", a, b, c)
    assert np.isinf(found[0, 3]).all()
    assert np.isnan(found[1, 2, 1])
    assert np.isfinite(found).sum() == found.size - 9


def test_a_swapped_register_is_found() -> None:
    """Each pair of registers of a fragment exchanged: the product is wrong every time."""
    a, b, c = matrices("m16n8k16", "bf16", "f32")
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    right = "{%d0, %d1, %d2, %d3}, {%a0, %a1, %a2, %a3}, {%b0, %b1}, {%c0, %c1, %c2, %c3}"
    assert np.allclose(multiply("m16n8k16", "f32.bf16.bf16.f32", a, b, c, right), exact)
    for first, second in (
        ("%a1", "%a2"),
        ("%a0", "%a3"),
        ("%b0", "%b1"),
        ("%c0", "%c2"),
        ("%d1", "%d3"),
        ("%a1", "%b0"),
    ):
        wrong = right.replace(first, "%swap").replace(second, first).replace("%swap", second)
        assert not np.allclose(multiply("m16n8k16", "f32.bf16.bf16.f32", a, b, c, wrong), exact), (first, second)


# ---- ldmatrix --------------------------------------------------------------------------------------------------------
def load_matrices(
    count: int, trans: str, address: str = "mad.lo.s32 %r8, %r6, 48, %r3;", schedule: Lockstep | None = None
) -> np.ndarray:
    """Rows of 48 bytes in shared memory, written by the threads; what each thread holds of ``count`` matrices."""

    def store(i: int) -> str:
        """Two neighbours of the thread's row."""
        both = "shl.b32 %r8, %r7, 16; add.u32 %r8, %r8, 65536; or.b32 %r8, %r8, %r7;"
        return f"add.u32 %r7, %r5, {2 * i}; {both} st.shared.b32 [%r4+{4 * i}], %r8;"

    registers = ", ".join(f"%m{i}" for i in range(count))
    body = f"""
        .shared .align 16 .b8 rows[1536];
        .reg .b32 %m<4>;
        mov.u32 %r3, rows; mad.lo.s32 %r4, %a, 48, %r3;
        mul.lo.u32 %r5, %a, 16;
        {"".join(map(store, range(4)))}
        bar.sync 0;
        and.b32 %r6, %a, 31;
        {address}
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r8];
        mov.b32 %d, %m{count - 1};
    """
    return execute(body, a=np.arange(32, dtype=np.uint32), schedule=schedule)


@pytest.mark.parametrize("schedule", [Lockstep(), Random(1)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, schedule: Lockstep) -> None:
    """Element (r, c) of row ``r`` of all rows is ``16 r + c`` here; the last of the matrices is looked at."""
    first = 8 * (count - 1)
    found = load_matrices(count, "", schedule=schedule)
    turned = load_matrices(count, ".trans", schedule=schedule)
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        low, high = 16 * (first + row) + column, 16 * (first + row) + column + 1
        assert found[lane] == low | high << 16
        low, high = 16 * (first + column) + row, 16 * (first + column + 1) + row
        assert turned[lane] == low | high << 16


def test_mistakes_of_ldmatrix() -> None:
    with pytest.raises(PtxError, match="out of bounds: 16 bytes at offset 1536 of shared memory"):
        load_matrices(4, "", "mad.lo.s32 %r8, %r6, 48, %r3; add.u32 %r8, %r8, 48;")
    with pytest.raises(PtxError, match="not aligned to 16 bytes"):
        load_matrices(4, "", "mad.lo.s32 %r8, %r6, 40, %r3;")
    with pytest.raises(PtxError, match="needs all threads of the warp"):
        load_matrices(4, "", "setp.lt.u32 %p1, %r6, 9; @%p1 exit; mad.lo.s32 %r8, %r6, 48, %r3;")


# ---- stmatrix --------------------------------------------------------------------------------------------------------
def stored_matrices(count: int, trans: str, schedule: Lockstep | None = None) -> np.ndarray:
    """``[matrix, row, column]`` as they are in shared memory, in rows of 16 bytes, from registers of the threads.

    Register ``i`` of thread ``t`` holds the halves ``1000 i + 2 t`` and the next one; row ``r`` of matrix ``i`` is put
    in the place of row ``7 - r``.
    """
    registers = ", ".join(f"%m{i}" for i in range(count))
    fill = "".join(
        f"mad.lo.u32 %m{i}, %a, 2, {1000 * i}; add.u32 %r8, %m{i}, 1; shl.b32 %r8, %r8, 16; or.b32 %m{i}, %m{i}, %r8;"
        for i in range(4)
    )
    body = f"""
        .shared .align 16 .b8 rows[512];
        .reg .b32 %m<4>;
        {fill}
        mov.u32 %r3, rows; xor.b32 %r4, %a, 7; mad.lo.s32 %r4, %r4, 16, %r3;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r4], {{{registers}}};
        bar.sync 0;
        mad.lo.s32 %r5, %a, 16, %r3;
        ld.shared.b32 %d, [%r5+WORD];
    """
    threads = np.arange(32, dtype=np.uint32)
    words = [execute(body.replace("WORD", str(4 * i)), a=threads, schedule=schedule) for i in range(4)]
    return np.stack(words, 1).view(np.uint16).reshape(4, 8, 8)


@pytest.mark.parametrize("schedule", [Lockstep(), Random(1)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count: int, schedule: Lockstep) -> None:
    """Thread ``t`` holds two neighbours of row ``t / 4``, or with ``.trans`` of that column; nobody writes the rest."""
    plain, turned = stored_matrices(count, "", schedule), stored_matrices(count, ".trans", schedule)
    for i, row, column in np.ndindex(count, 8, 8):
        value = 1000 * i + 8 * row + column
        assert plain[i, 7 - row, column] == value
        assert turned[i, 7 - column, row] == value
    assert (plain[count:] == 0xFFFF).all()


def test_mistakes_of_stmatrix() -> None:
    with pytest.raises(PtxError, match="not aligned to 16 bytes"):
        execute("stmatrix.sync.aligned.m8n8.x1.shared.b16 [8], {%r1};", a=np.arange(32, dtype=np.uint32))
    with pytest.raises(PtxError, match="2 registers are wanted"):
        execute("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r4], {%r1};", a=np.arange(32, dtype=np.uint32))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32 {%f1, %f2}, {%r1}, {%r2}, {%f1, %f2};", "not modelled"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.f64.f64.f32 {%f1, %f2}, {%r1}, {%r2}, {%f1, %f2};", "not modelled"),
        ("mma.sync.aligned.m16n8k16.row.row.f32.s8.s8.f32 {%f1}, {%r1}, {%r2}, {%f1};", "type .s8 of mma"),
        (
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2}, {%r3}, {%f1,%f2,%f3,%f4};",
            "4 registers are wanted for operand 1, not 2",
        ),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2}, [%r3];", "4 registers are wanted"),
        ("ldmatrix.sync.aligned.m8n16.x4.shared.b16 {%r1, %r2}, [%r3];", "unknown modifier .m8n16"),
    ],
)
def test_what_is_not_modelled_is_refused(line: str, reason: str) -> None:
    with pytest.raises(PtxError, match=reason):
        execute(line + "mov.u32 %d, 0;", a=np.arange(32, dtype=np.uint32))
