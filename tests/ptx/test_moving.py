"""Registers, memory and its bounds, atomics, asynchronous copies."""

from __future__ import annotations

import math

import numpy as np
import pytest

from . import Pointer, Struct, launch
from .errors import PtxError
from .schedule import Lockstep, Priority, Random
from .snippet import execute, kernel

pytestmark = pytest.mark.exhaustive

BUFFER = ".shared .align 16 .b8 buffer[256]; mov.u32 %r3, buffer; shl.b32 %r4, %r2, 2; add.u32 %r5, %r3, %r4;\n"


def run(body: str, *args: object, threads: int = 1, grid: int = 1, declarations: str = "", **options: object) -> None:
    """A kernel whose parameters ``p0, p1, …`` are pointers or 32-bit numbers."""
    kinds = [".u64" if isinstance(a, np.ndarray | Pointer) else ".u32" for a in args]
    params = ", ".join(f".param {kind} p{i}" for i, kind in enumerate(kinds))
    loads = "".join(
        f"ld.param{kind} {'%rd' if kind == '.u64' else '%r'}{10 + i}, [p{i}];\n" for i, kind in enumerate(kinds)
    )
    kernels = launch.load(kernel(loads + body, params, declarations))
    kernels.launch("snippet", (grid,), (threads,), args, **options)


# ---- registers -------------------------------------------------------------------------------------------------------
def test_mov() -> None:
    assert execute("mov.u32 %d, %a;", a=np.uint32([5])).tolist() == [5]
    assert execute("mov.f32 %d, 0fBFC00000;", np.float32, a=[0]).tolist() == [-1.5]
    assert execute("mov.f64 %d, 0d4000000000000000;", np.float64, a=[0]).tolist() == [2]
    assert execute("mov.b32 %d, -2;", np.int32, a=[0]).tolist() == [-2]
    assert execute("mov.b16 %h1, 0x3C00; mov.b16 %d, %h1;", np.float16, a=[0]).tolist() == [1]
    assert execute("mov.u64 %d, 010;", np.uint64, a=[0]).tolist() == [8], "a leading 0 means octal"


def test_packing() -> None:
    a, b = np.uint32([0x11112222]), np.uint32([0x33334444])
    found = execute("mov.b64 %d, {%a, %b};", np.uint64, a=a, b=b)
    assert found.tolist() == [0x3333444411112222]
    body = "mov.b32 {%h1, %h2}, %a; mov.b32 %d, {%h2, %h1};"
    assert execute(body, a=a).tolist() == [0x22221111]
    assert execute("mov.b64 {%r5, %d}, %a;", a=np.uint64([0x3333444411112222])).tolist() == [0x33334444]
    assert execute("{ .reg .b32 low; mov.b64 {low, %d}, %a; }", a=np.uint64([0x3333444411112222])).tolist() == [
        0x33334444
    ]
    assert execute("mov.b64 {_, %d}, %a;", a=np.uint64([0x3333444411112222])).tolist() == [0x33334444]


def test_a_guard_leaves_the_other_threads_alone() -> None:
    body = "mov.u32 %d, 7; setp.eq.u32 %p1, %a, 1; @%p1 mov.u32 %d, 8; @!%p1 add.u32 %d, %d, %a;"
    assert execute(body, a=np.uint32([0, 1, 2])).tolist() == [7, 8, 9]


# ---- loads and stores ------------------------------------------------------------------------------------------------
def test_vectors() -> None:
    x, y = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
    run("ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd10+16]; st.global.v4.f32 [%rd11], {%f4, %f3, %f2, %f1};", x, y)
    assert y.tolist() == [7, 6, 5, 4, 0, 0, 0, 0]
    wide = np.zeros(2, np.float64)
    line = "ld.global.nc.L1::no_allocate.v2.b64 {%rd1, %rd2}, [%rd10]; st.global.v2.b64 [%rd11], {%rd2, %rd1};"
    run(line, np.array([1.5, 2.5]), wide)
    assert wide.tolist() == [2.5, 1.5]


def test_narrow_loads_fill_their_register() -> None:
    x, y = np.array([0xFF, 0x80], np.uint8), np.zeros(4, np.uint32)
    body = (
        "ld.global.u8 %r1, [%rd10]; ld.global.s8 %r2, [%rd10+1]; ld.global.s8 %h1, [%rd10]; cvt.u32.u16 %r3, %h1;"
        "st.global.v4.b32 [%rd11], {%r1, %r2, %r3, %r3}; st.global.u8 [%rd11+12], %r2;"
    )
    run(body, x, y)
    assert y.tolist() == [0xFF, 0xFFFFFF80, 0xFFFF, 0xFF80]


