# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Loads tokenizers with the first and last tokens that their `tokenizer_config.json` switches on.

If `add_bos_token` is true, as in DeepSeek's tokenizers, transformers 4 put the beginning-of-text token in front of a
text. If there is a `tokenizer.json`, transformers 5 ignores the field, and goes by the post-processor in that file.
DeepSeek's post-processors do not have this token. Models then see texts that begin as none did in their training.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from transformers import AutoTokenizer

SETTINGS_NAME, TOKENIZER_NAME = "tokenizer_config.json", "tokenizer.json"
_FLAGS = {"add_bos_token": "bos_token", "add_eos_token": "eos_token"}
_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "tekken.json")  # at least one of them makes a tokenizer
_OF_HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")


def load_tokenizer(name_or_folder: str | Path, **kwargs: Any) -> Any:
    """Load a tokenizer as AutoTokenizer does, with the first and last tokens that its settings ask for.

    A tokenizer that is saved again has them in `tokenizer.json`, where every version of transformers finds them.

    Args:
        name_or_folder: a folder or a repository of the Hub.
        kwargs: those of `AutoTokenizer.from_pretrained`. `add_bos_token` and `add_eos_token` among them win.

    Raises:
        ValueError, OSError: as AutoTokenizer does; also a ValueError if there is no tokenizer.
    """
    folder = Path(name_or_folder, kwargs.get("subfolder") or "")
    in_files = folder.is_dir() and "gguf_file" not in kwargs
    if in_files and not any(file for pattern in _FILES for file in folder.glob(pattern)):
        raise _no_tokenizer(name_or_folder)
    of_hub = {key: value for key, value in kwargs.items() if key in _OF_HUB}
    settings, tokenizer = (_content(name_or_folder, name, of_hub) for name in (SETTINGS_NAME, TOKENIZER_NAME))
    flags = {}
    if unheeded_flags(settings, tokenizer):
        flags = {flag: settings.get(flag) is True or _adds(settings, tokenizer, flag) for flag in _FLAGS}
    found = AutoTokenizer.from_pretrained(name_or_folder, **{**flags, **kwargs})
    if len(found) < 2:  # transformers makes an empty one of nothing
        raise _no_tokenizer(name_or_folder)
    return found


def _no_tokenizer(name_or_folder: str | Path) -> ValueError:
    return ValueError(
        f"{str(name_or_folder)!r} is not allowed: it holds no tokenizer. Give a folder or a repository with one."
    )


def unheeded_flags(settings: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> list[str]:
    """Find which of `add_bos_token` and `add_eos_token` are switched on and ignored by transformers 5.

    Args:
        settings: content of `tokenizer_config.json`.
        tokenizer: content of `tokenizer.json`; empty if there is none.
    """
    if not tokenizer or "auto_map" in settings:  # read by a class that looks at the settings
        return []
    return [flag for flag in _FLAGS if settings.get(flag) is True and not _adds(settings, tokenizer, flag)]


def _adds(settings: Mapping[str, Any], tokenizer: Mapping[str, Any], flag: str) -> bool:
    """Tell whether the post-processor knows the token."""
    token = settings.get(_FLAGS[flag])
    text = token.get("content") if isinstance(token, Mapping) else token
    return bool(text) and json.dumps(text) in json.dumps(tokenizer.get("post_processor"))


def _content(name_or_folder: str | Path, name: str, of_hub: dict[str, Any]) -> dict[str, Any]:
    """Read a JSON file from a folder or a repository. The result is empty if there is none."""
    folder = Path(name_or_folder, of_hub.get("subfolder") or "")
    try:
        file = folder / name if folder.is_dir() else Path(hf_hub_download(str(name_or_folder), name, **of_hub))
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such file, or no such name, or no JSON
        return {}  # AutoTokenizer says what is wrong, if it is
    return content if isinstance(content, dict) else {}


__all__ = ["SETTINGS_NAME", "TOKENIZER_NAME", "load_tokenizer", "unheeded_flags"]
