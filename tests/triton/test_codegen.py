"""Compiled Triton kernels, on a machine without a GPU: no spills, tensor cores, as few exponentials as promised.

A few rows of the matrix of ``python -m benchmarks.codegen``, one for every kernel, dtype and processor.
"""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from benchmarks.codegen import sass
from benchmarks.codegen import triton_kernels as codegen_triton
from benchmarks.codegen.rows import KernelCase, Row, problems
from cacr_kernels.backends.triton import table
from cacr_kernels.backends.triton.ops import triton_version

ROWS = [
    ("statistics", "A100", "bf16", 64),
    ("gradient of queries", "H100", "bf16", 128),
    ("gradient of keys", "A100", "fp16", 64),
    ("gradient of keys, rbf", "B200", "bf16", 64),
    ("statistics, two softmaxes", "B200", "bf16", 64),
    ("statistics, two softmaxes", "A100", "ieee", 64),
    ("gradient of queries", "MI300X", "bf16", 64),
    ("detached keys", "A100", "tf32", 64),
    ("statistics", "H100", "fp64", 128),
    ("statistics", "A100", "tf32x3", 256),
    ("statistics", "B200", "fp64", 64),
    ("detached keys, inner product", "H100", "bf16", 256),
    ("gradient of queries, temperature", "A100", "fp16", 128),
    ("aligned gradient", "A100", "fp64", 0),
    ("aligned", "B200", "fp16", 0),
    ("norms", "MI300X", "bf16", 64),
    ("detached keys merge", "H100", "fp32", 0),
    ("merge", "A100", "fp64", 0),
    ("coefficients, rbf", "B200", "fp64", 0),
    ("add splits", "A100", "fp32", 0),
    ("grad tau", "A100", "fp32", 0),
    ("log total", "H100", "fp64", 0),
    ("incoming, rbf", "A100", "fp64", 0),
    ("numbers", "A100", "fp64", 0),
    ("loss, rbf", "B200", "fp32", 0),
    ("block of coefficients, raw rows", "H100", "bf16", 512),
    ("block of coefficients, two softmaxes", "A100", "fp16", 128),
    ("block of coefficients, temperature", "B200", "bf16", 256),
    ("triangles of coefficients", "H100", "fp16", 512),
    ("triangles of coefficients, raw rows", "B200", "bf16", 256),
    ("triangles of coefficients, two softmaxes", "A100", "bf16", 128),
    ("triangles of coefficients, rbf", "MI300X", "fp16", 128),
    ("product with a block, queries, raw rows", "B200", "bf16", 512),
    ("product with a block, keys", "A100", "fp16", 256),
    ("product with a block, keys, raw rows", "MI300X", "bf16", 256),
    ("scale of blocks", "H100", "fp32", 0),
]


# Compiling the first is enough to see that Triton and the package fit together here.
@pytest.mark.parametrize(
    ("kernel", "device", "dtype", "D"),
    [ROWS[0], *(pytest.param(*row, marks=pytest.mark.exhaustive) for row in ROWS[1:])],
)
def test_nothing_is_wrong_with_a_shipped_configuration(kernel: str, device: str, dtype: str, D: int) -> None:
    case = KernelCase("triton", kernel, device, dtype, D)
    assert case in set(codegen_triton.cases())
    (row,) = codegen_triton.build([case])
    assert problems(row) == []
    assert row[:5] == case
    assert row.registers > 0
    assert bool(row.cycles) == bool(row.passes and row.per_similarity)
    assert bool(row.exponentials) == (bool(row.cycles) and not kernel.startswith("product"))
    if row.cycles:
        assert row.cycles[row.limit] > 0
    if dtype == "fp64":
        assert ("tensor" in row.cycles) == bool(row.tensor)
    if device == "B200" and dtype == "fp64" and row.cycles:  # every multiplication is there
        assert row.per_similarity["fp64"] > D


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kernel", "device", "dtype", "D"),
    [
        ("statistics", "H100", "bf16", 128),
        ("gradient of queries", "H100", "bf16", 128),
        ("gradient of keys", "B200", "fp16", 128),
        ("detached keys", "A100", "bf16", 256),
        ("detached keys", "B200", "bf16", 128),
        ("gradient of queries", "MI300X", "fp16", 128),
    ],
)
def test_unit_rows_fit_the_same_tiles(kernel: str, device: str, dtype: str, D: int) -> None:
    (variant,) = (v for v in codegen_triton.variants() if v.name == kernel)
    variant = variant._replace(constants=variant.constants | {"NORMALIZE": True})
    row = codegen_triton.compile_variant(variant, KernelCase("triton", kernel, device, dtype, D), {})
    assert problems(row) == []


