"""What a similarity costs in the main loops of the CUDA kernels: instructions on the shortest way through them.

``run_phases`` serves every loss. Its two main loops, over the tiles of the statistics and of the gradients, hold code
for a second softmax, for positives, and for rows that are not aligned, which branches leave out. What a loop costs can
therefore not be read off by adding up its instructions. The shortest way through it can, on which every product of
the tile is formed, every similarity has one exponential, and every vector of 16 bytes that the tile needs is copied:
no call takes fewer instructions. It is that of one softmax over all keys.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from .sass import Code, kind_of

TILE, THREADS = 64, 128  # tile/layout.cuh; a product of the tile that does not come out even is refused below
SIMILARITIES = TILE * TILE // THREADS  # of a thread and tile
COPIES = TILE * 128 // 16 // THREADS  # of a thread for one chunk of one side
MULTIPLIERS = {"bf16": 16 * 8 * 16, "fp16": 16 * 8 * 16, "tf32": 16 * 8 * 8, "tf32x3": 16 * 8 * 8}  # of a warp's HMMA
Loop = tuple[int, int]
Done = tuple[int, ...]  # exponentials; copies in the loop over chunks, and outside it; products outside it
State = tuple[int, Done]  # before which instruction


class Needs(NamedTuple):
    """Of a tile: chunks of its products, and product instructions of a thread for a chunk of either product."""

    chunks: int
    similarity: int
    gradient: int  # for all chunks that a block owns; 0: statistics
    owned: int  # chunks of those


def needs(dtype: str, D: int, chunk: int, owned: int, phase: str) -> Needs:
    """``chunk``: features of a chunk; ``owned``: chunks of the gradient that a block owns."""
    chunks = -(-D // chunk)
    owned = min(owned, chunks) if phase == "gradients" else 0
    multiplications = TILE * TILE * chunk * (3 if dtype == "tf32x3" else 1)
    one = multiplications // (MULTIPLIERS[dtype] * THREADS // 32 if dtype in MULTIPLIERS else THREADS)
    return Needs(chunks, one, one * owned * {"bf16": 3, "fp16": 2}.get(dtype, 1), owned)


class UnreadableError(Exception):
    """The code does not have the form that is understood here."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise UnreadableError(what)


def inside(inner: Loop, outer: Loop) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1] and inner != outer


def smallest(loops: list[Loop]) -> list[Loop]:
    """Those that hold no other."""
    return [loop for loop in loops if not any(inside(other, loop) for other in loops)]


class Body:
    """A main loop: the loops of products in it, and how often each of its instructions runs in a tile."""

    def __init__(self, code: Code, loop: Loop, dtype: str) -> None:
        self.code, self.loop = code, loop
        self.kinds = [kind_of(name) for name in code.instructions]
        product = "HMMA" if dtype in MULTIPLIERS else "FFMA"
        self.product = [name.startswith(product) for name in code.instructions]
        self.copies = [name.startswith("LDGSTS") for name in code.instructions]
        within = [other for other in code.loops if inside(other, loop)]
        ready = [other for other in within if self.count(self.product, other) >= 16]
        (self.chunk,) = smallest([other for other in ready if self.count(self.copies, other)]) or [(0, 0)]
        check(self.chunk != (0, 0), "no loop over the chunks of the features")
        self.turns = smallest([other for other in ready if not self.count(self.copies, other)])
        places = range(len(self.kinds))
        turning = [any(a <= i <= b for a, b in self.turns) for i in places]
        self.multiplies = [self.product[i] and (turning[i] or dtype in MULTIPLIERS) for i in places]

    def count(self, what: list[bool], loop: Loop) -> int:
        return sum(what[loop[0] : loop[1] + 1])

    @property
    def is_gradient(self) -> bool:
        """Whether there are products beside those of the similarities."""
        if any(not inside(turn, self.chunk) for turn in self.turns):
            return True
        return "tensor" in self.kinds[self.chunk[1] + 1 : self.loop[1] + 1]

    def weights(self, need: Needs) -> list[int]:
        """How often an instruction runs per tile; all products have to come out."""
        weight = [1] * len(self.kinds)
        for loops, wanted in (
            ([turn for turn in self.turns if inside(turn, self.chunk)], need.similarity),
            ([turn for turn in self.turns if not inside(turn, self.chunk)], need.gradient),
        ):
            held = sum(self.count(self.product, turn) for turn in loops)
            check(not held or wanted % held == 0, f"{held} products in a turn, of {wanted}")
            for a, b in loops:
                weight[a : b + 1] = [wanted // held] * (b + 1 - a)
        first, last = self.chunk
        done = sum(weight[i] for i in range(first, last + 1) if self.multiplies[i])
        check(done == need.similarity, f"{done} products in a chunk, of {need.similarity}")
        weight[first : last + 1] = [w * need.chunks for w in weight[first : last + 1]]
        return weight


def shortest(body: Body, need: Needs) -> Counter[str]:
    """Instructions by kind on the shortest way through the loop that does what has to be done."""
    weight, (first, last) = body.weights(need), body.loop
    wanted = SIMILARITIES, 2 * COPIES, COPIES * need.owned, need.gradient
    best: dict[int, dict[Done, tuple[int, State | None]]] = {first: {(0, 0, 0, 0): (0, None)}}  # cost, state before
    for i in range(first, last + 1):
        jump = body.code.jumps.get(i) if i < last else None
        goes = [] if jump and jump.always else [i + 1]
        goes += [jump.target] if jump and i < jump.target <= last else []
        chunked = body.chunk[0] <= i <= body.chunk[1]
        copies, products = body.copies[i], weight[i] if body.multiplies[i] and not chunked else 0
        step = body.kinds[i] == "ex2", copies and chunked, copies and not chunked, products
        for done, (cost, _) in best.get(i, {}).items():
            now = tuple(min(a + b, c) for a, b, c in zip(done, step, wanted, strict=True))
            for at in goes:
                here = best.setdefault(at, {})
                if now not in here or cost + weight[i] < here[now][0]:
                    here[now] = cost + weight[i], (i, done)
    check(wanted in best.get(last + 1, {}), "no way does all that a tile needs")
    found: Counter[str] = Counter()
    state: State | None = best[last + 1][wanted][1]
    while state is not None:
        at, done = state
        found[body.kinds[at]] += weight[at]
        state = best[at][done][1]
    return found


def per_similarity(code: Code, dtype: str, phase: str, need: Needs) -> dict[str, float]:
    """Instructions of a thread per similarity, by kind; not for float64, whose exponentials are a library's code."""
    kinds = [kind_of(name) for name in code.instructions]
    many = [loop for loop in code.loops if kinds[loop[0] : loop[1] + 1].count("ex2") >= SIMILARITIES]
    bodies = [Body(code, loop, dtype) for loop in smallest(many)]
    found = [body for body in bodies if body.is_gradient == (phase == "gradients")]
    check(len(bodies) == 2 and len(found) == 1, f"{len(bodies)} main loops, {len(found)} of them for {phase}")
    return {kind: count / SIMILARITIES for kind, count in shortest(found[0], need).items()}
