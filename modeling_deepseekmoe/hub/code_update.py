# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Replace the code of a published model by this version's, in one commit that does not touch the weights."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from modeling_deepseekmoe.conversion.checkpoint import CONFIG_NAME, listed

from ..configuration_dialects import CONFIG_CLASSES
from ..remote_code import CODE_MARK, CODE_VERSION, as_json, auto_map_among, code_files
from .plan import PushPlan
from .repository import Remote, client, code_of, explained, full_repo_id, look

# SHA-256 of the files of every released version (`digest_of`), and of those without the classes for other heads, which
# a model that is fine-tuned without the package does not carry on. The present one is added when the next one begins.
RELEASED = {
    "896b55bca88d75dedb715a5cafa136e75d8fb354e66573d7c558b76f0ac0c721": "0.8.0",
    "1b4b902cf952cc346f7767405ea911824bd53724ce7e779d35395e01ff6d6513": "0.8.0",
    "4ebe33620178b91b77e1941ec0c11db07c11ab9823ebdcf5d38704a9e95395ec": "0.9.0",
    "d7a9c679925973f48ff28af12543b3a44a46dfbcb416c9b9afac7a1c56058f07": "0.9.0",
    "9e9518c83f89449705e50a9cde99bdcf8d3411671b356e57e4d149799d5d9455": "0.10.0",
    "7edc4601686a23627a2039674a3b6a2e8f78ee6bd49cf478f061d5d69b58c055": "0.10.0",
    "750c36e87db7ff48c50b0101be96ffd18c2a9f80c3bfea0b02f1f65d066f823e": "0.11.0",
    "0b95e5faf58ab12d4bf07b37faafe78d3a959598d7997d1c8ae67e2067067c25": "0.11.0",
    "171c87841ce981a22e017fe021910436052fdae69ebaa9bdee56714b2348aa37": "0.11.0",
    "4964c19158a5d9698f8da8029377d1ee4c6b04b4b713a560cf1365fb1b0f60a0": "0.11.0",
    "bcc4e085202b895509f3296b4c0eaf977cf03e22f964afb40c9b837da680cf9a": "0.12.0",
    "b12c69132e95b3d6e642303c629763f4ea3386e1781d67a16df5cb923a5ffdb2": "0.12.0",
    "b03349986124ecc1e40c3655b4203563a7a8af6af473f5d08f2e8f4538ea6ea1": "0.13.0",
    "80c8c227313d5c19412ae8e30e6578b7da43d035cf2d2616e27cd60a10e287fe": "0.13.0",
    "9e9933e37f7e5966afd37db684394ba535641c3e443cf3b587a133c7b1ca9e09": "0.14.0",
    "2cb8cbd1ff20ee4fea19751280c0a44fd8a1a0136f763c81b552b9be26dff823": "0.14.0",
    "73ad70f1eecf99c8d49c4dadc9235a5c372a208c40e7e179b8cae9cd999c0a81": "0.15.0",
    "f9fd84f60b30d275e302d6d65a51983d91a63bdefaa448cbb1fcbd1bcfc9be0c": "0.15.0",
    "7721d1b732e81c426a46c888340583cb0a88590fc8ab8b7ab9ea98adb85ac453": "0.16.0",
    "7a9a6093190a1a57661802d7e7f828e3d71ce3af8b4b03d9ebf31cf8af7d5548": "0.16.0",
}
_HEADS = "modeling_classification.py"
_NAMED = re.compile(r'^CODE_VERSION = "([^"]+)"', re.MULTILINE)


