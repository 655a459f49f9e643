# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Publishing on the Hub: a folder or a model is checked, gets its code and its card, and goes up in one commit.

All files are brought to the Hub's storage first, and one commit then makes all of them visible: the repository never
shows a part of them. After an interruption the same call goes on, because storage keeps what has arrived. Requests,
token and repetition are those of `huggingface_hub`.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

import modeling_deepseekmoe
from modeling_deepseekmoe.conversion.checkpoint import CONFIG_NAME, parse_json

from .card_sections import HEATMAP_NAME, find_training_state, heatmap
from .inspection import gigabytes
from .model_card import CARD_NAME, CardFacts, is_hand_written, make_card
from .preflight import Candidate, check_candidate, find_candidate
from .remote_code import CARRIED_BY_DEFAULT, auto_map_beside, carries_code, code_files, with_auto_map
from .repository import CONFIG_NAMES, Remote, UploadError, check_content, explained, full_repo_id, look
from .routing_report import RoutingReport

logger = logging.get_logger(__name__)

_AT_A_TIME = 5  # files that are brought to the storage together


@dataclass(frozen=True)
class PushPlan:
    """What would be uploaded.

    Attributes:
        repo_id, revision: the repository and its branch.
        kind: `"model"`, `"adapter"` or `"experts"`.
        exists: whether the repository is there already.
        files: contents by path in the repository, as a file of this machine or as bytes.
        deleted: paths in the repository that the commit removes.
        left_out: files of the folder that are not uploaded, with the reason.
        checks: what was found in order.
        notes: what else there is to say.
        parent: commit of the branch that the plan was made for.
    """

    repo_id: str
    revision: str
    kind: str
    exists: bool
    files: dict[str, Path | bytes]
    deleted: tuple[str, ...]
    left_out: dict[str, str]
    checks: tuple[str, ...]
    notes: tuple[str, ...]
    parent: str | None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in self.files.items()}

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers and strings."""
        return {**{key: value for key, value in asdict(self).items() if key != "files"}, "files": self.sizes}

    def to_text(self) -> str:
        """The plan for a reader."""
        sizes = self.sizes
        width = max(map(len, sizes))
        where = f"{self.repo_id}, branch {self.revision}" + ("" if self.exists else " (new)")
        lines = [f"{self.kind} for {where}", *(f"  {check}" for check in self.checks)]
        lines += [f"uploads {len(sizes)} files, {gigabytes(sum(sizes.values()))}:"]
        lines += [f"  {name:<{width}}  {size:>15,}" for name, size in sorted(sizes.items())]
        lines += [f"removes from the repository: {', '.join(self.deleted)}"] if self.deleted else []
        lines += [f"leaves out {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def plan_push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str = "main",
    code: str = "auto",
    facts: CardFacts = CardFacts(),  # noqa: B008 - frozen
    routing: RoutingReport | None = None,
    overwrite_card: bool = False,
    replace_content: bool = False,
    with_training_state: bool = False,
    license_required: bool = True,
    token: str | None = None,
    ask_hub: bool = True,
    progress: Callable[[int], None] = lambda size: None,
) -> PushPlan:
    """Check a folder, look at the repository, and say what would be uploaded. Nothing is written anywhere.

    Args:
        folder: a checkpoint of the family, a LoRA adapter, or the trained experts of `save_esft`.
        repo_id: `user/name`.
        private: whether a new repository is private; an existing one must be so already.
        revision: branch; it is made from `main` where it does not exist.
        code: whether the code of the family goes up with a model: `"auto"` (where transformers has no classes of its
            own), `"always"` or `"never"`.
        facts: for the card: license, base model, datasets. What is absent is taken from a card that is there already.
        routing: what the gates did with a text, for the card.
        overwrite_card: replace a card that somebody wrote.
        replace_content: replace what else a repository holds.
        with_training_state: let optimizer states and the like go up too.
        license_required: refuse a new card without a license.
        token: of the Hub; the stored one when absent.
        ask_hub: whether to look at the repository; the plan is made for a new one otherwise.
        progress: receives numbers of bytes of weights that were read.

    Raises:
        ValueError: for arguments, folders and repositories that are not allowed.
        PreflightError: if the folder is not in order.
        OSError: if files are missing, or the Hub refuses or cannot be reached.
    """
    carries_code("", code)
    api = HfApi(token=token) if ask_hub else None
    repo_id = full_repo_id(repo_id, api)
    candidate = find_candidate(folder, with_training_state)
    card = candidate.files[CARD_NAME].read_text(encoding="utf-8") if CARD_NAME in candidate.files else ""
    remote = look(api, repo_id, revision) if api else Remote()
    if private and remote.exists and not remote.private:
        raise ValueError(f"private=True is not allowed: {repo_id} exists and is public.")
    facts = facts.completed(candidate, (card, remote.card))
    files: dict[str, Path | bytes] = dict(candidate.files)
    notes = [] if ask_hub else ["the Hub was not asked: the repository is taken for a new one"]
    if candidate.kind == "model":
        notes += [*_add_code(candidate, files, code), *_name_tokenizer(candidate, files)]
    elif candidate.kind == "adapter" and candidate.raw.get("base_model_name_or_path") != facts.base_model:
        candidate = replace(candidate, raw={**candidate.raw, "base_model_name_or_path": facts.base_model})
        files[CONFIG_NAMES["adapter"]] = _as_json(candidate.raw)
        notes.append(f"{CONFIG_NAMES['adapter']} names {facts.base_model} as its base")
    deleted = check_content(candidate, remote, repo_id, replace_content)
    keeps_card = not overwrite_card and (is_hand_written(remote.card) or is_hand_written(card))
    if keeps_card:
        notes.append(_keep_card(files, remote, card))
    else:
        facts.check_license(license_required)
    checks = check_candidate(candidate, progress)
    if not keeps_card:
        training, with_code = find_training_state(candidate.folder), "remote_code.py" in files
        files[CARD_NAME] = make_card(
            candidate, repo_id, facts, with_code=with_code, routing=routing, training=training
        ).encode()
        if routing is not None:
            files[HEATMAP_NAME] = heatmap(routing)
    return PushPlan(
        repo_id=repo_id,
        revision=revision,
        kind=candidate.kind,
        exists=remote.exists,
        files=files,
        deleted=tuple(name for name in deleted if name not in files),
        left_out=candidate.left_out,
        checks=checks,
        notes=tuple(notes),
        parent=remote.head,
    )


def upload(
    plan: PushPlan,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Carry out a plan: bring the files to the Hub's storage, and make them visible in one commit.

    Args:
        plan: from [`plan_push`].
        private: whether a new repository is private; what the Hub does by default when absent.
        commit_message, commit_description: of the commit.
        create_pr: open a pull request with the commit.
        token: of the Hub; the stored one when absent.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        UploadError: if the connection broke, the Hub was busy, or the branch has changed.
        OSError: if the Hub refuses.
    """
    api = HfApi(token=token, library_name="modeling-deepseekmoe", library_version=modeling_deepseekmoe.__version__)
    with explained(plan.repo_id):
        api.create_repo(plan.repo_id, private=private, exist_ok=True)
        if plan.revision != "main" and not plan.revision.startswith("refs/"):
            api.create_branch(plan.repo_id, branch=plan.revision, exist_ok=True)
        additions = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in sorted(plan.files.items())
        ]
        branch: dict[str, Any] = {"repo_id": plan.repo_id, "revision": plan.revision, "create_pr": create_pr}
        for first in range(0, len(additions), _AT_A_TIME):
            api.preupload_lfs_files(additions=additions[first : first + _AT_A_TIME], free_memory=False, **branch)
        commit = api.create_commit(
            operations=[*additions, *(CommitOperationDelete(name) for name in plan.deleted)],
            commit_message=commit_message or f"Upload {plan.kind}",
            commit_description=commit_description,
            parent_commit=plan.parent,
            **branch,
        )
    return commit.pr_url or commit.commit_url


