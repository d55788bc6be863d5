"""What ``"auto"`` does before it trusts a backend: a made-up one on the CPU, and those of a GPU where there is one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cacr_kernels
from cacr_kernels.backends import kept, self_check, table
from cacr_kernels.backends.entry import Backend, registered
from cacr_kernels.operators.registry import implement, operator
from tests.agreement import LOSSES, cast, each_loss, small_inputs

NAME = "trial"  # the backend that is made up: those of the CPU, with whatever a test does to them
OPERATORS = ("cacr", "contrast", "detached_keys", "repulsion")
WITH_BACKWARD = (*OPERATORS, "contrast_backward")
CPU_LIBRARY = cacr_kernels.available_backends()["cpu"] is None
pytestmark = pytest.mark.skipif(not CPU_LIBRARY, reason="needs the compiled CPU library")

spoil: dict[str, Callable[[tuple[Tensor, ...]], Any]] = {}
called: list[str] = []


def _implement(name: str) -> None:
    def compute(*arguments: Any) -> Any:
        called.append(name)
        wide = (x.float() if isinstance(x, Tensor) and x.dtype.itemsize == 2 else x for x in arguments)
        found = operator(f"{name}_cpu")(*wide)
        return spoil[name](found) if name in spoil else found

    implement(f"{name}_{NAME}", compute)


@pytest.fixture(scope="module")
def made_up() -> Backend:
    return registered(
        Backend(
            NAME,
            "for tests",
            lambda device: None if device is None or device.type == "cpu" else "CPU only",
            operators=OPERATORS,
            implement=_implement,
            check_first=lambda device: {"device": "made up"},
        )
    )


@pytest.fixture(autouse=True)
def trial(made_up: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Backend]:
    """It is what "auto" takes, nobody knows anything of it, and what is kept is kept in a folder of the test."""
    monkeypatch.setattr(table, "TABLE", (*table.TABLE, made_up))
    monkeypatch.setenv("CACR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CACR_SELF_CHECK", raising=False)
    self_check.forget()
    spoil.clear()
    called.clear()
    yield made_up
    self_check.forget()


def loss_of(loss: str, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    value: Tensor = LOSSES[loss](**cast(small_inputs(loss), dtype), **options)
    return value


def wrong_by(share: float) -> Callable[[tuple[Tensor, ...]], Any]:
    """The first result that is no statistic is off by a share of its size."""
    return lambda found: (found[0] + share * found[0].abs().max(), *found[1:])


def assert_plain_torch_serves(loss: str, **options: Any) -> None:
    called.clear()
    found = loss_of(loss, **options)
    assert called == []
    torch.testing.assert_close(found, loss_of(loss, backend="reference", **options))


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_good_backend_serves(loss: str, dtype: torch.dtype, normalize: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(loss, dtype, normalize=normalize)
    before = len(called)
    assert before > 1
    loss_of(loss, dtype, normalize=normalize)
    assert 0 < len(called) - before < before, "it is checked once"


@pytest.mark.parametrize(
    ("name", "loss"),
    [("cacr", "cacr"), ("contrast", "supervised"), ("contrast_backward", "supervised"), ("detached_keys", "momentum")],
)
def test_a_bad_backend_is_left_out(name: str, loss: str) -> None:
    spoil[name] = wrong_by(1e-3)
    with pytest.warns(RuntimeWarning, match="'trial' does not pass its self-check on cpu.*differs from the definition"):
        loss_of(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning
        assert_plain_torch_serves(loss)


def test_what_the_promise_allows_is_allowed() -> None:
    spoil["cacr"] = wrong_by(1e-7)
    loss_of("cacr")
    assert_used("cacr")


def assert_used(loss: str) -> None:
    called.clear()
    loss_of(loss)
    assert called


@pytest.mark.parametrize("result", [torch.nan, torch.inf])
def test_what_is_not_finite(result: float) -> None:
    spoil["cacr"] = lambda found: (torch.full_like(found[0], result), *found[1:])
    with pytest.warns(RuntimeWarning, match="not finite where it should be"):
        loss_of("cacr")
    assert_plain_torch_serves("cacr")


def test_nan_in_the_data_is_no_fault() -> None:
    views = small_inputs("cacr")["views"].float()
    views[0, 2, 1] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cacr_kernels.cacr_loss(views).isnan()
    assert called


def test_equal_rows_are_no_fault() -> None:
    """Costs are zero, and so are gradients: what is left of them is rounding."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for normalize in (False, True):
            cacr_kernels.cacr_loss(torch.full((2, 9, 5), 0.3), normalize=normalize)
    assert called


