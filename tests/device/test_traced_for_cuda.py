"""What Dynamo makes of the losses for CUDA tensors that are not there: one graph, with the operators of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._triton import has_triton

from cacr_kernels.backends import library
from cacr_kernels.operators.registry import Target
from tests.agreement import LOSSES, small_inputs
from tests.covering import covering

# What torch itself says while it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch"),
]
CASES = {
    "loss": list(LOSSES),
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "normalize": {"as given": False, "normalize": True},
    "backend": ["auto", "triton", "cuda", "torch"],
}


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if there were one GPU, on which both backends can run; torch itself does nothing with it."""
    has_triton()  # keeps its answer: what is said below is no business of Inductor's
    with FakeTensorMode():  # where there is no GPU, no operation asks the driver for one from now on
        pass
    monkeypatch.setattr(library, "_CUDA", library.Extension(library._CUDA.path, None))
    monkeypatch.setattr(library, "_CUDA_ERRORS", {0: None})
    answers = {
        "is_available": True,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_rng_state": None,
        "set_rng_state": None,
        "is_current_stream_capturing": False,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("CACR_SELF_CHECK", "0")  # there is nothing that could be checked
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def traced(loss: str, dtype: torch.dtype, **options: Any) -> torch.fx.GraphModule:
    """The one graph that Dynamo makes of a call."""
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=compiler)
    def call(tensors: dict[str, Any]) -> Any:
        return LOSSES[loss](**tensors, **options)

    with FakeTensorMode():
        value = call(
            {
                name: torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype, device="cuda")
                for name, t in small_inputs(loss).items()
            }
        )
    assert value.device.type == "cuda"
    (graph,) = graphs
    return graph


@covering(CASES)
def test_one_graph(loss: str, dtype: torch.dtype, normalize: bool, backend: str) -> None:
    """No break, and the graph names the backend of the choice: "cuda" where that suits, else "triton"."""
    graph = traced(loss, dtype, normalize=normalize, backend=backend).graph
    suits = loss in ("cacr", "supervised") and dtype != torch.float64
    chosen = ("cuda" if suits else "triton") if backend == "auto" else backend
    named = {node.args[0] for node in graph.nodes if node.target is Target}
    assert named == {chosen}, graph


def test_products_are_no_part_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the products of float32 follow may change after the loss was compiled."""
    before = torch.backends.cuda.matmul.fp32_precision
    texts = set()
    try:
        for asked in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = asked
            texts.add(traced("cacr", torch.float32, backend="cuda").code)
            torch._dynamo.reset()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(texts) == 1
