# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The code of a published model alone: replaced by this version's in one commit, which leaves the weights alone."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from modeling_deepseekmoe.conversion.checkpoint import CONFIG_NAME

from .push_plan import PushPlan
from .registration import CONFIG_CLASSES
from .remote_code import CODE_MARK, CODE_VERSION, as_json, auto_map_among, code_files, code_files_from
from .repository import Remote, client, explained, full_repo_id, look

# SHA-256 of all files of a version that does not name itself in them.
_UNNAMED = {"896b55bca88d75dedb715a5cafa136e75d8fb354e66573d7c558b76f0ac0c721": "0.8.0"}
_NAMED = re.compile(r'^CODE_VERSION = "([^"]+)"', re.MULTILINE)


def plan_code_update(
    repo_id: str, *, revision: str = "main", replace_content: bool = False, token: str | bool | None = None
) -> PushPlan:
    """Say what would be uploaded so that a published model has this version's code. Nothing is written anywhere.

    Args:
        repo_id: `user/name` of a model that was published with its code.
        revision: branch.
        replace_content: replace code too of which it cannot be told what it is.
        token: of the Hub; the stored one when absent.

    Returns:
        The [`PushPlan`], whose notes name the version that is replaced; it has no files if the code is this version's.

    Raises:
        ValueError: for a repository without the family's code, with code that somebody may have changed, or with a
            config that this version does not read.
        OSError: if the Hub refuses or cannot be reached.
    """
    api = client(token)
    repo_id = full_repo_id(repo_id, api)
    remote = look(api, repo_id, revision)
    raw = remote.configs.get("model", {})
    # Trainer's checkpoints in a folder of their own have the code there, too.
    folders = [name.removesuffix(CODE_MARK) for name in remote.files if f"/{name}".endswith(f"/{CODE_MARK}")]
    if not folders or not _config_classes(raw):
        found = f"its {CONFIG_NAME} has model_type={raw.get('model_type')!r}" if remote.exists else "it does not exist"
        raise ValueError(
            f"repo_id={repo_id!r} is not allowed: the repository holds no code of this family ({found}, and "
            f"{CODE_MARK} is {'' if folders else 'not '}there). Push the checkpoint itself."
        )
    _config_classes(raw)[0].from_dict(dict(raw)).check_fields()
    files: dict[str, Path | bytes] = {}
    deleted: list[str] = []
    notes = []
    for folder in folders:
        there = _code_of(api, repo_id, remote, folder)
        version = version_of(there)
        if version is None and not replace_content:
            raise ValueError(
                f"repo_id={repo_id!r} is not allowed: {folder}{CODE_MARK} and the code beside it are of a version "
                "before 0.8.0, or somebody has changed them. Replace them all the same (--replace)."
            )
        new = {folder + name: path for name, path in code_files().items() if there.get(name) != path.read_bytes()}
        old = [folder + name for name in there.keys() - code_files().keys()]
        files |= new
        deleted += old
        where = f" in {folder}" if folder else ""
        notes.append(
            f"replaces the code of {version or 'a version that it does not name'}{where} by that of {CODE_VERSION}"
            if new or old
            else f"the code{where} is that of {CODE_VERSION} already"
        )
    auto_map = auto_map_among({*remote.files, *code_files()}, raw["model_type"], raw.get("auto_map"))
    if auto_map != raw.get("auto_map"):
        files[CONFIG_NAME] = as_json({**raw, "auto_map": auto_map})
        notes.append(f"{CONFIG_NAME} names the code")
    return PushPlan(
        repo_id=repo_id,
        revision=revision,
        kind=f"code of modeling-deepseekmoe {CODE_VERSION}",
        exists=True,
        private=None,
        files=files,
        deleted=tuple(sorted(deleted)),
        left_out={},
        checks=(f"this version reads its {CONFIG_NAME}",),
        notes=(*notes, "the weights stay as they are"),
        parent=remote.head,
        states={},
        is_complete=True,
    )


def version_of(files: Mapping[str, bytes]) -> str | None:
    """The version of this package that the code of a repository is of, if it can be told.

    Args:
        files: contents by name.
    """
    named = _NAMED.search(files.get(CODE_MARK, b"").decode("utf-8", errors="replace"))
    if named:
        return named[1]
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name] + b"\0")
    return _UNNAMED.get(digest.hexdigest())


def _config_classes(raw: dict[str, Any]) -> list[Any]:
    return [kind for kind in CONFIG_CLASSES if kind.model_type == raw.get("model_type")]


def _code_of(api: HfApi, repo_id: str, remote: Remote, folder: str) -> dict[str, bytes]:
    """The files of the family's code in a folder of a repository: those that its entry points import, one from the
    other."""
    scripts = [name for name in remote.files if re.fullmatch(rf"{re.escape(folder)}\w+\.py", name)]
    with explained(repo_id), TemporaryDirectory() as copy:
        for name in scripts:
            path = Path(api.hf_hub_download(repo_id, name, revision=remote.head))
            Path(copy, path.name).write_bytes(path.read_bytes())
        for name in ("modeling_deepseekmoe.py", "configuration_deepseekmoe.py"):
            if folder + name not in scripts:
                raise ValueError(f"repo_id={repo_id!r} is not allowed: {folder}{name} is missing there.")
        return {name: path.read_bytes() for name, path in code_files_from(Path(copy)).items()}


__all__ = ["plan_code_update", "version_of"]
