# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command line, `deepseekmoe`. Exit code 2 for a user's mistake, 1 for a failed check."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="deepseekmoe",
    help="DeepSeekMoE for the Hugging Face ecosystem.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class FailedCheck(Exception):
    """A check that was asked for did not hold: exit code 1."""


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except FailedCheck as error:
        typer.echo(f"Failed: {error}", err=True)
        raise typer.Exit(1) from error
    except ValueError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


@app.callback()
def _options() -> None:
    """DeepSeekMoE for the Hugging Face ecosystem."""


@app.command()
def inspect(
    name_or_folder: Annotated[str, typer.Argument(help="A preset's name, or a checkpoint folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Also read every weight and check that it is finite.")
    ] = False,
    lora_rank: Annotated[int, typer.Option(help="Rank for the LoRA memory figure.")] = 16,
) -> None:
    """Show parameters, FLOPs, cache and memory of a preset or a checkpoint folder."""
    from .inspection import check_weights, inspect_model

    with _exit_codes():
        report = inspect_model(name_or_folder, lora_rank=lora_rank)
        typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report.to_text())
        if check:
            if not Path(name_or_folder).is_dir():
                raise ValueError(f"--check is not allowed for the preset {name_or_folder!r}: it has no weights.")
            try:
                tensors = check_weights(name_or_folder)
            except ValueError as error:
                raise FailedCheck(str(error)) from error
            typer.echo(f"{tensors} tensors read, all values finite.", err=as_json)


def main() -> None:
    """Entry point of the `deepseekmoe` command."""
    app()


if __name__ == "__main__":
    main()
