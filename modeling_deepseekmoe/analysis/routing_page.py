# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Write a routing report as one self-contained HTML page."""

import html
from collections.abc import Callable

import torch

from .evaluation import RoutingTrace
from .pages import Html, as_image, as_page, as_table, visible
from .plots import plot_co_activation, plot_expert_load, plot_gate_weights, plot_max_violation
from .routing_report import RoutingReport, co_activation_of, top_tokens_of

TYPICAL_TOKENS = (
    "Tokens with the highest log-odds of being among an expert's choices rather than the others' (in standard errors, "
    "Monroe et al. 2008), with the share of their occurrences that chose it. Open a layer."
)
_MAX_PANELS = 12


def make_page(report: RoutingReport) -> str:
    """Make the page. It needs no other file, and loads nothing from the network."""
    facts = as_table([], [[name, value] for name, value in report.facts.items()])
    return as_page(f"Routing of {report.title}", facts, _sections_of(report))


def _sections_of(report: RoutingReport) -> list[tuple[str, str, str]]:
    """Return heading, explanation and content of every section. The content is HTML."""
    trace, layers = report.trace, report.trace.layers
    loads = dict(zip(layers, report.loads, strict=True))
    panels = spread(layers, _MAX_PANELS)
    return [
        (
            "Load of every expert",
            "Each expert's tokens over the mean of its layer: 1 is balanced, 0 a dead expert.",
            as_image(lambda file: plot_expert_load(loads, file), "load heatmap"),
        ),
        (
            "Imbalance",
            "MaxVio (arXiv 2408.15664): how much the busiest expert exceeds the mean; 0 is balanced.",
            as_image(
                lambda file: plot_max_violation(layers, report.global_violation, report.batch_violation, file),
                "MaxVio by layer",
            )
            + _table_of_layers(report),
        ),
        (
            "Co-activation",
            "Pairs of experts that tokens choose together, over what independent choices with the same loads "
            "would give; white where fewer than five tokens are expected, and on the diagonal. "
            + ("" if len(panels) == len(layers) else f"{len(panels)} of {len(layers)} layers."),
            as_image(
                lambda file: plot_co_activation({idx: co_activation_of(trace, idx) for idx in panels}, file),
                "co-activation",
            ),
        ),
        (
            "Gate weights",
            "The weights of a token's chosen experts, from the highest to the lowest.",
            as_image(lambda file: plot_gate_weights(layers, trace.weights, file), "gate weights"),
        ),
        (
            "Typical tokens of every expert",
            TYPICAL_TOKENS,
            "".join(tokens_of_layer(trace, loads[layer], layer, report.show) for layer in layers),
        ),
    ]


def _table_of_layers(report: RoutingReport) -> str:
    head = ["layer", "MaxVio, all tokens", "MaxVio, mean of batches", "dead experts", "entropy (nats)"]
    figures = zip(
        report.global_violation, report.batch_violation, report.dead_experts, report.trace.entropy, strict=True
    )
    rows = [
        [layer, f"{whole:.3f}", f"{batch:.3f}", dead, f"{float(entropy):.3f}"]
        for layer, (whole, batch, dead, entropy) in zip(report.trace.layers, figures, strict=True)
    ]
    return f"<details><summary>As a table</summary>{as_table(head, rows)}</details>"


def tokens_of_layer(trace: RoutingTrace, loads: torch.Tensor, layer: int, show: Callable[[int], str]) -> str:
    """Make the table of the tokens that are typical for the experts of a layer, folded.

    Args:
        trace: all choices.
        loads: tokens of the layer's experts (E,).
        layer: index of the layer.
        show: makes text of a token id.
    """
    rows = []
    for expert, entries in enumerate(top_tokens_of(trace, layer)):
        shown = " ".join(
            f"<code>{html.escape(visible(show(entry['token_id'])))}</code> {entry['share']:.0%} of "
            f"{round(entry['count'] / entry['share']):,}"
            for entry in entries
        )
        rows.append([expert, f"{int(loads[expert]):,}", Html(shown or "none")])
    table = as_table(
        ["expert", "choices", "typical tokens, with the share of their occurrences that chose the expert"], rows
    )
    return f"<details><summary>layer {layer}</summary>{table}</details>"


def spread(layers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Choose at most `count` layers from the first to the last, evenly spread."""
    if len(layers) <= count:
        return layers
    return tuple(layers[round(place * (len(layers) - 1) / (count - 1))] for place in range(count))


__all__ = ["TYPICAL_TOKENS", "make_page", "spread", "tokens_of_layer"]
