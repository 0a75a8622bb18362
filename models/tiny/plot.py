"""The loss plot of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

KIND_PREFIX = "right/"
LOSSES = (
    ("answers", "#1f6fb4", "answers"),
    ("tokens", "#c8781e", "tokens (auxiliary)"),
    ("cells", "#6a9a3b", "cells (auxiliary)"),
    ("imitation", "#8a63b0", "imitation of the teacher (share of variance)"),
)
"""(entry of the log, colour, label)."""


def plot_log(entries: Sequence[dict[str, float]], path: Path) -> None:
    """Losses over steps on the left, the share of right answers by kind of question on the right; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, shares) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, colour, label in LOSSES:
        if points := [(entry["step"], entry[name]) for entry in entries if name in entry]:
            losses.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.2)
    losses.set(xlabel="step", ylabel="loss", yscale="log", title="Loss")
    losses.legend(frameon=False)
    kinds = sorted({name for entry in entries for name in entry if name.startswith(KIND_PREFIX)})
    for kind in kinds:
        points = [(entry["step"], 100 * entry[kind]) for entry in entries if kind in entry]
        shares.plot(*zip(*points, strict=True), label=kind.removeprefix(KIND_PREFIX), linewidth=1.2, marker=".")
    shares.set(xlabel="step", ylabel="% of answers right", ylim=(0, 101), title="Scenes never trained on")
    if kinds:
        shares.legend(frameon=False)
    for axes in (losses, shares):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    plt.close(figure)
