"""Products of bfloat16: the instructions of AMX and AVX512-BF16, the kernels made of them, and where they are taken.

What needs no processor with them runs everywhere, by the definition of the instructions written in C++.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import normalize

from cacr_kernels import cacr_loss, supervised_cacr_loss
from cacr_kernels.backends import library
from cacr_kernels.operators.registry import operator
from tests.cpu.test_cpu_kernels import (
    AMX,
    AVX512_BF16,
    OPTIONAL,
    Builder,
    lowered,
    native_objects,
    processor_has,
    run,
    run_python,
    setup_script,
    shipped,
)

TILES = ["-DCACR_VECTOR_BYTES=64", "-DCACR_BF16_TILES"]
EMULATED = {"amx": TILES, "avx512_bf16": [*TILES, "-DCACR_BF16_PAIRS"]}  # without the instructions themselves
FEATURES = {"amx": AMX, "avx512_bf16": AVX512_BF16}
UNDER_TEST = "tests/cpp/tiles_under_test.cpp"
CHECK = "tests/cpp/check_tiles.cpp"

each_isa = pytest.mark.parametrize("isa", EMULATED)
needs_library = pytest.mark.skipif("avx2" not in setup_script()["ISAS"], reason="needs a library for x86-64")


# ---- the instructions ------------------------------------------------------------------------------------------------
def emulated_tiles(builder: Builder, isa: str) -> Path:
    return builder.compile(UNDER_TEST, f"{isa}_emulated", "-DCACR_ISA=emulated", *EMULATED[isa], *lowered())


def link_and_run(builder: Builder, name: str, objects: list[Path]) -> str:
    program = objects[0].with_name(name)
    run(*builder.command, *map(str, objects), "-o", str(program))
    return run(str(program))


@each_isa
def test_definition_of_the_instructions(isa: str) -> None:
    """The C++ that stands in for the instructions, against a table."""
    builder = Builder("tiles", "-O1")
    check = builder.compile(CHECK, f"check_{isa}_emulated", "-DCANDIDATE=emulated", *EMULATED[isa])
    assert link_and_run(builder, f"{isa}_by_definition", [check, emulated_tiles(builder, isa)]) == "0 failures\n"


@each_isa
@needs_library
def test_instructions_of_the_processor(isa: str) -> None:
    """The same table, and the same bits as the definition."""
    if not processor_has(*FEATURES[isa]):
        assert library.active_isa() != isa
        return
    builder = Builder("tiles", "-O1")
    tiles = builder.compile(UNDER_TEST, f"tiles_{isa}", f"-DCACR_ISA={isa}", *setup_script()["ISAS"][isa])
    check = builder.compile(CHECK, f"check_{isa}", f"-DCANDIDATE={isa}", "-DOTHER=emulated", *EMULATED[isa])
    assert link_and_run(builder, isa, [check, tiles, emulated_tiles(builder, isa)]) == "0 failures\n"


# ---- the kernels -----------------------------------------------------------------------------------------------------
@each_isa
@pytest.mark.exhaustive
def test_emulated_kernels(isa: str) -> None:
    """The kernels compiled without the instructions: some shapes, as the definition takes its time."""
    builder = Builder("fast", "-O2")
    tiles = builder.kernels(f"{isa}_emulated", ["-O3", *EMULATED[isa], *lowered()])
    said = builder.check(f"{isa}_emulated", [tiles, shipped("portable")], "a tenth", float64_of="portable")
    assert " 0 failures" in said


# ---- where they are taken --------------------------------------------------------------------------------------------
needs_products = pytest.mark.skipif(not library.bf16_products(), reason="needs a processor that multiplies bfloat16")


def views(*shape: int, length: float = 1.0) -> Tensor:
    z = normalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), dim=-1) * length
    return z.bfloat16().requires_grad_()


def both(z: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    loss = cacr_loss(z, backend="cpu", **options)  # type: ignore[arg-type]
    return loss.detach(), grad(loss, z)[0]


@needs_library
def test_older_instruction_sets_leave_them_out() -> None:
    code = """
