# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Read a repository of the Hub, decide whether its content may be replaced, and explain the Hub's errors."""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import HFValidationError, get_session, hf_raise_for_status, validate_repo_id

from modeling_deepseekmoe.conversion.adapters import files as adapter_files
from modeling_deepseekmoe.conversion.checkpoint import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME

from ..esft.files import SELECTION_NAME
from ..esft.files import WEIGHTS_NAME as EXPERTS_NAME
from ..remote_code import CODE_MARK, CODE_VERSION, all_code_names, code_files_from, code_names_in
from ..support.folders import FOREIGN_WEIGHTS
from .candidate import Candidate
from .card import CARD_NAME, is_hand_written

CONFIG_NAMES = {"model": CONFIG_NAME, "adapter": adapter_files.CONFIG_NAME, "experts": SELECTION_NAME}
# Fields in which two versions of the same agree.
_SAME = {
    "model": ("model_type", "architectures", "hidden_size", "num_hidden_layers", "n_routed_experts",
              "moe_intermediate_size", "vocab_size"),
    "adapter": ("peft_type", "base_model_name_or_path"),
    "experts": (),
}  # fmt: skip
_WEIGHTS = {"adapter": (adapter_files.WEIGHTS_NAME,), "experts": (EXPERTS_NAME,)}
# What tells of other content, wherever in a repository it lies.
_OTHER_WEIGHTS = (*FOREIGN_WEIGHTS, ".safetensors", ".ckpt", ".npz", ".pkl", ".tflite", ".keras", ".pb", ".parquet",
                  ".arrow")  # fmt: skip
_OTHER_CONFIGS = (*CONFIG_NAMES.values(), "model_index.json")
# What the client raises when a connection breaks, in every version of it: its own errors are of this class too.
_CONNECTION_ERRORS: Any = (HfHubHTTPError.__mro__[1], RuntimeError, ConnectionError, TimeoutError)


class UploadError(OSError):
    """An upload that did not finish. Push again to go on with it.

    The repository shows what it did before. If only the Hub's answer was lost, it shows the whole upload.
    """


@dataclass(frozen=True)
class Remote:
    """What a branch of a repository holds.

    Attributes:
        exists, private: whether the repository exists, and whether it is private.
        head: the latest commit.
        files: paths.
        card: text of its card.
        configs: content of its configs, by kind.
        shards: weight files that its index names.
    """

    exists: bool = False
    private: bool | None = None
    head: str | None = None
    files: tuple[str, ...] = ()
    card: str = ""
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    shards: tuple[str, ...] = ()


def client(token: str | bool | None) -> HfApi:
    """Make a client of the Hub, with this token or the stored one.

    Raises:
        ValueError: if the token cannot be sent. The message does not show it.
    """
    own = get_token() if token is None or token is True else token
    own = own.strip() if isinstance(own, str) else own
    if isinstance(own, str) and own and not re.fullmatch(r"[!-~]+", own):
        raise ValueError("token is not allowed: it holds spaces or other characters that no token has.")
    return HfApi(token=own or False, library_name="modeling-deepseekmoe", library_version=CODE_VERSION)


def full_repo_id(repo_id: str, api: HfApi | None) -> str:
    """Return a repository's id with its owner. If none is named, the owner is the user.

    Raises:
        ValueError: if the id is not allowed.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is not allowed: it must be user/name. {error}") from error
    if "/" in repo_id or api is None:
        return repo_id
    if not api.token:
        raise PermissionError(f"repo_id={repo_id!r} needs its user, or a token that tells it: hf auth login.")
    with explained(repo_id):
        return f"{api.whoami()['name']}/{repo_id}"


def look(api: HfApi, repo_id: str, revision: str) -> Remote:
    """Read what a branch holds. If there is no such branch yet, read `main`.

    Raises:
        ValueError: if the revision is no branch.
        OSError: if the Hub refuses or cannot be reached.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"revision={revision!r} is not allowed: it must be a branch, not a commit.")
    with explained(repo_id):
        try:
            try:
                info = api.model_info(repo_id, revision=revision)
            except RevisionNotFoundError:
                if revision.startswith("refs/"):
                    raise
                info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            return Remote()
        if revision != "main" and revision in {tag.name for tag in api.list_repo_refs(repo_id).tags}:
            raise ValueError(f"revision={revision!r} is not allowed: it must be a branch, not a tag.")
        names = tuple(file.rfilename for file in info.siblings or ())

        def read(name: str) -> str:
            path = Path(api.hf_hub_download(repo_id, name, revision=info.sha))
            return path.read_text(encoding="utf-8", errors="replace")

        configs = {kind: _parse(read(name)) for kind, name in CONFIG_NAMES.items() if name in names}
        index = _parse(read(INDEX_NAME)).get("weight_map") if INDEX_NAME in names else None
        return Remote(
            exists=True,
            private=bool(info.private),
            head=info.sha,
            files=names,
            card=read(CARD_NAME) if CARD_NAME in names else "",
            configs=configs,
            shards=tuple(sorted(map(str, index.values()))) if isinstance(index, dict) else (),
        )


