"""Plots of a run, as PNG: loss along distillation, importance by layer and channel.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; lines differ in style as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":")


def plot_losses(
    path: str | Path, curves: Mapping[str, Sequence[tuple[float, float]]], reference: Mapping[str, float], ylabel: str
) -> Path:
    """Loss over training tokens, one line per name; ``reference`` losses (the teacher's) are level lines."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for index, (name, points) in enumerate(curves.items()):
        tokens, losses = zip(*points, strict=True)
        axes.plot(
            tokens, losses, LINES[index % len(LINES)], color=COLOURS[index % len(COLOURS)], marker="o", ms=3, label=name
        )
    for index, (name, loss) in enumerate(reference.items()):
        axes.axhline(loss, color="#555555", lw=1, ls=(0, (1, 1 + index)), label=name)
    axes.set_xlabel("training tokens")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _save(figure, path)


def plot_importance(
    path: str | Path,
    neurons: torch.Tensor,
    heads: torch.Tensor,
    hidden: torch.Tensor,
    layers: torch.Tensor,
    kept: Mapping[str, int],
) -> Path:
    """Four panels: neurons and heads by layer, the residual channels' share, block importance of layers.

    ``neurons`` (layers, neurons) are sorted within each layer; ``kept`` gives the sizes after pruning, drawn as lines.
    """
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    _sorted_heatmap(axes[0, 0], neurons, kept["intermediate_size"])
    image = axes[0, 1].imshow(_relative(heads), aspect="auto", cmap="cividis", vmin=0, vmax=1)
    axes[0, 1].set(title="attention heads (relative to the layer's best)", xlabel="head", ylabel="layer")
    figure.colorbar(image, ax=axes[0, 1])
    share = np.cumsum(np.sort(hidden.double().square().numpy())[::-1]) / hidden.double().square().sum().item()
    axes[1, 0].plot(np.arange(1, len(share) + 1), share, color=COLOURS[0])
    axes[1, 0].axvline(kept["hidden_size"], color=COLOURS[1], ls="--", label=f"kept: {kept['hidden_size']}")
    axes[1, 0].set(
        title=("residual channels, best first"), xlabel="channels", ylabel="share of squared scores", ylim=(0, 1.02)
    )
    axes[1, 0].legend(frameon=False)
    axes[1, 1].bar(range(len(layers)), layers.tolist(), color=COLOURS[2])
    axes[1, 1].set(title="layers", xlabel="layer", ylabel="block importance 1 − cos(in, out)")
    return _save(figure, path)


def _sorted_heatmap(axes, scores: torch.Tensor, kept: int) -> None:
    ordered = torch.sort(scores, dim=1, descending=True).values
    image = axes.imshow(_relative(ordered), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    axes.axvline(kept - 0.5, color=COLOURS[1], ls="--", label=f"kept: {kept}")
    axes.set(title="feed-forward neurons, best first (relative)", xlabel="neuron, sorted", ylabel="layer")
    axes.legend(frameon=False, labelcolor="white", loc="upper right")
    axes.figure.colorbar(image, ax=axes)


def _relative(scores: torch.Tensor) -> np.ndarray:
    return (scores / scores.amax(1, keepdim=True).clamp_min(1e-30)).numpy()


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
