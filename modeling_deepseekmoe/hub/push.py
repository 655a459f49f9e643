# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Publish a folder or a model on the Hub: it is checked, gets its code and its card, and goes up in one commit.

First all files are brought to the Hub's storage. Then one commit makes all of them visible, so that the repository
never shows a part of them. After an interruption the same call goes on, because storage keeps what has arrived.
`huggingface_hub` makes the requests, finds the token and repeats what failed.
"""

import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_deepseekmoe.conversion.checkpoint import listed

from ..remote_code import CODE_MARK
from ..support.library_support import is_left_out
from .candidate import find_candidate
from .card import CARD_NAME, CardFacts, is_hand_written, make_card
from .plan import PushOptions, PushPlan, plan_push
from .repository import Remote, UploadError, client, explained, full_repo_id, look

logger = logging.get_logger(__name__)

_AT_A_TIME = 5  # files that are brought to the storage together


def upload(
    plan: PushPlan,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> str:
    """Carry out a plan: bring the files to the Hub's storage, and make them visible in one commit.

    Args:
        plan: from [`plan_push`].
        commit_message, commit_description: title and text of the commit.
        create_pr: open a pull request with the commit.
        token: token of the Hub. The default is the stored one.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        UploadError: if the connection broke, the Hub was busy, or the branch has changed.
        OSError: if the Hub refuses.
        ValueError: if the plan was made without asking the Hub, or if files have changed since.
    """
    if not plan.is_complete:
        raise ValueError("plan is not allowed: it was made without asking the Hub what is there.")
    if create_pr and plan.revision != "main":
        raise ValueError(f"create_pr=True is not allowed with revision={plan.revision!r}: it is for main.")
    plan.check_unchanged()
    api = client(token)
    with explained(plan.repo_id):
        parent = _make_place(plan, api)
        additions = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in sorted(plan.files.items())
        ]
        branch: dict[str, Any] = {"repo_id": plan.repo_id, "revision": plan.revision, "create_pr": create_pr}
        _bring_to_storage(api, additions, branch)
        plan.check_unchanged()
        commit = api.create_commit(
            operations=[*additions, *(CommitOperationDelete(name) for name in plan.deleted)],
            commit_message=commit_message or f"Upload {plan.kind}",
            commit_description=commit_description,
            parent_commit=parent,
            **branch,
        )
    return commit.pr_url or commit.commit_url


def _make_place(plan: PushPlan, api: HfApi) -> str | None:
    """Make the repository and the branch if they are missing. Return the commit that the new one follows."""
    api.create_repo(plan.repo_id, private=plan.private, exist_ok=True)
    parent = plan.parent
    if not plan.exists:
        found = look(api, plan.repo_id, "main")
        if set(found.files) - {".gitattributes"}:
            raise UploadError(f"{plan.repo_id} has come into being meanwhile. Push again, to see what is there.")
        parent = found.head
    if plan.revision != "main" and not plan.revision.startswith("refs/"):
        api.create_branch(plan.repo_id, branch=plan.revision, exist_ok=True)
    return parent


def _bring_to_storage(api: HfApi, additions: list[CommitOperationAdd], branch: dict[str, Any]) -> None:
    """Send the contents, a few files at a time. None is visible before the commit."""
    for first in range(0, len(additions), _AT_A_TIME):
        # A .gitignore in the repository would make the client leave files out of the commit without a word.
        api.preupload_lfs_files(
            additions=additions[first : first + _AT_A_TIME],
            gitignore_content="# nothing\n",
            free_memory=False,
            **branch,
        )
    ignored = [addition.path_in_repo for addition in additions if is_left_out(addition)]
    if ignored:
        raise ValueError(f"{branch['repo_id']} ignores {listed(ignored)}: change its .gitignore.")


def push_model(
    model: nn.Module,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    **options: Any,
) -> str:
    """Save a model and publish it. The models' `push_to_hub` calls this.

    It also takes adapted models, `get_peft_model(...)`, and publishes only their active adapter.

    Args:
        model: a model of the family, or a `PeftModel` of one.
        repo_id: `user/name`.
        tokenizer: goes up with the model.
        max_shard_size: size of a weight file.
        commit_message, commit_description, create_pr: as for [`upload`].
        options: fields of [`CardFacts`] (`license`, `base_model`, ...), which go before those of `facts`, and of
            [`PushOptions`] (`facts`, `private`, `revision`, `code`, `token`, ...). An adapter needs the id of its
            base, unless the base was loaded by its id.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        As [`plan_push`] and [`upload`].
    """
    if odd := sorted({"ask_hub", "with_training_state"} & options.keys()):
        raise TypeError(f"push_model() takes no {odd[0]}: that is for folders, see plan_push.")
    repo_id = full_repo_id(repo_id, None)
    said = {name: options.pop(name) for name in [own.name for own in fields(CardFacts)] if name in options}
    wanted = PushOptions(**{"license_required": False, **options, "revision": options.get("revision") or "main"})
    wanted = replace(wanted, facts=_completed_by_model(replace(wanted.facts, **said), model))
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(model, "get_base_model"):
            adapter = model.active_adapter
            model.save_pretrained(folder, selected_adapters=[adapter])
            folder = folder if adapter == "default" else str(Path(folder, adapter))
            Path(folder, CARD_NAME).unlink(missing_ok=True)  # PEFT's, without any content
            if len(model.peft_config) > 1:
                logger.warning(f"Of {len(model.peft_config)} adapters the active one, {adapter}, is published.")
        else:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        plan = plan_push(folder, repo_id, wanted)
        checked = (check.removeprefix("note: ") for check in plan.checks if check.startswith("note: "))
        for note in (*checked, *plan.notes, *(f"{name} is removed from the repository" for name in plan.deleted)):
            logger.warning(f"{repo_id}: {note}")
        return upload(
            plan,
            commit_message=commit_message,
            commit_description=commit_description,
            create_pr=create_pr,
            token=wanted.token,
        )


def _completed_by_model(facts: CardFacts, model: nn.Module) -> CardFacts:
    tags = [facts.tags] if isinstance(facts.tags, str) else facts.tags or ()
    tags = (*(getattr(model, "model_tags", None) or ()), *tags)
    return replace(facts, tags=tags, datasets=tuple(facts.datasets or ()))


def write_card(
    folder: str | Path,
    repo_id: str | None,
    facts: CardFacts,
    training: dict[str, Any],
    revision: str = "main",
    token: str | bool | None = None,
) -> None:
    """Write the model card of a folder that a trainer is about to upload, unless somebody wrote one.

    A card that somebody wrote stays: that of the repository, or else that of the folder. If the Hub cannot be asked
    whether it has one, there is a warning and no card.

    Args:
        folder: the output folder of a trainer. Without a checkpoint in it nothing is written.
        repo_id: the repository, or `None` if nothing is uploaded.
        facts: what the user says.
        training: the trainer's state.
        revision: branch of the repository.
        token: token of the Hub. The default is the stored one.
    """
    path = Path(folder) / CARD_NAME
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    remote = Remote()
    try:
        if repo_id is not None:
            api = client(token)
            repo_id = full_repo_id(repo_id, api)
            remote = look(api, repo_id, revision)
    except (OSError, ValueError) as error:
        logger.warning(f"No model card is written, because the Hub cannot be asked: {error}")
        if not is_hand_written(card):
            path.unlink(missing_ok=True)
        return
    if is_hand_written(remote.card):
        _put_away(path, "" if card == remote.card else card)  # which leaves the repository's as it is
        return
    if is_hand_written(card):
        logger.warning_once(f"{path} stays as it is, because somebody wrote it. Delete it to have a new one.")
        return
    try:
        candidate = find_candidate(folder)
    except (ValueError, FileNotFoundError) as error:
        logger.info(f"No model card is written yet: {error}")  # trainers ask before they save for the first time
        return
    name, with_code = repo_id or Path(folder).absolute().name, CODE_MARK in candidate.files
    try:
        facts = facts.completed(candidate, (card, remote.card))
        text = make_card(candidate, name, facts, with_code=with_code, training=training)
    except ValueError as error:
        logger.warning(f"No model card is written: {error}")
        return
    path.write_text(text, encoding="utf-8")


def _put_away(path: Path, card: str) -> None:
    """Remove a card, to leave the repository's as it is. If somebody wrote it, rename it so that it is not
    uploaded."""
    if is_hand_written(card):
        path.replace(path.with_name(f"_{path.name}"))
        logger.warning(f"{path} is now _{path.name}, because the repository has a card that somebody wrote.")
    else:
        path.unlink(missing_ok=True)


__all__ = ["push_model", "upload", "write_card"]
