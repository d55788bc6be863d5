"""The training demo: its data, its own loss, and one run from end to end."""

# ruff: noqa: E402 (the demo can be imported only where its extra is installed)

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

for package in ("sklearn", "matplotlib", "rich"):
    pytest.importorskip(package)

from benchmarks import host
from benchmarks.demo import __main__ as demo
from benchmarks.demo import report, training
from benchmarks.demo.config import LOSSES, QUICK
from benchmarks.demo.data import CLASSES, HELD_OUT_PER_CLASS, augment, load_split
from benchmarks.demo.evaluation import MEASURES, PROBES, REPRESENTATIONS, Score, sampling_error, score, verdict
from benchmarks.demo.threads import Threads
from benchmarks.demo.training import Run, make_encoder, make_objective, nt_xent, optimiser_step, train

# Without compiled kernels the package says so once; the demo works all the same.
pytestmark = pytest.mark.filterwarnings("ignore:cacr_kernels. only the plain PyTorch backend:RuntimeWarning")

DIGITS_PER_CLASS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_training_part_is_linearly_imbalanced():
    expected = [(count - HELD_OUT_PER_CLASS) * (i + 1) // 10 for i, count in enumerate(DIGITS_PER_CLASS)]
    assert load_split().train_counts == expected


def test_held_out_part_is_balanced_and_disjoint_from_training():
    split = load_split()
    assert split.test_counts == [HELD_OUT_PER_CLASS] * CLASSES
    assert len(set(split.test_index.tolist())) == HELD_OUT_PER_CLASS * CLASSES
    assert not set(split.test_index.tolist()) & set(split.train_index.tolist())


def test_validation_split_comes_from_the_training_part_only():
    split, validation = load_split(), load_split(validate=True)
    rows = [set(index.tolist()) for index in (validation.train_index, validation.test_index)]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == set(split.train_index.tolist())
    assert min(validation.test_counts) >= 1


def test_split_is_the_same_every_time():
    assert torch.equal(load_split().train_index, load_split().train_index)


@pytest.mark.parametrize("views", [1, 4])
def test_augment_keeps_shape_dtype_and_range(views):
    images = load_split().train_images[:7]
    batch = augment(images, views, torch.Generator().manual_seed(3))
    assert batch.shape == (views, 7, 1, 8, 8)
    assert batch.dtype == images.dtype
    assert batch.min() >= 0.0
    assert batch.max() <= 1.0


def test_augment_is_seeded_and_leaves_its_input_alone():
    images = load_split().train_images[:7]
    before = images.clone()
    first, again, other = (augment(images, 3, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(images, before)


def naive_nt_xent(views, temperature):
    """One loop per index, straight from the definition."""
    v, b, _ = views.shape
    z = torch.nn.functional.normalize(views, dim=-1)
    total = 0.0
    for x in range(v):
        for i in range(b):
            others = [torch.exp(z[x, i] @ z[y, j] / temperature) for y in range(v) for j in range(b) if j != i]
            for y in range(v):
                if y != x:
                    positive = torch.exp(z[x, i] @ z[y, i] / temperature)
                    total += -torch.log(positive / (positive + sum(others)))
    return total / (v * (v - 1) * b)


@pytest.mark.parametrize(("v", "b", "d"), [(2, 5, 3), (4, 7, 5), (3, 2, 1)])
def test_nt_xent_matches_the_loops(v, b, d):
    views = torch.randn(v, b, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    got, want = nt_xent(views, 0.5), naive_nt_xent(views, 0.5)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(value, views)[0] for value in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_nt_xent_with_two_views_is_cross_entropy_over_all_others():
    b, temperature = 6, 0.3
    views = torch.randn(2, b, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = torch.nn.functional.normalize(views, dim=-1).flatten(0, 1)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    target = torch.arange(2 * b).roll(b)
    want = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(nt_xent(views, temperature), want, rtol=1e-12, atol=1e-12)


def test_score_separates_overall_from_balanced():
    truth = torch.tensor([0] * 1 + [1] * 2 + [2] * 2 + list(range(3, 10)) * 5).numpy()
    predicted = truth.copy()
    predicted[0] = 9
    result = score(predicted, truth)
    assert result.per_class == [0.0] + [1.0] * 9
    assert result.overall == pytest.approx(39 / 40)
    assert result.balanced == pytest.approx(0.9)
    assert result.tail == pytest.approx(2 / 3)
    assert result.worst_class == 0.0


@pytest.mark.parametrize("loss", LOSSES)
def test_training_is_deterministic(loss):
    split = load_split()
    first, again, other = (train(loss, seed, split, QUICK, lambda run: None) for seed in (0, 0, 1))
    assert first.history == again.history
    assert first.history != other.history
    for a, b in zip(first.encoder.state_dict().values(), again.encoder.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_features_of_an_image_do_not_depend_on_the_others():
    encoder, images = make_encoder(QUICK, 0), load_split().train_images
    found = encoder.features(images[:600])
    torch.testing.assert_close(found[:20], encoder.features(images[:20]))
    assert encoder.training


def test_every_step_begins_with_no_gradient():
    """Two steps of length 0 on the same images have the same gradient."""
    run, gradients = Run("NT-Xent", 0, make_encoder(QUICK, 0)), []
    optimizer = torch.optim.SGD(run.encoder.parameters(), lr=0.0)
    for _ in range(2):
        draw = torch.Generator().manual_seed(0)
        images = load_split().train_images[:32]
        optimiser_step(run, images, make_objective("NT-Xent", QUICK), optimizer, draw, 2)
        gradients.append([p.grad.clone() for p in run.encoder.parameters()])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def test_both_losses_see_the_same_views(monkeypatch):
    """The differences are paired: batches and views are those of the seed, whatever the loss."""
    seen = {loss: [] for loss in LOSSES}
    for loss in LOSSES:

        def keep(images, views, generator, into=seen[loss]):
            into.append(augment(images, views, generator))
            return into[-1]

        monkeypatch.setattr(training, "augment", keep)
        train(loss, 0, load_split(), QUICK, lambda run: None)
    first, second = seen.values()
    assert first
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_sampling_error_by_hand():
    assert sampling_error(0.8, 100) == pytest.approx(0.04)
    assert sampling_error(1.0, 100) == 0.0


def test_timing_by_hand():
    """Medians over all steps of a loss; the share is that of the loss in its own step."""
    seconds = {"CACR": ([1.0, 2.0, 4.0], [0.5, 0.2, 0.4]), "NT-Xent": ([8.0], [2.0])}
    encoder = make_encoder(QUICK, 0)
    found = report.timings([Run(loss, 0, encoder, {}, *seconds[loss]) for loss in LOSSES])
    assert found["CACR"] == pytest.approx({"step_ms": 2000.0, "loss_ms": 400.0, "loss_share": 0.1})
    assert found["NT-Xent"]["loss_share"] == pytest.approx(0.25)


def test_training_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    train("NT-Xent", 0, load_split(), QUICK, lambda run: None)
    assert torch.equal(torch.random.get_rng_state(), before)


def finite_numbers(node):
    """Every number in nested lists and dictionaries."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        return [number for child in node for number in finite_numbers(child)]
    return [node] if isinstance(node, float) else []


@pytest.mark.exhaustive
def test_quick_run_from_end_to_end(tmp_path, capsys):
    picture, figures = tmp_path / "new" / "demo.png", tmp_path / "demo.json"
    demo.main(["--quick", "--threads", "1", "--out", str(picture), "--json", str(figures)])
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size > 20_000
    result = json.loads(figures.read_text(encoding="utf-8"))
    numbers = finite_numbers(result)
    assert len(numbers) > 100
    assert all(math.isfinite(number) for number in numbers)
    for name in REPRESENTATIONS:
        for probe in PROBES:
            for measure in MEASURES:
                assert 0.0 <= result["accuracy"][name][probe][measure]["mean"] <= 1.0
    assert result["scored_on"] == "held-out part"
    assert {run["loss"] for run in result["history"]} == set(LOSSES)
    entropies = [run["per_epoch"] for run in result["history"] if run["loss"] == "CACR"]
    for history in entropies:
        assert max(history["attraction_entropy"]) <= math.log(QUICK.views - 1) + 1e-5
        assert max(history["repulsion_entropy"]) <= math.log(QUICK.batch - 1) + 1e-5
        for loss, attraction, repulsion in zip(*(history[k] for k in ("loss", "attraction", "repulsion")), strict=True):
            assert loss == pytest.approx(attraction + repulsion, abs=1e-5)
    printed = capsys.readouterr().out
    assert str(Path(picture).name) in printed
    assert "backend" in printed
    assert "\x1b" not in printed


def test_missing_extra_is_named(monkeypatch):
    original = importlib.import_module

    def without_sklearn(name, *rest):
        if name == "sklearn":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(host.importlib, "import_module", without_sklearn)
    with pytest.raises(SystemExit, match=r"scikit-learn.*pip install cacr_kernels\[demo\]"):
        demo.main([])


def test_busy_machine_is_left_with_one_thread():
    torch.set_num_threads(2)
    threads = Threads(2)
    assert torch.get_num_threads() == 1  # the first epoch
    assert not threads.after_epoch([0.05, 0.06, 0.9])
    assert torch.get_num_threads() == 2
    assert not threads.after_epoch([0.03, 0.03, 0.9])  # one slow step says nothing
    assert torch.get_num_threads() == 2
    assert threads.after_epoch([0.5, 0.7, 0.03])
    assert torch.get_num_threads() == 1
    assert not threads.after_epoch([0.05, 0.05, 0.05])
    assert torch.get_num_threads() == 1


def test_chosen_number_of_threads_is_left_alone():
    threads = Threads(1)
    torch.set_num_threads(2)
    assert not threads.after_epoch([9.0])
    assert torch.get_num_threads() == 2


def made_up(cacr, nt_xent):
    """Scores of which only the balanced accuracies say anything."""
    return {
        name: [{probe: Score(value, value, value, value, [value]) for probe in PROBES} for value in values]
        for name, values in zip(LOSSES, (cacr, nt_xent), strict=True)
    }


@pytest.mark.parametrize(
    ("cacr", "nt_xent", "said"),
    [
        ([0.93, 0.90, 0.93], [0.91, 0.92, 0.92], "a tie (+0.3 ± 5.2 points)"),
        ([0.92, 0.93, 0.94], [0.90, 0.91, 0.921], "CACR is better (+2.0 ± 0.1 points)"),
        ([0.90, 0.91, 0.92], [0.92, 0.93, 0.939], "NT-Xent is better (-2.0 ± 0.1 points)"),
        ([0.90], [0.92], "-2.0 points on one seed, which says nothing"),
    ],
)
def test_verdict_calls_a_tie_a_tie(cacr, nt_xent, said):
    assert verdict(made_up(cacr, nt_xent), "linear") == said


def test_temperatures_of_both_losses_are_matched():
    def at(*arguments):
        config = demo.configure(demo.parse_arguments(list(arguments)))
        return config.tau_neg, config.temperature

    assert at() == (2.0, 0.25)
    assert at("--tau-neg", "0.9") == (0.9, pytest.approx(1 / 1.8))
    assert at("--temperature", "0.1") == (5.0, 0.1)
    assert at("--tau-neg", "0.9", "--temperature", "0.1") == (0.9, 0.1)


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--epochs", "-1"], ["--threads", "none"]])
def test_wrong_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_temperatures_reach_the_configuration():
    options = demo.parse_arguments(["--tau-neg", "0.9", "--temperature", "0.1", "--validate", "--seeds", "5"])
    config = demo.configure(options)
    assert (config.tau_pos, config.tau_neg, config.temperature) == (1.0, 0.9, 0.1)
    assert config.validate
    assert config.seeds == 5
