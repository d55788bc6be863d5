"""What a compiled kernel consists of: registers, spills, shared memory, and the instructions of its main loop.

Tools of the Triton wheel read the machine code (``cuobjdump``, ``nvdisasm``); for AMD the compiler's assembly says it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

KINDS = {  # of instructions, by the unit that executes them
    "tensor": r"HMMA|HGMMA|DMMA|IMMA|QGMMA|UTC\w*MMA|v_mfma",
    "ex2": r"MUFU\.EX2|v_exp_f32",
    "special": r"MUFU|v_(rcp|rsq|log|sqrt)",
    "fp32": r"FFMA|FADD|FMUL|v_(pk_)?(fma|add|mul|sub|mac|fmac)_f32|v_fmac",
    "fp64": r"DFMA|DADD|DMUL|DSETP|v_(fma|add|mul)_f64",
    "spill": r"STL|LDL|scratch_(load|store)",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS|ds_",
    "global": r"LDG|STG|LDGSTS|UTMA|global_|buffer_",
    "other": r".",
}


class Report(NamedTuple):
    """Of one compiled kernel; ``loop``: instructions of the main loop by kind, for one thread and one pass."""

    registers: int
    stack: int  # bytes for a thread
    spills: int  # instructions
    shared: int  # bytes for a program
    tensor: int  # tensor-core instructions
    loop: dict[str, float]

    @property
    def spilled(self) -> bool:
        """Whether anything that should be in a register is in memory."""
        return self.stack > 0 or self.spills > 0


def kind_of(instruction: str) -> str:
    """Its kind."""
    return next(kind for kind, pattern in KINDS.items() if re.match(pattern, instruction))


def tool(name: str, *arguments: str) -> str:
    """Output of a tool that comes with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def report(compiled: Any, passes: int) -> Report:
    """Of a kernel compiled by Triton; ``passes``: how often a loop inside the main loop runs (chunks of features)."""
    if "cubin" not in compiled.asm:
        return amd_report(compiled, passes)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = dict(re.findall(r"(REG|STACK):(\d+)", tool("cuobjdump", "--dump-resource-usage", file.name)))
        code = parse_sass(tool("nvdisasm", "-c", file.name))
    return make(int(usage["REG"]), int(usage["STACK"]), compiled.metadata.shared, code, passes)


def amd_report(compiled: Any, passes: int) -> Report:
    """From the metadata and the assembly for an AMD processor."""
    text = compiled.asm["amdgcn"]
    number = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in  # type: ignore[index]
              ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")}  # fmt: skip
    stack = number["private_segment_fixed_size"]
    code = parse_amd(text)
    found = make(number["vgpr_count"], stack, compiled.metadata.shared, code, passes)
    return found._replace(spills=found.spills + number["vgpr_spill_count"])  # scalars spill into lanes, not memory


class Code(NamedTuple):
    """Instructions in order, and the loops among them as (first, last)."""

    instructions: list[str]
    loops: list[tuple[int, int]]


def parse_sass(text: str) -> Code:
    """From ``nvdisasm -c``."""
    return _parse(
        text, r"^(\.L_x_\d+):", r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", r"`\((\.L_x_\d+)\)"
    )


def parse_amd(text: str) -> Code:
    """From the assembly of LLVM."""
    return _parse(text, r"^(\.LBB\d+_\d+):", r"^\s+([a-z]+_\w+)(.*)$", r"(\.LBB\d+_\d+)")


def _parse(text: str, label: str, instruction: str, target: str) -> Code:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in text.splitlines():
        if found := re.search(label, line):
            labels[found[1]] = len(instructions)
        elif found := re.search(instruction, line):
            goal = re.search(target, found[2])
            if goal and goal[1] in labels and ("BRA" in found[1] or "branch" in found[1]):
                loops.append((labels[goal[1]], len(instructions)))
            instructions.append(found[1])
    return Code(instructions, loops)


def make(registers: int, stack: int, shared: int, code: Code, passes: int) -> Report:
    """A report; the main loop is the smallest that holds the most exponentials."""
    kinds = [kind_of(name) for name in code.instructions]
    weight = [1.0] * len(kinds)
    with_ex2 = [(a, b) for a, b in code.loops if "ex2" in kinds[a : b + 1]]
    first, last = min(with_ex2, key=lambda loop: loop[1] - loop[0], default=(0, len(kinds) - 1))
    for a, b in code.loops:
        if first <= a and b <= last and (a, b) != (first, last) and "tensor" in kinds[a : b + 1]:
            weight[a : b + 1] = [float(passes)] * (b + 1 - a)
    loop: Counter[str] = Counter()
    for i in range(first, last + 1):
        loop[kinds[i]] += weight[i]  # type: ignore[assignment]
    return Report(registers, stack, kinds.count("spill"), shared, kinds.count("tensor"), dict(loop))
