"""Bugs planted in a kernel as sm_90 has them are found: tiles by ``cp.async`` in two buffers, products by ``wgmma``.

The kernel adds the products of five pairs of tiles, A ``[t, 64, 16]`` and B ``[t, 16, 16]`` (columns of B as
rows), both bfloat16. The product of a tile goes on while the next one is copied. Rows have 32 bytes, whose halves are
exchanged in every other four rows: the swizzling mode of 32 bytes.
"""

from __future__ import annotations

import numpy as np
import pytest

from .errors import PtxError
from .schedule import Lockstep, Priority, Random
from .test_warpgroup import place
from .tile_products import TileProducts

pytestmark = pytest.mark.exhaustive


def matrix(held: np.ndarray) -> np.ndarray:
    """The sums that the registers of all threads hold."""
    out = np.full((64, 16), np.nan)
    for thread, i in np.ndindex(held.shape):
        out[place(thread, i)] = held[thread, i]
    return out


PRODUCTS = TileProducts(5, 64, 16, 16, threads=128, written=(128, 8), sums=matrix)
KERNEL = """
    .reg .b32 %sum<8>; .reg .b64 %of_a, %of_b;
    ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b]; ld.param.u64 %rd3, [out];
    // thread t copies half t % 2 of row t / 2 of A, the first 32 threads those of B too
    mul.wide.u32 %rd4, %r2, 16; add.u64 %rd1, %rd1, %rd4; add.u64 %rd2, %rd2, %rd4;
    shl.b32 %r3, %r2, 4; bfe.u32 %r4, %r2, 3, 1; shl.b32 %r4, %r4, 4; xor.b32 %r3, %r3, %r4;
    mov.u32 %r4, dynamic; add.u32 %r3, %r3, %r4;
    setp.lt.u32 %p1, %r2, 32;
    cp.async.cg.shared.global [%r3], [%rd1], 16;
    @%p1 cp.async.cg.shared.global [%r3+2048], [%rd2], 16;
    cp.async.commit_group;
    mov.u32 %r5, 0; mov.u32 %r6, 0;
    mov.b32 %sum0, 0; mov.b32 %sum1, 0; mov.b32 %sum2, 0; mov.b32 %sum3, 0;
    mov.b32 %sum4, 0; mov.b32 %sum5, 0; mov.b32 %sum6, 0; mov.b32 %sum7, 0;
    // bits 62 and 63: 32 bytes; 16 units of 16 bytes from eight rows to the next
    shr.u32 %r7, %r4, 4; cvt.u64.u32 %of_a, %r7; or.b64 %of_a, %of_a, 0xC000001000010000;
LOOP:
    wgmma.wait_group.sync.aligned 0; // the product before this one is done
    bar.sync 1; // its buffer is free
    add.u32 %r5, %r5, 1; setp.ge.u32 %p2, %r5, 5; xor.b32 %r10, %r6, 2560; @%p2 bra LAST;
    add.u64 %rd1, %rd1, 2048; add.u64 %rd2, %rd2, 512; add.u32 %r11, %r3, %r10;
    cp.async.cg.shared.global [%r11], [%rd1], 16;
    @%p1 cp.async.cg.shared.global [%r11+2048], [%rd2], 16;
LAST:
    cp.async.commit_group;
    cp.async.wait_group 1;
    fence.proxy.async.shared::cta;
    bar.sync 0; // the tile is there
    shr.u32 %r12, %r6, 4; cvt.u64.u32 %rd6, %r12; add.u64 %rd7, %of_a, %rd6;
    add.u64 %of_b, %rd7, 128;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16
        {%sum0, %sum1, %sum2, %sum3, %sum4, %sum5, %sum6, %sum7}, %rd7, %of_b, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    mov.u32 %r6, %r10;
    @!%p2 bra LOOP;
    wgmma.wait_group.sync.aligned 0; // the sum is there
    mul.wide.u32 %rd5, %r2, 32; add.u64 %rd5, %rd3, %rd5;
    st.global.v4.b32 [%rd5], {%sum0, %sum1, %sum2, %sum3};
    st.global.v4.b32 [%rd5+16], {%sum4, %sum5, %sum6, %sum7};
"""
SCHEDULES = [
    *(Lockstep(eager=share) for share in (0, 0.5, 1)),
    *(Random(seed, eager=seed / 2) for seed in range(3)),
    *(Priority(seed, eager=seed % 3 / 2) for seed in range(6)),
]


