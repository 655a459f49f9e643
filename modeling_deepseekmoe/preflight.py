# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What is checked before a folder is published: what it is, what of it goes up, and whether that is in order."""

import fnmatch
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import logging

import modeling_deepseekmoe
from modeling_deepseekmoe.conversion import VerificationError, adapter_files, checkpoint, description, verify
from modeling_deepseekmoe.conversion.checkpoint import CONFIG_NAME, INDEX_NAME, check_inside, listed, parse_json

from . import selected_experts
from .folders import FOREIGN_WEIGHTS

_ADAPTER_NAMES = (adapter_files.CONFIG_NAME, adapter_files.WEIGHTS_NAME)
_EXPERTS_NAMES = (selected_experts.SELECTION_NAME, selected_experts.WEIGHTS_NAME)
TRAINING_STATE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*.pth",
                  "random_states_*.pkl", "training_args.bin", "trainer_state.json", "zero_to_fp32.py",
                  "latest")  # fmt: skip
# Files that may hold a secret, whatever is in them; hidden ones (.env, .netrc, .git-credentials) are left out anyway.
_SECRET_NAMES = ("*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*",
                 "id_ed25519*", "*credential*", "*secret*", "*password*", "token", "token.*", "*_token", "*_token.*",
                 "stored_tokens*")  # fmt: skip
_SECRETS = {
    "a Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": rb"\bsk-[A-Za-z0-9_-]{30,}",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,})",
    "a GitLab token": rb"\bglpat-[A-Za-z0-9_-]{20,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": rb"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": rb"\bxox[baprs]-[0-9A-Za-z-]{20,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_BLOCK = 2**22
_OVERLAP = 256  # of the blocks in which a file is searched, longer than any secret's recognisable part
_FOLDERS = ("additional_chat_templates",)


