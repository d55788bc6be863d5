"""The table of instructions: all the interpreter knows, and how each may be written.

A name is an opcode, or an opcode with its first modifier where that makes another instruction of it. A word that is not
in the entry of its instruction is refused when the kernel is linked, executed or not. Where a modifier only hints
(caches, memory ordering: memory is sequentially consistent here) it is in the list and ignored.
"""

from __future__ import annotations

import numpy as np

from . import arithmetic, control, conversion, logic, matrix, moving, warp, warpgroup
from .arithmetic import elementwise
from .rule import Rule, rule

INTEGERS = "u16 s16 u32 s32 u64 s64"
HALVES = "f16 f16x2 bf16 bf16x2"
FLOATS = f"{HALVES} f32 f64"
BITS = "pred b16 b32 b64"
PLAIN = "b8 u8 s8 b16 u16 s16 b32 u32 s32 b64 u64 s64 f32 f64"
ROUNDING = "rn rz rm rp ftz sat"
SPACES = "global shared shared::cta local const param param::entry param::func"
ORDER = "weak volatile relaxed acquire release acq_rel sc cta cluster gpu sys mmio"
CACHE = (
    "ca cg cs cv lu wb wt nc L1::evict_normal L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate "
    "L2::evict_first L2::evict_last L2::evict_normal L2::cache_hint L2::64B L2::128B L2::256B"
)

