"""The supervised loss with queries in its reference set (``ref_index``) and with embeddings to ignore."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cacr_kernels
from cacr_kernels import SupervisedCACRLoss, losses, supervised_cacr_loss
from tests.agreement import (
    BACKENDS,
    ON_CPU,
    assert_within,
    cast,
    compare,
    each_backend,
    randn,
    run,
    small_inputs,
    there,
)

TAUS = {"tau_pos": 0.8, "tau_neg": 1.7}
EVERY = ["reference", *BACKENDS]
every_backend = pytest.mark.parametrize("backend", EVERY)


def labels_of(size: int, seed: int, low: int = 0) -> Tensor:
    return torch.randint(low, 4, (size,), generator=torch.Generator().manual_seed(seed))


def with_index(n: int, m: int, d: int, seed: int, low: int = 0) -> dict[str, Tensor]:
    """A reference set that holds some of the queries, wherever they are."""
    index = torch.randint(-1, m, (n,), generator=torch.Generator().manual_seed(seed + 7))
    own = {"embeddings": randn(n, d, seed=seed), "labels": labels_of(n, seed, low)}
    refs = {"ref_embeddings": randn(m, d, seed=seed + 1), "ref_labels": labels_of(m, seed + 1, low)}
    return own | refs | {"ref_index": index}


# ---- ref_index -------------------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.sampled_from([1, 3, 16, 33, 130]),
    st.sampled_from([None, 0, 1, -1]),
    st.sampled_from(["mean", "sum", "none"]),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_all_backends_agree(n: int, m: int, d: int, ignore: int | None, reduction: str, normalize: bool, seed: int):
    tensors = with_index(n, m, d, seed, low=-1)
    options: dict[str, Any] = {"ignore_index": ignore, "reduction": reduction, "normalize": normalize, **TAUS}
    compare("supervised", tensors, **options)
    compare("supervised", {name: tensors[name] for name in ("embeddings", "labels")}, **options)
    compare("supervised", {name: t for name, t in tensors.items() if name != "ref_index"}, **options)


@every_backend
@pytest.mark.parametrize("n", [7, 201])
def test_the_batch_as_its_own_reference_set(backend: str, n: int) -> None:
    """What a gathered batch is: with ``ref_index`` the loss is that without a reference set, the gradient of both."""
    own = {"embeddings": randn(n, 5), "labels": labels_of(n, 0)}
    refs = {"ref_embeddings": own["embeddings"], "ref_labels": own["labels"]}
    expected = run("supervised", own, backend, **TAUS)
    found = run("supervised", own | refs | {"ref_index": torch.arange(n)}, backend, **TAUS)
    both = found.gradients["embeddings"] + found.gradients["ref_embeddings"]
    for x, y in zip((*found.parts, both), (*expected.parts, expected.gradients["embeddings"]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)
    without = run("supervised", own | refs, backend, **TAUS)
    assert (without.parts.loss - expected.parts.loss).abs() > 1e-3


@each_backend
def test_half_types(backend: str) -> None:
    """As they are, and promoted where the two are unlike."""
    tensors = with_index(9, 13, 6, seed=3)
    for first, second in itertools.product((torch.float16, torch.float32, torch.bfloat16), repeat=2):
        given = cast(tensors, first) | {"ref_embeddings": tensors["ref_embeddings"].to(second)}
        expected = run("supervised", cast(given, torch.float64), "reference", ignore_index=2, **TAUS)
        found = run("supervised", given, backend, ignore_index=2, **TAUS)
        assert_within(found.parts.loss, expected.parts.loss, 1e-5)
        for name, gradient in found.gradients.items():
            assert gradient is not None
            assert gradient.dtype == given[name].dtype
            exact = expected.gradients[name]
            assert exact is not None
            tolerance = 1e-5 if gradient.dtype == torch.float32 else 1e-2
            assert_within(gradient, exact, tolerance, exact.abs().max().item())


@every_backend
def test_any_integer_dtype_and_stride(backend: str) -> None:
    tensors = with_index(9, 13, 6, seed=3)
    expected = run("supervised", tensors, backend).parts.loss
    for dtype in (torch.int8, torch.int16, torch.int32):
        assert (
            run("supervised", tensors | {"ref_index": tensors["ref_index"].to(dtype)}, backend).parts.loss == expected
        )
    index = tensors["ref_index"].clamp(min=0)
    expected = run("supervised", tensors | {"ref_index": index}, backend).parts.loss
    for same in (index.to(torch.uint8), index.to(torch.uint64), torch.stack([index, index], 1)[:, 0]):
        assert run("supervised", tensors | {"ref_index": same}, backend).parts.loss == expected


@every_backend
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_in_no_set_is_not_read(backend: str, normalize: bool) -> None:
    """A key that is every query itself, and a query whose only key it is: not even times zero."""
    tensors = with_index(3, 4, 5, seed=1)
    tensors["ref_index"][:] = 2
    tensors["ref_embeddings"][2] = math.nan
    alone = {name: t[:1] for name, t in tensors.items()} | {"ref_index": torch.tensor([0])}
    alone["ref_embeddings"], alone["embeddings"] = (torch.full((1, 5), math.nan) for _ in range(2))
    left = {"embeddings": torch.full((3, 5), math.nan), "labels": torch.tensor([1, 0, 1])}
    for case, ignore in ((tensors, None), (left, 1), (alone, None)):
        found = run("supervised", case, backend, normalize=normalize, ignore_index=ignore)
        assert all(part.isfinite() for part in found.parts)
        assert all(g is not None and g.isfinite().all() for g in found.gradients.values())
    assert all(part == 0 for part in found.parts)


@every_backend
def test_a_bad_embedding_in_a_set_shows(backend: str) -> None:
    """``ref_index`` takes it out of one query's sets, not out of the others'."""
    tensors = with_index(3, 4, 5, seed=1)
    tensors["ref_index"] = torch.tensor([2, -1, -1])
    tensors["ref_embeddings"][2] = math.nan
    rows = LOSS(**there(tensors, backend), reduction="none", backend=backend)
    assert rows.isfinite().cpu().tolist() == [True, False, False]


LOSS: Any = supervised_cacr_loss


# ---- ignore_index ----------------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", ["alone", "reference set", "both"])
def test_ignored_are_as_if_left_out(backend: str, normalize: bool, reduction: str, case: str) -> None:
    tensors = with_index(9, 11, 5, seed=4)
    if case == "alone":
        tensors = {name: tensors[name] for name in ("embeddings", "labels")}
    if case == "reference set":
        del tensors["ref_index"]
    kept = tensors["labels"] != 1
    left = {name: t[kept] for name, t in tensors.items() if not name.startswith("ref_") or name == "ref_index"}
    full, keep = dict(tensors), {"embeddings": kept}
    full["embeddings"] = torch.where(kept[:, None], tensors["embeddings"], math.nan)
    if case != "alone":
        keep["ref_embeddings"] = in_refs = tensors["ref_labels"] != 1
        left |= {name: tensors[name][in_refs] for name in ("ref_embeddings", "ref_labels")}
        full["ref_embeddings"] = torch.where(in_refs[:, None], tensors["ref_embeddings"], math.inf)
    if case == "both":
        moved = torch.where(in_refs, in_refs.cumsum(0) - 1, -1)
        left["ref_index"] = torch.where(left["ref_index"] < 0, -1, moved[left["ref_index"]])
    assert not kept.all()
    incoming = {"reduction": reduction, "normalize": normalize}
    expected, found = (call(given, backend, **incoming, **TAUS) for given in (left, full | {"ignore_index": 1}))
    rows = found[0]
    if reduction == "none":
        assert (rows[~kept] == 0).all()
        rows = rows[kept]
    torch.testing.assert_close(rows, expected[0], rtol=1e-9, atol=1e-10)
    for name, g in found[1].items():
        torch.testing.assert_close(g[keep[name]], expected[1][name], rtol=1e-9, atol=1e-10)
        assert not g[~keep[name]].any()


def call(given: dict[str, Any], backend: str, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradient of its sum."""
    tensors = there({name: x for name, x in given.items() if isinstance(x, Tensor)}, backend)
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if t.is_floating_point()}
    value = LOSS(**given | tensors, **options, backend=backend)
    grads = torch.autograd.grad(value.sum(), list(leaves.values()))
    return value.detach().cpu(), {name: g.cpu() for name, g in zip(leaves, grads, strict=True)}


