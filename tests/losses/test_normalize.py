"""``normalize=True``: the operators get raw rows, and nothing between the user's tensors and them is a unit vector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import cacr_kernels
from cacr_kernels import testing
from cacr_kernels.backends import table
from tests.agreement import LOSSES, ON_CPU, cast, randn, small_inputs

FIRST = {"cacr": "views", "queue": "queries", "momentum": "queries", "supervised": "embeddings"}
FUSED = [name for name in ON_CPU if "cacr" in table.named(name).operators]  # whose fused loss takes raw rows
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("cacr", {}),
    ("cacr", {"pairing": "pooled", "cost": "rbf"}),
    ("cacr", {"reduction": "none", "pairing": "ordered"}),
    ("queue", {}),
    ("queue", {"weight_grad": "full"}),
    ("momentum", {"temperature": 0.5}),
    ("momentum", {"temperature": 0.5, "cost": "sqeuclidean"}),
    ("supervised", {}),
]
each_case = pytest.mark.parametrize(("loss", "options"), OPTIONS, ids=str)
on_cpu = pytest.mark.parametrize("backend", ON_CPU)


def raw_inputs(loss: str, lengths: list[float]) -> dict[str, Tensor]:
    """Rows of these lengths, one after the other."""

    def stretched(x: Tensor) -> Tensor:
        rows = x[..., 0].numel()
        return x * torch.tensor(lengths, dtype=x.dtype).repeat(rows)[:rows].reshape(*x.shape[:-1], 1)

    return {name: stretched(t) if t.is_floating_point() else t for name, t in small_inputs(loss).items()}


def value_and_gradient(loss: str, tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """And what a unit step along the row's own length would change: the gradient times the length of the row."""
    x = tensors[FIRST[loss]].detach().requires_grad_()
    value = LOSSES[loss](**tensors | {FIRST[loss]: x}, normalize=True, **options).sum()
    (g,) = grad(value, x)
    return value.detach().double(), g.double() * torch.linalg.vector_norm(x.detach().double(), dim=-1, keepdim=True)


# ---- lengths ---------------------------------------------------------------------------------------------------------
LENGTHS = {
    "any": [1.0, 1e10, 1e-5, 3.0, 1e4, 1e-11, 0.0],
    "short": [1.0, 1e-17, 2e-13, 0.5, 1e-15],
    "long": [1e10, 1e9],
}


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
@each_case
def test_rows_of_any_length(loss: str, options: dict[str, Any], lengths: str, dtype: torch.dtype, backend: str) -> None:
    tensors = raw_inputs(loss, LENGTHS[lengths])
    if options.get("cost") == "sqeuclidean":  # longer ones have a weight that is not exp(0)
        tensors["keys"] = raw_inputs(loss, [1.0, 1e-30, 0.5, 0.0])["keys"]
    tensors = cast(tensors, dtype)
    value, gradient = value_and_gradient(loss, tensors, **options, backend=backend)
    true, exact = value_and_gradient(loss, cast(tensors, torch.float64), **options, backend="reference")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    assert abs(value - true) <= tolerance * max(1.0, abs(true))
    assert (gradient - exact).abs().max() <= tolerance * exact.abs().max()
    short = torch.linalg.vector_norm(tensors[FIRST[loss]], dim=-1) < 1e-12
    assert not gradient[short].any()
    assert gradient[~short].any(-1).all()


@on_cpu
@pytest.mark.parametrize(
    ("dtype", "lengths"), [(torch.float16, [1.0, 0.0, 60.0]), (torch.bfloat16, [1.0, 1e10, 1e-5, 0.0])], ids=str
)
@each_case
def test_half_types(loss: str, options: dict[str, Any], dtype: torch.dtype, lengths: list[float], backend: str) -> None:
    """The loss is that of the same numbers in float32; gradients are rounded once, at the end."""
    tensors = cast(raw_inputs(loss, lengths), dtype)
    value, gradient = value_and_gradient(loss, tensors, **options, backend=backend)
    true, exact = value_and_gradient(loss, cast(tensors, torch.float64), **options, backend="reference")
    assert abs(value - true) <= 1e-5 * max(1.0, abs(true))
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # float16 has no smaller gradients
    lost = smallest * torch.linalg.vector_norm(tensors[FIRST[loss]].double(), dim=-1, keepdim=True)
    assert ((gradient - exact).abs() <= torch.finfo(dtype).eps * exact.abs().max() + lost).all()


