"""Compiles the Triton kernels for a GPU that is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

# What an argument is by its name, for every kernel: the element type of a pointer ("in" the embeddings', "acc" the
# arithmetic's), or the type of a number.
POINTERS = {
    **dict.fromkeys(("q", "k", "x", "y", "z", "block"), "in"),
    **dict.fromkeys(("q_norm", "k_norm", "x_norm", "y_norm", "norm", "cost", "coefficients", "bound"), "acc"),
    **dict.fromkeys(("partial_state", "partial_sums", "partial", "out", "grad", "moment", "means"), "acc"),
    **dict.fromkeys(("loss", "parts", "scale", "sums", "row_sums", "column_sums"), "acc"),
    **dict.fromkeys(("q_unit", "k_unit", "x_unit", "y_unit", "unit"), "acc"),
    **dict.fromkeys(("q_id", "k_id", "x_id", "y_id", "q_view", "k_view", "x_view", "y_view", "ids"), "i32"),
    **dict.fromkeys(("tau", "value", "lse", "row_state", "sum_e", "grad_value", "grad_lse", "grad_tau"), "fp64"),
    **dict.fromkeys(("variance", "numbers", "log_total", "grad_numbers"), "fp64"),
    **dict.fromkeys(("entropy", "positive_value", "positive_entropy", "positive_variance"), "fp64"),
}
ALIGNED = ("D", "split_size", "HEIGHT", "WIDTH")  # numbers that are multiples of 16 in every shape that matters


def compile_kernel(kernel: Any, dtype: str, constants: dict[str, Any], target: Any, **options: int) -> Any:
    """``kernel`` for embeddings of ``dtype`` (bf16, fp16, fp32, fp64), D a multiple of 16, all sizes below 2^31.

    ``target`` is a ``triton.backends.compiler.GPUTarget``; ``options``: ``num_warps`` and ``num_stages``, else Triton's
    own. The arguments of the compiled kernel are those of the Python function that are not in ``constants``, in their
    order.
    """
    import triton
    from triton.compiler import ASTSource

    absent = [name for name in kernel.arg_names if name.endswith("unit") and not constants.get("NORMALIZE", True)]
    constants = constants | dict.fromkeys(absent)
    types = {"in": dtype, "acc": "fp64" if dtype == "fp64" else "fp32"}
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[(i,)] = "constexpr", constants[name]
        elif name in POINTERS:
            signature[name] = f"*{types.get(POINTERS[name], POINTERS[name])}"
        else:
            signature[name] = "i32"
        if name in POINTERS or name in ALIGNED:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    with asked(target):
        return triton.compile(source, target=target, options=options | {"enable_fp_fusion": True})


@contextlib.contextmanager
def asked(target: Any) -> Iterator[None]:
    """Inside, kernels that ask for their processor (``tl.target_info``) are told this one."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    try:
        yield
    finally:
        driver._active = before
