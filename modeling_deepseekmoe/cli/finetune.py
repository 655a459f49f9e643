# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command `deepseekmoe finetune`: fine-tune a checkpoint on a file of chats or texts."""

import warnings
from dataclasses import MISSING, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..finetuning.options import FinetuneOptions, read_options
from .options import FailedCheck, check_file, takes


def _fields() -> list[tuple[str, Any, Any]]:
    """Make the fields of the command's options: those of a fine-tuning, each with its help, and the command's own."""
    hints = get_type_hints(FinetuneOptions)
    made: list[tuple[str, Any, Any]] = [("context", typer.Context, field())]
    for one in fields(FinetuneOptions):
        kind, says = hints[one.name], one.metadata["help"]
        if one.name == "model":
            made.append((one.name, Annotated[str | None, typer.Argument(help=says)], field(default=None)))
        elif one.default is MISSING:  # may stand in the file of options
            made.append((one.name, Annotated[str | None, typer.Option(help=says)], field(default=None)))
        else:
            made.append((one.name, Annotated[kind, typer.Option(help=says)], field(default=one.default)))
    return [
        *made,
        ("config", Annotated[Path | None, typer.Option(help="YAML file with options, by their names.")], None),
        (
            "write_script",
            Annotated[Path | None, typer.Option(help="Write the run as a Python script, and train nothing.")],
            None,
        ),
        ("force", Annotated[bool, typer.Option("--force", help="Train where it does not fit.")], False),
        ("overwrite", Annotated[bool, typer.Option("--overwrite", help="Begin anew where a run is already.")], False),
    ]


FinetuneCommandOptions: Any = make_dataclass(
    "FinetuneCommandOptions", _fields(), frozen=True, kw_only=True, namespace={"__doc__": "Options of the command."}
)


@takes(FinetuneCommandOptions)
def finetune(options: Any) -> None:
    """Fine-tune a checkpoint on chats, prompts with completions, or texts: LoRA on its experts, ESFT, or everything.

    It checks every row, says what fits this machine, trains with TRL, and goes on after an interruption when it is
    called again. It needs the extra `train`.
    """
    from ..finetuning.run import FinetuneError, prepare, require_libraries
    from ..finetuning.run import finetune as run

    chosen = _given(options)
    require_libraries()
    import datasets

    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of names that TRL uses
    try:
        if options.write_script is None:
            run(chosen, force=options.force, overwrite=options.overwrite, echo=typer.echo)
            return
        from ..finetuning.script import make_script

        check_file(options.write_script)
        script = make_script(prepare(chosen, force=options.force, overwrite=options.overwrite, echo=typer.echo))
    except FinetuneError as error:
        raise FailedCheck(str(error)) from error
    options.write_script.parent.mkdir(parents=True, exist_ok=True)
    options.write_script.write_text(script, encoding="utf-8")
    typer.echo(f"{options.write_script}: python {options.write_script} trains the same weights.")


def _given(options: Any) -> FinetuneOptions:
    """Read the file of options, if there is one. What the command line says wins."""
    values = {} if options.config is None else read_options(options.config)
    for one in fields(FinetuneOptions):
        source = options.context.get_parameter_source(one.name)
        if source is not None and source.name != "DEFAULT":
            values[one.name] = getattr(options, one.name)
    chosen = FinetuneOptions.of(values)
    chosen.check_given(values)
    return chosen


__all__ = ["FinetuneCommandOptions", "finetune"]
