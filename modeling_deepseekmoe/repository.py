# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""A repository of the Hub: what it holds already, whether that may be replaced, and what its errors mean."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id

from modeling_deepseekmoe.conversion import adapter_files
from modeling_deepseekmoe.conversion.checkpoint import CONFIG_NAME

from .folders import FOREIGN_WEIGHTS
from .model_card import CARD_NAME
from .preflight import Candidate
from .remote_code import code_files
from .selected_experts import SELECTION_NAME

CONFIG_NAMES = {"model": CONFIG_NAME, "adapter": adapter_files.CONFIG_NAME, "experts": SELECTION_NAME}
# Fields in which two versions of the same agree.
_SAME = {
    "model": ("model_type", "architectures", "hidden_size", "num_hidden_layers", "n_routed_experts",
              "moe_intermediate_size", "vocab_size"),
    "adapter": ("peft_type", "base_model_name_or_path"),
    "experts": (),
}  # fmt: skip
# What the client raises when a connection breaks, in every version of it: its own errors are of this class too.
_CONNECTION_ERRORS: Any = (HfHubHTTPError.__mro__[1], RuntimeError)


class UploadError(OSError):
    """An upload did not come to its end. The repository shows what it did before, or, where only the Hub's answer was
    lost, all of it; the same call goes on."""


@dataclass(frozen=True)
class Remote:
    """What a branch of a repository holds."""

    exists: bool = False
    private: bool | None = None
    head: str | None = None
    files: tuple[str, ...] = ()
    card: str = ""
    config: dict[str, Any] | None = None


def full_repo_id(repo_id: str, api: HfApi | None) -> str:
    """A repository's id with its owner, who is the user where none is named.

    Raises:
        ValueError: for an id that is not allowed.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is not allowed: it must be user/name. {error}") from error
    return repo_id if "/" in repo_id or api is None else f"{api.whoami()['name']}/{repo_id}"


def look(api: HfApi, repo_id: str, revision: str) -> Remote:
    """What a branch holds, or `main` where there is no such branch yet."""
    try:
        try:
            info = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return Remote()
    names = tuple(file.rfilename for file in info.siblings or ())

    def read(name: str) -> str:
        if name not in names:
            return ""
        return Path(api.hf_hub_download(repo_id, name, revision=info.sha)).read_text(encoding="utf-8")

    config = next((name for name in CONFIG_NAMES.values() if name in names), None)
    return Remote(
        exists=True,
        private=bool(info.private),
        head=info.sha,
        files=names,
        card=read(CARD_NAME),
        config=_parse(read(config)) if config else None,
    )


def _parse(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def check_content(candidate: Candidate, remote: Remote, repo_id: str, replace_content: bool) -> list[str]:
    """That a repository holds nothing else than an earlier version of the same.

    Returns:
        The paths that it is to lose, unless they are written again: weights and code of the earlier version, or, with
        `replace_content`, everything but its card.

    Raises:
        ValueError: if it holds something else; the message says what.
    """
    if replace_content:
        return [name for name in remote.files if name not in (".gitattributes", CARD_NAME)]
    own = CONFIG_NAMES[candidate.kind]
    weights = [name for name in remote.files if name.endswith((*FOREIGN_WEIGHTS, ".safetensors")) and "/" not in name]
    if own in remote.files:
        found, raw = remote.config or {}, candidate.raw
        odd = [name for name in _SAME[candidate.kind] if found.get(name) != raw.get(name)]
        if not odd:
            stale = (".safetensors", ".index.json", *code_files())
            return [name for name in remote.files if "/" not in name and name.endswith(stale)]
        problem = f"its {own} has {odd[0]}={found.get(odd[0])!r}, and this one {raw.get(odd[0])!r}"
    elif remote.config is not None or weights:
        there = next((name for name in CONFIG_NAMES.values() if name in remote.files), None)
        problem = f"it holds {there or weights[0]}, and no {own}"
    else:
        return []
    raise ValueError(
        f"repo_id={repo_id!r} is not allowed: the repository has other content ({problem}). Take another one, or "
        "replace what it holds (--replace)."
    )


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Errors of the client during an upload as those of this package: what happened, and what to do."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise PermissionError(
                f"The Hub refuses to write to {repo_id} ({status}). Log in with a token that may write there: hf "
                f"auth login. It says: {error.server_message or 'nothing more'}"
            ) from error
        reason = "somebody has changed the branch meanwhile" if status in (409, 412) else f"the Hub answered {status}"
        raise UploadError(_interrupted(repo_id, reason)) from error
    except json.JSONDecodeError as error:
        raise UploadError(_interrupted(repo_id, "the Hub's answer cannot be read")) from error
    except _CONNECTION_ERRORS as error:
        cause = error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            raise UploadError(_interrupted(repo_id, f"the Hub answered {cause.response.status_code}")) from error
        raise UploadError(_interrupted(repo_id, f"{type(cause).__name__}: {cause}")) from error


def _interrupted(repo_id: str, reason: str) -> str:
    return (
        f"The upload to {repo_id} was interrupted: {reason}. The repository never shows a part of it; the same call "
        "goes on where it stopped."
    )


__all__ = ["CONFIG_NAMES", "Remote", "UploadError", "check_content", "explained", "full_repo_id", "look"]
