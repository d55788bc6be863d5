"""Control: who goes where. A thread that executes one of these has its counter behind it already."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import AccessError
from .formats import Array
from .site import Action, Site, Source
from .syntax import Operand, Symbol, Variable, Vector


def bra(site: Site) -> Action:
    """The machine branches itself; this is only to have it in the table."""

    def action(lanes: Array) -> None:
        raise AssertionError("the machine branches itself")

    return action


def brx(site: Site) -> Action:
    """``brx.idx index, list``: the label at that place of a ``.branchtargets`` list."""
    machine, function = site.machine, site.function
    index, name = site.source(0, "u32"), site.operands[1]
    labels = function.branch_targets.get(name.name) if isinstance(name, Symbol) else None
    if labels is None:
        raise site.error("brx without its list of labels")
    counters = np.array([function.labels[label] for label in labels])

    def action(lanes: Array) -> None:
        chosen = index()
        if (chosen[lanes] >= counters.size).any():
            raise AccessError(f"a list of {counters.size} labels is too short", int(np.flatnonzero(lanes)[0]))
        machine.pc[lanes] = machine.entry[function.name] + counters[chosen[lanes]]

    return action


def ret(site: Site) -> Action:
    """Of a kernel the end, of a function the way back."""
    machine, function = site.machine, site.function
    if function.entry:
        return machine.exit

    def action(lanes: Array) -> None:
        back = machine.return_to[function.name]
        for counter in np.unique(back[lanes]):
            here = lanes & (back == counter)
            for copy in machine.on_return[function.name, int(counter)]:
                copy(here)
        machine.pc[lanes] = back[lanes]

    return action


def leave(site: Site) -> Action:
    """``exit``: the end of the thread, wherever it is."""
    return site.machine.exit


def call(site: Site) -> Action:
    """``call (result), function, (arguments);``: arguments are copied whole, the result when the function returns."""
    machine = site.machine
    names = [operand.name for operand in site.operands if isinstance(operand, Symbol)]
    callee = machine.module.functions.get(names[0]) if len(names) == 1 else None
    if callee is None:
        return _stop(f"a call of {' '.join(names)}, which is not in this PTX")
    after = site.operands.index(Symbol(callee.name))
    results = _names(site.operands[:after])
    arguments = _names(site.operands[after + 1 :])
    if len(results) != len(callee.returns) or len(arguments) != len(callee.params):
        raise site.error(f"{callee.name} takes {len(callee.params)} arguments and gives {len(callee.returns)} results")
    there = [_copy(site, name, callee.name, formal) for name, formal in zip(arguments, callee.params, strict=True)]
    back = [_copy(site, name, callee.name, formal, True) for name, formal in zip(results, callee.returns, strict=True)]

    def action(lanes: Array) -> None:
        for copy in there:
            copy(lanes)
        counter = machine.pc[lanes]
        machine.return_to[callee.name][lanes] = counter
        machine.on_return[callee.name, int(counter[0])] = back
        machine.pc[lanes] = machine.entry[callee.name]

    return action


def _names(operands: tuple[Operand, ...]) -> list[str]:
    items = [item for operand in operands if isinstance(operand, Vector) for item in operand.items]
    return [item.name for item in items if isinstance(item, Symbol)]


def _copy(site: Site, actual: str, callee: str, formal: Variable, back: bool = False) -> Callable[[Array], None]:
    """Between a parameter variable of the caller and that of the function, every thread its own."""
    machine = site.machine
    own = machine.symbol(site, actual)
    theirs = machine.parameter(callee, formal.name)
    size = formal.size or 0
    source, target = (theirs, own) if back else (own, theirs)

    def copy(lanes: Array) -> None:
        rows = machine.call_params.data.reshape(machine.size, -1)
        rows[lanes, target : target + size] = rows[lanes, source : source + size]

    return copy


def _stop(message: str) -> Action:
    def action(lanes: Array) -> None:
        raise AccessError(message, int(np.flatnonzero(lanes)[0]))

    return action


def trap(site: Site) -> Action:
    """Stops with an error: the kernel gives up (``trap``)."""
    return _stop("the kernel traps here")


def bar(site: Site) -> Action:
    """Barriers of the block (``bar.sync``, ``bar.red``) and of the warp (``bar.warp.sync``)."""
    if site.has("warp"):
        return lambda lanes: None
    convergence = site.machine.convergence
    reduces = site.has("red")
    first = 1 if reduces else 0
    number = site.source(first, "u32")
    extra = len(site.operands) - first - 1 - reduces
    count = site.source(first + 1, "u32") if extra else None
    finish = _reduction(site) if reduces else None
    return lambda lanes: convergence.arrive(lanes, number(), None if count is None else count(), finish)


def _reduction(site: Site) -> Callable[[Array], None]:
    """``bar.red``: and, or, number of a predicate over the threads that meet; what everyone gets when they leave."""
    machine, predicate = site.machine, site.source(-1, "pred")
    operation = site.one_of("and", "or", "popc", default="")
    site.refuse(not operation, "bar.red without its operation")
    target = site.target(0, "u32" if operation == "popc" else "pred")

    def finish(leaving: Array) -> None:
        flags = predicate().reshape(machine.blocks, -1)
        here = leaving.reshape(machine.blocks, -1)
        found = {
            "and": (flags | ~here).all(1),
            "or": (flags & here).any(1),
            "popc": (flags & here).sum(1).astype(np.uint32),
        }[operation]
        target(found[machine.block_of], leaving)

    return finish


def bar_members(site: Site) -> Source | None:
    """Of a barrier of the warp the threads that have to come; others are counted by block."""
    return site.source(0, "u32") if site.has("warp") else None
