"""Branches, loops, calls, barriers, the grid: under every schedule the same results."""

from __future__ import annotations

import numpy as np
import pytest

from . import launch
from .errors import DeadlockError, PtxError
from .schedule import Lockstep, Priority, Random
from .snippet import UNTOUCHED, execute, kernel

pytestmark = pytest.mark.exhaustive

SCHEDULES = [Lockstep(), Random(1, split=0.9), Random(2, mean=2), Priority(3), Priority(4, patience=200)]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s}")
NUMBERS = np.arange(70, dtype=np.uint32)


@each_schedule
def test_every_thread_goes_its_own_way(schedule: Lockstep) -> None:
    """Collatz steps: loops of different lengths with a branch inside."""
    body = """
        mov.u32 %d, 0; add.u32 %r5, %a, 1;
    LOOP:
        setp.eq.u32 %p1, %r5, 1; @%p1 bra DONE;
        add.u32 %d, %d, 1; and.b32 %r6, %r5, 1; setp.eq.u32 %p2, %r6, 0;
        @%p2 bra EVEN;
        mad.lo.u32 %r5, %r5, 3, 1; bra.uni LOOP;
    EVEN:
        shr.u32 %r5, %r5, 1; bra.uni LOOP;
    DONE:
    """

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert execute(body, a=NUMBERS, schedule=schedule).tolist() == [steps(n + 1) for n in range(70)]


def test_table_of_labels() -> None:
    body = """
        rem.u32 %r5, %a, 3; mov.u32 %d, 9;
        brx.idx %r5, PLACES;
    PLACES: .branchtargets ZERO, DONE, TWO;
    ZERO: mov.u32 %d, 100; bra DONE;
    TWO: mov.u32 %d, 102;
    DONE:
    """
    assert execute(body, a=NUMBERS[:7]).tolist() == [100, 9, 102, 100, 9, 102, 100]
    with pytest.raises(PtxError, match="a list of 3 labels is too short"):
        execute(body.replace("rem.u32 %r5, %a, 3", "mov.u32 %r5, %a"), a=NUMBERS[:7])


FUNCTIONS = """
.func (.param .b32 result) twice(.param .b32 x)
{
    .reg .b32 %r<4>;
    ld.param.u32 %r1, [x]; add.u32 %r2, %r1, %r1; st.param.b32 [result+0], %r2; ret;
}
.func (.param .b32 result) sum(.param .b32 x, .param .align 8 .b8 y[8])
{
    .reg .b32 %r<8>; .reg .pred %p<2>;
    ld.param.u32 %r1, [x]; ld.param.u32 %r2, [y+4];
    { .param .b32 in; .param .b32 out; st.param.b32 [in], %r1; call.uni (out), twice, (in); ld.param.b32 %r3, [out]; }
    add.u32 %r4, %r3, %r2; setp.gt.u32 %p1, %r1, 20; @%p1 add.u32 %r4, %r4, 1000;
    st.param.b32 [result], %r4; ret;
}
"""


@each_schedule
def test_calls(schedule: Lockstep) -> None:
    """A function that calls another one, from two places, by some of the threads."""
    body = """
        mov.u32 %d, 0; and.b32 %r5, %a, 1; setp.eq.u32 %p1, %r5, 1; @%p1 bra SKIP;
        { .param .b32 one; .param .align 8 .b8 two[8]; .param .b32 back;
          st.param.b32 [one], %a; st.param.b32 [two+4], 7;
          call.uni (back), sum, (one, two);
          ld.param.b32 %d, [back]; }
    SKIP:
        { .param .b32 one; .param .b32 back;
          st.param.b32 [one], %d; call (back), twice, (one); ld.param.b32 %d, [back]; }
    """
    found = execute(body, a=NUMBERS, declarations=FUNCTIONS, schedule=schedule)
    expected = [0 if n % 2 else 2 * (2 * n + 7 + (1000 if n > 20 else 0)) for n in range(70)]
    assert found.tolist() == expected


def test_wrong_calls() -> None:
    with pytest.raises(PtxError, match="recursion"):
        execute("mov.u32 %d, 0; call again;", a=NUMBERS[:1], declarations=".func again() { call again; ret; }")
    with pytest.raises(PtxError, match="a call of vprintf, which is not in this PTX"):
        execute("mov.u32 %d, 0; call vprintf;", a=NUMBERS[:1], declarations=".extern .func vprintf();")
    with pytest.raises(PtxError, match="twice takes 1 arguments and gives 1 results"):
        execute("mov.u32 %d, 0; call twice;", a=NUMBERS[:1], declarations=FUNCTIONS)


def test_ends() -> None:
    found = execute("mov.u32 %d, 1; setp.gt.u32 %p1, %a, 3; @%p1 exit; @!%p1 mov.u32 %d, 2;", a=NUMBERS[:6])
    assert found.tolist() == [2, 2, 2, 2, UNTOUCHED, UNTOUCHED]
    with pytest.raises(PtxError, match=r"`@%p1 trap`: the kernel traps here \(thread 4 of block 0\)"):
        execute("mov.u32 %d, 1; setp.gt.u32 %p1, %a, 3; @%p1 trap;", a=NUMBERS[:6])