from cacr_kernels.backends import cpu, library
print(library.active_isa(), library.bf16_products(), len(cpu.BACKEND.rounds_coefficients))
"""
    usable = {isa for isa in library.compiled_isas() if processor_has(*OPTIONAL.get(isa, ()))}
    if "avx512" in usable:
        assert run_python(code, CACR_CPU_ISA="avx512") == "avx512 False 0"
    if "amx" in usable and "CACR_CPU_ISA" not in os.environ:
        assert run_python(code) == "amx True 1"
    elif "avx512_bf16" in usable and "CACR_CPU_ISA" not in os.environ:
        by_default = processor_has("AuthenticAMD")  # elsewhere they are slower than products of float32
        assert run_python(code) == ("avx512_bf16 True 1" if by_default else "avx512 False 0")
    if "avx512_bf16" in usable:
        assert run_python(code, CACR_CPU_ISA="avx512_bf16") == "avx512_bf16 True 1"


def test_library_lists_what_it_compiled() -> None:
    names = [o.name.removeprefix("kernels_") for o in native_objects() if o.name.startswith("kernels_")]
    if library.compiled_isas():
        assert sorted(library.compiled_isas()) == sorted(names)


FAILED = """
import warnings
from unittest import mock
from cacr_kernels.backends import library
from cacr_kernels.operators.registry import operator
with mock.patch.object(library, "failed_isas", lambda: "amx"), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from cacr_kernels.backends import cpu
    import importlib
    importlib.reload(cpu)
print(*(str(w.message) for w in caught if "disagree" in str(w.message)))
"""


def test_instruction_set_that_fails_its_check_is_named() -> None:
    assert "the CPU kernels for amx are not used" in run_python(FAILED)
    assert library.failed_isas() == ""


@needs_products
@pytest.mark.parametrize("pairing", ["unordered", "pooled"])
def test_coefficients_are_rounded_once(pairing: str) -> None:
    """Gradients differ from those of float32 products, by an eps of bfloat16 at most."""
    z = views(2, 257, 70)
    x = z.detach().float().requires_grad_()
    (loss, found), (exact, expected) = both(z, pairing=pairing), both(x, pairing=pairing)
    assert abs(loss - exact) <= 1e-6
    assert not found.equal(expected.bfloat16()), "these are float32 products"
    assert (found.float() - expected).abs().max() <= torch.finfo(torch.bfloat16).eps * expected.abs().max()


@needs_products
@pytest.mark.parametrize("pairing", ["unordered", "pooled"])
def test_rounding_has_no_bias(pairing: str) -> None:
    """To the nearest, not cut off: gradients are not shorter, which would show in 0.3 %."""
    z = views(2, 257, 70)
    x = z.detach().float().requires_grad_()
    found, expected = (both(t, pairing=pairing, alpha=0.0)[1].double() for t in (z, x))
    assert abs((found * expected).sum() / expected.square().sum() - 1) <= 2e-4


@needs_products
@pytest.mark.parametrize("length", [1e-15, 1e-13, 1e13])
@pytest.mark.parametrize("pairing", ["unordered", "pooled"])
def test_rows_out_of_range(length: float, pairing: str) -> None:
    """Rows whose products are subnormal or large are multiplied in float32: gradients are those of float32, rounded."""
    z = views(2, 257, 33, length=length)
    x = z.detach().float().requires_grad_()
    (loss, found), (exact, expected) = both(z, pairing=pairing), both(x, pairing=pairing)
    assert loss.equal(exact)
    assert found.equal(expected.bfloat16())


@needs_products
def test_one_short_row_is_enough() -> None:
    z = views(2, 257, 33).detach()
    z[1, 7] *= 1e-14
    z[0, 3] = 0
    with torch.no_grad():
        assert cacr_loss(z, backend="cpu").equal(cacr_loss(z.float(), backend="cpu"))
        z[1, 7] = 0
        z.requires_grad_()
    found, expected = both(z)[1], both(z.detach().float().requires_grad_())[1]
    assert not found.equal(expected.bfloat16()), "rows of zeros are no reason"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("normalized", [False, True])
def test_bad_numbers_reach_the_loss(bad: float, normalized: bool) -> None:
    z = views(2, 40, 33).detach()
    z[1, 7, 5] = bad
    z.requires_grad_()
    x = z.detach().float().requires_grad_()
    (loss, found), (expected, gradient) = both(z, normalize=normalized), both(x, normalize=normalized)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert found.isnan().equal(gradient.bfloat16().isnan())


@needs_products
def test_same_bits_with_the_same_threads() -> None:
    z, w = views(3, 301, 70), views(333, 40)
    labels = torch.arange(333) % 7
    for _ in range(3):
        first = both(z)[1], both(z, pairing="pooled")[1], grad(supervised_cacr_loss(w, labels, backend="cpu"), w)[0]
        again = both(z)[1], both(z, pairing="pooled")[1], grad(supervised_cacr_loss(w, labels, backend="cpu"), w)[0]
        assert all(a.equal(b) for a, b in zip(first, again, strict=True))


@needs_products
def test_clustered_rows() -> None:
    """Rows close to each other: what is rounded multiplies differences, as in the definition with rounded costs."""
    centre = torch.randn(48, generator=torch.Generator().manual_seed(1))
    z = (centre + 0.05 * torch.randn(2, 200, 48, generator=torch.Generator().manual_seed(2))).bfloat16()
    for pairing in ("unordered", "pooled"):
        found = both(z.clone().requires_grad_(), pairing=pairing, alpha=0.0, tau_neg=0.5)[1]
        x = z.double().requires_grad_()
        loss = cacr_loss(x, backend="reference", pairing=pairing, alpha=0.0, tau_neg=0.5)  # type: ignore[arg-type]
        expected = grad(loss, x)[0]
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps


def detached(q: Tensor, k: Tensor, name: str = "detached_keys_cpu_bf16") -> list[Tensor]:
    tau = torch.tensor([-1.5], dtype=torch.float64)
    found = operator(name)(q, k, None, None, tau, [0], [0], [0], False, False, False, False, True, True)
    return list(found)


@needs_products
def test_detached_keys_out_of_range() -> None:
    """A tile of keys with short rows is multiplied in float32, the others are not."""
    q, k = views(1, 40, 33).detach().float(), views(1, 400, 33).detach().float()
    plain = detached(q, k, "detached_keys_cpu")
    assert not detached(q, k)[2].equal(plain[2])
    for row in (3, 170, 399):
        some = k.clone()
        some[0, row] *= 1e-14
        exact = detached(q.double(), some.double(), "detached_keys_cpu")
        for found, expected in zip(detached(q, some), exact, strict=True):
            assert (found - expected).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    short = q * 1e-14
    for found, expected in zip(detached(short, k), detached(short, k, "detached_keys_cpu"), strict=True):
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@needs_products
def test_clustered_detached_keys() -> None:
    """What flows to a query multiplies differences from keys close to it: the rounded weights sum to one."""
    centre = torch.randn(48, generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(2)
    q, k = ((centre + 0.05 * torch.randn(1, n, 48, generator=draw)).bfloat16().float() for n in (40, 700))
    (value, _, means, _), exact = detached(q, k), detached(q.double(), k.double(), "detached_keys_cpu")
    assert (value - exact[0]).abs().max() <= 1e-4 * exact[0].abs().max()
    found, expected = q[0] - means[0, 0], q[0].double() - exact[2][0, 0]
    assert (found - expected).abs().max() <= torch.finfo(torch.bfloat16).eps * expected.abs().max()


# ---- float32 ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    """Sets how PyTorch makes products of float32 on a CPU."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision

    def choose(value: str) -> None:
        matmul.fp32_precision = value  # type: ignore[assignment]

    yield choose
    choose(before)