@every_backend
def test_the_mean_of_the_others_is_the_loss(backend: str) -> None:
    tensors = there(with_index(9, 11, 5, seed=4), backend)
    options = {"ignore_index": 1, "backend": backend}
    rows = LOSS(**tensors, reduction="none", **options)
    parts = LOSS(**tensors, reduction="sum", return_parts=True, **options)
    mean = LOSS(**tensors, **options)
    kept = tensors["labels"] != 1
    torch.testing.assert_close(rows[kept].mean(), mean)
    torch.testing.assert_close(rows.sum(), parts.loss)
    torch.testing.assert_close(parts.attraction + parts.repulsion, mean)


@every_backend
@pytest.mark.parametrize("refs", [False, True])
def test_nothing_is_left(backend: str, refs: bool) -> None:
    tensors = with_index(4, 3, 5, seed=0) | {"labels": torch.ones(4, dtype=torch.int64)}
    tensors = tensors if refs else {name: tensors[name] for name in ("embeddings", "labels")}
    for reduction in ("mean", "sum", "none"):
        found = run("supervised", tensors, backend, ignore_index=1, reduction=reduction)
        assert not any(part.any() for part in found.parts)
        assert not any(g is None or g.any() for g in found.gradients.values())


@every_backend
@pytest.mark.parametrize(
    ("dtype", "ignore", "is_last"),
    [
        (torch.uint8, 255, True),
        (torch.uint8, -1, False),
        (torch.int8, -1, True),
        (torch.int64, -(2**63), False),
        (torch.int64, 2**70, False),
        (torch.uint64, 2**64 - 1, True),
        (torch.uint64, -1, False),
        (torch.int32, np.int64(-1), True),
    ],
)
def test_labels_of_any_integer_dtype(backend: str, dtype: torch.dtype, ignore: Any, is_last: bool) -> None:
    """What no label can be ignores none."""
    z, y = there({"z": randn(6, 4), "y": torch.tensor([0, 1, 0, 1, 1, 0])}, backend).values()
    last = torch.tensor([-1], device=y.device).view(torch.uint64).to(dtype) if dtype == torch.uint64 else None
    last = torch.tensor([-1], device=y.device).to(dtype) if last is None else last
    labels = torch.cat([y[:5].to(dtype), last])
    kept = slice(0, 5 if is_last else 6)
    found = LOSS(z, labels, ignore_index=ignore, reduction="sum", backend=backend)
    torch.testing.assert_close(found, LOSS(z[kept], labels[kept], reduction="sum", backend=backend))


