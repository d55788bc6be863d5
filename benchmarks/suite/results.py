"""Results as plain rows: JSON and CSV, and the comparison of two runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from benchmarks.host import quantile

from .cases import TEMPERATURES, BenchmarkCase
from .measure import Timing, ratios
from .rows import Row

SCHEMA = 2
LATER = (
    "inputs",
    "module",
    "round_ms",
    "predicted_ms",
    "processes",
    "cpu_ms",
    "collective_share",
    "needed_mib",
    "sent_mib",
)  # fields that older files lack: null in all of them
TIMED, SINGLE, SKIPPED = "timed", "called once", "left out"

# Column: what it holds. Every row has all of them; what was not measured is null (JSON) or empty (CSV).
FIELDS = {
    "case": "name of the case, by which two runs are matched",
    "row": "what was measured",
    "family": "cacr_kernels, baseline, products only, another function",
    "ours": "whether ratios are relative to this row",
    "status": "timed, called once (in the process that measures memory), or left out",
    "reason": "why it was left out",
    "loss": "the function",
    "V": "views", "B": "instances", "D": "features", "K": "queue entries", "M": "keys", "C": "classes",
    "options": "of the loss",
    "inputs": "how the embeddings are made",
    "module": "whether modules were called, which normalise, on raw rows of any length",
    "mode": "loss, or loss+gradients",
    "dtype": "of the inputs", "threads": "CPU threads", "device": "cpu or a GPU",
    "rounds": "measured",
    "round_ms": "a call's time in each round, in order; those of all rows of a case took turns",
    "p20_ms": "20 % of the rounds are faster", "p50_ms": "median", "p80_ms": "80 % of the rounds are faster",
    "cold_ms": "first call of a fresh process, compiler caches empty",
    "warm_ms": "first call of a fresh process, compiler caches filled; null for rows without",
    "single_ms": "the one measured call of the process that measures memory",
    "ratio": "time over ours, median over the rounds", "ratio_p20": "its 20 %", "ratio_p80": "its 80 %",
    "gflops": "operations of the products (see BenchmarkCase.flop) per second, 1e9; for rows of another function null",
    "predicted_ms": "on a GPU: reckoned from counts of compiled code; null where nothing was counted",
    "processes": "that share the batch, each with as many threads; null where there is one",
    "cpu_ms": "median of the processor's time of a step, all threads of the process that needs most",
    "collective_share": "of a step: starting collectives and waiting in them, median over ranks and steps",
    "needed_mib": "MiB that a rank has to send in a step, by the sizes of its collectives",
    "sent_mib": "MiB that a rank did send in a step, as the system counts them",
    "peak_gflops": "of fused multiply-adds in registers, same dtype and threads (times processes, up to all cores)",
    "peak_source": "how it was measured",
    "mm_gflops": "of a large torch.mm, same dtype and threads",
    "fraction": "gflops over peak_gflops",
    "bandwidth_gbs": "of a large copy with as many threads",
    "memory_mib": "peak above the inputs, gradients included", "memory_reason": "why there is no such figure",
    "loss_error": "of the gate, against float64", "gradient_error": "of the gate, against float64",
    "machine": "processor or GPU", "cores": "usable", "platform": "operating system",
    "isa": "of the CPU kernels", "torch_isa": "of PyTorch",
    "python": "version", "torch": "version", "version": "of cacr_kernels", "commit": "of the sources",
    "load": "average number of running processes in the minute before the run", "date": "UTC",
}  # fmt: skip


def record(case: BenchmarkCase, row: Row, is_ours: bool, environment: dict[str, Any], **found: Any) -> dict[str, Any]:
    """A result with every field."""
    fields: dict[str, Any] = dict.fromkeys(FIELDS)
    fields |= {"case": case.key, "row": row.name, "family": row.family, "ours": is_ours, "status": TIMED, "reason": ""}
    fields |= {"loss": case.problem.loss, **case.problem.shape}
    fields["options"] = " ".join(f"{k}={v}" for k, v in case.problem.options.items())
    fields |= {"inputs": case.inputs_kind, "module": case.module}
    fields |= {"mode": case.mode, "dtype": case.dtype, "threads": case.threads, "device": case.device}
    return fields | environment | found


def figures(case: BenchmarkCase, row: Row, timing: Timing, ours: Timing | None) -> dict[str, Any]:
    """What is derived from the times of a row."""
    p20, p50, p80 = (timing.quantile(q) for q in (0.2, 0.5, 0.8))
    found: dict[str, Any] = {"p20_ms": 1e3 * p20, "p50_ms": 1e3 * p50, "p80_ms": 1e3 * p80}
    found["rounds"] = len(timing.rounds)
    found["round_ms"] = [float(f"{1e3 * timing.rounds[r]:.6g}") for r in sorted(timing.rounds)]
    if ours is not None:
        by_round = ratios(timing, ours)
        names = ("ratio_p20", 0.2), ("ratio", 0.5), ("ratio_p80", 0.8)
        found |= {name: quantile(by_round, q) for name, q in names}
    if row.checked:  # other functions do other work, the bare products more
        found["gflops"] = case.flop / p50 / 1e9
    return found


def write(directory: Path, rows: list[dict[str, Any]], environment: dict[str, Any], suite: str) -> tuple[Path, Path]:
    """Writes ``results.json`` and ``results.csv`` into the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    as_json, as_csv = directory / "results.json", directory / "results.csv"
    data = {"schema": SCHEMA, "suite": suite, "environment": environment, "fields": FIELDS, "rows": rows}
    as_json.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with as_csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(FIELDS))
        writer.writeheader()
        writer.writerows(row | {"round_ms": _listed(row["round_ms"])} for row in rows)
    return as_json, as_csv


def _listed(values: list[float] | None) -> str | None:
    return None if values is None else " ".join(map(str, values))


def read(path: Path) -> dict[str, Any]:
    """What ``write`` wrote; ``ValueError`` with a sentence for anything else."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA or not all(set(FIELDS) - set(LATER) <= set(row) for row in data["rows"]):
            raise ValueError(f"{path} has another schema than {SCHEMA}")
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no results file: {type(error).__name__}: {error}") from error
    data["rows"] = [dict.fromkeys(LATER) | row for row in data["rows"]]
    return data


def problem_label(row: dict[str, Any]) -> str:
    """What a problem is, for people: without the temperatures."""
    shape = " ".join(f"{k}={row[k]}" for k in ("V", "B", "D", "K", "M", "C") if row[k] is not None)
    usual = {f"{k}={v}" for k, v in TEMPERATURES.items()}
    options = " ".join(option for option in row["options"].split() if option not in usual)
    return ", ".join(filter(None, (f"{row['loss']} {shape}", options)))


def where(row: dict[str, Any]) -> str:
    """The threads or the device that a row was measured on."""
    return f"{row['threads']} thread{'s' * (row['threads'] > 1)}" if row["device"] == "cpu" else str(row["device"])


def label(row: dict[str, Any]) -> str:
    """What a case is, for people."""
    kind = [row["inputs"]] if row["inputs"] else []
    called = ["module"] if row["module"] else []
    return ", ".join((problem_label(row), row["dtype"], row["mode"], *called, where(row), *kind))
