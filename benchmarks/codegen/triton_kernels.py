"""Rows of the Triton kernels, with the constants and launch configurations that calls of the losses use."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from cacr_kernels.backends.triton.pairs import NO_SET, SHARED_SET
from cacr_kernels.types import ALL, OTHER, SAME, SAME_NOT_SELF

from . import aot, sass
from .rows import DEVICES, DTYPES, PIECES, SIZES, Device, KernelCase, Row, cycles, device_of

ROW_DTYPES = ("bf16", "fp16", "fp32", "fp64")  # of kernels without products


class Variant(NamedTuple):
    """A kernel that sees similarities, as one call uses it."""

    name: str
    kernel: str  # a key of the launch table
    constants: dict[str, Any]
    products: int  # matrix products of a similarity beside that which makes it
    sizes: tuple[int, ...] = SIZES

    @property
    def softmaxes(self) -> int:
        if self.kernel == "products":
            return 0
        return 1 if self.constants["SECOND_SET"] == NO_SET else 2

    @property
    def exponentials(self) -> int:
        """Those of a similarity: of every softmax, and in both roles that its rows have."""
        return self.softmaxes * (2 if self.kernel == "triangles" else 1)

    @property
    def two(self) -> bool:
        """Which part of the launch table it takes."""
        moments = self.kernel == "blocks" and self.constants["WANT_TAU"]
        return self.softmaxes == 2 or moments or self.constants.get("MOMENTS", False)

    def multiplied(self, dtype: str) -> int:
        """The products, one for each piece of coefficients: two of half types where two sums nearly cancel."""
        return self.products * (2 if self.constants.get("MOMENTS", False) and dtype in PIECES else 1)


def variants() -> tuple[Variant, ...]:
    """Those of the losses, and what else takes more or other registers, at sizes with and without chunks."""
    one, all_keys = {"FIRST_SET": OTHER, "SECOND_SET": NO_SET}, {"FIRST_SET": ALL, "SECOND_SET": NO_SET}
    two, apart = {"FIRST_SET": SAME_NOT_SELF, "SECOND_SET": OTHER}, {"FIRST_SET": SAME, "SECOND_SET": OTHER}
    rbf, inner, few = {"FIRST_SET": OTHER, "SECOND_SET": SHARED_SET}, {"INNER_PRODUCT": True}, (128, 256)
    keys = {"QUERY": False, "CANCELLING": False, "WANT_TAU": False}
    queries = {"QUERY": True, "CANCELLING": False, "WANT_TAU": False}
    tau, cancelling, mean = {"WANT_TAU": True}, {"CANCELLING": True}, {"WANT_MEAN": True, "MOMENTS": False}
    full, raw = mean | {"MOMENTS": True}, {"NORMALIZE": True}
    plain, wide, more = {"CANCELLING": False, "WANT_TAU": False, "BOTH_ROLES": False}, (256, 512), (128, 256, 512)
    of_queries, of_keys = "product with a block, queries", "product with a block, keys"
    both = plain | {"BOTH_ROLES": True}
    return (
        Variant("statistics", "statistics", one, 0),
        Variant("statistics, two softmaxes", "statistics", two, 0),
        Variant("gradient of queries", "gradient", one | queries, 1),
        Variant("gradient of keys", "gradient", one | keys, 1),
        Variant("gradient of queries, two softmaxes", "gradient", two | queries | tau, 1),
        Variant("gradient of keys, two softmaxes", "gradient", two | keys, 1),
        Variant("gradient of keys, rbf", "gradient", rbf | keys | cancelling, 1),
        Variant("detached keys", "detached_keys", one | mean, 1),
        Variant("detached keys, full gradient", "detached_keys", one | full, 2),
        Variant("statistics, raw rows", "statistics", one | raw, 0),
        Variant("gradient of queries, raw rows", "gradient", one | queries | raw, 1),
        Variant("gradient of keys, raw rows", "gradient", one | keys | raw, 1),
        Variant("detached keys, raw rows", "detached_keys", one | mean | raw, 1),
        Variant("detached keys, full gradient, raw rows", "detached_keys", one | full | raw, 2),
        Variant("statistics, rbf", "statistics", rbf, 0, few),
        Variant("statistics, reference set", "statistics", apart, 0, few),
        Variant("statistics, inner product", "statistics", all_keys | inner, 0, few),
        Variant("gradient of queries, temperature", "gradient", one | queries | tau, 1, few),
        Variant("gradient of queries, reference set", "gradient", apart | queries | tau, 1, few),
        Variant("gradient of queries, rbf", "gradient", rbf | queries | cancelling | tau, 1, few),
        Variant("gradient of queries, inner product", "gradient", all_keys | queries | inner, 1, few),
        Variant("detached keys, all", "detached_keys", all_keys | full, 2, few),
        Variant("detached keys, inner product", "detached_keys", all_keys | inner | mean, 1, few),
        Variant("block of coefficients", "blocks", one | plain, 0, wide),
        Variant("block of coefficients, raw rows", "blocks", one | plain | raw, 0, wide),
        Variant("block of coefficients, temperature", "blocks", one | plain | tau, 0, wide),
        Variant("block of coefficients, two softmaxes", "blocks", two | plain | tau, 0, more),
        Variant("block of coefficients, rbf", "blocks", rbf | cancelling | tau, 0, more),
        Variant("triangles of coefficients", "triangles", one | both, 0, wide),
        Variant("triangles of coefficients, raw rows", "triangles", one | both | raw, 0, wide),
        Variant("triangles of coefficients, two softmaxes", "triangles", two | both, 0, more),
        Variant("triangles of coefficients, rbf", "triangles", rbf | both | cancelling, 0, more),
        Variant(of_queries, "products", {"QUERY": True}, 1, wide),
        Variant(of_keys, "products", {"QUERY": False}, 1, wide),
        Variant(f"{of_queries}, raw rows", "products", {"QUERY": True} | raw, 1, wide),
        Variant(f"{of_keys}, raw rows", "products", {"QUERY": False} | raw, 1, wide),
    )


class Small(NamedTuple):
    """A kernel that works on rows. ``dtypes``: of its arithmetic, where it sees no embeddings."""

    name: str
    kernel: str
    constants: dict[str, Any]
    dtypes: tuple[str, ...] = ("fp32", "fp64")
    sizes: tuple[int, ...] = (0,)
    features: int = 0  # most of a tile


def small() -> tuple[Small, ...]:
    """Those of the losses, where the constants make a difference with those that leave most to do."""
    from cacr_kernels.backends.triton import contrast

    rows, wide, numbers = {"BLOCK_M": contrast.ROWS}, {"BLOCK": 1024}, ("fp64",)
    by_cost = {"INNER_PRODUCT": False, "USES_COST0": False, "USES_COST1": False}
    two = by_cost | {"SOFTMAXES": 2, "DETACH": False}
    full = {"WANT_MEAN": True, "MOMENTS": True, "INNER_PRODUCT": False}
    loss = {"REPELS": True, "WANT_TAU": True, "BLOCK": 512, "num_warps": 8}
    pairs, unit, raw = {"BLOCK_M": 16, "BLOCK_D": 64}, {"NORMALIZE": False}, {"NORMALIZE": True}
    return (
        Small("norms", "norms_kernel", {"BLOCK_M": 32, "SOFTMAXES": 2}, ROW_DTYPES, (64, 128), 128),
        Small("aligned", "aligned_kernel", pairs | unit | {"RBF": True}, ROW_DTYPES),
        Small("aligned, raw rows", "aligned_kernel", pairs | raw | {"RBF": True}, ("bf16", "fp16", "fp64")),
        Small("aligned, raw rows", "aligned_kernel", pairs | raw | {"RBF": True, "BLOCK_D": 32}, ("fp32",)),
        Small("aligned gradient", "aligned_gradient_kernel", pairs | unit, ROW_DTYPES),
        Small("aligned gradient, raw rows", "aligned_gradient_kernel", pairs | raw, ROW_DTYPES),
        Small("unit factors", "unit_kernel", {"BLOCK_M": 32}, ROW_DTYPES, (64,), 64),
        Small("unit gradient", "unit_gradient_kernel", {"CHUNKS": 1, "BLOCK_M": 16, "BLOCK_D": 64}, ROW_DTYPES),
        Small("unit gradient, long", "unit_gradient_kernel", {"CHUNKS": 2, "BLOCK_M": 8, "BLOCK_D": 256}, ROW_DTYPES),
        Small("merge", "merge_kernel", by_cost | {"SECOND_SET": OTHER, "USES_COST0": True} | rows),
        Small("merge, rbf", "merge_kernel", by_cost | {"SECOND_SET": SHARED_SET} | rows),
        Small("coefficients", "coefficients_kernel", two | {"SECOND_SET": OTHER, "CANCELLING": False} | rows),
        Small("coefficients, rbf", "coefficients_kernel", two | {"SECOND_SET": SHARED_SET, "CANCELLING": True} | rows),
        Small("detached keys merge", "detached_keys_merge_kernel", full | pairs),
        Small("add splits", "add_splits_kernel", wide),
        Small("scale of blocks", "scale_kernel", raw | {"BLOCK": 4096}, ("fp32",)),
        Small("grad tau", "grad_tau_kernel", wide),
        Small("numbers", "numbers_kernel", {}, numbers),
        Small("log total", "log_total_kernel", wide, numbers),
        Small("incoming", "incoming_kernel", {"RBF": False} | wide, numbers),
        Small("incoming, rbf", "incoming_kernel", {"RBF": True} | wide, numbers),
        Small("loss", "loss_kernel", loss | {"RBF": False}),
        Small("loss, rbf", "loss_kernel", loss | {"RBF": True}),
    )


def devices() -> Iterator[Device]:
    """One for each family of the launch table."""
    for family in dict.fromkeys(device.family for device in DEVICES):
        yield next(device for device in DEVICES if device.family == family)


def cases() -> Iterator[KernelCase]:
    """The matrix; those in a row that differ in D alone have code in common."""
    for variant in variants():
        for device in devices():
            for dtype in DTYPES:
                if dtype == "tf32x3" and device.family == "cdna3":
                    continue  # not offered there
                for D in filter(functools.partial(launched, variant, device, dtype), variant.sizes):
                    yield KernelCase("triton", variant.name, device.name, dtype, D)
    for kernel in small():
        for device in devices():
            for dtype in kernel.dtypes:
                for D in kernel.sizes:
                    yield KernelCase("triton", kernel.name, device.name, dtype, D)


def launched(variant: Variant, device: Device, dtype: str, D: int) -> bool:
    """Whether gradients of so many features take this kernel, or blocks (``backends/triton/blocks.py``)."""
    from cacr_kernels.backends.triton import table

    precision = "half" if dtype in PIECES else dtype
    by_blocks = table.has_blocks(precision)  # type: ignore[arg-type]
    wide = table.tile_of(device.family, "gradient", precision, D, variant.softmaxes == 2).block_out < D  # type: ignore[arg-type]
    if variant.kernel in ("blocks", "triangles", "products"):
        return by_blocks and wide
    return variant.kernel != "gradient" or not (by_blocks and wide)


def build(wanted: list[KernelCase]) -> list[Row]:
    """Compile these cases, in their order."""
    of_table = {v.name: v for v in variants()}
    of_rows = {(s.name, dtype): s for s in small() for dtype in s.dtypes}
    known: dict[str, Any] = {}  # compiled, by all that it depends on
    return [
        compile_variant(of_table[case.kernel], case, known)
        if case.kernel in of_table
        else compile_small(of_rows[case.kernel, case.dtype], case)
        for case in wanted
    ]


def kernels() -> dict[str, Any]:
    """Triton functions by their name, and by the key of the launch table."""
    from importlib import import_module

    names = (
        "aligned",
        "blocks",
        "coefficients",
        "detached_keys",
        "gradient",
        "loss",
        "merge",
        "norms",
        "statistics",
        "total",
        "unit",
    )
    found = {}
    for name in names:
        found |= vars(import_module(f"cacr_kernels.backends.triton.kernels.{name}"))
    of_table = {key: found[f"{key}_kernel"] for key in ("statistics", "gradient", "detached_keys")}
    of_blocks = {"blocks": "block_kernel", "triangles": "block_kernel", "products": "product_kernel"}
    return found | of_table | {key: found[name] for key, name in of_blocks.items()}


def compile_variant(variant: Variant, case: KernelCase, known: dict[str, Any]) -> Row:
    """With its entry of the launch table."""
    from cacr_kernels.backends.triton.table import has_whole_tiles, tile_of

    device, dtype, D = device_of(case.device), case.dtype, case.D
    half = dtype in ("bf16", "fp16")
    tile = tile_of(device.family, variant.kernel, "half" if half else dtype, D, variant.two)  # type: ignore[arg-type]
    writes, bare = variant.kernel not in ("statistics", "blocks", "triangles"), variant.kernel == "products"
    constants = tile.constants(writes)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    product = dtype if dtype in ("tf32", "tf32x3") else "ieee"
    constants |= {"INNER_PRODUCT": False, "NORMALIZE": False} | variant.constants | {"PRECISION": product}
    if bare:
        del constants["BLOCK_D"]
    else:
        constants = {"GIVEN_SELF": False, "CHUNKS": tile.constant_of_chunks(D)} | constants
        if variant.kernel in ("statistics", "gradient"):  # of batches that are not tiny
            precision: Any = "half" if half else dtype
            pays = has_whole_tiles(device.family, variant.kernel, precision, constants["NORMALIZE"])
            constants["WHOLE"] = pays and tile.is_whole(D, tile.block_n)
    key = str((constants, options))
    if key not in known:
        element = dtype if half or dtype == "fp64" else "fp32"
        known[key] = compile_for(kernels()[variant.kernel], element, constants, device, options)
    threads = tile.num_warps * device.target[2]
    similarities = tile.block_m * tile.block_n / threads  # of a thread
    found = sass.report(known[key], 1 if bare else tile.chunks(D), similarities * tile.block_d, bare)
    passes = -(-D // tile.block_out) if writes else 1
    per = {kind: passes * count / similarities for kind, count in found.loop.items()}
    row = Row(
        *case, tile._asdict(), found.registers, found.stack, found.spills, found.shared, found.tensor, {},
        variant.exponentials, passes, per, {},
    )  # fmt: skip
    return row._replace(cycles=cycles(device, dtype, D, variant.multiplied(dtype), row))


def compile_small(kernel: Small, case: KernelCase) -> Row:
    """With the options of its launch, or those that Triton takes."""
    sizes = {"BLOCK_D": min(kernel.features, case.D)} if kernel.features else {}
    constants = kernel.constants | sizes
    tile = {name: int(value) for name, value in constants.items()}
    options = {name: constants.pop(name) for name in ("num_warps",) if name in constants}
    function = kernels()[kernel.kernel]
    found = sass.report(compile_for(function, case.dtype, constants, device_of(case.device), options))
    numbers = found.registers, found.stack, found.spills, found.shared, found.tensor
    return Row(*case, tile, *numbers, {}, 0, 1, {}, {})


def compile_for(kernel: Any, dtype: str, constants: dict[str, Any], device: Device, options: dict[str, int]) -> Any:
    from triton.backends.compiler import GPUTarget

    return aot.compile_kernel(kernel, dtype, constants, GPUTarget(*device.target), **options)
