"""Digests of checkpoint folders, and a time limit."""

import hashlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INDEX = "model.safetensors.index.json"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@contextmanager
def deadline(seconds: int = 120) -> Iterator[None]:
    """Turns a hang into a failure."""

    def fail(*_: object) -> None:
        raise AssertionError(f"no end after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


SECOND = "model-00002-of-00003.safetensors"