def test_an_index_of_64_bits() -> None:
    """Buffers are far apart: an offset whose upper half is lost is out of bounds or misses."""
    x, y = np.uint32([1, 2, 3]), np.uint32([4])
    body = (
        "sub.u64 %rd1, %rd11, %rd10; add.u64 %rd2, %rd10, %rd1; ld.global.u32 %r1, [%rd2]; st.global.u32 [%rd10], %r1;"
    )
    run(body, x, y)
    assert x[0] == 4
    cut = body.replace("add.u64 %rd2", "and.b64 %rd1, %rd1, 0xFFFFFFFF; add.u64 %rd2")
    run(cut, x := np.uint32([1, 2, 3]), y)
    assert x[0] == 1


def test_generic_addresses() -> None:
    """One load reads global, shared and local memory, whichever the thread's address means."""
    body = (
        f"{BUFFER} .local .align 4 .b8 own[8]; mov.u64 %rd1, own; mov.u32 %r8, 300; st.local.u32 [own+4], %r8;"
        "add.u32 %r9, %r2, 200; st.shared.u32 [%r5], %r9; cvt.u64.u32 %rd2, %r5; cvta.shared.u64 %rd2, %rd2;"
        "cvta.local.u64 %rd3, %rd1; add.u64 %rd3, %rd3, 4;"
        "setp.eq.u32 %p1, %r2, 0; setp.eq.u32 %p2, %r2, 1;"
        "selp.b64 %rd4, %rd10, %rd2, %p1; selp.b64 %rd4, %rd3, %rd4, %p2;"
        "ld.u32 %r10, [%rd4]; mul.wide.u32 %rd5, %r2, 4; add.u64 %rd5, %rd11, %rd5; st.u32 [%rd5], %r10;"
    )
    y = np.zeros(3, np.uint32)
    run(body, np.uint32([100]), y, threads=3)
    assert y.tolist() == [100, 300, 202]


def test_constants_and_tables_of_the_module() -> None:
    declarations = ".const .align 4 .b32 table[3] = {10, 0x14, 30};\n.global .align 4 .u32 count = 5;\n"
    y = np.zeros(3, np.uint32)
    body = (
        "mov.u64 %rd1, table; mul.wide.u32 %rd2, %r2, 4; add.u64 %rd1, %rd1, %rd2; ld.const.u32 %r3, [%rd1];"
        "ld.global.u32 %r4, [count]; add.u32 %r3, %r3, %r4; add.u64 %rd3, %rd10, %rd2; st.global.u32 [%rd3], %r3;"
    )
    run(body, y, threads=3, declarations=declarations)
    assert y.tolist() == [15, 25, 35]


def test_parameters() -> None:
    """Laid out as C does: scalars, arrays of bytes, nested structs, a pointer into an array."""
    y = np.zeros(8, np.float64)
    struct = Struct([("u32", 7), ("u64", Pointer(y, 8)), ("f32", 1.5), ("f64", 2.5), ("u8", 9)])
    body = (
        "ld.param.u32 %r3, [s]; ld.param.u64 %rd1, [s+8]; ld.param.f32 %f1, [s+16]; ld.param.f64 %fd1, [s+24];"
        "ld.param.u8 %r4, [s+32]; cvt.rn.f64.u32 %fd2, %r3; cvt.f64.f32 %fd3, %f1; cvt.rn.f64.u32 %fd4, %r4;"
        "st.global.v2.f64 [%rd1+8], {%fd2, %fd3}; st.global.f64 [%rd1], %fd1;"
        "ld.param.f32 %f2, [t]; cvt.f64.f32 %fd5, %f2; st.global.f64 [%rd1+24], %fd5; st.global.f64 [%rd1+32], %fd4;"
    )
    kernels = launch.load(kernel(body, ".param .align 8 .b8 s[40], .param .f32 t"))
    kernels.launch("snippet", (1,), (1,), [struct, -3.0])
    assert y.tolist() == [0, 2.5, 7, 1.5, -3, 9, 0, 0]
    with pytest.raises(PtxError, match="2 parameters, 1 arguments"):
        kernels.launch("snippet", (1,), (1,), [struct])
    with pytest.raises(PtxError, match="parameter 0 has 40 bytes, its argument 4"):
        kernels.launch("snippet", (1,), (1,), [bytes(4), 0.0])


