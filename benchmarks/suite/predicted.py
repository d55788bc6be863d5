"""What ``benchmarks.codegen`` predicts for a row on a GPU, to stand beside what was measured there."""

from __future__ import annotations

import functools
import importlib.util

import torch

from benchmarks.codegen import predict, rows
from cacr_kernels.backends.precision import fp32_products

from .cases import GRADIENTS, BenchmarkCase

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def milliseconds(case: BenchmarkCase, backend: str) -> float | None:
    """The predicted time of a whole loss and its gradients on the GPU of the case; ``None`` where there is none."""
    if case.device == "cpu" or importlib.util.find_spec("triton") is None:
        return None
    return on(torch.cuda.get_device_name(case.device), case, backend)


def on(device_name: str, case: BenchmarkCase, backend: str) -> float | None:
    """The same for a GPU of that name; ``None`` for other losses, options and sizes than the prediction knows."""
    gpu = next((gpu for gpu in predict.GPUS if gpu.name in device_name), None)
    options = {name: value for name, value in case.problem.options.items() if not name.startswith("tau_")}
    normalize = options.pop("normalize", False)
    plain = case.problem.loss == "cacr_loss" and not options and case.mode == GRADIENTS
    if gpu is None or backend not in predict.LAUNCHES or not plain:
        return None
    V, B, D = (case.problem.shape[axis] for axis in "VBD")
    problem = predict.Problem(V, B, D, DTYPES.get(case.dtype) or fp32_products(), normalize)
    found = predict.predict(_rows(), backend, problem, gpu)
    return None if found is None else 1e3 * found.seconds


@functools.cache
def _rows() -> predict.Rows:
    return rows.load(rows.OUT / "codegen.json")