# What Triton 3.6.0 spills at most, in bytes, of the configurations for sm_90 that it spills with the tiles of 3.7.
WITH_3_6 = {
    ("statistics, raw rows", "fp64", 64): 0,
    ("statistics, raw rows", "fp64", 256): 0,
    ("detached keys, full gradient, raw rows", "ieee", 64): 0,
    ("detached keys, full gradient", "fp64", 128): 0,
    ("detached keys, full gradient, raw rows", "fp64", 128): 16,
    ("detached keys, all", "fp64", 128): 0,
    ("gradient of queries", "fp16", 128): 0,
    ("gradient of queries, raw rows", "bf16", 128): 0,
    ("gradient of queries, raw rows", "fp16", 128): 0,
    ("gradient of queries, temperature", "bf16", 128): 0,
    ("gradient of queries, temperature", "fp16", 128): 0,
    ("gradient of queries, rbf", "fp16", 128): 0,
}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kernel", "dtype", "D"), WITH_3_6)
def test_spills_of_another_triton(kernel: str, dtype: str, D: int) -> None:
    """None with that of the tests. With 3.6.0 a few bytes of one kernel: its next smaller tile takes a quarter more."""
    (row,) = codegen_triton.build([KernelCase("triton", kernel, "H100", dtype, D)])
    assert row.stack <= (WITH_3_6[kernel, dtype, D] if triton_version().startswith("3.6.") else 0)
    in_loop = row.per_similarity.get("spill", 0) / sum(row.per_similarity.values())
    assert in_loop <= (0.01 if dtype == "fp64" and "full" in kernel else 0)


@pytest.mark.parametrize(
    ("version", "old"), [("3.6.0", True), ("3.6.0+git12", True), ("3.7.1", False), ("3.10.0", False)]
)
def test_tiles_of_an_old_triton(version: str, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "triton_version", lambda: version)
    table.of_family.cache_clear()
    try:
        assert table.tile_of("sm_90", "gradient", "half", 128, False).block_n == (32 if old else 64)
        assert table.tile_of("sm_90", "detached_keys", "fp64", 128, True).num_stages == (1 if old else 2)
        assert table.tile_of("sm_80", "gradient", "half", 128, False).block_n == 32
    finally:
        table.of_family.cache_clear()


SPILLING = """
.L_x_0:
        /*0010*/                   LDL.64 R2, [R1+0x8] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0040*/              @!P1 BRA `(.L_x_1) ;
        /*0050*/                   FFMA R1, R2, R3, R4 ;
        /*0060*/                   MUFU.EX2 R7, R7 ;
        /*0070*/                   MUFU.RCP R7, R7 ;
        /*0080*/               @P0 BRA `(.L_x_0) ;
        /*0090*/                   FADD R1, R2, R3 ;
        /*00a0*/                   EXIT ;
"""


def test_main_loop() -> None:
    """Found by its exponential; what a loop of products inside it does counts for each of its passes."""
    found = sass.make(200, 16, 1024, sass.parse_sass(SPILLING), passes=3)
    assert found.spilled
    assert found.spills == 1
    assert found.tensor == 2
    assert found.loop == {"spill": 1, "tensor": 4, "other": 4, "fp32": 1, "ex2": 1, "special": 1}


WITHOUT_TENSOR_CORES = """
.L_x_0:
        /*0010*/                   DFMA R4, R8, R2, R4 ;
        /*0020*/                   DFMA R6, R8, R2, R6 ;
        /*0030*/              @!P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/                   DADD R4, R8, R2 ;
.L_x_2:
        /*0050*/                   DFMA R4, R8, R2, R4 ;
        /*0060*/                   DFMA R6, R8, R2, R6 ;
        /*0070*/                   DFMA R6, R8, R2, R6 ;
        /*0080*/                   DFMA R6, R8, R2, R6 ;
        /*0090*/              @!P1 BRA `(.L_x_2) ;
.L_x_3:
        /*00a0*/                   DADD R6, R8, R2 ;
        /*00b0*/              @!P1 BRA `(.L_x_3) ;
        /*00c0*/                   DADD R6, R8, R2 ;
        /*00d0*/                   DADD R6, R8, R2 ;
        /*00e0*/               @P0 BRA `(.L_x_1) ;
        /*00f0*/                   EXIT ;
"""


def test_main_loop_of_float64() -> None:
    """Found by its arithmetic; of the loops inside, that with the products is the one over chunks of features."""
    found = sass.make(200, 0, 1024, sass.parse_sass(WITHOUT_TENSOR_CORES), passes=5, products=4)
    assert found.loop == {"fp64": 4 + 5 * 4, "other": 5 + 2}


def test_main_loop_of_products() -> None:
    """The smallest that multiplies: not one around it, with copies of its first and last turn."""
    text = SPILLING.replace("MUFU.EX2", "MUFU.RCP")
    assert sass.make(200, 0, 0, sass.parse_sass(text), bare=True).loop == {"tensor": 1, "other": 1}
    found = sass.make(200, 0, 0, sass.parse_sass(WITHOUT_TENSOR_CORES), products=3, bare=True)
    assert found.loop == {"fp64": 4, "other": 1}