def test_without_end() -> None:
    kernels = launch.load(kernel("LOOP: bra LOOP;"), "snippet")
    with pytest.raises(DeadlockError, match=r"no end after 1000 instructions: 6 at snippet:.*bra LOOP"):
        kernels.launch("snippet", (1,), (6,), [], limit=1000)


def test_unknown_label() -> None:
    with pytest.raises(PtxError, match="unknown label NOWHERE"):
        execute("bra NOWHERE;", a=NUMBERS[:1])
    with pytest.raises(PtxError, match="brx without its list"):
        execute("brx.idx %a, NOWHERE;", a=NUMBERS[:1])


# ---- where threads are -----------------------------------------------------------------------------------------------
def test_special_registers() -> None:
    """In a grid and a block of two and three axes."""
    block, grid = (3, 5, 2), (2, 3)
    body = """
        mov.u32 %r5, %tid.y; mov.u32 %r6, %tid.z; mov.u32 %r7, %ntid.y; mad.lo.u32 %r5, %r6, %r7, %r5;
        mov.u32 %r7, %ntid.x; mov.u32 %r8, %tid.x; mad.lo.u32 %r5, %r5, %r7, %r8;
        mov.u32 %r6, %ctaid.y; mov.u32 %r7, %nctaid.x; mov.u32 %r8, %ctaid.x; mad.lo.u32 %r6, %r6, %r7, %r8;
        mad.lo.u32 %r9, %r6, 30, %r5; ld.param.u64 %rd1, [p]; mul.wide.u32 %rd2, %r9, 4; add.u64 %rd1, %rd1, %rd2;
        mov.u32 %r10, %laneid; mov.u32 %r11, %warpid; mad.lo.u32 %r10, %r11, 32, %r10;
        mad.lo.u32 %r10, %r6, 100, %r10; st.global.u32 [%rd1], %r10;
    """
    for schedule in (Lockstep(), Random(2)):
        out = np.zeros(180, np.uint32)
        launch.load(kernel(body, ".param .u64 p")).launch("snippet", grid, block, [out], schedule=schedule, resident=2)
        assert out.tolist() == [100 * b + t for b in range(6) for t in range(30)]


def test_masks_of_lanes() -> None:
    for name, expected in (
        ("eq", lambda x: 1 << x),
        ("lt", lambda x: (1 << x) - 1),
        ("le", lambda x: (2 << x) - 1),
        ("gt", lambda x: 2**32 - (2 << x)),
        ("ge", lambda x: 2**32 - (1 << x)),
    ):
        found = execute(f"mov.u32 %d, %lanemask_{name};", a=NUMBERS[:33])
        assert found.tolist() == [expected(x % 32) for x in range(33)], name
    assert execute("mov.u32 %d, %nctaid.x;", a=[0, 0, 0], grid=(3,), block=(1,)).tolist() == [3] * 3
    clocks = execute("mov.u32 %r5, %clock; mov.u32 %r6, %clock; sub.u32 %d, %r6, %r5;", a=[0])
    assert clocks[0] > 0
    with pytest.raises(PtxError, match="unknown register %pm0"):
        execute("mov.u32 %d, %pm0;", a=[0])


# ---- barriers --------------------------------------------------------------------------------------------------------
EXCHANGE = """
    .shared .align 4 .b8 all[512];
    mov.u32 %r3, all; mad.lo.u32 %r4, %r2, 4, %r3; st.shared.u32 [%r4], %a;
    {barrier}
    mov.u32 %r5, %ntid.x; sub.u32 %r5, %r5, %r2; sub.u32 %r5, %r5, 1; mad.lo.u32 %r6, %r5, 4, %r3;
    ld.shared.u32 %d, [%r6];
"""


@each_schedule
@pytest.mark.parametrize("barrier", ["bar.sync 0;", "barrier.sync 3;", "bar.sync 1, 128;"])
def test_barriers(barrier: str, schedule: Lockstep) -> None:
    """Every thread reads what the last but so many wrote; the last warp is not full."""
    count = 128 if "128" in barrier else 100
    numbers = np.arange(count, dtype=np.uint32) * 3
    found = execute(EXCHANGE.format(barrier=barrier), a=numbers, schedule=schedule)
    assert found.tolist() == numbers[::-1].tolist()


@each_schedule
def test_barriers_of_part_of_a_block(schedule: Lockstep) -> None:
    """Two warps meet at one barrier, two at another one."""
    body = EXCHANGE.format(barrier="shr.u32 %r7, %r2, 6; add.u32 %r7, %r7, 1; bar.sync %r7, 64;").replace(
        "mov.u32 %r5, %ntid.x; sub.u32 %r5, %r5, %r2; sub.u32 %r5, %r5, 1;", "xor.b32 %r5, %r2, 63;"
    )
    numbers = np.arange(128, dtype=np.uint32)
    assert execute(body, a=numbers, schedule=schedule).tolist() == (numbers ^ 63).tolist()


