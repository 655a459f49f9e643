# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command `deepseekmoe merge`: merge an adapter into its base."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Destination, FailedCheck, allow_only, takes


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options of `deepseekmoe merge`: which adapter is merged into which base, and on what both are compared."""

    context: typer.Context
    base: Annotated[str, typer.Argument(help="Folder or hub id of the checkpoint, quantised or not.")]
    adapter: Annotated[str, typer.Argument(help="Folder or hub id of a LoRA adapter, or an ESFT folder.")]
    out: Destination
    dtype: Annotated[
        str | None,
        typer.Option(help="Of a quantised base: bfloat16 (the default), float16, float32, or keep for its formats."),
    ] = None
    compare: Annotated[
        str | None,
        typer.Option(help="Text, .jsonl, ...: on it, compare the result with the adapter over the base."),
    ] = None
    format: Annotated[
        str | None,
        typer.Option(help="With --compare: nf4, fp8 or mxfp4, if the adapter was trained over experts stored so."),
    ] = None
    correction: Annotated[
        Path | None, typer.Option(help="With --compare: correction.safetensors, if the run had --correction-rank.")
    ] = None
    column: Annotated[str, typer.Option(help="With --compare: field of the rows that holds the text.")] = "text"
    max_tokens: Annotated[int, typer.Option(help="With --compare: tokens to look at.")] = 16384
    block_size: Annotated[int, typer.Option(help="With --compare: tokens in a sequence.")] = 512


@takes(MergeOptions)
def merge(options: MergeOptions) -> None:
    """Merge an adapter into its base, file by file, and prove that it computes the same."""
    from modeling_deepseekmoe.conversion import MergingError, merge_adapter

    batches = _batches(options)  # before anything is written
    try:
        result = merge_adapter(options.base, options.adapter, options.out, dtype=options.dtype, report=typer.echo)
    except MergingError as error:
        raise FailedCheck(str(error)) from error
    typer.echo(f"{options.out}: {result}.")
    if batches:
        from ..analysis.merge_comparison import compare_merged

        compared = compare_merged(
            options.base, options.adapter, options.out, batches, format=options.format, correction=options.correction
        )
        typer.echo(f"{compared}.")


def _batches(options: MergeOptions) -> list[Any]:
    """Read the text to compare on."""
    if options.compare is None:
        allow_only(options.context, "without --compare", "base", "adapter", "out", "dtype")
        return []
    from ..analysis.merge_comparison import check_comparable
    from ..analysis.texts import read_texts, token_batches
    from ..integrations.registration import register
    from ..support.tokenization import load_tokenizer

    register(override_native=True)
    check_comparable(options.base, options.adapter, options.format, options.correction)
    return token_batches(
        read_texts(options.compare, column=options.column),
        load_tokenizer(options.base),
        max_tokens=options.max_tokens,
        block_size=options.block_size,
        batch_size=1,
    )


__all__ = ["MergeOptions", "merge"]
