"""Predicted times: the arithmetic with made-up kernels, what is launched, and the committed table."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

from benchmarks.codegen import predict, predicted, report
from benchmarks.codegen.predict import GPUS, Gpu, Launch, Problem, Sweep, Whole
from benchmarks.codegen.rows import KernelCase, Row
from cacr_kernels.backends.triton.table import tile_of

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

H200 = next(gpu for gpu in GPUS if gpu.name == "H200")  # 132 cores, 1.83 GHz
TILE = {"block_m": 64, "block_n": 32, "block_d": 128, "num_warps": 4, "num_stages": 2, "block_out": 128}


def made_up(D: int = 128, kernel: str = "gradient", passes: int = 1, device: str = "H100", **per: float) -> Row:
    """A kernel with known counts; every product instruction is a large one."""
    counts = {"tensor": 0.5, "ex2": 1.0, "other": 10.0} | per
    return Row(
        "cuda", kernel, device, "bf16", D, TILE, 128, 0, 0, 1024, 8, {}, 1, passes, counts, {}
    )  # fmt: skip


def added(row: Row, **change: float) -> predict.Predicted | None:
    case, problem = KernelCase(*row[:5]), Problem(2, 1000, row.D, "bf16")
    sweep = Sweep(case, 3, problem.similarities)._replace(**change)  # type: ignore[arg-type]
    return predict.add_up({case.name: row}, Whole([Launch(4.8e6, sweep)], 1, 3e-6), problem, H200)


def test_the_slowest_unit_sets_the_time() -> None:
    """Clocks by hand: issue (1 + 10) / 128, ex2 1 / 16, products 2 * 128 * (1 + 3) / 4096, L2 2 * 128 / 64 / 64."""
    assert predict.clocks(H200, made_up(), 3) == {
        "ex2": 1 / 16, "fp32": 0.0, "fp64": 0.0, "issue": 11 / 128, "L2": 4 / 64, "tensor": 0.25,
    }  # fmt: skip
    found = added(made_up())
    assert found is not None
    assert found.by_unit == {"tensor": pytest.approx(0.25 * 1e6 / (132 * 1.83e9))}
    assert found.seconds == pytest.approx(0.25 * 1e6 / (132 * 1.83e9) + 3e-6)
    assert found.share == pytest.approx(3 * 2 * 1e6 * 128 / found.seconds / (132 * 1.83e9 * 4096))
    issue = added(made_up(other=63.0))
    assert issue is not None
    assert issue.by_unit == {"issue": pytest.approx(0.5 * 1e6 / (132 * 1.83e9))}
    few = added(made_up(), programs=133)  # one core has two of them
    assert few is not None
    assert few.by_unit["tensor"] == pytest.approx(0.25 * 1e6 * 2 / 133 / 1.83e9)
    memory = predict.add_up({}, Whole([Launch(4.8e9)], 1, 0.0), Problem(2, 8, 128, "bf16"), H200)
    assert memory is not None
    assert memory.by_unit == {"memory": pytest.approx(1e-3)}


def test_small_product_instructions_have_a_rate_of_their_own() -> None:
    """An mma.sync has 4096 FLOP of a warp: 2 * 128 * 4 FLOP of a similarity are 8 of a thread."""
    small = predict.clocks(H200, made_up(tensor=8.0), 3)
    assert small["tensor"] == pytest.approx(0.25 / H200.mma_sync)
    assert predict.clocks(H200, made_up(tensor=7.9), 3)["tensor"] == 0.25


def test_a_product_with_a_block_forms_no_similarity() -> None:
    """A coefficient and 128 / 64 features of other rows for every 128 of its own: 2 * 2 * (1 + 2) bytes at D = 256."""
    row = made_up(256, kernel="product", passes=2)._replace(exponentials=0)
    found = predict.clocks(H200, row, 1)
    assert found["tensor"] == 2 * 256 / 4096
    assert found["L2"] == 12 / 64


def test_blocks_are_what_their_launches_see() -> None:
    """Of 9000 rows a block of 8192 and one of 896: four blocks, of which each is seen by three launches."""
    whole = predict.triton_launches(Problem(2, 9000, 256, "bf16"), H200)
    assert whole is not None
    sweeps = [(launch.bytes, launch.sweep) for launch in whole.launches if launch.sweep]
    assert [sweep.case.kernel for _, sweep in sweeps[1:4]] == [
        "block of coefficients, raw rows",
        "product with a block, queries, raw rows",
        "product with a block, keys, raw rows",
    ]
    assert [sweep.similarities for _, sweep in sweeps[1::3]] == [8192**2, 8192 * 896, 896 * 8192, 896**2]
    block = 2 * (8192**2 + 256 * 2 * 8192)
    assert [moved for moved, _ in sweeps[1:3]] == [block, block + 2 * 4 * 256 * 8192]
    assert [sweep.programs for _, sweep in sweeps[1:4]] == [64 * 16, 64 * 2, 64 * 2]


def test_triangles_see_half_of_the_similarities() -> None:
    """Of 9000 pooled rows three of four blocks, five products in two roles each, and in blocks on the diagonal half."""
    whole = predict.triton_launches(Problem(2, 4500, 256, "bf16", pairing="pooled"), H200)
    assert whole is not None
    sweeps = [launch.sweep for launch in whole.launches if launch.sweep]
    assert sweeps[0].similarities == 9000**2
    names = [sweep.case.kernel.split(",")[0] for sweep in sweeps[1:]]
    block, product = "triangles of coefficients", "product with a block"
    assert names == [block, product, block, product, product, block, product]
    tile = tile_of("sm_90", "triangles", "half", 256, False)
    on_diagonal = [predict.triangle(side, 512, tile.block_m, tile.block_n)[0] for side in (8192, 896)]
    seen = [on_diagonal[0], 8192**2, *[8192 * 896] * 3, on_diagonal[1], 896**2]
    assert [sweep.similarities for sweep in sweeps[1:]] == seen
    assert 0.5 < on_diagonal[0] / 8192**2 < 0.51


def test_the_tiles_and_programs_of_a_triangle() -> None:
    """Counted one by one."""
    for side, split, m, n in ((1024, 256, 128, 64), (1024, 512, 64, 128), (896, 512, 128, 128)):
        tiles = [(i, j) for i in range(0, side, m) for j in range(0, side, n) if j + n > i]
        programs = {(i, j // split) for i, j in tiles}
        assert predict.triangle(side, split, m, n) == (len(tiles) * m * n, len(programs))


def test_pooled_rows_need_two_units() -> None:
    """As in ``benchmarks/suite``: similarities are symmetric."""
    assert Problem(3, 100, 64, "bf16", pairing="pooled").flop == 2 * 2 * 300**2 * 64
    assert Problem(3, 100, 64, "bf16").flop == 3 * 2 * 3 * 100**2 * 64


def test_counts_of_more_features_follow_from_two_rows() -> None:
    """A pass of 3 + 2 instructions a chunk, and as many passes as groups of 128 features."""
    rows = {}
    for D, chunks in ((256, 2), (512, 4)):
        row = made_up(D, passes=D // 128, other=D // 128 * (3.0 + 2 * chunks), tensor=float(D), ex2=D / 128)
        rows[KernelCase(*row[:5]).name] = row
    wanted = KernelCase("cuda", "gradient", "H100", "bf16", 700)
    found = predict.counted(rows, wanted)
    assert found is not None
    assert (found.D, found.passes) == (700, 6)
    assert found.per_similarity["other"] == 6 * (3 + 2 * 6)
    assert found.per_similarity["ex2"] == 6
    assert predict.counted(rows, wanted._replace(D=384)) is None  # no other number in between
    changed = {name: row._replace(tile=TILE | {"block_m": row.D}) for name, row in rows.items()}
    assert predict.counted(changed, wanted) is None
    assert predict.counted({}, wanted) is None


def test_what_is_not_counted_is_taken_from_the_code_of_another_processor_or_left_out() -> None:
    unread, a100 = made_up()._replace(per_similarity={}), made_up(device="A100")
    problem = Problem(2, 1000, 128, "bf16")
    whole = Whole([Launch(0.0, Sweep(KernelCase(*unread[:5]), 3, 1e6))], 1, 0.0)
    rows = {KernelCase(*row[:5]).name: row for row in (unread, a100)}
    found = predict.add_up(rows, whole, problem, H200)
    assert found is not None
    assert found.stand_in
    assert found.seconds == pytest.approx(0.25 * 1e6 / (132 * 1.83e9))  # at the rates of an H100
    assert predict.add_up({KernelCase(*unread[:5]).name: unread}, whole, problem, H200) is None


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_what_is_launched_is_what_the_backend_launches(gpu: Gpu) -> None:
    """Each pair of rows meets in every sweep once, and raw rows take the kernels for raw rows."""
    whole = predict.triton_launches(Problem(3, 4096, 128, "bf16"), gpu)
    raw = predict.triton_launches(Problem(3, 4096, 128, "bf16", normalize=False), gpu)
    assert whole is not None
    assert raw is not None
    found, unit = whole.launches, raw.launches
    assert (whole.number, whole.overhead) == (len(found), len(found) * predict.LAUNCH)
    sweeps = [launch.sweep for launch in found if launch.sweep]
    names = [sweep.case.kernel for sweep in sweeps]
    assert names[0] == "statistics, raw rows"
    assert len(names) >= 2
    assert all("gradient" in name and name.endswith("raw rows") for name in names[1:])
    assert all(sweep.case.device == gpu.code and sweep.similarities == 3 * 4096**2 for sweep in sweeps)
    assert len(found) > len(sweeps)
    assert len(unit) < len(found)
    assert not any(launch.sweep.case.kernel.endswith("raw rows") for launch in unit if launch.sweep)
    rows = report.load(report.OUT / "codegen.json")
    assert all(predict.counted(rows, sweep.case) for sweep in sweeps)


def test_the_committed_table_is_that_of_the_command(tmp_path: Path) -> None:
    """If not: ``python -m benchmarks.codegen --docs``."""
    rows = report.load(report.OUT / "codegen.json")
    committed = (report.OUT / report.PREDICTED).read_text(encoding="utf-8")
    assert committed == predicted.text(rows)
    page = report.PAGE.read_text(encoding="utf-8")
    assert page.split(predicted.START)[1].split(predicted.END)[0].strip("\n") == predicted.page(rows)
    gpus = {line.split(",")[1] for line in committed.splitlines()[1:]}
    assert gpus == {gpu.name for gpu in GPUS}
    for D in predicted.GOALS:
        assert f"Goal on H200, D = {D}, bf16" in page
