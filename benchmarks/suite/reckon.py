"""A gathered loss on 8 to 1,024 GPUs, reckoned from bytes and FLOP: ``python -m benchmarks.suite.reckon``.

Nothing here is measured. Inputs are the peaks that makers of the hardware state, and the share of them that is assumed
to be reached; every input is an option of the command.

    W ranks, B instances a rank in V views of D features, P pairs of views, halves on the wire
    gather            G = (W - 1) V B D 2 bytes / gather bandwidth
    products          C = n * 2 P B (W B) D FLOP / FLOP/s          what the Triton kernels do for halves, n below
    reduce-scatter    R = (W - 1) V B D 4 bytes / gather bandwidth  float32
    gathered          G + C + R        nothing overlaps: products need all keys, gradients all products
    at best           max(C, G + R)    if the messages ran beside the products, at no cost
    a ring            max(C, k (G + R))  keys and their gradients go from rank to rank while products run; k: how many
                                         times less bandwidth one link has than gathering

n = 1 + 2 (g + 1): the similarities once for the statistics, and for each of two gradients a product and the
similarities again, once for each of the g = ceil(D / 128) groups of features that a program owns.

Gathering is bound by what a node receives: all its network adapters at once, which its GPUs then share over NVLink. A
ring crosses from node to node over one adapter.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

HALF, SINGLE = 2, 4  # bytes
OWNED = 128  # features of a gradient that a program of the Triton kernels owns, of half types
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class System:
    """A machine of H100 or H200 GPUs, and what is trained on it.

    Attributes:
        flops: dense bfloat16 FLOP/s of a GPU.
        nvlink: bytes/s that a GPU receives within its node.
        adapter: bytes/s that a network adapter receives; there is one for each GPU.
        node: GPUs of a node.
        flops_share: of the peak, by the loss and by the encoder.
        link_share: of the bandwidths.
        B: instances a rank.
        D: features.
        V: views.
        encoder: FLOP of the encoder for one view, forward and backward.
    """

    flops: float = 989e12
    nvlink: float = 450e9
    adapter: float = 50e9
    node: int = 8
    flops_share: float = 0.4
    link_share: float = 0.8
    B: int = 256
    D: int = 256
    V: int = 2
    encoder: float = 3 * 35e9


@dataclass(frozen=True)
class Reckoned:
    """Seconds of a step on ``ranks`` GPUs, and bytes of the gathered keys and their gradients, both in float32."""

    ranks: int
    gather: float
    products: float
    scatter: float
    ring: float
    encoder: float
    memory: float

    @property
    def gathered(self) -> float:
        """A step in which one thing is done after the other."""
        return self.gather + self.products + self.scatter

    @property
    def share(self) -> float:
        """Of a training step, that of encoder and loss."""
        return self.gathered / (self.encoder + self.gathered)

    @property
    def saved(self) -> float:
        """The share of a training step that messages beside the products could save at best."""
        return min(self.products, self.gather + self.scatter) / (self.encoder + self.gathered)


def gather_bandwidth(system: System, ranks: int) -> float:
    """Bytes/s that a rank receives of a gather: within a node by NVLink, else by all adapters of the node together."""
    network = system.adapter * system.node if ranks > system.node else system.nvlink
    return system.link_share * min(system.nvlink, network)


def ring_bandwidth(system: System, ranks: int) -> float:
    """Bytes/s of the slowest link of a ring through all ranks."""
    return system.link_share * (system.adapter if ranks > system.node else system.nvlink)


def sent(system: System, ranks: int, bytes_each: int) -> float:
    """Bytes that a rank receives, and sends, of the embeddings of all others."""
    return float((ranks - 1) * system.V * system.B * system.D * bytes_each)


def flop(system: System, ranks: int) -> float:
    """Operations of the products of a rank: its queries against the keys of all."""
    pairs = system.V * (system.V - 1) // 2
    products = 1 + 2 * (math.ceil(system.D / OWNED) + 1)
    return float(products * 2 * pairs * system.B * ranks * system.B * system.D)


def reckon(system: System, ranks: int) -> Reckoned:
    """Every time of the formulas above."""
    keys, gradients = sent(system, ranks, HALF), sent(system, ranks, SINGLE)
    reached = system.flops_share * system.flops
    together, one = gather_bandwidth(system, ranks), ring_bandwidth(system, ranks)
    products = flop(system, ranks) / reached
    return Reckoned(
        ranks, gather=keys / together, products=products, scatter=gradients / together,
        ring=max(products, (keys + gradients) / one), encoder=system.encoder * system.V * system.B / reached,
        memory=float(ranks * system.V * system.B * system.D * 2 * SINGLE),
    )  # fmt: skip


def pays_from(system: System, ranks: int) -> float:
    """Instances a rank from which a ring takes less time than gathering: k (G + R) < G + C + R.

    C grows with B^2, G + R with B; within a node k = 1, and a ring is never slower.
    """
    one = reckon(replace(system, B=1), ranks)
    k = gather_bandwidth(system, ranks) / ring_bandwidth(system, ranks)
    return (k - 1) * (one.gather + one.scatter) / one.products


def memory_from(system: System, ranks: int, memory: float = 8 * 2**30) -> float:
    """Instances a rank from which gathered keys and their gradients take more than ``memory`` bytes."""
    return memory / reckon(replace(system, B=1), ranks).memory


# ---- the table -------------------------------------------------------------------------------------------------------
HEADINGS = (
    "GPUs", "gather G", "products C", "reduce-scatter R", "G + C + R", "of the step", "overlap saves", "ring", "memory"
)  # fmt: skip


def cells(system: System, ranks: int) -> list[str]:
    """A line of the table."""
    r = reckon(system, ranks)
    times = (r.gather, r.products, r.scatter, r.gathered)
    return [
        f"{ranks:,}", *(f"{1e3 * t:.3f} ms" for t in times), f"{100 * r.share:.2f} %", f"{100 * r.saved:.2f} %",
        f"{1e3 * r.ring:.3f} ms",
        f"{r.memory / 2**20:,.0f} MiB",
    ]  # fmt: skip


def inputs(system: System) -> str:
    """What is put into the formulas, in a sentence."""
    of = f"of which {100 * system.link_share:.0f} % are reached"
    return (
        f"B = {system.B} a rank, D = {system.D}, V = {system.V}; {system.flops / 1e12:.0f} TFLOP/s in bfloat16, of "
        f"which {100 * system.flops_share:.0f} % are reached; NVLink {system.nvlink / 1e9:.0f} GB/s, one adapter of "
        f"{system.adapter / 1e9:.0f} GB/s for each of {system.node} GPUs of a node, {of}; an encoder of "
        f"{system.encoder / 1e9:.0f} GFLOP a view, so {1e3 * reckon(system, 1).encoder:.0f} ms a step."
    )


def lines(system: System) -> Iterator[str]:
    """Inputs, table and where a ring begins to pay, as Markdown."""
    yield from (inputs(system), "", "| " + " | ".join(HEADINGS) + " |", "|" + "---:|" * len(HEADINGS))
    for ranks in RANKS:
        yield "| " + " | ".join(cells(system, ranks)) + " |"
    most = RANKS[-1]
    yield ""
    yield (
        f"Between nodes a ring takes less time than gathering from B = {pays_from(system, most):,.0f} a rank. Gathered "
        f"keys and their gradients take 8 GiB at B = {memory_from(system, most):,.0f} on {most:,} GPUs."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, with the inputs of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite.reckon", description=(__doc__ or "").split("\n")[0]
    )
    for field in fields(System):
        default: float = getattr(System(), field.name)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(default), default=default, help="%(default)s"
        )
    print("\n".join(lines(System(**vars(parser.parse_args(arguments))))))


if __name__ == "__main__":
    main()
