"""PTX text to plain data: modules, functions, variables, instructions and their operands.

Names declared in a nested scope (inline assembly, call sequences) are renamed, so a function is one flat list of
instructions. Debug sections are dropped. Nothing here knows what an instruction does.
"""

from __future__ import annotations

import bisect
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from .errors import Place, PtxError


@dataclass(frozen=True)
class Register:
    """``%r1``, or a special register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The name of a variable, a function or a label; ``_`` where a result is thrown away."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bits of a float of ``width``; ``width`` 0: as wide as the instruction asks for."""

    value: int
    width: int = 0


@dataclass(frozen=True)
class Address:
    """An address in memory, written ``[base + offset]``."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b}``, or the lists ``(a, b)`` of a call."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``%r1|%p1``: a result and the predicate that comes with it."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Negated:
    """A predicate that counts the other way, written ``!%p1``."""

    register: Register


Operand: TypeAlias = Register | Symbol | Immediate | Address | Vector | Pair | Negated


def registers_in(operand: Operand) -> Iterator[str]:
    """Names of the registers that an operand mentions."""
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from registers_in(item)
    elif isinstance(operand, Pair):
        yield from registers_in(operand.first)
        yield from registers_in(operand.second)
    elif isinstance(operand, Negated):
        yield operand.register.name
    elif isinstance(operand, Address):
        yield from registers_in(operand.base)


@dataclass(frozen=True)
class Instruction:
    """An instruction, written ``@guard opcode.modifiers operands;``."""

    place: Place
    guard: Register | Negated | None
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]


@dataclass(frozen=True)
class Variable:
    """A variable of any state space; ``size`` in bytes, ``None`` for the dynamic shared memory."""

    space: str
    name: str
    align: int
    size: int | None
    content: bytes = b""


@dataclass
class Function:
    """A kernel (``entry``) or a function, its labels as indices into ``code``."""

    name: str
    entry: bool
    params: list[Variable]
    returns: list[Variable]
    place: Place
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Module:
    """The functions and the variables of one PTX text."""

    source: str
    functions: dict[str, Function]
    variables: list[Variable]


WIDTHS = {"pred": 1, "f16x2": 32, "bf16x2": 32, "bf16": 16, "tf32": 32} | {
    f"{kind}{width}": width for kind in "busf" for width in (8, 16, 32, 64)
}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_SPACE = re.compile(r"\s*")
_LINE_DIRECTIVE = re.compile(r"\.(version|target|address_size|file|loc)\b[^\n]*")
_SECTION = re.compile(r"\.section\b[^{]*\{[^}]*\}", re.S)
_FUNCTION = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\b")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_INNER_LABEL = re.compile(r"[;{}\n]\s*([\w$]+)\s*:(?!:)")
_DECLARATION = re.compile(
    r"(?:\.(?:visible|weak|extern)\s+)*\.(param|shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+(?:\.ptr\b(?:\s+\.(?:global|const|shared|local))?(?:\s+\.align\s+\d+)?\s+)?([\w$]+)\s*"
    r"(\[\s*\d*\s*\])?\s*(?:=\s*(.*))?",
    re.S,
)
_INSTRUCTION = re.compile(r"(?:@(!?)\s*(%?[\w$]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)", re.S)
_REGISTER_DECLARATION = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_REGISTER_RANGE = re.compile(r"([\w%$]+)(?:<(\d+)>)?")


def parse(text: str, source: str = "ptx") -> Module:
    """Read one PTX text; ``source`` is its name in messages."""
    return _Parser(text, source).module()


class _Parser:
    def __init__(self, text: str, source: str):
        self.text = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)
        self.source = source
        self.at = 0
        self.scopes: list[dict[str, str]] = []  # name in the text -> unique name
        self.renamed = 0
        self.registers_seen: set[str] = set()  # of the function that is being read
        self.line_ends = [m.start() for m in re.finditer("\n", self.text)]

    # ---- text ----
    def place(self, start: int, text: str) -> Place:
        return Place(self.source, bisect.bisect_left(self.line_ends, start) + 1, text)

    def skip(self) -> bool:
        """To the next statement; false at the end of the text."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            found = _LINE_DIRECTIVE.match(self.text, self.at) or _SECTION.match(self.text, self.at)
            if not found:
                return self.at < len(self.text)
            self.at = found.end()

    def statement(self, end: str = ";") -> tuple[Place, str]:
        start, stop = self.at, self.text.find(end, self.at)
        if stop < 0:
            raise PtxError(f"no `{end}` after this", self.place(start, self.text[start : start + 60]))
        self.at = stop + 1
        text = self.text[start:stop].strip()
        return self.place(start, text), text

    # ---- module ----
    def module(self) -> Module:
        functions: dict[str, Function] = {}
        variables: list[Variable] = []
        while self.skip():
            if _FUNCTION.match(self.text, self.at):
                function = self.function()
                if function is not None:
                    functions[function.name] = function
            else:
                place, text = self.statement()
                if not text.startswith((".pragma", ".alias")):
                    variables.append(_variable(text, place))
        return Module(self.source, functions, variables)

    def function(self) -> Function | None:
        start = self.at
        stop = min((i for i in (self.text.find("{", start), self.text.find(";", start)) if i >= 0), default=-1)
        header = self.text[start:stop]
        place = self.place(start, header.split("(")[0])
        self.at = stop + 1
        found = re.match(r".*?\.(entry|func)\s*(\([^)]*\))?\s*([\w$]+)\s*(\([^)]*\))?", header, re.S)
        if stop < 0 or not found:
            raise PtxError("not the head of a function", place)
        if self.text[stop] == ";":
            return None  # a declaration
        returns, params = (_parameters(found.group(i), place) for i in (2, 4))
        function = Function(found.group(3), found.group(1) == "entry", params, returns, place)
        self.scopes, self.registers_seen = [{}], set()
        while self.scopes:
            self.body_statement(function)
        return function

    def body_statement(self, function: Function) -> None:
        if not self.skip():
            raise PtxError("the function does not end", function.place)
        if self.text[self.at] == "{":
            self.open_scope()
            return
        if self.text[self.at] == "}":
            self.scopes.pop()
            self.at += 1
            return
        label = _LABEL.match(self.text, self.at)
        if label:
            self.at = label.end()
            name = label.group(1)
            self.skip()
            if self.text.startswith(".branchtargets", self.at):
                targets = self.statement()[1].removeprefix(".branchtargets")
                function.branch_targets[name] = [target.strip() for target in targets.split(",")]
            else:
                function.labels[self.resolve(name)] = len(function.code)
            return
        place, text = self.statement()
        if text.startswith(".reg"):
            self.registers(function, text, place)
        elif text.startswith("."):
            if not text.startswith(".pragma"):
                variable = _variable(text, place)
                name = self.declare(variable.name, rename=len(self.scopes) > 1)
                function.variables.append(
                    Variable(variable.space, name, variable.align, variable.size, variable.content)
                )
        elif text:
            function.code.append(self.instruction(text, place))

    # ---- names ----
    def open_scope(self) -> None:
        """A nested scope; its labels may be used before they stand in the text."""
        start = self.at
        depth, self.at = 1, self.at + 1
        stop = start + 1
        while depth and stop < len(self.text):
            depth += {"{": 1, "}": -1}.get(self.text[stop], 0)
            stop += 1
        self.scopes.append({})
        for label in _INNER_LABEL.finditer(self.text, start, stop):
            self.declare(label.group(1), rename=True)

    def declare(self, name: str, rename: bool) -> str:
        unique = name
        if rename:
            self.renamed += 1
            unique = f"{name}@{self.renamed}"
        self.scopes[-1][name] = unique
        return unique

    def resolve(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def registers(self, function: Function, text: str, place: Place) -> None:
        found = _REGISTER_DECLARATION.fullmatch(text)
        if not found or found.group(1) not in WIDTHS:
            raise PtxError("registers of a type that is not modelled", place)
        for item in found.group(2).split(","):
            name, count = _REGISTER_RANGE.fullmatch(item.strip()).groups()
            for one in [name] if count is None else [f"{name}{i}" for i in range(int(count))]:
                function.registers[self.declare(one, rename=len(self.scopes) > 1)] = found.group(1)
        self.registers_seen = set(function.registers)

    # ---- instructions ----
    def instruction(self, text: str, place: Place) -> Instruction:
        found = _INSTRUCTION.fullmatch(text)
        if not found:
            raise PtxError("not an instruction", place)
        inverted, guard, opcode, modifiers, rest = found.groups()
        register = Register(self.resolve(guard)) if guard else None
        return Instruction(
            place,
            Negated(register) if register and inverted else register,
            opcode,
            tuple(modifiers.split(".")[1:]),
            tuple(self.operand(item, place) for item in _split(rest)),
        )

    def operand(self, text: str, place: Place) -> Operand:
        if text.startswith("["):
            return self.address(text, place)
        if text.startswith(("{", "(")):
            return Vector(tuple(self.operand(item, place) for item in _split(text[1:-1])))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first.strip(), place), self.operand(second.strip(), place))
        if text.startswith("!"):
            return Negated(Register(self.resolve(text[1:].strip())))
        number = _number(text)
        if number is not None:
            return number
        if not re.fullmatch(r"%?[\w$.]+", text):
            raise PtxError(f"`{text}` is not an operand", place)
        name = self.resolve(text)
        return Register(name) if text.startswith("%") or name in self.registers_seen else Symbol(name)

    def address(self, text: str, place: Place) -> Address:
        found = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not found:
            raise PtxError(f"`{text}` is not an address", place)
        base = self.operand(found.group(1), place)
        assert isinstance(base, Register | Symbol | Immediate)
        return Address(base, int(found.group(2) or "0", 0))


