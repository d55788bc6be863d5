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
    "fp32x2": r"(FFMA|FADD|FMUL)2|v_pk_(fma|add|mul)_f32",  # two numbers each
    "fp32": r"FFMA|FADD|FMUL|v_(fma|add|mul|sub|mac|fmac)_f32|v_fmac",
    "fp64": r"DFMA|DADD|DMUL|DSETP|v_(fma|add|mul)_f64",
    "spill": r"STL|LDL|scratch_(load|store)",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS|ds_",
    "global": r"LDG|STG|LDGSTS|UTMA|global_|buffer_",
    "other": r".",
}


class Report(NamedTuple):
    """What one compiled kernel consists of. ``loop``: instructions of the main loop by kind, per thread and pass."""

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
    """The key of ``KINDS`` that an instruction belongs to."""
    return next(kind for kind, pattern in KINDS.items() if re.match(pattern, instruction))


def tool(name: str, *arguments: str) -> str:
    """Output of a tool that comes with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def report(compiled: Any, passes: int = 1, products: float = 1, bare: bool = False) -> Report:
    """The report of a kernel compiled by Triton. ``passes``: how often a loop of products in its main loop runs.

    That is the loop over chunks of features; ``products``: multiplications of a thread for one of them. ``bare``: its
    main loop is one of products.
    """
    if "cubin" not in compiled.asm:
        return amd_report(compiled, passes, products, bare)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = dict(re.findall(r"(REG|STACK):(\d+)", tool("cuobjdump", "--dump-resource-usage", file.name)))
        code = parse_sass(tool("nvdisasm", "-c", file.name))
    return make(int(usage["REG"]), int(usage["STACK"]), compiled.metadata.shared, code, passes, products, bare)


def amd_report(compiled: Any, passes: int, products: float, bare: bool) -> Report:
    """The report of a kernel compiled for an AMD processor, from its metadata and assembly."""
    text = compiled.asm["amdgcn"]
    number = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in  # type: ignore[index]
              ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")}  # fmt: skip
    stack = number["private_segment_fixed_size"]
    code = parse_amd(text)
    found = make(number["vgpr_count"], stack, compiled.metadata.shared, code, passes, products, bare)
    return found._replace(spills=found.spills + number["vgpr_spill_count"])  # scalars spill into lanes, not memory


class Jump(NamedTuple):
    """Where an instruction may go instead of on to the next, and whether it always does."""

    target: int
    always: bool


class Code(NamedTuple):
    """Instructions in order, the loops among them as (first, last), and the jumps by the place of their instruction."""

    instructions: list[str]
    loops: list[tuple[int, int]]
    jumps: dict[int, Jump]


def parse_sass(text: str) -> Code:
    """Instructions, loops and jumps from the output of ``nvdisasm -c``."""
    instruction = r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);"
    return _parse(text, r"^(\.L_x_\d+):", instruction, r"`\((\.L_x_\d+)\)", "BRA|CALL|JMP", r"\s*`")


def parse_amd(text: str) -> Code:
    """Instructions, loops and jumps from LLVM's assembly for an AMD processor."""
    target = r"(\.LBB\d+_\d+)"
    return _parse(text, r"^(\.LBB\d+_\d+):", r"^\s+()([a-z]+_\w+)(.*)$", target, r"s_c?branch", r"$^")


def _parse(text: str, label: str, instruction: str, target: str, jump: str, alone: str) -> Code:
    """``alone``: what the arguments of a jump look like that depends on nothing."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    goals: dict[int, tuple[str, bool]] = {}
    for line in text.splitlines():
        if found := re.search(label, line):
            labels[found[1]] = len(instructions)
        elif found := re.search(instruction, line):
            guard, name, arguments = found.groups()
            if re.match(jump, name) and (goal := re.search(target, arguments)):
                goals[len(instructions)] = goal[1], not guard and re.match(alone, arguments) is not None
            instructions.append(name)
    jumps = {i: Jump(labels[goal], always) for i, (goal, always) in goals.items() if goal in labels}
    loops = [(to, i) for i, (to, _) in jumps.items() if to <= i and "CALL" not in instructions[i]]
    return Code(instructions, loops, jumps)


def make(
    registers: int, stack: int, shared: int, code: Code, passes: int = 1, products: float = 1, bare: bool = False
) -> Report:
    """A report; the main loop is the smallest that holds the most exponentials.

    Those of float64 are made of other instructions; its main loop is the smallest that holds most of the arithmetic.
    ``bare``: it is the smallest that multiplies, beside which compilers may put copies of its first and last turn.
    """
    kinds = [kind_of(name) for name in code.instructions]
    weight = [1.0] * len(kinds)
    arithmetic = [kind in ("fp64", "tensor") for kind in kinds]
    loops = [(a, b) for a, b in code.loops if bare and _multiplies(kinds[a : b + 1], products)]
    loops = loops or [(a, b) for a, b in code.loops if "ex2" in kinds[a : b + 1]]
    loops = loops or [(a, b) for a, b in code.loops if sum(arithmetic[a : b + 1]) > 0.75 * sum(arithmetic)]
    first, last = min(loops, key=lambda loop: loop[1] - loop[0], default=(0, len(kinds) - 1))
    for a, b in code.loops:
        if first <= a and b <= last and (a, b) != (first, last) and _multiplies(kinds[a : b + 1], products):
            weight[a : b + 1] = [float(passes)] * (b + 1 - a)
    loop: Counter[str] = Counter()
    for i in range(first, last + 1):
        loop[kinds[i]] += weight[i]  # type: ignore[assignment]
    return Report(registers, stack, kinds.count("spill"), shared, kinds.count("tensor"), dict(loop))


def _multiplies(kinds: list[str], products: float) -> bool:
    """Whether a loop is one of products: on tensor cores, or of as many numbers."""
    plain = kinds.count("fp64") + kinds.count("fp32") + 2 * kinds.count("fp32x2")
    return "tensor" in kinds or plain >= products