def test_a_kept_queue_keeps_short_keys() -> None:
    """They are normalised again when the queue is read: it is as if they had been handed in."""
    keys, queries, queue = randn(2, 5, 7), randn(2, 5, 7, seed=1), randn(2, 3, 7, seed=2)
    queue[0, 1], queue[1, 2], queue[1, 0] = 1e-17 * queue[0, 1], 0.0, 1e9 * queue[1, 0]
    loss_fn = cacr_kernels.CACRQueueLoss(queue_size=6, dim=7).double()
    loss_fn(randn(2, 3, 7, seed=3), queue)
    found = loss_fn(queries, keys)
    expected = cacr_kernels.cacr_queue_loss(queries, keys, queue.flatten(0, 1), normalize=True, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# ---- positives that are nearly equal ---------------------------------------------------------------------------------
def near(distance: float, dim: int) -> Tensor:
    """Two views in float32, of lengths 1 to 3, at this distance when they are unit vectors."""
    base, noise = torch.nn.functional.normalize(randn(11, dim), dim=-1), randn(11, dim, seed=1)
    noise = noise - (noise * base).sum(-1, keepdim=True) * base
    other = base + distance * torch.nn.functional.normalize(noise, dim=-1)
    lengths = 1 + 2 * torch.rand(2, 11, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return (torch.stack([base, other]) * lengths).float()


def attraction(z: Tensor, backend: str, reduction: Any) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    loss = cacr_kernels.cacr_loss(z, normalize=True, beta=0.0, reduction=reduction, backend=backend)
    return loss.detach().double(), grad(loss.sum(), z)[0].double()


@pytest.mark.parametrize(
    ("reduction", "backend"), [("none", b) for b in ON_CPU] + [("mean", b) for b in FUSED], ids=str
)
@pytest.mark.parametrize("dim", [32, 1024])
@pytest.mark.parametrize(
    ("distance", "tolerance"), [(1.0, 1e-6), (0.1, 1e-6), (1e-2, 1e-6), (1e-3, 1e-6), (1e-5, 1e-4)]
)
def test_near_positives(distance: float, tolerance: float, dim: int, backend: str, reduction: str) -> None:
    """Their rows are not rounded before the difference is taken."""
    z = near(distance, dim)
    value, gradient = attraction(z, backend, reduction)
    true, exact = attraction(z.double(), "reference", reduction)
    assert ((value - true).abs() <= tolerance * true).all()
    assert (gradient - exact).abs().max() <= 3 * tolerance * exact.abs().max()


# ---- derivatives -----------------------------------------------------------------------------------------------------
@on_cpu
@pytest.mark.parametrize(
    ("loss", "options"),
    [*OPTIONS[:3], ("queue", {"weight_grad": "full", "tau_pos": 0.0}), ("momentum", {}), ("supervised", {})],
    ids=str,
)
def test_gradcheck(loss: str, options: dict[str, Any], backend: str) -> None:
    """Of raw rows, and of the gradient; where no weights are constants to autograd only."""
    tensors = raw_inputs(loss, [1.0, 0.3, 2.0])
    if loss == "momentum":
        tensors["queries"] = tensors["queries"][:1]
    tensors = {n: t[..., :3] if t.is_floating_point() else t for n, t in tensors.items()}
    names = [n for n, t in tensors.items() if t.is_floating_point() and (loss == "supervised" or n == FIRST[loss])]

    def call(*leaves: Tensor) -> Tensor:
        value: Tensor = LOSSES[loss](
            **tensors | dict(zip(names, leaves, strict=True)), **options, normalize=True, backend=backend
        )
        return value

    leaves = [tensors[n].contiguous().requires_grad_() for n in names]
    assert gradcheck(call, leaves, fast_mode=True)
    assert gradgradcheck(call, leaves, fast_mode=True)


@on_cpu
@each_case
def test_second_derivatives_with_zero_rows(loss: str, options: dict[str, Any], backend: str) -> None:
    tensors = raw_inputs(loss, [1.0, 0.0, 2.0])
    found = {}
    for name in (backend, "reference"):
        x = tensors[FIRST[loss]].detach().requires_grad_()
        value = LOSSES[loss](**tensors | {FIRST[loss]: x}, normalize=True, **options, backend=name)
        (g,) = grad(value.sum(), x, create_graph=True)
        found[name] = grad(g.square().sum(), x)[0]
    assert found[backend].isfinite().all()
    torch.testing.assert_close(found[backend], found["reference"], rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")  # what torch itself says while it compiles
@each_case
def test_compiled(loss: str, options: dict[str, Any]) -> None:
    tensors = cast(raw_inputs(loss, [1.0, 0.3, 2.0]), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[loss], backend="aot_eager", fullgraph=True)
    found = []
    for function in (compiled, LOSSES[loss]):
        x = tensors[FIRST[loss]].detach().requires_grad_()
        value = function(**tensors | {FIRST[loss]: x}, normalize=True, **options)
        found.append((value.detach(), grad(value.sum(), x)[0]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


# ---- what it costs ---------------------------------------------------------------------------------------------------
def saved_by(loss: str, tensors: dict[str, Tensor], **options: Any) -> int:
    """How many bytes of rows [.., D] autograd keeps beyond the inputs; memory that several share counts once."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in tensors.values()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if x.shape[-1:] == tensors[FIRST[loss]].shape[-1:] and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        value = LOSSES[loss](**tensors, **options)
    assert value.requires_grad
    return sum(kept.values())


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_nothing_more_is_kept_for_the_backward(
    loss: str, options: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    tensors = cast(raw_inputs(loss, [1.0, 0.3, 2.0]), dtype)
    tensors[FIRST[loss]].requires_grad_()
    bytes_kept = [saved_by(loss, tensors, **options, backend=backend, normalize=flag) for flag in (True, False)]
    assert bytes_kept[0] <= bytes_kept[1]
    if loss == "cacr":
        fused = "cacr" in table.named(backend).operators and options.get("reduction", "mean") == "mean"
        array = fused or dtype != torch.float32  # the gradient where it is known, else half views in float32
        assert bytes_kept[0] == array * tensors["views"].numel() * 4


class Counted(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("cpu" not in ON_CPU, reason="needs the compiled extension")
def test_operations_of_a_step() -> None:
    """A small loss takes as long as its operations are many: 36 when autograd saw the normalisation."""
    views = [randn(32, 64, seed=seed).float().requires_grad_() for seed in range(2)]
    loss_fn = cacr_kernels.CACRLoss(backend="cpu")
    loss_fn(*views).backward()
    for z in views:
        z.grad = None
    with Counted() as counted:
        loss_fn(*views).backward()
    assert len(counted.names) <= 8, counted.names
    assert sum(name.startswith("cacr_kernels") for name in counted.names) == 1


def test_yardstick_knows_the_flag() -> None:
    """Half inputs with ``normalize`` meet the promise of all others."""
    options = {"tau_pos": 1.0, "tau_neg": 2.0, "normalize": True}
    case = testing.Case("cacr_loss", {"V": 2, "B": 11, "D": 7}, options, data="long")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert all(result.ok for result in testing.compare(case, "torch", dtype))


@pytest.mark.parametrize("loss", ["cacr_loss", "cacr_momentum_loss", "supervised_cacr_loss"])
@pytest.mark.parametrize("dtype", testing.HALF, ids=str)
def test_yardstick_of_rounded_coefficients(dtype: torch.dtype, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for backends that say so, only gradients, and no looser than the type asks for."""
    case = next(c for c in testing.cases() if c.loss == loss and c.options.get("normalize"))
    strict = testing.measure(case, testing.expect(case, dtype), "torch", dtype)
    table_of = table.named
    monkeypatch.setattr(testing, "named", lambda name: table_of(name)._replace(rounds_coefficients=testing.HALF))
    loose = testing.measure(case, testing.expect(case, dtype), "torch", dtype)
    assert all(result.ok for result in strict)
    for a, b in zip(strict, loose, strict=True):
        assert (a.quantity, a.error) == (b.quantity, b.error)
        if a.quantity.removeprefix("gradient of ") in testing.DIFFERENTIABLE:
            assert a.tolerance < b.tolerance < 20 * torch.finfo(dtype).eps
        else:
            assert a.tolerance == b.tolerance
