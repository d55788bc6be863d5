"""Where the losses are called: in compiled schedules, under transforms, with keys from inference mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import grad

from cacr_kernels import CACRLoss, supervised_cacr_loss
from cacr_kernels.losses import compact_ids
from tests.agreement import BACKENDS, LOSSES, cast, each_backend, each_loss, small_inputs, there
from tests.covering import covering


@covering({"loss": list(LOSSES), "backend": BACKENDS})
def test_a_schedule_of_numbers_compiles_twice_at_most(loss: str, backend: str) -> None:
    """Once for the first number, once for any number; not at every step."""
    tensors, counter = there(small_inputs(loss), backend), CompileCounter()
    names = ["temperature"] if loss == "momentum" else ["tau_pos", "tau_neg", "alpha", "beta"]
    rbf: dict[str, Any] = {"cost": "rbf"} if loss == "cacr" else {}

    def call(value: float) -> torch.Tensor:
        scale = {"rbf_scale": 2 * value} if rbf else {}
        return LOSSES[loss](**tensors, **dict.fromkeys(names, value), **scale, **rbf, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for step in range(12):
        torch.testing.assert_close(compiled(0.5 + 0.1 * step), call(0.5 + 0.1 * step))
    assert counter.frame_count <= 2


@covering({"last": [float("inf"), float("nan"), -1.0], "loss": list(LOSSES), "backend": BACKENDS})
def test_a_schedule_that_ends_badly_is_refused(last: float, loss: str, backend: str) -> None:
    """Once a number varies, compiled code knows less of it."""
    tensors, name = there(small_inputs(loss), backend), "temperature" if loss == "momentum" else "tau_neg"

    def call(value: float) -> torch.Tensor:
        return LOSSES[loss](**tensors, **{name: value}, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager")
    for value in (1.0, 2.0, 3.0):
        torch.testing.assert_close(compiled(value), call(value))
    with pytest.raises(ValueError, match=name):
        compiled(last)


def test_a_module_given_numbers_of_numpy_compiles() -> None:
    module, views = CACRLoss(tau_neg=np.float64(1.5), alpha=np.float32(2)), small_inputs("cacr")["views"]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(views), module(views))


@each_backend
@each_loss
def test_jacrev_is_refused_in_words(loss: str, backend: str) -> None:
    tensors = there(small_inputs(loss), backend)
    name = next(iter(tensors))

    def f(z: torch.Tensor) -> torch.Tensor:
        return LOSSES[loss](**(tensors | {name: z}), backend=backend)

    with pytest.raises(ValueError, match=r"cannot run inside torch\.func\.vmap"):
        torch.func.jacrev(f)(tensors[name])


@each_backend
@pytest.mark.parametrize("loss", ["queue", "momentum", "supervised"])
def test_keys_made_in_inference_mode(loss: str, backend: str) -> None:
    tensors = there(small_inputs(loss), backend)
    constants = {"keys", "queue"} if loss != "supervised" else {"ref_embeddings"}
    with torch.inference_mode():
        made = {n: t.clone() if n in constants else t for n, t in tensors.items()}
    results = []
    for given in (tensors, made):
        leaf = {n: t.clone().requires_grad_() for n, t in given.items() if n in ("queries", "embeddings")}
        results.append(grad(LOSSES[loss](**(given | leaf), backend=backend), list(leaf.values())))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_everything_in_inference_mode(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        for loss, function in LOSSES.items():
            assert function(**cast(small_inputs(loss), dtype)).isfinite()


@pytest.mark.parametrize(
    "values", [(-(2**63), -1, 0, 5, 2**63 - 1), (0, 1, 2, 5, 2**16 - 1), (0, 5, 2**32, 2**32 + 5, 2**33)], ids=str
)
def test_ids_are_equal_where_labels_are(values: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.tensor(values)
    for n, m in ((1, 0), (1, 1), (13, 0), (13, 29), (0, 3)):
        labels, ref = (known[torch.randint(5, (count,), generator=generator)] for count in (n, m))
        ids, ref_ids = compact_ids(labels, ref if m else None)
        both = torch.cat([labels, ref])
        found = ids if ref_ids is None else torch.cat([ids, ref_ids])
        assert found.dtype == torch.int32
        assert torch.equal(found[:, None] == found, both[:, None] == both)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_labels_are_not_looked_at_while_make_fx_records(mode: str, backend: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    z, labels = torch.randn(12, 4), torch.arange(12) % 3
    graph = make_fx(lambda z, labels: supervised_cacr_loss(z, labels, backend=backend), tracing_mode=mode)(z, labels)
    others = labels.flip(0) * 5
    torch.testing.assert_close(graph(z, others), supervised_cacr_loss(z, others, backend="reference"))


def test_unsigned_labels_beyond_int64_are_compared_with_their_like_only() -> None:
    z = torch.randn(3, 4)
    large = torch.tensor([2**64 - 1, 1, 1], dtype=torch.uint64)
    options: dict[str, Any] = {"ref_embeddings": z[:2]}
    with pytest.raises(TypeError, match="uint64"):
        supervised_cacr_loss(z, large, **options, ref_labels=torch.tensor([-1, 1]))
    supervised_cacr_loss(z, large, **options, ref_labels=large[:2])
