"""Conversion and the disk: destinations in use, too little space, limits, what is in the way."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cli_runner import run
from conftest import Golden
from conversion_cases import SECOND, digests
from synthetic import CONFIG, PLAIN_CONFIG, dequantized, read, same_bytes, v3_tensors, write

from modeling_deepseekmoe.conversion import convert, plan_conversion, verify, writing
from modeling_deepseekmoe.conversion.checkpoint import Checkpoint
from modeling_deepseekmoe.conversion.converting import carry_out

linux = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")


@pytest.fixture
def folder(v1: Golden, tmp_path: Path) -> Path:
    """A sharded checkpoint."""
    return write(tmp_path / "source", v1.tensors, v1.config, 3)


def test_a_foreign_folder_in_the_place_of_the_unfinished_one_is_left_alone(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "whole")
    (tmp_path / "out.unfinished" / "folder").mkdir(parents=True)
    (tmp_path / "out.unfinished" / "thesis.txt").write_text("mine")
    for options in ((), ("--resume",)):
        code, output = run("convert", folder, tmp_path / "out", *options)
        assert code == 2 and "is in the way" in output
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    assert run("convert", folder, tmp_path / "out", "--resume")[0] == 0  # it is complete; nothing is cleaned up
    assert (tmp_path / "out.unfinished" / "thesis.txt").read_text() == "mine"


def test_a_file_that_changes_while_it_is_read(folder: Path, tmp_path: Path) -> None:
    plan = plan_conversion(folder, layout="stacked")
    os.truncate(folder / SECOND, 3000)
    with pytest.raises(OSError, match=rf"{SECOND} has changed while it was read"):
        carry_out(plan, tmp_path / "out")


# ----------------------------------------------------------------------------------------------------- the destination
def test_destinations_in_use(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    for destination in (tmp_path / "used", tmp_path / "used" / "file", folder):
        code, output = run("convert", folder, destination)
        assert code == 2 and "must not exist, or be an empty folder" in output
        code, output = run("convert", folder, destination, "--resume")
        assert code == 2 and "must not exist, or be an empty folder" in output
    (tmp_path / "empty").mkdir()
    assert run("convert", folder, tmp_path / "empty")[0] == 0
    code, output = run("convert", folder, tmp_path / "empty", "--resume")
    assert code == 0 and "is complete" in output
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert run("convert", folder, tmp_path / "link")[0] == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    assert run("convert", folder, tmp_path / "link")[0] == 0 and digests(tmp_path / "other") == digests(
        tmp_path / "empty"
    )
    assert run("convert", folder, tmp_path / "other", "--resume")[0] == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json", "something.txt"):
        file = tmp_path / "other" / name
        content = file.read_bytes() if file.exists() else b""
        file.write_bytes(content[:-1] + b" ")
        code, output = run("convert", folder, tmp_path / "other", "--resume")
        assert code == 2 and "must not exist, or be an empty folder" in output
        file.write_bytes(content)
    assert run("convert", folder, tmp_path / "empty", "--resume", "--layout", "stacked")[0] == 2
    assert (tmp_path / "used" / "file").read_text() == "mine"


def test_a_file_size_limit(folder: Path, tmp_path: Path) -> None:
    """A disk that is full in the middle of a file, as a limit on its size makes it; then there is room again."""
    convert(folder, tmp_path / "whole", max_shard_size="150KB")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code, output = run("convert", folder, tmp_path / "out", "--max-shard-size", "150KB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "model-00001-of-" in output and os.strerror(errno.EFBIG) in output
    assert "go on with --resume" in output and not (tmp_path / "out").exists()
    code, output = run("convert", folder, tmp_path / "out", "--max-shard-size", "150KB")
    assert code == 2 and "unfinished work of an interrupted run" in output
    assert run("convert", folder, tmp_path / "out", "--max-shard-size", "150KB", "--resume")[0] == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not (tmp_path / "out.unfinished").exists()


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only who may mount can make a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_too_little_space(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    needed = plan_conversion(folder, max_shard_size="150KB").folder.nbytes

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))

    free(needed - 1)
    code, output = run("convert", folder, tmp_path / "out", "--max-shard-size", "150KB")
    assert code == 2 and "GB are needed, and 0.00 GB are free" in output and "out.unfinished" in output
    assert {path.name for path in tmp_path.iterdir()} == {"source"}

    write_bytes, calls = os.write, []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if sum(calls) > needed // 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(descriptor, data)

    free(needed)
    before = digests(folder)
    with monkeypatch.context() as context:
        context.setattr(os, "write", full)
        code, output = run("convert", folder, tmp_path / "out", "--max-shard-size", "150KB")
    assert code == 2 and os.strerror(errno.ENOSPC) in output and ".safetensors" in output
    assert "go on with --resume" in output and not (tmp_path / "out").exists() and digests(folder) == before
    free(needed - sum(file.stat().st_size for file in (tmp_path / "out.unfinished").rglob("*") if file.is_file()))
    assert run("convert", folder, tmp_path / "out", "--max-shard-size", "150KB", "--resume")[0] == 0
    assert same_bytes(read(tmp_path / "out"), read(folder))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_target_that_may_not_be_written_to(
    code: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a read-only disk and a folder of somebody else answer."""

    def refuse(path: str, *_: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    exit_code, output = run("convert", folder, tmp_path / "out")
    assert exit_code == 2 and os.strerror(code) in output and "out.unfinished" in output


def test_mount_points_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "disk")
    code, output = run("convert", folder, tmp_path / "disk")
    assert code == 2 and "mount point. Name a folder inside it" in output
    assert run("convert", folder, tmp_path / "disk" / "out")[0] == 0


