"""What the smoke step computes: every loss, small shapes first; and what is timed, in the order of its importance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from cacr_kernels import testing

TAUS = {"tau_pos": 1.0, "tau_neg": 2.0}


def cacr(V: int, B: int, D: int, **options: Any) -> testing.Case:
    return testing.Case("cacr_loss", {"V": V, "B": B, "D": D}, TAUS | options)


def queue(V: int, B: int, D: int, K: int, **options: Any) -> testing.Case:
    return testing.Case("cacr_queue_loss", {"V": V, "B": B, "D": D, "K": K}, TAUS | options)


def momentum(V: int, B: int, D: int, M: int, **options: Any) -> testing.Case:
    fixed = {"temperature": 0.5, "normalize": True}  # rounded to a half type, unit vectors are none any more
    return testing.Case("cacr_momentum_loss", {"V": V, "B": B, "D": D, "M": M}, fixed | options)


def supervised(B: int, D: int, C: int, M: int = 0) -> testing.Case:
    return testing.Case("supervised_cacr_loss", {"B": B, "D": D, "C": C, "M": M}, TAUS)


SMALL = (cacr(3, 7, 5), queue(3, 7, 5, 11), momentum(3, 7, 5, 13), supervised(21, 5, 4))
OPTIONS = (
    cacr(3, 11, 7, reduction="none"),
    cacr(3, 19, 9, cost="rbf"),
    cacr(3, 23, 17, pairing="ordered"),
    cacr(3, 23, 17, pairing="pooled"),
    cacr(3, 19, 9, pairing="pooled", cost="rbf"),
    queue(2, 13, 31, 67, weight_grad="full"),
    queue(2, 13, 31, 67, weight_grad="none"),
    momentum(2, 13, 19, 43, cost="sqeuclidean"),
    supervised(27, 11, 5, 41),
)
LARGE = (cacr(2, 307, 128), queue(2, 151, 128, 521), momentum(2, 127, 128, 387), supervised(307, 128, 9))
SMOKE = (*SMALL, *OPTIONS, *LARGE)
INTERPRETED = SMALL  # an interpreter takes seconds for more
DTYPES = ("float32", "bfloat16", "float16", "float64")


# ---- times -----------------------------------------------------------------------------------------------------------
class Timed(NamedTuple):
    """``cacr_loss`` of two views and its gradients: B instances, D features, how they are multiplied, raw or unit rows.

    ``products``: bf16 and fp16, which are also the types of the features; tf32 and ieee of float32.
    """

    B: int
    D: int
    products: str
    raw: bool = False  # rows of any length, which the loss normalises

    @property
    def dtype(self) -> str:
        """The type of the features."""
        return {"bf16": "bfloat16", "fp16": "float16"}.get(self.products, "float32")

    @property
    def rows(self) -> str:
        """What the rows are, for people."""
        return "raw" if self.raw else "unit"

    @property
    def name(self) -> str:
        """What people read; no two problems share one."""
        return f"{self.products} B={self.B} D={self.D} {self.rows}"

    @property
    def case(self) -> testing.Case:
        """As the rest of the house writes it."""
        options: dict[str, Any] = TAUS | ({"normalize": True} if self.raw else {})
        shape = {"V": 2, "B": self.B, "D": self.D}
        return testing.Case("cacr_loss", shape, options, "long" if self.raw else "unit", learnable=False)

    @property
    def flop(self) -> float:
        """Of the three products of the loss and its gradients."""
        return 3 * 2.0 * self.B * self.B * self.D


BATCHES = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
COMPARED = (512, 4096, 32768, 65536)  # batches at which others are timed, too
WIDTHS = (128, 512)
PRODUCTS = ("bf16", "ieee", "tf32", "fp16")
FIRST = tuple(Timed(B, 128, products) for B in COMPARED[:3] for products in PRODUCTS[:2])
TINY = (Timed(33, 64, "bf16"), Timed(24, 16, "ieee", raw=True))  # where kernels are interpreted


def further() -> Iterator[Timed]:
    """All other problems that are timed if there is time."""
    for D in WIDTHS:
        for raw in (False, True):
            for B in BATCHES:
                for products in PRODUCTS:
                    if (problem := Timed(B, D, products, raw)) not in FIRST:
                        yield problem
