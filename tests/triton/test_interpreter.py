"""The Triton backend: in its interpreter (processes with ``TRITON_INTERPRET=1``), and as registered."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from cacr_kernels import cacr_loss
from cacr_kernels.backends.table import TABLE, select
from cacr_kernels.backends.triton import ops, table
from cacr_kernels.operators.registry import operator

TESTS = Path(__file__).parent
ROOT = TESTS.parents[1]
# Numbers of the published code: some of each loss, and the others.
VECTORS = "triton and not weights and {}(views_00 or views_03 or rbf_01 or queue_01 or momentum_02)"
SUITES = {
    "operators": ["interpreted/test_operators.py"],
    "normalize": ["interpreted/test_normalize.py"],
    "blocks": ["interpreted/test_blocks.py"],
    "losses": ["interpreted/test_losses.py"],
    "processes": ["interpreted/test_processes.py"],
    "tuning": ["interpreted/test_candidates.py"],
    "vectors": ["../losses/test_vectors.py", "-k", VECTORS.format("")],
    "other vectors": ["../losses/test_vectors.py", "-k", VECTORS.format("not ")],
}
EXHAUSTIVE = ("tuning", "other vectors")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "suite", [pytest.param(name, marks=pytest.mark.exhaustive) if name in EXHAUSTIVE else name for name in SUITES]
)
def test_in_the_interpreter(suite: str, interpreter: None) -> None:
    file, *selection = SUITES[suite]
    quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning:triton.runtime.interpreter"]
    command = [sys.executable, "-m", "pytest", str(TESTS / file), *selection, *quiet]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert " passed" in found.stdout


# ---- as registered ---------------------------------------------------------------------------------------------------
def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence for every reason."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(ops, "about_numpy", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    why = next(backend.why_not for backend in TABLE if backend.name == "triton")
    assert "TRITON_INTERPRET=1" in str(why(cpu))
    if not torch.cuda.is_available():
        assert "no GPU" in str(why(cuda))
        assert "no GPU" in str(why(None))
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        cacr_loss(torch.ones(2, 3, 4), backend="triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "8.0" in str(why(cuda))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert why(cuda) is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in str(why(cpu))
    for value in ("True", "on", "y", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert why(cpu) is None
    assert select("auto", cpu) != "triton"  # an interpreter is for tests
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "not installed" in str(why(cuda))


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [("3.6.0", "2.5.5", False), ("3.6.0", "2.3.9", True), ("3.7.1+git1a2b", "2.5.5", True), ("3.10.0", "2.10", True)],
)
def test_numpy_of_an_old_interpreter(triton: str, numpy: str, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(ops, "installed", lambda: True)
    monkeypatch.setattr(ops, "triton_version", lambda: triton)
    monkeypatch.setattr("numpy.__version__", numpy)
    reason = ops.why_not(torch.device("cpu"))
    assert reason == (None if runs else "the interpreter of Triton 3.6.0 needs NumPy < 2.4, and there is 2.5.5")


def test_import_without_triton() -> None:
    """The package imports, computes and says why this backend cannot."""
    code = """
