"""What is measured: problems, modes and dtypes of each suite, and the figures the project promises for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cacr_kernels import testing

LOSS, GRADIENTS = "loss", "loss+gradients"
TEMPERATURES = {"tau_pos": 1.0, "tau_neg": 2.0}


@dataclass(frozen=True)
class Case:
    """A problem (shared with the tests), what is computed of it and where.

    ``leave_out`` names rows that the suite does not measure here, ``memory`` asks for their peak memory too.
    """

    problem: testing.Case
    mode: str = GRADIENTS
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"
    leave_out: tuple[str, ...] = ()
    memory: bool = False

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
        constant_keys = self.problem.loss in ("cacr_queue_loss", "cacr_momentum_loss")
        return 2 * unit if symmetric or constant_keys else 3 * unit

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """The tensors by argument name, in the dtype and on the device of the case (labels stay integers)."""
        return testing.rounded(testing.make_inputs(self.problem, seed), self.torch_dtype, self.device)

    def smaller(self, batch: int = 61, keys: int = 97) -> Case:
        """The same case with few queries and keys, for the correctness gate."""
        most = {"B": batch, "K": keys, "M": max(keys, batch)}
        shape = {k: min(v, most.get(k, v)) for k, v in self.problem.shape.items()}
        return replace(self, problem=self.problem._replace(shape=shape))

    def to_json(self) -> dict[str, Any]:
        """Everything a process needs to build the case again."""
        fields = {k: getattr(self, k) for k in ("mode", "dtype", "threads", "device")}
        return fields | {"problem": self.problem._asdict()}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Case:
        """The inverse of ``to_json``."""
        return Case(**(data | {"problem": testing.Case(**data["problem"])}))


def cacr(V: int, B: int, D: int, **options: Any) -> testing.Case:
    """``cacr_loss`` of V views."""
    return testing.Case("cacr_loss", {"V": V, "B": B, "D": D}, TEMPERATURES | options)


def queue(V: int, B: int, D: int, K: int, **options: Any) -> testing.Case:
    """``cacr_queue_loss`` with K entries."""
    return testing.Case("cacr_queue_loss", {"V": V, "B": B, "D": D, "K": K}, TEMPERATURES | options)


def momentum(V: int, B: int, D: int, M: int, **options: Any) -> testing.Case:
    """``cacr_momentum_loss`` with M keys."""
    return testing.Case("cacr_momentum_loss", {"V": V, "B": B, "D": D, "M": M}, {"temperature": 0.5} | options)


def supervised(B: int, D: int, C: int) -> testing.Case:
    """``supervised_cacr_loss`` of B embeddings in C classes."""
    return testing.Case("supervised_cacr_loss", {"B": B, "D": D, "C": C}, TEMPERATURES)


def quick(threads: int, device: str) -> list[Case]:
    """What fits into two minutes on two cores."""

    def case(problem: testing.Case, **fields: Any) -> Case:
        return Case(problem, threads=threads, device=device, **fields)

    no_compile = ("compiled",)
    return [
        case(cacr(2, 2048, 128), memory=True),
        case(cacr(2, 512, 128), memory=True),
        case(cacr(5, 128, 128)),
        case(cacr(2, 2048, 128), mode=LOSS, leave_out=("broadcasting", "keops", "reference")),
        case(cacr(2, 32, 64), leave_out=no_compile),
        case(cacr(2, 1024, 128, pairing="pooled"), leave_out=no_compile),
        case(queue(2, 128, 128, 65536), leave_out=no_compile),
    ]


def full(threads: int, device: str) -> list[Case]:
    """Sweeps over B, V, D, queue length, dtypes, threads, the four losses and their options."""
    base = Case(cacr(2, 2048, 128), threads=threads, device=device)
    batches = (32, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    shapes = ((2, 32, 64), (3, 128, 128), (5, 128, 128), (8, 128, 128), (5, 512, 128))
    options = ({"pairing": "ordered"}, {"pairing": "pooled"}, {"cost": "rbf"}, {"tau_neg": 50.0})
    problems = [
        *(cacr(V, B, D) for V, B, D in shapes),
        *(cacr(2, 2048, D) for D in (32, 64, 100, 256, 512, 1024)),
        *(cacr(2, 1024, 128, **some) for some in options),
        *(momentum(2, 256, 128, M, cost=cost) for M, cost in ((4096, "rbf"), (4096, "sqeuclidean"), (65536, "rbf"))),
        *(supervised(B, 128, 100) for B in (512, 2048, 8192)),
    ]
    cases = [
        *(replace(base, problem=cacr(2, B, 128), memory=True) for B in batches),
        *(replace(base, problem=cacr(2, B, 128), mode=LOSS) for B in (128, 512, 2048, 8192)),
        *(replace(base, problem=problem) for problem in problems),
        *(replace(base, problem=queue(2, 128, 128, K), memory=K == 65536) for K in (1024, 4096, 16384, 65536)),
        *(replace(base, problem=cacr(2, 1024, 128), dtype=dtype) for dtype in ("float64", "bfloat16", "float16")),
        *(replace(base, problem=cacr(*shape), threads=1) for shape in ((5, 128, 128), (2, 512, 128), (2, 2048, 128))),
    ]
    return list({case.key: case for case in cases}.values())


SUITES = {"quick": quick, "full": full}


class Goal(NamedTuple):
    """How many times faster than ``row`` the library has to be (``required``), and is meant to be (``aim``)."""

    row: str
    aim: float
    required: float | None = None


# Two threads, float32, loss and gradients. The aims were set on a machine with AVX2.
_AIMS: tuple[tuple[testing.Case, float, float, float | None], ...] = (
    (cacr(5, 128, 128), 6.0, 4.0, 1.5),
    (cacr(2, 512, 128), 2.8, 2.8, 1.4),
    (cacr(2, 1024, 128), 3.0, 2.8, 1.4),
    (cacr(2, 2048, 128), 3.3, 3.0, 1.5),
    (cacr(2, 4096, 128), 8.0, 2.8, 1.55),
    (cacr(2, 16384, 128), 9.0, 4.0, 2.0),
    (cacr(2, 2048, 64), 7.0, 4.0, 1.6),
    (cacr(2, 2048, 256), 2.6, 2.2, 1.5),
    (cacr(2, 2048, 512), 1.7, 1.5, 1.45),
    (queue(2, 128, 128, 65536), 10.0, 2.4, None),
    (cacr(2, 1024, 128, pairing="pooled"), 4.0, 3.5, 2.0),
)
_REQUIRED = {(cacr(2, 2048, 128).name, "eager"): 2.5, (cacr(2, 2048, 128).name, "compiled"): 2.0}


def _goals() -> dict[str, list[Goal]]:
    goals = {}
    for problem, *aims in _AIMS:
        named = zip(("eager", "compiled", "bare mm"), aims, strict=True)
        found = [Goal(row, aim, _REQUIRED.get((problem.name, row))) for row, aim in named if aim is not None]
        goals[Case(problem, threads=2).key] = found
    goals[Case(cacr(2, 2048, 128), threads=2).key].append(Goal("broadcasting", 300.0))
    goals[Case(cacr(2, 32, 64), threads=2).key] = [Goal("z.sum()", 1 / 3)]  # at most three times its time
    return goals


GOALS = _goals()
