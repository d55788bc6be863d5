"""``wgmma`` against matrix products: matrices are laid out in shared memory by the figures of the PTX ISA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from . import launch
from .errors import PtxError
from .schedule import Lockstep, Priority, Random
from .snippet import kernel
from .test_matrix import FORMATS, position

pytestmark = pytest.mark.exhaustive

BASE = 1024  # of the first matrix, see machine.py
ROWS, THREADS = 64, 128
DEPTHS = {"bf16": 16, "f16": 16, "tf32": 8}
WIDTHS = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of the rows of a pattern, by mode
SCHEDULES = [Lockstep(eager=0), Lockstep(eager=1), Random(1), Random(2, eager=0), Priority(1)]


class Layout(NamedTuple):
    """How a matrix lies in memory; neighbours are along ``major``: "k", or "line" (a row of A, a column of B)."""

    mode: int
    major: str
    leading: int = 0
    stride: int = 0

    def descriptor(self, address: int) -> int:
        assert not (address | self.leading | self.stride) % 16
        return address >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32 | self.mode << 62


def image(lines: np.ndarray, layout: Layout) -> np.ndarray:
    """Bytes of a matrix ``[line, k]``: chunks of 16 bytes, in patterns of eight rows whose chunks change places."""
    size = lines.dtype.itemsize
    chunk, width = 16 // size, WIDTHS[layout.mode]
    found: dict[int, bytes] = {}
    for line, k in np.ndindex(lines.shape):
        row, along = (line, k) if layout.major == "k" else (k, line)
        eight, row = divmod(row, 8)
        number, inside = divmod(along, chunk)
        if width == 16:
            per_eight, per_chunk = (
                (layout.stride, layout.leading) if layout.major == "k" else (layout.leading, layout.stride)
            )
            at = eight * per_eight + number * per_chunk + row * 16
        else:
            pattern, number = divmod(number, width // 16)
            # rows share lines of 128 bytes: those of the n-th line have their chunks exchanged with n
            number ^= row * width // 128
            at = eight * layout.stride + pattern * layout.leading + row * width + number * 16
        assert at + inside * size not in found
        found[at + inside * size] = lines[line, k].tobytes()
    data = np.full(-(-(max(found) + size) // 1024) * 1024, 0xFF, np.uint8)
    for at, content in found.items():
        data[at : at + size] = np.frombuffer(content, np.uint8)
    return data


def shared_by_threads(data: np.ndarray, array: str, offset: int) -> str:
    """All threads store the words of an array of global memory."""
    words = range(0, data.size // 4, THREADS)
    copies = "".join(
        f"ld.global.b32 %r8, [%rd5+{4 * i}]; st.shared.b32 [%r9+{offset + 4 * i}], %r8;"
        for i in words
        if i + THREADS <= data.size // 4
    )
    assert data.size % (4 * THREADS) == 0
    return f"ld.param.u64 %rd4, [{array}]; mad.wide.u32 %rd5, %r2, 4, %rd4; {copies}\n"


def fragment(a: np.ndarray, kind: str) -> np.ndarray:
    """A ``[64, k]`` as the registers ``[thread, 4]``: every warp has its 16 rows like those of ``mma``."""
    form, shape = FORMATS[kind], f"m16n8k{a.shape[1]}"
    held = [
        [a[tuple(np.add(position("a", shape, kind, t % 32, i), (t // 32 * 16, 0)))] for i in range(a.shape[1] // 2)]
        for t in range(THREADS)
    ]
    return np.ascontiguousarray(form.bits(np.array(held, a.dtype))).view(np.uint32)


def place(thread: int, i: int) -> tuple[int, int]:
    """Row and column of element ``i`` of a thread in the sum: two neighbours of a row in every eight columns."""
    warp, lane = divmod(thread, 32)
    return warp * 16 + lane // 4 + i % 4 // 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2


K_MAJOR = Layout(1, "k", 16, 1024)
SIGNS = "1, 1"


def product(
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    kind: str,
    of_a: Layout | None = K_MAJOR,
    of_b: Layout = K_MAJOR,
    scale: str = "1",
    signs: str = SIGNS,
    step: int = 0,
    schedule: Lockstep | None = None,
    edits: Sequence[tuple[str, str]] = (),
) -> np.ndarray:
    """``A B + C`` of A ``[64, k]`` and B ``[k, n]``; ``of_a`` ``None``: in registers. ``step``: bytes to go on by."""
    depth, columns = DEPTHS[kind], b.shape[1]
    bits = FORMATS[kind].bits
    b_image = image(np.ascontiguousarray(bits(b.T)).reshape(b.T.shape), of_b)
    inputs: list[np.ndarray] = [b_image, c_of_threads(c), np.zeros((THREADS, columns // 2), np.float32)]
    body = f".shared .align 1024 .b8 tiles[{65536}]; mov.u32 %r9, tiles; mad.lo.u32 %r9, %r2, 4, %r9;"
    body += ".reg .b32 %a<4>; .reg .b32 %d<128>;\n" + shared_by_threads(b_image, "p0", 0)
    if of_a is None:
        inputs.append(fragment(a, kind))
        body += "ld.param.u64 %rd4, [p3]; mad.wide.u32 %rd5, %r2, 16, %rd4;"
        body += "ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%rd5];\n"
        left = "{%a0, %a1, %a2, %a3}"
    else:
        a_image = image(np.ascontiguousarray(bits(a)).reshape(a.shape), of_a)
        inputs.append(a_image)
        body += shared_by_threads(a_image, "p3", b_image.size)
        body += f"mov.b64 %rd8, {of_a.descriptor(BASE + b_image.size + step)};\n"
        left = "%rd8"
    registers = [f"%d{i}" for i in range(columns // 2)]
    size = 4 * len(registers)
    body += f"ld.param.u64 %rd6, [p1]; mad.wide.u32 %rd6, %r2, {size}, %rd6;"
    body += "".join(f"ld.global.b32 {r}, [%rd6+{4 * i}];" for i, r in enumerate(registers))
    body += f"\nmov.b64 %rd9, {of_b.descriptor(BASE + step)};\n"
    turns = ["" if x is None or kind == "tf32" else f", {int(x.major == 'line')}" for x in (of_a, of_b)]
    body += f"""
        fence.proxy.async.shared::cta;
        bar.sync 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind}
            {{{", ".join(registers)}}}, {left}, %rd9, {scale}, {signs}{"".join(turns)};
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
    """
    body += f"ld.param.u64 %rd7, [p2]; mad.wide.u32 %rd7, %r2, {size}, %rd7;\n"
    body += "".join(f"st.global.b32 [%rd7+{4 * i}], {r};" for i, r in enumerate(registers))
    for before, after in edits:
        assert before in body
        body = body.replace(before, after)
    kernels = launch.load(kernel(body, ", ".join(f".param .u64 p{i}" for i in range(4))))
    kernels.launch("snippet", (1,), (THREADS,), inputs, schedule=schedule)
    found = np.full(c.shape, np.nan)
    for thread in range(THREADS):
        for i in range(len(registers)):
            found[place(thread, i)] = inputs[2][thread, i]
    return found


def c_of_threads(c: np.ndarray) -> np.ndarray:
    held = [[c[place(thread, i)] for i in range(c.shape[1] // 2)] for thread in range(THREADS)]
    return np.array(held, np.float32)


def matrices(kind: str, columns: int, depth: int | None = None) -> list[np.ndarray]:
    """Small integers, of which every product and sum is exact."""
    rng, k = np.random.default_rng(0), depth or DEPTHS[kind]
    return [rng.integers(-9, 10, size=s).astype(np.float64) for s in ((ROWS, k), (k, columns), (ROWS, columns))]


def exact(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return a @ b + c


def run(kind: str, columns: int, **options: Any) -> bool:
    """Whether the product is right."""
    a, b, c = matrices(kind, columns)
    return np.array_equal(product(a, b, c, kind, **options), exact(a, b, c))


# ---- layouts ---------------------------------------------------------------------------------------------------------
HALF_LAYOUTS = [
    Layout(0, "k", 128, 256),
    Layout(0, "k", 2048, 128),
    Layout(1, "k", 0, 1024),
    Layout(2, "k", 16, 512),
    Layout(3, "k", 0, 256),
    Layout(3, "k", 48, 768),
    Layout(0, "line", 2048, 128),
    Layout(0, "line", 128, 256),
    Layout(1, "line", 2048, 1024),
    Layout(2, "line", 1024, 512),
    Layout(3, "line", 512, 256),
]


@pytest.mark.parametrize("layout", HALF_LAYOUTS, ids=lambda x: f"{x.mode}-{x.major}-{x.leading}-{x.stride}")
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_layouts_of_halves(kind: str, layout: Layout) -> None:
    """Every mode, along k and across it, of B and of A."""
    assert run(kind, 64, of_b=layout)
    assert run(kind, 24, of_a=layout, schedule=Random(3))


@pytest.mark.parametrize("layout", [x for x in HALF_LAYOUTS if x.major == "k"], ids=str)
def test_layouts_of_tf32(layout: Layout) -> None:
    assert run("tf32", 40, of_b=layout)
    assert run("tf32", 16, of_a=layout)


@pytest.mark.parametrize("columns", [8, 64, 200, 256])
@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_registers_of_a(kind: str, columns: int) -> None:
    assert run(kind, columns, of_a=None)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s}, {s.eager}")
def test_schedules(schedule: Lockstep) -> None:
    assert run("bf16", 32, schedule=schedule)


@pytest.mark.parametrize("mode", [1, 2])
def test_steps_along_k(mode: int) -> None:
    """A pattern is wider than k: the next part of it begins 32 bytes further on, inside the pattern."""
    wide = Layout(mode, "k", 0, 8 * WIDTHS[mode])
    for step in range(WIDTHS[mode] // 32):
        a, b, c = matrices("bf16", 16, depth=WIDTHS[mode] // 2)
        here = slice(16 * step, 16 * step + 16)
        found = product(a, b, c, "bf16", of_a=wide, of_b=wide, step=32 * step)
        np.testing.assert_array_equal(found, exact(a[:, here], b[here], c))


def test_signs_and_scale() -> None:
    a, b, c = matrices("f16", 16)
    for signs, sign in (("-1, 1", -1), ("1, -1", -1), ("-1, -1", 1)):
        for of_a in (K_MAJOR, None):
            found = product(a, b, c, "f16", signs=signs, of_a=of_a)
            np.testing.assert_array_equal(found, exact(sign * a, b, c))
    np.testing.assert_array_equal(product(a, b, np.full_like(c, np.nan), "f16", scale="0"), a @ b)


def test_tf32_reads_ten_bits() -> None:
    """Cut, not rounded: just below the next number is the number."""
    a, b, c = matrices("tf32", 8)
    a[:] = np.nextafter(np.float32(1 + 2**-10), np.float32(0))
    for of_a in (K_MAJOR, None):
        np.testing.assert_array_equal(product(a, b, c, "tf32", of_a=of_a), exact(np.ones_like(a), b, c))


# One unit in the last place of 1 is 2^-23. Eight products of half types are a group.
SUMS = {
    "nothing is lost": ([0.5, 2.0**-23], 1.0, 1.5 + 2.0**-23),
    "towards zero": ([1.5 * 2.0**-23], 1.0, 1 + 2.0**-23),
    "towards zero from below": ([-1.5 * 2.0**-23], -1.0, -1 - 2.0**-23),
    "each before the sum": ([0.75 * 2.0**-24] * 8, 1.0, 1.0),
    "one bit more is kept": ([2.0**-24] * 2, 1.0, 1 + 2.0**-23),
    "a second group": ([1.0] + [0.0] * 7 + [2.0**-24] * 2, 0.0, 1 + 2.0**-23),
    "not finite": ([np.inf, 1.0], 1.0, np.inf),
    "beyond float32": ([2.0**127, 2.0**127], 0.0, np.inf),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_cut_off(name: str) -> None:
    products, start, expected = SUMS[name]
    a, b, c = np.zeros((ROWS, 16)), np.ones((16, 8)), np.full((ROWS, 8), start)
    a[5, : len(products)] = products
    found = product(a, b, c, "bf16")
    assert (found[5] == expected).all()
    assert (found[6] == start).all()


# ---- what is missing is found ----------------------------------------------------------------------------------------
FENCE = "wgmma.fence.sync.aligned;"
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
PROXY = "fence.proxy.async.shared::cta;"


@pytest.mark.parametrize(
    "edits",
    [
        pytest.param([(WAIT, "")], id="no wait"),
        pytest.param([(WAIT, "wgmma.wait_group.sync.aligned 1;")], id="a wait for less"),
        pytest.param([(COMMIT, ""), (WAIT, WAIT + COMMIT)], id="not committed"),
        pytest.param([(PROXY, "")], id="no proxy fence"),
        pytest.param([(PROXY, "fence.proxy.async.global;")], id="a proxy fence of another space"),
        pytest.param([(PROXY, "fence.acq_rel.cta;")], id="an ordinary fence"),
        pytest.param([("bar.sync 0;", "")], id="no barrier"),
        pytest.param([(PROXY, PROXY + "st.shared.b32 [%r9], 0;")], id="written after the fence"),
    ],
)
@pytest.mark.parametrize("schedule", [Lockstep(eager=0), Lockstep(eager=1), Random(1)], ids=lambda s: str(s.eager))
def test_wrong_results(edits: list[tuple[str, str]], schedule: Lockstep) -> None:
    """Whenever operands are read: the sum is there when it was waited for, data when it was fenced."""
    assert not run("bf16", 16, edits=edits, schedule=schedule)


@pytest.mark.parametrize(
    "edits",
    [
        pytest.param([(COMMIT, COMMIT + "mov.b32 %a1, 0;")], id="A in registers"),
        pytest.param([(COMMIT, COMMIT + "st.shared.b32 [%r9], 0;")], id="shared memory"),
    ],
)
def test_an_operand_that_is_overwritten_too_early(edits: list[tuple[str, str]]) -> None:
    """It shows if operands are read late, not if they are read at once."""
    assert not run("bf16", 16, of_a=None, edits=edits, schedule=Lockstep(eager=0))
    assert run("bf16", 16, of_a=None, edits=edits, schedule=Lockstep(eager=1))
    assert run("bf16", 16, of_a=None, edits=[(WAIT, WAIT + edits[0][1].removeprefix(COMMIT))])


def test_what_is_written_to_a_sum_too_early_is_lost() -> None:
    for schedule in (Lockstep(eager=0), Lockstep(eager=1)):
        assert run("bf16", 16, edits=[(COMMIT, "mov.b32 %d3, 0;" + COMMIT)], schedule=schedule)
    assert not run("bf16", 16, edits=[(WAIT, WAIT + "mov.b32 %d3, 0;")])


def test_the_fence_of_the_reader() -> None:
    """Behind the barrier it serves as well, in the warps that have it; in some of them it does not serve the others."""
    assert run("bf16", 16, edits=[(PROXY, ""), ("bar.sync 0;", "bar.sync 0;" + PROXY)])
    some = "setp.lt.u32 %p1, %r2, 32; @%p1 " + PROXY
    assert not run("bf16", 16, edits=[(PROXY, ""), ("bar.sync 0;", "bar.sync 0;" + some)])
    assert run("bf16", 16, edits=[(PROXY, ""), ("bar.sync 0;", "bar.sync 0;" + some + "bar.sync 0;")])


def test_copies_are_fenced_when_they_are_there() -> None:
    """``cp.async`` writes through the generic proxy, when it is waited for."""
    copy = "cp.async.ca.shared.global [%r9], [%rd5], 4; cp.async.commit_group; "
    load = "ld.param.u64 %rd5, [p0]; mad.wide.u32 %rd5, %r2, 4, %rd5; "
    here, wait = (PROXY, load + copy + PROXY), "cp.async.wait_group 0; "
    for schedule in (Lockstep(eager=0), Lockstep(eager=1)):
        assert run("bf16", 16, schedule=schedule, edits=[(PROXY, load + copy + wait + PROXY)])
        assert not run("bf16", 16, schedule=schedule, edits=[here])
        assert not run("bf16", 16, schedule=schedule, edits=[here, ("bar.sync 0;", wait + "bar.sync 0;")])
        assert run("bf16", 16, schedule=schedule, edits=[here, ("bar.sync 0;", wait + "bar.sync 0;" + PROXY)])


TWICE = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3, %d4, %d5, %d6, %d7}, %rd8, %rd9, 1"
SECOND = f"{TWICE}, 1, 1, 0, 0;"


def test_products_one_after_the_other() -> None:
    """Sums go on without a fence; a wait for the first is none for the second."""
    a, b, c = matrices("bf16", 16)
    twice = exact(a, b, exact(a, b, c))
    for schedule in SCHEDULES:
        for between in ("", COMMIT):
            edits = [(COMMIT, between + SECOND + COMMIT)]
            np.testing.assert_array_equal(product(a, b, c, "bf16", edits=edits, schedule=schedule), twice)
        edits = [(COMMIT, COMMIT + SECOND + COMMIT), (WAIT, "wgmma.wait_group.sync.aligned 1;")]
        assert np.isnan(product(a, b, c, "bf16", edits=edits, schedule=schedule)).all()


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([(FENCE, "")], "no wgmma.fence since %d0 was used"),
        ([(FENCE, FENCE + "mov.b32 %d5, 0;")], "no wgmma.fence since %d5 was used"),
        ([(WAIT, WAIT + "mov.b32 %r8, %d5;" + SECOND)], "no wgmma.fence since %d5 was used"),
        ([(COMMIT, TWICE.replace("n16", "n8").replace(", %d4, %d5, %d6, %d7", "") + ", 1, 1, 0, 0;")], "since %d0 was"),
        ([(FENCE, "setp.lt.u32 %p1, %r2, 64; @%p1 bra SKIP;" + FENCE), (WAIT, WAIT + "SKIP:")], None),
        ([(FENCE, "setp.lt.u32 %p1, %r2, 64; @%p1 add.u64 %rd9, %rd9, 2;" + FENCE)], "do not execute the same"),
        ([(FENCE, "setp.lt.u32 %p1, %r2, 5; @%p1 add.u64 %rd9, %rd9, 2;" + FENCE)], "differs among threads"),
        ([(FENCE, "setp.lt.u32 %p1, %r2, 32; @%p1 bra SKIP;" + FENCE + "SKIP:")], "do not execute the same"),
        ([(FENCE, "setp.lt.u32 %p1, %r2, 5; @%p1 exit;" + FENCE)], "needs all threads of the warp"),
        ([("mov.b64 %rd9, ", "mov.b64 %rd9, 562949953421312; or.b64 %rd9, %rd9, ")], "a base offset"),
        ([(FENCE, "or.b64 %rd9, %rd9, 16383;" + FENCE)], "out of bounds"),
    ],
)
def test_forbidden(edits: list[tuple[str, str]], message: str | None) -> None:
    with pytest.raises(PtxError, match=message or "not all warps executed a wgmma"):
        run("bf16", 16, edits=edits)


def test_blocks_of_whole_warpgroups() -> None:
    body = "wgmma.fence.sync.aligned;"
    kernels = launch.load(kernel(body, ""))
    kernels.launch("snippet", (1,), (256,), [])
    with pytest.raises(PtxError, match="whole warpgroups"):
        kernels.launch("snippet", (1,), (96,), [])


A_SUM, OTHER = "{%f1, %f2, %f3, %f4}", "{%r1, %r2, %r3, %r4}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"m64n8k16.f32.bf16.f16 {A_SUM}, %rd1, %rd2, 1, 1, 1, 0, 0;", "not modelled"),
        (f"m64n8k16.f16.f16.f16 {A_SUM}, %rd1, %rd2, 1, 1, 1, 0, 0;", "not modelled"),
        (f"m64n8k8.f32.bf16.bf16 {A_SUM}, %rd1, %rd2, 1, 1, 1, 0, 0;", "not modelled"),
        (f"m64n8k32.f32.e4m3.e4m3 {A_SUM}, %rd1, %rd2, 1, 1, 1;", "unknown modifier .m64n8k32"),
        (f"m64n8k16.f32.bf16.bf16 {A_SUM}, %rd1, %rd2, 1, 1, 1, 0;", "8 operands are wanted, not 7"),
        (f"m64n8k8.f32.tf32.tf32 {A_SUM}, %rd1, %rd2, 1, 1, 1, 0;", "6 operands are wanted, not 7"),
        (f"m64n8k16.f32.bf16.bf16 {A_SUM}, {OTHER}, %rd2, 1, 1, 1, 0, 0;", "7 operands are wanted, not 8"),
        (f"m64n8k16.f32.bf16.bf16 {A_SUM}, %rd1, %rd2, 1, 2, 1, 0, 0;", "signs are 1 or -1"),
        (f"m64n16k16.f32.bf16.bf16 {A_SUM}, %rd1, %rd2, 1, 1, 1, 0, 0;", "8 registers are wanted for operand 0"),
        ("m64n8k16.f32.bf16.bf16 {%f1, %f2, %f2, %f4}, %rd1, %rd2, 1, 1, 1, 0, 0;", "a register stands twice"),
    ],
)
def test_what_is_not_modelled_is_refused(line: str, reason: str) -> None:
    with pytest.raises(PtxError, match=reason):
        launch.load(kernel(f"wgmma.mma_async.sync.aligned.{line}")).launch("snippet", (1,), (THREADS,), [])
