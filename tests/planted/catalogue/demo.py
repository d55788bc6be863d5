"""The training demo: data, losses, accuracies, times."""

from __future__ import annotations

from ..fault import Fault

DATA, TRAINING = "benchmarks/demo/data.py", "benchmarks/demo/training.py"
EVALUATION, REPORT = "benchmarks/demo/evaluation.py", "benchmarks/demo/report.py"
TESTS = "tests/benchmarks/test_demo.py"

FAULTS = (
    Fault(
        "demo-imbalance-upside-down",
        DATA,
        text="train.append(rest[: len(rest) * (digit + 1) // CLASSES])",
        replacement="train.append(rest[: len(rest) * (CLASSES - digit) // CLASSES])",
        why="the digit 9 is rare instead of the digit 0",
        tests=TESTS,
    ),
    Fault(
        "demo-training-images-are-scored",
        DATA,
        text="rest = rows[HELD_OUT_PER_CLASS:]",
        replacement="rest = rows",
        why="held-out images are trained on",
        tests=TESTS,
    ),
    Fault(
        "demo-validation-on-held-out",
        DATA,
        text="train, test = validation_indices(train, labels)",
        replacement="train, _ = validation_indices(train, labels)",
        why="temperatures are chosen on the held-out part",
        tests=TESTS,
    ),
    Fault(
        "demo-temperature-multiplies",
        TRAINING,
        text="logits = z @ z.T / temperature",
        replacement="logits = z @ z.T * temperature",
        why="NT-Xent is trained with the inverse temperature",
        tests=TESTS,
    ),
    Fault(
        "demo-positives-among-negatives",
        TRAINING,
        text="negatives = logits.masked_fill(same, -math.inf)",
        replacement="negatives = logits.masked_fill(torch.eye(v * b, dtype=torch.bool), -math.inf)",
        why="NT-Xent has other positives in the denominator",
        tests=TESTS,
    ),
    Fault(
        "demo-gradients-add-up",
        TRAINING,
        text="    optimizer.zero_grad()\n",
        replacement="",
        why="gradients of earlier steps are never cleared",
        tests=TESTS,
    ),
    Fault(
        "demo-features-in-training-mode",
        TRAINING,
        text="self.eval()\n        features",
        replacement="features",
        why="accuracies depend on the batch the features are computed in",
        tests=TESTS,
    ),
    Fault(
        "demo-other-batches-for-the-second-loss",
        TRAINING,
        text="generator = torch.Generator().manual_seed(seed)",
        replacement="generator = torch.Generator().manual_seed(seed + len(loss))",
        why="the paired difference compares losses on different batches",
        tests=TESTS,
    ),
    Fault(
        "demo-history-is-a-sum",
        TRAINING,
        text="logged.get(name, 0.0) + value / steps_per_epoch",
        replacement="logged.get(name, 0.0) + value",
        why="logged figures are sums over the epoch",
        tests=TESTS,
    ),
    Fault(
        "demo-tail-is-the-head",
        EVALUATION,
        text="tail=fmean(per_class[:TAIL]),",
        replacement="tail=fmean(per_class[-TAIL:]),",
        why="the accuracy of the rarest classes is that of the most frequent",
        tests=TESTS,
    ),
    Fault(
        "demo-population-deviation",
        EVALUATION,
        text="stdev(values) if len(values) > 1 else None",
        replacement="stdev(values) * (1 - 1 / len(values)) ** 0.5 if len(values) > 1 else None",
        why="the deviation over seeds is that of a population",
        tests=TESTS,
    ),
    Fault(
        "demo-difference-the-other-way",
        EVALUATION,
        text="return Spread.of([a - b for a, b in zip(first, second, strict=True)])",
        replacement="return Spread.of([b - a for a, b in zip(first, second, strict=True)])",
        why="CACR minus NT-Xent has the wrong sign",
        tests=TESTS,
    ),
    Fault(
        "demo-sampling-error",
        EVALUATION,
        text="return math.sqrt(max(accuracy * (1.0 - accuracy), 0.0) / images)",
        replacement="return math.sqrt(max(accuracy * (1.0 - accuracy), 0.0)) / images",
        why="the sampling error is too small by the root of the number of images",
        tests=TESTS,
    ),
    Fault(
        "demo-share-of-the-loss",
        REPORT,
        text='"loss_share": median(inside / step for step, inside in pairs),',
        replacement='"loss_share": median(inside / (step + inside) for step, inside in pairs),',
        why="the share of the loss in a step is too small",
        tests=TESTS,
    ),
    Fault(
        "demo-tie-is-a-win",
        EVALUATION,
        text="abs(difference.mean) <= half",
        replacement="abs(difference.mean) <= 0",
        why="the title of the demo calls noise a result",
        tests=f"{TESTS} -k verdict",
    ),
    Fault(
        "demo-many-threads-on-a-busy-machine",
        "benchmarks/demo/threads.py",
        text="if median(steps) <= self.alone:",
        replacement="if median(steps) > 0:",
        why="on a busy machine the demo takes ten times as long",
        tests=f"{TESTS} -k busy",
    ),
)
