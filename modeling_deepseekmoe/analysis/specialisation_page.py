# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Write how specialised a model's experts are as one self-contained HTML page; two models side by side."""

import html
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .ablations import SAME_SUM, SAME_SUM_ERROR
from .pages import Html, as_image, as_page, as_table
from .plots import plot_expert_load
from .routing_page import TYPICAL_TOKENS, spread, tokens_of_layer
from .routing_report import loads_of
from .sections import Section
from .specialisation import Specialisation
from .specialisation_plots import Curve, plot_measures, plot_single_experts, plot_tables

Show = Callable[[int], str]
Sections = Mapping[str, Section]  # by the name of a model; none is empty
_MAX_PANELS = 8


def make_page(measured: Specialisation, show: Show, against: tuple[Specialisation, Show] | None = None) -> str:
    """Make the page.

    Args:
        measured: what was measured of the model.
        show: makes text of its token ids.
        against: the same of another model, which stands beside it.
    """
    models = [(measured, show), *([] if against is None else [against])]
    names = _names([one.title for one, _ in models])
    reports = dict(zip(names, (one for one, _ in models), strict=True))
    facts = {fact: [report.facts.get(fact, "") for report in reports.values()] for fact in measured.facts}
    top = as_table([], [["", *names], *([fact, *values] for fact, values in facts.items())])
    sections = [_section(key, reports) for key in measured.sections]
    sections.append(
        ("Typical tokens of every expert", TYPICAL_TOKENS, _typical_tokens(reports, [of for _, of in models]))
    )
    return as_page(f"Specialisation of {' and '.join(names)}", top, sections)


def _names(titles: Sequence[str]) -> list[str]:
    """Make names of titles, which may be the same."""
    return list(titles) if len(set(titles)) == len(titles) else [f"{title} ({n})" for n, title in enumerate(titles, 1)]


def _section(key: str, reports: Mapping[str, Specialisation]) -> tuple[str, str, str]:
    """Return heading, explanation and content of a section."""
    sections = {name: report.sections[key] for name, report in reports.items()}
    first = next(iter(sections.values()))
    source = f" Source: {html.escape(first.source)}." if first.source else ""
    note = Html(f"{html.escape(first.definition)}{source}<br><b>How to read it:</b> {html.escape(first.reading)}")
    full = {name: section for name, section in sections.items() if not section.empty}
    findings = "".join(
        f"<p><b>{html.escape(name)}</b>: {html.escape(section.summary)}</p>"
        for name, section in full.items()
        if section.summary
    )
    content = findings + _CONTENT[key](full) if full else ""
    said = [
        (name, text) for name, one in sections.items() for text in (*([one.empty] if one.empty else []), *one.notes)
    ]
    remarks = "".join(f"<p class='note'>{html.escape(name)}: {html.escape(text)}</p>" for name, text in said)
    return first.heading, note, content + remarks


def _rises(
    sections: Sections, x: str, columns: Sequence[str], *, title: str, xlabel: str, descending: bool = False
) -> str:
    """Draw the rises of all models by what was changed, and make their table."""
    curves = {
        name: Curve(*([_number(point[of]) for point in section.figures["points"]] for of in (x, "rise", "error")))
        for name, section in sections.items()
    }
    labels = {"title": title, "xlabel": xlabel, "ylabel": "rise of the loss (nats)"}
    plot = partial(plot_measures, curves, **labels, descending=descending)
    return as_image(plot, title) + _points(sections, columns)


def _points(sections: Sections, columns: Sequence[str]) -> str:
    """Make a table of losses, of all models."""
    has_same_sum = any(SAME_SUM in point for section in sections.values() for point in section.figures["points"])
    same_sum_head = ["rise with the same sum", "its standard error"] * has_same_sum
    head = ["model", *columns, "loss (nats)", "rise", "standard error", *same_sum_head]
    rows = []
    for name, section in sections.items():
        for point in section.figures["points"]:
            same_sum = [f"{point[SAME_SUM]:+.4f}", _short(point[SAME_SUM_ERROR])] if has_same_sum else []
            figures = [f"{point['loss']:.4f}", f"{point['rise']:+.4f}", _short(point["error"]), *same_sum]
            rows.append([name, *(_short(point[column]) for column in columns), *figures])
    return as_table(head, rows)


