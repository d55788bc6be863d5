"""Derivatives of every order through the public losses: the kernels by numbers, the rest against the reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, grad, gradcheck
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from cacr_kernels import cacr_loss, cacr_momentum_loss, cacr_queue_loss, supervised_cacr_loss
from cacr_kernels.backends import table
from tests.covering import covering

BACKENDS = ("cpu", "torch")
LABELS = torch.tensor([3, -1, 3, 7, -1, 3, 9])


def unit(*shape: int, seed: int = 0) -> Tensor:
    z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return normalize(z, dim=-1)


class Loss(NamedTuple):
    """A loss as a function of its differentiable tensors: embeddings, then temperatures (0-dim)."""

    name: str
    call: Callable[..., Tensor]
    embeddings: tuple[tuple[int, ...], ...]
    taus: int = 2

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        z = [unit(*shape, seed=i) for i, shape in enumerate(self.embeddings)]
        tau = [torch.tensor(t, dtype=torch.promote_types(dtype, torch.float32)) for t in (0.7, 1.3)][: self.taus]
        return [t.requires_grad_() for t in [*(x.to(dtype) for x in z), *tau]]


def views_loss(**options: Any) -> Loss:
    def call(views: Tensor, tau_pos: Tensor, tau_neg: Tensor, backend: str) -> Tensor:
        return cacr_loss(views, tau_pos=tau_pos, tau_neg=tau_neg, backend=backend, **options)

    return Loss(f"cacr_loss {options}", call, ((3, 5, 2),))


def constant(*shape: int, like: Tensor) -> Tensor:
    return unit(*shape, seed=7).to(torch.promote_types(like.dtype, torch.float32))


def queue_loss(size: int = 4, **options: Any) -> Loss:
    def call(q: Tensor, tau_pos: Tensor, tau_neg: Tensor, backend: str) -> Tensor:
        keys, queue = constant(2, 5, 3, like=q), constant(size, 3, like=q)
        return cacr_queue_loss(q, keys, queue, tau_pos=tau_pos, tau_neg=tau_neg, backend=backend, **options)

    return Loss(f"queue K={size} {options}", call, ((2, 5, 3),))


def momentum_loss(**options: Any) -> Loss:
    def call(q: Tensor, temperature: Tensor, backend: str) -> Tensor:
        keys = constant(9, 3, like=q)
        return cacr_momentum_loss(
            q, keys, temperature=temperature, key_offset=2, normalize=True, backend=backend, **options
        )

    return Loss(f"momentum {options}", call, ((2, 5, 3),), taus=1)


def supervised_loss(ref: bool, **options: Any) -> Loss:
    def call(z: Tensor, *rest: Tensor, backend: str) -> Tensor:
        *keys, tau_pos, tau_neg = rest
        given = {"ref_embeddings": keys[0], "ref_labels": torch.tensor([3, 7, 3, 2])} if ref else {}
        return supervised_cacr_loss(z, LABELS, tau_pos=tau_pos, tau_neg=tau_neg, backend=backend, **given, **options)

    return Loss(f"supervised ref={ref} {options}", call, ((7, 3), (4, 3))[: 1 + ref])


PLAIN = views_loss()
CACR = [
    *(views_loss(pairing=p, cost=c) for p in ("unordered", "ordered", "pooled") for c in ("sqeuclidean", "rbf")),
    views_loss(normalize=True, alpha=0.4, beta=2.0),
    views_loss(cost="rbf", rbf_scale=0.0),
]
COMPOSED = [
    *(queue_loss(weight_grad=w, in_batch=i) for w in ("in_batch", "full", "none") for i in (True, False)),
    queue_loss(0),
    *(momentum_loss(cost=c) for c in ("rbf", "sqeuclidean")),
    *(supervised_loss(ref) for ref in (False, True)),
]
ROWS = [views_loss(reduction="none"), queue_loss(reduction="none"), supervised_loss(False, reduction="none")]
# Where weights are detached, numerical differences are no derivatives: those are compared with the reference alone.
DETACHED = ("queue", "momentum")


def named(losses: list[Loss]) -> Any:
    return pytest.mark.parametrize("loss", losses, ids=lambda loss: loss.name)


both_backends = pytest.mark.parametrize("backend", BACKENDS)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-11) -> None:
    for a, e in zip(actual, expected, strict=True):
        scale = max(1e-3, e.abs().max().item())
        assert (a - e).abs().max().item() <= tolerance * scale


def derivatives(of: Callable[..., Tensor], loss: Loss, backend: str) -> tuple[Tensor, ...]:
    inputs = loss.inputs()
    return grad(of(loss, inputs, backend), inputs, allow_unused=True, materialize_grads=True)


# ---- first order -----------------------------------------------------------------------------------------------------
@both_backends
@named([loss for loss in [*CACR, *COMPOSED, *ROWS] if not loss.name.startswith(DETACHED)])
def test_gradcheck(loss: Loss, backend: str) -> None:
    assert gradcheck(lambda *x: loss.call(*x, backend=backend), loss.inputs())


def test_gradcheck_of_momentum_without_its_weights() -> None:
    """With one view p = 1: nothing of the rbf form is detached."""
    keys = unit(9, 3, seed=7)

    def call(q: Tensor, t: Tensor) -> Tensor:
        return cacr_momentum_loss(q, keys, temperature=t, key_offset=2, normalize=True, backend="cpu")

    assert gradcheck(call, [unit(1, 5, 3).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)])


@both_backends
@named([*CACR, *COMPOSED, *ROWS])
def test_first_order_against_reference(loss: Loss, backend: str) -> None:
    def value(loss: Loss, inputs: list[Tensor], backend: str) -> Tensor:
        return loss.call(*inputs, backend=backend).sin().sum()

    assert_same(derivatives(value, loss, backend), derivatives(value, loss, "reference"))


# ---- higher orders ---------------------------------------------------------------------------------------------------
def gradients(of: Tensor, inputs: list[Tensor]) -> Tensor:
    found = grad(of, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
    return sum((g.square().sum() for g in found), start=of.new_zeros(()))


def squared(loss: Loss, inputs: list[Tensor], backend: str) -> Tensor:
    return loss.call(*inputs, backend=backend).square().sum()


def penalty(loss: Loss, inputs: list[Tensor], backend: str) -> Tensor:
    total = loss.call(*inputs, backend=backend).sum() + (inputs[0] ** 3).sum() + inputs[-1] ** 3
    return gradients(total, inputs)


def penalty_of_squared(loss: Loss, inputs: list[Tensor], backend: str) -> Tensor:
    return gradients(squared(loss, inputs, backend), inputs)


def third(loss: Loss, inputs: list[Tensor], backend: str) -> Tensor:
    return gradients(gradients(loss.call(*inputs, backend=backend).sum(), inputs), inputs)


@covering(
    {
        "loss": {loss.name: loss for loss in [*CACR, *ROWS[:1]]},
        "of": {f.__name__: f for f in (squared, penalty, penalty_of_squared, third)},
        "backend": BACKENDS,
    },
    2,
)
def test_higher_orders(loss: Loss, of: Callable[..., Tensor], backend: str) -> None:
    assert_same(derivatives(of, loss, backend), derivatives(of, loss, "reference"))


@both_backends
@pytest.mark.parametrize("of", [penalty, penalty_of_squared], ids=lambda f: f.__name__)
@named(COMPOSED)
def test_second_order_of_composed_losses(loss: Loss, of: Callable[..., Tensor], backend: str) -> None:
    assert_same(derivatives(of, loss, backend), derivatives(of, loss, "reference"))


@both_backends
def test_loss_and_penalty_of_one_graph(backend: str) -> None:
    """The loss and its penalty, both backward at once: the loss is used twice, at first and at second order."""

    def run(backend: str) -> tuple[Tensor, ...]:
        inputs = PLAIN.inputs()
        loss = PLAIN.call(*inputs, backend=backend)
        return grad(loss.exp() + loss * gradients(loss, inputs), inputs)

    assert_same(run(backend), run("reference"))


@both_backends
def test_hessian_vector_product(backend: str) -> None:
    vector = unit(3, 5, 2, seed=5)

    def product(backend: str) -> Tensor:
        views, *tau = PLAIN.inputs()
        (g,) = grad(PLAIN.call(views, *tau, backend=backend), views, create_graph=True)
        return grad(g, views, vector)[0]

    assert product("reference").abs().max() > 1e-3
    assert_same((product(backend),), (product("reference"),))


# ---- which inputs need gradient --------------------------------------------------------------------------------------
@both_backends
@named([PLAIN, views_loss(cost="rbf"), views_loss(pairing="pooled"), COMPOSED[-2], COMPOSED[-1]])
def test_any_subset_of_inputs(loss: Loss, backend: str) -> None:
    everything = loss.inputs()
    full = grad(loss.call(*everything, backend=backend), everything)
    for i in range(len(everything)):
        inputs = [t.detach().requires_grad_(j == i) for j, t in enumerate(everything)]
        value = loss.call(*inputs, backend=backend)
        assert_same((grad(value, inputs[i])[0],), (full[i],))
        value = loss.call(*inputs, backend=backend)
        second = grad(gradients(value.square(), inputs[i : i + 1]), inputs[i])
        inputs = [t.detach().requires_grad_(j == i) for j, t in enumerate(everything)]
        value = loss.call(*inputs, backend="reference")
        assert_same(second, grad(gradients(value.square(), inputs[i : i + 1]), inputs[i]))


@both_backends
def test_one_tensor_of_a_list(backend: str) -> None:
    whole = unit(2, 5, 3).requires_grad_()
    (expected,) = grad(cacr_loss(whole, backend=backend), whole)
    first, second = whole[0].detach(), whole[1].detach().requires_grad_()
    loss = cacr_loss([first, second], backend=backend)
    assert_same(grad(loss, second), (expected[1],))


@both_backends
def test_one_tensor_twice_in_a_list(backend: str) -> None:
    z, other = unit(5, 3).requires_grad_(), unit(5, 3, seed=1)
    found = grad(cacr_loss([z, other, z], backend=backend), z)
    assert_same(found, grad(cacr_loss([z, other, z], backend="reference"), z))


@both_backends
def test_no_grad(backend: str) -> None:
    inputs = PLAIN.inputs()
    with torch.no_grad():
        loss = PLAIN.call(*inputs, backend=backend)
    assert not loss.requires_grad
    assert not PLAIN.call(*[t.detach() for t in inputs], backend=backend).requires_grad
    with torch.inference_mode():
        assert_same((PLAIN.call(*inputs, backend=backend),), (loss,))
    assert_same((PLAIN.call(*inputs, backend=backend).detach(),), (loss,))


@both_backends
def test_gradient_asked_for_later(backend: str) -> None:
    """Inputs that start to require a gradient in place between two calls."""
    views = unit(2, 5, 3)
    first = cacr_loss(views, backend=backend)
    views.requires_grad_()
    second = cacr_loss(views, backend=backend)
    assert not first.requires_grad
    assert_same(grad(second, views), grad(cacr_loss(views, backend="reference"), views))


# ---- incoming gradients ----------------------------------------------------------------------------------------------
@both_backends
@named([PLAIN, views_loss(cost="rbf"), *COMPOSED])
def test_backward_twice(loss: Loss, backend: str) -> None:
    """The stored gradients are scaled out of place, and the incoming gradient is only read."""
    inputs = loss.inputs()
    value, incoming = loss.call(*inputs, backend=backend), torch.tensor(3.0, dtype=torch.float64)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    once = grad(value, inputs, incoming, **options)
    again = [g.clone() for g in grad(value, inputs, incoming, **options)]
    assert incoming.item() == 3.0
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    for g in once:
        g.mul_(5)  # what the caller does with a gradient must not reach the next one
    assert all(torch.equal(a, b) for a, b in zip(again, grad(value, inputs, incoming, **options), strict=True))
    single = grad(value, inputs, **options)
    assert_same(tuple(again), tuple(3 * g for g in single))


@both_backends
@pytest.mark.parametrize("factor", [1.0, -3.0])
def test_a_gradient_belongs_to_who_asked_for_it(factor: float, backend: str) -> None:
    """Changing one in place changes no other one of the same graph, whether kept by autograd or by the leaf."""
    leaf = unit(2, 5, 3).requires_grad_()
    tau = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    loss = factor * cacr_loss(1.0 * leaf, tau_neg=tau, backend=backend)
    expected = [g.clone() for g in grad(loss, (leaf, tau), retain_graph=True)]
    for _ in range(3):
        found = grad(loss, (leaf, tau), retain_graph=True)
        for g, e in zip(found, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=0, atol=0)
            g.fill_(9.0)
    loss.backward()
    assert torch.equal(leaf.grad, expected[0])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def products_in_backward(loss: Tensor, **options: Any) -> int:
    """How many products autograd makes for ``loss.backward()``."""
    with torch.profiler.profile() as profile:
        loss.backward(**options)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::mul")


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11, for profilers of one cycle
def test_the_last_backward_hands_its_gradient_out() -> None:
    """Without a copy where nothing scales it, as often as it is asked for where the graph is kept."""
    leaf = unit(2, 5, 3).requires_grad_()
    (expected,) = grad(cacr_loss(leaf, backend="torch"), leaf)
    loss = cacr_loss(leaf, backend="cpu")
    for _ in range(2):
        assert products_in_backward(loss, retain_graph=True) == 1
        torch.testing.assert_close(leaf.grad, expected)
        leaf.grad.fill_(9.0)
        leaf.grad = None
    assert products_in_backward(loss) == 0
    torch.testing.assert_close(leaf.grad, expected)
    assert products_in_backward(cacr_loss(leaf, backend="cpu")) == 0  # added to what is there
    torch.testing.assert_close(leaf.grad, 2 * expected)
    leaf.grad = None
    assert products_in_backward(cacr_loss(leaf, backend="cpu"), gradient=torch.tensor(2.0, dtype=torch.float64)) == 1
    torch.testing.assert_close(leaf.grad, 2 * expected)


@both_backends
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_batch_of_incoming_gradients(backend: str) -> None:
    leaf = unit(2, 5, 3).requires_grad_()
    incoming = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    (found,) = grad(cacr_loss(leaf, backend=backend), leaf, incoming, is_grads_batched=True)
    (single,) = grad(cacr_loss(leaf, backend=backend), leaf)
    assert_same(tuple(found), tuple(g * single for g in incoming))


def test_checkpointed() -> None:
    leaves = [unit(2, 5, 3).requires_grad_() for _ in range(2)]
    checkpoint(lambda z: cacr_loss(2 * z, backend="cpu"), leaves[0], use_reentrant=False).backward()
    cacr_loss(2 * leaves[1], backend="cpu").backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=0, atol=0)


@both_backends
def test_backward_accumulates(backend: str) -> None:
    inputs = PLAIN.inputs()
    value = PLAIN.call(*inputs, backend=backend)
    expected = grad(value, inputs, retain_graph=True)
    for _ in range(2):
        value.backward(retain_graph=True)
    assert_same(tuple(t.grad for t in inputs), tuple(2 * g for g in expected))


def upcast(inputs: list[Tensor]) -> list[Tensor]:
    return [t.detach().float().requires_grad_() for t in inputs]


def gradients_in(inputs: list[Tensor], value: Tensor, incoming: Tensor) -> tuple[Tensor, ...]:
    return grad(value, inputs, incoming, allow_unused=True, materialize_grads=True)


def bound_of(exact: Tensor, dtype: torch.dtype, backend: str) -> float:
    """Of two float32 computations, one of which may round what multiplies half types."""
    share = torch.finfo(dtype).eps if dtype in table.named(backend).rounds_coefficients else 1e-6
    return share * exact.abs().max().item()


halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@both_backends
@halves
@named([PLAIN, views_loss(cost="rbf"), COMPOSED[0], COMPOSED[7], COMPOSED[8], COMPOSED[-1]])
def test_gradscaler_loses_nothing(loss: Loss, dtype: torch.dtype, backend: str) -> None:
    """Gradients stay float32 until they are scaled: in float16 these would lose bits if they were cast before."""
    scale, small = 65536.0, 2.0**-20
    half = loss.inputs(dtype)
    value = loss.call(*half, backend=backend)
    assert value.dtype == torch.float32
    found = gradients_in(half, value * small, torch.tensor(scale))
    single = upcast(half)
    exact = gradients_in(single, loss.call(*single, backend=backend), torch.tensor(1.0))
    for mine, true, t in zip(found, exact, half, strict=True):
        assert mine.dtype == t.dtype
        scaled = true * (scale * small)
        bound = bound_of(scaled, dtype, backend)
        torch.testing.assert_close(mine, scaled.to(t.dtype), rtol=torch.finfo(t.dtype).eps, atol=bound)
        if t.dtype == torch.float16:
            cast_first = (true * small).to(dtype).float() * scale
            assert (cast_first - scaled).abs().max() > 1e-3 * scaled.abs().max()  # the test can tell


@both_backends
@halves
@named([PLAIN, views_loss(cost="rbf"), COMPOSED[0], COMPOSED[7], COMPOSED[8], COMPOSED[-1]])
def test_half_temperature_is_upcast_first(loss: Loss, dtype: torch.dtype, backend: str) -> None:
    """No arithmetic such as tau + rbf_scale or 1 / T happens in half precision."""
    half = [t.detach().to(dtype).requires_grad_() for t in loss.inputs()]
    single = upcast(half)
    mine, true = loss.call(*half, backend=backend), loss.call(*single, backend=backend)
    torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-6)
    one = torch.tensor(1.0)
    for g, exact in zip(gradients_in(half, mine, one), gradients_in(single, true, one), strict=True):
        bound = bound_of(exact, dtype, backend)
        torch.testing.assert_close(g, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=bound)


@both_backends
def test_gradients_have_their_inputs_dtypes(backend: str) -> None:
    views = [unit(5, 3, seed=i).to(d).requires_grad_() for i, d in enumerate((torch.float16, torch.float32))]
    tau = torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)
    loss = cacr_loss(views, tau_pos=tau, tau_neg=tau, backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32
    assert [t.grad.dtype for t in (*views, tau)] == [torch.float16, torch.float32, torch.bfloat16]


# ---- torch.func ------------------------------------------------------------------------------------------------------
@both_backends
@named([PLAIN, views_loss(cost="rbf"), *COMPOSED])
def test_func_grad(loss: Loss, backend: str) -> None:
    inputs = [t.detach() for t in loss.inputs()]
    every = tuple(range(len(inputs)))

    def first(backend: str) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda *x: loss.call(*x, backend=backend), every)(*inputs)

    def nested(backend: str) -> tuple[Tensor, ...]:
        def norm(*x: Tensor) -> Tensor:
            found = torch.func.grad(lambda *y: loss.call(*y, backend=backend).square(), every)(*x)
            return sum((g.square().sum() for g in found), start=x[0].new_zeros(()))

        return torch.func.grad(norm, every)(*inputs)

    assert_same(first(backend), first("reference"))
    assert_same(nested(backend), nested("reference"))


@both_backends
@named([PLAIN, *ROWS, *COMPOSED])
def test_vmap_is_refused(loss: Loss, backend: str) -> None:
    """Whatever is batched, and inside another transform: what to do instead stands in the error."""
    inputs = [t.detach() for t in loss.inputs()]
    batched = [torch.stack([t, 2 * t]) for t in inputs]

    def call(*x: Tensor) -> Tensor:
        return loss.call(*x, backend=backend).sum()

    words = f"backend='{backend}' cannot run inside torch.func.vmap: .* in a loop .* backend='reference'"
    for of in (call, torch.func.grad(call)):
        with pytest.raises(ValueError, match=words):
            torch.func.vmap(of, randomness="same")(*batched)
        with pytest.raises(ValueError, match=words):
            torch.func.vmap(of, in_dims=(0, *[None] * (len(inputs) - 1)), randomness="same")(batched[0], *inputs[1:])
    with pytest.raises(ValueError, match=words):
        torch.func.grad(lambda *x: torch.func.vmap(call, randomness="same")(*x).sum())(*batched)
    assert call(*inputs).isfinite()  # nothing of it lasts


@named([PLAIN, *ROWS, *COMPOSED])
def test_vmap_of_the_reference(loss: Loss) -> None:
    """What the refusal recommends: values and gradients of each problem by itself."""
    inputs = [t.detach() for t in loss.inputs()]
    batched = [torch.stack([t, 2 * t, 0.5 * t]) for t in inputs]

    def call(*x: Tensor) -> Tensor:
        return loss.call(*x, backend="reference").sum()

    for of in (call, torch.func.grad(call, tuple(range(len(inputs))))):
        found = torch.func.vmap(of, randomness="same")(*batched)
        single = [of(*(t[i] for t in batched)) for i in range(3)]
        expected = torch.stack(single) if of is call else tuple(map(torch.stack, zip(*single, strict=True)))
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own rules use it
@both_backends
@named([PLAIN, *ROWS, *COMPOSED])
def test_forward_mode_is_refused(loss: Loss, backend: str) -> None:
    """With a tangent of any one input the loss is refused with what to do instead, or has the right derivative."""
    inputs = [t.detach() for t in loss.inputs()]
    tangents = [torch.ones_like(t) for t in inputs]
    words = r"no forward-mode derivatives \(torch.func.jvp.*torch.func.grad.* backend='reference'"

    def derivative(i: int, backend: str) -> Tensor:
        def of(x: Tensor) -> Tensor:
            return loss.call(*inputs[:i], x, *inputs[i + 1 :], backend=backend).sum()

        return torch.func.jvp(of, (inputs[i],), (tangents[i],))[1]

    refused = 0
    for i in range(len(inputs)):
        try:
            torch.testing.assert_close(derivative(i, backend), derivative(i, "reference"))
        except ValueError as error:
            assert re.search(words, str(error))  # noqa: PT017
            refused += 1
    assert refused
    with pytest.raises(ValueError, match=words), forward_ad.dual_level():
        loss.call(*map(forward_ad.make_dual, inputs, tangents), backend=backend)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@both_backends
@named([PLAIN, *ROWS, *COMPOSED])
def test_forward_mode_of_a_gradient(loss: Loss, backend: str) -> None:
    """A gradient is linear in what flows in: its derivative is right or refused, and never without a tangent."""

    def derivative(backend: str) -> tuple[Tensor, ...]:
        inputs = loss.inputs()
        value = loss.call(*inputs, backend=backend)
        tangent = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view_as(value)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        return torch.func.jvp(lambda v: grad(value, inputs, v, **options), (torch.ones_like(value),), (tangent,))[1]

    try:
        found = derivative(backend)
    except ValueError as error:
        assert "no forward-mode derivatives" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(found, derivative("reference"))


@both_backends
def test_jacobians_are_refused(backend: str) -> None:
    inputs = [t.detach() for t in PLAIN.inputs()]
    with pytest.raises(ValueError, match=r"inside torch.func.vmap: .*jacfwd.* backend='reference'"):
        torch.func.jacfwd(lambda x: PLAIN.call(x, *inputs[1:], backend=backend))(inputs[0])
    with pytest.raises(ValueError, match=r"inside torch.func.vmap: .*jacrev.* backend='reference'"):
        torch.func.jacrev(lambda x: PLAIN.call(x, *inputs[1:], backend=backend))(inputs[0])
