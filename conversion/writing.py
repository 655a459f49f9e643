# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Writing a checkpoint folder that can be interrupted at any moment and resumed, and appears only when it is complete.

Everything is written to `<destination>.unfinished/folder`: shard by shard, each under another name until it is on the
disk, then the small files, the config, and the index last. Then the folder takes the destination's name, in one step.
All headers are known before the first byte, so that a finished shard can be told by its header and its size.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from huggingface_hub import split_state_dict_into_shards_factory

from modeling_deepseekmoe.folders import check_destination

from .checkpoint import DTYPE_NAMES, INDEX_NAME, TensorSource
from .streaming import Output

_FOLDER, _FINGERPRINT, _LOCK = "folder", "conversion.json", "lock"
_PARTIAL = ".partial"
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]B)?\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Shard:
    """A safetensors file to write.

    Attributes:
        name: of the file.
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
        texts: other files by name, with what they hold; the config among them.
        copies: files to copy.
        origin: whatever else decides on the content (the source's files, the options), for the fingerprint.
    """

    shards: tuple[Shard, ...]
    texts: dict[str, bytes]
    copies: tuple[Path, ...] = ()
    origin: Mapping[str, object] = field(default_factory=dict)

    @property
    def index(self) -> bytes | None:
        """The index; `None` for a single file, which has none."""
        if len(self.shards) == 1:
            return None
        sizes = sum(output.nbytes for shard in self.shards for output in shard.outputs)
        weight_map = {output.name: shard.name for shard in self.shards for output in shard.outputs}
        return _json({"metadata": {"total_size": sizes}, "weight_map": weight_map})

    @property
    def nbytes(self) -> int:
        """Size of the whole folder."""
        small = sum(len(text) for text in (*self.texts.values(), self.index or b""))
        return sum(shard.nbytes for shard in self.shards) + small + sum(file.stat().st_size for file in self.copies)

    @property
    def fingerprint(self) -> str:
        """A digest of all that decides on the content."""
        digest = hashlib.sha256(_json(self.origin))
        for shard in self.shards:
            digest.update(shard.name.encode() + shard.header)
        for name, text in sorted(self.texts.items()):
            digest.update(name.encode() + text)
        for file in self.copies:
            with file.open("rb") as handle:
                digest.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
        return digest.hexdigest()


