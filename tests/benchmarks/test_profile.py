"""Where the time of a call goes: what is read of perf's samples, and what stands in the table."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.suite import __main__ as command
from benchmarks.suite import cases, profile
from benchmarks.suite.cases import BenchmarkCase
from benchmarks.suite.peak import Peaks
from benchmarks.suite.profile import FRAMEWORK, OURS, POSITIVES, PRODUCTS, ROWS, SOFTMAX, WAITING, Profile, Sample
from cacr_kernels.backends.library import cpu_library
from tests.benchmarks.benchmarking import TINY

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

LIBRARY = "/somewhere/cacr_kernels/_C_cpu.abi3.so"
SCRIPT = f"""\
  101     7f00aa11 cacr::amx::similarity_panel<float, 128l> ({LIBRARY})
  101     7f00aa12 cacr::amx::tile_gradient<float, 1, true, false, false, false> ({LIBRARY})
  102     7f00aa13 void cacr::avx2::query_gradient_panel<float> ({LIBRARY})
  101     55550001 _PyEval_EvalFrameDefault (/usr/lib/libpython3.11.so.1.0 (deleted))
  102 ffffffff8100 exc_page_fault ([kernel.kallsyms])
  102     7f00bb00 [unknown] (/usr/lib/libgomp-24e2ab19.so.1.0.0)
"""


def test_samples_are_read_as_perf_prints_them() -> None:
    found = profile.read_samples(SCRIPT)
    assert [s.thread for s in found] == [101, 101, 102, 101, 102, 102]
    assert found[0] == Sample(101, "cacr::amx::similarity_panel<float, 128l>", LIBRARY)
    assert [profile.part_of(s) for s in found] == [PRODUCTS, SOFTMAX, PRODUCTS, FRAMEWORK, FRAMEWORK, WAITING]


def test_every_function_of_the_kernels_has_a_part() -> None:
    """The symbols of the compiled library: what is left over calls the others."""
    expected = {
        PRODUCTS: ("similarity_panel_in_parts", "key_gradient_panel", "multiply_query_gradients"),
        SOFTMAX: ("add_statistics", "finish_detached_row", "weigh_tile", "move_means", "round_weights"),
        ROWS: ("pack_queries", "pack_norms", "squared_norm", "to_raw_rows", "add_query_gradients", "reduce"),
        POSITIVES: ("Aligned", "replace_close", "meet_positives"),
    }
    library = cpu_library()
    if not library.loaded or shutil.which("nm") is None:
        pytest.skip("needs the compiled library and nm")
    said = subprocess.run(["nm", "-C", str(library.path)], capture_output=True, text=True, check=True).stdout
    kernels = re.compile(r"^[0-9a-f]+ [tTwW] (.*\bcacr::(?:portable|avx2|avx512|avx512_bf16|amx)::.*)$", re.MULTILINE)
    parts = {symbol: profile.part_of(Sample(1, symbol, LIBRARY)) for symbol in kernels.findall(said)}
    for part, names in expected.items():
        for name in names:
            found = {parts[symbol] for symbol in parts if re.search(rf"::{name}\b", symbol)}
            assert found == {part} or (not found and name == "round_weights"), (name, found)
    callers = r"strip|detached_block|detached_keys|kernels_|_scratch|BlockScratch|layout|Interrupt"
    rest = [symbol for symbol, part in parts.items() if part == OURS and not re.search(callers, symbol)]
    assert rest == []


def test_shares_are_of_the_time_of_all_threads() -> None:
    """The calling thread has a sample whenever the clock ticks; another one that sleeps has none, and waits."""
    busy = [Sample(1, "cacr::amx::similarity_panel<float>", LIBRARY)] * 6 + [Sample(1, "f", "libpython.so")] * 2
    other = [Sample(2, "cacr::amx::similarity_panel<float>", LIBRARY)] * 4
    shares = profile.shares_of(busy + other, caller=1, threads=2)
    assert shares[PRODUCTS] == 10 / 16
    assert shares[FRAMEWORK] == 2 / 16
    assert shares[WAITING] == 4 / 16
    assert sum(shares.values()) == 1


def test_speeds_and_goals() -> None:
    case = BenchmarkCase(cases.raw(cases.cacr(2, 2048, 128)), threads=2, module=True)
    shares = dict.fromkeys(profile.PARTS, 0.0) | {PRODUCTS: 0.8, SOFTMAX: 0.2}
    found = Profile(case, case.flop / 200e9, shares, 400e9)
    assert found.of_peak == pytest.approx(0.5)
    assert found.of_peak_in_products == pytest.approx(0.625)
    assert profile.goal_of(case) == 86
    assert profile.goal_of(TINY) is None
    assert found.to_json()["goal"] == 86
    assert found._replace(shares=shares | {PRODUCTS: 0.1}).of_peak_in_products is None
    half = replace(case, dtype="bfloat16")
    assert Profile(half, case.flop / 200e9, shares, 400e9).of_peak_in_products is None  # the peak is that of float32


def test_without_perf_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile.why_not(lambda name: f"/usr/bin/{name}") is None
    reason = str(profile.why_not(lambda name: None))
    assert "needs perf" in reason
    monkeypatch.setattr(profile, "why_not", lambda: reason)
    assert command.main(["--profile", "--filter", "B=32 D=64"]) == 1
    assert reason in capsys.readouterr().out


FAKE = """#!{python}
import os, signal, sys, time
if sys.argv[1] == "record":
    out, pid = sys.argv[sys.argv.index("-o") + 1], sys.argv[sys.argv.index("-p") + 1]
    os.kill(int(pid), 0)  # the process is there
    open(out, "w").write(pid)
    signal.pause()
