"""Conversions that are killed at any moment and resumed once."""

import io
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from cli_runner import run
from conftest import Golden
from conversion_cases import INDEX, deadline, digests
from synthetic import CONFIG, v3_tensors, write

from modeling_deepseekmoe.conversion import convert, unfinished_work
from modeling_deepseekmoe.conversion.converting import carry_out
from modeling_deepseekmoe.conversion.unfinished_work import unfinished_path

OPTIONS = {"several files": {"layout": "stacked", "max_shard_size": "60KB"}, "one file": {"dtype": "bfloat16"}}


def in_a_child(work: Callable[[], object]) -> int:
    """Begin some work in a copy of this process; returns its id."""
    process = os.fork()
    if not process:
        torch.set_num_threads(1)  # the threads of the pool were not copied
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return process


def check_readers_view(destination: Path, expected: dict[str, str]) -> None:
    """What a reader sees is nothing, or all of it; in the unfinished folder too."""
    if destination.exists():
        assert digests(destination) == expected
    folder = unfinished_path(destination) / "folder"
    if (folder / INDEX).exists() or ((folder / "model.safetensors").exists() and (folder / "config.json").exists()):
        assert {name: digest for name, digest in digests(folder).items() if "partial" not in name} == expected


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has threads")
@pytest.mark.parametrize("case", ["several files", pytest.param("one file", marks=pytest.mark.slow)])
def test_killed_at_random_moments(case: str, tmp_path: Path) -> None:
    """A hundred runs that were killed before their end, most of them in the middle of the writing."""
    source = write(tmp_path / "source", v3_tensors(), CONFIG, 3)
    options = OPTIONS[case]
    expected: dict[str, str] = {}
    generator, killed, resumed, window, number = random.Random(0), 0, 0, 0.0, 0
    with deadline(300):
        for whole in range(2):
            started = time.perf_counter()
            _, status = os.waitpid(in_a_child(partial(convert, source, tmp_path / f"w{whole}", **options)), 0)
            window = time.perf_counter() - started
            assert status == 0 and (not expected or digests(tmp_path / f"w{whole}") == expected)
            expected = digests(tmp_path / f"w{whole}")
        while killed < 100:
            number += 1
            destination = tmp_path / f"run-{number}"
            process = in_a_child(partial(convert, source, destination, **options))
            time.sleep(generator.random() * window)
            os.kill(process, signal.SIGKILL)  # also one that has ended and is not waited for yet
            _, status = os.waitpid(process, 0)
            killed += os.WIFSIGNALED(status)
            window *= 1.02 if os.WIFSIGNALED(status) else 0.9  # the machine may be faster or slower now
            check_readers_view(destination, expected)
            resumed += (unfinished_path(destination) / "folder").exists()
            convert(source, destination, resume=True, **options)
            assert digests(destination) == expected
            assert not unfinished_path(destination).exists()
            shutil.rmtree(destination)
    assert resumed >= 30


