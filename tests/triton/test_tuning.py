"""Optional autotuning of the Triton kernels: what is chosen, where it is kept, and when nothing is timed.

Sweeps and times are made up here; ``tests/triton/interpreted/test_candidates.py`` runs the kernels.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from triton.runtime.errors import OutOfResources

from cacr_kernels.backends.kept import cache_dir
from cacr_kernels.backends.triton import launch, pairs, table, tuning
from cacr_kernels.backends.triton.table import Processor, Tile

ROOT = Path(__file__).parents[2]
FAMILIES = ("sm_80", "sm_90", "sm_100", "sm_120", "cdna3", "cdna", "interpreter")
ENTRY = table.tile_of("interpreter", "statistics", "ieee", 33, False)


def make(N: int = 7, M: int = 5, D: int = 33, dtype: torch.dtype = torch.float32, kinds: tuple[int, ...] = (0,)) -> Any:
    """Pairs of sets, of which no kernel will see anything."""
    q, k = torch.zeros(1, N, D, dtype=dtype), torch.zeros(1, M, D, dtype=dtype)
    norm = torch.zeros(1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    ids = torch.zeros(1, dtype=torch.int32)
    return pairs.SetPairs(q, k, norm, norm, None, None, ids, ids, norm, ids, ids, kinds, False, False)


def sweep(sets: pairs.SetPairs, tile: Tile, *flags: bool) -> Tile:
    return tile


def other_sweep(sets: pairs.SetPairs, tile: Tile) -> Tile:
    return tile


class Timer:
    """Stands for ``tuning.measure``: a call takes what ``milliseconds`` says of its tile."""

    def __init__(self, milliseconds: Callable[[Tile], float]) -> None:
        self.milliseconds = milliseconds
        self.timed: list[Tile] = []

    def __call__(self, call: Callable[[], Any], device: torch.device) -> float:
        self.timed.append(call())
        return self.milliseconds(self.timed[-1])


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What a process knows is forgotten."""

    def forget() -> None:
        monkeypatch.setattr(tuning, "_chosen", {})
        monkeypatch.setattr(tuning, "_warned", [])

    forget()
    return forget


@pytest.fixture
def timer(forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Timer:
    """Autotuning is on, with an empty cache; tiles of 64 columns are fast."""
    timer = Timer(lambda tile: 1.0 if tile.block_n == 64 else 2.0)
    monkeypatch.setattr(tuning, "ON", True)
    monkeypatch.setattr(tuning, "measure", timer)
    monkeypatch.setenv("CACR_CACHE_DIR", str(tmp_path / "cache"))
    return timer


def kept(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "cache").glob("*"))]


# ---- what is chosen --------------------------------------------------------------------------------------------------
def test_the_fastest(timer: Timer, tmp_path: Path) -> None:
    fast = ENTRY._replace(block_n=64)
    assert tuning.run(make(), "statistics", sweep) == fast
    assert timer.timed == tuning.candidates("statistics", "ieee", 33, ENTRY, "interpreter")
    assert timer.timed[0] == ENTRY
    assert fast in timer.timed
    (file,) = kept(tmp_path)
    assert Tile(**file["tile"]) == fast
    assert [entry["ms"] for entry in file["tried"]] == [timer.milliseconds(tile) for tile in timer.timed]
    count = len(timer.timed)
    assert tuning.run(make(), "statistics", sweep) == fast
    assert len(timer.timed) == count


def test_the_entry_of_the_table_if_nothing_is_faster(timer: Timer) -> None:
    timer.milliseconds = lambda tile: 1.0
    assert tuning.run(make(), "statistics", sweep) == ENTRY