def correct(body: str) -> list[bool]:
    return PRODUCTS.correct(body, SCHEDULES)


def test_the_kernel_is_right() -> None:
    assert all(correct(KERNEL))


FREE = "wgmma.wait_group.sync.aligned 0; // the product before this one is done"
PROXY = "fence.proxy.async.shared::cta;"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(FREE, "", id="a stage reused while it is read"),
        pytest.param(FREE, FREE.replace(" 0;", " 1;"), id="a stage reused one product too early"),
        pytest.param("bar.sync 1; // its buffer is free", "", id="a stage reused while another warp reads it"),
        pytest.param("wgmma.wait_group.sync.aligned 0; // the sum", "// the sum", id="no wait for the sum"),
        pytest.param("wgmma.commit_group.sync.aligned;", "", id="products that are not committed"),
        pytest.param("cp.async.wait_group 1;", "cp.async.wait_group 2;", id="no wait for the copy"),
        pytest.param("bar.sync 0; // the tile is there", "", id="no barrier before the product"),
        pytest.param(PROXY, "", id="no fence"),
        pytest.param(PROXY + "\n    bar.sync 0;", "bar.sync 0;", id="no fence on either side"),
        pytest.param("cp.async.wait_group 1;\n    " + PROXY, PROXY + "cp.async.wait_group 1;", id="a fence too early"),
        pytest.param("add.u64 %of_b, %rd7, 128;", "add.u64 %of_b, %rd7, 112;", id="the address of B"),
        pytest.param("0xC000001000010000", "0xC000000800010000", id="the stride"),
        pytest.param("0xC000001000010000", "0x0000001000010000", id="the swizzling mode"),
        pytest.param("%rd7, %of_b, 1, 1, 1, 0, 0;", "%rd7, %of_b, 0, 1, 1, 0, 0;", id="a sum that begins anew"),
        pytest.param("%rd7, %of_b, 1, 1, 1, 0, 0;", "%rd7, %of_b, 1, 1, -1, 0, 0;", id="a sign"),
        pytest.param("%rd7, %of_b, 1, 1, 1, 0, 0;", "%rd7, %of_b, 1, 1, 1, 0, 1;", id="B transposed"),
        pytest.param("{%sum0, %sum1, %sum2, %sum3, %sum4, %", "{%sum0, %sum2, %sum1, %sum3, %sum4, %", id="registers"),
        pytest.param("xor.b32 %r3, %r3, %r4;", "", id="a tile that is not swizzled"),
    ],
)
def test_wrong_results(before: str, after: str) -> None:
    assert before in KERNEL
    assert not all(correct(KERNEL.replace(before, after)))


def test_operands_exchanged() -> None:
    """B instead of A goes on behind the end of shared memory."""
    with pytest.raises(PtxError, match="out of bounds"):
        correct(KERNEL.replace("%rd7, %of_b, 1,", "%of_b, %rd7, 1,"))


def test_a_missing_fence_of_registers() -> None:
    with pytest.raises(PtxError, match=r"no wgmma\.fence since %sum0 was used"):
        correct(KERNEL.replace("wgmma.fence.sync.aligned;", ""))


def test_a_stage_that_is_reused_too_early_needs_a_late_product() -> None:
    """Operands that are read at once hide it, as a lucky run on a GPU does."""
    found = correct(KERNEL.replace(FREE, FREE.replace(" 0;", " 1;")))
    assert not found[0]
    assert found[2]
