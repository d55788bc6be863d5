"""Functions that run in several processes at once."""

from __future__ import annotations

import datetime
import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = datetime.timedelta(seconds=100)  # of a collective: where one rank has failed the others wait


def _work(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=LIMIT)
    try:
        torch.save(function(*arguments), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def in_processes(world: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns on each rank. They fork from a process that has imported torch."""
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "cacr_kernels"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    mp.start_processes(_work, (world, str(folder), function, arguments), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def failures(checks: dict[str, Callable[[], None]]) -> dict[str, str]:
    """What each check of this rank said; nothing if it passed."""
    found = {}
    for name, check in checks.items():
        dist.barrier()
        try:
            check()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    return found
