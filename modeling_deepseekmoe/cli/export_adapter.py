# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command `deepseekmoe export-adapter`: write an adapter in another layout."""

from dataclasses import dataclass
from typing import Annotated

import typer

from .options import Destination, takes


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `deepseekmoe export-adapter`: which adapter is written, and in which layout."""

    adapter: Annotated[str, typer.Argument(help="Folder or hub id of a LoRA adapter on routed experts.")]
    out: Destination
    layout: Annotated[str, typer.Option(help="per-expert or peft.")]
    num_experts: Annotated[
        int | None, typer.Option(help="For peft: experts of a layer, where not all have an adapter.")
    ] = None


@takes(ExportOptions)
def export_adapter(options: ExportOptions) -> None:
    """Write an adapter with one pair of factors for every expert's projections, or in PEFT's stacked layout."""
    from modeling_deepseekmoe.conversion import export_adapter as run

    written = run(options.adapter, options.out, options.layout, options.num_experts)
    typer.echo(f"{options.out}: {written} tensors.")


__all__ = ["ExportOptions", "export_adapter"]
