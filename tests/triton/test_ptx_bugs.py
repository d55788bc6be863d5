"""Hostile orders of the emitted PTX, and bugs planted in it and in the kernels: what is missing is found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from cacr_kernels import testing
from cacr_kernels.testing import Case
from tests import ptx

pytest.importorskip("triton", reason="needs Triton")

from tests.ptx import triton_ptx

from .ptx_cases import FULL, FUSED, Target, jit_functions, wrong

pytestmark = [pytest.mark.exhaustive, pytest.mark.usefixtures("target")]

Schedule = Callable[[int], ptx.Lockstep]


def right(schedule: Schedule, patch: triton_ptx.Patch | None = None, case: Case = FUSED) -> bool:
    """Whether one draw of a case in bfloat16 is right."""
    seeds, expected = iter(range(1000)), testing.expect(case, torch.bfloat16, count=1)
    with triton_ptx.running(lambda: schedule(next(seeds)), patch):
        return not wrong(testing.measure(case, expected, "triton", torch.bfloat16))


@pytest.mark.parametrize("schedule", [ptx.Random, ptx.Priority])
def test_hostile_schedules(schedule: Schedule) -> None:
    """Whichever warp is ahead: no barrier and no wait for a copy is missing."""
    assert right(schedule)


@pytest.mark.parametrize("eager", [0, 1])
@pytest.mark.parametrize("schedule", [ptx.Random, ptx.Priority])
def test_whenever_the_asynchronous_is_done(schedule: Callable[..., ptx.Lockstep], eager: float) -> None:
    """All of it as late as allowed, and all of it at once: copies, and the products of warpgroups."""
    assert right(lambda seed: schedule(seed, eager=eager), case=FULL)


# ---- planted bugs ----------------------------------------------------------------------------------------------------
@contextmanager
def edited(name: str, before: str, after: str) -> Iterator[None]:
    """A Triton function with another source; whatever was compiled is forgotten, before and afterwards."""
    functions = jit_functions()
    source = functions[name].src
    assert source.count(before) == 1, f"{name} does not have {before!r} once"

    def forget() -> None:
        for function in functions.values():
            function.hash = None
            function.device_caches.clear()

    functions[name]._unsafe_update_src(source.replace(before, after))
    forget()
    try:
        yield
    finally:
        functions[name]._unsafe_update_src(source)
        forget()


def found(patch: triton_ptx.Patch | None = None, case: Case = FUSED, schedule: Schedule = ptx.Priority) -> bool:
    """Whether the interpreter refuses what a kernel does, or a result is wrong."""
    try:
        return not right(schedule, patch, case)
    except ptx.PtxError:
        return True


@pytest.mark.parametrize(
    ("function", "before", "after"),
    [
        pytest.param("counting", "else block.index < block", "else block.index <= block", id="mask"),
        pytest.param("load_rows", "r[:, None] < count - first", "r[:, None] < count - first + 1", id="mask of a load"),
        pytest.param("logits", "x.id[:, None] != y.id[None, :], v", "x.id[:, None] == x.id[:, None], v", id="diagonal"),
        pytest.param("load_rows", "tile + r[:, None] * D", "tile + r[:, None] * (D - 1)", id="stride"),
        pytest.param(
            "statistics_kernel", "out + 2 * stride, sum_ez0", "out + 2 * stride - 1, sum_ez0", id="place of a result"
        ),
    ],
)
def test_bugs_in_the_source_are_found(function: str, before: str, after: str) -> None:
    with edited(function, before, after):
        assert found()


MMA = re.compile(r"(mma\.sync\S+ \{[^}]*\}, )\{([^},]*),([^},]*),([^},]*),([^}]*)\}")
WGMMA = r"(wgmma\.mma_async\S+ \{[^}]*\}, )"
OF_BOTH = {
    "wait": lambda text: re.sub(r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 7", text),
    "barrier": lambda text: re.sub(r"bar\.sync\s+0;", "", text),
    "lane": lambda text: re.sub(r"(shfl\.sync\.bfly\.b32\s+[^,]*,[^,]*,) 1,", r"\1 5,", text),
}
BUGS: dict[str, dict[str, triton_ptx.Patch]] = {
    "sm_80": OF_BOTH | {"operand": lambda text: MMA.sub(r"\1{\2,\4,\3,\5}", text)},
    "sm_90": OF_BOTH
    | {
        "operand": lambda text: re.sub(WGMMA + r"\{([^},]*),([^},]*),", r"\1{\3,\2,", text),
        "descriptors": lambda text: re.sub(WGMMA + r"(%rd\d+), (%rd\d+)", r"\1\3, \2", text),
        "offset": lambda text: re.sub(
            r"(add\.s64\s+%rd\d+, %rd\d+, )(-?\d{19});", lambda m: f"{m[1]}{int(m[2]) + 1};", text
        ),
        "stride": lambda text: re.sub(
            r"(or\.b64\s+%rd\d+, %rd\d+, )(-?\d{19});", lambda m: f"{m[1]}{int(m[2]) + (1 << 33)};", text
        ),
        "wait for products": lambda text: re.sub(r"(wgmma\.wait_group\.sync\.aligned) \d+", r"\1 7", text),
        "fence of registers": lambda text: text.replace("wgmma.fence.sync.aligned;", ""),
        "fence of memory": lambda text: text.replace("fence.proxy.async.shared::cta;", ""),
        "stage": lambda text: re.sub(
            r"(add\.s32\s+%r\d+, %r\d+, 1;\s+setp\.gt\.s32\s+%p\d+, %r\d+, )1;", r"\g<1>0;", text
        ),
    },
}


@pytest.mark.parametrize(
    ("target", "bug"), [(family, bug) for family in BUGS for bug in BUGS[family]], indirect=["target"]
)
def test_bugs_in_the_ptx_are_found(target: Target, bug: str) -> None:
    """Swapped operands, missing waits, barriers and fences, descriptors and stages that are not those meant."""
    changed: list[bool] = []

    def patch(text: str) -> str:
        after = BUGS[target.family][bug](text)
        changed.append(after != text)
        return after

    assert found(patch, FUSED if target.family == "sm_80" else FULL)
    assert any(changed)
