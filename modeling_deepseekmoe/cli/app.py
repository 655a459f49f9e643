# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Run the command line, `deepseekmoe`. Exit code 2 means a user's mistake, 1 a failed check."""

import typer

from .analyze import analyze
from .convert import convert
from .esft_select import esft_select
from .export_adapter import export_adapter
from .finetune import finetune
from .inspect import inspect
from .kernels import kernels
from .merge import merge
from .push import push
from .report import report
from .upcycle import upcycle
from .verify import verify

app = typer.Typer(
    name="deepseekmoe",
    help="DeepSeekMoE for the Hugging Face ecosystem.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    inspect, kernels, convert, verify, upcycle, report, analyze, finetune, merge, export_adapter, push, esft_select
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Run the `deepseekmoe` command."""
    app()


__all__ = ["app", "main"]