def _number(value: float | None) -> float:
    """Return a number that is not drawn for one that is missing."""
    return float("nan") if value is None else value


def _short(value: Any) -> str:
    """Show a number that may be missing."""
    if value is None:
        return "not known"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _redundancy(sections: Sections) -> str:
    xlabel = "share of the routed experts that are masked"
    return _rises(sections, "share", ["masked", "share"], title="Redundancy", xlabel=xlabel)


def _shared(sections: Sections) -> str:
    return _points(sections, ["shared experts"])


def _single(sections: Sections) -> str:
    models = {name: section.figures["layers"] for name, section in sections.items()}
    rows = []
    for name, layers in models.items():
        for row in layers:
            best = max(row["experts"], key=lambda one: one["rise"], default=None)
            cells = [
                cell
                for one in (row["shared_off"], best)
                for cell in (("none", "") if one is None else (f"{one['rise']:+.4f}", _short(one["error"])))
            ]
            tried = sections[name].figures["tried"]
            rows.append([name, row["layer"], *cells, "" if best is None else best["expert"], tried])
    head = ["model", "layer", "shared experts off", "standard error", "most missed of the routed experts tried",
            "standard error", "its number", "tried"]  # fmt: skip
    return as_image(partial(plot_single_experts, models), "one expert at a time") + as_table(head, rows)


def _activation(sections: Sections) -> str:
    title, xlabel = "Fewer activated experts", "routed experts for each token"
    return _rises(sections, "activated", ["activated"], title=title, xlabel=xlabel, descending=True)


def _domains(sections: Sections) -> str:
    return "".join(
        f"<h3>{html.escape(name)}</h3>{_distances(section.figures)}{_carried(section.figures)}{_shares(section.figures)}"
        for name, section in sections.items()
    )


def _distances(figures: Mapping[str, Any]) -> str:
    names = [one["domain"] for one in figures["domains"]]
    table = [[0.0] * len(names) for _ in names]
    for place, one in enumerate(figures["domains"]):
        table[place][place] = _number(one["halves"])
    for pair in figures["pairs"]:
        row, column = (names.index(domain) for domain in pair["domains"])
        table[row][column] = table[column][row] = _number(pair["halves"])
    label = "Jensen-Shannon distance"
    limits = (0.0, max([0.1, *(value for row in table for value in row if value == value)]))
    title = "Distance of halves of two domains; on the diagonal, of the halves of one"
    plot = partial(plot_tables, {"": table}, title=title, names=names, label=label, limits=limits)
    head = ["domains", "distance", "of their halves",
            f"common among the K busiest (by chance {figures['common_by_chance']:.2f})"]  # fmt: skip
    rows = [
        [
            " and ".join(pair["domains"]),
            f"{pair['distance']:.3f}",
            _short(pair["halves"]),
            f"{pair['common_busiest']:.2f}",
        ]
        for pair in figures["pairs"]
    ]
    return as_image(plot, "distance of domains") + _folded(as_table(head, rows))


def _carried(figures: Mapping[str, Any]) -> str:
    domains = figures["domains"]
    shares = [place / len(domains[0]["carried"]) for place in range(1, len(domains[0]["carried"]) + 1)]
    plot = partial(
        plot_measures,
        {one["domain"]: Curve(shares, one["carried"]) for one in domains},
        title="What the busiest experts carry",
        xlabel="share of the routed experts, the busiest first",
        ylabel="share of the domain's choices",
    )
    even = figures["even_share"]
    busiest = [f"busiest {one['experts']} (even use: {one['experts'] * even:.1%})" for one in domains[0]["busiest"]]
    head = ["domain", "tokens", "distance of its halves", *busiest]
    rows = [
        [
            one["domain"],
            f"{one['tokens']:,}",
            _short(one["halves"]),
            *(f"{busy['share']:.1%}" for busy in one["busiest"]),
        ]
        for one in domains
    ]
    return as_image(plot, "what the busiest experts carry") + as_table(head, rows)