@pytest.mark.parametrize("error", [OutOfResources(2, 1, "shared memory"), RuntimeError("PassManager::run failed")])
def test_tiles_that_fail_are_out_of_the_question(error: Exception, timer: Timer, tmp_path: Path) -> None:
    def failing(sets: pairs.SetPairs, tile: Tile) -> Tile:
        if tile.block_n == 64:
            raise error
        return tile

    timer.milliseconds = lambda tile: 1.0 if tile.block_n == 16 else 2.0
    assert tuning.run(make(), "statistics", failing) == ENTRY._replace(block_n=16)
    (file,) = kept(tmp_path)
    (failed,) = (entry for entry in file["tried"] if "failed" in entry)
    assert failed["block_n"] == 64
    assert str(error) in failed["failed"]


def test_tiles_that_spill_are_out_of_the_question(timer: Timer, tmp_path: Path) -> None:
    class Kernel:
        """Launches, and returns what Triton does."""

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            return lambda *, BLOCK_N, **_: SimpleNamespace(n_spills=8 * (BLOCK_N == 64))

    def spilling(sets: pairs.SetPairs, tile: Tile) -> Tile:
        launch.start(Kernel(), (1,), BLOCK_N=tile.block_n)
        return tile

    assert tuning.run(make(), "statistics", spilling) == ENTRY
    assert {"spills registers"} == {entry["failed"] for entry in kept(tmp_path)[0]["tried"] if "failed" in entry}
    assert all(tile.block_n != 64 for tile in timer.timed)


def test_the_entry_of_the_table_if_all_fail(timer: Timer, tmp_path: Path) -> None:
    def failing(sets: pairs.SetPairs, tile: Tile) -> Tile:
        if not timer.timed:  # but the last call, with what was chosen
            failures.append(tile)
        if len(failures) <= count:
            raise RuntimeError("out of memory")
        return tile

    failures: list[Tile] = []
    count = len(tuning.candidates("statistics", "ieee", 33, ENTRY, "interpreter"))
    assert tuning.run(make(), "statistics", failing) == ENTRY
    assert len(failures) == count + 1
    assert kept(tmp_path) == []


def test_an_error_of_this_package_shows(timer: Timer) -> None:
    def wrong(sets: pairs.SetPairs, tile: Tile) -> Tile:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        tuning.run(make(), "statistics", wrong)


def test_candidates_are_legal() -> None:
    """Few; and a tile that holds all features is operand of both products."""
    sizes = (1, 16, 17, 33, 64, 65, 128, 129, 257, 1031)
    for family, two, D in itertools.product(FAMILIES, (False, True), sizes):
        for kernel, rows in table.ONE_SOFTMAX.items():
            for precision in rows:
                entry = table.tile_of(family, kernel, precision, D, two)
                tiles = tuning.candidates(kernel, precision, D, entry, family)
                assert tiles[0] == entry
                assert len(set(tiles)) == len(tiles) <= 9
                for tile in tiles:
                    assert sum(a != b for a, b in zip(tile, entry, strict=True)) <= 1
                    assert min(tile.block_n, tile.block_d) >= 16
                    assert precision != "tf32x3" or tile.block_d == entry.block_d
                    assert tile.block_d <= max(table.LEAST_FEATURES, launch.power_of_two(D))
                    assert kernel == "statistics" or tile.chunks(D) > 1 or tile.block_out == tile.block_d


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("D", table.CLASSES)
def test_sweeps_share_the_chunks_of_three_tf32_products(D: int, two: bool) -> None:
    """By which they are rounded: where one key has all of the weight the gradient needs the bits of the statistics."""
    for family in FAMILIES:
        sizes = {table.tile_of(family, kernel, "tf32x3", D, two).block_d for kernel in ("statistics", "gradient")}
        assert len(sizes) == 1, family


@pytest.mark.parametrize("D", [1, 13, 16, 33, 64, 100, 300, 512, 513, 1000])
def test_candidates_are_those_of_the_key(D: int) -> None:
    """Whoever else has the key may have chosen."""
    for family, kernel in itertools.product(FAMILIES, table.ONE_SOFTMAX):
        full = tuning.features_of(D)
        found, of_key = (
            tuning.candidates(kernel, "half", d, table.tile_of(family, kernel, "half", d, False), family)
            for d in (D, full)
        )
        assert found == of_key


