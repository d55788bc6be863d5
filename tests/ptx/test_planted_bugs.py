"""Bugs planted in a kernel of the usual shape are found: tiles by ``cp.async`` in two buffers, ``ldmatrix``, ``mma``.

The kernel adds the products of five pairs of tiles: warp ``w`` forms rows ``16 w`` to ``16 w + 15`` of the sum of
``A_t B_t``, A ``[t, 32, 16]``, B ``[t, 8, 16]`` (columns of B as rows), both bfloat16, two warps.
"""

from __future__ import annotations

import pytest

from .errors import PtxError
from .schedule import Lockstep, Priority, Random
from .tile_products import TileProducts

pytestmark = pytest.mark.exhaustive

PRODUCTS = TileProducts(5, 32, 8, 16, threads=64, written=(32, 8), sums=lambda out: out)  # rows of 32 bytes
KERNEL = """
    .reg .b32 %buffer, %row, %m<6>; .reg .f32 %sum<4>;
    ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b]; ld.param.u64 %rd3, [out];
    mov.f32 %sum0, 0f00000000; mov.f32 %sum1, 0f00000000; mov.f32 %sum2, 0f00000000; mov.f32 %sum3, 0f00000000;
    // thread t copies half t % 2 of row t / 2 of A, the first 16 threads those of B too
    mul.wide.u32 %rd4, %r2, 16; add.u64 %rd1, %rd1, %rd4; add.u64 %rd2, %rd2, %rd4;
    shl.b32 %r3, %r2, 4; mov.u32 %r4, dynamic; add.u32 %r3, %r3, %r4;
    setp.lt.u32 %p1, %r2, 16;
    cp.async.cg.shared.global [%r3], [%rd1], 16;
    @%p1 cp.async.cg.shared.global [%r3+1024], [%rd2], 16;
    cp.async.commit_group;
    mov.u32 %r5, 0; mov.u32 %buffer, 0;
    // A: thread t gives row t % 16 of the warp, its half t / 16; B: row t % 8, its half t / 8
    and.b32 %r6, %r2, 15; shr.u32 %r7, %r2, 5; mad.lo.u32 %r6, %r7, 16, %r6; and.b32 %r7, %r2, 31; shr.u32 %r8, %r7, 4;
    mul.lo.u32 %r6, %r6, 32; mad.lo.u32 %r6, %r8, 16, %r6; add.u32 %r6, %r6, %r4;
    and.b32 %r8, %r2, 7; bfe.u32 %r9, %r2, 3, 1; mul.lo.u32 %r8, %r8, 32; mad.lo.u32 %r8, %r9, 16, %r8;
    add.u32 %r8, %r8, %r4;
LOOP:
    add.u32 %r5, %r5, 1; setp.ge.u32 %p2, %r5, 5; xor.b32 %r10, %buffer, 1280; @%p2 bra LAST;
    add.u64 %rd1, %rd1, 1024; add.u64 %rd2, %rd2, 256; add.u32 %r11, %r3, %r10;
    cp.async.cg.shared.global [%r11], [%rd1], 16;
    @%p1 cp.async.cg.shared.global [%r11+1024], [%rd2], 16;
LAST:
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0; // the tile is there
    add.u32 %r12, %r6, %buffer; add.u32 %r13, %r8, %buffer;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%m0, %m1, %m2, %m3}, [%r12];
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%m4, %m5}, [%r13+1024];
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {%sum0, %sum1, %sum2, %sum3}, {%m0, %m1, %m2, %m3}, {%m4, %m5}, {%sum0, %sum1, %sum2, %sum3};
    mov.u32 %buffer, %r10;
    bar.sync 1; // the tile is done with
    @!%p2 bra LOOP;
    // rows t / 4 and t / 4 + 8 of the warp, columns 2 (t % 4) and the next one
    shr.u32 %r14, %r2, 5; shl.b32 %r14, %r14, 4; bfe.u32 %r15, %r2, 2, 3; add.u32 %r14, %r14, %r15;
    and.b32 %r16, %r2, 3; shl.b32 %r16, %r16, 3; mad.lo.u32 %r16, %r14, 32, %r16;
    cvt.u64.u32 %rd5, %r16; add.u64 %rd5, %rd3, %rd5;
    st.global.v2.f32 [%rd5], {%sum0, %sum1};
    st.global.v2.f32 [%rd5+256], {%sum2, %sum3};
"""
SCHEDULES = [Lockstep(), *(Random(seed) for seed in range(3)), *(Priority(seed) for seed in range(6))]


