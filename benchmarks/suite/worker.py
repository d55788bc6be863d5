"""A process that times losses of the package it finds first; as a script it needs torch and ``cacr_kernels`` alone.

``versus.py`` starts one for each of two checkouts, each with its checkout first in ``PYTHONPATH``; they take turns.
A request is a line of JSON, and so is its answer:

    {"load": FILE, "loss": NAME, "options": {...}, "module": bool, "gradients": bool, "threads": n}   the first call
    {"calls": n}                                                                         seconds a call of n calls
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cacr_kernels

MODULES = {
    "cacr_loss": "CACRLoss",
    "cacr_queue_loss": "CACRQueueLoss",
    "cacr_momentum_loss": "CACRMomentumLoss",
    "supervised_cacr_loss": "SupervisedCACRLoss",
}
DIFFERENTIABLE = ("views", "queries", "embeddings")
Step = Callable[[], tuple[Tensor, ...]]


def step_of(loss: Callable[..., Tensor], tensors: dict[str, Tensor], gradients: bool) -> Step:
    """A call that gives the loss and, if wanted, the gradients of its embeddings; any gradient flows in."""
    inputs = {n: t.detach().clone().requires_grad_(gradients and n in DIFFERENTIABLE) for n, t in tensors.items()}
    leaves = [t for t in inputs.values() if t.requires_grad]
    first = [inputs.pop("views")] if "views" in inputs else []  # a module takes views without their name

    def step() -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.grad = None
        value = loss(*first, **inputs)
        if gradients:
            value.backward(torch.ones_like(value) if value.dim() else None)
        return value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)

    return step


def load(request: dict[str, Any]) -> tuple[Step, str]:
    """The step of a request, and the device it runs on."""
    tensors = torch.load(request["load"])
    options = dict(request["options"])
    torch.set_num_threads(request["threads"])
    if request["module"]:
        offset = {"key_offset": options.pop("key_offset")} if "key_offset" in options else {}
        loss = getattr(cacr_kernels, MODULES[request["loss"]])(**options)
        call: Callable[..., Tensor] = lambda *a, **k: loss(*a, **k, **offset)  # noqa: E731
    else:
        function = getattr(cacr_kernels, request["loss"])
        call = lambda *a, **k: function(*a, **k, **options)  # noqa: E731
    return step_of(call, tensors, request["gradients"]), str(next(iter(tensors.values())).device)


def finish(device: str) -> None:
    """Waits for a GPU, if it is one."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def main() -> None:
    """Answers requests until the other end closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    warnings.simplefilter("ignore")
    step: Step | None = None
    device = "cpu"
    print(json.dumps({"package": cacr_kernels.__file__, "version": cacr_kernels.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "load" in request:
                step, device = load(request)
                outputs = step()
                numbers = [float(x.double().sum()) for x in outputs] + [float(x.double().norm()) for x in outputs]
                answer: dict[str, Any] = {"numbers": numbers}
            else:
                assert step is not None
                finish(device)
                begin = time.perf_counter()
                for _ in range(request["calls"]):
                    step()
                finish(device)
                answer = {"seconds": (time.perf_counter() - begin) / request["calls"]}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