def push_model(
    model: nn.Module,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    base_model: str | None = None,
    datasets: list[str] | None = None,
    tags: list[str] | str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    code: str = "auto",
    routing: RoutingReport | None = None,
    overwrite_card: bool = False,
    replace_content: bool = False,
    max_shard_size: int | str = "5GB",
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> str:
    """Save a model and publish it: what `push_to_hub` of the models of the family does. It takes adapted models too,
    `get_peft_model(...)`, of which the adapter alone is published.

    Args:
        model: a model of the family, or a `PeftModel` of one.
        repo_id: `user/name`.
        tokenizer: goes up with the model.
        license, license_name, license_link, base_model, datasets, tags: for the card, see [`CardFacts`]. An adapter
            needs the id of its base, unless it was loaded by it.
        private, revision, code, routing, overwrite_card, replace_content: as for [`plan_push`].
        max_shard_size: of a weight file.
        commit_message, commit_description, create_pr, token: as for [`upload`].

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        As [`plan_push`] and [`upload`].
    """
    repo_id = full_repo_id(repo_id, None)
    key = token if isinstance(token, str) else None
    own_tags = [tags] if isinstance(tags, str) else list(tags or ())
    facts = CardFacts(
        license=license,
        license_name=license_name,
        license_link=license_link,
        base_model=base_model,
        datasets=tuple(datasets or ()),
        tags=(*(getattr(model, "model_tags", None) or ()), *own_tags),
    )
    with tempfile.TemporaryDirectory() as folder:
        sharding = {} if hasattr(model, "peft_config") else {"max_shard_size": max_shard_size}
        model.save_pretrained(folder, **sharding)
        Path(folder, CARD_NAME).unlink(missing_ok=True)  # PEFT's, without any content
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        plan = plan_push(
            folder,
            repo_id,
            private=private,
            revision=revision or "main",
            code=code,
            facts=facts,
            routing=routing,
            overwrite_card=overwrite_card,
            replace_content=replace_content,
            license_required=False,
            token=key,
        )
        for note in plan.notes:
            logger.warning(f"{repo_id}: {note}")
        return upload(
            plan,
            private=private,
            commit_message=commit_message,
            commit_description=commit_description,
            create_pr=create_pr,
            token=key,
        )


def write_card(
    folder: str | Path, repo_id: str, facts: CardFacts, training: dict[str, Any], token: str | None = None
) -> None:
    """Write the model card of a folder that a trainer is about to upload, unless somebody wrote one.

    Args:
        folder: the output folder of a trainer; without a checkpoint in it nothing is written.
        repo_id: the repository.
        facts: what the user says.
        training: the trainer's state.
        token: of the Hub; the stored one when absent.
    """
    path = Path(folder) / CARD_NAME
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    if is_hand_written(card):
        return
    try:
        candidate = find_candidate(folder)
    except (ValueError, FileNotFoundError):
        return  # TRL asks for a card before it saves for the first time
    api = HfApi(token=token)
    repo_id = full_repo_id(repo_id, api)
    remote = look(api, repo_id, "main")
    if is_hand_written(remote.card):
        path.unlink(missing_ok=True)  # which leaves the repository's as it is
        return
    with_code = "remote_code.py" in candidate.files
    facts = facts.completed(candidate, (card, remote.card))
    path.write_text(make_card(candidate, repo_id, facts, with_code=with_code, training=training), encoding="utf-8")


def _add_code(candidate: Candidate, files: dict[str, Path | bytes], code: str) -> list[str]:
    """Add the code and its `auto_map`, or take an `auto_map` away that names what is not there."""
    raw = candidate.raw
    if carries_code(raw["model_type"], code):
        files.update(code_files())
        files[CONFIG_NAME] = _as_json(with_auto_map(raw))
        return []
    for name in code_files():
        files.pop(name, None)
    auto_map = raw.get("auto_map")
    if not auto_map:
        return []
    with tempfile.TemporaryDirectory() as nowhere:
        for name in files:
            if name.endswith(".py"):
                Path(nowhere, name).touch()
        kept = auto_map_beside(nowhere, raw["model_type"], auto_map)
    if kept == auto_map:
        return []
    files[CONFIG_NAME] = _as_json({**raw, "auto_map": kept} if kept else _without(raw, "auto_map"))
    return [f"{CONFIG_NAME} named code that is not published: its auto_map is left out"]


def _name_tokenizer(candidate: Candidate, files: dict[str, Path | bytes]) -> list[str]:
    """The first generation's tokenizer is byte-level, and was released under the name of Llama's, as which it loses
    its spaces. transformers knows that of V2 and V3, and this package of all; others must read it in the file."""
    settings, tokenizer = (candidate.files.get(name) for name in ("tokenizer_config.json", "tokenizer.json"))
    if settings is None or tokenizer is None:
        return []
    content = parse_json(settings)
    if content.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return []
    if candidate.raw["model_type"] not in CARRIED_BY_DEFAULT or "ByteLevel" not in str(_pre_tokenizer(tokenizer)):
        return []
    files[settings.name] = _as_json({**content, "tokenizer_class": "PreTrainedTokenizerFast"})
    return [f"{settings.name} names PreTrainedTokenizerFast instead of {content['tokenizer_class']}: it is byte-level"]


def _pre_tokenizer(tokenizer: Path) -> Any:
    content = parse_json(tokenizer)
    return content.get("pre_tokenizer") if isinstance(content, dict) else None


def _without(content: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}


def _as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _keep_card(files: dict[str, Path | bytes], remote: Remote, local_card: str) -> str:
    """Which of two cards stays, where one is written by hand."""
    if not is_hand_written(remote.card):
        return f"{CARD_NAME} of the folder is written by hand: it goes up as it is"
    files.pop(CARD_NAME, None)
    differs = " The folder's differs." if local_card and local_card != remote.card else ""
    return f"{CARD_NAME} in the repository is written by hand: it stays (--overwrite-card makes a new one).{differs}"


__all__ = ["PushPlan", "UploadError", "plan_push", "push_model", "upload", "write_card"]