def test_keys_separate(timer: Timer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever changes the code or the processor, and the rough size."""
    calls: list[Callable[[], Any]] = [
        lambda: tuning.run(make(), "statistics", sweep),
        lambda: tuning.run(make(), "gradient", sweep),
        lambda: tuning.run(make(), "statistics", other_sweep),
        lambda: tuning.run(make(), "statistics", sweep, True),
        lambda: tuning.run(make(), "statistics", sweep, False),
        lambda: tuning.run(make(dtype=torch.float16), "statistics", sweep),
        lambda: tuning.run(make(dtype=torch.bfloat16), "statistics", sweep),
        lambda: tuning.run(make(dtype=torch.float64), "statistics", sweep),
        lambda: tuning.run(make(D=65), "statistics", sweep),
        lambda: tuning.run(make(kinds=(2,)), "statistics", sweep),
        lambda: tuning.run(make(kinds=(0, 2)), "statistics", sweep),
        lambda: tuning.run(make(N=70), "statistics", sweep),
    ]

    def timed(call: Callable[[], Any]) -> bool:
        timer.timed.clear()
        call()
        return bool(timer.timed)

    assert all(timed(call) for call in calls)
    assert not any(timed(call) for call in calls)
    assert len(kept(tmp_path)) == len(calls)
    assert not timed(lambda: tuning.run(make(N=8, D=40), "statistics", sweep))  # nearly the same size
    monkeypatch.setattr(tuning, "_name", lambda device: "another")
    assert timed(calls[0])
    monkeypatch.setattr(pairs, "processor_of", lambda device: Processor("sm_90", 132))
    assert timed(calls[0])
    monkeypatch.setattr(pairs, "fp32_products", lambda: "tf32")
    assert timed(calls[0])
    assert len(kept(tmp_path)) == len(calls) + 3


def test_an_empty_problem_is_not_timed(timer: Timer) -> None:
    assert tuning.run(make(N=0), "statistics", sweep) == ENTRY
    assert tuning.run(make(M=0), "statistics", sweep) == ENTRY
    assert timer.timed == []


def test_one_of_many_threads_times(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_read", lambda *_: None)
    timer.milliseconds = lambda tile: time.sleep(0.01) or float(tile.block_n)  # type: ignore[func-returns-value]
    found: list[Tile] = []
    threads = [threading.Thread(target=lambda: found.append(tuning.run(make(), "statistics", sweep))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 8
    assert len(timer.timed) == len(set(timer.timed))


def test_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton times on a GPU, where the median counts, whatever one call took. In the interpreter it is one call."""
    calls: list[Any] = []
    assert tuning.measure(lambda: calls.append(1), torch.device("cpu")) >= 0
    assert calls == [1]
    times = {"median": 3.0, "mean": 7.0}
    do_bench = lambda call, return_mode="mean": (call(), times[return_mode])[1]  # noqa: E731
    monkeypatch.setattr(importlib.import_module("triton.testing"), "do_bench", do_bench)
    assert tuning.measure(lambda: calls.append(2), torch.device("cuda")) == 3.0
    assert calls == [1, 2]


# ---- when nothing is timed -------------------------------------------------------------------------------------------
def test_off_unless_asked_for(timer: Timer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuning, "ON", tuning.asked())
    assert tuning.run(make(), "statistics", sweep) == ENTRY
    assert timer.timed == []
    assert tuning._chosen == {}
    assert kept(tmp_path) == []


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CACR_AUTOTUNE", raising=False)
    assert not tuning.asked()
    for value, on in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("CACR_AUTOTUNE", value)
        assert tuning.asked() is on
    for value in ("2", "yes", "true", " 1"):
        monkeypatch.setenv("CACR_AUTOTUNE", value)
        with pytest.raises(ValueError, match=f"CACR_AUTOTUNE is '{value}'; accepted: '0' .* '1'"):
            tuning.asked()


def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)


