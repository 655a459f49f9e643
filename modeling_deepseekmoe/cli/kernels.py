# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command `deepseekmoe kernels`: what computes on this machine, and how fast."""

import json
from dataclasses import dataclass
from typing import Annotated

import typer

from .options import FailedCheck, takes


@dataclass(frozen=True, kw_only=True)
class KernelsOptions:
    """Options of `deepseekmoe kernels`: what is printed, and how much is tried."""

    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Compare with transformers on this machine.")] = True
    again: Annotated[bool, typer.Option("--again", help="Hold the trials again that have passed here.")] = False


@takes(KernelsOptions)
def kernels(options: KernelsOptions) -> None:
    """Show what computes routing and experts on this machine, and why; try the kernels; time them."""
    from ..analysis.kernel_report import report_kernels

    report = report_kernels(timed=options.timed, again=options.again)
    typer.echo(json.dumps(report.to_dict(), indent=2) if options.as_json else report.to_text())
    if report.failed:
        raise FailedCheck("A trial of the kernels has failed: plain torch computes instead.")


__all__ = ["KernelsOptions", "kernels"]