import sys
sys.modules["triton"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "triton" else found(name, *more)
import torch, cacr_kernels
assert "not installed" in cacr_kernels.available_backends()["triton"], cacr_kernels.available_backends()
cacr_kernels.cacr_loss(torch.randn(2, 4, 3, requires_grad=True)).backward()
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def captured(graphs: list[torch.fx.GraphModule]) -> Any:
    """A compiler that keeps the graph, and whose code returns zeros."""

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        output = next(node for node in graph.graph.nodes if node.op == "output")
        fakes = [x.meta["val"] for x in output.args[0]]
        shapes = [[n.node.hint if isinstance(n, torch.SymInt) else n for n in f.shape] for f in fakes]
        zeros = [torch.zeros(shape, dtype=f.dtype) for shape, f in zip(shapes, fakes, strict=True)]
        return make_boxed_func(lambda *_: zeros)

    return aot_autograd(fw_compiler=compiler)


@pytest.mark.filterwarnings("ignore")  # what torch itself says while it compiles
@pytest.mark.parametrize("name", ["contrast", "detached_keys", "repulsion", "cacr"])
def test_a_compiler_sees_one_operator(name: str) -> None:
    """And no kernels, whose source it would copy without the types that they use; for all batch sizes one graph."""
    pytest.importorskip("triton", reason="needs Triton")

    def call(z: Tensor, numbers: Tensor) -> Any:
        if name == "cacr":
            return operator("cacr_triton")(z, numbers, 0.0, 0.0, 0.0, 0.0, 0, False, 0.0, True, True, True)
        if name == "repulsion":
            return operator("repulsion_triton")(z, z, numbers[:1], 0, True, True, True, True)
        more = (False, True, True, True) if name == "detached_keys" else (None, True)  # None: q_self
        op = operator(f"{name}_triton")
        return op(z, z, None, None, numbers[:1], [0], [0, 1], [1, 0], False, False, *more)

    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()
    compiled = torch.compile(call, backend=captured(graphs), fullgraph=True, dynamic=True)
    for batch in (64, 401):
        found = compiled(torch.zeros(2, batch, 160, dtype=torch.float16), torch.zeros(5, dtype=torch.float64))
        assert all(x.dtype in (torch.float32, torch.float64) for x in found)
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [target for target in targets if "cacr_kernels" in target] == [f"cacr_kernels.{name}_triton.default"]
    assert not any("triton_kernel_wrapper" in target for target in targets), targets


def test_view_tables_belong_to_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream reads none that another made: nothing would make it wait until that is written."""
    from cacr_kernels.backends.triton import pairs

    current = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(pairs, "_made_there", lambda index, device: torch.tensor(index))
    monkeypatch.setattr(pairs, "_kept", functools.lru_cache(pairs._kept.__wrapped__))

    def table_of(stream: int) -> Tensor:
        current.cuda_stream = stream
        return pairs.view_table((0, 1), torch.device("cuda", 0))

    first = table_of(0)
    assert table_of(0) is first
    assert table_of(7) is not first
    assert table_of(0) is first


def test_tiles_fit_the_features() -> None:
    """A tile that holds all features is operand of both products: both of its sizes are the same then."""
    for family in ("sm_80", "sm_90", "sm_100", "sm_120", "cdna3", "interpreter"):
        for kernel, rows in table.ONE_SOFTMAX.items():
            for precision, two, D in itertools.product(
                rows, (False, True), (1, 16, 17, 33, 64, 65, 128, 129, 257, 1031)
            ):
                tile = table.tile_of(family, kernel, precision, D, two)
                assert tile.chunks(D) * tile.block_d >= D
                assert kernel == "statistics" or tile.chunks(D) > 1 or tile.block_out == tile.block_d >= D


def test_tiles_of_blocks_fill_them() -> None:
    """Whole tiles of both kernels, and programs of whole tiles."""
    pytest.importorskip("triton", reason="needs Triton")
    from cacr_kernels.backends.triton import blocks

    for family, two, D in itertools.product(
        ("sm_80", "sm_90", "sm_100", "sm_120", "cdna3"), (False, True), (129, 1031)
    ):
        *fills, product = (
            table.tile_of(family, kernel, "half", D, two) for kernel in ("blocks", "triangles", "products")
        )
        for fill in fills:
            sizes = fill.block_m, fill.block_n, product.block_m, product.block_n
            assert all(blocks.SIDE % size == 0 and max(sizes) % size == 0 for size in sizes)
            assert blocks.SPAN % fill.block_n == 0


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_other_products_compile_again() -> None:
    """The products of float32 are part of the graph, and torch.compile guards what they follow."""
    graphs = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    loss, z = torch.compile(lambda z: cacr_loss(z, backend="torch"), backend=compiler), torch.randn(2, 5, 3)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for asked, found in (("ieee", 1), ("tf32", 2), ("none", 2), ("tf32", 2)):
            torch.backends.cuda.matmul.fp32_precision = asked
            loss(z)
            assert len(graphs) == found, asked
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