def _parse(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def code_of(api: HfApi, repo_id: str, remote: Remote, folder: str = "") -> dict[str, bytes]:
    """Read the family's code in a folder of a repository, of any version. Return contents by name."""
    with TemporaryDirectory() as copy:
        _copy_scripts(api, repo_id, remote, folder, Path(copy))
        try:
            names = set(code_files_from(Path(copy)))
        except FileNotFoundError:  # somebody has taken a file away
            names = code_names_in(copy)
        return {name: Path(copy, name).read_bytes() for name in sorted(names)}


def stale_code_of(api: HfApi, repo_id: str, remote: Remote, others: Collection[str]) -> list[str]:
    """Find the names of the family's code at the top of a repository, of any released version.

    The files are downloaded only if one may be found that is not among `others`.
    """
    if CODE_MARK not in remote.files or not all_code_names() & set(remote.files) - set(others):
        return []
    with TemporaryDirectory() as copy:
        _copy_scripts(api, repo_id, remote, "", Path(copy))
        return sorted(code_names_in(copy))


def _copy_scripts(api: HfApi, repo_id: str, remote: Remote, folder: str, copy: Path) -> None:
    scripts = [name for name in remote.files if re.fullmatch(rf"{re.escape(folder)}\w+\.py", name)]
    with explained(repo_id):
        for name in scripts:
            path = Path(api.hf_hub_download(repo_id, name, revision=remote.head))
            (copy / path.name).write_bytes(path.read_bytes())


def check_content(
    candidate: Candidate, remote: Remote, repo_id: str, replace_content: bool = False, overwrite_card: bool = False
) -> list[str]:
    """Find the files that a repository is to lose. Refuse content that is no earlier version of the same.

    Returns:
        The paths that it is to lose, unless they are written again: weights of the earlier version, or, with
        `replace_content`, everything.

    Raises:
        ValueError: if it holds something else. The message says what.
    """
    if replace_content:
        if is_hand_written(remote.card) and not overwrite_card:
            raise ValueError(
                f"repo_id={repo_id!r} is not allowed: somebody wrote the card of what is to be replaced. Replace it "
                "too (--overwrite-card)."
            )
        return [name for name in remote.files if name != ".gitattributes"]
    own, found, raw = CONFIG_NAMES[candidate.kind], remote.configs.get(candidate.kind), candidate.raw
    if found is not None:
        odd = [name for name in _SAME[candidate.kind] if found.get(name) != raw.get(name)]
        if not odd:
            stale = {*_WEIGHTS.get(candidate.kind, (WEIGHTS_NAME, INDEX_NAME, *remote.shards))}
            return [name for name in remote.files if name in stale]
        problem = f"its {own} has {odd[0]}={found.get(odd[0])!r}, and this one {raw.get(odd[0])!r}"
    else:
        other = [name for name in remote.files if name.rpartition("/")[2] in _OTHER_CONFIGS]
        other += [name for name in remote.files if name.endswith(_OTHER_WEIGHTS)]
        if not other:
            return []
        problem = f"it holds {other[0]}, and no {own}"
    raise ValueError(
        f"repo_id={repo_id!r} is not allowed: the repository has other content ({problem}). Take another one, or "
        "replace what it holds (--replace)."
    )


def check_metadata(api: HfApi, card: str) -> None:
    """Let the Hub check the metadata of a card, as it will when the card is committed.

    Raises:
        ValueError: if the Hub does not allow them. The message repeats the Hub's.
    """
    with explained(CARD_NAME):
        content = {"content": card, "repoType": "model"}
        address = f"{api.endpoint}/api/validate-yaml"
        response = get_session().post(address, json=content, headers={"Accept": "text/plain"})
        if response.status_code == 400:
            raise ValueError(f"{CARD_NAME}: the Hub does not allow its metadata: {response.text}")
        hf_raise_for_status(response)


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turn errors of the client into errors of this package, which say what happened and what to do."""
    try:
        yield
    except (OfflineModeIsEnabled, EntryNotFoundError):
        raise
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no such branch: {error.server_message or error}") from error
    except HfHubHTTPError as error:
        raise _explain(repo_id, error) from error
    except json.JSONDecodeError as error:
        raise UploadError(_interrupted(repo_id, "the Hub's answer cannot be read")) from error
    except _CONNECTION_ERRORS as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _explain(repo_id, error.__cause__) from error
        cause = error.__cause__ or error
        raise UploadError(_interrupted(repo_id, f"{type(cause).__name__}: {cause}")) from error


def _explain(repo_id: str, error: HfHubHTTPError) -> OSError:
    status, said = error.response.status_code, error.server_message or "nothing more"
    if status in (401, 403, 404):
        return PermissionError(
            f"The Hub refuses access to {repo_id} ({status}). Log in with a token that may write there: hf auth "
            f"login. It says: {said}"
        )
    if status in (409, 412):
        return UploadError(_interrupted(repo_id, "somebody has changed the branch meanwhile"))
    if status in (408, 429) or status >= 500:
        return UploadError(_interrupted(repo_id, f"the Hub answered {status}"))
    return OSError(f"The Hub refuses what was asked of {repo_id} ({status}). It says: {said}")


def _interrupted(repo_id: str, reason: str) -> str:
    return (
        f"The exchange with the Hub about {repo_id} was interrupted: {reason}. The repository never shows a part of "
        "an upload. Try again: what has arrived is not sent twice."
    )


__all__ = [
    "CONFIG_NAMES",
    "Remote",
    "UploadError",
    "check_content",
    "check_metadata",
    "client",
    "code_of",
    "explained",
    "full_repo_id",
    "look",
    "stale_code_of",
]
