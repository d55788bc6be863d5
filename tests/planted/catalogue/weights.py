"""The weights that a loss gives: ``cacr_kernels/weights.py``."""

from __future__ import annotations

from ..fault import Fault

FILE = "cacr_kernels/weights.py"
TESTS = "tests/losses/test_weights.py"

FAULTS = (
    Fault(
        "weights-total-does-not-shrink",
        FILE,
        text="total = total * (top - base).exp() + (logit - base).exp().sum(1, keepdim=True)",
        replacement="total = total + (logit - base).exp().sum(1, keepdim=True)",
        why="weights are too small where a later block of keys holds a closer one",
        tests=TESTS,
    ),
    Fault(
        "weights-places-in-a-later-block",
        FILE,
        text="for keys in torch.arange(k.shape[0], dtype=torch.int64, device=q.device).split(keys_per_block):",
        replacement="for keys in (torch.arange(len(b), device=q.device) for b in k.split(keys_per_block)):",
        why="indices of a later block of keys count from its beginning, and so do its keys",
        tests=TESTS,
    ),
    Fault(
        "weights-own-instance",
        FILE,
        text="logit = logit.masked_fill(some[:, None] % batch == keys % batch, -torch.inf)",
        replacement="logit = logit.masked_fill(some[:, None] == keys, -torch.inf)",
        why="pooled: other views of the instance pass for negatives",
        tests=TESTS,
    ),
    Fault(
        "weights-infinite-cost",
        FILE,
        text="logit = logit.clamp(min=torch.finfo(logit.dtype).min)",
        replacement="logit = logit.clamp(min=-torch.inf)",
        why="a query whose negatives are all infinitely far gets NaN",
        tests=TESTS,
    ),
    Fault(
        "weights-as-many-as-there-are",
        FILE,
        text="most = min(top_k, k.shape[0] - k.shape[0] // batch)",
        replacement="most = min(top_k, k.shape[0] - 1)",
        why="pooled: more negatives are listed than there are, with weight 0",
        tests=TESTS,
    ),
    Fault(
        "weights-half-types",
        FILE,
        text="z = z.to(arithmetic_dtype(z))",
        replacement="z = z if z.dtype == torch.bfloat16 else z.to(arithmetic_dtype(z))",
        why="weights of bfloat16 views are computed in bfloat16",
        tests=TESTS,
    ),
    Fault(
        "weights-last-query-out-of-range",
        FILE,
        text="if bool(((index < 0) | (index >= rows)).any()):",
        replacement="if bool(((index < 0) | (index > rows)).any()):",
        why="a query beyond the last one is not refused in words",
        tests=TESTS,
    ),
)
