"""Verdicts on two runs and on two checkouts that take turns: made-up numbers for each, and the command."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite import __main__ as command
from benchmarks.suite import cases, compare, gate, results, verdict, versus
from benchmarks.suite.cases import BenchmarkCase
from benchmarks.suite.measure import Budget
from benchmarks.suite.rows import BASELINE, OURS
from benchmarks.suite.verdict import CANNOT_TELL, FASTER, SAME, SLOWER, Interval
from tests.benchmarks.benchmarking import ENVIRONMENT, TINY, row_named

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

MARGIN = 1.1


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with gate.threads(1):
        yield


# ---- the statistic ---------------------------------------------------------------------------------------------------
def test_intervals_of_the_median_are_those_of_order_statistics() -> None:
    """Of n values outside: 2 P(X < k) for n coins. 7: 2 / 128; 6: 2 / 64 = 3.1 %; 5: 6.3 % is too much."""
    assert verdict.median_interval([5.0, 1.0, 7.0, 3.0, 2.0, 6.0, 4.0]) == (1.0, 7.0)
    assert verdict.median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (1.0, 6.0)
    assert verdict.median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.97) is None
    assert verdict.median_interval([1.0] * 5) is None
    assert verdict.median_interval([]) is None
    assert verdict.median_interval([float(i) for i in range(1, 21)]) == (6.0, 15.0)  # tables: 20 values, 95.9 %


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    generator = random.Random(1)
    draws = [[generator.lognormvariate(0.0, 1.0) for _ in range(15)] for _ in range(2000)]
    found = [verdict.median_interval(draw) for draw in draws]
    inside = sum(interval is not None and interval.low <= 1.0 <= interval.high for interval in found)
    assert 0.95 * 2000 - 40 < inside < 2000  # 96.5 % by the binomial


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (Interval(1.11, 1.3), SLOWER),
        (Interval(0.7, 0.90), FASTER),
        (Interval(0.92, 1.09), SAME),
        (Interval(1.05, 1.2), CANNOT_TELL),
        (Interval(0.8, 0.95), CANNOT_TELL),
        (Interval(0.5, 2.0), CANNOT_TELL),
        (Interval(math.nan, math.nan), CANNOT_TELL),
        (None, CANNOT_TELL),
    ],
)
def test_there_are_four_verdicts(interval: Interval | None, expected: str) -> None:
    assert verdict.judge(interval, MARGIN) == expected


# ---- two runs --------------------------------------------------------------------------------------------------------
def timed(name: str, times: list[float], **values: Any) -> dict[str, Any]:
    """A row of a run with these milliseconds of its rounds."""
    row = results.record(TINY, row_named(name), False, ENVIRONMENT, p50_ms=statistics.median(times), round_ms=times)
    return row | {"peak_gflops": 100.0, "peak_source": "FMA"} | values


def rounds(middle: float, spread: float = 0.01, count: int = 11) -> list[float]:
    """Evenly spread times around a median."""
    return [middle * (1 + spread * (2 * i / (count - 1) - 1)) for i in range(count)]


def verdicts(old: dict[str, list[float]], new: dict[str, list[float]], **peak: Any) -> dict[str, str]:
    before, after = [timed(n, t) for n, t in old.items()], [timed(n, t, **peak) for n, t in new.items()]
    return {c.row: c.verdict for c in compare.compare(before, after, MARGIN)}


@pytest.mark.parametrize(
    ("ours", "eager", "expected"),
    [
        (rounds(2.0), rounds(9.0), SLOWER),
        (rounds(0.5), rounds(9.0), FASTER),
        (rounds(1.02), rounds(9.0), SAME),
        (rounds(1.1, 0.05), rounds(9.0), CANNOT_TELL),
        (rounds(1.3, 0.9), rounds(9.0), CANNOT_TELL),  # noise
        (rounds(3.0), rounds(27.0), SAME),  # the machine
        (rounds(1.0), rounds(27.0), CANNOT_TELL),  # the yardstick alone
        (rounds(2.0, count=5), rounds(9.0, count=5), CANNOT_TELL),  # too few
    ],
)
def test_rows_are_judged_by_the_eager_row_of_the_same_rounds(
    ours: list[float], eager: list[float], expected: str
) -> None:
    old = {"torch": rounds(1.0), "eager": rounds(9.0)}
    found = verdicts(old, {"torch": ours, "eager": eager})
    assert found["torch"] == expected


def test_noise_that_hits_both_rows_of_a_round_is_taken_out() -> None:
    storm = [1.0, 5.0, 1.1, 9.0, 1.0, 3.0, 1.2, 1.0, 7.0, 1.0, 2.0]
    old = {"torch": [2 * s for s in storm], "eager": [9 * s for s in storm]}
    new = {"torch": [3 * s for s in storm[::-1]], "eager": [9 * s for s in storm[::-1]]}
    assert verdicts(old, new)["torch"] == SLOWER
    assert verdicts({"torch": old["torch"]}, {"torch": new["torch"]})["torch"] == CANNOT_TELL


def test_without_an_eager_row_the_peak_takes_out_the_machine() -> None:
    old, new = {"torch": rounds(1.0)}, {"torch": rounds(1.5)}
    assert verdicts(old, new)["torch"] == SLOWER
    assert verdicts(old, new, peak_gflops=100 / 1.5)["torch"] == SAME
    assert verdicts(old, new, peak_gflops=30.0)["torch"] == CANNOT_TELL  # the time itself is longer
    assert verdicts(old, new, peak_gflops=100 / 1.5, peak_source="a large torch.mm")["torch"] == SLOWER


def test_what_cannot_be_compared_says_why() -> None:
    (old,), (new,) = [timed("torch", rounds(1.0))], [timed("torch", rounds(9.0))]
    (bare,) = compare.compare([old | {"round_ms": None}], [new], MARGIN)
    assert (bare.verdict, bare.slower, bare.reason) == (CANNOT_TELL, False, "results without the times of their rounds")
    (other,) = compare.compare([old], [new], MARGIN, ["machine"])
    assert (other.verdict, other.reason) == (CANNOT_TELL, "another machine")
    assert compare.differing(ENVIRONMENT, ENVIRONMENT | {"isa": "none", "commit": "x"}) == ["isa"]


def test_only_rows_whose_speed_is_promised_count() -> None:
    old = [timed(name, rounds(1.0)) for name in ("torch", "reference", "broadcasting")]
    new = [timed(name, rounds(9.0)) for name in ("torch", "reference", "broadcasting")]
    found = compare.compare(old, new, MARGIN)
    assert {c.verdict for c in found} == {SLOWER}
    assert [c.row for c in found if c.slower] == ["torch"]
    assert {c.family for c in found} == {OURS, BASELINE}


@pytest.mark.parametrize(
    ("factor", "threshold", "code"), [(1.0, [], 0), (1.5, [], 1), (0.5, [], 0), (1.5, ["--threshold", "2"], 0)]
)
def test_the_exit_status_is_1_for_slower_only(
    factor: float, threshold: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [timed(name, rounds(1.0), ours=name == "torch", rounds=11) for name in ("torch", "eager")]
    rows = [row | dict.fromkeys(("p20_ms", "p80_ms", "mm_gflops", "bandwidth_gbs"), 1.0) for row in rows]
    slow = {"p50_ms": factor, "round_ms": rounds(factor)}
    old, _ = results.write(tmp_path / "old", rows, ENVIRONMENT, "quick")
    new, _ = results.write(tmp_path / "new", [rows[0] | slow, rows[1]], ENVIRONMENT, "quick")
    shown = ["--load", str(new), "--compare", str(old), "--out", str(tmp_path / "none"), *threshold]
    assert command.main(shown) == code
    printed = capsys.readouterr().out
    assert "95 % interval" in printed
    assert "Rows of the library: " in printed
    other, _ = results.write(tmp_path / "other", [row | {"case": "other"} for row in rows], ENVIRONMENT, "quick")
    assert command.main(["--load", str(new), "--compare", str(other), "--out", str(tmp_path / "none")]) == 2


# ---- two checkouts ---------------------------------------------------------------------------------------------------
class Made:
    """A worker with made-up times."""

    def __init__(
        self, seconds: float, numbers: tuple[float, ...] = (1.0, 2.0), noise: float = 0.0, calls: int = 10**6
    ) -> None:
        self.seconds, self.numbers, self.noise, self.calls, self.asked = seconds, numbers, noise, calls, 0

    def ask(self, **request: Any) -> dict[str, Any]:
        if "load" in request:
            return {"numbers": list(self.numbers)}
        self.asked += 1
        if self.asked > self.calls:
            return {"error": "RuntimeError: out of memory"}
        return {"seconds": self.seconds * (1 + self.noise * (self.asked % 3))}


def turns(new: Made, again: Made) -> compare.Comparison:
    both = {versus.OLD: Made(0.01), versus.NEW: new, versus.CONTROL: again}
    return versus.take_turns(both, TINY, Budget(0.5), 1.05)


def test_checkouts_that_take_turns() -> None:
    assert turns(Made(0.012), Made(0.01)).verdict == SLOWER
    assert turns(Made(0.008), Made(0.01)).verdict == FASTER
    assert turns(Made(0.0102), Made(0.01)).verdict == SAME
    assert turns(Made(0.0105), Made(0.01, noise=0.01)).verdict == CANNOT_TELL
    found = turns(Made(0.012), Made(0.013))  # the control is off by more
    assert found.verdict == CANNOT_TELL
    assert found.interval == pytest.approx((1.2 / 1.3, 1.2 * 1.3))
    assert turns(Made(0.012), Made(1 / 130)).interval == pytest.approx((1.2 / 1.3, 1.2 * 1.3))


def test_another_loss_is_not_compared() -> None:
    found = turns(Made(0.012, numbers=(1.01, 2.0)), Made(0.01))
    assert (found.verdict, found.reason) == (CANNOT_TELL, "the two compute different numbers")
    assert versus.differ([0.0, 5.0], [0.004, 5.0], 1e-3) is False  # a sum beside the norm of what was summed
    assert versus.differ([0.0, 5.0], [0.006, 5.0], 1e-3)
    assert versus.differ([0.0, 5.0], [math.nan, 5.0], 1e-3)
    assert versus.differ([1.0, 1.0], [1.0, 1.0, 1.0, 1.0], 1e-3)


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_a_call_that_fails_late_leaves_out_its_case(calls: int) -> None:
    found = turns(Made(0.012, calls=calls), Made(0.01))
    assert (found.verdict, found.reason) == (CANNOT_TELL, "new: RuntimeError: out of memory")


PROBLEMS = [
    BenchmarkCase(cases.raw(cases.cacr(2, 9, 6)), module=True),
    BenchmarkCase(cases.cacr(2, 9, 6, reduction="none")),
    BenchmarkCase(cases.raw(cases.queue(2, 5, 6, 11)), module=True),
    BenchmarkCase(cases.raw(cases.momentum(2, 5, 6, 11, key_offset=2)), module=True),
    BenchmarkCase(cases.supervised(12, 6, 3, 17)),
]


def test_a_checkout_takes_turns_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way, in three processes, of every loss."""
    with versus.workers(versus.ROOT) as both:
        for case in PROBLEMS:
            found = versus.take_turns(both, case, Budget(0.02), 1e6)
            assert found.verdict == SAME, found
            assert found.old_ms > 0
        broken = PROBLEMS[0].problem._replace(options={"tau": 1.0})
        failed = versus.take_turns(both, BenchmarkCase(broken), Budget(0.02), 1e6)
    assert failed.verdict == CANNOT_TELL
    assert "TypeError" in failed.reason
    with pytest.raises(SystemExit, match="no results file, no folder with cacr_kernels, no commit"):
        command.main(["--compare", str(tmp_path / "nothing")])


def test_a_process_that_finds_another_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cacr_kernels").mkdir()
    (tmp_path / "cacr_kernels" / "__init__.py").write_text("__file__ = '/elsewhere/__init__.py'\n__version__ = '0'\n")
    assert versus.checkout(str(tmp_path)) == tmp_path.resolve()
    with pytest.raises(versus.NoCheckoutError, match="elsewhere"):
        versus.Worker(tmp_path)