def correct(body: str, shared: int | None = None) -> list[bool]:
    return PRODUCTS.correct(body, SCHEDULES, shared)


def test_the_kernel_is_right() -> None:
    assert all(correct(KERNEL))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("bar.sync 0; // the tile is there", ""),
        ("bar.sync 1; // the tile is done with", ""),
        ("cp.async.wait_group 1;", "cp.async.wait_group 2;"),
        ("cp.async.wait_group 1;", ""),
        ("cp.async.commit_group;\n    cp.async.wait_group", "cp.async.wait_group"),
        ("{%m0, %m1, %m2, %m3}, {%m4, %m5}", "{%m0, %m2, %m1, %m3}, {%m4, %m5}"),
        ("{%m4, %m5}, {%sum0", "{%m5, %m4}, {%sum0"),
        ("{%m4, %m5}, {%sum0, %sum1, %sum2, %sum3}", "{%m4, %m5}, {%sum0, %sum1, %sum2, %sum2}"),
        ("{%m0, %m1, %m2, %m3}, [%r12]", "{%m0, %m1, %m2, %m3}, [%r6]"),
        ("m8n8.x2.shared", "m8n8.x2.trans.shared"),
        ("@%p1 cp.async.cg.shared.global [%r11+1024], [%rd2], 16;", ""),
        ("setp.lt.u32 %p1, %r2, 16;", "setp.lt.u32 %p1, %r2, 15;"),
    ],
)
def test_wrong_results(before: str, after: str) -> None:
    """Missing barriers and waits, wrong registers, wrong operands of the instruction, memory nobody wrote."""
    assert before in KERNEL
    assert not all(correct(KERNEL.replace(before, after)))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[%r11+1024]", "[%r11+1040]", "of shared memory, which has 2560 bytes"),
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%m4, %m5}, [%r13+1024]", None, "of shared memory, which has 2560"),
        ("[%rd5+256]", "[%rd5+264]", "8 bytes at offset 1024 of argument 2, which has 1024 bytes"),
        ("mad.lo.u32 %r16, %r14, 32, %r16", "mad.lo.u32 %r16, %r14, 36, %r16", "not aligned to 8 bytes"),
        ("setp.ge.u32 %p2, %r5, 5", "setp.ge.u32 %p2, %r5, 6", "of argument 0, which has 5120 bytes"),
        ("bar.sync 1;", "@%p1 bar.sync 1;", "wait"),
    ],
)
def test_forbidden(before: str, after: str | None, message: str) -> None:
    """Indices out of bounds in shared and global memory, misaligned stores, barriers for some threads only."""
    assert before in KERNEL
    after = before.replace("1024", "1312") if after is None else after
    with pytest.raises(PtxError, match=message):
        correct(KERNEL.replace(before, after))


def test_shared_memory_one_row_short() -> None:
    with pytest.raises(PtxError, match=r"offset \d+ of shared memory, which has 2544 bytes"):
        correct(KERNEL, PRODUCTS.shared - 16)


def test_races_need_hostile_schedules() -> None:
    """Without the second barrier nothing happens as long as all threads go together: a buffer is filled too early."""
    found = correct(KERNEL.replace("bar.sync 1; // the tile is done with", ""))
    assert found[0]
    assert not all(found[4:]), "starving schedules"