def _shares(figures: Mapping[str, Any]) -> str:
    """Draw the use of every expert by domain, for a few layers, folded."""
    names, images = [one["domain"] for one in figures["domains"]], ""
    for layer in spread(tuple(figures["layers"]), 4):
        place = figures["layers"].index(layer)
        loads = {idx: torch.tensor(one["shares"][place]) for idx, one in enumerate(figures["domains"])}
        title = f"Use of experts by domain, layer {layer}"
        images += as_image(partial(plot_expert_load, loads, title=title, names=names), title)
    return _folded(images, "Use of every expert by domain")


def _effective(sections: Sections) -> str:
    parts = {"by_token": "a token", "by_sequence": "a sequence", "by_text": "the text"}
    curves: dict[str, Curve] = {}
    for name, section in sections.items():
        rows = section.figures["layers"]
        layers = [row["layer"] for row in rows]
        curves |= {f"{name}: {label}": Curve(layers, [row[key] for row in rows]) for key, label in parts.items()}
    plot = partial(plot_measures, curves, title="Effective number of experts", xlabel="layer", ylabel="experts")
    head = ["model", "layer", *(f"of {label}" for label in parts.values()), "MaxVio"]
    rows = [
        [name, row["layer"], *(f"{row[key]:.2f}" for key in (*parts, "max_violation"))]
        for name, section in sections.items()
        for row in section.figures["layers"]
    ]
    return as_image(plot, "effective number of experts") + _folded(as_table(head, rows))


def _similarity(sections: Sections) -> str:
    heading, images = next(iter(sections.values())).heading, ""
    curves: dict[str, Curve] = {}
    for name, section in sections.items():
        rows = section.figures["layers"]
        layers = [row["layer"] for row in rows]
        for key, label in (("mean", "mean of the pairs"), ("nearest", "nearest other expert")):
            curves[f"{name}: {label}"] = Curve(layers, [_number(row[key]) for row in rows])
        by_layer = {row["layer"]: [[*map(_number, cells)] for cells in row["table"]] for row in rows}
        tables = {f"layer {layer}": by_layer[layer] for layer in spread(tuple(by_layer), _MAX_PANELS)}
        title = f"{heading}, {name}"
        images += as_image(partial(plot_tables, tables, title=title, label="cosine", limits=(-0.2, 1.0)), title)
    lines = partial(plot_measures, curves, title=heading, xlabel="layer", ylabel="cosine")
    rows = [
        [name, row["layer"], _short(row["mean"]), _short(row["nearest"])]
        for name, section in sections.items()
        for row in section.figures["layers"]
    ]
    table = as_table(["model", "layer", "mean of the pairs", "nearest other expert"], rows)
    return as_image(lines, heading) + _folded(table) + _folded(images, "Every pair of experts")


def _folded(content: str, summary: str = "As a table") -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _typical_tokens(reports: Mapping[str, Specialisation], shows: Sequence[Show]) -> str:
    content = []
    for (name, report), show in zip(reports.items(), shows, strict=True):
        loads = loads_of(report.trace)
        content.append(f"<p>{html.escape(name)}</p>" if len(reports) > 1 else "")
        content += [
            tokens_of_layer(report.trace, loads[idx], layer, show) for idx, layer in enumerate(report.trace.layers)
        ]
    return "".join(content)


_CONTENT: dict[str, Callable[[Sections], str]] = {
    "redundancy": _redundancy,
    "shared": _shared,
    "single": _single,
    "activation": _activation,
    "domains": _domains,
    "effective": _effective,
    "weights": _similarity,
    "outputs": _similarity,
}

__all__ = ["make_page"]
