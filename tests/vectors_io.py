"""The numbers of the published implementation, for the tests of every backend (`tests/vectors/README.md`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

VECTORS = Path(__file__).parent / "vectors"


class Vector(NamedTuple):
    """One case: ``meta`` holds its parameters, ``arrays`` its float64 inputs and outputs."""

    name: str
    meta: dict[str, Any]
    arrays: dict[str, Tensor]


def load_vectors(case: str) -> list[Vector]:
    """All vectors of ``case`` ("views", "rbf", "queue", "momentum" or "options"), in the order of their names."""
    paths = sorted(VECTORS.glob(f"{case}_*.npz"))
    if not paths:
        raise FileNotFoundError(f"no vectors of case {case!r} in {VECTORS}")
    return [_load(path) for path in paths]


def _load(path: Path) -> Vector:
    with np.load(path) as file:
        arrays = {key: torch.from_numpy(np.array(file[key])) for key in file.files if key != "meta"}
        return Vector(path.stem, json.loads(str(file["meta"])), arrays)


def vector_id(vector: Vector) -> str:
    """Name of a vector for ``pytest.mark.parametrize(..., ids=vector_id)``."""
    return vector.name
