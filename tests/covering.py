"""Parameters of a test: every value, or every pair of values, of its axes; the other combinations are exhaustive."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

Chosen = frozenset[tuple[int, int]]  # of an axis, the place of a value


def _parts(combination: Sequence[int], strength: int) -> set[Chosen]:
    return {frozenset(part) for part in itertools.combinations(enumerate(combination), strength)}


def covering_set(sizes: Sequence[int], strength: int) -> list[tuple[int, ...]]:
    """Few combinations of ``range(size)`` of all ``sizes`` that hold what all combinations hold of ``strength`` axes.

    Each is one of those that add most, and of them the first whose values have been used least.
    """
    every = list(itertools.product(*map(range, sizes)))
    parts = {combination: _parts(combination, strength) for combination in every}
    missing: set[Chosen] = set().union(*parts.values())
    used: Counter[tuple[int, int]] = Counter()
    chosen = []
    while missing:
        best = max(every, key=lambda c: (len(parts[c] & missing), -sum(used[value] for value in enumerate(c))))
        missing -= parts[best]
        used.update(enumerate(best))
        chosen.append(best)
    return chosen


def covering(axes: Mapping[str, Mapping[str, Any] | Sequence[Any]], strength: int = 1) -> pytest.MarkDecorator:
    """Parametrizes a test with all combinations; those beyond a covering set have the mark ``exhaustive``.

    Args:
        axes: the values of each argument, by their ids or as they are.
        strength: 1 covers every value of an axis, 2 every pair of values of two axes.
    """
    named = [
        list(values.items()) if isinstance(values, Mapping) else [(str(value), value) for value in values]
        for values in axes.values()
    ]
    few = set(covering_set([len(values) for values in named], strength))
    parameters = []
    for at in itertools.product(*(range(len(values)) for values in named)):
        ids, values = zip(*(axis[i] for axis, i in zip(named, at, strict=True)), strict=True)
        marks = () if at in few else pytest.mark.exhaustive
        parameters.append(pytest.param(*values, id="-".join(ids), marks=marks))
    return pytest.mark.parametrize(tuple(axes), parameters)
