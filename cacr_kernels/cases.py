"""Problems that tests, ``verify`` and benchmarks share, and their inputs.

Every axis has its own odd or prime size. The small ones reach every option and every kind of data; the large ones have
more keys than any tile or block of a kernel and several blocks of queries, where long sums lose digits.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

NEAR = 1e-3  # distance of near-equal views, in lengths of the vectors, up to a factor of about one
LENGTHS = {"long": 0.4, "huge": 30.0, "tiny": 1e-15}  # of normal numbers
Maker = Callable[[int], dict[str, Tensor]]


class Case(NamedTuple):
    """A problem: a public loss, its sizes, its keywords (temperatures among them) and the kind of its data.

    Sizes: V views, B instances (supervised: embeddings), D features, K queue entries, M keys (momentum, in all) or
    reference embeddings (supervised), C classes. Data: ``"unit"`` vectors, ``"clustered"`` around 5 centres,
    ``"near-equal"`` views of an instance (or embeddings of a class), and vectors that are not of unit length:
    ``"long"``, ``"huge"`` (30 times normal numbers) and ``"tiny"`` (1e-15; zeros in float16). Or it is a function that
    makes the inputs of :func:`make_inputs` from a seed, and the sizes are then its business.
    """

    loss: str
    shape: dict[str, int]
    options: dict[str, Any]
    data: str | Maker = "unit"
    quick: bool = False
    learnable: bool = True  # the temperatures are tensors that receive derivatives

    @property
    def name(self) -> str:
        """A readable name that no other case has."""
        words = [f"{key}={value}" for key, value in (self.shape | self.options).items()]
        kind = self.data if isinstance(self.data, str) else getattr(self.data, "__name__", "inputs")
        return " ".join([self.loss, *words, *([] if kind == "unit" else [kind])])

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def per_query(self) -> bool:
        """Whether the loss is one value per query."""
        return self.options.get("reduction") == "none"


# ---- cases: every axis has its own odd or prime size -----------------------------------------------------------------
def _taus(pos: float, neg: float) -> dict[str, Any]:
    return {"tau_pos": pos, "tau_neg": neg}


def _cases_of(loss: str, axes: str, **defaults: Any) -> Callable[..., Case]:
    """Makes cases of ``loss`` from the sizes of ``axes``; options not given are ``defaults``."""

    def case(*sizes: int, data: str = "unit", quick: bool = False, **options: Any) -> Case:
        return Case(loss, dict(zip(axes, sizes, strict=True)), defaults | options, data, quick)

    return case


def _cacr_cases() -> list[Case]:
    case = _cases_of("cacr_loss", "VBD", **_taus(1.0, 2.0))
    both_costs = [
        case(3, 7, 5, quick=True),
        case(2, 1, 3, quick=True),
        case(2, 2, 1),
        case(3, 23, 1, data="long"),
        case(5, 13, 11),
        case(2, 67, 33, data="clustered", quick=True, **_taus(2.0, 5.0)),
        case(3, 41, 19, data="near-equal", quick=True),
        case(3, 29, 31, data="near-equal", beta=0.0),
        case(2, 43, 21, data="clustered", alpha=0.0),
        case(3, 53, 29, quick=True, **_taus(20.0, 40.0)),
        case(3, 19, 9, **_taus(0.0, 0.0)),
        case(3, 31, 23, data="long", quick=True),
        case(3, 17, 13, data="long", normalize=True, alpha=0.7, beta=1.3),
        case(2, 11, 1031),
        case(3, 13, 17, data="huge", quick=True, rbf_scale=2e-3, **_taus(1e-3, 2e-3)),
        case(2, 19, 7, data="tiny"),
        case(2, 151, 129, **_taus(1.0, 5.0)),
        case(2, 307, 300, data="clustered", alpha=0.0, **_taus(1.0, 5.0)),
    ]
    rows = [
        case(3, 11, 7, quick=True, reduction="none"),
        case(4, 21, 15, data="near-equal", reduction="none", **_taus(5.0, 10.0)),
        case(3, 1, 2, reduction="none"),
    ]
    large = case(2, 401, 65, data="clustered", alpha=0.0, quick=True, **_taus(1.0, 5.0))
    quick_large = [large._replace(options=large.options | {"pairing": "unordered", "cost": "sqeuclidean"})]
    return quick_large + [
        base._replace(options=base.options | {"pairing": pairing, "cost": cost})
        for pairing in ("unordered", "ordered", "pooled")
        for cost in ("sqeuclidean", "rbf")
        for base in both_costs + (rows if cost == "sqeuclidean" else [])
    ]


def _queue_cases() -> list[Case]:
    case = _cases_of("cacr_queue_loss", "VBDK", **_taus(1.0, 2.0))
    bases = (
        case(3, 7, 5, 13, quick=True),
        case(2, 1, 3, 0),
        case(2, 9, 4, 0),
        case(3, 11, 7, 29, in_batch=False),
        case(3, 17, 19, 67, data="near-equal", quick=True, **_taus(5.0, 10.0)),
        case(2, 23, 31, 59, **_taus(20.0, 40.0)),
        case(3, 19, 9, 37, data="long", normalize=True, reduction="none"),
        case(2, 61, 65, 521, **_taus(1.0, 5.0)),
        case(2, 29, 33, 2053, data="clustered", **_taus(1.0, 5.0)),
        case(2, 29, 300, 4099, data="clustered", **_taus(1.0, 5.0)),
    )
    large = case(2, 13, 33, 2053, data="clustered", quick=True, **_taus(1.0, 5.0))
    return [large] + [
        base._replace(options=base.options | {"weight_grad": w}) for w in ("in_batch", "full", "none") for base in bases
    ]


def _momentum_cases() -> list[Case]:
    case = _cases_of("cacr_momentum_loss", "VBDM")
    bases = (
        case(3, 7, 5, 13, quick=True, temperature=0.5, key_offset=3),
        case(1, 1, 3, 1, temperature=1.0),
        case(2, 43, 19, 43, data="near-equal", quick=True, temperature=0.2),
        case(3, 29, 21, 37, temperature=0.05, reduction="none"),
        case(4, 17, 11, 19, data="long", temperature=1.0, normalize=True),
        case(2, 127, 65, 387, temperature=0.2, key_offset=127),
        case(1, 13, 33, 2053, data="clustered", quick=True, temperature=0.2, key_offset=31),
        case(2, 101, 300, 2053, data="clustered", temperature=0.2, key_offset=1009),
    )
    return [base._replace(options=base.options | {"cost": cost}) for cost in ("rbf", "sqeuclidean") for base in bases]


def _supervised_cases() -> list[Case]:
    case = _cases_of("supervised_cacr_loss", "BDCM", **_taus(1.0, 2.0))
    holding = _cases_of("supervised_cacr_loss", "BDCMS", **_taus(1.0, 2.0))  # S = 1: queries in the reference set
    return [
        case(21, 5, 4, 0, quick=True),
        case(1, 3, 1, 0),
        case(13, 6, 1, 0),
        case(17, 7, 97, 0),
        case(27, 11, 5, 41, quick=True),
        case(43, 19, 11, 0, data="near-equal", reduction="none", **_taus(5.0, 10.0)),
        case(75, 33, 9, 0, data="clustered", **_taus(2.0, 5.0)),
        case(37, 17, 3, 53, **_taus(20.0, 40.0)),
        case(29, 8, 7, 0, data="long", normalize=True),
        case(31, 13, 4, 0, data="huge", **_taus(2e-3, 1e-3)),
        case(23, 7, 3, 0, data="tiny"),
        case(307, 9, 9, 0, data="clustered", quick=True, **_taus(2.0, 5.0)),
        case(151, 300, 3, 211, **_taus(2.0, 5.0)),
        case(33, 9, 4, 0, ignore_index=2),
        holding(35, 12, 5, 43, 1, quick=True, ignore_index=3),
        holding(71, 18, 3, 69, 1, **_taus(2.0, 5.0)),
    ]


def cases(quick: bool = False) -> list[Case]:
    """All cases, or the quick ones."""
    found = [*_cacr_cases(), *_queue_cases(), *_momentum_cases(), *_supervised_cases()]
    return [case for case in found if case.quick or not quick]


# ---- inputs ----------------------------------------------------------------------------------------------------------
def make_inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a case by argument name, float64 (labels: int64) on the CPU; the same for the same seed."""
    if not isinstance(case.data, str):
        return case.data(seed)
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + seed)
    sizes = {"V": 1, "K": 0, "M": 0, "C": 1, "S": 0} | case.shape
    V, B, D, M = (sizes[axis] for axis in "VBDM")
    centres = torch.randn(max(B + sizes["K"], M, 5), D, dtype=torch.float64, generator=generator)

    def make(*shape: int, owner: Tensor | None = None) -> Tensor:
        """``owner``: for near-equal data, whose copy each row is."""
        noise = torch.randn(*shape, D, dtype=torch.float64, generator=generator)
        if case.data in LENGTHS:
            return LENGTHS[case.data] * noise
        if case.data == "near-equal":
            own = normalize(centres[: shape[-1]] if owner is None else centres[owner], dim=-1)
            noise = own + NEAR / math.sqrt(D) * noise
        elif case.data == "clustered":
            noise = centres[torch.arange(shape[-1]) % 5] + 0.1 * noise
        return normalize(noise, dim=-1)

    if case.loss == "cacr_loss":
        return {"views": make(V, B)}
    if case.loss == "cacr_queue_loss":
        strangers = torch.arange(B, B + sizes["K"])  # the queue holds other instances
        return {"queries": make(V, B), "keys": make(V, B), "queue": make(sizes["K"], owner=strangers)}
    if case.loss == "cacr_momentum_loss":
        owner = torch.arange(M) - case.options.get("key_offset", 0)
        return {"queries": make(V, B), "keys": make(M, owner=owner % len(centres))}
    labels = torch.randint(sizes["C"], (B,), generator=generator)
    own = {"embeddings": make(B, owner=labels % len(centres)), "labels": labels}
    if not M:
        return own
    own |= {"ref_embeddings": make(M), "ref_labels": torch.randint(sizes["C"], (M,), generator=generator)}
    return own | ({"ref_index": 7 * torch.arange(B, dtype=torch.int64) % (M + 1) - 1} if sizes["S"] else {})