@each_schedule
def test_barriers_that_count(schedule: Lockstep) -> None:
    head = "setp.lt.u32 %p1, %a, 5;"
    tail = " selp.u32 %d, 1, 0, %p2;"
    found = execute(f"{head} bar.red.popc.u32 %d, 0, %p1;", a=NUMBERS, schedule=schedule)
    assert found.tolist() == [5] * 70
    for operation, expected in (("or", 1), ("and", 0)):
        found = execute(f"{head} bar.red.{operation}.pred %p2, 0, %p1; {tail}", a=NUMBERS, schedule=schedule)
        assert found.tolist() == [expected] * 70
    found = execute("setp.lt.u32 %p1, %a, 70; barrier.red.and.pred %p2, 0, %p1;" + tail, a=NUMBERS, schedule=schedule)
    assert found.tolist() == [1] * 70


@each_schedule
def test_threads_that_left_do_not_count(schedule: Lockstep) -> None:
    body = "setp.gt.u32 %p1, %a, 40; @%p1 exit; bar.sync 0; mov.u32 %d, 3;"
    assert execute(body, a=NUMBERS, schedule=schedule)[:41].tolist() == [3] * 41


def test_mistakes_with_barriers() -> None:
    body = "mov.u32 %d, 0; setp.lt.u32 %p1, %a, 32; @%p1 bar.sync 1; bar.sync 2;"
    with pytest.raises(
        DeadlockError, match=r"32 at .*`@%p1 bar.sync 1`, thread 0 of block 0 first; 32 at .*`bar.sync 2`"
    ):
        execute(body, a=NUMBERS[:64])
    body = "mov.u32 %d, 0; setp.lt.u32 %p1, %a, 8; @%p1 bra ONE; bar.sync 0; bra DONE; ONE: bar.sync 0; DONE:"
    with pytest.raises(PtxError, match="threads of one warp wait at different barriers"):
        execute(body, a=NUMBERS[:64])
    assert execute(body.replace("bar.", "barrier."), a=NUMBERS[:64]).tolist() == [0] * 64


# ---- the grid --------------------------------------------------------------------------------------------------------
GRID_BARRIER = """
    ld.param.u64 %rd1, [count]; ld.param.u64 %rd2, [x]; ld.param.u64 %rd3, [y];
    mul.wide.u32 %rd4, %thread, 4; add.u64 %rd5, %rd2, %rd4; add.u32 %r5, %thread, 1; st.global.u32 [%rd5], %r5;
    bar.sync 0;
    setp.ne.u32 %p1, %r2, 0; @%p1 bra WAIT;
    mov.u32 %r6, %nctaid.x;
    atom.add.release.gpu.global.u32 %r7, [%rd1], 1;
SPIN:
    ld.acquire.gpu.global.u32 %r8, [%rd1]; setp.lt.u32 %p2, %r8, %r6; @%p2 bra SPIN;
WAIT:
    bar.sync 0;
    mov.u32 %r9, %nctaid.x; mov.u32 %r10, %ntid.x; mul.lo.u32 %r9, %r9, %r10; sub.u32 %r9, %r9, %thread;
    sub.u32 %r9, %r9, 1; mul.wide.u32 %rd6, %r9, 4; add.u64 %rd6, %rd2, %rd6; ld.global.u32 %r11, [%rd6];
    add.u64 %rd7, %rd3, %rd4; st.global.u32 [%rd7], %r11;
"""


def through_the_grid(body: str, schedule: Lockstep, **options: object) -> bool:
    count, x, y = np.zeros(1, np.uint32), np.zeros(192, np.uint32), np.zeros(192, np.uint32)
    kernels = launch.load(kernel(body, ".param .u64 count, .param .u64 x, .param .u64 y"))
    kernels.launch("snippet", (3,), (64,), [count, x, y], schedule=schedule, limit=200_000, **options)
    return y.tolist() == list(range(192, 0, -1))


@each_schedule
def test_blocks_that_wait_for_each_other(schedule: Lockstep) -> None:
    assert through_the_grid(GRID_BARRIER, schedule, cooperative=True)


def test_a_missing_grid_barrier_is_found() -> None:
    body = GRID_BARRIER.replace("@%p2 bra SPIN;", "")
    found = [through_the_grid(body, Priority(seed), cooperative=True) for seed in range(10)]
    assert not all(found)


def test_blocks_that_are_not_resident() -> None:
    """Waiting for a block that comes later never ends."""
    with pytest.raises(DeadlockError, match="no end after 200000 instructions"):
        through_the_grid(GRID_BARRIER, Lockstep(), resident=2)


def test_an_empty_grid() -> None:
    with pytest.raises(PtxError, match="an empty grid"):
        launch.load(kernel("")).launch("snippet", (0,), (32,), [])
    with pytest.raises(PtxError, match="0 kernels of ptx match 'other'"):
        launch.load(kernel("")).launch("other", (1,), (32,), [])