def make_shards(tensors: list[Output], max_shard_size: str | int) -> tuple[Shard, ...]:
    """Divide tensors among files, in order, as transformers does.

    Args:
        tensors: what to write.
        max_shard_size: bytes, or a text such as "5GB"; a larger tensor gets a file of its own.

    Raises:
        ValueError: for a size that is none.
    """
    match = _SIZE.match(str(max_shard_size))
    if match is None or float(match[1]) == 0 or (match[2] is None) != isinstance(max_shard_size, int):
        raise ValueError(f"max_shard_size={max_shard_size!r} is not allowed: it must be bytes, or a text as '500MB'.")
    split = split_state_dict_into_shards_factory(
        {output.name: output for output in tensors},
        get_storage_size=lambda output: output.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
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
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write a folder.

    Args:
        plan: what to write.
        source: what its tensors are read from.
        destination: the folder; must not exist or be empty.
        resume: go on with what an interrupted run has left; with nothing left, begin.
        report: receives a line for every file.
        progress: receives the number of bytes, for every piece that is written or found finished.

    Raises:
        ValueError: for a destination in use, one with unfinished work of an interrupted run unless `resume` is set,
            unfinished work of another conversion, or a value that cannot be written.
        OSError: for a disk that is full or cannot be written to, or work that another process is doing. What is
            finished is kept for `resume`.
    """
    path = Path(destination).absolute()
    if path.is_mount():
        raise ValueError(f"destination={str(path)!r} is not allowed: it is a mount point. Name a folder inside it.")
    if resume and _is_complete(path, plan):
        report(f"{path} is complete")
        progress(sum(shard.nbytes for shard in plan.shards))
        shutil.rmtree(unfinished_path(path), ignore_errors=True)  # what is left of an interrupted last step
        return
    with _claimed(path, plan, resume) as folder:
        _write_shards(plan, source, folder, report, progress)
        for file in plan.copies:
            _write_small(folder / file.name, file.read_bytes())
        for name, text in sorted(plan.texts.items()):
            _write_small(folder / name, text)
        if plan.index is not None:
            _write_small(folder / INDEX_NAME, plan.index)
        _sync(folder)
        folder.replace(path)
        _sync(path.parent)


def unfinished_path(destination: str | Path) -> Path:
    """Where the unfinished work on a destination lies."""
    path = Path(destination).absolute()
    return path.with_name(f"{path.name}.unfinished")


@contextmanager
def _claimed(path: Path, plan: FolderPlan, resume: bool) -> Iterator[Path]:
    """The folder to write to, for this process alone, beside the mark that tells what is being written."""
    check_destination(path)
    work = unfinished_path(path)
    found = work.exists()
    if found and not resume:
        raise ValueError(
            f"destination={str(path)!r} is not allowed: {work} holds the unfinished work of an interrupted run. Go on "
            "with it (--resume, or resume=True), or delete it."
        )
    _check_space(work, plan)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / _LOCK, timeout=0):
            mark = work / _FINGERPRINT
            if mark.is_file() and json.loads(mark.read_text())["fingerprint"] != plan.fingerprint:
                raise ValueError(
                    f"{work} cannot be resumed: it holds the work of another source, other options or another "
                    "version. Delete it to begin anew."
                )
            _write_small(mark, _json({"fingerprint": plan.fingerprint}))
            folder = work / _FOLDER
            folder.mkdir(exist_ok=True)
            yield folder
            shutil.rmtree(work)
    except Timeout as error:
        raise OSError(errno.EBUSY, "Another process is writing to this folder", str(work)) from error
    except OSError as error:
        kept = f" What is finished is kept in {work}: go on with --resume, or delete it." if work.exists() else ""
        raise OSError(f"{error}.{kept}") from error
    except ValueError:
        if not found:
            shutil.rmtree(work, ignore_errors=True)
        raise


def _write_shards(
    plan: FolderPlan,
    source: TensorSource,
    folder: Path,
    report: Callable[[str], None],
    progress: Callable[[int], None],
) -> None:
    """Write the shards that are not finished. One is brought to the disk while the next one is computed."""
    with ThreadPoolExecutor(1) as background:
        syncing: Future[None] | None = None
        for number, shard in enumerate(plan.shards, start=1):
            if _is_written(folder / shard.name, shard):
                report(f"[{number}/{len(plan.shards)}] {shard.name}: finished earlier")
                progress(shard.nbytes)
                continue
            report(f"[{number}/{len(plan.shards)}] {shard.name}: {len(shard.outputs)} tensors")
            partial = folder / (shard.name + _PARTIAL)
            _write_shard(shard, source, partial, progress)
            if syncing is not None:
                syncing.result()
            syncing = background.submit(_finish, partial, folder / shard.name)
        if syncing is not None:
            syncing.result()


def _write_shard(shard: Shard, source: TensorSource, path: Path, progress: Callable[[int], None]) -> None:
    with path.open("wb", buffering=0) as file:
        _write_all(file.fileno(), path, shard.header)
        progress(len(shard.header))
        for output in shard.outputs:
            written = 0
            for part in output.parts:
                for block in part.blocks(source):
                    data = memoryview(block.reshape(-1).view(torch.uint8).numpy())
                    del block
                    _write_all(file.fileno(), path, data)
                    progress(len(data))
                    written += len(data)
                    del data  # a view of the mapped file, which may be another one next
            assert written == output.nbytes, output.name


def _write_all(descriptor: int, path: Path, data: bytes | memoryview) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _finish(partial: Path, path: Path) -> None:
    _sync(partial)
    partial.replace(path)


def _write_small(path: Path, content: bytes) -> None:
    """A file that is there with its whole content or not at all."""
    partial = path.with_name(path.name + _PARTIAL)
    with partial.open("wb", buffering=0) as file:
        _write_all(file.fileno(), path, content)
    _finish(partial, path)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def _is_written(path: Path, shard: Shard) -> bool:
    if not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header


def _is_complete(path: Path, plan: FolderPlan) -> bool:
    """Whether a folder holds the plan's files, by their headers, sizes and texts."""
    texts = dict(plan.texts)
    if plan.index is not None:
        texts[INDEX_NAME] = plan.index
    return (
        path.is_dir()
        and all(_is_written(path / shard.name, shard) for shard in plan.shards)
        and all((path / name).is_file() and (path / name).read_bytes() == text for name, text in texts.items())
    )


def _check_space(work: Path, plan: FolderPlan) -> None:
    existing = work
    while not existing.exists():
        existing = existing.parent
    finished = sum(file.stat().st_size for file in (work / _FOLDER).glob("*") if file.is_file())
    needed, free = plan.nbytes - finished, shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:,.2f} GB are needed, and {free / 1e9:,.2f} GB are free", str(work))


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


__all__ = ["FolderPlan", "Shard", "make_shards", "unfinished_path", "write_folder"]
