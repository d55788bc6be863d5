"""What nvcc made of the kernels of ``csrc/cuda``: registers, memory and instructions, read from a library or cubin."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ARITHMETIC = {  # as the names of the kernels say it
    "bf16": "HalfArithmeticINS_4bf16",
    "f16": "HalfArithmeticINS_3f16",
    "tf32": "Tf32ArithmeticILi1E",
    "tf32x3": "Tf32ArithmeticILi2E",
    "float": "IeeeArithmeticIfE",
    "double": "IeeeArithmeticIdE",
}


class Kernel(NamedTuple):
    """One kernel for one architecture; bytes per thread but for ``shared``."""

    arithmetic: str
    arch: str
    registers: int
    stack: int
    local: int
    instructions: Counter[str]  # by opcode without its modifiers

    @property
    def spills(self) -> bool:
        """Whether anything lies in local memory."""
        return bool(self.stack or self.local or self.instructions["LDL"] or self.instructions["STL"])


def cuobjdump() -> str | None:
    """The tool, from the toolkit or from the triton wheel."""
    triton = find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=beside) if beside else None)


def _dump(option: str, path: Path) -> dict[tuple[str, str], str]:
    """The tool's text by architecture and function."""
    tool = cuobjdump()
    assert tool is not None, "needs cuobjdump"
    text = subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
    found, arch = {}, ""
    for part in re.split(r"(?m)^(?=\s*arch = |\s*Function[ :])", text):
        named = re.match(r"\s*arch = (\S+)", part)
        function = re.match(r"\s*Function\s*:?\s*([^\s:]+)", part)
        arch = named[1] if named else arch
        if function:
            found[arch, function[1]] = part
    return found


def kernels(path: Path) -> list[Kernel]:
    """All kernels ``run_phases`` of a file, for every architecture that it holds machine code of."""
    code = _dump("--dump-sass", path)
    found = []
    for key, text in _dump("--dump-resource-usage", path).items():
        arithmetic = next((name for name, mangled in ARITHMETIC.items() if mangled in key[1]), None)
        usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        if arithmetic is None or not usage:
            continue
        opcodes = re.findall(r"(?m)^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code[key])
        found.append(Kernel(arithmetic, key[0], usage["REG"], usage["STACK"], usage["LOCAL"], Counter(opcodes)))
    return found
