# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What is checked before a folder is published: what it is, what of it goes up, and whether that is in order."""

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from .esft import ExpertSelection
from .folders import FOREIGN_WEIGHTS
from .remote_code import auto_classes_of

_ADAPTER_NAMES = (adapter_files.CONFIG_NAME, adapter_files.WEIGHTS_NAME)
_EXPERTS_NAMES = (selected_experts.SELECTION_NAME, selected_experts.WEIGHTS_NAME)
TRAINING_STATE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*.pth",
                  "random_states_*.pkl", "custom_checkpoint_*.pkl", "training_args.bin", "trainer_state.json",
                  "zero_to_fp32.py", "latest")  # fmt: skip
_NO_PART = ("*.ckpt", "*.pkl", "*.npz", "*.npy", "*.log", "*.unfinished", "*.tmp", "*~", "events.out.tfevents*")
# Files that may hold a secret, whatever is in them; hidden ones (.env, .netrc, .git-credentials) are left out anyway.
_SECRET_NAMES = ("*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*",
                 "id_ed25519*", "*credential*", "*secret*", "*password*", "token", "token.*", "*_token", "*_token.*",
                 "stored_tokens*")  # fmt: skip
_SECRETS = {
    "a Hugging Face token": rb"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": rb"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{30,}",
    "a GitHub token": rb"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,})",
    "a GitLab token": rb"(?<![A-Za-z0-9])glpat-[A-Za-z0-9_-]{20,}",
    "an AWS key": rb"(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": rb"(?<![A-Za-z0-9])AIza[0-9A-Za-z_-]{35}",
    "a Slack token": rb"(?<![A-Za-z0-9])xox[baprs]-[0-9A-Za-z-]{20,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_BLOCK = 2**22
_OVERLAP = 256  # of the blocks in which a file is searched, longer than any secret's recognisable part


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
    """

    folder: Path
    kind: str
    raw: dict[str, Any]
    files: dict[str, Path]
    left_out: dict[str, str]


def find_kind(folder: str | Path) -> str:
    """What a folder holds: `"model"`, `"adapter"` or `"experts"`.

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
        raw, weights = _parse_object(folder / names[0]), [names[1]]
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


def _parse_object(file: Path) -> dict[str, Any]:
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


def check_secrets(files: Mapping[str, Path | bytes], token: str | None = None) -> None:
    """Look for tokens and keys in everything but the values of the weights.

    Args:
        files: contents by their names.
        token: of the user; the stored one when absent.

    Raises:
        PreflightError: naming the files and what they seem to hold, and never the secret.
    """
    patterns = {what: re.compile(pattern) for what, pattern in _SECRETS.items()}
    own = token or get_token()
    if own:
        patterns = {"your own token": re.compile(re.escape(own.encode())), **patterns}
    found = []
    for name, content in files.items():
        blocks = [content] if isinstance(content, bytes) else _blocks(content)
        held = {what for block in blocks for what, pattern in patterns.items() if pattern.search(block)}
        found += [f"{name} holds what looks like {what}" for what in patterns if what in held]
    if found:
        raise PreflightError("; ".join(found) + ". Nothing was uploaded.")


def _blocks(file: Path) -> Iterator[bytes]:
    """A file in overlapping pieces; of weights the header alone."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        if file.name.endswith(".safetensors"):
            size = min(size, 8 + int.from_bytes(handle.read(8), "little"))
            handle.seek(0)
        tail = b""
        while block := handle.read(min(_BLOCK, size)):
            yield tail + block
            tail, size = block[-_OVERLAP:], size - len(block)


def check_candidate(candidate: Candidate, progress: Callable[[int], None] = lambda size: None) -> tuple[str, ...]:
    """Read everything that would go up: it loads, its names and shapes are right, every value is finite.

    Args:
        candidate: from [`find_candidate`].
        progress: receives numbers of bytes of weights that were read.

    Returns:
        What was found in order, a line each.

    Raises:
        PreflightError: for what is not in order.
        ValueError: for files that cannot be read.
    """
    checks = []
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


def auto_class_of(raw: Mapping[str, Any]) -> tuple[str, str]:
    """The Auto class that loads a model with this `config.json`, and the name of the model's own class.

    Raises:
        ValueError: for an architecture that its model type does not have.
    """
    classes = auto_classes_of(raw["model_type"])
    language_model = next(own for own, name in classes.items() if name == "AutoModelForCausalLM")
    architecture = (raw.get("architectures") or [language_model])[0]
    if architecture in classes:
        return classes[architecture], architecture
    raise ValueError(
        f"{CONFIG_NAME}: architectures={[architecture]} is not allowed for model_type={raw['model_type']!r}."
    )


def _load_model(candidate: Candidate) -> str:
    """Load the model as a user would, onto the meta device: no tensor stays in memory."""
    raw = candidate.raw
    if raw.get("quantization_config"):
        return "note: loading was not tried, because the weights are quantised; names, shapes and values are in order"
    _, name = auto_class_of(raw)
    model_class = getattr(modeling_deepseekmoe, name)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        _, info = model_class.from_pretrained(candidate.folder, device_map="meta", output_loading_info=True)
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
        except (ValueError, OSError, TypeError, AttributeError) as error:
            raise PreflightError(f"generation_config.json is not allowed: {error}") from error
        checks.append("generation config: in order")
    if not candidate.files.keys() & {"tokenizer_config.json", "tokenizer.json", "tokenizer.model"}:
        return [*checks, "note: there is no tokenizer"] if candidate.kind == "model" else checks
    settings = candidate.files.get("tokenizer_config.json")
    if settings is not None and "auto_map" in _parse_object(settings):
        return [*checks, "note: the tokenizer has code of its own, which was not run"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(candidate.folder)
    except Exception as error:  # that is what the tokenizers library raises
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
    if value.startswith((".", "/", "~")) or not value:
        raise ValueError(f"{field_name}={value!r} is not allowed: it must be the id of a repository.")


def is_hub_id(value: str) -> bool:
    """Whether a value is the id of a repository, and no folder here, of which it is the name too."""
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
    "check_candidate",
    "check_hub_id",
    "check_secrets",
    "find_candidate",
    "find_kind",
    "is_hub_id",
]
