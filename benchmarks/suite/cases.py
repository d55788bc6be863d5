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
    ``module``: modules are called instead of functions. ``base``: the row that ratios are relative to, if not that of
    the backend which ``"auto"`` takes. ``share``: of the seconds that the suite has for a case.
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
    module: bool = False
    base: str = ""
    share: float = 1.0

    @property
    def key(self) -> str:
        """Readable and unique; results of two runs are matched by it."""
        kind = "".join(f" {word}" for word in (self.module and "module", self.base and f"base={self.base}") if word)
        return f"{self.problem.name} {self.dtype} {self.mode}{kind} threads={self.threads} {self.device}"

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
            return 1, V * B, shape.get("M", 0) or V * B, D
        return V * (V - 1) // (1 if options.get("pairing") == "ordered" else 2), B, B, D

    @property
    def constant_keys(self) -> bool:
        """Whether the keys of the loss carry no gradient; those of a reference set get none here (``CONSTANT``)."""
        return self.problem.loss in ("cacr_queue_loss", "cacr_momentum_loss") or bool(self.problem.shape.get("M"))

    @property
    def inputs_kind(self) -> str:
        """How the embeddings are made, for people."""
        return INPUTS[str(self.problem.data)]

    @property
    def needs_incoming(self) -> bool:
        """Whether the loss is one number per query, so that a gradient has to flow into each."""
        return self.problem.per_query

    @property
    def flop(self) -> float:
        """Floating-point operations of the products alone, U = 2 P N M D for one.

        Loss U, loss and gradients 3U. Where the keys carry no gradient 2U. Where queries and keys are one array the
        similarities are symmetric, each computed once: U / 2 and 2U. Queue: keys of the batch count as the others do.
        """
        P, N, M, D = self.extent
        unit = 2.0 * P * N * M * D
        own_keys = self.problem.loss == "supervised_cacr_loss" and not self.constant_keys
        symmetric = own_keys or self.problem.options.get("pairing") == "pooled"
        if self.mode == LOSS:
            return unit / 2 if symmetric else unit
        return 2 * unit if symmetric or self.constant_keys else 3 * unit

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """The tensors by argument name, in the dtype and on the device of the case (labels stay integers)."""
        return testing.rounded(testing.make_inputs(self.problem, seed), self.torch_dtype, self.device)

    def smaller(self, batch: int = 61, keys: int = 97, views: int = 16) -> BenchmarkCase:
        """The same case with few queries, keys and views, for the correctness gate."""
        most = {"V": views, "B": batch, "K": keys, "M": max(keys, batch)}
        shape = {k: min(v, most.get(k, v)) for k, v in self.problem.shape.items()}
        return replace(self, problem=self.problem._replace(shape=shape))

    def to_json(self) -> dict[str, Any]:
        """Everything a process needs to build the case again."""
        fields = {k: getattr(self, k) for k in ("mode", "dtype", "threads", "device", "module", "base")}
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


def supervised(B: int, D: int, C: int, M: int = 0, **options: Any) -> testing.Case:
    """A problem for ``supervised_cacr_loss``: B embeddings in C classes, and M of a reference set."""
    shape = {"B": B, "D": D, "C": C} | ({"M": M} if M else {})
    return testing.Case("supervised_cacr_loss", shape, TEMPERATURES | options)


def raw(problem: testing.Case) -> testing.Case:
    """The same with rows that the loss has to normalise, as an encoder gives them."""
    return problem._replace(options=problem.options | {"normalize": True}, data="long")


INPUTS = {
    "unit": "random unit rows",
    "long": "random rows of other lengths than 1",
    "clustered": "unit rows around 5 centres",
    "near-equal": "unit rows, views of an instance 1e-3 apart",
    "huge": "random rows, 30 times normal numbers",
    "tiny": "random rows, 1e-15 times normal numbers",
}
CONSTANT = ("ref_embeddings",)  # inputs that could get a gradient, but get none in any case here
OURS_ONLY = ("ours",)  # beside ours no row at all
EAGER, COMPILED, PRODUCTS, BROADCASTING, SUM = "eager", "compiled", "bare mm", "broadcasting", "z.sum()"
NTXENT, KEPT = "ntxent eager", "kept queue"
MODULES = (NTXENT, "ntxent lightly", "ntxent pml", "supcon pml", "cosine lightly")  # other losses, as modules
RATIOS = (EAGER, COMPILED, PRODUCTS)


