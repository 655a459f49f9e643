# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Plots, as PNG files. Needs matplotlib (the extra `report`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def require_matplotlib() -> None:
    """Raise an `ImportError` that says what to install if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'modeling-deepseekmoe[report]'") from error


def _new_axes(width: float, height: float) -> tuple[Any, Any]:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def plot_loss_curve(
    steps: Sequence[float], losses: Sequence[float], path: str | Path, title: str = "Training loss"
) -> None:
    """Write the loss of every step as a PNG.

    Args:
        steps: optimizer steps.
        losses: losses in nats per token, auxiliary loss included.
        path: the file to write.
        title: heading of the plot.
    """
    figure, axes = _new_axes(7, 4)
    axes.plot(steps, losses, marker="o", markersize=3, linewidth=1.4, color="#1f4e79")
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def plot_curves(
    curves: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log_scale: bool = False,
) -> None:
    """Write several curves over the same steps, counted from 1, as a PNG.

    Args:
        curves: for every name in the legend, a value for each step.
        path: the file to write.
        title, xlabel, ylabel: heading and names of the axes, with units.
        log_scale: logarithmic vertical axis.
    """
    figure, axes = _new_axes(8, 4.5)
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, linewidth=1.2, label=name)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale="log" if log_scale else "linear")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path)


def plot_expert_load(loads: Mapping[int, torch.Tensor], path: str | Path, title: str = "Expert load by layer") -> None:
    """Write a heatmap of layers x experts as a PNG: each expert's tokens over the mean of its layer, so that 1 is a
    balanced load and 0 a dead expert.

    Args:
        loads: for every MoE layer's index, the tokens of its experts (E,).
        path: the file to write.
        title: heading of the plot.

    Raises:
        ValueError: if there is no layer.
    """
    if not loads:
        raise ValueError("loads is empty: at least one MoE layer is needed.")
    layers = sorted(loads)
    table = torch.stack([loads[layer].double() / loads[layer].double().mean().clamp(min=1e-12) for layer in layers])
    num_layers, num_experts = table.shape
    figure, axes = _new_axes(min(4 + 0.16 * num_experts, 16), min(2.2 + 0.17 * num_layers, 14))
    image = axes.imshow(table.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=max(2.0, float(table.max())))
    axes.set(title=title, xlabel="routed expert", ylabel="layer")
    row_step, column_step = -(-num_layers // 30), -(-num_experts // 32)
    axes.set_yticks(range(0, num_layers, row_step), [str(layer) for layer in layers[::row_step]])
    axes.set_xticks(range(0, num_experts, column_step))
    figure.colorbar(image, ax=axes, label="tokens / mean tokens of the layer")
    figure.savefig(path)


__all__ = ["plot_curves", "plot_expert_load", "plot_loss_curve", "require_matplotlib"]