def test_a_backend_that_hides_nan() -> None:
    """A diverged encoder has to show: random rows are computed right, and what comes of NaN is no number."""
    spoil["cacr"] = lambda found: tuple(x.nan_to_num(1.0) for x in found)
    views = small_inputs("cacr")["views"].float()
    views[0, 2, 1] = torch.nan
    with pytest.warns(RuntimeWarning, match="value of cacr in torch.float32 is a number where it should be NaN"):
        cacr_kernels.cacr_loss(views)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_half_types_may_have_rounded_coefficients(dtype: torch.dtype) -> None:
    """By one rounding to the type, and no more; values may not."""
    subject = self_check.Subject(NAME, "cacr", dtype, "", False, torch.device("cpu"))
    truth = {"value": torch.ones(1).double(), "gradient of views": torch.ones(1, 3).double()}
    least = {"value": torch.ones(()), "gradient of row": torch.ones(()), "tau": torch.ones(())}
    eps = torch.finfo(dtype).eps

    def verdict(name: str, error: float) -> str | None:
        found = {n: (x + error * (n == name)).float() for n, x in truth.items()}
        return self_check.difference(subject, truth, {n: x.float() for n, x in truth.items()}, found, least)

    assert verdict("gradient of views", 1.9 * eps) is None
    assert "gradient of views of cacr" in str(verdict("gradient of views", 2.5 * eps))
    assert "value of cacr" in str(verdict("value", 0.5 * eps))


def test_a_kernel_that_does_not_compile() -> None:
    def refuse(found: Any) -> Any:
        raise RuntimeError("ptxas says no")

    spoil["cacr"] = refuse
    with pytest.warns(RuntimeWarning, match="cacr in torch.float32 raises RuntimeError: ptxas says no"):
        loss_of("cacr")
    assert_plain_torch_serves("cacr")


def test_each_operator_and_type_by_itself() -> None:
    spoil["contrast"] = wrong_by(1e-3)
    loss_of("cacr")
    with pytest.warns(RuntimeWarning, match="contrast"):
        loss_of("supervised")
    assert_used("cacr")
    called.clear()
    loss_of("cacr", torch.float64)
    assert len(called) > 1, "another arithmetic is checked, too"