else:
    pid = open(sys.argv[sys.argv.index("-i") + 1]).read()
    print(f" {{pid}} 7f0000 cacr::amx::similarity_panel<float, 128l> ({library})")
    print(f" {{pid}} 7f0000 _PyEval_EvalFrameDefault (/usr/lib/libpython3.11.so)")
"""


def test_the_command_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for perf, which samples the process that calls."""
    fake = tmp_path / "perf"
    fake.write_text(FAKE.format(python=sys.executable, library=LIBRARY), encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    arguments = ["--profile", "--suite", "goals", "--filter", "V=2 B=64 module", "--seconds", "0.05"]
    assert command.main([*arguments, "--threads", "1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "Where the time of a call goes" in said
    (row,) = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))["rows"]
    assert row["shares"][PRODUCTS] == row["shares"][FRAMEWORK] == 0.5
    assert row["of_peak_in_products"] == pytest.approx(2 * row["of_peak"])
    assert row["ms"] > 0


def test_a_call_that_fails_is_a_row_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    bad = BenchmarkCase(cases.cacr(2, 9, 6, tau=1.0))
    found = profile.profile(bad, 0.01, Peaks())
    assert "TypeError" in found.reason
    profile.show(Console(width=200), [found])
    assert "TypeError" in capsys.readouterr().out
    assert found.to_json()["reason"] == found.reason


def test_the_table_of_the_notes_is_that_of_the_committed_file() -> None:
    """benchmarks/NOTES.md shows what the module prints of it."""
    results = Path(profile.__file__).parents[1] / "results" / "xeon-avx512" / "profile.json"
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    table = profile.markdown(rows)
    assert table in Path(profile.__file__).parents[1].joinpath("NOTES.md").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 2 + sum(row["goal"] is not None for row in rows)
    assert profile.markdown([{"goal": 80, "reason": "failed"}]).count("\n") == 1


def test_the_module_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "profile.json"
    shares = dict.fromkeys(profile.PARTS, 0.0) | {PRODUCTS: 0.75, ROWS: 0.05, WAITING: 0.2}
    row = {"name": "a loss", "goal": 80.0, "reason": "", "of_peak": 0.6, "of_peak_in_products": 0.8, "shares": shares}
    file.write_text(json.dumps({"rows": [row]}), encoding="utf-8")
    profile.main([str(file)])
    assert "| a loss | 80 | 60 | 80 | 75 | 0 | 5 | 20 | 0 |" in capsys.readouterr().out