def test_gradients_of_many_features_are_those_of_blocks() -> None:
    """A row for what is launched, and none for what is not."""
    names = {case.name for case in codegen_triton.cases()}
    for D, blocks in ((128, False), (256, True), (512, True)):
        assert (f"triton, block of coefficients, H100, bf16, D={D}" in names) == blocks
        assert (f"triton, gradient of keys, H100, bf16, D={D}" in names) != blocks
    assert "triton, gradient of keys, H100, tf32, D=512" in names
    assert "triton, block of coefficients, two softmaxes, H100, bf16, D=128" in names


def test_what_is_wrong_shows() -> None:
    good = Row("triton", "statistics", "A100", "bf16", 64, {"block_n": 64}, 200, 0, 0, 1 << 10, 8, {}, 1, 1,
               {"ex2": 1.0}, {"ex2": 0.1, "issue": 0.2})  # fmt: skip
    assert problems(good) == []
    assert good.limit == "issue"
    for change, words in (
        ({"stack": 8}, "spills"),
        ({"spills": 2}, "spills"),
        ({"shared": 100 << 10}, "shared memory"),
        ({"tensor": 0}, "tensor-core"),
        ({"tensor": 0, "dtype": "fp64"}, "tensor-core"),
        ({"opcodes": {"LDSM": 0}}, "no LDSM"),
        ({"per_similarity": {"ex2": 2.0}}, "exponentials"),
    ):
        (text,) = problems(good._replace(**change))  # type: ignore[arg-type]
        assert words in text
    for change in (
        {"tensor": 0, "dtype": "ieee"},
        {"tensor": 0, "dtype": "fp64", "device": "B200"},
        {"tensor": 0, "dtype": "fp64", "backend": "cuda"},
        {"tensor": 0, "dtype": "fp32", "exponentials": 0},
        {"shared": 150 << 10, "backend": "cuda"},
        {"passes": 2, "per_similarity": {"ex2": 2.0}},
    ):
        assert problems(good._replace(**change)) == []  # type: ignore[arg-type]


def test_constants_are_those_of_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that losses launch is in the matrix; constants of kernels on rows are those of the report."""
    launched: dict[str, list[dict[str, int]]] = {}

    def record(kernel, grid, *args, **constants) -> None:
        launched.setdefault(kernel.fn.__name__, []).append(constants)

    for name in ("blocks", "contrast", "cacr", "detached_keys"):
        monkeypatch.setattr(importlib.import_module(f"cacr_kernels.backends.triton.{name}"), "start", record)
    run_losses()
    on_rows = [kernel for kernel in codegen_triton.small() if kernel.name != "numbers"]  # only for tensors on a GPU
    functions = codegen_triton.kernels()
    of_table = {functions[v.kernel].fn.__name__ for v in codegen_triton.variants()}
    assert {k.kernel for k in on_rows} | of_table == set(launched)
    for kernel in on_rows:
        features = [{"BLOCK_D": min(kernel.features, D)} for D in kernel.sizes] if kernel.features else [{}]
        for constants in ({**kernel.constants, **more} for more in features):
            blocks = {name: size for name, size in constants.items() if "BLOCK" in name or name == "num_warps"}
            found = [{name: c[name] for name in blocks} for c in launched[kernel.kernel]]
            assert blocks in found, f"{kernel.name}: {blocks} is none of {found}"
            assert all(set(c) == set(constants) for c in launched[kernel.kernel]), kernel.name
    kinds = {
        (c["FIRST_SET"], c["SECOND_SET"], c.get("GIVEN_SELF", False))
        for name in ("statistics", "gradient", "detached_keys")
        for c in launched[f"{name}_kernel"]
    }
    of_matrix = [v.constants for v in codegen_triton.variants() if v.kernel != "products"]
    assert kinds == {(c["FIRST_SET"], c["SECOND_SET"], c.get("GIVEN_SELF", False)) for c in of_matrix}


def run_losses() -> None:
    """Each in the variants that launch something else, on empty arrays."""
    from cacr_kernels.backends.triton.cacr import cacr
    from cacr_kernels.backends.triton.contrast import contrast, contrast_backward
    from cacr_kernels.backends.triton.detached_keys import detached_keys

    numbers, ids = torch.ones(5, dtype=torch.float64), torch.zeros(700, dtype=torch.int32)
    for D, normalize in ((64, False), (200, False), (64, True), (1024, True)):
        z = torch.zeros(2, 700, D)
        for rbf in (False, True):
            for views in (z, z.bfloat16(), z.half()):
                cacr(views, numbers, 1.0, 1.0, 1.0, 1.0, 0, rbf, 1.0, normalize, True, True)
        detached_keys(z, z, None, None, numbers[:1], [0], [0], [0], True, False, normalize, False, True, True)
        for kinds in ([1, 2], [3, 2], [2]):  # of few queries, so that keys are split
            arguments = z[:, :20], z, ids[:20], ids, numbers[: len(kinds)], kinds, [0], [0], False, False, None, False
            value, _, row_state = contrast(*arguments)
            contrast_backward(*arguments, value, row_state, value, value, True, True, True)
