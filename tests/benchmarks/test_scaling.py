"""Several processes in the benchmarks: what is checked, timed and counted, and the tables in the documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.suite import __main__ as command
from benchmarks.suite import cases, gate, reckon, results, runner, scaling, scaling_tables
from benchmarks.suite.cases import BenchmarkCase
from benchmarks.suite.measure import Budget
from benchmarks.suite.scaling import Collectives, Found, GroupRow, Spent, Watched, group_rows
from tests.benchmarks.benchmarking import BUDGET, ENVIRONMENT, silent
from tests.distributed.processes import in_processes

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "several_processes.md"
COMMITTED = ROOT / "benchmarks" / "results" / "epyc-avx512-processes" / "results.json"
TINY = BenchmarkCase(cases.cacr(2, 24, 8, normalize=True))
FLOAT = 4  # bytes


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with gate.threads(1):
        yield


def expected_mib(row: dict[str, Any], bytes_each: float) -> float:
    """Of the embeddings of a rank to or from all others."""
    rank_batch = row["B"] // row["processes"]
    return (row["processes"] - 1) * row["V"] * rank_batch * row["D"] * bytes_each / 2**20


@pytest.mark.exhaustive
# ---- the command -----------------------------------------------------------------------------------------------------
def test_the_command_measures_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [TINY, BenchmarkCase(cases.cacr(2, 48, 8, normalize=True))]
    monkeypatch.setitem(cases.SUITES, "distributed", lambda threads, device: found)
    assert command.main(["--suite", "distributed", "--seconds", "0.05", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.csv"}
    rows = results.read(tmp_path / "results.json")["rows"]
    assert [(row["B"], row["row"]) for row in rows] == [
        (B, name) for B in (24, 48) for name in ("1 process", "2 processes", "4 processes")
    ]
    for row in rows:
        assert row["ours"] == (row["processes"] == 1)
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["cpu_ms"] > 0
        if row["processes"] == 1:
            assert (row["ratio"], row["collective_share"], row["needed_mib"]) == (1.0, 0.0, 0.0)
        else:
            embeddings = expected_mib(row, 2 * FLOAT)
            assert 0 < row["collective_share"] < 1
            assert embeddings < row["needed_mib"] < embeddings + 1e-3  # and sizes
            assert row["sent_mib"] is None or row["sent_mib"] > row["needed_mib"]
    for text in ("B = 24 in all", "B = 48 in all", "of the ideal", "collectives"):
        assert text in printed
    arguments = ["--load", str(tmp_path / "results.json"), "--compare", str(tmp_path / "results.json")]
    assert command.main(arguments) == 0
    assert "B = 24 in all" in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--device", "cuda"], ["--rows", "eager"], ["--threads", "2"]])
def test_options_of_other_suites_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse_arguments(["--suite", "distributed", *option])
    assert "one thread in each process" in capsys.readouterr().err


def test_older_results_are_read(tmp_path: Path) -> None:
    path = ROOT / "benchmarks" / "results" / "epyc-avx2" / "results.json"
    assert not set(results.LATER) & set(json.loads(path.read_text(encoding="utf-8"))["rows"][0])
    assert all(row[name] is None for row in results.read(path)["rows"] for name in results.LATER)


# ---- what processes do -----------------------------------------------------------------------------------------------
def rows_of_two() -> list[GroupRow]:
    return group_rows(lambda size: dist.group.WORLD if size == 2 else None)[:2]


def checked(fault: str) -> list[bool]:
    """Whether the checks of this rank are green; at full size only those are told that are not."""
    loss, of_all = scaling.CACRLoss, GroupRow.of_all
    if fault == "local negatives":
        scaling.CACRLoss = lambda gather_distributed=False, process_group=None, **options: loss(**options)
    if fault == "gradients of another size":
        GroupRow.of_all = lambda self, x: [part * (1.01 if x.dim() else 1.0) for part in of_all(self, x)]
    return [check.ok for check in scaling.check([TINY], rows_of_two())]


@pytest.mark.parametrize("fault", ["", "local negatives", "gradients of another size"])
def test_what_differs_from_one_process_is_red(fault: str, tmp_path: Path) -> None:
    of_two = [False, False] if fault else [True]
    assert in_processes(2, tmp_path, checked, fault) == [[True, *of_two], of_two]


def counted() -> tuple[dict[str, float], str]:
    """Bytes of each collective of 96 floats, and what is said of one that is not known."""
    found, x = {}, torch.ones(8, 12)
    group = dist.group.WORLD.group_name
    calls: dict[str, tuple[Any, ...]] = {
        "all_gather_into_tensor": (x, 2, group),
        "reduce_scatter_tensor": (x, "sum", 2, group),
        "all_reduce": (x, "sum", group),
    }
    operators = torch.ops._c10d_functional
    for name, arguments in calls.items():
        with Collectives(2) as collectives:
            operators.wait_tensor(getattr(operators, name)(*arguments))
        assert collectives.seconds > 0
        found[name] = collectives.bytes
    try:
        with Collectives(2):
            operators.broadcast(x, 0, group)
    except NotImplementedError as error:
        return found, str(error)
    return found, ""


def test_bytes_of_collectives(tmp_path: Path) -> None:
    """By the least that a rank of two has to send: of a gather all it has, of a reduce-scatter half of it."""
    for found, said in in_processes(2, tmp_path, counted):
        assert found == {"all_gather_into_tensor": 384.0, "reduce_scatter_tensor": 192.0, "all_reduce": 384.0}
        assert "broadcast" in said


def test_a_round_is_as_long_as_its_slowest_rank() -> None:
    row, key = group_rows()[1], (TINY.key, "2 processes")
    times = ((1.0, 4.0), (3.0, 2.0), (9.0, 9.0))
    ranks = [Found([], {}, {key: {0: Spent(a, b), 1: Spent(b, a)}}, {}) for a, b in times]
    wall, cpu = scaling.slowest(ranks, TINY, row)
    assert (wall.rounds, cpu.rounds) == ({0: 3.0, 1: 4.0}, {0: 4.0, 1: 3.0})


def test_shares_and_bytes_are_those_of_the_ranks_that_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(work: Any, arguments: tuple[Any, ...], nprocs: int) -> None:
        folder, found, budget = arguments
        assert (nprocs, budget) == (4, Budget(BUDGET.seconds * 1))
        keys = [(case.key, row.name) for case in found for row in group_rows()]
        green = {key: gate.Check(key[1], key[0], 1e-7, 1.0, 2e-7, 1.0) for key in keys}
        for rank in range(nprocs):
            share = 0.9 if rank > 1 else 0.25 * rank
            watched = {key: [Watched(2.0, 2.0 * share, 2**20, 3 * 2**20)] for key in keys}
            spent = {key: {0: Spent(0.5 if key[1] == "1 process" else 0.25, 0.1 + rank)} for key in keys}
            torch.save(tuple(Found([], green, spent, watched)), f"{folder}/rank{rank}.pt")

    monkeypatch.setattr(scaling.mp, "spawn", spawn)
    rows = scaling.run([TINY], BUDGET, ENVIRONMENT, silent)
    assert [row["ratio"] for row in rows] == [1.0, 0.5, 0.5]
    assert [row["cpu_ms"] for row in rows] == pytest.approx([100.0, 1100.0, 3100.0])
    assert [row["collective_share"] for row in rows] == pytest.approx([0.0, 0.125, 0.575])
    assert [(row["needed_mib"], row["sent_mib"]) for row in rows] == [(1.0, 3.0)] * 3
    assert rows[1]["fraction"] == pytest.approx(rows[1]["gflops"] / rows[1]["peak_gflops"])


def test_a_red_check_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    red = gate.Check("2 processes", TINY.key, 1.0, 0.1, 0.0, 0.1)

    def spawn(work: Any, arguments: tuple[Any, ...], nprocs: int) -> None:
        for rank in range(nprocs):
            torch.save(tuple(Found([red], {}, {}, {})), f"{arguments[0]}/rank{rank}.pt")

    monkeypatch.setattr(scaling.mp, "spawn", spawn)
    with pytest.raises(runner.RedGateError) as caught:
        scaling.run([TINY], BUDGET, ENVIRONMENT, silent)
    assert caught.value.checks == [red]


# ---- tables ----------------------------------------------------------------------------------------------------------
def test_the_ideal_counts_work_and_cores() -> None:
    """Twice the batch is four times the work, which two cores do in twice the time; four processes have two cores."""
    alone = {"B": 512, "p50_ms": 10.0}
    same = {"B": 512, "cores": 2}
    assert scaling_tables.ideal(same | {"processes": 2, "p50_ms": 5.0}, alone) == 1.0
    assert scaling_tables.ideal(same | {"processes": 4, "p50_ms": 5.0}, alone) == 1.0
    assert scaling_tables.ideal({"B": 1024, "cores": 2, "processes": 2, "p50_ms": 40.0}, alone) == 0.5
    assert scaling_tables.ideal({"B": 2048, "cores": 8, "processes": 4, "p50_ms": 40.0}, alone) == 1.0


def test_the_page_shows_committed_results() -> None:
    assert scaling_tables.block(COMMITTED) in PAGE.read_text(encoding="utf-8")


def test_the_page_is_written_from_results(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        f"before\n{scaling_tables.BEGIN} old --readme` -->\nold\n{scaling_tables.END}\nafter\n", encoding="utf-8"
    )
    scaling_tables.write(COMMITTED, page)
    assert page.read_text(encoding="utf-8") == f"before\n{scaling_tables.block(COMMITTED)}\nafter\n"
    first = results.read(COMMITTED)["rows"][0]
    assert f"commit {first['commit']}" in scaling_tables.block(COMMITTED)


# ---- reckoned --------------------------------------------------------------------------------------------------------
def test_the_page_shows_what_the_command_reckons(capsys: pytest.CaptureFixture[str]) -> None:
    reckon.main([])
    printed = capsys.readouterr().out.strip()
    assert printed == "\n".join(reckon.lines(reckon.System()))
    text = PAGE.read_text(encoding="utf-8")
    for part in printed.split("\n\n"):
        assert part in text
    reckon.main(["--B", "512", "--flops-share", "0.5"])
    assert "B = 512 a rank" in capsys.readouterr().out


def test_reckoned_by_hand() -> None:
    """16 GPUs in two nodes, by numbers that come out even."""
    system = reckon.System(
        flops=1e12, nvlink=1e9, adapter=1e8, node=8, flops_share=0.5, link_share=0.5, B=100, D=10, V=3, encoder=1e9
    )
    found = reckon.reckon(system, 16)
    keys = 15 * 3 * 100 * 10
    assert found.gather == pytest.approx(keys * 2 / 4e8)  # eight adapters are slower than NVLink
    assert found.scatter == pytest.approx(keys * 4 / 4e8)
    assert found.products == pytest.approx(5 * 2 * 3 * 100 * 1600 * 10 / 5e11)
    assert found.ring == pytest.approx(keys * 6 / 5e7)
    assert found.encoder == pytest.approx(1e9 * 3 * 100 / 5e11)
    assert found.memory == 16 * 3 * 100 * 10 * 8
    wide = reckon.reckon(reckon.replace(system, D=260), 16)  # three groups of features: nine products
    assert wide.products == pytest.approx(9 * 2 * 3 * 100 * 1600 * 260 / 5e11)
    assert found.gathered == found.gather + found.products + found.scatter
    assert found.share == pytest.approx(found.gathered / (found.gathered + found.encoder))
    assert found.saved == pytest.approx(found.products / (found.gathered + found.encoder))
    within = reckon.reckon(system, 8)
    assert within.gather == pytest.approx(7 * 3 * 100 * 10 * 2 / 5e8)
    assert within.ring == pytest.approx(7 * 3 * 100 * 10 * 6 / 5e8)


def test_where_a_ring_pays() -> None:
    system = reckon.System()
    edge = reckon.pays_from(system, 1024)
    for factor in (0.99, 1.01):
        found = reckon.reckon(reckon.replace(system, B=round(factor * edge)), 1024)
        assert (found.ring < found.gathered) == (factor > 1)
    assert reckon.pays_from(system, 8) == 0.0
    edge = reckon.memory_from(system, 1024)
    assert reckon.reckon(reckon.replace(system, B=round(edge)), 1024).memory == pytest.approx(8 * 2**30, rel=1e-3)


def test_collectives_send_what_is_reckoned() -> None:
    """Measured in float32, where keys and gradients are of one type; sizes are a few bytes more."""
    for row in results.read(COMMITTED)["rows"]:
        system = reckon.System(B=row["B"] // row["processes"], D=row["D"], V=row["V"])
        reckoned = 2 * reckon.sent(system, row["processes"], reckon.SINGLE)
        assert row["needed_mib"] * 2**20 == pytest.approx(reckoned, abs=2000)
