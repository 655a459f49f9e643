# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command `deepseekmoe esft-select`: select the experts that a task uses."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .options import ModelOptions, TextOptions, check_file, takes


@dataclass(frozen=True, kw_only=True)
class EsftSelectOptions(TextOptions, ModelOptions):
    """Options of `deepseekmoe esft-select`: which model reads the task's text, and how its experts are selected."""

    out: Annotated[Path, typer.Option(help="File to write the selection to.")] = Path("esft.json")
    method: Annotated[str, typer.Option(help="gate or token.")] = "gate"
    threshold: Annotated[float | None, typer.Option(help="Score to reach; 0.1 for gate, 0.2 for token.")] = None
    scores: Annotated[Path | None, typer.Option(help="File to write all scores to.")] = None
    max_tokens: Annotated[int, typer.Option(help="Tokens to look at.")] = 131072
    block_size: Annotated[int, typer.Option(help="Tokens in a sample; at most the model's context.")] = 4096
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = 1


@takes(EsftSelectOptions)
def esft_select(options: EsftSelectOptions) -> None:
    """Select the experts that a task uses, for expert-specialised fine-tuning."""
    from ..analysis.texts import token_batches
    from ..esft.scoring import METHODS, save_scores, score_experts, select_experts, selection_table
    from ..esft.selection import ExpertSelection

    method, threshold = options.method, options.threshold
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not allowed: it must be 'gate' or 'token'.")
    threshold = {"gate": 0.1, "token": 0.2}[method] if threshold is None else threshold
    select_experts({}, threshold)
    files = [path for path in (options.out, options.scores) if path is not None]
    for path in files:
        check_file(path)
    texts = options.texts()
    model, tokenizer = options.load()
    batches = token_batches(
        texts,
        tokenizer,
        max_tokens=options.max_tokens,
        block_size=min(options.block_size, model.config.max_position_embeddings),
        batch_size=options.batch_size,
    )
    total = sum(batch.numel() for batch in batches)
    with typer.progressbar(length=total, label="tokens", file=sys.stderr) as bar:
        values = score_experts(model, batches, method, progress=bar.update)
    selection = ExpertSelection(select_experts(values, threshold))
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    if options.scores is not None:
        save_scores(values, method, options.scores)
    selection.save(options.out)
    typer.echo(selection_table(selection, values))
    typer.echo(f"{options.out}: {method} scores of {total} tokens, threshold {threshold:g}.")


__all__ = ["EsftSelectOptions", "esft_select"]
