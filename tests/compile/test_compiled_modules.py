"""All four modules under ``torch.compile`` and ``torch.export`` on every backend: values, gradients, graphs, hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from cacr_kernels import CACRLoss, CACRMomentumLoss, CACRQueueLoss, SupervisedCACRLoss
from tests.agreement import BACKENDS, device_of, randn
from tests.covering import covering

# What torch itself says while it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
D = 4


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tau(value: float = 0.7) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


MODULES: dict[str, Callable[..., nn.Module]] = {
    "cacr": lambda **o: CACRLoss(tau_pos=tau(), tau_neg=tau(1.3), **o),
    "queue": lambda **o: CACRQueueLoss(tau_pos=tau(), tau_neg=tau(1.3), weight_grad="full", **o),
    "momentum": lambda **o: CACRMomentumLoss(temperature=tau(), **o),
    "supervised": lambda **o: SupervisedCACRLoss(tau_pos=tau(), tau_neg=tau(1.3), **o),
    "reference set": lambda **o: SupervisedCACRLoss(tau_pos=tau(), tau_neg=tau(1.3), **o),
}
each_module = pytest.mark.parametrize("name", MODULES)
each_module_and_backend = covering({"name": list(MODULES), "backend": BACKENDS})
fastest = pytest.mark.parametrize("backend", BACKENDS[-1:])  # where what is tested stands above the backends


def make(name: str, backend: str, **options: Any) -> nn.Module:
    """On the device of the backend."""
    return MODULES[name](backend=backend, **options).to(device_of(backend))


def arguments(name: str, backend: str, batch: int = 6, seed: int = 0) -> tuple[Tensor, ...]:
    """Positional arguments of the forward, on the device of the backend; no two sizes are equal."""
    return tuple(t.to(device_of(backend)) for t in host_arguments(name, batch, seed))


def host_arguments(name: str, batch: int, seed: int) -> tuple[Tensor, ...]:
    if name == "cacr":
        return randn(batch, D, seed=seed), randn(batch, D, seed=seed + 1)
    if name == "queue":
        return randn(2, batch, D, seed=seed), randn(2, batch, D, seed=seed + 1), randn(2 * batch + 1, D, seed=seed + 2)
    if name == "momentum":
        return randn(2, batch, D, seed=seed), randn(batch, D, seed=seed + 1)
    own = randn(batch, D, seed=seed), (torch.arange(batch) + seed) % 3
    return own if name == "supervised" else (*own, randn(batch + 3, D, seed=seed), torch.arange(batch + 3) % 4)


def learning(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.clone().requires_grad_() if t.is_floating_point() else t for t in tensors]


def with_gradients(call: Callable[..., Tensor], module: nn.Module, tensors: list[Tensor]) -> list[Tensor | None]:
    """Value and gradients of the inputs and parameters; ``None`` where nothing flows."""
    module.zero_grad()
    value = call(*tensors)
    value.sum().backward()
    return [
        value.detach(),
        *(t.grad for t in tensors),
        *(p.grad.clone() for p in module.parameters() if p.grad is not None),
    ]


def assert_same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@each_module_and_backend
def test_one_graph_for_all_values(name: str, backend: str) -> None:
    """Forward and backward without a break; other numbers, temperatures and labels do not compile it again."""
    module = make(name, backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            found = with_gradients(compiled, module, learning(arguments(name, backend, seed=seed)))
        assert_same(found, with_gradients(module, module, learning(arguments(name, backend, seed=seed))))
        assert any(p.grad for p in module.parameters())
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.1)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert counters["aot_autograd"]["ok"] == counters["aot_autograd"]["total"] == 1


@pytest.mark.exhaustive
@each_module_and_backend
def test_batch_size_marked_dynamic(name: str, backend: str) -> None:
    """``mark_dynamic`` refuses a size that the code makes a constant; one graph serves all sizes."""
    module = make(name, backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (6, 9, 17):
        tensors = learning(arguments(name, backend, batch))
        for t in tensors:
            torch._dynamo.mark_dynamic(t, t.dim() - 2 if t.is_floating_point() else 0)
        with torch._dynamo.config.patch(error_on_recompile=batch > 6):
            found = with_gradients(compiled, module, tensors)
        assert_same(found, with_gradients(module, module, learning(arguments(name, backend, batch))))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.exhaustive
@fastest
@covering({"name": list(MODULES), "options": [{"reduction": "none"}, {"reduction": "sum"}, {"return_parts": True}]})
def test_reductions_and_parts(name: str, options: dict[str, Any], backend: str) -> None:
    module = make(name, backend, **options)

    def loss(*tensors: Tensor) -> Tensor:
        found = module(*tensors)
        return sum(found[1:], start=found.loss.sin()) if options == {"return_parts": True} else found.sin()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = with_gradients(compiled, module, learning(arguments(name, backend)))
    assert_same(found, with_gradients(loss, module, learning(arguments(name, backend))))


@pytest.mark.exhaustive
@fastest
@each_module
def test_frozen_inputs(name: str, backend: str) -> None:
    """Each differentiable input learns alone; the others, and the temperatures, are frozen."""
    module = make(name, backend).requires_grad_(False)
    tensors = arguments(name, backend)
    for at in (i for i, t in enumerate(tensors) if t.is_floating_point()):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        mine, expected = ([*tensors] for _ in range(2))
        mine[at], expected[at] = (tensors[at].clone().requires_grad_() for _ in range(2))
        value, truth = compiled(*mine), module(*expected)
        assert value.requires_grad == truth.requires_grad
        torch.testing.assert_close(value, truth)
        if truth.requires_grad:
            value.backward()
            truth.backward()
            torch.testing.assert_close(mine[at].grad, expected[at].grad)
    module.requires_grad_()
    found = with_gradients(torch.compile(module, fullgraph=True, backend="aot_eager"), module, [*tensors])
    assert_same(found, with_gradients(module, module, [*tensors]))
    assert any(p.grad for p in module.parameters())


@pytest.mark.exhaustive
@fastest
@each_module
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_hooks(name: str, compiled: bool, backend: str) -> None:
    """Of the module, forward and backward, and of an input."""
    module = make(name, backend)
    tensors = learning(arguments(name, backend))
    plain = with_gradients(module, module, learning(arguments(name, backend)))
    seen: dict[str, Any] = {}
    module.register_forward_pre_hook(lambda _, args: seen.update(inputs=len(args)))
    module.register_forward_hook(lambda _, args, out: 2 * out)
    if not compiled:
        module.register_full_backward_hook(lambda _, inner, outer: seen.update(inner=inner, outer=outer))
    tensors[0].register_hook(lambda grad: 3 * grad)
    call = torch.compile(module, backend="aot_eager") if compiled else module
    found = with_gradients(call, module, tensors)
    assert seen["inputs"] == len(tensors)
    torch.testing.assert_close(found[0], 2 * plain[0])
    torch.testing.assert_close(found[1], 6 * plain[1])
    if not compiled:
        assert seen["outer"][0] == 1
        torch.testing.assert_close(seen["inner"][0], 2 * plain[1])


@pytest.mark.exhaustive
@fastest
@each_module
def test_autocast_inside(name: str, backend: str) -> None:
    """bfloat16 features of a layer; the loss is float32, and the gradient that of eager mode."""
    module, layer = make(name, backend), nn.Linear(D, D, device=device_of(backend))

    def step(*tensors: Tensor) -> Tensor:
        with torch.autocast(device_of(backend), dtype=torch.bfloat16):
            return module(layer(tensors[0]), *tensors[1:])

    tensors = [t.float() if t.is_floating_point() else t for t in arguments(name, backend)]
    gradients = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        value = call(*tensors)
        assert value.dtype == torch.float32
        value.backward()
        gradients.append(layer.weight.grad)
    torch.testing.assert_close(*gradients, rtol=0.02, atol=1e-3)  # products and sums of bfloat16 in another order
    assert gradients[0].abs().max() > 1e-2


@pytest.mark.exhaustive
@fastest
@each_module
def test_temperatures_of_one_element(name: str, backend: str) -> None:
    """Shape [1], as ``fully_shard`` needs: gradients of that shape, and no other graph for other values."""
    module = make(name, backend)
    for key, parameter in list(module.named_parameters()):
        setattr(module, key, nn.Parameter(parameter.detach().reshape(1)))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            found = with_gradients(compiled, module, learning(arguments(name, backend, seed=seed)))
        assert_same(found, with_gradients(module, module, learning(arguments(name, backend, seed=seed))))
        assert found[-1].shape == (1,)
        with torch.no_grad():
            next(module.parameters()).mul_(1.1)


# ---- a queue of its own ----------------------------------------------------------------------------------------------
def keyed(count: int, batch: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(randn(2, batch, D, seed=2 * i), randn(2, batch, D, seed=2 * i + 1)) for i in range(count)]


@covering({"size": [5, 24, 1000], "backend": BACKENDS})
def test_module_that_keeps_its_queue(size: int, backend: str) -> None:
    """One graph for any number of keys, in training too; the queue is that of eager mode."""
    counter = CompileCounterWithBackend("aot_eager")
    module = CACRQueueLoss(queue_size=size, dim=D, backend=backend).double().to(device_of(backend))
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for i, (q, k) in enumerate(keyed(8)):
        q, k = q.to(device_of(backend)), k.to(device_of(backend))
        mine, expected = q.clone().requires_grad_(), q.clone().requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            value = compiled(mine, k)
        truth = eager(expected, k)
        torch.testing.assert_close(value, truth)
        value.backward()
        truth.backward()
        torch.testing.assert_close(mine.grad, expected.grad)
    assert counter.frame_count == 1
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)


def test_func_grad_of_a_module_that_stores() -> None:
    """Inside the transform, too, the keys enter the queue; one graph."""
    module = CACRQueueLoss(queue_size=8, dim=D).double()
    eager = copy.deepcopy(module)
    compiled = torch.compile(torch.func.grad(module), fullgraph=True, backend="aot_eager")
    for i, (q, k) in enumerate(keyed(4)):
        expected = q.clone().requires_grad_()
        eager(expected, k).backward()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.testing.assert_close(compiled(q, k), expected.grad)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)


@pytest.mark.exhaustive
def test_checkpoint_around_a_compiled_module() -> None:
    """Compiled code asks at run time whether it is computed again in a backward."""
    module = CACRQueueLoss(queue_size=8, dim=D).double()
    eager, compiled = copy.deepcopy(module), torch.compile(module, fullgraph=True, backend="aot_eager")
    for q, k in keyed(4):
        mine, expected = q.clone().requires_grad_(), q.clone().requires_grad_()
        checkpoint(compiled, mine, k, use_reentrant=False).backward()
        eager(expected, k).backward()
        torch.testing.assert_close(mine.grad, expected.grad)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)


@pytest.mark.exhaustive
def test_backwards_after_later_compiled_forwards() -> None:
    module = CACRQueueLoss(queue_size=8, dim=D).double()
    eager, compiled = copy.deepcopy(module), torch.compile(module, backend="aot_eager")
    queries = [[q.clone().requires_grad_() for q, _ in keyed(4)] for _ in range(2)]
    for call, leaves in zip((compiled, eager), queries, strict=True):
        torch.stack([call(q, k) for q, (_, k) in zip(leaves, keyed(4), strict=True)]).sum().backward()
    for mine, expected in zip(*queries, strict=True):
        torch.testing.assert_close(mine.grad, expected.grad)


def test_queue_that_is_only_read_is_one_graph() -> None:
    module = CACRQueueLoss(queue_size=8, dim=D).double()
    for q, k in keyed(2):
        module(q, k)
    q, k = keyed(3)[-1]
    module.eval()
    expected = module(q, k)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(q, k), expected)
    for strict in (True, False):
        program = torch.export.export(module, (q, k), strict=strict)
        torch.testing.assert_close(program.module()(q, k), expected)
    module.train()
    with pytest.raises(ValueError, match=r"CACRQueueLoss that keeps its queue can only be exported in eval\(\)"):
        torch.export.export(module, (q, k), strict=False)


# ---- export ----------------------------------------------------------------------------------------------------------
def sizes(name: str) -> tuple[Any, ...]:
    batch, more = Dim("batch", min=2, max=4096), Dim("more", min=2, max=4096)
    return {
        "cacr": (({0: batch}, {0: batch}),),  # of *views
        "queue": ({1: batch}, {1: batch}, {0: more}),
        "momentum": ({1: batch}, {0: batch}),
        "supervised": ({0: batch}, {0: batch}),
        "reference set": ({0: batch}, {0: batch}, {0: more}, {0: more}),
    }[name]


@pytest.mark.exhaustive
@covering({"name": list(MODULES), "strict": {"strict": True, "not strict": False}, "backend": BACKENDS})
def test_export(name: str, strict: bool, backend: str) -> None:
    """Any batch size; the program holds the operators of the backend."""
    module = make(name, backend)
    program = torch.export.export(module, arguments(name, backend), dynamic_shapes=sizes(name), strict=strict)
    assert any("cacr_kernels" in str(node.target) and backend in str(node.target) for node in program.graph.nodes)
    for batch in (6, 11):
        others = arguments(name, backend, batch, seed=3)
        torch.testing.assert_close(program.module()(*others), module(*others))