def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(tuning, "recording", lambda device: launch.recording(torch.device("cuda")))


@pytest.mark.parametrize("circumstance", [deterministic, capture])
def test_nothing_is_timed(
    circumstance: Callable[[pytest.MonkeyPatch], None], timer: Timer, tmp_path: Path, forget: Callable[[], None]
) -> None:
    """And the choice stays what it was, also where timing would be possible; what was timed before is used."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        circumstance(monkeypatch)
        assert tuning.run(make(), "statistics", sweep) == ENTRY
    assert tuning.run(make(), "statistics", sweep) == ENTRY
    assert timer.timed == []
    assert kept(tmp_path) == []
    forget()
    fast = tuning.run(make(), "statistics", sweep)
    assert fast != ENTRY
    timer.timed.clear()
    for prepare in (lambda: None, forget):  # in memory, on disk
        prepare()
        with pytest.MonkeyPatch.context() as monkeypatch:
            circumstance(monkeypatch)
            assert tuning.run(make(), "statistics", sweep) == fast
    assert timer.timed == []


# ---- on disk ---------------------------------------------------------------------------------------------------------
def test_a_later_process_reads(timer: Timer, forget: Callable[[], None]) -> None:
    fast = tuning.run(make(), "statistics", sweep)
    timer.timed.clear()
    forget()
    assert tuning.run(make(), "statistics", sweep) == fast
    assert timer.timed == []


def test_choices_are_those_of_these_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A changed source of any kernel makes the choices on the disk those of another version."""
    versions = tuning._versions
    kernel = tmp_path / "kernels" / "gradient.py"
    kernel.parent.mkdir()
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    found = []
    for text in ("one", "another", "one"):
        kernel.write_text(text, encoding="utf-8")
        versions.cache_clear()
        found.append(versions())
    versions.cache_clear()
    assert found[0] == found[2]
    assert found[0] != found[1]
    assert found[0] | {"source": ""} == found[1] | {"source": ""}


