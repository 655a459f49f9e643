# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Draw training and routing as PNG files. Needs matplotlib (the extra `report`)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

Target = str | Path | IO[bytes]
BLUE, ORANGE = "#1f4e79", "#d9741a"


def require_matplotlib() -> None:
    """Raise ImportError if matplotlib is missing, and say what to install."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'modeling-deepseekmoe[report]'") from error


def new_figure(width: float, height: float) -> Any:
    """Make an empty figure of so many inches."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(width: float, height: float) -> tuple[Any, Any]:
    """Make a figure of so many inches with one plot in it."""
    figure = new_figure(width, height)
    return figure, figure.add_subplot()


def plot_loss_curve(
    steps: Sequence[float], losses: Sequence[float], target: Target, title: str = "Training loss"
) -> None:
    """Write the loss of every step as a PNG.

    Args:
        steps: optimizer steps.
        losses: losses in nats per token, auxiliary loss included.
        target: the file to write.
        title: heading of the plot.
    """
    figure, axes = new_axes(7, 4)
    axes.plot(steps, losses, marker="o", markersize=3, linewidth=1.4, color=BLUE)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    figure.savefig(target, format="png")


def plot_curves(
    curves: Mapping[str, Sequence[float]],
    target: Target,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    step: int = 1,
    log_scale: bool = False,
) -> None:
    """Write several curves over the same steps as a PNG.

    Args:
        curves: for every name in the legend, a value for each step.
        target: the file to write.
        title, xlabel, ylabel: heading and names of the axes, with units.
        step: distance of the values on the horizontal axis, and where the first value stands.
        log_scale: make the vertical axis logarithmic.
    """
    figure, axes = new_axes(8, 4.5)
    for name, values in curves.items():
        axes.plot(range(step, step * len(values) + 1, step), values, linewidth=1.4, label=name)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale="log" if log_scale else "linear")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(target, format="png")