class PreflightError(RuntimeError):
    """A folder is a checkpoint, but not one to publish as it is; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """A folder that may be published.

    Attributes:
        folder: the folder.
        kind: `"model"`, `"adapter"` (LoRA, in PEFT's files) or `"experts"` (trained experts of ESFT).
        raw: its config as its file has it: `config.json`, `adapter_config.json` or the selection.
        files: what goes up, by its path in the repository.
        left_out: what does not, with the reason.
        checks: what was checked, a line each.
    """

    folder: Path
    kind: str
    raw: dict[str, Any]
    files: dict[str, Path]
    left_out: dict[str, str]
    checks: tuple[str, ...] = field(default=())


def find_kind(folder: str | Path) -> str:
    """What a folder holds: `"model"`, `"adapter"` or `"experts"`.

    Raises:
        ValueError: if it is none of them.
        OSError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder.")
    for kind, names in (("adapter", _ADAPTER_NAMES), ("experts", _EXPERTS_NAMES)):
        if all((folder / name).is_file() for name in names):
            return kind
    if (folder / CONFIG_NAME).is_file():
        return "model"
    raise ValueError(
        f"{folder} is no checkpoint: it must hold {CONFIG_NAME} and safetensors files, or "
        f"{' and '.join(_ADAPTER_NAMES)} of an adapter, or {' and '.join(_EXPERTS_NAMES)} of trained experts."
    )


def find_candidate(folder: str | Path, with_training_state: bool = False) -> Candidate:
    """What a folder holds, and which of its files would go up. No weight is read.

    Args:
        folder: the folder.
        with_training_state: let optimizer, scheduler and the like go up too.

    Raises:
        ValueError: if it is no checkpoint of the family, and for a link to another place.
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
        raw, weights = parse_json(folder / names[0]), [names[1]]
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        reason = _reason_to_leave_out(path, weights, with_training_state)
        if reason:
            left_out[f"{path.name}/" if path.is_dir() else path.name] = reason
        else:
            found = sorted(path.iterdir()) if path.is_dir() else [path]
            files |= {file.relative_to(folder).as_posix(): file for file in found if file.is_file()}
    for file in files.values():
        check_inside(file, folder)
    return Candidate(folder, kind, raw, files, left_out)


def _reason_to_leave_out(path: Path, weights: list[str], with_training_state: bool) -> str | None:
    name = path.name
    training_state = _matches(name, TRAINING_STATE)
    if name.startswith((".", "_")):
        return "hidden"
    if path.is_dir():
        return None if name in _FOLDERS else "a folder"
    if not path.is_file():
        return "no file"
    if _matches(name, _SECRET_NAMES):
        return "may hold a secret"
    if training_state:
        return None if with_training_state else "state of the training"
    if name.endswith((*FOREIGN_WEIGHTS, ".safetensors", ".index.json")) and name not in weights:
        return "weights that are not this checkpoint's"
    if name.endswith((".unfinished", ".tmp", "~")):
        return "unfinished"
    return None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern) for pattern in patterns)


def check_secrets(files: dict[str, Path]) -> None:
    """Look for tokens and keys in everything but the weights.

    Raises:
        PreflightError: naming the files and what they seem to hold, and never the secret.
    """
    own = get_token()
    patterns = {what: re.compile(pattern) for what, pattern in _SECRETS.items()}
    if own:
        patterns = {"your own token": re.compile(re.escape(own.encode())), **patterns}
    found = []
    for name, file in files.items():
        if name.endswith(".safetensors"):
            continue
        held = {what for block in _blocks(file) for what, pattern in patterns.items() if pattern.search(block)}
        found += [f"{name} holds what looks like {what}" for what in patterns if what in held]
    if found:
        raise PreflightError("; ".join(found) + ". Nothing was uploaded.")


def _blocks(file: Path) -> Iterator[bytes]:
    tail = b""
    with file.open("rb") as handle:
        while block := handle.read(_BLOCK):
            yield tail + block
            tail = block[-_OVERLAP:]


def check_candidate(candidate: Candidate, progress: Callable[[int], None] = lambda size: None) -> tuple[str, ...]:
    """Read everything that would go up: it loads, its names and shapes are right, every value is finite, and no file
    holds a secret.

    Args:
        candidate: from [`find_candidate`].
        progress: receives numbers of bytes of weights that were read.

    Returns:
        What was found in order, a line each.

    Raises:
        PreflightError: for what is not in order.
        ValueError: for files that cannot be read.
    """
    check_secrets(candidate.files)
    checks = ["no file holds what looks like a token or a key"]
    if candidate.kind == "model":
        try:
            report = verify(candidate.folder, progress=progress)
        except VerificationError as error:
            raise PreflightError(str(error)) from error
        checks += [str(report).splitlines()[0], *(f"note: {note}" for note in report.notes)]
        checks += [*_load_small_files(candidate), _load_model(candidate)]
    elif candidate.kind == "adapter":
        adapter = adapter_files.read_adapter(candidate.folder)
        factors = {f"lora_A of {name}": update.factor_a for name, update in adapter.updates.items()}
        factors |= {f"lora_B of {name}": update.factor_b for name, update in adapter.updates.items()}
        checks.append(_check_finite({**factors, **adapter.replacements}, "tensors of the adapter"))
        checks += _load_small_files(candidate)
    else:
        checks.append(_check_finite(selected_experts.read_esft(candidate.folder), "trained tensors"))
    return tuple(checks)


def _check_finite(tensors: dict[str, torch.Tensor], what: str) -> str:
    odd = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if odd:
        raise PreflightError(f"{listed(odd)}: values that are not finite.")
    return f"{len(tensors):,} {what}: names, shapes and values are in order"


def _load_model(candidate: Candidate) -> str:
    """Load the model as a user would, onto the meta device: no tensor stays in memory."""
    raw = candidate.raw
    if raw.get("quantization_config"):
        return "note: loading was not tried, because the weights are quantised; names, shapes and values are in order"
    name = (
        raw.get("architectures") or [f"{type(description.as_config(raw)).__name__.removesuffix('Config')}ForCausalLM"]
    )[0]
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        _, info = getattr(modeling_deepseekmoe, name).from_pretrained(
            candidate.folder, device_map="meta", output_loading_info=True
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    problems = {kind: listed(sorted(map(str, keys))) for kind, keys in info.items() if keys}
    if problems:
        raise PreflightError("; ".join(f"loading found {kind}: {keys}" for kind, keys in problems.items()) + ".")
    return f"loads as {name}"


def _load_small_files(candidate: Candidate) -> list[str]:
    """Tokenizer and generation config, where there are any."""
    checks = []
    if "generation_config.json" in candidate.files:
        try:
            GenerationConfig.from_pretrained(candidate.folder).validate(strict=True)
        except (ValueError, OSError) as error:
            raise PreflightError(f"generation_config.json is not allowed: {error}") from error
        checks.append("generation config: in order")
    if "tokenizer_config.json" not in candidate.files:
        return [*checks, "note: there is no tokenizer"] if candidate.kind == "model" else checks
    if "auto_map" in parse_json(candidate.files["tokenizer_config.json"]):
        return [*checks, "note: the tokenizer has code of its own, which was not run"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(candidate.folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise PreflightError(f"The tokenizer cannot be loaded: {error}") from error
    size = candidate.raw.get("vocab_size")
    if candidate.kind == "model" and isinstance(size, int) and len(tokenizer) > size:
        raise PreflightError(f"The tokenizer has {len(tokenizer):,} tokens, and the model vocab_size={size:,}.")
    return [*checks, f"tokenizer: {len(tokenizer):,} tokens"]


def check_hub_id(field_name: str, value: str) -> None:
    """That something is the id of a repository, and no path of this machine, which nobody else could load.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise ValueError(
            f"{field_name}={value!r} is not allowed: it must be the id of a repository ({error})."
        ) from error
    if Path(value).exists() or value.startswith((".", "/", "~")):
        raise ValueError(
            f"{field_name}={value!r} is not allowed: it is a path of this machine, not a repository's id."
        )


def is_hub_id(value: str) -> bool:
    """Whether [`check_hub_id`] would let a value pass."""
    try:
        check_hub_id("", value)
    except ValueError:
        return False
    return True


__all__ = [
    "TRAINING_STATE",
    "Candidate",
    "PreflightError",
    "check_candidate",
    "check_hub_id",
    "check_secrets",
    "find_candidate",
    "find_kind",
    "is_hub_id",
]
