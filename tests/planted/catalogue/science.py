"""The experiment: training parts, pairing, choice of temperatures, intervals, results that are kept."""

from __future__ import annotations

from ..fault import Fault

HOME = "benchmarks/science/"
TESTS = "tests/benchmarks/test_science.py"
STATISTICS = "tests/benchmarks/test_science_statistics.py"
FOLDERS = "tests/benchmarks/test_science_folders.py"

FAULTS = (
    Fault(
        "science-one-class-is-always-rare",
        HOME + "data.py",
        text="np.random.default_rng([seed, 1])",
        replacement="np.random.default_rng([1])",
        why="a class that is hard passes for one that is rare",
        tests=f"{TESTS} -k permuted",
    ),
    Fault(
        "science-control-is-larger",
        HOME + "data.py",
        text="even_counts(sum(tail), classes)",
        replacement="[tail[0]] * classes",
        why="the balanced control differs in size, too",
        tests=f"{TESTS} -k one_size",
    ),
    Fault(
        "science-views-depend-on-the-temperature",
        HOME + "training.py",
        text="generator = view_generator(run.seed)",
        replacement="generator = view_generator(run.seed + int(100 * (run.temperature or 0)))",
        why="seeds are paired no longer",
        tests=f"{TESTS} -k paired",
    ),
    Fault(
        "science-grid-ends-at-its-edge",
        HOME + "design.py",
        text="if best == low and",
        replacement="if best < low and",
        why="a temperature at the edge of the grid is taken for the best",
        tests=f"{TESTS} -k edge",
    ),
    Fault(
        "science-interval-over-seeds-alone",
        HOME + "statistics.py",
        text="max(of_seeds + of_images - of_both, of_seeds, of_images)",
        replacement="of_seeds",
        why="intervals hold for these test images only",
        tests=STATISTICS,
    ),
    Fault(
        "science-interaction-adds",
        HOME + "analysis.py",
        text="of(LONG_TAILED) - of(BALANCED)",
        replacement="of(LONG_TAILED) + of(BALANCED)",
        why="what the control gains counts for imbalance",
        tests=f"{TESTS} -k interrupted_experiment",
    ),
    Fault(
        "science-cut-line-stays",
        HOME + "runs.py",
        text='whole = text[: text.rfind("\\n") + 1]',
        replacement="whole = text",
        why="an experiment that was killed while it wrote cannot go on",
        tests=f"{TESTS} -k interrupted_experiment",
    ),
    Fault(
        "science-pickles-run-code",
        HOME + "folders.py",
        text='raise pickle.UnpicklingError(f"a file of CIFAR holds no {module}.{name}")',
        replacement="return super().find_class(module, name)",
        why="a folder of images runs what its files say",
        tests=f"{FOLDERS} -k runs_nothing",
    ),
)