def test_a_strided_array_is_refused() -> None:
    with pytest.raises(ValueError, match="argument 0: a contiguous array"):
        run("ld.global.u32 %r1, [%rd10];", np.zeros((4, 4), np.uint32)[:, 1])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("ld.global.u32 %r1, [%rd10+12];", "4 bytes at offset 12 of argument 0, which has 12 bytes"),
        ("ld.global.u32 %r1, [%rd10+-4];", "in no buffer"),
        ("ld.global.v2.u32 {%r1, %r2}, [%rd10+8];", "8 bytes at offset 8 of argument 0"),
        ("st.global.u32 [%rd10+12], %r1;", "4 bytes at offset 12 of argument 0"),
        ("ld.global.u32 %r1, [%rd10+2];", "not aligned to 4 bytes"),
        ("ld.global.v2.u32 {%r1, %r2}, [%rd10+4];", "not aligned to 8 bytes"),
        ("ld.global.u32 %r1, [4096];", "in no buffer"),
        (f"{BUFFER} ld.shared.u32 %r1, [%r3+256];", "4 bytes at offset 256 of shared memory, which has 256 bytes"),
        (f"{BUFFER} st.shared.u32 [%r3+-4], %r1;", "4 bytes at offset -4 of shared memory"),
        (".local .align 4 .b8 own[8]; st.local.u32 [own+8], %r1;", "offset 8 of local memory, which has 8 bytes"),
        ("atom.global.add.u32 %r1, [%rd10+12], 1;", "4 bytes at offset 12"),
        (f"{BUFFER} cp.async.ca.shared.global [%r3], [%rd10+12], 4;", "4 bytes at offset 12"),
        (f"{BUFFER} cp.async.ca.shared.global [%r3+256], [%rd10], 4;", "4 bytes at offset 256 of shared"),
        (f"{BUFFER} cp.async.ca.shared.global [%r3], [%rd10], 4, 5;", "more than 4 bytes to copy"),
        ("ld.global.u32 %r1, [%rd1];", "address 0xffffffffffffffff is not aligned"),  # a register never written
    ],
)
def test_forbidden_accesses(body: str, reason: str) -> None:
    """The message names the instruction, its line and the thread."""
    with pytest.raises(PtxError, match=reason) as error:
        run(
            f"mov.u32 %r1, 0; setp.ne.u32 %p1, %r2, 40; @%p1 bra DONE;\n{body}\nDONE:",
            np.zeros(3, np.uint32),
            threads=64,
        )
    line = body.split(";")[-2].strip()
    assert f"`{line}`" in str(error.value)
    assert "thread 40 of block 0" in str(error.value)


def test_dynamic_shared_memory_has_its_exact_size() -> None:
    declarations = ".extern .shared .align 16 .b8 dynamic[];\n"
    body = "mov.u32 %r3, dynamic; st.shared.u32 [%r3+96], %r2;"
    run(body, declarations=declarations, shared_bytes=100)
    with pytest.raises(PtxError, match="offset 96 of shared memory, which has 96 bytes"):
        run(body, declarations=declarations, shared_bytes=96)
    with_static = f".shared .align 4 .b8 before[20];\n{declarations}"
    run("st.shared.u32 [before+16], %r2;" + body, declarations=with_static, shared_bytes=100)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("ld.global.b128 %rd1, [%rd10];", "unknown modifier .b128"),
        ("ld.volatile.texture.u32 %r1, [%rd10];", "unknown modifier .texture"),
        ("ld.global.u64 %r1, [%rd10];", "%r1 cannot hold .u64"),
        ("ld.global.u32 %r1, %rd10;", "no address"),
        ("st.param.u32 [p0], %r1;", "a store to param"),
        ("mov.u32 %r1, nothing;", "unknown name nothing"),
        ("mov.b32 {%h1, %h2, %h3}, %r1;", "3 parts of .b32"),
        ("atom.global.u32 %r1, [%rd10], 1;", "without its operation"),
        ("cp.bulk.shared.global [%r1], [%rd10], 16;", "unknown modifier .bulk"),
        ("cp.async.cg.shared.global [%r1], [%rd10], 8;", "cp.async of 8 bytes"),
    ],
)
def test_what_is_not_modelled_is_refused(body: str, reason: str) -> None:
    """Also where it is never executed."""
    with pytest.raises(PtxError, match=reason):
        run(f"bra DONE;\n{body}\nDONE:", np.zeros(3, np.uint32))


