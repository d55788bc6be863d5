"""``chunked_backward``: gradients of the whole batch with the activations of a chunk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cacr_kernels import CACRLoss, CACRParts, chunked_backward

VIEWS, BATCH, INPUTS, D = 3, 7, 6, 4


class Encoder(nn.Module):
    """Two layers; counts the rows of its calls that record a graph."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        layers = nn.Linear(INPUTS, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, D)
        self.layers = nn.Sequential(*layers).to(dtype)
        self.with_graph: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.with_graph.append(len(x))
        return self.layers(x)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(VIEWS, BATCH, INPUTS, dtype=dtype)


def loss_and_temperature(**options: object) -> tuple[CACRLoss, nn.Parameter]:
    tau = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
    return CACRLoss(tau_neg=tau, **options), tau  # type: ignore[arg-type]


def taken(*modules: nn.Module) -> list[Tensor]:
    """The gradients of all parameters, which are cleared."""
    found = []
    for p in (p for module in modules for p in module.parameters()):
        assert p.grad is not None
        found.append(p.grad)
        p.grad = None
    return found


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12 * y.abs().max().item())


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunks_give_the_gradient_of_the_whole(chunk_size: int) -> None:
    encoder, x = Encoder(), inputs()
    loss, _ = loss_and_temperature()
    expected = loss(encoder(x))
    expected.backward()
    gradients = taken(encoder, loss)
    encoder.with_graph.clear()
    found = chunked_backward(encoder, list(x), loss, chunk_size=chunk_size)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    assert not found.requires_grad
    close(taken(encoder, loss), gradients)
    assert max(encoder.with_graph) == min(chunk_size, BATCH)
    assert sum(encoder.with_graph) == VIEWS * BATCH


def test_gradients_accumulate() -> None:
    encoder, x = Encoder(), inputs()
    loss, _ = loss_and_temperature()
    chunked_backward(encoder, list(x), loss, chunk_size=3)
    once = [g.clone() for g in taken(encoder, loss)]
    for _ in range(2):
        chunked_backward(encoder, list(x), loss, chunk_size=3)
    close(taken(encoder, loss), [2 * g for g in once])


def kept(encoder: nn.Module, x: Tensor, chunk_size: int) -> Tensor:
    """The embeddings of the same chunks, with all their graphs."""
    return torch.stack([torch.cat([encoder(rows) for rows in view.split(chunk_size)]) for view in x])


def test_dropout_is_that_of_the_first_pass() -> None:
    encoder, x = Encoder(dropout=0.5), inputs()
    exact, _ = loss_and_temperature()

    def loss(z: Tensor) -> Tensor:
        """Draws a number of its own."""
        return exact(z) * torch.rand((), dtype=torch.float64)

    torch.manual_seed(3)
    expected = loss(kept(encoder, x, 2))
    expected.backward()
    gradients, next_number = taken(encoder, exact), torch.rand(())
    torch.manual_seed(3)
    found = chunked_backward(encoder, list(x), loss, chunk_size=2)
    assert torch.equal(torch.rand(()), next_number)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    close(taken(encoder, exact), gradients)


def test_autocast() -> None:
    """With all graphs kept the chunks' gradients of a weight are added in bfloat16, here in float32."""
    encoder, x = Encoder(dtype=torch.float32), inputs(torch.float32)
    loss = CACRLoss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss(kept(encoder, x, 3)).backward()
    gradients = taken(encoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked_backward(encoder, list(x), loss, chunk_size=3)
        assert torch.is_autocast_cache_enabled()
    for found, expected in zip(taken(encoder), gradients, strict=True):
        limit = 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=limit)


def test_an_encoder_for_each_view_and_inputs_by_name() -> None:
    class Named(Encoder):
        def forward(self, x: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(x["left"] + x["right"])

    encoders, x, y = [Named(), Named()], inputs(), inputs()
    loss, _ = loss_and_temperature()
    views = [{"left": x[v], "right": y[v]} for v in range(2)]
    loss([encode(view) for encode, view in zip(encoders, views, strict=True)]).backward()
    gradients = taken(*encoders, loss)
    chunked_backward(encoders, views, loss, chunk_size=4)
    close(taken(*encoders, loss), gradients)


def test_parts_and_frozen_encoders() -> None:
    encoder = Encoder().requires_grad_(False)
    loss, tau = loss_and_temperature(return_parts=True)
    parts = chunked_backward(encoder, list(inputs()), loss, chunk_size=4)
    assert isinstance(parts, CACRParts)
    assert not any(part.requires_grad for part in parts)
    assert tau.grad is not None
    assert tau.grad != 0


def test_refusals() -> None:
    encoder, x = Encoder(), inputs()
    with pytest.raises(ValueError, match="chunk_size must be an integer >= 1, got 0"):
        chunked_backward(encoder, list(x), CACRLoss(), chunk_size=0)
    with pytest.raises(TypeError, match=r"chunk_size must be an integer >= 1, got 1\.5"):
        chunked_backward(encoder, x, CACRLoss(), chunk_size=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="views must be a sequence with the inputs of each view, got NoneType"):
        chunked_backward(encoder, None, CACRLoss(), chunk_size=2)  # type: ignore[arg-type]
    for views, found in (([], r"\[\]"), ([x[0], x[1][:2]], r"\[7, 2\]"), (x[:, :0], r"\[0, 0, 0\]")):
        with pytest.raises(ValueError, match=r"views must hold at least one view, all of the same B >= 1 .*" + found):
            chunked_backward(encoder, views, CACRLoss(), chunk_size=2)
    with pytest.raises(TypeError, match="encoder must be callable, got int, int, int"):
        chunked_backward(3, x, CACRLoss(), chunk_size=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss must be callable, got int"):
        chunked_backward(encoder, x, 3, chunk_size=2)  # type: ignore[arg-type]
    assert chunked_backward(encoder, x, CACRLoss(), chunk_size=np.int64(2)).dim() == 0  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="encoder must be one, or one for each of 3 views, got 2"):
        chunked_backward([encoder, encoder], list(x), CACRLoss(), chunk_size=2)
    with pytest.raises(ValueError, match=r"views must hold tensors of one length B, got \[6, 7\]"):
        chunked_backward(encoder, [(x[0], x[1][1:])], CACRLoss(), chunk_size=2)
    with pytest.raises(TypeError, match="views must be tensors, or dicts, lists or tuples of tensors, got str"):
        chunked_backward(encoder, ["x"], CACRLoss(), chunk_size=2)
