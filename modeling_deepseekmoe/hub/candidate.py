# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Find out what a folder holds that may be published, and which of its files go up."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from modeling_deepseekmoe.conversion import checkpoint, description
from modeling_deepseekmoe.conversion.adapters import files as adapter_files
from modeling_deepseekmoe.conversion.checkpoint import CONFIG_NAME, INDEX_NAME, check_inside, parse_json

from ..esft.files import SELECTION_NAME
from ..esft.files import WEIGHTS_NAME as EXPERTS_NAME
from ..esft.selection import ExpertSelection
from ..remote_code import auto_classes_of
from ..support.folders import FOREIGN_WEIGHTS

_ADAPTER_NAMES = (adapter_files.CONFIG_NAME, adapter_files.WEIGHTS_NAME)
_EXPERTS_NAMES = (SELECTION_NAME, EXPERTS_NAME)
TRAINING_STATE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*.pth",
                  "random_states_*.pkl", "custom_checkpoint_*.pkl", "training_args.bin", "trainer_state.json",
                  "zero_to_fp32.py", "latest")  # fmt: skip
_NO_PART = ("*.ckpt", "*.pkl", "*.npz", "*.npy", "*.log", "*.unfinished", "*.tmp", "*~", "events.out.tfevents*")


# Files that may hold a secret, whatever is in them; hidden ones (.env, .netrc, .git-credentials) are left out anyway.
_SECRET_NAMES = ("*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*",
                 "id_ed25519*", "*credential*", "*secret*", "*password*", "token", "token.*", "*_token", "*_token.*",
                 "stored_tokens*")  # fmt: skip


class PreflightError(RuntimeError):
    """A folder is a checkpoint, but must not be published as it is. The message says why."""


@dataclass(frozen=True)
class Candidate:
    """A folder that may be published.

    Attributes:
        folder: the folder.
        kind: `"model"`, `"adapter"` (LoRA, in PEFT's files) or `"experts"` (trained experts of ESFT).
        raw: the content of its config file: `config.json`, `adapter_config.json` or the selection.
        files: what goes up, by its path in the repository.
        left_out: what does not go up, with the reason.
    """

    folder: Path
    kind: str
    raw: dict[str, Any]
    files: dict[str, Path]
    left_out: dict[str, str]


def find_kind(folder: str | Path) -> str:
    """Find out what a folder holds: `"model"`, `"adapter"` or `"experts"`.

    Raises:
        ValueError: if it is none of them, or more than one.
        OSError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder.")
    for kind, names in (("adapter", _ADAPTER_NAMES), ("experts", _EXPERTS_NAMES)):
        if all((folder / name).is_file() for name in names):
            for weights in (checkpoint.WEIGHTS_NAME, INDEX_NAME):
                if (folder / weights).is_file():
                    raise ValueError(
                        f"{folder} holds {names[0]} and {weights}: publish each from a folder of its own."
                    )
            return kind
    if (folder / CONFIG_NAME).is_file():
        return "model"
    raise ValueError(
        f"{folder} is no checkpoint: it must hold {CONFIG_NAME} and safetensors files, or "
        f"{' and '.join(_ADAPTER_NAMES)} of an adapter, or {' and '.join(_EXPERTS_NAMES)} of trained experts."
    )


def find_candidate(folder: str | Path, with_training_state: bool = False) -> Candidate:
    """Find out what a folder holds, and which of its files would go up. No weight is read.

    Args:
        folder: the folder.
        with_training_state: let optimizer, scheduler and the like go up too.

    Raises:
        ValueError: if it is no checkpoint of the family, or if a file is a link to another place.
        OSError: if a file is missing.
    """
    folder = Path(folder)
    kind = find_kind(folder)
    if kind == "model":
        raw = description.read_config(folder)
        description.as_config(raw, folder)
        weights = [file.name for file in checkpoint.weight_files(folder)]
        weights += [INDEX_NAME] if (folder / INDEX_NAME).is_file() else []
    else:
        names = _ADAPTER_NAMES if kind == "adapter" else _EXPERTS_NAMES
        raw, weights = parse_object(folder / names[0]), [names[1]]
        if kind == "experts":
            ExpertSelection.of(folder / names[0])
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name in checkpoint.TEMPLATE_FOLDERS:
            files |= {f"{path.name}/{file.name}": file for file in sorted(path.glob("*.jinja")) if file.is_file()}
            continue
        reason = None if path.name in weights else _reason_to_leave_out(path, with_training_state)
        if reason:
            left_out[f"{path.name}/" if path.is_dir() else path.name] = reason
        else:
            files[path.name] = path
    for file in files.values():
        check_inside(file, folder)
        target = file.resolve()
        if target.is_relative_to(folder.resolve()) and target != file.parent.resolve() / file.name:
            raise ValueError(f"{file.name} is a link to {target.name}, which is not allowed: publish the file itself.")
    return Candidate(folder, kind, raw, files, left_out)


def parse_object(file: Path) -> dict[str, Any]:
    content = parse_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not allowed: it must be a JSON object.")
    return content


def _reason_to_leave_out(path: Path, with_training_state: bool) -> str | None:
    name = path.name
    if name.startswith((".", "_")):
        return "hidden"
    if path.is_dir():
        return "a folder"
    if not path.is_file():
        return "no file"
    if _matches(name, _SECRET_NAMES):
        return "may hold a secret"
    if _matches(name, TRAINING_STATE):
        return None if with_training_state else "state of the training"
    if name.endswith((*FOREIGN_WEIGHTS, ".safetensors", ".index.json")) or _matches(name, _NO_PART):
        return "no part of this checkpoint"
    return None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern) for pattern in patterns)


def auto_class_of(raw: Mapping[str, Any]) -> tuple[str, str]:
    """Return the Auto class that loads a model with this `config.json`, and the name of the model's own class.

    Raises:
        ValueError: if the model type does not have the architecture.
    """
    classes = auto_classes_of(raw["model_type"])
    language_model = next(own for own, name in classes.items() if name == "AutoModelForCausalLM")
    architecture = (raw.get("architectures") or [language_model])[0]
    if architecture in classes:
        return classes[architecture], architecture
    raise ValueError(
        f"{CONFIG_NAME}: architectures={[architecture]} is not allowed for model_type={raw['model_type']!r}."
    )


def check_hub_id(field_name: str, value: str) -> None:
    """Raise ValueError if a value is no id of a repository. A path of this machine is none: nobody else could load it.

    Raises:
        ValueError: the message names the field, the value and what is allowed.
    """
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise ValueError(
            f"{field_name}={value!r} is not allowed: it must be the id of a repository ({error})."
        ) from error
    if value.startswith((".", "/", "~")) or not value:
        raise ValueError(f"{field_name}={value!r} is not allowed: it must be the id of a repository.")


def is_hub_id(value: str) -> bool:
    """Tell whether a value is the id of a repository. It is not if a folder here has that name."""
    try:
        if Path(value).exists():
            return False
        check_hub_id("", value)
    except ValueError:
        return False
    return True


__all__ = [
    "TRAINING_STATE",
    "Candidate",
    "PreflightError",
    "auto_class_of",
    "check_hub_id",
    "find_candidate",
    "find_kind",
    "is_hub_id",
]
