"""What the smoke step computes: every loss, small shapes first; and the sizes of the times."""

from __future__ import annotations

from typing import Any

from cacr_kernels import testing

TAUS = {"tau_pos": 1.0, "tau_neg": 2.0}
TIMED_BATCHES = (512, 4096, 32768)
TIMED_DTYPES = ("bfloat16", "float32")
FEATURES = 128


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
    queue(2, 13, 33, 67, weight_grad="full"),
    queue(2, 13, 33, 67, weight_grad="none"),
    momentum(2, 13, 19, 43, cost="sqeuclidean"),
    supervised(27, 11, 5, 41),
)
LARGE = (cacr(2, 307, 128), queue(2, 151, 128, 521), momentum(2, 127, 128, 387), supervised(307, 128, 9))
SMOKE = (*SMALL, *OPTIONS, *LARGE)
INTERPRETED = SMALL  # an interpreter takes seconds for more
DTYPES = ("float32", "bfloat16", "float16", "float64")


def timed(B: int) -> testing.Case:
    """The problem that is timed."""
    return testing.Case("cacr_loss", {"V": 2, "B": B, "D": FEATURES}, TAUS, learnable=False)
