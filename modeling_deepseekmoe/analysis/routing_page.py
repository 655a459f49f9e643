# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Write a routing report as one self-contained HTML page."""

import base64
import html
import io
from collections.abc import Callable

from .plots import plot_co_activation, plot_expert_load, plot_gate_weights, plot_max_violation
from .routing_report import RoutingReport, co_activation_of, top_tokens_of

_MAX_PANELS = 12
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1160px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; }
th { text-align: left; background: #f4f6f8; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { background: #f4f6f8; padding: 0 .25rem; border-radius: 3px; white-space: pre; }
summary { cursor: pointer; padding: .2rem 0; } .note { color: #555; }
"""


def make_page(report: RoutingReport) -> str:
    """Make the page. It needs no other file, and loads nothing from the network."""
    facts = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in report.facts.items()
    )
    body = "".join(
        f"<h2>{html.escape(heading)}</h2><p class='note'>{html.escape(note)}</p><div class='wide'>{content}</div>"
        for heading, note, content in _sections_of(report)
    )
    title = html.escape(f"Routing of {report.title}")
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><table>{facts}</table>{body}</body></html>\n"
    )


def _sections_of(report: RoutingReport) -> list[tuple[str, str, str]]:
    """Return heading, explanation and content of every section. The content is HTML."""
    trace, layers = report.trace, report.trace.layers
    loads = dict(zip(layers, report.loads, strict=True))
    panels = layers if len(layers) <= _MAX_PANELS else _spread(layers, _MAX_PANELS)
    return [
        (
            "Load of every expert",
            "Each expert's tokens over the mean of its layer: 1 is balanced, 0 a dead expert.",
            _image(lambda file: plot_expert_load(loads, file), "load heatmap"),
        ),
        (
            "Imbalance",
            "MaxVio (arXiv 2408.15664): how much the busiest expert exceeds the mean; 0 is balanced.",
            _image(
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
            _image(
                lambda file: plot_co_activation({idx: co_activation_of(trace, idx) for idx in panels}, file),
                "co-activation",
            ),
        ),
        (
            "Gate weights",
            "The weights of a token's chosen experts, from the highest to the lowest.",
            _image(lambda file: plot_gate_weights(layers, trace.weights, file), "gate weights"),
        ),
        (
            "Top tokens of every expert",
            "Tokens that an expert gets more often than others do, with the share of their occurrences that chose "
            "it. Open a layer.",
            "".join(_tokens_of_layer(report, layer) for layer in layers),
        ),
    ]


def _table_of_layers(report: RoutingReport) -> str:
    head = "".join(
        f"<th>{name}</th>"
        for name in ("layer", "MaxVio, all tokens", "MaxVio, mean of batches", "dead experts", "entropy (nats)")
    )
    rows = "".join(
        f"<tr><td class='number'>{layer}</td><td class='number'>{report.global_violation[idx]:.3f}</td>"
        f"<td class='number'>{report.batch_violation[idx]:.3f}</td><td class='number'>{report.dead_experts[idx]}</td>"
        f"<td class='number'>{float(report.trace.entropy[idx]):.3f}</td></tr>"
        for idx, layer in enumerate(report.trace.layers)
    )
    return f"<details><summary>As a table</summary><table><tr>{head}</tr>{rows}</table></details>"


def _tokens_of_layer(report: RoutingReport, layer: int) -> str:
    rows = []
    loads = report.loads[report.trace.layers.index(layer)]
    for expert, entries in enumerate(top_tokens_of(report.trace, layer)):
        shown = " ".join(
            f"<code>{html.escape(_visible(report.show(entry['token_id'])))}</code> {entry['share']:.0%}"
            for entry in entries
        )
        rows.append(
            f"<tr><td class='number'>{expert}</td><td class='number'>{int(loads[expert]):,}</td>"
            f"<td>{shown or 'none'}</td></tr>"
        )
    head = "<tr><th>expert</th><th>tokens</th><th>top tokens, share of their occurrences</th></tr>"
    return f"<details><summary>layer {layer}</summary><table>{head}{''.join(rows)}</table></details>"


def _spread(layers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Choose `count` layers from the first to the last, evenly spread."""
    return tuple(layers[round(place * (len(layers) - 1) / (count - 1))] for place in range(count))


def _image(plot: Callable[[io.BytesIO], None], description: str) -> str:
    file = io.BytesIO()
    plot(file)
    return f"<img alt='{description}' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"


def _visible(token: str) -> str:
    """Make a token's spaces and line ends visible."""
    shown = "".join(
        "\u2423" if character == " " else character if character.isprintable() else repr(character)[1:-1]
        for character in token
    )
    return shown or "(empty)"


__all__ = ["make_page"]
