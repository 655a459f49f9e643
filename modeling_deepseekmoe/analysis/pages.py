# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Make self-contained HTML pages: their style, tables and images."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1160px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h3 { font-size: 1.05rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; }
th { text-align: left; background: #f4f6f8; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { background: #f4f6f8; padding: 0 .25rem; border-radius: 3px; white-space: pre; }
summary { cursor: pointer; padding: .2rem 0; } .note { color: #555; }
"""


class Html(str):
    """Text that is HTML already."""


def as_page(title: str, facts: str, sections: Iterable[tuple[str, str, str]]) -> str:
    """Make a page. It needs no other file, and loads nothing from the network.

    Args:
        title: its heading.
        facts: HTML of what stands at the top.
        sections: heading, explanation and content of every section. The content is HTML, and the explanation if it
            is [`Html`].
    """
    body = "".join(
        f"<h2>{html.escape(heading)}</h2><p class='note'>{_escaped(note)}</p><div class='wide'>{content}</div>"
        for heading, note, content in sections
    )
    title = html.escape(title)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{facts}{body}</body></html>\n"
    )


def as_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Make a table. Without a head the first cell of every row is its heading. Numbers stand on the right."""
    lines = ["".join(f"<th>{_escaped(name)}</th>" for name in head)] if head else []
    for row in rows:
        first, rest = ([], row) if head else ([f"<th>{_escaped(row[0])}</th>"], row[1:])
        lines.append("".join([*first, *map(_cell, rest)]))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cell(value: object) -> str:
    is_number = not isinstance(value, Html) and str(value).lstrip("+-").replace(",", "").replace(".", "").isdigit()
    return f"<td class='number'>{value}</td>" if is_number else f"<td>{_escaped(value)}</td>"


def _escaped(value: object) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))


def as_image(plot: Callable[[io.BytesIO], None], description: str) -> str:
    """Make an image of what a function writes as a PNG."""
    file = io.BytesIO()
    plot(file)
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='{html.escape(description, quote=True)}' src='data:image/png;base64,{data}'>"


def visible(token: str) -> str:
    """Make a token's spaces and line ends visible."""
    shown = "".join(
        "\u2423" if character == " " else character if character.isprintable() else repr(character)[1:-1]
        for character in token
    )
    return shown or "(empty)"


__all__ = ["Html", "as_image", "as_page", "as_table", "visible"]
