# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Shared parts of the commands: options, exit codes, loading, progress."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

# Options of the commands that write checkpoints.
Destination = Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")]
ShardSize = Annotated[str, typer.Option(help="Size of a weight file, as 5GB or 500MB.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run has left.")]
Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options for a command that loads a model."""

    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, of any generation.")]
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id, if not the model's own.")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the tokenizer's folder carries.")
    ] = False
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    device_map: Annotated[str, typer.Option(help="Where the model goes: auto, cpu, cuda, ...")] = "auto"

    def check(self) -> None:
        """Look at what can be known before a model is loaded.

        Raises:
            ValueError: if no model can be loaded in the dtype, or on the device.
            FileNotFoundError: if it is a folder's name, and there is no such folder.
        """
        import torch

        allowed = ("auto", "float32", "bfloat16", "float16")
        if self.dtype not in allowed:
            raise ValueError(f"dtype={self.dtype!r} is not allowed: it must be one of {', '.join(allowed)}.")
        if self.device_map.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device_map={self.device_map!r} is not allowed: torch finds no CUDA device here.")
        path = Path(self.model)
        if not path.exists() and (path.is_absolute() or str(self.model).startswith(".") or len(path.parts) > 2):
            raise FileNotFoundError(f"{self.model}: there is no such folder.")

    def load(self) -> tuple[Any, Any]:
        """Load the model with this package's classes, and its tokenizer. The checkpoint may be of any generation."""
        from transformers import AutoModelForCausalLM

        from ..integrations.native_gates import add_balancing_bias
        from ..integrations.registration import register
        from ..support.folders import local_folder
        from ..support.tokenization import load_tokenizer

        self.check()
        register(override_native=True)
        with named(self.model):
            model = AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype, device_map=self.device_map)
        if getattr(model.config, "added_balancing_bias", False):
            add_balancing_bias(model, local_folder(self.model))
        return model, load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)


@contextmanager
def named(model: str) -> Iterator[None]:
    """Say in an error which model it is about, if it does not begin with that."""
    try:
        yield
    except (ValueError, OSError) as error:
        if str(error).startswith(f"{model}: "):
            raise
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f"{model}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Options for a command that writes a page of HTML, or prints its numbers."""

    output: Annotated[Path | None, typer.Option(help="HTML file to write; one in this folder by default.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers instead of writing the page.")] = False

    def check_page(self, default: str) -> Path:
        """Look before the work begins whether the page can be made, and return its file.

        Raises:
            ValueError: if the file is a folder, or if no page was asked for.
            ImportError: if matplotlib is missing.
        """
        output = self.output or Path(default)
        if self.as_json and self.output is not None:
            raise ValueError(f"--output {self.output}: not allowed with --json, which writes no page.")
        if not self.as_json:
            from ..analysis.plots import require_matplotlib

            require_matplotlib()
            check_file(output)
        return output


def write_page(page: str, path: Path) -> None:
    """Write a page, and the folder that it goes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options for a command that reads a text, from a file or a dataset."""

    data: Annotated[str, typer.Option(help="Text file, .jsonl, .json, .csv, .parquet, or a dataset's folder or id.")]
    column: Annotated[str, typer.Option(help="Field of the rows that holds the text.")] = "text"
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train"
    subset: Annotated[str | None, typer.Option(help="Configuration of a dataset that has several.")] = None

    @property
    def source(self) -> str:
        """Name of the text: of a file without its path."""
        path = Path(self.data)
        return path.name if path.exists() else self.data

    def texts(self) -> Iterator[str]:
        """Read the first text, for a mistake to show before a model is loaded, and the others as they are needed."""
        from ..analysis.texts import read_texts

        texts = read_texts(self.data, split=self.split, column=self.column, subset=self.subset)
        return chain([next(texts, "")], texts)


class FailedCheck(Exception):
    """A check that was asked for did not hold: exit code 1."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Show errors as messages, and exit with code 1 for a failed check, 2 for a user's mistake."""
    try:
        yield
    except FailedCheck as error:
        typer.echo(f"Failed: {error}", err=True)
        raise typer.Exit(1) from error
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def takes(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a command of a function that takes one dataclass. The dataclass's fields are the arguments and options.

    Args:
        options: a dataclass whose fields are annotated as typer wants them.

    Returns:
        A decorator. The command shows the function's docstring, and its errors become exit codes.
    """
    hints = get_type_hints(options, include_extras=True)
    own: list[Any] = list(fields(options))  # type: ignore[arg-type]

    def decorate(run: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(run)
        def command(**values: Any) -> None:
            with exit_codes():
                run(options(**values))

        parameters = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in own
        ]
        vars(command)["__signature__"] = inspect.Signature(parameters)
        command.__annotations__ = {**{field.name: hints[field.name] for field in own}, "return": None}
        return command

    return decorate


def check_file(path: Path) -> None:
    """Raise ValueError if a path is a folder. Call this before the work for a file begins."""
    if path.is_dir():
        raise ValueError(f"{path} is not allowed as a file to write: it is a folder.")


def allow_only(context: typer.Context, case: str, *allowed: str) -> None:
    """Raise ValueError if the user gave anything that has no meaning in this case.

    Args:
        context: context of the command.
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
    """Show a progress bar on stderr: bytes, speed, time left."""
    from huggingface_hub.utils import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, file=sys.stderr) as bar:
        yield bar


__all__ = [
    "Destination",
    "FailedCheck",
    "ModelOptions",
    "PageOptions",
    "Resume",
    "ShardSize",
    "TextOptions",
    "allow_only",
    "bytes_bar",
    "check_file",
    "exit_codes",
    "named",
    "takes",
    "write_page",
]
