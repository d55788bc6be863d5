"""What holds on every rank of any group of processes; each function runs on all of them at once."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import cacr_kernels
from cacr_kernels import CACRLoss, CACRMomentumLoss, CACRQueueLoss, SupervisedCACRLoss

CHECKS: dict[str, Callable[[], None]] = {}
SLOW: dict[str, Callable[[], None]] = {}  # for two ranks are enough
V, B, D = 2, 4, 3


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def rank() -> int:
    return dist.get_rank()


def world() -> int:
    return dist.get_world_size()


def whole(*shape: int, seed: int = 0) -> Tensor:
    """[.., W B, D] in float64, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape[:-2], world() * shape[-2], shape[-1], dtype=torch.float64, generator=generator)


def own(x: Tensor, dim: int = -2) -> Tensor:
    """The part of this rank."""
    each = x.shape[dim] // world()
    return x.narrow(dim, rank() * each, each)


def mean_of_ranks(x: Tensor) -> Tensor:
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def full(x: Tensor | None) -> Tensor:
    """All of a tensor, of which a rank may hold a part."""
    assert x is not None
    return x.full_tensor() if isinstance(x, DTensor) else x


# ---- the losses ------------------------------------------------------------------------------------------------------
@check
def parts_are_those_of_the_queries() -> None:
    views = whole(V, B, D)
    for cost in ("sqeuclidean", "rbf"):
        parts = cacr_kernels.cacr_loss(own(views), cost=cost, return_parts=True, gather_distributed=True)
        expected = cacr_kernels.cacr_loss(views, cost=cost, return_parts=True)
        for mine, all_of_them in zip(parts, expected, strict=True):
            close(mean_of_ranks(mine), all_of_them)
        close(parts.loss, parts.attraction + parts.repulsion)
        if cost == "rbf":
            close(parts.loss, expected.loss)


@check
def half_types_travel_as_they_are() -> None:
    """Gradients of one process, rounded once: a sum in the half type would be far off."""
    for dtype in (torch.bfloat16, torch.float16):
        for normalize in (False, True):
            views = whole(V, B, D).to(dtype).requires_grad_()
            expected = cacr_kernels.cacr_loss(views, normalize=normalize, backend="reference") * 24
            expected.backward()
            mine = own(views.detach()).clone().requires_grad_()
            loss = cacr_kernels.cacr_loss(mine, normalize=normalize, gather_distributed=True, backend="reference") * 24
            loss.backward()
            assert views.grad is not None
            assert mine.grad is not None
            assert mine.grad.dtype == dtype
            close(mean_of_ranks(loss), expected.detach(), 1e-5)
            scaled = views.grad.float() * world()
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(
                mine.grad.float(), own(scaled), rtol=eps, atol=eps * scaled.abs().max().item() / 8
            )


@check
def derivatives_of_the_gradient() -> None:
    """A penalty on the gradient, added to the loss."""
    for cost in ("sqeuclidean", "rbf"):
        views = whole(V, B, D).requires_grad_()
        loss = cacr_kernels.cacr_loss(views, cost=cost)
        (gradient,) = torch.autograd.grad(loss, views, create_graph=True)
        penalty = (gradient * whole(V, B, D, seed=1)).sum()
        penalty.backward()
        mine = own(views.detach()).clone().requires_grad_()
        loss = cacr_kernels.cacr_loss(mine, cost=cost, gather_distributed=True)
        (gradient,) = torch.autograd.grad(loss, mine, create_graph=True)
        (gradient * own(whole(V, B, D, seed=1))).sum().backward()
        assert views.grad is not None
        close(mine.grad, own(views.grad) * world())


@check
def torch_func() -> None:
    views = whole(V, B, D)
    expected = torch.func.grad(cacr_kernels.cacr_loss)(views)
    found = torch.func.grad(lambda z: cacr_kernels.cacr_loss(z, gather_distributed=True))(own(views))
    close(found, own(expected) * world())


@check
def without_gradient() -> None:
    views = whole(V, B, D)
    with torch.no_grad():
        loss = cacr_kernels.cacr_loss(own(views), gather_distributed=True)
    close(mean_of_ranks(loss), cacr_kernels.cacr_loss(views))


