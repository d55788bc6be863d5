"""Threads of a warp that read each other, also where not all of them are there."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from .errors import DeadlockError, PtxError
from .schedule import Lockstep, Random
from .snippet import UNTOUCHED, execute

pytestmark = pytest.mark.exhaustive

LANES = np.arange(64, dtype=np.uint32)
SCHEDULES = [Lockstep(), Random(1, split=0.9), Random(2, mean=2, split=0.5)]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


@each_schedule
def test_shuffles(schedule: Lockstep) -> None:
    a = LANES * 10
    for line, origin in (
        ("shfl.sync.bfly.b32 %d, %a, 5, 31, -1;", lambda x: x ^ 5),
        ("shfl.sync.up.b32 %d, %a, 3, 0, -1;", lambda x: x - 3 if x >= 3 else x),
        ("shfl.sync.down.b32 %d, %a, 3, 31, -1;", lambda x: x + 3 if x + 3 < 32 else x),
        ("shfl.sync.idx.b32 %d, %a, 9, 31, -1;", lambda x: 9),
        # segments of eight: the mask 24 is in bits 8 to 12 of the third operand
        ("shfl.sync.idx.b32 %d, %a, 2, 0x181F, -1;", lambda x: x // 8 * 8 + 2),
        ("shfl.sync.down.b32 %d, %a, 3, 0x181F, -1;", lambda x: x + 3 if x % 8 + 3 < 8 else x),
        ("shfl.sync.up.b32 %d, %a, 3, 0x1800, -1;", lambda x: x - 3 if x % 8 >= 3 else x),
        ("shfl.sync.bfly.b32 %d, %a, 8, 0x181F, -1;", lambda x: x ^ 8 if x ^ 8 <= (x & 24 | 7) else x),
    ):
        expected = [(x // 32 * 32 + origin(x % 32)) * 10 for x in range(64)]
        assert execute(line, a=a, schedule=schedule).tolist() == expected, line


def test_shuffle_says_whether_the_origin_was_inside() -> None:
    body = "shfl.sync.down.b32 %r5|%p1, %a, 30, 31, -1; selp.u32 %d, %r5, 99, %p1;"
    assert execute(body, a=LANES[:32]).tolist() == [30, 31] + [99] * 30


@each_schedule
def test_votes(schedule: Lockstep) -> None:
    head = "setp.lt.u32 %p1, %a, 40; setp.ge.u32 %p2, %a, 0;"
    tail = "selp.u32 %d, 1, 0, %p3;"
    for line, expected in (
        ("vote.sync.any.pred %p3, %p1, -1;", [1] * 64),
        ("vote.sync.all.pred %p3, %p1, -1;", [1] * 32 + [0] * 32),
        ("vote.sync.all.pred %p3, !%p1, -1;", [0] * 64),
        ("vote.sync.uni.pred %p3, %p1, -1;", [1] * 32 + [0] * 32),
        ("vote.sync.uni.pred %p3, %p2, -1;", [1] * 64),
    ):
        assert execute(f"{head} {line} {tail}", a=LANES, schedule=schedule).tolist() == expected, line
    found = execute(f"{head} vote.sync.ballot.b32 %d, %p1, -1;", a=LANES, schedule=schedule)
    assert found.tolist() == [2**32 - 1] * 32 + [0xFF] * 32


@each_schedule
def test_match(schedule: Lockstep) -> None:
    a = (LANES % 5).astype(np.uint32)
    bits: dict[tuple[int, int], int] = defaultdict(int)
    for lane in range(64):
        bits[lane // 32, lane % 5] |= 1 << lane % 32
    found = execute("match.any.sync.b32 %d, %a, -1;", a=a, schedule=schedule)
    assert found.tolist() == [bits[lane // 32, lane % 5] for lane in range(64)]
    b = np.where(LANES < 32, 7, a).astype(np.uint32)
    found = execute("match.all.sync.b32 %r5|%p1, %a, -1; selp.u32 %d, %r5, 1, %p1;", a=b, schedule=schedule)
    assert found.tolist() == [2**32 - 1] * 32 + [1] * 32


@each_schedule
def test_reductions(schedule: Lockstep) -> None:
    a = (LANES * 7 % 31).astype(np.uint32) + 3
    halves = a.reshape(2, 32)
    for name, function in (
        ("add.u32", np.add),
        ("min.u32", np.minimum),
        ("max.u32", np.maximum),
        ("and.b32", np.bitwise_and),
        ("or.b32", np.bitwise_or),
        ("xor.b32", np.bitwise_xor),
    ):
        found = execute(f"redux.sync.{name} %d, %a, -1;", a=a, schedule=schedule)
        assert found.tolist() == np.repeat(function.reduce(halves, axis=1, dtype=np.uint32), 32).tolist(), name
    signed = LANES.astype(np.int32) - 40
    assert execute("redux.sync.min.s32 %d, %a, -1;", np.int32, a=signed, schedule=schedule)[0] == -40


@each_schedule
def test_part_of_a_warp(schedule: Lockstep) -> None:
    """Odd and even threads, each with its own mask, in branches of their own."""
    body = """
        and.b32 %r5, %r2, 1; setp.eq.u32 %p1, %r5, 0; @%p1 bra EVEN;
        redux.sync.add.u32 %d, %a, 0xAAAAAAAA; bra DONE;
    EVEN:
        redux.sync.max.u32 %d, %a, 0x55555555;
        activemask.b32 %r6; and.b32 %r6, %r6, 0xAAAAAAAA; add.u32 %d, %d, %r6;
    DONE:
        bar.warp.sync -1;
    """
    found = execute(body, a=LANES[:32], schedule=schedule)
    assert found.tolist() == [30 if lane % 2 == 0 else sum(range(1, 32, 2)) for lane in range(32)]


@each_schedule
def test_partners_are_waited_for(schedule: Lockstep) -> None:
    """The two halves of a warp arrive by different ways; the shuffle sees what both have written."""
    body = """
        setp.lt.u32 %p1, %r2, 16; @%p1 bra LOW;
        mul.lo.u32 %r5, %a, 3; mul.lo.u32 %r5, %r5, 2; bra MEET;
    LOW:
        add.u32 %r5, %a, 1000;
    MEET:
        shfl.sync.bfly.b32 %d, %r5, 16, 31, -1;
    """
    expected = [(lane + 16) * 6 if lane < 16 else lane - 16 + 1000 for lane in range(32)]
    assert execute(body, a=LANES[:32], schedule=schedule).tolist() == expected


@each_schedule
def test_threads_that_have_left_are_not_waited_for(schedule: Lockstep) -> None:
    body = "setp.gt.u32 %p1, %a, 20; @%p1 exit; redux.sync.add.u32 %d, 1, -1;"
    found = execute(body, a=LANES[:32], schedule=schedule)
    assert found.tolist() == [21] * 21 + [UNTOUCHED] * 11


def test_a_partner_that_never_comes() -> None:
    body = "mov.u32 %d, 0; setp.gt.u32 %p1, %a, 20; @%p1 bra OUT; redux.sync.add.u32 %d, 1, -1; OUT: bar.sync 0;"
    with pytest.raises(DeadlockError, match=r"21 at snippet:\d+: `redux.sync.add.u32 %d, 1, -1`, thread 0 of block 0"):
        execute(body, a=LANES[:32])


def test_reading_a_thread_that_is_not_there() -> None:
    with pytest.raises(PtxError, match="shfl reads from lane 20, which does not take part"):
        execute("shfl.sync.bfly.b32 %d, %a, 16, 31, -1;", a=LANES[:20])
    body = "mov.u32 %d, 0; setp.lt.u32 %p1, %r2, 8; @%p1 shfl.sync.idx.b32 %d, %a, 9, 31, 0xFF;"
    with pytest.raises(PtxError, match="shfl reads from lane 9"):
        execute(body, a=LANES[:32])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("shfl.bfly.b32 %d, %a, 5, 31, -1;", "needs .sync"),
        ("shfl.sync.b32 %d, %a, 5, 31, -1;", "a mode"),
        ("vote.sync.pred %p1, %p2, -1;", "a mode"),
        ("redux.sync.u32 %d, %a, -1;", "without its operation"),
        ("elect.sync %d|%p1, -1;", "unknown instruction elect"),
    ],
)
def test_mistakes(line: str, reason: str) -> None:
    with pytest.raises(PtxError, match=reason):
        execute(line, a=LANES)
