# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command `deepseekmoe push`: publish a checkpoint, an adapter or trained experts."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from .options import FailedCheck, ModelOptions, TextOptions, allow_only, bytes_bar, takes


@dataclass(frozen=True, kw_only=True)
class PushCommandOptions:
    """Options of `deepseekmoe push`: what is published, where, and what the card says."""

    context: typer.Context
    folder: Annotated[str, typer.Argument(help="Folder of a checkpoint, a LoRA adapter, or trained experts.")]
    repo_id: Annotated[str | None, typer.Argument(help="Repository: user/name.")] = None
    code_only: Annotated[
        bool, typer.Option("--code-only", help="Give a published model this version's code alone.")
    ] = False
    license: Annotated[str | None, typer.Option(help="Of the model, as apache-2.0, mit or other.")] = None
    license_name: Annotated[str | None, typer.Option(help="With --license other.")] = None
    license_link: Annotated[str | None, typer.Option(help="With --license other.")] = None
    base_model: Annotated[str | None, typer.Option(help="Repository that this was made from.")] = None
    dataset: Annotated[list[str] | None, typer.Option(help="Data it was trained on; may be repeated.")] = None
    tag: Annotated[list[str] | None, typer.Option(help="For the card; may be repeated.")] = None
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False
    revision: Annotated[str, typer.Option(help="Branch; made from main where it does not exist.")] = "main"
    code: Annotated[str, typer.Option(help="The model's code: auto, always or never.")] = "auto"
    data: Annotated[
        str | None, typer.Option(help="Text to measure the routing on, for the card, as in `deepseekmoe report`.")
    ] = None
    column: Annotated[str, typer.Option(help="Field of the rows that holds the text.")] = "text"
    max_tokens: Annotated[int, typer.Option(help="Tokens to look at.")] = 32768
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a model card that somebody wrote.")
    ] = False
    replace: Annotated[bool, typer.Option("--replace", help="Replace what else the repository holds.")] = False
    with_training_state: Annotated[
        bool, typer.Option("--with-training-state", help="Upload optimizer states and the like too.")
    ] = False
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, and upload nothing.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False


@takes(PushCommandOptions)
def push(options: PushCommandOptions) -> None:
    """Check a folder and publish it on the Hub, with a model card and, if it is needed, the model's code.

    With --code-only the repository is the only argument: deepseekmoe push --code-only user/name. It takes the options
    --revision, --message, --dry-run, --json and --replace. The last one lets it replace code that somebody changed.
    """
    if options.code_only:
        _push_code(options)
        return
    from huggingface_hub import is_offline_mode

    from modeling_deepseekmoe.conversion.verifying import bytes_to_read

    from ..hub.candidate import PreflightError, find_kind
    from ..hub.card import CardFacts
    from ..hub.plan import PushOptions, plan_push

    if options.repo_id is None:
        raise ValueError("REPO_ID is missing: deepseekmoe push FOLDER user/name.")
    is_model = find_kind(options.folder) == "model"
    facts = CardFacts(
        license=options.license,
        license_name=options.license_name,
        license_link=options.license_link,
        base_model=options.base_model,
        datasets=tuple(options.dataset or ()),
        tags=tuple(options.tag or ()),
    )
    push_options = PushOptions(
        facts=facts,
        private=options.private or None,
        revision=options.revision,
        code=options.code,
        routing=_measure_routing(options),
        overwrite_card=options.overwrite_card,
        replace_content=options.replace,
        with_training_state=options.with_training_state,
    )
    try:
        with bytes_bar(bytes_to_read(options.folder) if is_model else 0) as bar:
            plan = plan_push(
                options.folder,
                options.repo_id,
                push_options,
                ask_hub=not (options.dry_run and is_offline_mode()),
                progress=bar.update,
            )
    except PreflightError as error:
        raise FailedCheck(str(error)) from error
    _carry_out(plan, options, options.dry_run)


def _push_code(options: PushCommandOptions) -> None:
    from ..hub.code_update import plan_code_update

    allow_only(options.context, "with --code-only", "folder", "code_only", "revision", "replace", "message", "dry_run",
               "as_json")  # fmt: skip
    plan = plan_code_update(options.folder, revision=options.revision, replace_content=options.replace)
    _carry_out(plan, options, options.dry_run or plan.is_empty)


def _measure_routing(options: PushCommandOptions) -> Any:
    """Make the routing report for the card, if there is a text for it."""
    if options.data is None:
        others = set(options.context.params) - {"column", "max_tokens"}
        allow_only(options.context, "without --data", *others)
        return None
    from ..analysis.plots import require_matplotlib
    from ..analysis.routing_report import make_report

    require_matplotlib()
    text = TextOptions(data=options.data, column=options.column)
    texts = text.texts()
    return make_report(
        *ModelOptions(model=options.folder).load(),
        texts,
        title=str(options.repo_id),
        source=text.source,
        max_tokens=options.max_tokens,
    )


def _carry_out(plan: Any, options: PushCommandOptions, dry_run: bool) -> None:
    """Print a plan. Unless it is a dry run, upload what the plan holds."""
    from ..hub.push import upload

    typer.echo(json.dumps(plan.to_dict(), indent=2) if options.as_json else plan.to_text())
    if not dry_run:
        typer.echo(upload(plan, commit_message=options.message), err=options.as_json)


__all__ = ["PushCommandOptions", "push"]