def losses_of_float32() -> list[Tensor]:
    z, w = views(2, 130, 40).detach().float(), views(90, 40).detach().float()
    z, w = (z + 1e-3).requires_grad_(), (w + 1e-3).requires_grad_()  # nothing that bfloat16 can hold
    labels = torch.arange(90) % 7
    fused, pooled = cacr_loss(z, backend="cpu"), cacr_loss(z, backend="cpu", pairing="pooled", reduction="none")
    supervised = supervised_cacr_loss(w, labels, backend="cpu")
    return [grad(fused, z)[0], grad(pooled.sum(), z)[0], grad(supervised, w)[0]]


def test_products_of_float32(precision: Callable[[str], None]) -> None:
    """As ``torch.backends.mkldnn.matmul.fp32_precision`` says, where there are tiles."""
    precision("ieee")
    exact = losses_of_float32()
    for setting in ("tf32", "none"):
        precision(setting)
        assert all(a.equal(b) for a, b in zip(losses_of_float32(), exact, strict=True))
    precision("bf16")
    for found, expected in zip(losses_of_float32(), exact, strict=True):
        assert found.equal(expected) != library.bf16_products()
        assert (found - expected).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_attraction_stays_exact(precision: Callable[[str], None]) -> None:
    """Nearly equal views: their distance does not come from products."""
    z = normalize(torch.randn(1, 64, 48, generator=torch.Generator().manual_seed(0)), dim=-1)
    z = torch.cat([z, z + 1e-3 * torch.randn(1, 64, 48, generator=torch.Generator().manual_seed(1))])
    precision("ieee")
    expected = cacr_loss(z, backend="cpu", return_parts=True).attraction
    precision("bf16")
    assert cacr_loss(z, backend="cpu", return_parts=True).attraction.equal(expected)


def test_second_derivatives_with_products_of_bfloat16(precision: Callable[[str], None]) -> None:
    precision("bf16")
    z = views(2, 40, 16).detach().float().requires_grad_()
    (first,) = grad(cacr_loss(z, backend="cpu"), z, create_graph=True)
    (second,) = grad(first.square().sum(), z)
    assert second.isfinite().all()
    assert second.abs().max() > 0
