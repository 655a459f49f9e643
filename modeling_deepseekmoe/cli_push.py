# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command `deepseekmoe push`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Column, FailedCheck, allow_only, bytes_bar, exit_codes, load_model


def push(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(help="Folder of a checkpoint, a LoRA adapter, or trained experts.")],
    repo_id: Annotated[str | None, typer.Argument(help="Repository: user/name.")] = None,
    code_only: Annotated[
        bool, typer.Option("--code-only", help="Give a published model this version's code alone.")
    ] = False,
    license: Annotated[str | None, typer.Option(help="Of the model, as apache-2.0, mit or other.")] = None,
    license_name: Annotated[str | None, typer.Option(help="With --license other.")] = None,
    license_link: Annotated[str | None, typer.Option(help="With --license other.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Repository that this was made from.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Data it was trained on; may be repeated.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="For the card; may be repeated.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str, typer.Option(help="Branch; made from main where it does not exist.")] = "main",
    code: Annotated[str, typer.Option(help="The model's code: auto, always or never.")] = "auto",
    data: Annotated[
        str | None, typer.Option(help="Text to measure the routing on, for the card, as in `deepseekmoe report`.")
    ] = None,
    column: Column = "text",
    max_tokens: Annotated[int, typer.Option(help="Tokens to look at.")] = 32768,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a model card that somebody wrote.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace what else the repository holds.")] = False,
    with_training_state: Annotated[
        bool, typer.Option("--with-training-state", help="Upload optimizer states and the like too.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, and upload nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Check a folder and publish it on the Hub, with a model card and, where it is needed, the model's code.

    With --code-only the repository is the only argument: deepseekmoe push --code-only user/name. It takes the options
    --revision, --message, --dry-run, --json, and --replace, which lets it replace code that somebody changed.
    """
    from itertools import chain

    from huggingface_hub import is_offline_mode

    from modeling_deepseekmoe.conversion.verifying import bytes_to_read

    from .code_update import plan_code_update
    from .hub import plan_push
    from .model_card import CardFacts
    from .preflight import PreflightError, find_kind
    from .report import require_matplotlib
    from .routing_report import make_report, read_texts

    with exit_codes():
        if code_only:
            allow_only(context, "with --code-only", "folder", "code_only", "revision", "replace", "message", "dry_run",
                          "as_json")  # fmt: skip
            plan = plan_code_update(folder, revision=revision, replace_content=replace)
            _carry_out(plan, message, dry_run or plan.is_empty, as_json)
            return
        if repo_id is None:
            raise ValueError("REPO_ID is missing: deepseekmoe push FOLDER user/name.")
        is_model = find_kind(folder) == "model"
        if data is None:
            allow_only(context, "without --data", *(set(context.params) - {"column", "max_tokens"}))
        routing = None
        if data is not None:
            require_matplotlib()
            texts = read_texts(data, column=column)
            texts = chain([next(texts, "")], texts)  # a mistake shows before the model is loaded
            routing = make_report(
                *load_model(str(folder), None, "auto", "auto"),
                texts,
                title=repo_id,
                source=Path(data).name if Path(data).exists() else data,
                max_tokens=max_tokens,
            )
        facts = CardFacts(license, license_name, license_link, base_model, tuple(dataset or ()), tuple(tag or ()))
        try:
            with bytes_bar(bytes_to_read(folder) if is_model else 0) as bar:
                plan = plan_push(
                    folder,
                    repo_id,
                    private=private or None,
                    revision=revision,
                    code=code,
                    facts=facts,
                    routing=routing,
                    overwrite_card=overwrite_card,
                    replace_content=replace,
                    with_training_state=with_training_state,
                    ask_hub=not (dry_run and is_offline_mode()),
                    progress=bar.update,
                )
        except PreflightError as error:
            raise FailedCheck(str(error)) from error
        _carry_out(plan, message, dry_run, as_json)


def _carry_out(plan: Any, message: str | None, dry_run: bool, as_json: bool) -> None:
    """Print a plan, and upload what it holds."""
    from .hub import upload

    typer.echo(json.dumps(plan.to_dict(), indent=2) if as_json else plan.to_text())
    if not dry_run:
        typer.echo(upload(plan, commit_message=message), err=as_json)


__all__ = ["push"]
