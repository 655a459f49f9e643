# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Draw how specialised experts are as PNG files: of one model, or of several side by side."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .plots import Target, new_axes, new_figure

_MARKERS = "os^Dv"
_MOST_WRITTEN = 10  # rows of a table whose values are written into it


@dataclass(frozen=True)
class Curve:
    """Values with their standard errors, over numbers. An error of NaN is not drawn."""

    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()


def plot_measures(
    curves: Mapping[str, Curve], target: Target, *, title: str, xlabel: str, ylabel: str, descending: bool = False
) -> None:
    """Write curves of a few points each as a PNG.

    Args:
        curves: for every name in the legend a curve.
        target: the file to write.
        title, xlabel, ylabel: heading and names of the axes, with units.
        descending: begin with the largest number.
    """
    figure, axes = new_axes(8, 4.2)
    for idx, (name, curve) in enumerate(curves.items()):
        error = list(curve.error) or None
        marker = _MARKERS[idx % len(_MARKERS)]
        axes.errorbar(curve.x, curve.y, yerr=error, marker=marker, markersize=5, linewidth=1.4, capsize=3, label=name)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if all(float(value).is_integer() for curve in curves.values() for value in curve.x):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if descending:
        axes.invert_xaxis()
    if len(curves) > 1:
        figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(target, format="png")


def plot_single_experts(models: Mapping[str, Sequence[Mapping]], target: Target) -> None:
    """Write what single experts are worth as a PNG: a point for a routed expert, a star for a layer's shared ones.

    Args:
        models: for every model's name the `layers` of the section `single`.
        target: the file to write.
    """
    figure = new_figure(8, 0.6 + 3.4 * len(models))
    panels = figure.subplots(len(models), 1, squeeze=False)[:, 0]
    for panel, (name, rows) in zip(panels, models.items(), strict=True):
        points = [(row["layer"], one["rise"]) for row in rows for one in row["experts"]]
        stars = [(row["layer"], row["shared_off"]["rise"]) for row in rows if row["shared_off"] is not None]
        for of, marker, size, label in ((points, "o", 14, "a routed expert"), (stars, "*", 110, "the shared experts")):
            if of:
                panel.scatter(*zip(*of, strict=True), marker=marker, s=size, label=label, alpha=0.8)
        panel.set(title=name, xlabel="layer", ylabel="rise of the loss (nats)")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.savefig(target, format="png")


def plot_tables(
    tables: Mapping[str, Sequence[Sequence[float]]],
    target: Target,
    *,
    title: str,
    label: str,
    names: Sequence[str] = (),
    limits: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Write square tables as heatmaps in a PNG.

    Args:
        tables: for every heading a table.
        target: the file to write.
        title, label: heading of the plot, and what the colours mean.
        names: names of the rows and columns, instead of numbers.
        limits: the lowest and the highest value that are told apart.
    """
    columns = min(4, len(tables))
    rows = -(-len(tables) // columns)
    width = 1.6 + (3.0 + 0.6 * bool(names)) * columns
    figure = new_figure(width, 1.1 + 2.9 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    image = None
    for panel, (heading, table) in zip(panels.flat, tables.items(), strict=False):
        image = panel.imshow(table, cmap="viridis", vmin=limits[0], vmax=limits[1], interpolation="nearest")
        panel.set_title(heading, fontsize="medium")
        panel.tick_params(labelsize="small")
        if names:
            panel.set_xticks(range(len(names)), names, rotation=45, ha="right")
            panel.set_yticks(range(len(names)), names)
            if len(names) <= _MOST_WRITTEN:
                _write_values(panel, table, limits)
        else:
            panel.locator_params(nbins=4, integer=True)
    for panel in panels.flat[len(tables) :]:
        panel.set_axis_off()
    figure.suptitle(textwrap.fill(title, int(9 * width)))  # letters to the inch
    figure.colorbar(image, ax=panels, label=label, shrink=0.8)
    figure.savefig(target, format="png")


def _write_values(panel: Any, table: Sequence[Sequence[float]], limits: tuple[float, float]) -> None:
    """Write the values of a table into its cells."""
    middle = sum(limits) / 2
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            if value != value:
                continue  # NaN: not known
            colour = "black" if value > middle else "white"  # viridis ends in yellow
            panel.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize="small")


__all__ = ["Curve", "plot_measures", "plot_single_experts", "plot_tables"]
