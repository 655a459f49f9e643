# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command `deepseekmoe inspect`: show what a model costs, or plan a training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .options import FailedCheck, allow_only, takes


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Options of `deepseekmoe inspect`: which model is inspected, and what is printed of it."""

    context: typer.Context
    name_or_folder: Annotated[str, typer.Argument(help="A preset's name, or a checkpoint folder.")]
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False
    check: Annotated[bool, typer.Option("--check", help="Also read every weight, as `deepseekmoe verify`.")] = False
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA; a plan takes a smaller one as of --tokens.")] = 16
    gpus: Annotated[int | None, typer.Option(help="Plan training on that many GPUs instead.")] = None
    gpu_memory: Annotated[str, typer.Option(help="Of one GPU, as 80GB.")] = "80GB"
    gpus_per_machine: Annotated[int, typer.Option(help="GPUs with fast links between them.")] = 8
    method: Annotated[str, typer.Option(help="full, lora, qlora (LoRA on quantised experts) or esft.")] = "full"
    format: Annotated[str, typer.Option(help="Of the frozen experts of qlora: nf4, fp8 or mxfp4.")] = "nf4"
    esft_share: Annotated[float, typer.Option(help="Share of the routed experts that ESFT trains.")] = 0.1
    tokens: Annotated[
        int, typer.Option(help="Tokens of one micro-batch on one GPU; fewer, if nothing fits and you give none.")
    ] = 4096


# Options that only some methods have.
_OF_METHODS = {"lora_rank": ("lora", "qlora"), "esft_share": ("esft",), "format": ("qlora",)}


@takes(InspectOptions)
def inspect(options: InspectOptions) -> None:
    """Show parameters, FLOPs, cache and memory of a preset or a checkpoint folder, or which training fits."""
    if options.gpus is not None:
        _plan(options, options.gpus)
        return
    from ..analysis.inspection import inspect_model

    allow_only(options.context, "without --gpus", "name_or_folder", "as_json", "check", "lora_rank")
    report = inspect_model(options.name_or_folder, lora_rank=options.lora_rank)
    if options.check:
        _require_checkable(options.name_or_folder, report.model_type)
    typer.echo(json.dumps(report.to_dict(), indent=2) if options.as_json else report.to_text())
    if not options.check:
        return
    from modeling_deepseekmoe.conversion import VerificationError, verify

    try:
        checked = verify(options.name_or_folder)
    except (VerificationError, ValueError) as error:
        raise FailedCheck(str(error)) from error
    typer.echo(str(checked), err=options.as_json)


def _require_checkable(name_or_folder: str, model_type: str) -> None:
    """Raise ValueError if there are no weights, or none that `verify` reads."""
    from ..checkpoint_layout import MODEL_TYPES

    if not Path(name_or_folder).is_dir():
        raise ValueError(f"--check is not allowed for the preset {name_or_folder!r}: it has no weights.")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"--check is not allowed for model_type={model_type!r}: `deepseekmoe verify` reads checkpoints of "
            f"{', '.join(MODEL_TYPES)}. Inspect this one without --check."
        )


def _plan(options: InspectOptions, gpus: int) -> None:
    from ..analysis.planning import plan_table, plan_training

    if options.check:
        raise ValueError("--check is not allowed together with --gpus.")
    of_others = {name for name, methods in _OF_METHODS.items() if options.method not in methods}
    allow_only(options.context, f"with --method {options.method}", *(options.context.params.keys() - of_others))
    sources = {name: options.context.get_parameter_source(name) for name in ("lora_rank", "tokens")}
    plans = plan_training(
        options.name_or_folder,
        gpus=gpus,
        gpu_memory=options.gpu_memory,
        gpus_per_machine=options.gpus_per_machine,
        method=options.method,
        shrink=[name for name, source in sources.items() if source is not None and source.name == "DEFAULT"],
        format=options.format,
        lora_rank=options.lora_rank,
        esft_share=options.esft_share,
        tokens=options.tokens,
    )
    typer.echo(json.dumps([plan.to_dict() for plan in plans], indent=2) if options.as_json else plan_table(plans))
    asked = {"--tokens": (options.tokens, plans[0].tokens), "--lora-rank": (options.lora_rank, plans[0].lora_rank)}
    if smaller := {name: pair for name, pair in asked.items() if pair[1] is not None and pair[0] != pair[1]}:
        before, now = (" and ".join(f"{name} {pair[idx]}" for name, pair in smaller.items()) for idx in (0, 1))
        typer.echo(f"Nothing fits with {before}. This is planned with {now}, found by halving.", err=options.as_json)


__all__ = ["InspectOptions", "inspect"]
