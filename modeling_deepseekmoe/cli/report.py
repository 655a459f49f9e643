# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command `deepseekmoe report`: show what a model's gates do with a text."""

import json
from dataclasses import dataclass
from typing import Annotated

import typer

from .options import ModelOptions, PageOptions, TextOptions, takes, write_page


@dataclass(frozen=True, kw_only=True)
class ReportOptions(TextOptions, PageOptions, ModelOptions):
    """Options of `deepseekmoe report`: which model reads which text, and where the page goes."""

    max_tokens: Annotated[int, typer.Option(help="Tokens to look at.")] = 32768
    block_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = 4


@takes(ReportOptions)
def report(options: ReportOptions) -> None:
    """Show what the gates do with a text: load, imbalance, co-activation, weights, typical tokens."""
    from ..analysis.routing_page import make_page
    from ..analysis.routing_report import make_report

    options.check()
    output = options.check_page("routing_report.html")
    texts = options.texts()
    result = make_report(
        *options.load(),
        texts,
        title=options.model,
        source=options.source,
        max_tokens=options.max_tokens,
        block_size=options.block_size,
        batch_size=options.batch_size,
    )
    if options.as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
        return
    write_page(make_page(result), output)
    violation = sum(result.global_violation) / len(result.global_violation)
    typer.echo(f"{output}: {len(result.trace.layers)} layers, MaxVio_global {violation:.3f} on average.")


__all__ = ["ReportOptions", "report"]
