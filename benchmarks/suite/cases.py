"""What is measured: problems, modes and dtypes of each suite."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cacr_kernels import testing

LOSS, GRADIENTS = "loss", "loss+gradients"
TEMPERATURES = {"tau_pos": 1.0, "tau_neg": 2.0}


@dataclass(frozen=True)
class BenchmarkCase:
    """A problem, shared with the tests, with all that a measurement of it needs: mode, dtype, threads and device.

    ``leave_out`` names rows that the suite does not measure here; ``only``, if not empty, those that it measures beside
    ours. ``memory`` asks for their peak memory, too; ``start`` names those whose first call in a fresh process is
    measured, beside ours. A case that is not ``timed`` is called once, in the process that measures its memory.
    """

    problem: testing.Case
    mode: str = GRADIENTS
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"
    leave_out: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    memory: bool = False
    start: tuple[str, ...] = ()
    timed: bool = True

    @property
    def key(self) -> str:
        """Readable and unique; results of two runs are matched by it."""
        return f"{self.problem.name} {self.dtype} {self.mode} threads={self.threads} {self.device}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the inputs."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def arithmetic(self) -> torch.dtype:
        """The dtype computed in: half precision inputs are computed in float32."""
        return testing.arithmetic_dtype(self.torch_dtype)

    @property
    def extent(self) -> tuple[int, int, int, int]:
        """Independent problems P, queries N, keys M and features D of the similarities."""
        shape, options = self.problem.shape, self.problem.options
        V, B, D = shape.get("V", 1), shape["B"], shape["D"]
        if self.problem.loss == "cacr_queue_loss":
            return V, B, shape["K"] + (B if options.get("in_batch", True) else 0), D
        if self.problem.loss == "cacr_momentum_loss":
            return V, B, shape["M"], D
        if self.problem.loss == "supervised_cacr_loss" or options.get("pairing") == "pooled":
            return 1, V * B, V * B, D
        return V * (V - 1) // (1 if options.get("pairing") == "ordered" else 2), B, B, D

    @property
    def constant_keys(self) -> bool:
        """Whether the keys of the loss carry no gradient."""
        return self.problem.loss in ("cacr_queue_loss", "cacr_momentum_loss")

    @property
    def flop(self) -> float:
        """Floating-point operations of the products alone, U = 2 P N M D for one.

        Loss U, loss and gradients 3U. Where the keys carry no gradient 2U. Where queries and keys are one array the
        similarities are symmetric, each computed once: U / 2 and 2U. Queue: keys of the batch count as the others do.
        """
        P, N, M, D = self.extent
        unit = 2.0 * P * N * M * D
        symmetric = self.problem.loss == "supervised_cacr_loss" or self.problem.options.get("pairing") == "pooled"
        if self.mode == LOSS:
            return unit / 2 if symmetric else unit
        return 2 * unit if symmetric or self.constant_keys else 3 * unit

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """The tensors by argument name, in the dtype and on the device of the case (labels stay integers)."""
        return testing.rounded(testing.make_inputs(self.problem, seed), self.torch_dtype, self.device)

    def smaller(self, batch: int = 61, keys: int = 97) -> BenchmarkCase:
        """The same case with few queries and keys, for the correctness gate."""
        most = {"B": batch, "K": keys, "M": max(keys, batch)}
        shape = {k: min(v, most.get(k, v)) for k, v in self.problem.shape.items()}
        return replace(self, problem=self.problem._replace(shape=shape))

    def to_json(self) -> dict[str, Any]:
        """Everything a process needs to build the case again."""
        fields = {k: getattr(self, k) for k in ("mode", "dtype", "threads", "device")}
        return fields | {"problem": self.problem._asdict()}

    @staticmethod
    def from_json(data: dict[str, Any]) -> BenchmarkCase:
        """The case that ``to_json`` was called on."""
        return BenchmarkCase(**(data | {"problem": testing.Case(**data["problem"])}))


def cacr(V: int, B: int, D: int, **options: Any) -> testing.Case:
    """A problem for ``cacr_loss``: V views of B instances with D features."""
    return testing.Case("cacr_loss", {"V": V, "B": B, "D": D}, TEMPERATURES | options)


def queue(V: int, B: int, D: int, K: int, **options: Any) -> testing.Case:
    """A problem for ``cacr_queue_loss`` with K entries in the queue."""
    return testing.Case("cacr_queue_loss", {"V": V, "B": B, "D": D, "K": K}, TEMPERATURES | options)


def momentum(V: int, B: int, D: int, M: int, **options: Any) -> testing.Case:
    """A problem for ``cacr_momentum_loss`` with M keys."""
    return testing.Case("cacr_momentum_loss", {"V": V, "B": B, "D": D, "M": M}, {"temperature": 0.5} | options)


def supervised(B: int, D: int, C: int) -> testing.Case:
    """A problem for ``supervised_cacr_loss``: B embeddings in C classes."""
    return testing.Case("supervised_cacr_loss", {"B": B, "D": D, "C": C}, TEMPERATURES)


OURS_ONLY = ("ours",)  # beside ours no row at all
EAGER, COMPILED, PRODUCTS, BROADCASTING, SUM = "eager", "compiled", "bare mm", "broadcasting", "z.sum()"
RATIOS = (EAGER, COMPILED, PRODUCTS)


def quick(threads: int, device: str) -> list[BenchmarkCase]:
    """What fits into two minutes on two cores: every loss and every kind of figure once.

    Without KeOps, which compiles for about a minute per number of features when it is used for the first time.
    """

    def case(problem: testing.Case, *only: str, **fields: Any) -> BenchmarkCase:
        return BenchmarkCase(problem, threads=threads, device=device, only=only, **fields)

    return [
        case(cacr(2, 512, 128), memory=True, start=(EAGER, COMPILED), leave_out=("keops", "ntxent lightly")),
        case(cacr(2, 2048, 128), *RATIOS, memory=True),
        case(cacr(5, 128, 128), EAGER, PRODUCTS),
        case(cacr(2, 128, 128), EAGER, BROADCASTING, PRODUCTS, "ntxent lightly", "ntxent pml", memory=True),
        case(cacr(2, 32, 64), EAGER, SUM),
        case(cacr(2, 2048, 128), EAGER, mode=LOSS),
        case(cacr(2, 1024, 128, pairing="pooled"), EAGER, PRODUCTS),
        case(cacr(2, 512, 128), EAGER, dtype="bfloat16"),
        case(queue(2, 128, 128, 65536), EAGER),
        case(momentum(2, 256, 128, 4096, cost="rbf"), EAGER),
        case(supervised(1024, 128, 100), EAGER),
    ]


def goals(threads: int, device: str) -> list[BenchmarkCase]:
    """The figures the project promises (``goals.py``), and nothing else."""

    def case(problem: testing.Case, *only: str, **fields: Any) -> BenchmarkCase:
        return BenchmarkCase(problem, threads=threads, device=device, only=only or OURS_ONLY, **fields)

    widths = [(2, 2048, D) for D in (64, 256, 512)]
    batches = [(2, B, 128) for B in (512, 1024, 4096, 16384)]
    return [
        case(cacr(5, 128, 128), *RATIOS),
        case(cacr(2, 2048, 128), *RATIOS, BROADCASTING),
        *(case(cacr(*shape), *RATIOS) for shape in batches + widths),
        case(cacr(2, 1024, 128, pairing="pooled"), *RATIOS),
        case(queue(2, 128, 128, 65536), EAGER, COMPILED),
        case(cacr(2, 32, 64), SUM),
        case(cacr(2, 32768, 128), memory=True, timed=False),
        case(cacr(2, 65536, 128), memory=True, timed=False),
    ]


def full(threads: int, device: str) -> list[BenchmarkCase]:
    """Sweeps over B, V, D, queue length, dtypes, threads, the four losses and their options; has every goal."""
    base = BenchmarkCase(cacr(2, 2048, 128), threads=threads, device=device)
    batches = (32, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    shapes = ((2, 32, 64), (3, 128, 128), (5, 128, 128), (8, 128, 128), (5, 512, 128))
    options = ({"pairing": "ordered"}, {"pairing": "pooled"}, {"cost": "rbf"}, {"tau_neg": 50.0})
    problems = [
        *(cacr(V, B, D) for V, B, D in shapes),
        *(cacr(2, 2048, D) for D in (32, 64, 100, 256, 512, 1024)),
        *(cacr(2, 1024, 128, **some) for some in options),
        *(momentum(2, 256, 128, M, cost=cost) for M, cost in ((4096, "rbf"), (4096, "sqeuclidean"), (65536, "rbf"))),
        *(supervised(B, 128, 100) for B in (512, 2048, 8192)),
    ]
    slow = ("reference", "torch", "keops")  # at the largest sizes
    cases = [
        replace(base, problem=cacr(2, 2048, 128), memory=True, start=(EAGER, COMPILED, BROADCASTING, "keops")),
        *(replace(base, problem=cacr(2, B, 128), memory=True, leave_out=slow if B > 8192 else ()) for B in batches),
        *(replace(base, problem=cacr(2, B, 128), memory=True, timed=False, only=OURS_ONLY) for B in (32768, 65536)),
        *(replace(base, problem=cacr(2, B, 128), mode=LOSS) for B in (128, 512, 2048, 8192)),
        *(replace(base, problem=problem) for problem in problems),
        *(replace(base, problem=queue(2, 128, 128, K), memory=K == 65536) for K in (1024, 4096, 16384, 65536)),
        *(replace(base, problem=cacr(2, 1024, 128), dtype=dtype) for dtype in ("float64", "bfloat16", "float16")),
        *(replace(base, problem=cacr(*shape), threads=1) for shape in ((5, 128, 128), (2, 512, 128), (2, 2048, 128))),
    ]
    return list({case.key: case for case in cases}.values())


def distributed(threads: int, device: str) -> list[BenchmarkCase]:
    """Batches for 1, 2 and 4 processes of one thread each, on the CPU, so chosen that batches of a rank repeat."""
    return [BenchmarkCase(cacr(2, B, 128, normalize=True)) for B in (512, 1024, 2048, 4096)]


SUITES = {"quick": quick, "goals": goals, "full": full, "distributed": distributed}
