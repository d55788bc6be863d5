"""How many variants of a kernel the sizes of batches make: an odd last batch must not compile all of them again."""

from __future__ import annotations

import importlib
from collections import defaultdict
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from triton.runtime.driver import driver

from cacr_kernels.backends.triton import table
from cacr_kernels.backends.triton.cacr import cacr
from cacr_kernels.backends.triton.contrast import contrast, contrast_backward, repulsion
from cacr_kernels.backends.triton.detached_keys import detached_keys
from tests.ptx.triton_ptx import AbsentGpu

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

MODULES = ("blocks", "contrast", "cacr", "detached_keys")
Variants = dict[str, set[str]]


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Variants:
    """What an A100 would compile for the launches inside: by kernel the keys under which Triton keeps the results."""
    return recorded(monkeypatch, table.Processor("sm_80", 108), 80)


def recorded(monkeypatch: pytest.MonkeyPatch, processor: table.Processor, architecture: int) -> Variants:
    """What that processor would compile from now on."""
    found: Variants = defaultdict(set)
    binders: dict[Any, Any] = {}

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if kernel not in binders:
            binders[kernel] = kernel.create_binder()[-1]
        _, specialization, options = binders[kernel](*args, **constants)
        found[kernel.fn.__name__].add(f"{specialization} {options}")

    for name in MODULES:
        module = importlib.import_module(f"cacr_kernels.backends.triton.{name}")
        monkeypatch.setattr(module, "start", record)
    for name in ("pairs", *MODULES):
        module = importlib.import_module(f"cacr_kernels.backends.triton.{name}")
        monkeypatch.setattr(module, "processor_of", lambda device: processor, raising=False)
    monkeypatch.setattr(driver, "_active", AbsentGpu(architecture))
    return found


def run_losses(batch: int, dim: int, dtype: torch.dtype, views: int = 2) -> None:
    """All operators on arrays of zeros; without and with a second softmax, a queue and raw rows."""
    numbers, ids = torch.ones(5, dtype=torch.float64), torch.zeros(batch, dtype=torch.int32)
    z, queue = torch.zeros(views, batch, dim, dtype=dtype), torch.zeros(1, 4096, dim, dtype=dtype)
    for rbf in (False, True):
        for raw in (False, True):
            cacr(z, numbers, 1.0, 1.0, 1.0, 1.0, 0, rbf, 1.0, raw, True, True)
    cacr(z, None, 1.0, 1.0, 1.0, 1.0, 2, False, 1.0, False, True, False)
    repulsion(z, torch.zeros(views, 2 * batch, dim, dtype=dtype), numbers[:1], 0, False, True, True, True)
    for unit in (False, True):
        detached_keys(z, queue, None, None, numbers[:1], [0], [0, 1], [0, 0], False, False, False, unit, True, True)
    for k in (None, z):
        arguments = z[:1], k, ids, ids, numbers[:2], [3, 2], [0], [0], False, False, None, k is None
        value, _, row_state = contrast(*arguments)
        contrast_backward(*arguments, value, row_state, value, value, True, True, True)


def new(variants: Variants, before: Variants) -> dict[str, int]:
    """How many variants of each kernel are new, where there are any."""
    counts = {kernel: len(keys - before.get(kernel, set())) for kernel, keys in variants.items()}
    return {kernel: count for kernel, count in counts.items() if count}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_odd_last_batch_compiles_nothing(variants: Variants, dtype: torch.dtype) -> None:
    run_losses(512, 128, dtype)
    before = {kernel: set(keys) for kernel, keys in variants.items()}
    assert len(before) > 10
    assert ("product_kernel" in before) == (dtype == torch.bfloat16)  # of two softmaxes
    for batch in (511, 500, 497, 17, 2):
        run_losses(batch, 128, dtype)
        assert new(variants, before) == {}, batch


def test_an_odd_last_batch_of_more_than_a_tile_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles without masks are another variant of two kernels, for as many rows as a tile has and for more."""
    variants = recorded(monkeypatch, table.Processor("sm_90", 132), 90)
    run_losses(512, 128, torch.bfloat16)
    before = {kernel: set(keys) for kernel, keys in variants.items()}
    for batch in (511, 500, 497, 128):
        run_losses(batch, 128, torch.bfloat16)
        assert new(variants, before) == {}, batch
    run_losses(17, 128, torch.bfloat16)
    assert set(new(variants, before)) == {"statistics_kernel", "gradient_kernel"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_views_compile_nothing(variants: Variants, dtype: torch.dtype) -> None:
    """Nor does it matter that two views are one pair, and six are fifteen, and as a product sixteen."""
    run_losses(97, 128, dtype)
    before = {kernel: set(keys) for kernel, keys in variants.items()}
    for views in (3, 6, 16):
        run_losses(97, 128, dtype, views)
        assert new(variants, before) == {}, views


def test_few_features_compile_the_same_kernels(variants: Variants) -> None:
    """All that fit into a tile of one size.

    A multiple of 16 makes other ones, and so do other numbers than multiples of 4: Triton knows where arrays begin.
    """
    for dim in (4, 8, 28):  # with and without splits, and gradients of numbers that 16 divides or not
        run_losses(97, dim, torch.float32)
    before = {kernel: set(keys) for kernel, keys in variants.items()}
    for dim in (12, 20, 24):
        run_losses(97, dim, torch.float32)
        assert new(variants, before) == {}, dim


def test_classes_hold_their_largest_number_of_features() -> None:
    """Tiles are chosen, and autotuned, by class."""
    for least, most, found in ((1, 64, 64), (65, 128, 128), (129, 256, 256), (257, 1 << 20, 512)):
        assert table.class_of(least) == table.class_of(most) == found


def test_features_in_chunks_compile_the_same_kernels(variants: Variants) -> None:
    """However many chunks there are."""
    run_losses(97, 260, torch.bfloat16)
    before = {kernel: set(keys) for kernel, keys in variants.items()}
    for dim in (300, 516, 1036):
        run_losses(97, dim, torch.bfloat16)
        assert new(variants, before) == {}, dim


def test_loads_of_features_are_wide(variants: Variants) -> None:
    """What they depend on stays in the code: whether D is a multiple of 16, and the pointers."""
    run_losses(497, 128, torch.bfloat16)
    before = {kernel: set(keys) for kernel, keys in variants.items()}
    run_losses(497, 72, torch.bfloat16)
    for kernel in ("statistics_kernel", "gradient_kernel", "detached_keys_kernel", "norms_kernel", "unit_kernel"):
        assert variants[kernel] - before[kernel]
    for keys in before["statistics_kernel"]:
        assert keys.count("('*bf16', 'D')") == 2
        assert "('i32', 'D')" in keys
