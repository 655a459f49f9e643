# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command `deepseekmoe verify`: check one checkpoint, or compare two."""

from dataclasses import dataclass
from typing import Annotated

import typer

from .options import FailedCheck, allow_only, bytes_bar, takes


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of `deepseekmoe verify`: which checkpoints are read, and what is compared."""

    context: typer.Context
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")]
    other: Annotated[
        str | None, typer.Argument(help="Another one to compare with, of any layout, dtype and dialect.")
    ] = None
    write_manifest: Annotated[
        bool, typer.Option("--write-manifest", help="Write the SHA-256 of every tensor into the folder.")
    ] = False
    logits: Annotated[bool, typer.Option("--logits", help="Also compare logits on random tokens.")] = False
    tolerance: Annotated[float, typer.Option(help="Largest allowed logit difference.")] = 1e-3


@takes(VerifyOptions)
def verify(options: VerifyOptions) -> None:
    """Prove that a checkpoint is whole, and that two of them hold the same model."""
    from modeling_deepseekmoe.conversion import VerificationError
    from modeling_deepseekmoe.conversion.verifying import bytes_to_read
    from modeling_deepseekmoe.conversion.verifying import verify as run

    if options.logits and options.other is None:
        raise ValueError("--logits is not allowed without another checkpoint to compare with.")
    if not options.logits:
        allow_only(options.context, "without --logits", "checkpoint", "other", "write_manifest")
    try:
        with bytes_bar(bytes_to_read(options.checkpoint, options.other)) as bar:
            result = run(
                options.checkpoint,
                options.other,
                write_manifest=options.write_manifest,
                logits=options.logits,
                tolerance=options.tolerance,
                report=bar.write,
                progress=bar.update,
            )
    except (VerificationError, ValueError) as error:
        raise FailedCheck(str(error)) from error
    typer.echo(str(result))


__all__ = ["VerifyOptions", "verify"]
