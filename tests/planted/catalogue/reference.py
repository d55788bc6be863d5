"""The definition: ``cacr_kernels/reference.py``."""

from __future__ import annotations

from ..fault import Fault

FILE = "cacr_kernels/reference.py"
TESTS = "tests/losses/test_reference.py"

FAULTS = (
    Fault(
        "reference-entropy-of-empty-rows",
        FILE,
        text="return stats.entropy.sum() / stats.nonempty.sum().clamp(min=1)",
        replacement="return stats.entropy.mean()",
        why="the mean entropy counts queries without a set",
        tests=TESTS,
    ),
    Fault(
        "reference-merge-of-views",
        FILE,
        text="return rows * (num_views / sum(counts))",
        replacement="return rows / sum(counts)",
        why="rows of pairs are too small: their mean is no longer the mean of the pairs",
        tests=TESTS,
    ),
    Fault(
        "reference-ordered-pairs",
        FILE,
        text="if x < y or (ordered and x != y)]",
        replacement="if x < y or ordered]",
        why="under ordered pairs a view is compared with itself",
        tests=TESTS,
    ),
    Fault(
        "reference-rbf-batch-mean",
        FILE,
        text="return log_value.logsumexp(-1) - math.log(log_value.shape[-1])",
        replacement="return log_value.logsumexp(-1) - math.log(max(1, log_value.shape[-1] - 1))",
        why="the mean over the batch under rbf divides by B - 1",
        tests=TESTS,
    ),
    Fault(
        "reference-rbf-infinite-cost",
        FILE,
        text="log_value = log_value + 0.0 * repelled.value.detach()",
        replacement="log_value = log_value + 0.0 * repelled.lse.detach()",
        why="under rbf an infinite cost of a negative is hidden by its weight of zero",
        tests=TESTS,
    ),
    Fault(
        "reference-queue-temperature",
        FILE,
        text="logit = torch.where(in_queue, logit.detach(), logit)",
        replacement="logit = torch.where(in_queue, -tau_neg * c.detach(), logit)",
        why="detached logits of the queue pass a gradient to the temperature",
        tests=TESTS,
    ),
    Fault(
        "reference-queue-offset",
        FILE,
        text="not_self = index != torch.arange(batch, dtype=torch.int64, device=device)[:, None]",
        replacement="not_self = index != torch.arange(batch, device=device)[:, None] - queue.shape[0]",
        why="a query is its own negative, and one of the queue is not",
        tests=TESTS,
    ),
    Fault(
        "reference-momentum-weights",
        FILE,
        text="attracted = statistics((c_pos / temperature).detach().mT, c_pos.mT,",
        replacement="attracted = statistics((c_pos / temperature).mT, c_pos.mT,",
        why="the weights of the query views, detached as published, are differentiated",
        tests=TESTS,
    ),
    Fault(
        "reference-supervised-self",
        FILE,
        text="self = torch.arange(len(labels), dtype=torch.int64, device=labels.device)",
        replacement="self = None",
        why="an embedding is its own positive",
        tests=TESTS,
    ),
    Fault(
        "reference-supervised-product-form",
        FILE,
        text="c = difference_cost(embeddings[:, None], k)",
        replacement="c = pairwise_cost(embeddings, k)",
        why="close positives of one class lose their digits",
        tests=(TESTS, "tests/losses/test_functional_numbers.py"),
    ),
    Fault(
        "reference-nonempty-factor",
        FILE,
        text="factor = len(embeddings) * ranks.size / counts.to(c.dtype)",
        replacement="factor = counts.to(c.dtype) / (len(embeddings) * ranks.size)",
        why="supervised rows carry the share of queries with a set instead of its inverse",
        tests=TESTS,
    ),
    Fault(
        "reference-empty-row-nan",
        FILE,
        text="masked = torch.where(members | ~nonempty[..., None], logit, -math.inf)",
        replacement="masked = torch.where(members, logit, -math.inf)",
        why="an empty set makes NaN on the way, which a second derivative meets",
        tests=TESTS,
    ),
    Fault(
        "reference-ignored-keys",
        FILE,
        text="(labels != ignore_index)[:, None] & (k_labels != ignore_index)",
        replacement="(labels != ignore_index)[:, None]",
        why="embeddings to ignore are negatives",
        tests=TESTS,
    ),
    Fault(
        "reference-negative-of-itself",
        FILE,
        text="same, other = same & met, ~same & met",
        replacement="same, other = same & met, ~same",
        why="a query of another label in the reference set is its own negative",
        tests=TESTS,
    ),
)