@check
def labels_of_one_rank() -> None:
    """No other rank has a positive; with one class there is no negative at all."""
    for labels in (torch.arange(world() * B).clamp(max=3 * B // 2), torch.zeros(world() * B, dtype=torch.int64)):
        z, tau = whole(B, D).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        expected = cacr_kernels.supervised_cacr_loss(z, labels, tau_neg=tau)
        expected.backward()
        mine, mine_tau = own(z.detach()).clone().requires_grad_(), tau.detach().clone().requires_grad_()
        options: Any = {"tau_neg": mine_tau, "gather_distributed": True}
        loss = cacr_kernels.supervised_cacr_loss(mine, own(labels[:, None])[:, 0], **options)
        loss.backward()
        assert z.grad is not None
        assert tau.grad is not None
        close(mean_of_ranks(loss), expected.detach())
        close(mine.grad, own(z.grad) * world())
        close(mine_tau.grad, tau.grad)


@check
def a_group_of_some_ranks() -> None:
    """Ranks 0 and 1 share a batch, the others have one each."""
    ranks = [[r for r in range(world()) if (r < 2) == first] for first in (True, False)]
    groups = [dist.new_group(some) for some in ranks if some]
    group = groups[0 if rank() < 2 else 1]
    size = dist.get_world_size(group)
    views = whole(V, B, D)
    first = 0 if rank() < 2 else 2
    shared = views[:, first * B : (first + size) * B]
    mine = own(views).clone().requires_grad_()
    loss = cacr_kernels.cacr_loss(mine, gather_distributed=True, process_group=group)
    loss.backward()
    shared = shared.clone().requires_grad_()
    cacr_kernels.cacr_loss(shared).backward()
    assert shared.grad is not None
    close(mine.grad, shared.grad[:, (rank() - first) * B :][:, :B] * size)


def slow_check(function: Callable[[], None]) -> Callable[[], None]:
    SLOW[function.__name__] = function
    return function


@check
def a_module_with_its_group_can_be_copied() -> None:
    """As for an average of the weights."""
    loss = CACRQueueLoss(queue_size=5, dim=D, gather_distributed=True, process_group=dist.group.WORLD).double()
    keys = own(whole(V, B, D))
    loss(keys, keys)
    copied = copy.deepcopy(loss)
    assert copied.process_group is loss.process_group
    assert copied.queue is not loss.queue
    close(copied(keys, keys), loss(keys, keys).detach())


@slow_check
def compiled_modules() -> None:
    """With a group of their own, and with a queue that is kept."""
    modules = (
        Model("cacr", gather_distributed=True, process_group=dist.group.WORLD),
        Model("queue", gather_distributed=True),
    )
    for eager in modules:
        graph = copy.deepcopy(eager)
        compiled = torch.compile(graph, backend="aot_eager", fullgraph=True)
        for seed in range(3):
            x = own(whole(V, B, 6, seed=seed))
            losses = eager(x), compiled(x)
            close(losses[1], losses[0])
            for loss in losses:
                loss.backward()
        for mine, one in zip(graph.parameters(), eager.parameters(), strict=True):
            assert one.grad is not None
            close(mine.grad, one.grad)
        for mine, one in zip(graph.buffers(), eager.buffers(), strict=True):
            close(mine.double(), one.double())
        torch._dynamo.reset()


@slow_check
def compiled() -> None:
    """One graph, value and gradients of the eager call."""
    labels = torch.arange(world() * B) % 3
    calls: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda z, tau: cacr_kernels.cacr_loss(z, tau_neg=tau, gather_distributed=True),
        lambda z, tau: cacr_kernels.cacr_loss(z, tau_neg=tau, cost="rbf", gather_distributed=True),
        lambda z, tau: cacr_kernels.supervised_cacr_loss(
            z[0], own(labels[:, None])[:, 0], tau_neg=tau, gather_distributed=True
        ),
        lambda z, tau: cacr_kernels.cacr_queue_loss(z, z.flip(0), z[0, :2], tau_neg=tau, gather_distributed=True),
        lambda z, tau: cacr_kernels.cacr_momentum_loss(z, z[0], temperature=tau, gather_distributed=True),
    ]
    for loss in calls:
        found = []
        for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
            z = own(whole(V, B, D)).clone().requires_grad_()
            tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
            value = function(z, tau)
            value.backward()
            found.append((value.detach(), z.grad, tau.grad))
        for eager, graph in zip(*found, strict=True):
            close(graph, eager)
        torch._dynamo.reset()


# ---- what is sent and called -----------------------------------------------------------------------------------------
SENT = {"all_gather_into_tensor": "gather", "reduce_scatter_tensor": "reduce-scatter", "all_reduce": "all-reduce"}
OF_SIZES = ("gather", "int64", 3)


class Recorder(TorchDispatchMode):
    """Collectives, waits, softmaxes of PyTorch, operators of the package, in order; and the largest tensor of all."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, int]] = []  # name, dtype and dimensions of the first argument
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("_c10d_functional", "cacr_kernels") or func._opname == "_softmax":
            self.seen.append((func._opname, str(args[0].dtype).removeprefix("torch."), args[0].dim()))
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out

    def sent(self) -> list[tuple[str, str, int]]:
        """The collectives, without the comparison of sizes, which comes first."""
        found = [(SENT[name], *rest) for name, *rest in self.seen if name in SENT]
        return found[1:] if found[:1] == [OF_SIZES] else found


def recorded(call: Callable[[], Tensor]) -> tuple[Recorder, Recorder]:
    """What a call does and what its backward does."""
    with Recorder() as forward:
        loss = call()
    with Recorder() as backward:
        loss.backward()
    return forward, backward


@check
def collectives_of_a_call() -> None:
    """One gather of embeddings in their own type, at most one of labels and one all-reduce; one reduce-scatter back."""
    if world() == 1:
        return
    tau = torch.tensor(0.7, requires_grad=True)
    options: Any = {"tau_neg": tau, "gather_distributed": True}
    labels = torch.arange(B) % 3
    queue_loss = CACRQueueLoss(queue_size=7, dim=D, enqueue="last", **options)
    queue_alone = CACRQueueLoss(queue_size=7, dim=D, in_batch=False, **options)

    def z() -> Tensor:
        return own(whole(V, B, D)).bfloat16().requires_grad_()

    def supervised(**more: Any) -> Tensor:
        return cacr_kernels.supervised_cacr_loss(z()[0], labels, **more, **options)

    bank: dict[str, Any] = {"ref_embeddings": z()[1], "ref_labels": labels, "ref_index": labels}
    of_views, of_rows = ("gather", "bfloat16", 4), ("gather", "bfloat16", 3)
    of_labels, counts = ("gather", "int64", 2), ("all-reduce", "int64", 1)
    back, rows_back, of_tau = (
        ("reduce-scatter", "float32", 4),
        ("reduce-scatter", "float32", 3),
        ("all-reduce", "float64", 1),
    )
    of_all = [of_rows, of_labels, counts]
    expected: list[tuple[Callable[[], Tensor], list[Any], list[Any]]] = [
        (lambda: cacr_kernels.cacr_loss(z(), **options), [of_views], [back, of_tau]),
        (lambda: cacr_kernels.cacr_loss(z(), reduction="sum", **options), [of_views], [back, of_tau]),
        (lambda: cacr_kernels.cacr_queue_loss(z(), z(), z()[0], **options), [of_views], [back, of_tau]),
        (lambda: cacr_kernels.cacr_queue_loss(z(), z(), z()[0], in_batch=False, **options), [], [of_tau]),
        (lambda: queue_loss(z(), z()), [of_views], [back, of_tau]),  # the keys that it stores go with the queries
        (lambda: queue_alone(z(), z()), [of_views], [of_tau]),  # here they go alone
        (
            lambda: cacr_kernels.cacr_momentum_loss(z(), z()[0], temperature=tau, gather_distributed=True),
            [of_rows],
            [of_tau],
        ),
        (supervised, of_all, [rows_back, of_tau]),
        (lambda: supervised(ignore_index=0, reduction="sum"), of_all, [rows_back, of_tau]),
        (lambda: supervised(ignore_index=0, reduction="sum", **bank), of_all, [rows_back, of_tau]),
        (  # the log of the mean over all ranks: a few numbers more in each direction
            lambda: cacr_kernels.cacr_loss(z(), cost="rbf", **options),
            [of_views, ("gather", "float64", 2)],
            [("reduce-scatter", "float64", 2), back, of_tau],
        ),
    ]
    for i, (call, forth, back_again) in enumerate(expected):
        forward, backward = recorded(call)
        assert forward.sent() == forth, (i, forward.sent())
        assert backward.sent() == back_again, (i, backward.sent())


@check
def the_gather_runs_beside_the_attraction() -> None:
    """What needs this rank's rows alone is computed between sending and waiting; then one call has all gradients."""
    if world() == 1:
        return
    for backend in ("torch", "cpu"):
        for pairing in ("unordered", "pooled"):
            z = own(whole(V, B, D)).clone().requires_grad_()
            call = functools.partial(cacr_kernels.cacr_loss, z, gather_distributed=True, normalize=True)
            forward, backward = recorded(functools.partial(call, pairing=pairing, backend=backend))
            names = [name for name, *_ in forward.seen]
            attraction = ["aligned_cpu", "_softmax"] if backend == "cpu" else ["_softmax"]
            assert names[2:] == ["all_gather_into_tensor", *attraction, "wait_tensor", f"repulsion_{backend}"], names
            assert not [name for name, *_ in backward.seen if name.startswith("contrast")]


@check
def no_array_of_queries_and_keys() -> None:
    B = 70
    for pairing in ("ordered", "pooled"):
        z = own(whole(V, B, D)).clone().requires_grad_()
        call = functools.partial(cacr_kernels.cacr_loss, z, pairing=pairing, gather_distributed=True, backend="cpu")
        for found in recorded(call):
            assert 0 < found.largest <= V * world() * B * D < B * B * world()


# ---- what is refused -------------------------------------------------------------------------------------------------
@check
def sizes_that_differ() -> None:
    """Every rank says the same, and is at work afterwards."""
    if world() == 1:
        return
    last = rank() == world() - 1
    z = torch.zeros(V, B, D)
    calls: dict[str, Callable[[], Any]] = {
        "views": lambda: cacr_kernels.cacr_loss(z[:, : B - last], gather_distributed=True),
        "queries": lambda: cacr_kernels.cacr_queue_loss(
            z[..., : D - last], z[..., : D - last], z[0][:, : D - last], gather_distributed=True
        ),
        "keys": lambda: cacr_kernels.cacr_momentum_loss(
            z[:, :2], z[0, : B - last], gather_distributed=True
        ),
        "embeddings": lambda: cacr_kernels.supervised_cacr_loss(
            z[0, : B - last], torch.zeros(B - last, dtype=torch.int64), gather_distributed=True
        ),
        "ref_embeddings": lambda: cacr_kernels.supervised_cacr_loss(
            z[0], torch.zeros(B, dtype=torch.int64), gather_distributed=True,
            **({} if last else {"ref_embeddings": z[0], "ref_labels": torch.zeros(B, dtype=torch.int64)}),
        ),
    }  # fmt: skip
    for name, call in calls.items():
        with pytest.raises(
            ValueError, match=rf"^{name} must have one shape and dtype on all ranks.*rank {world() - 1}"
        ):
            call()
    with pytest.raises(ValueError, match=r"torch.float32 on rank 0 and \[2, 4, 3\] torch.bfloat16 on rank"):
        cacr_kernels.cacr_loss(z.bfloat16() if last else z, gather_distributed=True)
    close(mean_of_ranks(torch.ones(())), torch.ones(()))


@check
def arguments_that_are_no_group() -> None:
    z = torch.zeros(V, B, D)
    with pytest.raises(TypeError, match="gather_distributed must be True or False, got int 1"):
        cacr_kernels.cacr_loss(z, gather_distributed=1)
    with pytest.raises(ValueError, match="process_group needs gather_distributed=True"):
        cacr_kernels.cacr_loss(torch.randn(V, B, D), process_group=dist.group.WORLD)
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed.ProcessGroup or None, got str"):
        CACRLoss(gather_distributed=True, process_group="gloo")
    if world() > 1:
        others = dist.new_group([0])
        if rank():
            with pytest.raises(ValueError, match="process_group must be one that this process belongs to"):
                cacr_kernels.cacr_loss(z, gather_distributed=True, process_group=others)


# ---- training --------------------------------------------------------------------------------------------------------
class Model(nn.Module):
    """An encoder and a loss with temperatures that are learned with it."""

    def __init__(self, loss: str, **options: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.encoder = nn.Linear(6, D, dtype=torch.float64)
        with torch.no_grad():
            for p in self.encoder.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
        tau = nn.Parameter(torch.tensor([0.9], dtype=torch.float64))
        self.name = loss
        self.loss: nn.Module = {
            "cacr": lambda: CACRLoss(tau_neg=tau, **options),
            "rbf": lambda: CACRLoss(tau_neg=tau, cost="rbf", **options),
            "queue": lambda: CACRQueueLoss(
                queue_size=world() * 11, dim=D, tau_neg=tau, weight_grad="full", **options
            ).double(),
            "momentum": lambda: CACRMomentumLoss(temperature=tau, **options),
            "supervised": lambda: SupervisedCACRLoss(tau_neg=tau, **options),
        }[loss]()

    def loss_of(self, x: Tensor, z: Tensor) -> Any:
        """``z``: the encoded views ``x``."""
        arguments = {
            "queue": lambda: (z, self.encoder(x.flip(0)).detach()),
            "momentum": lambda: (z, z[0].detach().flip(-1)),
            "supervised": lambda: (z[0], (x[0, :, 0] > 0).long()),
        }
        return self.loss(*arguments.get(self.name, lambda: (z,))())

    def forward(self, x: Tensor) -> Any:
        return self.loss_of(x, self.encoder(x))


class Outside(nn.Module):
    """The encoder alone under DDP, the loss as a criterion outside."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.wrapped = DistributedDataParallel(model.encoder)

    def forward(self, x: Tensor) -> Any:
        return self.model.loss_of(x, self.wrapped(x))


LOSSES = ("cacr", "rbf", "queue", "momentum", "supervised")


def trained(model: nn.Module, parameters: list[nn.Parameter], batches: list[Tensor]) -> list[Tensor]:
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
    return [full(p.detach()).clone() for p in parameters]


def train_as_one_process(wrap: Callable[[Model], nn.Module]) -> None:
    batches = [whole(V, B, 6, seed=seed) for seed in range(5)]
    warnings.filterwarnings("ignore", "cacr_kernels: each rank keeps a queue of its own keys")
    for loss in LOSSES:
        alone = Model(loss)
        expected = trained(alone, list(alone.parameters()), batches)
        model = Model(loss, gather_distributed=True)
        found = trained(wrap(model), list(model.parameters()), [own(x) for x in batches])
        for mine, one in zip(found, expected, strict=True):
            close(mine, one, 1e-11)  # five steps
        if loss == "queue":
            for name, buffer in alone.loss.named_buffers():
                close(model.loss.get_buffer(name).double(), buffer.double(), 1e-11)


@check
def inside_ddp() -> None:
    train_as_one_process(DistributedDataParallel)


@check
def outside_ddp() -> None:
    train_as_one_process(Outside)


@check
def static_graph() -> None:
    train_as_one_process(lambda model: DistributedDataParallel(model, static_graph=True))


@check
def unused_parameters() -> None:
    train_as_one_process(lambda model: DistributedDataParallel(model, find_unused_parameters=True))


@check
def accumulated_gradients() -> None:
    alone, model = Model("cacr"), DistributedDataParallel(Model("cacr", gather_distributed=True))
    batches = [whole(V, B, 6, seed=seed) for seed in range(3)]
    for x in batches:
        alone(x).backward()
    for x in batches[:-1]:
        with model.no_sync():
            model(own(x)).backward()
    model(own(batches[-1])).backward()
    for mine, one in zip(model.parameters(), alone.parameters(), strict=True):
        assert one.grad is not None
        close(mine.grad, one.grad)


@check
def fully_sharded() -> None:
    from torch.distributed.fsdp import fully_shard

    for loss in ("cacr", "rbf", "supervised"):
        alone, model = Model(loss), Model(loss, gather_distributed=True)
        fully_shard(model)
        x = whole(V, B, 6)
        alone(x).backward()
        model(own(x)).backward()
        for mine, one in zip(model.parameters(), alone.parameters(), strict=True):
            assert isinstance(mine.grad, DTensor)
            assert one.grad is not None
            close(mine.grad.full_tensor(), one.grad)


@check
def a_queue_goes_on_in_one_process() -> None:
    """What the ranks stored serves another number of ranks: here one."""
    batches = [whole(V, B, 6, seed=seed) for seed in range(4)]
    model = Model("queue", gather_distributed=True)
    for x in batches[:3]:
        model(own(x))
    resumed = Model("queue")
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    expected = resumed(batches[3])
    close(mean_of_ranks(model(own(batches[3]))), expected.detach())


@check
def the_last_view_enters_the_queue() -> None:
    queries, keys = whole(V, B, D), whole(V, B, D, seed=1)
    queues = []
    for mine, options in ((own, {"gather_distributed": True}), (lambda x: x, {})):
        loss = CACRQueueLoss(queue_size=world() * B, dim=D, enqueue="last", **options).double()  # type: ignore[arg-type]
        for _ in range(2):
            loss(mine(queries), mine(keys))
        queues.append(loss.queue)
    close(*queues)
    close(queues[0], nn.functional.normalize(keys[-1], dim=-1))


@check
def chunks_of_all_ranks() -> None:
    """Two-pass gradients under DDP, with a temperature outside; what one process does without chunks."""
    alone, model = Model("cacr"), Model("cacr", gather_distributed=True)
    x = whole(V, B, 6)
    alone(x).backward()
    wrapped = DistributedDataParallel(model.encoder)
    cacr_kernels.chunked_backward(wrapped, list(own(x)), model.loss, chunk_size=3)
    for mine, one in zip(model.parameters(), alone.parameters(), strict=True):
        assert one.grad is not None
        close(mine.grad, one.grad)