# ---- atomics ---------------------------------------------------------------------------------------------------------
def test_atomic_sums() -> None:
    """All threads of all blocks at one address: nothing is lost, and every old value was there once."""
    total, old = np.zeros(1, np.uint32), np.zeros(96, np.uint32)
    body = (
        "atom.global.add.u32 %r3, [%rd10], 2; mad.lo.s32 %r4, %r0, %r1, %r2; mul.wide.u32 %rd1, %r4, 4;"
        "add.u64 %rd1, %rd11, %rd1; st.global.u32 [%rd1], %r3;"
    )
    run(body, total, old, threads=48, grid=2, schedule=Random(3))
    assert total[0] == 192
    assert sorted(old) == list(range(0, 192, 2))


@pytest.mark.parametrize(
    ("operation", "start", "expected"),
    [
        ("add.f32", 1.0, 1 + sum(range(5))),
        ("add.f64", 1.0, 1 + sum(range(5))),
        ("min.s32", 2, 0),
        ("max.s32", 2, 4),
        ("and.b32", 0b111, 0),
        ("or.b32", 0b1000, 0b1111),
        ("xor.b32", 0b1000, 0b1100),
        ("add.u64", 1 << 40, (1 << 40) + 10),
        ("inc.u32", 0, None),
        ("dec.u32", 0, None),
    ],
)
def test_reductions(operation: str, start: float, expected: float | None) -> None:
    """``red`` by five threads with their numbers."""
    kind = operation.split(".")[1]
    dtype = {"f": "f", "s": "i", "u": "u", "b": "u"}[kind[0]] + str(int(kind[1:]) // 8)
    x = np.array([start], dtype)
    convert = {
        "f32": "cvt.rn.f32.u32 %f1, %r2; mov.f32 %f2, %f1;",
        "f64": "cvt.rn.f64.u32 %fd1, %r2;",
        "u64": "cvt.u64.u32 %rd1, %r2;",
    }.get(kind, "mov.u32 %r3, %r2;")
    value = {"f32": "%f2", "f64": "%fd1", "u64": "%rd1"}.get(kind, "%r3")
    if expected is None:
        value = "2"  # inc and dec wrap at this
        expected = {"inc.u32": [1, 2, 0, 1, 2][-1], "dec.u32": [2, 1, 0, 2, 1][-1]}[operation]
    run(f"{convert} red.relaxed.gpu.global.{operation} [%rd10], {value};", x, threads=5)
    assert x[0] == expected


def test_exchange_and_compare() -> None:
    """A lock taken by compare and swap: one thread of each of the two addresses gets it."""
    locks, won = np.zeros(2, np.uint32), np.zeros(8, np.uint32)
    body = (
        "and.b32 %r3, %r2, 1; mul.wide.u32 %rd1, %r3, 4; add.u64 %rd1, %rd10, %rd1; add.u32 %r4, %r2, 1;"
        "atom.global.acq_rel.gpu.cas.b32 %r5, [%rd1], 0, %r4; mul.wide.u32 %rd2, %r2, 4; add.u64 %rd2, %rd11, %rd2;"
        "setp.eq.u32 %p1, %r5, 0; selp.u32 %r6, 1, 0, %p1; st.global.u32 [%rd2], %r6;"
    )
    run(body, locks, won, threads=8)
    assert won[0::2].sum() == 1
    assert won[1::2].sum() == 1
    assert locks.tolist() == [np.flatnonzero(won)[won.nonzero()[0] % 2 == i][0] + 1 for i in (0, 1)]
    x = np.uint32([5])
    run(
        "atom.exch.b32 %r3, [%rd10], 9; add.u32 %r3, %r3, 1; st.global.u32 [%rd11], %r3;",
        x,
        y := np.zeros(1, np.uint32),
    )
    assert (x[0], y[0]) == (9, 6)


def test_atomics_in_shared_memory() -> None:
    y = np.zeros(2, np.uint32)
    body = (
        f"{BUFFER} mov.u32 %r6, 0; st.shared.u32 [%r3], %r6; bar.sync 0; atom.shared.add.u32 %r7, [%r3], 1; bar.sync 0;"
        "ld.shared.u32 %r8, [%r3]; mul.wide.u32 %rd1, %r0, 4; add.u64 %rd1, %rd10, %rd1; st.global.u32 [%rd1], %r8;"
    )
    run(body, y, threads=70, grid=2)
    assert y.tolist() == [70, 70], "every block has its own"


# ---- asynchronous copies ---------------------------------------------------------------------------------------------
COPY = f"""{BUFFER}
    mul.wide.u32 %rd1, %r2, 16; add.u64 %rd1, %rd10, %rd1;
    shl.b32 %r4, %r2, 4; add.u32 %r5, %r3, %r4;
    cp.async.cg.shared.global [%r5], [%rd1], 16, %r12;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.v4.f32 {{%f1, %f2, %f3, %f4}}, [%r5];
    mul.wide.u32 %rd2, %r2, 16; add.u64 %rd2, %rd11, %rd2;
    st.global.v4.f32 [%rd2], {{%f1, %f2, %f3, %f4}};
"""


@pytest.mark.parametrize("count", [16, 0, 4, 7, 8])
def test_copies_are_filled_up_with_zeros(count: int) -> None:
    x, y = np.arange(1, 17, dtype=np.float32), np.full(16, -1, np.float32)
    for seed in range(4):
        run(COPY, x, y, count, threads=4, schedule=Lockstep(seed))
        expected = x.copy().reshape(4, 4).view(np.uint8)
        expected[:, count:] = 0
        np.testing.assert_array_equal(y, expected.view(np.float32).ravel())


def test_nothing_is_read_for_no_bytes() -> None:
    """The address may be anywhere then."""
    x, y = np.zeros(4, np.float32), np.ones(16, np.float32)
    run(COPY, x, y, 0, threads=4)
    assert not y.any()


def groups(waits: str) -> list[bool]:
    """Two groups of copies, and whether either one may still be on its way after some waiting."""
    body = f"""{BUFFER}
        cp.async.ca.shared.global [%r3], [%rd10], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%r3+16], [%rd10+4], 4; cp.async.commit_group;
        {waits}
        ld.shared.f32 %f1, [%r3]; st.global.f32 [%rd11], %f1; ld.shared.f32 %f2, [%r3+16]; st.global.f32 [%rd11+4], %f2;
    """
    found = []
    for seed in range(12):
        y = np.zeros(2, np.float32)
        run(body, np.float32([3, 4]), y, schedule=Priority(seed))
        found.append(y)
    first, second = np.array(found).T
    assert all(x == 3 or math.isnan(x) for x in first)
    assert all(x == 4 or math.isnan(x) for x in second)
    return [math.isnan(first.sum()), math.isnan(second.sum())]


def test_groups_of_copies() -> None:
    """``wait_group n`` leaves the latest ``n`` groups under way."""
    assert groups("") == [True, True]
    assert groups("cp.async.wait_group 2;") == [True, True]
    assert groups("cp.async.wait_group 1;") == [False, True]
    assert groups("cp.async.wait_group 0;") == [False, False]
    assert groups("cp.async.wait_all;") == [False, False]


def test_copies_outside_of_a_group() -> None:
    """``wait_group`` does not wait for copies that are not committed, ``wait_all`` does."""
    for wait, expected in (("cp.async.wait_group 0;", {True, False}), ("cp.async.wait_all;", {False})):
        copy = "cp.async.ca.shared.global [%r3], [%rd10], 4;"
        body = f"{BUFFER} {copy} {wait} ld.shared.f32 %f1, [%r3]; st.global.f32 [%rd11], %f1;"
        seen = set()
        for seed in range(12):
            y = np.zeros(1, np.float32)
            run(body, np.float32([3]), y, schedule=Lockstep(seed))
            seen.add(math.isnan(y[0]))
        assert seen == expected


def test_nothing_to_do() -> None:
    """Fences and hints are read and do nothing."""
    body = (
        "membar.gl; fence.acq_rel.gpu; fence.sc.sys; prefetch.global.L2 [%rd10]; nanosleep.u32 20;"
        "createpolicy.fractional.L2::evict_first.b64 %rd1, 1.0;"
        "ld.global.L1::evict_last.L2::cache_hint.b32 %r3, [%rd10], %rd1;"
        "add.u32 %r3, %r3, 1; st.global.u32 [%rd10], %r3;"
        "ldu.global.u32 %r4, [%rd10];"
    )
    run(body, x := np.uint32([4]))
    assert x[0] == 5
