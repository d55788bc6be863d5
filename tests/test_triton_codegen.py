"""Compiled Triton kernels, on a machine without a GPU: no spills, tensor cores, as few exponentials as promised.

A few rows of the matrix of ``python -m benchmarks.codegen``, one for every kernel, dtype and processor.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs Triton")

from benchmarks import codegen, sass

ROWS = [
    ("statistics", "A100", "bf16", 64),
    ("gradient of queries", "H100", "bf16", 128),
    ("gradient of keys", "A100", "fp16", 64),
    ("gradient of keys, rbf", "B200", "bf16", 64),
    ("statistics, two softmaxes", "B200", "bf16", 64),
    ("statistics, two softmaxes", "A100", "ieee", 64),
    ("gradient of queries", "MI300X", "bf16", 64),
    ("frozen keys", "A100", "tf32", 64),
    ("statistics", "H100", "fp64", 128),
    ("statistics", "A100", "tf32x3", 256),
]


@pytest.mark.parametrize(("kernel", "device", "dtype", "D"), ROWS)
def test_nothing_is_wrong_with_a_shipped_configuration(kernel: str, device: str, dtype: str, D: int) -> None:
    variant = next(v for v in codegen.variants() if v.name == kernel)
    row = codegen.compile_triton(variant, next(d for d in codegen.DEVICES if d.name == device), dtype, D)
    assert codegen.problems(row) == []
    assert row.registers > 0
    assert row.cycles[row.limit] > 0


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
    """Found by its exponential; what a loop inside it does counts for each of its passes."""
    found = sass.make(200, 16, 1024, sass.parse_sass(SPILLING), passes=3)
    assert found.spilled
    assert found.spills == 1
    assert found.tensor == 2
    assert found.loop == {"spill": 1, "tensor": 4, "other": 4, "fp32": 1, "ex2": 1, "special": 1}


def test_what_is_wrong_shows() -> None:
    good = codegen.Row("triton", "statistics", "A100", "bf16", 64, {"block_n": 64}, 200, 0, 0, 1 << 10, 8,
                       {"ex2": 1.0}, {"ex2": 0.1, "issue": 0.2})  # fmt: skip
    assert codegen.problems(good) == []
    assert good.limit == "issue"
    for change, words in (
        ({"stack": 8}, "spills"),
        ({"spills": 2}, "spills"),
        ({"shared": 1 << 20}, "shared memory"),
        ({"tensor": 0}, "tensor-core"),
        ({"per_similarity": {"ex2": 2.0}}, "exponentials"),
    ):
        (text,) = codegen.problems(good._replace(**change))  # type: ignore[arg-type]
        assert words in text