def table(threads: int, device: str) -> list[BenchmarkCase]:
    """The cases of the table of goals, modules where embeddings are raw: ours alone, unless the goal is a ratio."""

    def case(problem: testing.Case, *only: str, **fields: Any) -> BenchmarkCase:
        fields = {"share": 0.4, "module": problem.data == "long"} | fields
        return BenchmarkCase(problem, threads=threads, device=device, only=only or OURS_ONLY, **fields)

    views = ((2, 16384, 128), (2, 4096, 128), (2, 2048, 128), (2, 1024, 128), (2, 512, 128), (2, 256, 128))
    widths = ((5, 128, 128), (2, 2048, 64), (2, 2048, 512))
    classes = ((1024, 100), (4096, 1000), (4096, 10))
    return [
        *(case(raw(cacr(*shape)), *((NTXENT,) if shape[1] in (256, 2048) else ())) for shape in views),
        *(case(raw(cacr(*shape))) for shape in widths),
        *(case(raw(cacr(2, B, 128, pairing="pooled"))) for B in (1024, 2048)),
        *(case(raw(queue(2, 128, 128, K))) for K in (65536, 4096)),
        *(case(raw(queue(2, B, D, K)), KEPT) for B, D, K in ((32, 128, 65536), (16, 256, 262144))),
        case(raw(momentum(2, 256, 128, 4096))),
        *(case(raw(supervised(N, 128, C))) for N, C in classes),
        *(case(raw(supervised(N, 128, 100, M))) for N, M in ((256, 65536), (1024, 8192))),
        *(case(raw(cacr(2, B, 128, reduction="sum"))) for B in (512, 2048)),
        *(case(raw(cacr(2, B, 128, reduction="none"))) for B in (512, 2048)),
        *(case(cacr(V, 16, 128), "torch", "reference", base="torch", share=0.2) for V in (16, 64)),
        *(case(cacr(V, 16, 128, reduction="none"), "reference", share=0.2) for V in (16, 64)),
        *(case(raw(cacr(2, B, 128)), mode=LOSS) for B in (512, 2048)),
        *(case(raw(cacr(2, B, 128)), dtype="float64") for B in (512, 2048)),
        case(raw(cacr(2, 32, 64)), SUM, *MODULES),
        case(raw(cacr(2, 64, 64)), NTXENT),
        case(raw(supervised(256, 128, 10)), "supcon pml"),
        case(raw(cacr(2, 2048, 128)), dtype="bfloat16"),
    ]


def quick(threads: int, device: str) -> list[BenchmarkCase]:
    """What fits into three minutes on two cores: every loss and kind of figure once, and the table of goals.

    Without KeOps, which compiles for about a minute per number of features when it is used for the first time.
    """

    def case(problem: testing.Case, *only: str, **fields: Any) -> BenchmarkCase:
        return BenchmarkCase(problem, threads=threads, device=device, only=only, **({"share": 0.6} | fields))

    return [
        case(cacr(2, 512, 128), memory=True, start=(EAGER, COMPILED), leave_out=("keops", *MODULES)),
        case(cacr(2, 2048, 128), EAGER, PRODUCTS, memory=True),
        case(cacr(5, 128, 128), EAGER, PRODUCTS),
        case(cacr(2, 128, 128), EAGER, BROADCASTING, PRODUCTS, memory=True),
        case(cacr(2, 32, 64), EAGER, SUM),
        case(cacr(2, 2048, 128), EAGER, mode=LOSS),
        case(cacr(2, 1024, 128, pairing="pooled"), EAGER, PRODUCTS),
        case(cacr(2, 512, 128), EAGER, dtype="bfloat16"),
        case(queue(2, 128, 128, 65536), EAGER),
        case(momentum(2, 256, 128, 4096, cost="rbf"), EAGER),
        case(supervised(1024, 128, 100), EAGER),
        case(cacr(2, 1024, 128)._replace(data="clustered"), EAGER),
        *table(threads, device),
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
        *table(threads, device),
    ]


def full(threads: int, device: str) -> list[BenchmarkCase]:
    """Sweeps over B, V, D, queue length, dtypes, threads, kinds of inputs, the four losses, options; has every goal."""
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
        *(replace(base, problem=cacr(2, 1024, 128)._replace(data=data)) for data in ("clustered", "near-equal")),
        *(replace(base, problem=raw(cacr(2, B, 128)), module=True, only=MODULES) for B in (128, 2048)),
        replace(base, problem=raw(supervised(1024, 128, 100)), module=True, only=("supcon pml",)),
        *table(threads, device),
    ]
    found: dict[str, BenchmarkCase] = {}
    for case in cases:
        found.setdefault(case.key, case)  # with the rows that are asked for above, not those of the table alone
    return list(found.values())


def distributed(threads: int, device: str) -> list[BenchmarkCase]:
    """Batches for 1, 2 and 4 processes of one thread each, on the CPU, so chosen that batches of a rank repeat."""
    return [BenchmarkCase(cacr(2, B, 128, normalize=True)) for B in (512, 1024, 2048, 4096)]


SUITES = {"quick": quick, "goals": goals, "full": full, "distributed": distributed}
