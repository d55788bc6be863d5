"""The report of ``python -m benchmarks.codegen``: CUDA kernels in it, and that the committed one is whole and right."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

from rich.console import Console

from benchmarks.codegen import cuda_kernels, cuda_way, report, sass, triton_kernels
from benchmarks.codegen.rows import KernelCase, device_of, problems
from cacr_kernels.backends.triton.table import tile_of
from tests.cuda_emulation.building import tool

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

ROOT = Path(__file__).resolve().parents[2]
REPORT = json.loads((report.OUT / "codegen.json").read_text(encoding="utf-8"))


# ---- CUDA kernels ----------------------------------------------------------------------------------------------------
def test_nothing_is_wrong_with_a_cuda_kernel() -> None:
    tool("nvcc")
    wanted = [case for case in cuda_kernels.cases() if (case.device, case.dtype) == ("A100", "fp16")]
    rows = cuda_kernels.build(wanted)
    assert [row[:5] for row in rows] == wanted
    for row in rows:
        assert problems(row) == []
        assert 128 < row.registers <= 255
        assert row.shared > 4 * 64 * 128  # two stages of both sides
        assert row.per_similarity["ex2"] == row.passes
        products = row.D / 64 * row.passes + (row.D / 64 * 2 if row.kernel == "gradients" else 0)
        assert row.per_similarity["tensor"] == products
        assert row.cycles[row.limit] > 0


def test_every_architecture_that_is_shipped() -> None:
    shipped = re.search(r"^CUDA_ARCHS = (.*)$", (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert shipped is not None
    assert tuple(device.arch for device in cuda_kernels.devices()) == ast.literal_eval(shipped[1])


def line(text: str) -> str:
    return f"        /*0000*/ {text} ;\n"


def loop(label: str, *body: str) -> str:
    return f".L_x_{label}:\n" + "".join(body) + line(f"@P0 BRA `(.L_x_{label})")


CHUNKS = loop("1", line("LDGSTS.E [R1], [R2]") * 8, line("HMMA.16816.F32 R1, R2, R3, R1") * 32)
DETOUR = line("@P1 BRA `(.L_x_2)") + line("FADD R1, R2, R3") * 9 + ".L_x_2:\n"
OTHER_SOFTMAX = line("@P1 BRA `(.L_x_3)") + line("MUFU.EX2 R1, R1") * 34 + ".L_x_3:\n"
STATISTICS = loop("0", line("NOP"), CHUNKS, DETOUR, line("MUFU.EX2 R1, R1") * 32, OTHER_SOFTMAX)


def test_the_shortest_way_leaves_out_what_a_branch_can() -> None:
    code = sass.parse_sass(STATISTICS)
    (main,) = [(a, b) for a, b in code.loops if a == 0]
    need = cuda_way.needs("bf16", 192, 64, 1, "statistics")
    found = cuda_way.shortest(cuda_way.Body(code, main, "bf16"), need)
    assert found == {"global": 3 * 8, "tensor": 3 * 32, "ex2": 32, "other": 1 + 3 + 1 + 1 + 1}


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        (line("HMMA.16816.F32 R1, R2, R3, R1") * 32, line("HMMA.16816.F32 R1, R2, R3, R1") * 31, "products"),
        (line("LDGSTS.E [R1], [R2]") * 8, line("LDGSTS.E [R1], [R2]") * 7, "no way"),
        (line("MUFU.EX2 R1, R1") * 32 + OTHER_SOFTMAX, line("MUFU.EX2 R1, R1") * 31, "no way"),
    ],
)
def test_what_cannot_be_read_is_refused(before: str, after: str, what: str) -> None:
    code = sass.parse_sass(STATISTICS.replace(before, after))
    (main,) = [(a, b) for a, b in code.loops if a == 0]
    need = cuda_way.needs("bf16", 192, 64, 1, "statistics")
    with pytest.raises(cuda_way.UnreadableError, match=what):
        cuda_way.shortest(cuda_way.Body(code, main, "bf16"), need)


# ---- the command -----------------------------------------------------------------------------------------------------
def test_the_command_keeps_other_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--jobs", "1", "--out", str(tmp_path), "--only"]
    assert report.main([*arguments, "triton, numbers, A100"]) == 0
    assert report.main([*arguments, "detached keys, inner product, H100, fp16, D=128"]) == 0
    assert list(report.load(tmp_path / "codegen.json")) == [
        "triton, detached keys, inner product, H100, fp16, D=128",
        "triton, numbers, A100, fp64",
    ]
    assert (tmp_path / "codegen.png").exists()
    assert "not timed" in capsys.readouterr().out


def test_without_nvcc_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(cuda_kernels, "nvcc", lambda: None)
    assert report.main(["--jobs", "1", "--out", str(tmp_path), "--only", "numbers, A100"]) == 0
    assert report.main(["--jobs", "1", "--out", str(tmp_path), "--only", "cuda, A100"]) == 0
    assert capsys.readouterr().out.count("There is no nvcc") == 2
    assert json.loads((tmp_path / "codegen.json").read_text())["nvcc"] is None


# ---- the committed report --------------------------------------------------------------------------------------------
def test_the_committed_report_is_whole() -> None:
    """Its rows are those of the matrix, in order; missing ones: ``python -m benchmarks.codegen``."""
    assert REPORT["timed"] is False
    assert REPORT["triton"]
    assert REPORT["nvcc"]
    rows = report.load(report.OUT / "codegen.json")
    assert [name for name in report.matrix() if name not in rows] == []
    assert list(rows) == list(report.matrix())
    assert [name for name, row in rows.items() if KernelCase(*row[:5]).name != name] == []


def test_the_committed_report_is_about_the_launch_table() -> None:
    """Tiles are those that would be launched now; if not, the rows have to be compiled again."""
    variants = {v.name: v for v in triton_kernels.variants()}
    other = []
    for name, row in report.load(report.OUT / "codegen.json").items():
        if row.backend == "triton" and (variant := variants.get(row.kernel)):
            family = device_of(row.device).family
            precision = "half" if row.dtype in ("bf16", "fp16") else row.dtype
            tile = tile_of(family, variant.kernel, precision, row.D, variant.two)  # type: ignore[arg-type]
            other += [name] if row.tile != tile._asdict() else []
    assert other == []


def test_nothing_in_the_committed_report_is_wrong() -> None:
    assert {name: row["problems"] for name, row in REPORT["rows"].items() if row["problems"]} == {}
    rows = report.load(report.OUT / "codegen.json")
    assert {name: found for name, row in rows.items() if (found := problems(row))} == {}


def test_the_docs_say_what_the_report_says() -> None:
    """If not: ``python -m benchmarks.codegen --docs``."""
    text = report.PAGE.read_text(encoding="utf-8")
    assert text.split(report.START)[1].split(report.END)[0].strip("\n") == report.wrapped(
        report.load(report.OUT / "codegen.json")
    )


def test_tables() -> None:
    rows = list(report.load(report.OUT / "codegen.json").values())
    console = Console(record=True, width=120)
    report.summary(rows, console)
    text = console.export_text()
    for device in report.DEVICES:
        assert f"{device.name}, D = 128" in text
    assert cuda_kernels.NOTE in text.replace("\n", " ")
