# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Search for tokens and keys in what is about to be published."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import get_token

from .candidate import PreflightError

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


def check_secrets(files: Mapping[str, Path | bytes], token: str | None = None) -> None:
    """Search for tokens and keys in everything but the values of the weights.

    Args:
        files: contents by their names.
        token: the user's token. The default is the stored one.

    Raises:
        PreflightError: if something is found. The message names the files and what they seem to hold, never the
            secret.
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
    """Read a file in overlapping blocks. Of weights, read only the header."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        if file.name.endswith(".safetensors"):
            size = min(size, 8 + int.from_bytes(handle.read(8), "little"))
            handle.seek(0)
        tail = b""
        while block := handle.read(min(_BLOCK, size)):
            yield tail + block
            tail, size = block[-_OVERLAP:], size - len(block)


__all__ = ["check_secrets"]
