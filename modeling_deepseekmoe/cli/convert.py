# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command `deepseekmoe convert`: change a checkpoint's dialect, layout or dtype."""

import json
from dataclasses import dataclass
from typing import Annotated

import typer

from .options import Destination, Resume, ShardSize, bytes_bar, takes


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of `deepseekmoe convert`: what is converted, and into what."""

    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id; with --dry-run also a preset's name.")]
    destination: Destination
    to: Annotated[
        str | None, typer.Option(help="Dialect: deepseekmoe, deepseek, deepseek_v2 or deepseek_v3; the source's own.")
    ] = None
    layout: Annotated[str | None, typer.Option(help="per-expert or stacked; the source's own.")] = None
    dtype: Annotated[
        str,
        typer.Option(
            help="keep, float32, bfloat16, float16, fp8 (all linear layers), nf4 or mxfp4 (the routed experts alone; "
            "what else is quantised becomes bfloat16)."
        ),
    ] = "keep"
    max_shard_size: ShardSize = "5GB"
    drop_mtp: Annotated[bool, typer.Option("--drop-mtp", help="Leave multi-token-prediction layers out.")] = False
    resume: Resume = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False


@takes(ConvertOptions)
def convert(options: ConvertOptions) -> None:
    """Convert a checkpoint's dialect, layout of the experts, or dtype. Weights are streamed from folder to folder."""
    from modeling_deepseekmoe.conversion.converting import carry_out, plan_conversion

    from ..support.folders import check_destination

    if not (options.dry_run or options.resume):
        check_destination(options.destination)
    plan = plan_conversion(
        options.source,
        to=options.to,
        layout=options.layout,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        drop_mtp=options.drop_mtp,
        without_weights=options.dry_run,
    )
    typer.echo(json.dumps(plan.to_dict(), indent=2) if options.as_json else plan.to_text())
    if not options.dry_run:
        with bytes_bar(plan.nbytes) as bar:
            carry_out(plan, options.destination, resume=options.resume, report=bar.write, progress=bar.update)
        typer.echo(f"{options.destination}: complete.", err=options.as_json)


__all__ = ["ConvertOptions", "convert"]