def plot_expert_load(
    loads: Mapping[int, torch.Tensor],
    target: Target,
    title: str = "Expert load by layer",
    names: Sequence[str] = (),
) -> None:
    """Write a heatmap of layers x experts as a PNG.

    A cell is an expert's tokens over the mean of its row: 1 is a balanced load, 0 a dead expert.

    Args:
        loads: for every MoE layer's index, the tokens of its experts (E,).
        target: the file to write.
        title: heading of the plot.
        names: names of the rows, if they are no layers.

    Raises:
        ValueError: if there is no layer.
    """
    if not loads:
        raise ValueError("loads is empty: at least one MoE layer is needed.")
    layers = sorted(loads)
    table = torch.stack([loads[layer].double() / loads[layer].double().mean().clamp(min=1e-12) for layer in layers])
    num_layers, num_experts = table.shape
    figure, axes = new_axes(min(4 + 0.16 * num_experts, 16), min(2.2 + 0.17 * num_layers, 14))
    # One hot expert must not make all others look the same.
    limit = min(max(2.0, float(table.max())), 4.0)
    image = axes.imshow(table.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=limit)
    axes.set(title=title, xlabel="routed expert", ylabel="" if names else "layer")
    row_step, column_step = 1 if names else -(-num_layers // 30), -(-num_experts // 32)
    rows = names or [str(layer) for layer in layers[::row_step]]
    axes.set_yticks(range(0, num_layers, row_step), rows)
    axes.set_xticks(range(0, num_experts, column_step))
    extend = "max" if float(table.max()) > limit else "neither"
    figure.colorbar(image, ax=axes, label="tokens / mean tokens of the row", extend=extend)
    figure.savefig(target, format="png")


def plot_max_violation(
    layers: Sequence[int], global_violation: Sequence[float], batch_violation: Sequence[float], target: Target
) -> None:
    """Write MaxVio of every layer as a PNG.

    Args:
        layers: indices of the MoE layers.
        global_violation: for every layer, MaxVio of all tokens together.
        batch_violation: for every layer, the mean of the batches' MaxVio.
        target: the file to write.
    """
    figure, axes = new_axes(9, 3.6)
    places = range(len(layers))
    axes.bar(places, global_violation, color=BLUE, label="all tokens (global)")
    axes.plot(places, batch_violation, "o", color=ORANGE, markersize=4, label="mean of the batches")
    step = -(-len(layers) // 32)
    axes.set_xticks(list(places)[::step], [str(layer) for layer in layers[::step]])
    axes.set(title="Imbalance by layer", xlabel="layer", ylabel="MaxVio = max load / mean load - 1")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small")
    figure.savefig(target, format="png")


def plot_co_activation(tables: Mapping[int, torch.Tensor], target: Target) -> None:
    """Write how often a token chooses two experts together as a PNG, with one panel for each layer.

    Args:
        tables: for every layer's index, a table (E, E) of observed over expected frequencies. Independent choices
            would give 1. NaN means that there is nothing to compare.
        target: the file to write.
    """
    columns = min(4, len(tables))
    rows = math.ceil(len(tables) / columns)
    figure = new_figure(1.2 + 3.0 * columns, 0.9 + 2.9 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    image = None
    for panel, layer in zip(panels.flat, tables, strict=False):
        image = panel.imshow(tables[layer].numpy(), cmap="coolwarm", vmin=0, vmax=2, interpolation="nearest")
        panel.set_title(f"layer {layer}", fontsize="medium")
        panel.set_xlabel("expert", fontsize="small")
        panel.set_ylabel("expert", fontsize="small")
        panel.tick_params(labelsize="small")
        panel.locator_params(nbins=4, integer=True)
    for panel in panels.flat[len(tables) :]:
        panel.set_axis_off()
    figure.suptitle("Co-activation: pairs of experts chosen by the same token")
    figure.colorbar(image, ax=panels, label="observed / expected (2 and more in the darkest red)", shrink=0.8)
    figure.savefig(target, format="png")


def plot_gate_weights(layers: Sequence[int], weights: torch.Tensor, target: Target) -> None:
    """Write the distribution of the gate weights as a PNG: by layer, and of all layers together.

    Args:
        layers: indices of the MoE layers.
        weights (`torch.FloatTensor` of shape (L, T, K)): gate weights, the best choice first.
        target: the file to write.
    """
    require_matplotlib()
    from matplotlib import colormaps

    figure = new_figure(11, 4)
    by_layer, together = figure.subplots(1, 2)
    top_k = weights.shape[-1]
    ordered = weights.sort(dim=-1, descending=True).values
    sample = ordered[:, :: max(1, ordered.numel() // 1_000_000)].flatten()[:4_000_000]
    low, high = sample.quantile(torch.tensor([0.001, 0.999])).tolist()
    edges = torch.linspace(low, max(high, low + 1e-6), 61)
    for rank in range(top_k):
        color = colormaps["viridis"](rank / max(1, top_k - 1) * 0.9)
        tenth, middle, ninetieth = ordered[..., rank].quantile(torch.tensor([0.1, 0.5, 0.9]), dim=-1)
        by_layer.plot(layers, middle, marker="o", markersize=3, linewidth=1.2, color=color)
        by_layer.fill_between(layers, tenth, ninetieth, color=color, alpha=0.12, linewidth=0)
        shown = ordered[..., rank].flatten().clamp(float(edges[0]), float(edges[-1]))
        counts = torch.histc(shown, bins=60, min=float(edges[0]), max=float(edges[-1]))
        together.stairs((counts / shown.numel()).numpy(), edges.numpy(), color=color, label=str(rank + 1))
    by_layer.set(title="Gate weight by layer: median, 10% to 90%", xlabel="layer", ylabel="gate weight")
    by_layer.xaxis.get_major_locator().set_params(integer=True)
    together.set(title="Gate weight, all layers", xlabel="gate weight", ylabel="share of the tokens, 60 bins")
    together.legend(title="highest, second, ...", fontsize="small", ncols=1 + (top_k > 6))
    for axes in (by_layer, together):
        axes.grid(alpha=0.3)
    figure.savefig(target, format="png")


__all__ = [
    "BLUE",
    "ORANGE",
    "Target",
    "new_axes",
    "new_figure",
    "plot_co_activation",
    "plot_curves",
    "plot_expert_load",
    "plot_gate_weights",
    "plot_loss_curve",
    "plot_max_violation",
    "require_matplotlib",
]