def test_killed_after_every_step(v3: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that changes the file system may be the last one."""
    options = {"layout": "stacked", "max_shard_size": "150KB"}
    source = write(tmp_path / "source", v3.tensors, v3.config)
    plan = convert(source, tmp_path / "whole", **options)
    expected = digests(tmp_path / "whole")

    class Killed(BaseException):
        pass

    def stop_at_the_end(left: Iterator[int], call: Callable, *args: object, **kwargs: object) -> object:
        if next(left, None) is None:
            raise Killed
        return call(*args, **kwargs)

    steps = 0
    while True:
        destination, left = tmp_path / f"run-{steps}", iter(range(steps))
        with monkeypatch.context() as context:
            for name in ("mkdir", "open", "rename", "replace", "fsync", "write", "unlink", "rmdir"):
                context.setattr(os, name, partial(stop_at_the_end, left, getattr(os, name)))
            context.setattr(io, "open", partial(stop_at_the_end, left, io.open))
            context.setattr(shutil, "copyfile", partial(stop_at_the_end, left, shutil.copyfile))
            try:
                carry_out(plan, destination)
                break
            except Killed:
                pass
        check_readers_view(destination, expected)
        carry_out(plan, destination, resume=True)
        assert digests(destination) == expected and not unfinished_path(destination).exists()
        steps += 1
    assert steps > 50


def test_after_a_restart_of_the_machine_finished_files_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written may not have reached the disk, though its name has."""
    source = write(tmp_path / "source", v3_tensors(), CONFIG, 3)
    convert(source, tmp_path / "whole", max_shard_size="100KB")
    for restarted in (False, True):
        destination = tmp_path / f"out-{restarted}"
        with failing_after(4, monkeypatch), pytest.raises(OSError, match="Input/output error"):
            convert(source, destination, max_shard_size="100KB")
        shards = sorted((unfinished_path(destination) / "folder").glob("*.safetensors"))
        assert len(shards) == 3
        content = shards[1].read_bytes()
        shards[1].write_bytes(content[:-100] + bytes(100))
        if restarted:
            monkeypatch.setattr(unfinished_work, "_machine_start", lambda: "another one")
        lines: list[str] = []
        convert(source, destination, max_shard_size="100KB", resume=True, report=lines.append)
        assert sum("finished earlier" in line for line in lines) == 3 - restarted
        assert (digests(destination) == digests(tmp_path / "whole")) == restarted


def test_only_one_process_writes(v3: Golden, tmp_path: Path) -> None:
    from filelock import FileLock

    work = unfinished_path(tmp_path / "out")
    work.mkdir()
    with FileLock(work / "lock"):
        code, output = run("convert", v3.folder, tmp_path / "out", "--resume")
    assert code == 2 and "Another process is writing to this folder" in output
    assert run("convert", v3.folder, tmp_path / "out", "--resume")[0] == 0


@contextmanager
def failing_after(finished: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The disk fails when one file more is to be finished."""
    calls: list[Path] = []

    def fail(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) > finished:
            raise OSError(5, "Input/output error", str(target))
        os.replace(self, target)
        return target

    with monkeypatch.context() as context:
        context.setattr(Path, "replace", fail)
        yield


def test_only_the_same_work_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source", v3_tensors(), CONFIG, 3)
    same = ("--max-shard-size", "100KB")
    assert run("convert", source, tmp_path / "whole", *same)[0] == 0
    with failing_after(3, monkeypatch):  # the mark and two shards
        code, output = run("convert", source, tmp_path / "out", *same)
    assert code == 2 and "Input/output error" in output and "go on with --resume" in output
    work = unfinished_path(tmp_path / "out")
    for options in (
        ("--layout", "stacked"), ("--dtype", "bfloat16"), ("--max-shard-size", "200KB"), ("--to", "deepseekmoe"),
        ("--drop-mtp",),
    ):  # fmt: skip
        code, output = run("convert", source, tmp_path / "out", *same, *options, "--resume")
        assert code == 2 and "cannot be resumed: it holds the work of another source, other options" in output
    shard = source / "model-00002-of-00003.safetensors"
    content, times = shard.read_bytes(), shard.stat()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    code, output = run("convert", source, tmp_path / "out", *same, "--resume")
    assert code == 2 and "cannot be resumed: it holds the work of another source" in output
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(list((work / "folder").glob("*.safetensors"))) == 2

    mark = (work / "conversion.json").read_bytes()
    for damaged in (b"{", b"[]", b"{}"):
        (work / "conversion.json").write_bytes(damaged)
        code, output = run("convert", source, tmp_path / "out", *same, "--resume")
        assert code == 2 and "cannot be resumed" in output
    (work / "conversion.json").write_bytes(mark)
    sizes: list[int] = []
    lines: list[str] = []
    plan = convert(
        source, tmp_path / "out", max_shard_size="100KB", resume=True, report=lines.append, progress=sizes.append
    )
    assert sum("finished earlier" in line for line in lines) == 2 and sum(sizes) == plan.nbytes
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_what_lies_in_the_place_of_the_unfinished_work(tmp_path: Path, v3: Golden) -> None:
    work = unfinished_path(tmp_path / "out")
    (work / "folder").mkdir(parents=True)  # without a mark
    for _ in range(2):
        code, output = run("convert", v3.folder, tmp_path / "out", "--resume")
        assert code == 2 and "is in the way: it is not the unfinished work of a conversion" in output
        if not work.is_symlink():
            shutil.rmtree(work)
            (tmp_path / "elsewhere").mkdir()
            work.symlink_to(tmp_path / "elsewhere")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_value_that_cannot_be_written_loses_nothing_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = v3_tensors()
    tensors["lm_head.weight"][0, 0] = 1e5
    source = write(tmp_path / "source", tensors, CONFIG, 3)
    options = {"dtype": "float16", "max_shard_size": "100KB"}
    with failing_after(2, monkeypatch), pytest.raises(OSError, match="Input/output error"):
        convert(source, tmp_path / "out", **options)
    with pytest.raises(ValueError, match=r"lm_head\.weight holds"):
        convert(source, tmp_path / "out", resume=True, **options)
    assert len(list((unfinished_path(tmp_path / "out") / "folder").glob("*.safetensors"))) > 1
