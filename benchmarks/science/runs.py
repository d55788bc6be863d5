"""Carrying out runs: the file of results, one run, and many in several processes."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cacr_kernels import cacr_weights

from .data import Data, training_part
from .design import BALANCED, BASELINE, LONG_TAILED, PIXELS, PRIMARY, TUNE, Run, Setting, plan, tau_neg
from .probes import LINEAR, NEAREST, balanced_accuracy, linear_probe, nearest
from .training import Encoder, batches, curve, make_encoder, train, view_generator
from .views import draw_views

Record = dict[str, Any]
SHOWN_POSITIVES, SHOWN_NEGATIVES = 3, 6


class Results:
    """One line of JSON a run, after a first line that says what they are results of.

    Opening a file of another setting or of other images is refused. A last line that was cut short is dropped.
    """

    def __init__(self, path: Path, header: Record | None = None) -> None:
        self.path = path
        self.done: dict[Run, Record] = {}
        lines = _whole_lines(path)
        if not lines:
            if header is None:
                raise SystemExit(f"{path} holds no results")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
            lines = [header]
        self.header = lines[0]
        if header is not None and any(header[key] != self.header.get(key) for key in ("setting", "data")):
            raise SystemExit(f"{path} holds results of another setting or of other images: give another --out")
        for record in lines[1:]:
            self.done[Run(**record["run"])] = record

    def add(self, run: Run, record: Record) -> None:
        """Keeps a finished run, at once."""
        record = {"run": run._asdict(), **record}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.done[run] = record


def header(setting: Setting, data: Data, environment: Record) -> Record:
    """The first line of a file of results."""
    described = json.loads(json.dumps({**asdict(setting), "minutes": None}))
    parts = {name: len(getattr(data, name)) for name in ("pool", "validation", "test")}
    about = {
        "name": data.name, "digest": data.digest(), "shape": list(data.images.shape[1:]), "classes": data.classes,
        **parts, "test_labels": data.labels[data.test].tolist(),
    }  # fmt: skip
    return {"setting": described, "data": json.loads(json.dumps(about)), "environment": environment}


def _whole_lines(path: Path) -> list[Record]:
    """Lines that end, as JSON; the file is cut after the last of them."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def pack(correct: Tensor) -> str:
    """One bit an image, as hexadecimal digits."""
    return np.packbits(correct.cpu().numpy()).tobytes().hex()


