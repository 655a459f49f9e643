# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Folders and files to read, from this machine or the Hub, and new folders that appear only when they are complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME = "config.json", "model.safetensors", "model.safetensors.index.json"
# Weights that nothing here reads.
FOREIGN_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def local_folder(name_or_folder: str | Path, weights: bool = True) -> Path:
    """Return a local folder as it is, or download a repository of the Hub into its cache, with or without its weights.

    Raises:
        OSError: if there is no such folder, and no such repository or no Hub.
    """
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    try:
        left_out = [f"*{suffix}" for suffix in (*FOREIGN_WEIGHTS, *(() if weights else (".safetensors",)))]
        return Path(snapshot_download(str(name_or_folder), ignore_patterns=left_out))
    except (OSError, ValueError) as error:
        raise OSError(f"{name_or_folder} is no folder, and cannot be had from the hub: {error}") from error


@contextmanager
def opened(file: str | Path) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        ValueError: if it is no such file, or not complete.
        OSError: if it is missing.
    """
    try:
        with safe_open(str(file), framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(f"File {Path(file).name} is not a readable safetensors file: {error}.") from error


def read_tensors(file: str | Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file. Errors are those of [`opened`]."""
    with opened(file) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - the handle is no mapping


def check_destination(destination: str | Path) -> Path:
    """Check a folder to write, and return its absolute path.

    Raises:
        ValueError: if it exists and is not an empty folder.
    """
    path = Path(destination).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"destination={str(path)!r} is not allowed: it must not exist, or be an empty folder.")
    return path


@contextmanager
def unfinished_file(destination: str | Path) -> Iterator[Path]:
    """Give a file of this process to write beside the destination, which takes its place at the end.

    After an error it is gone, and the destination is as it was.
    """
    path = Path(destination)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def unfinished_folder(destination: str | Path) -> Iterator[Path]:
    """Make a folder beside the destination. At the end it takes the destination's name; after an error it is removed.

    Raises:
        ValueError: if the destination exists and is not an empty folder.
    """
    path = check_destination(destination)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.replace(path)  # an empty folder may be there
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


__all__ = [
    "CONFIG_NAME",
    "FOREIGN_WEIGHTS",
    "INDEX_NAME",
    "WEIGHTS_NAME",
    "check_destination",
    "local_folder",
    "opened",
    "read_tensors",
    "unfinished_file",
    "unfinished_folder",
]
