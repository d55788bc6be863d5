"""Draws the pictures of the pages with numbers from the package: ``python docs/make_pictures.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cacr_kernels import cacr_loss, cacr_weights

PICTURES = Path(__file__).parent / "pictures"
BLUE, ORANGE, GREY = "#4c72b0", "#dd8452", "#b0b0b0"


def save(figure: Figure, name: str) -> None:
    """Without a date, so that the same numbers give the same file."""
    figure.tight_layout()
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)


def softmax_weights() -> None:
    """Weights against the cost, relative to uniform ones, for keys at evenly spread costs."""
    c = torch.linspace(0, 4, 81, dtype=torch.float64)
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.8), sharey=True)
    sides = ("attraction: softmax(+tau_pos c)", 1, BLUE), ("repulsion: softmax(−tau_neg c)", -1, ORANGE)
    for axis, (title, sign, colour) in zip(axes, sides, strict=True):
        for tau, alpha in ((0.0, 0.3), (0.5, 0.5), (1.0, 0.75), (2.0, 1.0)):
            w = torch.softmax(sign * tau * c, 0) * len(c)
            axis.plot(c, w, color=colour, alpha=alpha, label=f"tau = {tau:g}")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("cost c = |x − y|²")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("weight / uniform weight")
    save(figure, "weights")


def on_the_circle(axis: Axes, keys: torch.Tensor, weights: torch.Tensor, colour: str, title: str) -> None:
    """The keys around a query at (1, 0), each with a line as wide as its weight."""
    axis.add_patch(plt.Circle((0, 0), 1, fill=False, color=GREY, linewidth=0.8))
    for key, weight in zip(keys, weights, strict=True):
        axis.plot([1, key[0]], [0, key[1]], color=colour, linewidth=6 * float(weight), alpha=0.6)
    axis.scatter(keys[:, 0], keys[:, 1], s=18, color=colour, zorder=3)
    axis.scatter([1], [0], s=60, color="black", marker="*", zorder=4)
    axis.set(aspect="equal", xlim=(-1.15, 1.25), ylim=(-1.15, 1.15))
    axis.axis("off")
    axis.set_title(title, fontsize=10)


def forces() -> None:
    """The weights of one query in two dimensions, by `cacr_weights`."""
    generator = torch.Generator().manual_seed(3)
    angles = torch.tensor([0.0, 0.25, -0.6, 0.95])[:, None] + torch.zeros(1, 13)
    angles[:, 1:] = torch.linspace(0.5, 5.8, 12) + 0.2 * torch.randn(4, 12, generator=generator)
    views = torch.stack([angles.cos(), angles.sin()], -1)
    found = cacr_weights(views, queries=[0], top_k=12, tau_pos=2.0, tau_neg=2.0)
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.2))
    on_the_circle(axes[0], views[1:, 0], found.attraction[0, 0, 1:], BLUE, "positives: the distant ones attract more")
    on_the_circle(
        axes[1], views[1, found.indices[0, 0]], found.repulsion[0, 0], ORANGE, "negatives: the close ones repel more"
    )
    save(figure, "forces")


def pairings() -> None:
    """Which similarities of V = 3 views are negatives; a column of blocks is a softmax or several."""
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.7))
    for axis, name in zip(axes, ("unordered", "ordered", "pooled"), strict=True):
        for x in range(3):
            for y in range(3):
                used = {"unordered": x < y, "ordered": x != y, "pooled": True}[name]
                axis.add_patch(
                    Rectangle((y, 2 - x), 1, 1, facecolor=ORANGE if used else "white", edgecolor=GREY, alpha=0.7)
                )
                if used:  # the instance itself is no negative
                    axis.plot([y, y + 1], [3 - x, 2 - x], color="white", linewidth=3)
        if name == "pooled":
            axis.add_patch(Rectangle((0, 1), 3, 1, fill=False, edgecolor="black", linewidth=1.6))
        else:
            axis.add_patch(Rectangle((1, 2), 1, 1, fill=False, edgecolor="black", linewidth=1.6))
        axis.set(xlim=(-0.1, 3.1), ylim=(-0.1, 3.1), aspect="equal", title=f'"{name}"')
        axis.set_xticks([0.5, 1.5, 2.5], ["0", "1", "2"])
        axis.set_yticks([0.5, 1.5, 2.5], ["2", "1", "0"])
        axis.set_xlabel("negatives of view")
        axis.tick_params(length=0)
    axes[0].set_ylabel("queries of view")
    save(figure, "pairings")


def effective_negatives() -> None:
    """exp(entropy) of the repulsion of random unit vectors, by `return_parts`."""
    figure, axis = plt.subplots(figsize=(5.2, 3.0))
    taus = torch.logspace(-1, 2, 25, dtype=torch.float64).tolist()
    for dim, alpha in ((8, 0.4), (32, 0.7), (128, 1.0)):
        z = torch.randn(2, 1025, dim, generator=torch.Generator().manual_seed(dim))
        parts = [cacr_loss(z, tau_neg=tau, normalize=True, return_parts=True) for tau in taus]
        counts = [part.repulsion_entropy.exp().item() for part in parts]
        axis.plot(taus, counts, color=ORANGE, alpha=alpha, label=f"D = {dim}")
    axis.set(xscale="log", yscale="log", xlabel="tau_neg", ylabel="effective negatives exp(H)")
    axis.set_title("B = 1025 random unit vectors: 1024 negatives", fontsize=10)
    axis.legend(fontsize=8)
    save(figure, "effective_negatives")


if __name__ == "__main__":
    plt.rcParams.update({"svg.hashsalt": "cacr", "font.size": 9, "svg.fonttype": "path"})
    PICTURES.mkdir(exist_ok=True)
    for draw in (softmax_weights, forces, pairings, effective_negatives):
        draw()
