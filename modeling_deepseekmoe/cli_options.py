# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What the commands share: options, exit codes, loading, progress."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

# Options of the commands that read a model and a text.
Model = Annotated[str, typer.Argument(help="Checkpoint folder or hub id, of any generation.")]
Column = Annotated[str, typer.Option(help="Field of the rows that holds the text.")]
Split = Annotated[str, typer.Option(help="Split of a dataset.")]
Subset = Annotated[str | None, typer.Option(help="Configuration of a dataset that has several.")]
Tokenizer = Annotated[str | None, typer.Option(help="Folder or hub id, if not the model's own.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the tokenizer's folder carries.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceMap = Annotated[str, typer.Option(help="Where the model goes: auto, cpu, cuda, ...")]
# Options of the commands that write checkpoints.
ShardSize = Annotated[str, typer.Option(help="Size of a weight file, as 5GB or 500MB.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run has left.")]


class FailedCheck(Exception):
    """A check that was asked for did not hold: exit code 1."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Errors as messages: exit code 1 for a failed check, 2 for a user's mistake."""
    try:
        yield
    except FailedCheck as error:
        typer.echo(f"Failed: {error}", err=True)
        raise typer.Exit(1) from error
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def check_dtype(dtype: str) -> None:
    """That it is one that a model can be loaded in."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} is not allowed: it must be auto, float32, bfloat16 or float16.")


def check_file(path: Path) -> None:
    """That a file can be written, before the work begins."""
    if path.is_dir():
        raise ValueError(f"{path} is not allowed as a file to write: it is a folder.")


def load_model(
    model: str, tokenizer: str | None, dtype: str, device_map: str, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """A checkpoint of any generation with this package's classes, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    from .registration import register
    from .tokenization import load_tokenizer

    check_dtype(dtype)
    register(override_native=True)
    return (
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device_map),
        load_tokenizer(tokenizer or model, trust_remote_code=trust_remote_code),
    )


def allow_only(context: typer.Context, case: str, *allowed: str) -> None:
    """Raise a `ValueError` if anything was given that has no meaning in a case.

    Args:
        context: of the command.
        case: `"with --option"`, or `"without --option"`.
        allowed: parameters of the command that may be given.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params}  # an argument's is its own
    if odd := sorted(names[name] for name in given - set(allowed)):
        raise ValueError(f"{', '.join(odd)}: not allowed {case}.")


@contextmanager
def bytes_bar(total: int) -> Iterator[Any]:
    """A progress bar on stderr: bytes, speed, time left."""
    from huggingface_hub.utils import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, file=sys.stderr) as bar:
        yield bar


__all__ = [
    "Column",
    "DeviceMap",
    "Dtype",
    "FailedCheck",
    "Model",
    "Resume",
    "ShardSize",
    "Split",
    "Subset",
    "Tokenizer",
    "TrustRemoteCode",
    "allow_only",
    "bytes_bar",
    "check_dtype",
    "check_file",
    "exit_codes",
    "load_model",
]
