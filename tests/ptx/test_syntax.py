"""Reading PTX: comments, scopes, declarations, operands; and messages that name the place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .errors import PtxError
from .syntax import Address, Immediate, Negated, Pair, Register, Symbol, Vector, parse
from .table import TABLE

pytestmark = pytest.mark.exhaustive

TEXT = """
.version 8.7
.target sm_80, debug
.address_size 64
    // a comment with { and ; in it
.extern .shared .align 16 .b8 dynamic[];
.global .align 1 .b8 _$_str[5] = {95, 0x41, -1};
.const .f64 half = 0d3FE0000000000000;
.extern .func (.param .b32 status) vprintf (.param .b64 format, .param .b64 list);
.file 1 "kernel.cu"
.visible .entry first(
    .param .u64 .ptr .global .align 1 first_0,
    .param .align 8 .b8 first_1[24]
)
.reqntid 128
.maxntid 128, 1, 1
{
    .reg .pred %p<3>; .reg .b32 %r<10>, %single; .reg .b64 %rd<2>;
    .shared .align 8 .b8 own[96];
    .loc 1 4 0 // kernel.cu:4:0
$L__func_begin0:
    ld.param.u64 %rd1, [first_0];   /* over
      two lines */ .pragma "nounroll";
$L__BB0_1:
    @!%p1 bra $L__BB0_1;
    { .reg .b32 t; mov.u32 t, %r1; AGAIN: @%p2 bra AGAIN; bra LATER; LATER: mov.u32 %r2, t; }
    { .reg .b32 t; mov.b64 %rd1, {t, _}; AGAIN: bra.uni AGAIN; }
    ret;
}
.visible .entry second() { ret; }
    .section .debug_abbrev
    {
.b8 1 // Abbreviation Code
    }
    .section .debug_macinfo { }
"""


def test_a_module() -> None:
    module = parse(TEXT, "text")
    assert list(module.functions) == ["first", "second"]
    dynamic, table, half = module.variables
    assert (dynamic.space, dynamic.name, dynamic.align, dynamic.size) == ("shared", "dynamic", 16, None)
    assert (table.size, table.content) == (5, bytes([95, 0x41, 255, 0, 0]))
    assert (half.align, half.size) == (8, 8)
    first = module.functions["first"]
    assert first.entry
    assert [(p.name, p.size, p.align) for p in first.params] == [("first_0", 8, 8), ("first_1", 24, 8)]
    assert first.registers["%r9"] == "b32"
    assert first.registers["%single"] == "b32"
    assert "%r10" not in first.registers
    assert [(v.name, v.size) for v in first.variables] == [("own", 96)]
    assert [i.opcode for i in first.code] == ["ld", "bra", "mov", "bra", "bra", "mov", "mov", "bra", "ret"]
    assert first.labels["$L__BB0_1"] == 1


def test_scopes() -> None:
    """Two registers and two labels of one name are different ones; a label may be used before it stands there."""
    first = parse(TEXT).functions["first"]
    (one,) = [i.operands[0] for i in first.code if i.place.text == "mov.u32 t, %r1"]
    (other,) = [i.operands[1] for i in first.code if i.opcode == "mov" and isinstance(i.operands[1], Vector)]
    assert isinstance(one, Register)
    assert one != other.items[0]
    assert {first.registers[one.name], first.registers[other.items[0].name]} == {"b32"}
    branches = [i.operands[0].name for i in first.code if i.opcode == "bra"]
    assert len(set(branches)) == 4
    assert [first.labels[name] for name in branches] == [1, 3, 5, 7]


def test_operands() -> None:
    line = "shfl.sync.bfly.b32 %r1|%p1, %r2, 0x1F, -1, !%p2;"
    (instruction,) = body(line)
    assert instruction.opcode == "shfl"
    assert instruction.modifiers == ("sync", "bfly", "b32")
    assert instruction.operands == (
        Pair(Register("%r1"), Register("%p1")),
        Register("%r2"),
        Immediate(31),
        Immediate(-1),
        Negated(Register("%p2")),
    )
    (instruction,) = body("@!%p1 ld.shared::cta.L1::evict_last.v2.f32 { %f1, _ }, [ %r1 + -16 ];")
    assert instruction.guard == Negated(Register("%p1"))
    assert instruction.modifiers == ("shared::cta", "L1::evict_last", "v2", "f32")
    assert instruction.operands == (Vector((Register("%f1"), Symbol("_"))), Address(Register("%r1"), -16))
    (instruction,) = body("call.uni (back), f, (a, b);")
    assert instruction.operands == (Vector((Symbol("back"),)), Symbol("f"), Vector((Symbol("a"), Symbol("b"))))
    (instruction,) = body("mov.f32 %f1, 0f3F800000;")
    assert instruction.operands[1] == Immediate(0x3F800000, 32)


def body(line: str) -> list:
    return parse(f".visible .entry k() {{ {line} }}").functions["k"].code


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (".entry k() { add.u32 %r1, %r2 }", "no `;` after this"),
        (".entry k() { ret;", "the function does not end"),
        (".entry k(.param .texref t) { ret; }", "`.param .texref t`: a declaration that is not modelled"),
        (".entry k() {\n\n .reg .b128 %q<2>; ret; }", "k.ptx:3: `.reg .b128 %q<2>`: registers of a type"),
        (".global .b32 x[2] = {generic(y), 1};", "an initial value that is not modelled"),
        (".entry k() { 7up.u32 %r1; }", "`7up.u32 %r1`: not an instruction"),
        (".entry k() { mov.u32 %r1, %r2 + 1; }", "`%r2 + 1` is not an operand"),
        (".entry k() { ld.global.u32 %r1, [%r2*4]; }", "`[%r2*4]` is not an address"),
        (".maxnreg 5;", "a declaration that is not modelled"),
        (".entry { }", "not the head of a function"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(PtxError, match=re.escape(message)):
        parse(text, "k.ptx")


def test_lines_are_counted() -> None:
    text = ".visible .entry k()\n{\n  .reg .b32 %r<9>;\n  mov.u32 %r1, 0; // here\n  mov.u32 %r2,\n    0;\n}\n"
    assert [i.place.line for i in parse(text).functions["k"].code] == [4, 5]
    assert str(parse(text, "k.ptx").functions["k"].code[1].place) == "k.ptx:5: `mov.u32 %r2, 0`"


def test_every_instruction_is_tested() -> None:
    """Each name of the table occurs in a test as it is written in PTX."""
    text = "\n".join(path.read_text() for path in sorted(Path(__file__).parent.glob("test_*.py")))
    missing = [name for name in TABLE if not re.search(rf"(?<![\w.]){name}(\.[a-zL{{]|;)", text)]
    assert not missing
