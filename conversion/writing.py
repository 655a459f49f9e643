# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Write a checkpoint folder that can be interrupted and resumed at any moment, and appears only when complete.

Shards are written first, each under another name until it is whole. Then come the small files and the config, and last
the index. Then the folder takes the destination's name, in one step. All headers are known before the first byte is
written, so that a finished shard can be recognised by its header and its size. As with `cp`, the system decides when
the weights reach the disk. After a restart of the machine, finished shards are therefore compared with what they
should hold.
"""

import errno
import filecmp
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from modeling_deepseekmoe.conversion.checkpoint import DTYPE_NAMES, INDEX_NAME, TensorSource
from modeling_deepseekmoe.conversion.streaming import Output
from modeling_deepseekmoe.conversion.unfinished_work import (
    PARTIAL,
    claimed,
    clean_up,
    finish,
    is_finished,
    unfinished_path,
    write_all,
    write_small,
)
from modeling_deepseekmoe.support.sizes import bytes_of

Result = TypeVar("Result")


def say_nothing(what: Any) -> None:
    """Ignore a line, or a number of bytes."""


@dataclass(frozen=True)
class Writing:
    """How a folder is written.

    Attributes:
        max_shard_size: size of a weight file, in bytes or as a text such as `"5GB"`.
        resume: go on with what an interrupted run has left.
        report: receives a line at every step.
        progress: receives numbers of bytes that were written.
    """

    max_shard_size: str | int = "5GB"
    resume: bool = False
    report: Callable[[str], None] = say_nothing
    progress: Callable[[int], None] = say_nothing


@dataclass(frozen=True)
class Shard:
    """A safetensors file to write.

    Attributes:
        name: name of the file.
        outputs: its tensors, in the order of their bytes.
        header: the first bytes of the file.
    """

    name: str
    outputs: tuple[Output, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class FolderPlan:
    """A checkpoint folder to write.

    Attributes:
        shards: the weight files.
        texts: content of the other files by name, the config among them.
        copies: files to copy, by their names in the folder.
        origin: all else that the content depends on (the source's files, the options), for the fingerprint.
    """

    shards: tuple[Shard, ...]
    texts: dict[str, bytes]
    copies: Mapping[str, Path] = field(default_factory=dict)
    origin: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def index(self) -> bytes | None:
        """The index. `None` for a single file, which has none."""
        if len(self.shards) == 1:
            return None
        sizes = sum(output.nbytes for shard in self.shards for output in shard.outputs)
        weight_map = {output.name: shard.name for shard in self.shards for output in shard.outputs}
        return _json({"metadata": {"total_size": sizes}, "weight_map": weight_map})

    @property
    def nbytes(self) -> int:
        """Size of the whole folder."""
        small = sum(len(text) for text in (*self.texts.values(), self.index or b""))
        return (
            sum(shard.nbytes for shard in self.shards)
            + small
            + sum(file.stat().st_size for file in self.copies.values())
        )

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that the content depends on."""
        digest = hashlib.sha256(_json(self.origin))
        for shard in self.shards:
            digest.update(shard.name.encode() + shard.header)
        for name, text in sorted(self.texts.items()):
            digest.update(name.encode() + text)
        for name, file in self.copies.items():
            with file.open("rb") as handle:
                digest.update(name.encode() + hashlib.file_digest(handle, "sha256").digest())
        return digest.hexdigest()


def make_shards(tensors: list[Output], max_shard_size: str | int) -> tuple[Shard, ...]:
    """Divide tensors among files, in order, as transformers does.

    Args:
        tensors: the tensors to write.
        max_shard_size: bytes, or a text such as "5GB". A larger tensor gets a file of its own.

    Raises:
        ValueError: if `max_shard_size` is no size.
    """
    size = bytes_of("max_shard_size", max_shard_size)
    split = split_state_dict_into_shards_factory(
        {output.name: output for output in tensors},
        get_storage_size=lambda output: output.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=size,
    )
    by_name = {output.name: output for output in tensors}
    return tuple(
        _shard(name, [by_name[tensor] for tensor in names]) for name, names in split.filename_to_tensors.items()
    )


def _shard(name: str, tensors: list[Output]) -> Shard:
    # Wide values first, as the safetensors library orders them, so that every tensor is aligned to its own values.
    tensors = sorted(tensors, key=lambda output: -output.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in tensors:
        offsets = [end, end := end + output.nbytes]
        header[output.name] = {
            "dtype": DTYPE_NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Shard(name, tuple(tensors), len(text).to_bytes(8, "little") + text)


def write_folder(
    plan: FolderPlan,
    source: TensorSource,
    destination: str | Path,
    *,
    resume: bool = False,
    report: Callable[[str], None] = say_nothing,
    progress: Callable[[int], None] = say_nothing,
) -> None:
    """Write a folder.

    Args:
        plan: what to write.
        source: what its tensors are read from.
        destination: the folder. It must not exist or be empty.
        resume: go on with what an interrupted run has left. If nothing is left, begin.
        report: receives a line for every file.
        progress: receives the number of bytes of every piece that is written or found finished.

    Raises:
        ValueError: if the destination is in use, if unfinished work is there and `resume` is not set, if the
            unfinished work is of another conversion, or if a value cannot be written.
        OSError: if the disk is full or cannot be written to, or if another process does this work. What is finished is
            kept for `resume`.
    """
    path = Path(destination).resolve()
    if path.is_mount():
        raise ValueError(f"destination={str(path)!r} is not allowed: it is a mount point. Name a folder inside it.")
    if resume and (is_finished(path, plan.fingerprint) or _is_complete(path, plan, source, report)):
        report(f"{path} is complete")
        progress(sum(shard.nbytes for shard in plan.shards))
        clean_up(path)
        return
    check_space(path, plan)
    with claimed(path, plan.fingerprint, resume) as (folder, trusted):
        fill_folder(plan, source, folder, trusted=trusted, report=report, progress=progress)


def fill_folder(
    plan: FolderPlan,
    source: TensorSource,
    folder: Path,
    *,
    trusted: bool = True,
    report: Callable[[str], None] = say_nothing,
    progress: Callable[[int], None] = say_nothing,
) -> None:
    """Write the files of a plan into a folder that is there, the index last.

    Args:
        plan, source, report, progress: as for [`write_folder`].
        folder: where they go.
        trusted: whether what is finished there needs no comparison.

    Raises:
        ValueError: if a value cannot be written.
        OSError: if the disk is full or cannot be written to.
    """
    _write_shards(plan, source, folder, trusted, report, progress)
    for name, file in plan.copies.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / (name + PARTIAL))
        finish(folder / (name + PARTIAL), folder / name)
    for name, text in sorted(plan.texts.items()):
        write_small(folder / name, text)
    if plan.index is not None:
        write_small(folder / INDEX_NAME, plan.index)


def _write_shards(
    plan: FolderPlan,
    source: TensorSource,
    folder: Path,
    trusted: bool,
    report: Callable[[str], None],
    progress: Callable[[int], None],
) -> None:
    """Write the shards that are not finished. Finished ones are read and compared, unless they are trusted."""
    for number, shard in enumerate(plan.shards, start=1):
        path, partial = folder / shard.name, folder / (shard.name + PARTIAL)
        if _is_written(path, shard) and (trusted or _holds(path, shard, source)):
            report(f"[{number}/{len(plan.shards)}] {shard.name}: finished earlier")
            progress(shard.nbytes)
            continue
        report(f"[{number}/{len(plan.shards)}] {shard.name}: {len(shard.outputs)} tensors")
        _write_shard(shard, source, partial, progress)
        partial.replace(path)


def _write_shard(shard: Shard, source: TensorSource, path: Path, progress: Callable[[int], None]) -> None:
    with path.open("wb", buffering=0) as file:

        def write(data: bytes | memoryview) -> int:
            write_all(file.fileno(), path, data)
            return len(data)

        written = write(shard.header)
        progress(written)
        for size in _for_each_piece(shard, source, write):
            progress(size)
            written += size
        assert written == shard.nbytes, shard.name


def _for_each_piece(shard: Shard, source: TensorSource, use: Callable[[memoryview], Result]) -> Iterator[Result]:
    """Call a function with every piece of a shard's tensors, in the order of their bytes. Yield what it returns."""
    for output in shard.outputs:
        for part in output.parts:
            for block in part.blocks(source):
                data = memoryview(block.reshape(-1).view(torch.uint8).numpy())
                del block
                result = use(data)
                del data  # a view of the mapped file, which may be another one next
                yield result


def _is_written(path: Path, shard: Shard) -> bool:
    if not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header


def _is_complete(path: Path, plan: FolderPlan, source: TensorSource, report: Callable[[str], None]) -> bool:
    """Tell whether a folder holds the plan's files and nothing else. Compare them byte by byte."""
    texts = dict(plan.texts) if plan.index is None else {**plan.texts, INDEX_NAME: plan.index}
    names = {*texts, *(shard.name for shard in plan.shards), *plan.copies}
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
    if not path.is_dir() or there != names:
        return False
    if not all(_is_written(path / shard.name, shard) for shard in plan.shards):
        return False
    report(f"Comparing {path} with what would be written")
    return (
        all((path / name).read_bytes() == text for name, text in texts.items())
        and all(filecmp.cmp(file, path / name, shallow=False) for name, file in plan.copies.items())
        and all(_holds(path / shard.name, shard, source) for shard in plan.shards)
    )


def _holds(path: Path, shard: Shard, source: TensorSource) -> bool:
    """Tell whether the tensors of a finished file are those of the plan."""
    with path.open("rb") as file:
        file.seek(len(shard.header))
        return all(_for_each_piece(shard, source, lambda data: file.read(len(data)) == data))


def check_space(path: Path, plan: FolderPlan) -> None:
    """Raise OSError if the disk has too little space for a folder, beside what unfinished work on it holds."""
    work = unfinished_path(path)
    existing = work
    while not existing.exists():
        existing = existing.parent
    finished = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    needed, free = plan.nbytes - finished, shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:,.2f} GB are needed, and {free / 1e9:,.2f} GB are free", str(work))


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


__all__ = [
    "FolderPlan",
    "Shard",
    "Writing",
    "check_space",
    "fill_folder",
    "make_shards",
    "say_nothing",
    "write_folder",
]
