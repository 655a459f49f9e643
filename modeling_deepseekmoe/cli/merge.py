# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command `deepseekmoe merge`: merge an adapter into its base."""

from dataclasses import dataclass
from typing import Annotated

import typer

from .options import Destination, FailedCheck, takes


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options of `deepseekmoe merge`: which adapter is merged into which base."""

    base: Annotated[str, typer.Argument(help="Folder or hub id of the checkpoint.")]
    adapter: Annotated[str, typer.Argument(help="Folder or hub id of a LoRA adapter, or an ESFT folder.")]
    out: Destination


@takes(MergeOptions)
def merge(options: MergeOptions) -> None:
    """Merge an adapter into its base, file by file, and prove that it computes the same."""
    from modeling_deepseekmoe.conversion import MergingError, merge_adapter

    try:
        result = merge_adapter(options.base, options.adapter, options.out, report=typer.echo)
    except MergingError as error:
        raise FailedCheck(str(error)) from error
    typer.echo(f"{options.out}: {result}.")


__all__ = ["MergeOptions", "merge"]