# ---- contexts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
def test_second_derivative_and_transforms(backend: str) -> None:
    tensors = with_index(5, 6, 3, seed=2)
    constants = {name: t for name, t in tensors.items() if "embeddings" not in name}

    def loss(z: Tensor, refs: Tensor, backend: str = backend) -> Tensor:
        options: dict[str, Any] = {"ignore_index": 1, "backend": backend, **TAUS}
        return LOSS(embeddings=z, ref_embeddings=refs, **constants, **options)

    found, expected = [], []
    for into, name in ((found, backend), (expected, "reference")):
        leaves = [tensors[name].clone().requires_grad_() for name in ("embeddings", "ref_embeddings")]
        first = torch.autograd.grad(loss(*leaves, backend=name), leaves, create_graph=True)
        into += torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    found += torch.func.grad(loss, argnums=(0, 1))(tensors["embeddings"], tensors["ref_embeddings"])
    expected += first
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
def test_compiled(backend: str) -> None:
    torch._dynamo.reset()
    tensors = with_index(5, 6, 3, seed=2)
    leaves = [tensors[name].requires_grad_() for name in ("embeddings", "ref_embeddings")]
    module = SupervisedCACRLoss(ignore_index=1, backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found, expected = (f(**tensors) for f in (compiled, module))
    torch.testing.assert_close(found, expected)
    for x, y in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_module() -> None:
    tensors = with_index(5, 6, 3, seed=2)
    module = SupervisedCACRLoss(ignore_index=np.int64(1), tau_neg=2.0)
    expected = supervised_cacr_loss(**tensors, ignore_index=1, tau_neg=2.0, normalize=True)
    assert module(**tensors) == expected
    assert module(*tensors.values()) == expected
    assert "ignore_index=1" in repr(module)
    with pytest.raises(TypeError, match="ignore_index must be an integer or None, got str '1'"):
        SupervisedCACRLoss(ignore_index="1")  # type: ignore[arg-type]


def test_nothing_is_given_up_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kinds of sets, the copies and the arrays are those of a call that knows neither."""
    seen: list[Any] = []

    def recorded(on: Any, q: Tensor, k: Tensor | None, tau: Tensor, spec: Any) -> tuple[Tensor, Tensor]:
        seen.append((spec.kinds, spec.q_self is None, q.data_ptr()))
        return torch.zeros(2, 1, q.shape[1]), torch.zeros(2, 1, q.shape[1])

    monkeypatch.setattr(losses, "contrast", recorded)
    tensors = small_inputs("supervised")
    supervised_cacr_loss(**tensors, backend="torch")
    supervised_cacr_loss(tensors["embeddings"], tensors["labels"], backend="torch")
    address = tensors["embeddings"].data_ptr()
    assert seen == [([1, 2], True, address), ([3, 2], True, address)]


# ---- refusals --------------------------------------------------------------------------------------------------------
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a list": ({"ref_index": [0] * 7}, TypeError, "ref_index must be an integer tensor, got list"),
    "floats": ({"ref_index": torch.zeros(7)}, TypeError, "ref_index must have an integer dtype, got torch.float32"),
    "shape": ({"ref_index": torch.zeros(6).long()}, ValueError, r"ref_index must have shape \[7\], .* got \[6\]"),
    "device": ({"ref_index": torch.zeros(7).long().to("meta")}, ValueError, "ref_index must be on the device of"),
    "too large": ({"ref_index": torch.arange(7) + 3}, ValueError, r"ref_index must be in \[-1, 8\], got 9"),
    "too small": ({"ref_index": torch.arange(7) - 2}, ValueError, r"ref_index must be in \[-1, 8\], got -2"),
    "uint64": (
        {"ref_index": torch.full((7,), 2**63, dtype=torch.uint64)}, ValueError, r"ref_index must be in \[-1, 8\]"
    ),
    "a float to ignore": ({"ignore_index": 1.0}, TypeError, "ignore_index must be an integer or None, got float 1.0"),
    "a flag to ignore": ({"ignore_index": True}, TypeError, "ignore_index must be an integer or None, got bool True"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    change, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        supervised_cacr_loss(**small_inputs("supervised") | change)


def test_refused_without_a_reference_set() -> None:
    z, y = randn(3, 4), torch.zeros(3).long()
    with pytest.raises(ValueError, match=r"ref_index must be given together with ref_embeddings, got a torch.int64"):
        cacr_kernels.supervised_cacr_loss(z, y, ref_index=y)


def test_rows_that_are_none_are_nobodys() -> None:
    """Where the values of ``ref_index`` are not looked at, one that is out of range stands for no row."""
    labels = torch.tensor([0, 1])
    for index in ([5, -9], [0, 2], [-1, -1]):
        read = losses.rows_in_sets(labels, labels, torch.tensor(index), None, everywhere=True)
        assert all(rows.all() for rows in read)
    labels, index = (t.to("meta") for t in (labels, torch.tensor(index)))
    assert [rows.shape for rows in losses.rows_in_sets(labels, labels, index, 1, everywhere=True)] == [(2,), (2,)]