def _split(text: str) -> list[str]:
    """Comma-separated operands; commas in brackets do not count."""
    items, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            items.append(text[start:i].strip())
            start = i + 1
    items.append(text[start:].strip())
    return [item for item in items if item]


def _number(text: str) -> Immediate | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Immediate(int(text[2:], 16), 32)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Immediate(int(text[2:], 16), 64)
    if re.fullmatch(r"-?\d+\.\d*", text):
        return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 64)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        digits = text.rstrip("U")
        octal = re.fullmatch(r"-?0\d+", digits)
        return Immediate(int(digits, 8 if octal else 0))
    return None


def _parameters(text: str | None, place: Place) -> list[Variable]:
    return [_variable(item, place) for item in _split(text[1:-1])] if text else []


def _variable(text: str, place: Place) -> Variable:
    found = _DECLARATION.fullmatch(text.strip())
    if not found or found.group(3) not in WIDTHS:
        raise PtxError("a declaration that is not modelled", place._replace(text=text))
    space, align, kind, name, length, content = found.groups()
    width = WIDTHS[kind] // 8
    count = length[1:-1].strip() if length else "1"
    size = int(count) * width if count else None
    values = b""
    if content:
        numbers = [_number(item) for item in _split(content.strip().strip("{}"))]
        if None in numbers:
            raise PtxError("an initial value that is not modelled", place._replace(text=text))
        values = b"".join((n.value % (1 << 8 * width)).to_bytes(width, "little") for n in numbers)
        size = max(size or 0, len(values))
        values = values.ljust(size, b"\0")
    return Variable(space, name, int(align or width), size, values)