def unpack(text: str, images: int) -> np.ndarray:
    """What :func:`pack` was given: bool [images]."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=images).astype(bool)


def carry_out(run: Run, setting: Setting, data: Data, device: torch.device) -> Record:
    """One run: training, then its scores."""
    start = time.perf_counter()
    record: Record = {}
    encoder: Encoder | None = None
    if run.stage == BASELINE:
        if run.arm != PIXELS:
            encoder = make_encoder(setting, data.images.shape[1], run.seed).to(device)
    else:
        trained = train(run, setting, data, device=device, dtype=torch.float32)
        encoder = trained.encoder
        record["loss"] = curve(trained.losses)
        if run.kind == LONG_TAILED and run.stage != TUNE:
            record["counts"] = training_part(data, run.kind, run.seed, setting.ratio).counts
    record |= scores(run, setting, data, encoder, device)
    if encoder is not None and is_shown(run, setting):
        record["example"] = example(run, setting, data, encoder, device)
    record["seconds"] = round(time.perf_counter() - start, 3)
    return record


def scores(run: Run, setting: Setting, data: Data, encoder: Encoder | None, device: torch.device) -> Record:
    """Of a run that tunes the validation accuracy, of another one which test images each probe gets right."""

    def features(rows: Tensor) -> Tensor:
        images = data.floats(rows).to(device)
        return images.flatten(1) if encoder is None else encoder.features(images)

    classes = len(data.classes)
    scored = data.validation if run.stage == TUNE else data.test
    x, y, on = features(data.pool), data.labels[data.pool].to(device), features(scored)
    truth = data.labels[scored].to(device)
    linear = linear_probe(x, y, on, classes)
    if run.stage == TUNE:
        return {"validation": balanced_accuracy(linear, truth, classes)}
    knn = nearest(x, y, on, classes, setting.neighbours)
    return {LINEAR: pack(linear == truth), NEAREST: pack(knn == truth)}


def is_shown(run: Run, setting: Setting) -> bool:
    """Whether the picture shows a query of this run."""
    return (run.arm, run.kind, run.views, run.seed) == (PRIMARY.first, LONG_TAILED, PRIMARY.views, setting.seeds[0])


def shown_views(run: Run, setting: Setting, data: Data) -> tuple[Tensor, Tensor]:
    """Rows [B] and views [V, B, channels, H, W] of a batch that the trained encoder is asked about."""
    part = training_part(data, run.kind or BALANCED, run.seed, setting.ratio)
    rows = next(batches(data, part, setting, run.seed))
    return rows, draw_views(data.floats(rows), run.views, view_generator(run.seed))


@torch.no_grad()
def example(run: Run, setting: Setting, data: Data, encoder: Encoder, device: torch.device) -> Record:
    """A query with its strongest positives and negatives, as ``cacr_weights`` has them.

    The query is the first of the batch; its view is the first, the negatives are of the second.
    """
    _, views = shown_views(run, setting, data)
    encoder.eval()
    z = encoder(views.flatten(0, 1).to(device)).view(*views.shape[:2], -1)
    found = cacr_weights(
        z, queries=[0], top_k=SHOWN_NEGATIVES, tau_pos=1.0, tau_neg=tau_neg(run.temperature), normalize=True
    )
    weights = found.attraction[0, 0]
    order = [u for u in weights.argsort(descending=True).tolist() if u != 0][:SHOWN_POSITIVES]
    return {
        "positives": [[u, round(float(weights[u]), 5)] for u in order],
        "negatives": [
            [j, round(w, 5)] for j, w in zip(found.indices[0, 0].tolist(), found.repulsion[0, 0].tolist(), strict=True)
        ],
        "negatives_view": found.pairs[0][1],
    }


_shared: dict[str, Any] = {}  # of a process of the pool: what all of its runs need


def _begin(setting: Setting, data: Data) -> None:
    torch.set_num_threads(1)
    _shared.update(setting=setting, data=data)


def _one(run: Run) -> Record:
    return carry_out(run, _shared["setting"], _shared["data"], torch.device("cpu"))


@dataclass
class Budget:
    """The time of a call."""

    seconds: float | None
    start: float = field(default_factory=time.perf_counter)

    def allows(self, run: Run, done: Mapping[Run, Record]) -> bool:
        """Whether a run would probably end in time, by the last ones with as many views."""
        if self.seconds is None:
            return True
        took = [float(record["seconds"]) for other, record in done.items() if other.views == run.views]
        return time.perf_counter() - self.start + max(took[-5:], default=0.0) < self.seconds


def carry_out_all(
    setting: Setting,
    data: Data,
    results: Results,
    *,
    workers: int,
    device: torch.device,
    budget: Budget,
    finished: Callable[[Run, Record], None],
) -> bool:
    """All runs that are left and fit into the budget; whether none is left.

    ``workers``: so many processes of one thread each; 0: one run after the other, in this process.
    """

    def keep(run: Run, record: Record) -> None:
        results.add(run, record)
        finished(run, record)

    if workers and plan(setting, results.done):
        return _in_processes(setting, data, results, workers, budget, keep)
    while waiting := plan(setting, results.done):
        for run in waiting:
            if not budget.allows(run, results.done):
                return False
            keep(run, carry_out(run, setting, data, device))
    return True


def _in_processes(
    setting: Setting,
    data: Data,
    results: Results,
    workers: int,
    budget: Budget,
    keep: Callable[[Run, Record], None],
) -> bool:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(setting, data))
    running: dict[Future[Record], Run] = {}
    try:
        while True:
            busy = set(running.values())
            waiting = [run for run in plan(setting, results.done) if run not in busy]
            for run in waiting[: workers - len(running)]:
                if budget.allows(run, results.done):
                    running[pool.submit(_one, run)] = run
            if not running:
                return not waiting
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                keep(running.pop(future), future.result())
    finally:
        pool.shutdown(cancel_futures=True)