def test_one_warning_for_a_device() -> None:
    for name in WITH_BACKWARD:
        spoil[name] = wrong_by(1e-2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for loss in LOSSES:
            loss_of(loss)
            loss_of(loss, torch.float64)
    assert sum("self-check" in str(w.message) for w in said) == 1
    assert list(self_check._verdicts.values()).count(False) > 2


def test_a_named_backend_is_never_checked() -> None:
    spoil["cacr"] = wrong_by(1e-1)
    loss_of("cacr", backend=NAME)
    assert called == ["cacr"]


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACR_SELF_CHECK", "0")
    spoil["cacr"] = wrong_by(1e-1)
    loss_of("cacr")
    assert called == ["cacr"]


def test_asking_checks_nothing() -> None:
    from cacr_kernels.functional import backend_for

    assert backend_for("cacr_loss", [small_inputs("cacr")["views"]]) == NAME
    assert called == []


def test_the_rows_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    small = self_check.small
    monkeypatch.setattr(self_check, "small", lambda *given: seen.append(small(*given)) or seen[-1])
    views = small_inputs("cacr")["views"].float()
    cacr_kernels.cacr_loss(views)
    (random, _), (q, _) = seen
    assert torch.equal(q, views)
    assert random.shape[1] != views.shape[1]


@pytest.mark.parametrize(("dtype", "checked"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_many_features_of_half_types(
    dtype: torch.dtype, checked: bool, trial: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have kernels of their own, which the user's first rows need not reach."""
    monkeypatch.setattr(table, "TABLE", (*table.TABLE[:-1], trial._replace(half_types=True)))
    spoil["cacr"] = lambda found: tuple(x / 2 if x.dim() == 3 and x.shape[-1] > 128 else x for x in found)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss_of("cacr", dtype)
    assert any("differs from the definition" in str(w.message) for w in caught) == checked


@pytest.mark.parametrize("rows", [torch.zeros(3, 7, 5), torch.full((3, 7, 5), torch.nan), torch.randn(3, 1, 5)])
def test_rows_that_show_nothing_hide_nothing(rows: Tensor, tmp_path: Path) -> None:
    spoil["cacr"] = lambda found: tuple(x / 2 for x in found)
    with pytest.warns(RuntimeWarning, match="differs from the definition"):
        cacr_kernels.cacr_loss(rows)
    assert list(tmp_path.iterdir()) == []
    called.clear()
    cacr_kernels.cacr_loss(small_inputs("cacr")["views"].float())
    assert called == []


@pytest.mark.parametrize("who", ["by_definition", "by_backend"])
def test_a_check_that_cannot_be_made_says_nothing_of_the_backend(
    who: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(self_check, who, full)
    with pytest.warns(RuntimeWarning, match="could not be made, and it is used as it is: .*no room") as said:
        loss_of("cacr")
    assert said[0].filename == table.__file__ or "tests" in said[0].filename
    assert_used("cacr")
    assert list(tmp_path.iterdir()) == []


def test_anomaly_mode_and_nan() -> None:
    views = small_inputs("cacr")["views"].float()
    views[0, 2, 1] = torch.nan
    with torch.autograd.set_detect_anomaly(True):
        assert cacr_kernels.cacr_loss(views).isnan()


def test_a_device_that_does_not_say_what_it_is(trial: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(device: torch.device) -> dict[str, str]:
        raise LookupError("no such package")

    monkeypatch.setattr(table, "TABLE", (*table.TABLE[:-1], trial._replace(check_first=unknown)))
    loss_of("cacr")
    assert len(called) > 1
    assert list(tmp_path.iterdir()) == []


def test_a_bad_verdict_is_not_sought_again(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil["cacr"] = wrong_by(1e-2)
    with pytest.warns(RuntimeWarning, match="self-check"):
        loss_of("cacr")
    monkeypatch.setattr(self_check, "_verdict", None)
    assert_plain_torch_serves("cacr")


def test_a_large_problem_is_cut() -> None:
    subject = self_check.Subject(NAME, "contrast", torch.float32, "", False, torch.device("cpu"))
    q, k = self_check.small(subject, [torch.zeros(5, 3000, 33), torch.zeros(70001, 33)])
    assert q.shape[0] == k.shape[0] == 3
    assert q.shape[0] ** 2 * q.shape[1] * k.shape[1] <= self_check.SIMILARITIES
    assert min(q.shape[1], k.shape[1]) > 100
    wide, _ = self_check.small(subject, [torch.zeros(2, 64, 1 << 17), torch.zeros(2, 64, 1 << 17)])
    assert wide.numel() <= self_check.FEATURES
    assert 10 * 4 * wide.shape[1] ** 2 * wide.shape[2] <= self_check.OPERATIONS


# ---- callers with modes of their own ---------------------------------------------------------------------------------
# What torch itself says while it compiles.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("good", [True, False])
@each_loss
def test_compiled(loss: str, good: bool) -> None:
    """It is checked while it is traced, and the graph names what serves."""
    if not good:
        for name in WITH_BACKWARD:
            spoil[name] = wrong_by(1e-2)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **tensors: LOSSES[loss](**tensors), fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compiled(**cast(small_inputs(loss), torch.float32))
    assert any("self-check" in str(w.message) for w in said) is not good
    called.clear()
    compiled(**cast(small_inputs(loss), torch.float32))
    assert bool(called) is good


def test_inside_transforms_and_modes() -> None:
    views = small_inputs("cacr")["views"].float()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        cacr_kernels.cacr_loss(views)
    self_check.forget()
    torch.func.grad(cacr_kernels.cacr_loss)(views)
    assert called
    assert all(self_check._verdicts.values())


# ---- what is kept ----------------------------------------------------------------------------------------------------
def test_good_verdicts_are_kept(tmp_path: Path) -> None:
    loss_of("cacr")
    (file,) = tmp_path.glob("self-check-trial-*.json")
    key = json.loads(file.read_text())["key"]
    assert key["device"] == "made up"
    assert key["torch"] == torch.__version__
    assert key["operator"] == "cacr"
    self_check.forget()
    called.clear()
    loss_of("cacr")
    assert called == ["cacr"], "another process need not check"


def test_bad_verdicts_are_not(tmp_path: Path) -> None:
    spoil["cacr"] = wrong_by(1e-2)
    with pytest.warns(RuntimeWarning, match="self-check"):
        loss_of("cacr")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_none(tmp_path: Path) -> None:
    loss_of("cacr")
    (file,) = tmp_path.glob("self-check-trial-*.json")
    file.write_text("{")
    self_check.forget()
    called.clear()
    loss_of("cacr")
    assert len(called) > 1


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CACR_CACHE_DIR", str(tmp_path / "file" / "in"))
    loss_of("cacr")
    assert_used("cacr")


def test_verified(trial: Backend) -> None:
    self_check.keep_verified(trial, torch.device("cpu"), [torch.float32])
    assert len(list(kept.cache_dir().iterdir())) == 2 * len(set(OPERATORS) - {"repulsion"})
    loss_of("cacr")
    assert called == ["cacr"]
