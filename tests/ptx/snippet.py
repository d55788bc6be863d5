"""Running a few lines of PTX: every thread loads its elements of the inputs, the lines run, its result is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import launch
from .schedule import Lockstep

HEAD = ".version 8.7\n.target sm_80\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<8>;  .reg .b16 %h<16>;  .reg .b32 %r<32>;  .reg .f32 %f<32>;  .reg .f64 %fd<8>;  .reg .b64 %rd<16>;
    .reg .b32 %thread;  .reg .b64 %place, %element;
    mov.u32 %r0, %ctaid.x;  mov.u32 %r1, %ntid.x;  mov.u32 %r2, %tid.x;  mad.lo.s32 %thread, %r0, %r1, %r2;
"""
UNTOUCHED = 0x55  # the result of a thread that does not get to its end
BITS = {2: "b16", 4: "b32", 8: "b64"}


def kernel(body: str, params: str = "", declarations: str = "") -> str:
    """A kernel named ``snippet`` with registers of every kind."""
    return f"{HEAD}{declarations}\n.visible .entry snippet({params})\n{{{REGISTERS}{body}\n    ret;\n}}\n"


def _move(register: str, name: str, dtype: np.dtype, store: bool = False) -> str:
    kind, place = BITS[dtype.itemsize], "[%element]"
    text = f"ld.param.b64 %place, [{name}]; mad.wide.u32 %element, %thread, {dtype.itemsize}, %place; "
    return text + (f"st.global.{kind} {place}, {register};\n" if store else f"ld.global.{kind} {register}, {place};\n")


def execute(
    body: str,
    out: Any = np.uint32,
    declarations: str = "",
    block: Sequence[int] | None = None,
    grid: Sequence[int] = (1,),
    shared_bytes: int = 0,
    schedule: Lockstep | None = None,
    **inputs: np.ndarray | list,
) -> np.ndarray:
    """The values of ``%d`` in all threads after ``body``; inputs are in the registers of their names.

    As many threads as the first input has elements, unless ``block`` says so.
    """
    arrays = {name: np.array(values) for name, values in inputs.items()}
    threads = int(np.prod(block)) if block else len(next(iter(arrays.values())))
    result = np.full(threads * int(np.prod(grid)), UNTOUCHED, np.dtype(f"u{np.dtype(out).itemsize}")).view(out)
    names = [*arrays, "d"]
    types = [*(array.dtype for array in arrays.values()), result.dtype]
    registers = "".join(f".reg .{BITS[kind.itemsize]} %{name};\n" for name, kind in zip(names, types, strict=True))
    loads = "".join(_move(f"%{name}", f"in_{name}", array.dtype) for name, array in arrays.items())
    text = registers + loads + body + "\n" + _move("%d", "in_d", result.dtype, store=True)
    params = ", ".join(f".param .u64 in_{name}" for name in names)
    run = launch.load(kernel(text, params, declarations), "snippet").launch
    run("snippet", grid, block or (threads,), [*arrays.values(), result], shared_bytes, schedule)
    return result


def values(kind: str, *numbers: Any) -> np.ndarray:
    """Numbers as an array of a PTX type; integers are taken modulo its width."""
    if kind[0] == "f":
        return np.array(numbers, {"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind])
    width = int(kind[1:])
    unsigned = np.array([int(n) % (1 << width) for n in numbers], f"u{width // 8}")
    return unsigned.view(f"i{width // 8}") if kind[0] == "s" else unsigned