TABLE: dict[str, Rule] = {
    # arithmetic
    "add": rule(elementwise(np.add), 3, f"{INTEGERS} {FLOATS}", ROUNDING),
    "sub": rule(elementwise(np.subtract), 3, f"{INTEGERS} {FLOATS}", ROUNDING),
    "mul": rule(arithmetic.mul, 3, f"{INTEGERS} {FLOATS}", f"{ROUNDING} lo hi wide"),
    "mad": rule(arithmetic.mad, 4, f"{INTEGERS} f32 f64", f"{ROUNDING} lo hi wide"),
    "fma": rule(elementwise(arithmetic.fma), 4, FLOATS, ROUNDING),
    "div": rule(arithmetic.div, 3, f"{INTEGERS} f32 f64", f"{ROUNDING} approx full"),
    "rem": rule(arithmetic.rem, 3, INTEGERS),
    "min": rule(arithmetic.minimum, 3, f"{INTEGERS} {FLOATS}", "ftz NaN"),
    "max": rule(arithmetic.maximum, 3, f"{INTEGERS} {FLOATS}", "ftz NaN"),
    "neg": rule(elementwise(np.negative), 2, f"s16 s32 s64 {FLOATS}", "ftz"),
    "abs": rule(elementwise(np.abs), 2, f"s16 s32 s64 {FLOATS}", "ftz"),
    "copysign": rule(arithmetic.copysign, 3, "f32 f64"),
    "rcp": rule(arithmetic.rcp, 2, "f32 f64", "rn ftz approx"),
    "sqrt": rule(arithmetic.sqrt, 2, "f32 f64", "rn ftz approx"),
    "rsqrt": rule(arithmetic.rsqrt, 2, "f32 f64", "ftz approx"),
    "ex2": rule(arithmetic.ex2, 2, "f32 f16 f16x2 bf16 bf16x2", "ftz approx"),
    "lg2": rule(arithmetic.lg2, 2, "f32", "ftz approx"),
    "sin": rule(arithmetic.sin, 2, "f32", "ftz approx"),
    "cos": rule(arithmetic.cos, 2, "f32", "ftz approx"),
    "tanh": rule(arithmetic.tanh, 2, "f32 f16 bf16", "approx"),
    # bits
    "and": rule(elementwise(np.bitwise_and), 3, BITS),
    "or": rule(elementwise(np.bitwise_or), 3, BITS),
    "xor": rule(elementwise(np.bitwise_xor), 3, BITS),
    "not": rule(logic.invert, 2, BITS),
    "shl": rule(logic.shl, 3, "b16 b32 b64"),
    "shr": rule(logic.shr, 3, f"b16 b32 b64 {INTEGERS}"),
    "shf": rule(logic.shf, 4, "b32", "l r wrap clamp"),
    "bfe": rule(logic.bfe, 4, "u32 s32 u64 s64"),
    "bfi": rule(logic.bfi, 5, "b32 b64"),
    "bfind": rule(logic.bfind, 2, "u32 s32 u64 s64", "shiftamt"),
    "popc": rule(logic.popc, 2, "b32 b64"),
    "clz": rule(logic.clz, 2, "b32 b64"),
    "brev": rule(logic.brev, 2, "b32 b64"),
    "prmt": rule(logic.prmt, 4, "b32"),
    "lop3": rule(logic.lop3, 5, "b32"),
    # comparisons and choices
    "setp": rule(
        logic.setp,
        (3, 4),
        f"b16 b32 b64 {INTEGERS} {FLOATS}",
        "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz",
    ),
    "selp": rule(logic.selp, 4, f"b16 b32 b64 {INTEGERS} f32 f64"),
    "slct": rule(logic.slct, 4, f"b16 b32 b64 {INTEGERS} f32 f64", "ftz"),
    "testp": rule(logic.testp, 2, "f32 f64", "finite infinite number notanumber"),
    # conversions
    "cvt": rule(
        conversion.cvt,
        (2, 3),
        f"u8 s8 {INTEGERS} {FLOATS} tf32",
        "rn rz rm rp rna rni rzi rmi rpi ftz sat relu",
    ),
    "cvta": rule(conversion.cvta, 2, "u64", f"{SPACES} to"),
    # moving
    "mov": rule(moving.mov, 2, f"{BITS} {INTEGERS} {FLOATS}"),
    "ld": rule(moving.ld, (2, 3), PLAIN, f"{SPACES} {ORDER} {CACHE} v2 v4"),
    "ldu": rule(moving.ld, 2, PLAIN, "global v2 v4"),
    "st": rule(moving.st, (2, 3), PLAIN, f"{SPACES} {ORDER} {CACHE} v2 v4"),
    "atom": rule(
        moving.atom,
        (3, 4),
        f"b32 b64 u32 s32 u64 s64 {FLOATS}",
        f"{SPACES} {ORDER} add min max and or xor exch cas inc dec noftz L2::cache_hint",
    ),
    "red": rule(
        moving.red,
        2,
        f"b32 b64 u32 s32 u64 s64 {FLOATS}",
        f"{SPACES} {ORDER} add min max and or xor inc dec noftz",
    ),
    "cp": rule(
        moving.cp,
        (0, 5),
        "",
        f"async ca cg commit_group wait_group wait_all {SPACES} L2::cache_hint L2::64B L2::128B L2::256B",
    ),
    "createpolicy": rule(moving.createpolicy, (2, 3), "b64", f"fractional {CACHE}"),
    # nothing to do
    "membar": rule(moving.nothing, 0, "", f"{ORDER} gl"),
    "fence": rule(moving.nothing, 0, "", ORDER),
    "fence.proxy": rule(moving.proxy_fence, 0, "", "proxy async alias global shared::cta shared::cluster"),
    "prefetch": rule(moving.nothing, 1, "", f"{SPACES} L1 L2 L2::evict_last L2::evict_normal"),
    "nanosleep": rule(moving.nothing, 1, "u32"),
    # warps
    "shfl": rule(warp.shfl, 5, "b32", "sync up down bfly idx", members=warp.member_mask),
    "vote": rule(warp.vote, 3, "pred b32", "sync all any uni ballot", members=warp.member_mask),
    "match": rule(warp.match, 3, "b32 b64", "sync any all", members=warp.member_mask),
    "redux": rule(warp.redux, 3, "u32 s32 b32", "sync add min max and or xor", members=warp.member_mask),
    "activemask": rule(warp.activemask, 1, "b32"),
    "ldmatrix": rule(
        matrix.ldmatrix, 2, "b16", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta", members=warp.whole_warp
    ),
    "stmatrix": rule(
        matrix.stmatrix, 2, "b16", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta", members=warp.whole_warp
    ),
    "mma": rule(
        matrix.mma,
        4,
        "f16 bf16 tf32 f32 f64",
        "sync aligned m16n8k16 m16n8k8 m16n8k4 m8n8k4 row col",
        members=warp.whole_warp,
    ),
    # warpgroups
    "wgmma.mma_async": rule(
        warpgroup.mma_async,
        (6, 8),
        "f32 f16 bf16 tf32",
        f"mma_async sync aligned {warpgroup.SHAPES}",
        members=warp.whole_warp,
    ),
    "wgmma.fence": rule(warpgroup.fence, 0, "", "fence sync aligned", members=warp.whole_warp),
    "wgmma.commit_group": rule(warpgroup.commit_group, 0, "", "commit_group sync aligned", members=warp.whole_warp),
    "wgmma.wait_group": rule(warpgroup.wait_group, 1, "", "wait_group sync aligned", members=warp.whole_warp),
    # control
    "bra": rule(control.bra, 1, "", "uni", plain=False),
    "brx": rule(control.brx, 2, "", "idx uni", plain=False),
    "call": rule(control.call, (1, 3), "", "uni", plain=False),
    "ret": rule(control.ret, 0, "", "uni", plain=False),
    "exit": rule(control.leave, 0, plain=False),
    "trap": rule(control.trap, 0, plain=False),
    "bar": rule(control.bar, (1, 4), "", "sync red warp cta and or popc pred u32", False, control.bar_members),
    "barrier": rule(control.bar, (1, 4), "", "sync red cta aligned and or popc pred u32", False, control.bar_members),
}