@pytest.mark.parametrize("versions", [{"triton": "9.9"}, {"source": "another"}, {"cacr_kernels": "9.9"}])
def test_another_version_does_not(
    versions: dict[str, str], timer: Timer, forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.run(make(), "statistics", sweep)
    timer.timed.clear()
    forget()
    changed = tuning._versions() | versions
    monkeypatch.setattr(tuning, "_versions", lambda: changed)
    tuning.run(make(), "statistics", sweep)
    assert timer.timed


TILE = ENTRY._asdict()
BAD = {
    "not JSON": "{",
    "not text": b"\xff\xfe\x00",
    "empty": "",
    "another form": "[1, 2]",
    "no tile": "{}",
    "a tile with other sizes": json.dumps({"tile": TILE | {"block_k": 1}}),
    "a number": json.dumps({"tile": 3}),
    "not a candidate": json.dumps({"tile": TILE | {"block_n": 4096}}),
}


@pytest.mark.parametrize("content", BAD.values(), ids=list(BAD))
def test_a_bad_file_is_ignored_and_replaced(
    content: str | bytes, timer: Timer, forget: Callable[[], None], tmp_path: Path
) -> None:
    fast = tuning.run(make(), "statistics", sweep)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    forget()
    with pytest.warns(RuntimeWarning, match=r"is ignored") as caught:
        assert tuning.run(make(), "statistics", sweep) == fast
    assert len(caught) == 1
    assert Tile(**kept(tmp_path)[0]["tile"]) == fast


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(30, "read-only file system"), None])
def test_a_folder_that_cannot_be_written(
    error: OSError | None, timer: Timer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One warning, and what was chosen is used."""

    def refuse(*args: Any, **options: Any) -> None:
        raise error  # type: ignore[misc]

    if error is None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("CACR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    else:
        monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.warns(RuntimeWarning, match="are not kept"):
        assert tuning.run(make(), "statistics", sweep).block_n == 64
    assert tuning.run(make(D=65), "statistics", sweep).block_n == 64


def test_a_file_that_cannot_be_read(timer: Timer, forget: Callable[[], None], tmp_path: Path) -> None:
    fast = tuning.run(make(), "statistics", sweep)
    (file,) = (tmp_path / "cache").iterdir()
    file.unlink()
    file.mkdir()
    forget()
    with pytest.warns(RuntimeWarning, match="is ignored"):  # and not replaced, about which nothing more is said
        assert tuning.run(make(), "statistics", sweep) == fast


@pytest.mark.parametrize(("where", "function"), [(tuning.json, "dump"), (Path, "replace")])
def test_what_is_not_finished_does_not_stay(
    where: Any, function: str, timer: Timer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(where, function, full)
    with pytest.warns(RuntimeWarning, match="no space left"):
        tuning.run(make(), "statistics", sweep)
    assert list((tmp_path / "cache").iterdir()) == []


def test_where_choices_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CACR_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_dir() == tmp_path / ".cache" / "cacr_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its standard
    assert cache_dir() == tmp_path / ".cache" / "cacr_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "cacr_kernels"
    monkeypatch.setenv("CACR_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CACR_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert cache_dir().is_absolute()


WRITER = """
import sys
import tests.triton.test_tuning as here
from cacr_kernels.backends.triton import tuning
timer = here.Timer(lambda tile: 1.0 if tile.block_n == 64 else 2.0)
tuning.measure = timer
print("ready", flush=True)
sys.stdin.readline()  # both start at once
for size in range(12):
    for kind in (0, int(sys.argv[1])):
        here.tune(size, kind)
"""


def tune(size: int, kind: int) -> None:
    tuning.run(make(N=4**size, M=1, D=1, kinds=(kind,)), "statistics", sweep)


def test_processes_that_write_at_once(timer: Timer, tmp_path: Path) -> None:
    """All choices survive, of different keys and of the same; who comes later times nothing."""
    environment = os.environ | {"CACR_AUTOTUNE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT)])}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    commands = ([sys.executable, "-W", "error", "-c", WRITER, kind] for kind in "12")
    processes = [subprocess.Popen(c, env=environment, text=True, cwd=tmp_path, **pipes) for c in commands]
    assert [process.stdout.readline() for process in processes] == 2 * ["ready\n"]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate()[1] for process in processes]
    assert errors == ["", ""]
    assert len(kept(tmp_path)) == 36
    assert all(file["tile"]["block_n"] == 64 for file in kept(tmp_path))
    for size, kind in itertools.product(range(12), range(3)):
        tune(size, kind)
    assert timer.timed == []


# ---- as reported -----------------------------------------------------------------------------------------------------
def test_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    main = importlib.import_module("cacr_kernels.__main__").main

    def line() -> str:
        main([])
        return next(x for x in capsys.readouterr().out.splitlines() if x.startswith("Triton autotuning"))

    monkeypatch.setenv("CACR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "ON", False)
    assert "off" in line()
    assert "CACR_AUTOTUNE=1" in line()
    monkeypatch.setattr(tuning, "ON", True)
    assert f"on, choices kept in {tmp_path}" in line()
    main(["--json"])
    assert json.loads(capsys.readouterr().out)["autotune"] == {"on": True, "cache": str(tmp_path), "error": None}


def test_nonsense_is_reported_and_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, interpreter: None
) -> None:
    """The report says so; a loss that uses Triton raises."""
    monkeypatch.setenv("CACR_AUTOTUNE", "maybe")
    monkeypatch.delitem(sys.modules, tuning.__name__)
    importlib.import_module("cacr_kernels.__main__").main([])
    assert "CACR_AUTOTUNE is 'maybe'" in capsys.readouterr().out
    code = "import torch, cacr_kernels as c; c.cacr_loss(torch.ones(2, 3, 4), backend='triton')"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "ValueError: the environment variable CACR_AUTOTUNE is 'maybe'" in refused.stderr
