"""Every public loss with backend "cuda", its kernels in the emulation: the published numbers, all dtypes, any grid."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import cacr_kernels
from cacr_kernels import testing
from cacr_kernels.cases import Case, cases
from cacr_kernels.operators.registry import operator
from cacr_kernels.types import OTHER, SAME_NOT_SELF
from tests.agreement import assert_agree, assert_within_budget, cast, run, small_inputs
from tests.cuda.emulated_backend import emulated_cuda
from tests.cuda.emulated_cuda import Emulation
from tests.losses.test_reference_set import with_index
from tests.vectors_io import load_vectors, vector_id

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

TOLERANCE = 1e-10
FLOATS = ("float", "tf32x3")  # products of float32 that keep its accuracy


@pytest.fixture(autouse=True)
def emulation() -> Iterator[Emulation]:
    with emulated_cuda() as found:
        yield found


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=TOLERANCE)


def leaf(array: Tensor) -> Tensor:
    return array.clone().requires_grad_()


# ---- the published code ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reduction", ["mean", "none"])  # the fused loss, and a composition
@pytest.mark.parametrize("vector", load_vectors("views"), ids=vector_id)
def test_views(vector, reduction):
    m, a = vector.meta, vector.arrays
    z = leaf(a["views"])
    options = {k: m[k] for k in ("tau_pos", "tau_neg", "alpha", "beta")}
    parts = cacr_kernels.cacr_loss(z, **options, backend="cuda", reduction=reduction, return_parts=True)
    loss = parts.loss.mean()
    close(loss.detach(), a["attraction"] + a["repulsion"])
    close(parts.attraction, a["attraction"])
    close(torch.autograd.grad(loss, z)[0], a["grad_attraction"] + a["grad_repulsion"])


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"cost": "rbf"}], ids=str)
@pytest.mark.parametrize("vector", load_vectors("views"), ids=vector_id)
def test_entropies(vector, options):
    z, temperatures = vector.arrays["views"], {k: vector.meta[k] for k in ("tau_pos", "tau_neg")}
    found, expected = (
        cacr_kernels.cacr_loss(z, **temperatures, **options, backend=backend, return_parts=True)
        for backend in ("cuda", "reference")
    )
    close(found.attraction_entropy, expected.attraction_entropy)
    close(found.repulsion_entropy, expected.repulsion_entropy)


@pytest.mark.parametrize("vector", load_vectors("rbf"), ids=vector_id)
def test_rbf(vector):
    m, a = vector.meta, vector.arrays
    z = leaf(a["views"])
    options = {k: m[k] for k in ("tau_pos", "tau_neg", "beta", "rbf_scale")}
    parts = cacr_kernels.cacr_loss(z, **options, alpha=0, cost="rbf", backend="cuda", return_parts=True)
    close(parts.repulsion, a["repulsion"])
    close(torch.autograd.grad(parts.loss, z)[0], a["grad_repulsion"])


@pytest.mark.parametrize("vector", load_vectors("queue"), ids=vector_id)
def test_queue(vector):
    m, a = vector.meta, vector.arrays
    q = leaf(a["queries"])
    options = {k: m[k] for k in ("tau_pos", "tau_neg", "alpha", "beta")}
    parts = cacr_kernels.cacr_queue_loss(
        q,
        a["keys"],
        a["queue"],
        **options,
        in_batch=m["intra_batch"],
        normalize=True,
        backend="cuda",
        return_parts=True,
    )
    close(parts.repulsion, a["repulsion"])
    close(torch.autograd.grad(parts.loss, q)[0], a["grad_attraction"] + a["grad_repulsion"])


@pytest.mark.parametrize(("cost", "reduction"), [("rbf", "mean"), ("sqeuclidean", "sum")])
@pytest.mark.parametrize("vector", load_vectors("momentum"), ids=vector_id)
def test_momentum(vector, cost, reduction):
    m, a = vector.meta, vector.arrays
    q = leaf(a["queries"])
    options = {"temperature": m["T"], "key_offset": m["rank"] * m["B"], "cost": cost, "reduction": reduction}
    loss = cacr_kernels.cacr_momentum_loss(q, a["keys"], **options, normalize=True, backend="cuda")
    close(loss.detach(), a[f"loss_{cost}"])
    close(torch.autograd.grad(loss, q)[0], a[f"grad_{cost}"])


# ---- the promise on numbers ------------------------------------------------------------------------------------------
def small_cases() -> list[Case]:
    """Those of ``verify`` that take the emulation less than a second."""

    def work(case: Case) -> int:
        first, *others = (t for t in testing.make_inputs(case, 0).values() if t.dim() > 1)
        keys = max(t[..., 0].numel() for t in (first, *others))
        return first.numel() * keys

    return [case for case in cases() if work(case) < 60_000]


@pytest.mark.parametrize("precision", FLOATS)
@pytest.mark.parametrize("case", small_cases()[::3], ids=lambda case: case.name)
def test_float32(emulation, precision, case):
    emulation.float32 = precision
    assert_within_budget(case, "cuda", torch.float32, device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", small_cases()[1::3], ids=lambda case: case.name)
def test_dtypes(dtype, case):
    assert_within_budget(case, "cuda", dtype, device="cpu")


LONG = Case(
    "cacr_queue_loss",
    {"V": 2, "B": 8, "D": 32, "K": 2048},
    {"tau_pos": 1.0, "tau_neg": 2.0, "weight_grad": "full"},
    data="clustered",
)
DEEP = Case("cacr_loss", {"V": 2, "B": 16, "D": 512}, {"tau_pos": 1.0, "tau_neg": 2.0}, data="unit")


@pytest.mark.parametrize("nearest", [False, True], ids=["truncating", "nearest"])
@pytest.mark.parametrize("arithmetic", ["float", "tf32x3", "bf16", "f16"])
@pytest.mark.parametrize("case", [LONG, DEEP], ids=["keys", "features"])
def test_long_sums(emulation, case, arithmetic, nearest):
    """Over many keys and many features, whichever way the tensor cores round."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(arithmetic, torch.float32)
    emulation.nearest = nearest
    emulation.resident_blocks = 1  # no splits: one sum over all keys
    if dtype == torch.float32:
        emulation.float32 = arithmetic
    assert_within_budget(case, "cuda", dtype, device="cpu")