def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(tmp_path / "disk", "size=200k") as disk:
        code, output = run("convert", folder, disk / "out")
        assert code == 2 and "GB are needed, and 0.00 GB are free" in output
        assert not list(disk.iterdir())
        monkeypatch.setattr(writing, "check_space", lambda *_: None)  # as a quota, which nobody can ask for
        code, output = run("convert", folder, disk / "out", "--max-shard-size", "100KB")
        assert code == 2 and os.strerror(errno.ENOSPC) in output and ".safetensors" in output
        assert [path.name for path in disk.iterdir()] == ["out.unfinished"]


def test_a_read_only_disk(folder: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro,size=1m") as disk:
        code, output = run("convert", folder, disk / "out")
        assert code == 2 and os.strerror(errno.EROFS) in output and "out.unfinished" in output


def test_a_file_in_the_way(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, output = run("convert", folder, tmp_path / "file" / "out")
    assert code == 2 and "Error: " in output
    assert (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------- one at a time
@linux
def test_one_file_of_the_source_is_mapped_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that belong together are dealt out over three files, scales apart from their values."""
    source = write(tmp_path / "source", v3_tensors(), CONFIG, 3)
    mapped: list[set[str]] = []
    original = Checkpoint.read

    def watched(self: Checkpoint, *args: object) -> torch.Tensor:
        block = original(self, *args)
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped.append({line.split()[-1] for line in lines if str(source) in line})
        return block

    monkeypatch.setattr(Checkpoint, "read", watched)
    bfloat16 = write(tmp_path / "bfloat16" / "source", dequantized(v3_tensors()), PLAIN_CONFIG, 3)
    for number, options in enumerate(({"layout": "stacked"}, {"dtype": "bfloat16"}, {"dtype": "float32"})):
        convert(source, tmp_path / str(number), **options)
    convert(source, tmp_path / "0", layout="stacked", resume=True)  # compared
    convert(tmp_path / "0", tmp_path / "back", layout="per-expert")
    assert max(len(files) for files in mapped) == 1 and len(set().union(*mapped)) == 3
    source = bfloat16
    convert(source, tmp_path / "fp8", dtype="fp8")
    verify(source)
    assert max(len(files) for files in mapped) == 1 and len(set().union(*mapped)) == 6