def plan_code_update(
    repo_id: str, *, revision: str = "main", replace_content: bool = False, token: str | bool | None = None
) -> PushPlan:
    """Plan the upload that gives a published model this version's code. Nothing is written anywhere.

    Args:
        repo_id: `user/name` of a model that was published with its code.
        revision: branch.
        replace_content: also replace code of no released version: changed, older than 0.8.0, or newer.
        token: token of the Hub. The default is the stored one.

    Returns:
        The [`PushPlan`]. Its notes name the version that is replaced. It has no files if the code is this version's.

    Raises:
        ValueError: if the repository has no code of the family, if its code is of no released version, or if this
            version does not read its config.
        OSError: if the Hub refuses or cannot be reached.
    """
    api = client(token)
    repo_id = full_repo_id(repo_id, api)
    remote = look(api, repo_id, revision)
    raw = remote.configs.get("model", {})
    # Trainer's checkpoints in a folder of their own have the code there, too.
    marks = [name.removesuffix(CODE_MARK) for name in remote.files if f"/{name}".endswith(f"/{CODE_MARK}")]
    folders = [folder for folder in marks if f"{folder}modeling_deepseekmoe.py" in remote.files]
    _check_repository(api, repo_id, revision, remote, folders)
    _config_classes(raw)[0].from_dict(dict(raw)).check_fields()
    files: dict[str, Path | bytes] = {}
    deleted: list[str] = []
    notes = []
    for folder in folders:
        there = code_of(api, repo_id, remote, folder)
        new, old, note = _compare(repo_id, folder, there, replace_content)
        files |= new
        deleted += old
        notes.append(note)
    own = code_files() if "" in folders else {}
    named = raw.get("auto_map") if isinstance(raw.get("auto_map"), dict) else None
    auto_map = auto_map_among({*remote.files, *own}, raw["model_type"], named)
    if own and auto_map != raw.get("auto_map"):
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


def _check_repository(api: HfApi, repo_id: str, revision: str, remote: Remote, folders: list[str]) -> None:
    """Raise ValueError unless there is such a branch, and a folder of it holds the family's code."""
    if not remote.exists:
        raise ValueError(
            f"repo_id={repo_id!r} is not allowed: there is no such repository, or the token may not see it."
        )
    with explained(repo_id):
        branches = {branch.name for branch in api.list_repo_refs(repo_id).branches}
    if not revision.startswith("refs/") and revision not in branches:
        raise ValueError(
            f"revision={revision!r} is not allowed: {repo_id} has the branches {listed(sorted(branches))}."
        )
    raw = remote.configs.get("model", {})
    if not folders or not _config_classes(raw):
        advice = (
            "Only models of type deepseekmoe and deepseek need code; to add it, push the checkpoint (--code always)."
        )
        raise ValueError(
            f"repo_id={repo_id!r} is not allowed: there is no code of this family (model_type of its {CONFIG_NAME}: "
            f"{raw.get('model_type')}). {advice}"
        )


def _compare(
    repo_id: str, folder: str, there: Mapping[str, bytes], replace_content: bool
) -> tuple[dict[str, Path], list[str], str]:
    """Compare the code in a folder with this version's. Return files to write, names to remove, and a note.

    Raises:
        ValueError: if the code is of no released version, unless it may be replaced.
    """
    version, said = version_of(there), version_in(there)
    new = {folder + name: path for name, path in code_files().items() if there.get(name) != path.read_bytes()}
    old = [folder + name for name in there.keys() - code_files().keys()]
    if version is None and not replace_content:
        raise ValueError(
            f"repo_id={repo_id!r} is not allowed: {folder}{CODE_MARK} and the code beside it are of no released "
            f"version up to {CODE_VERSION}{f', though they name {said}' if said else ''}: they are older than "
            "0.8.0, or newer, or somebody has changed them. Replace them all the same (--replace). From "
            f"{CODE_VERSION} differ {listed(sorted([*new, *old]))}."
        )
    what = version or f"no released version{f', which names {said},' if said else ''}"
    where = f" in {folder}" if folder else ""
    if new or old:
        return new, old, f"replaces the code of {what}{where} by that of {CODE_VERSION}"
    return new, old, f"the code{where} is that of {CODE_VERSION} already"


def version_of(files: Mapping[str, bytes]) -> str | None:
    """Find the version of this package, released or present, whose code a repository's code is exactly.

    Args:
        files: contents by name.

    Returns:
        The version, or `None` for other code.
    """
    present = {name: path.read_bytes() for name, path in code_files().items()}
    for own in (present, {name: content for name, content in present.items() if name != _HEADS}):
        if files == own:
            return CODE_VERSION
    return RELEASED.get(digest_of(files))


def version_in(files: Mapping[str, bytes]) -> str | None:
    """Read the version that a repository's code names, even if the code was changed. It is `None` before 0.9.0."""
    named = _NAMED.search(files.get(CODE_MARK, b"").decode("utf-8", errors="replace"))
    return named[1] if named else None


def digest_of(files: Mapping[str, bytes]) -> str:
    """Compute the SHA-256 of files with their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name] + b"\0")
    return digest.hexdigest()


def _config_classes(raw: dict[str, Any]) -> list[Any]:
    return [kind for kind in CONFIG_CLASSES if kind.model_type == raw.get("model_type")]


__all__ = ["RELEASED", "digest_of", "plan_code_update", "version_in", "version_of"]