def test_sums_of_the_tensor_cores(emulation):
    """Truncated or not they are close, and not the same."""
    views, found = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(5)), []
    emulation.float32 = "tf32x3"
    for nearest in (False, True):
        emulation.nearest = nearest
        found.append(cacr_kernels.cacr_loss(views, backend="cuda", reduction="none"))
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)
    assert not found[0].equal(found[1])


def test_tf32_is_what_it_says(emulation):
    """Products of operands rounded to 11 bits: as wrong as that, and no more."""
    emulation.float32 = "tf32"
    tensors = cast(small_inputs("cacr"), torch.float32)
    exact = run("cacr", cast(tensors, torch.float64), "reference", reduction="none")
    found = run_emulated("cacr", tensors, reduction="none")
    assert_agree(found, exact, 2e-3)
    with pytest.raises(AssertionError):
        assert_agree(found, exact, 2e-6)


def run_emulated(loss: str, tensors: dict[str, Tensor], **options: object):
    """``agreement.run`` on the CPU."""
    from tests.agreement import LOSSES, Outcome

    leaves = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    floats = {n: t for n, t in leaves.items() if t.is_floating_point()}
    parts = LOSSES[loss](**leaves, **options, return_parts=True, backend="cuda")
    incoming = torch.rand(parts.loss.shape, generator=torch.Generator().manual_seed(1)).to(parts.loss) + 0.5
    found = torch.autograd.grad(parts.loss, list(floats.values()), incoming, allow_unused=True)
    detached = cacr_kernels.CACRParts(*(part.detach() for part in parts))
    return Outcome(detached, dict(zip(floats, found, strict=True)))


@pytest.mark.parametrize("resident_blocks", [0, 1, 5, 64])
@pytest.mark.parametrize("cost", ["sqeuclidean", "rbf"])
def test_any_grid(emulation, resident_blocks, cost):
    """Phases as launches of their own, persistent loops, keys of two tiles in splits: the same numbers."""
    emulation.resident_blocks = resident_blocks
    z = leaf(torch.randn(2, 70, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 3)
    taus = {name: leaf(torch.tensor(tau).double()) for name, tau in (("tau_pos", 1.5), ("tau_neg", 2.5))}
    losses = [cacr_kernels.cacr_loss(z, **taus, cost=cost, backend=name) for name in ("cuda", "reference")]
    close(losses[0].detach(), losses[1].detach())
    for found, expected in zip(*(torch.autograd.grad(loss, [z, *taus.values()]) for loss in losses), strict=True):
        close(found, expected)


def test_many_views():
    """More pairs than a launch takes: the loss is composed, and the pairs come in several launches."""
    z = leaf(torch.randn(13, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    losses = [cacr_kernels.cacr_loss(z, backend=name, pairing="ordered") for name in ("cuda", "reference")]
    close(losses[0].detach(), losses[1].detach())
    close(*(torch.autograd.grad(loss, z)[0] for loss in losses))


@pytest.mark.parametrize("ignore", [None, 1])
@pytest.mark.parametrize("refs", [False, True])
def test_queries_in_the_reference_set(refs, ignore):
    """Rows that are queries themselves, and rows in no set, in several tiles."""
    tensors = with_index(66, 70, 9, seed=1)
    tensors = tensors if refs else {name: tensors[name] for name in ("embeddings", "labels")}
    options = {"reduction": "none", "ignore_index": ignore, "tau_neg": 2.0}
    expected = run("supervised", tensors, "reference", **options)
    assert_agree(run_emulated("supervised", tensors, **options), expected, TOLERANCE)


# ---- registration ----------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.14 in opcheck
def test_opcheck() -> None:
    z = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    numbers = torch.tensor([0.7, 1.3, 0.9, 1.1, 2.0], dtype=torch.float64, requires_grad=True)
    floats = 0.0, 0.0, 0.0, 0.0
    torch.library.opcheck(operator("cacr_cuda"), (z, numbers, *floats, 0, True, 0.0, False, True, True))
    torch.library.opcheck(operator("cacr_cuda"), (z, None, 0.7, 1.3, 0.9, 1.1, 2, False, 2.0, False, True, False))
    ids, tau = torch.arange(5, dtype=torch.int32) % 3, torch.tensor([0.7, -1.3], dtype=torch.float64)
    given = z, None, ids, None, tau.requires_grad_(), [SAME_NOT_SELF, OTHER], [0], [1], False, False, None, False
    torch.library.opcheck(operator("contrast_cuda"), given)
    value, _, row_state = (t.detach() for t in operator("contrast_cuda")(*given))
    incoming = torch.ones_like(value).requires_grad_(), torch.full_like(value, 0.5).requires_grad_()
    backward = *given, value, row_state, *incoming, True, False, True
    torch.library.opcheck(operator("contrast_backward_cuda"), backward)
