# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Keep the unfinished work on a folder in `<destination>.unfinished`: the folder to be, a mark and a lock.

The mark holds a digest of all that the content depends on, so that only the same work is resumed. The folder takes the
destination's name in one step. The mark is deleted afterwards, so that what a killed run leaves can always be
recognised.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from modeling_deepseekmoe.support.folders import check_destination

PARTIAL = ".partial"
_FOLDER, _MARK, _LOCK = "folder", "conversion.json", "lock"


def unfinished_path(destination: str | Path) -> Path:
    """Return the path of the unfinished work on a destination."""
    path = Path(destination).resolve()
    return path.with_name(f"{path.name}.unfinished")


def is_finished(path: Path, fingerprint: str) -> bool:
    """Tell whether a killed run had given a folder its name, but had not cleaned up."""
    work = unfinished_path(path)
    return path.is_dir() and not (work / _FOLDER).exists() and _marked(work) == fingerprint


@contextmanager
def claimed(path: Path, fingerprint: str, resume: bool) -> Iterator[tuple[Path, bool]]:
    """Claim the folder to write to, for this process alone. At the end the folder takes the destination's name.

    Args:
        path: the destination, which must not exist or be empty.
        fingerprint: digest of the work.
        resume: whether to go on with unfinished work.

    Yields:
        The folder, and whether its content can be trusted: if it was written since the machine was started, no power
        failure can have spoilt it.

    Raises:
        ValueError: if the destination is in use, or if unfinished work is not to be resumed or is of another
            conversion.
        OSError: if it cannot be written, or another process does so.
    """
    check_destination(path)
    work = unfinished_path(path)
    found = work.exists()
    if found and not _is_ours(work):
        raise ValueError(f"{work} is in the way: it is not the unfinished work of a conversion. Move it elsewhere.")
    if found and not resume:
        raise ValueError(
            f"destination={str(path)!r} is not allowed: {work} holds the unfinished work of an interrupted run. Go on "
            "with it (--resume, or resume=True), or delete it."
        )
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / _LOCK, timeout=0):
            check_destination(path)  # another process may have finished it meanwhile
            trusted = _marked(work, "started") == _machine_start()
            if (work / _MARK).exists() and _marked(work) != fingerprint:
                raise ValueError(
                    f"{work} cannot be resumed: it holds the work of another source, other options or another "
                    "version. Delete it to begin anew."
                )
            folder = work / _FOLDER
            if not folder.exists():
                mark = {"fingerprint": fingerprint, "started": _machine_start()}
                write_small(work / _MARK, (json.dumps(mark) + "\n").encode())
                folder.mkdir()
            yield folder, trusted
            sync(folder)
            folder.replace(path)
            sync(path.parent)
    except Timeout as error:
        raise OSError(errno.EBUSY, "Another process is writing to this folder", str(work)) from error
    except OSError as error:
        kept = f" What is finished is kept in {work}: go on with --resume, or delete it." if work.exists() else ""
        raise OSError(f"{error}.{kept}") from error
    except ValueError:
        if not found:
            shutil.rmtree(work / _FOLDER, ignore_errors=True)
            clean_up(path)
        raise
    clean_up(path)


def clean_up(path: Path) -> None:
    """Remove what is left beside a finished folder. The mark goes last, and nothing is removed that is not ours."""
    work = unfinished_path(path)
    with suppress(OSError):
        for name in (_LOCK, _MARK + PARTIAL, _MARK):
            (work / name).unlink(missing_ok=True)
        work.rmdir()


def write_small(path: Path, content: bytes) -> None:
    """Write a file so that it is there with its whole content or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb", buffering=0) as file:
        write_all(file.fileno(), path, content)
    finish(partial, path)


def write_all(descriptor: int, path: Path, data: bytes | memoryview) -> None:
    """Write bytes to an open file. The message of an error names `path`."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def finish(partial: Path, path: Path) -> None:
    """Bring a file to the disk and give it its name."""
    sync(partial)
    partial.replace(path)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def _is_ours(work: Path) -> bool:
    if not work.is_dir() or work.is_symlink():
        return False
    names = {file.name for file in work.iterdir()}
    return names <= {_FOLDER, _MARK, _MARK + PARTIAL, _LOCK} and (_FOLDER not in names or _MARK in names)


def _machine_start() -> str:
    """Return a text that differs after every start of the machine, or a constant if the system does not tell."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else "unknown"


def _marked(work: Path, field: str = "fingerprint") -> str | None:
    """Read a field of the mark. Return `None` if there is no mark that can be read."""
    try:
        return str(json.loads((work / _MARK).read_text())[field])
    except (OSError, ValueError, KeyError, TypeError):
        return None


__all__ = [
    "PARTIAL",
    "claimed",
    "clean_up",
    "finish",
    "is_finished",
    "sync",
    "unfinished_path",
    "write_all",
    "write_small",
]
