"""Conversions that are killed at any moment and resumed once."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Golden
from synthetic import CONFIG, v3_tensors, write
from test_cli import run
from test_conversion import INDEX, digests

from modeling_deepseekmoe.conversion import convert
from modeling_deepseekmoe.conversion.writing import unfinished_path

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


@pytest.mark.parametrize("case", OPTIONS)
def test_killed_at_random_moments(case: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", v3_tensors(), CONFIG, 3)
    options = OPTIONS[case]
    expected: dict[str, str] = {}
    generator, killed, resumed = random.Random(0), 0, 0
    times = []
    for number in range(3):
        destination = tmp_path / f"whole-{number}"
        started = time.perf_counter()
        _, status = os.waitpid(in_a_child(partial(convert, source, destination, **options)), 0)
        times.append(time.perf_counter() - started)
        assert status == 0
        assert not expected or digests(destination) == expected
        expected = digests(destination)
    for number in range(100):
        destination = tmp_path / f"run-{number}"
        process = in_a_child(partial(convert, source, destination, **options))
        time.sleep(generator.random() * sorted(times)[1])
        os.kill(process, signal.SIGKILL)  # also one that has ended and is not waited for yet
        _, status = os.waitpid(process, 0)
        killed += os.WIFSIGNALED(status)
        check_readers_view(destination, expected)
        resumed += (unfinished_path(destination) / "folder").exists()
        convert(source, destination, resume=True, **options)
        assert digests(destination) == expected
        assert not unfinished_path(destination).exists()
    assert killed > 50 and resumed > 10


def test_killed_after_every_step(v3: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that changes the file system may be the last one."""
    options = {"layout": "stacked", "max_shard_size": "150KB"}
    convert(v3.folder, tmp_path / "whole", **options)
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
            try:
                convert(v3.folder, destination, **options)
                break
            except Killed:
                pass
        check_readers_view(destination, expected)
        convert(v3.folder, destination, resume=True, **options)
        assert digests(destination) == expected and not unfinished_path(destination).exists()
        steps += 1
    assert steps > 40


def test_only_one_process_writes(v3: Golden, tmp_path: Path) -> None:
    from filelock import FileLock

    work = unfinished_path(tmp_path / "out")
    work.mkdir()
    with FileLock(work / "lock"):
        code, output = run("convert", v3.folder, tmp_path / "out", "--resume")
    assert code == 2 and "Another process is writing to this folder" in output
    assert run("convert", v3.folder, tmp_path / "out", "--resume")[0] == 0


def test_what_cannot_be_resumed(v3: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source", v3.tensors, v3.config, 3)
    convert(source, tmp_path / "whole", max_shard_size="100KB")
    with monkeypatch.context() as context:
        context.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        context.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        code, output = run("convert", source, tmp_path / "out", "--max-shard-size", "100KB")
    assert code == 2 and "Input/output error" in output
    for options in (("--layout", "stacked"), ("--dtype", "bfloat16"), ("--max-shard-size", "200KB")):
        convert_options = ("--max-shard-size", "100KB", *options)
        unfinished_path(tmp_path / "out").joinpath("conversion.json").write_text('{"fingerprint": "of another one"}')
        code, output = run("convert", source, tmp_path / "out", *convert_options, "--resume")
        assert code == 2 and "cannot be resumed: it holds the work of another source" in output
    unfinished_path(tmp_path / "out").joinpath("conversion.json").unlink()
    assert run("convert", source, tmp_path / "out", "--max-shard-size", "100KB", "--resume")[0] == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_source_that_changed_is_not_resumed(v3: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source", v3.tensors, v3.config, 3)
    with monkeypatch.context() as context:
        calls: list[Path] = []

        def fail_at_the_third(self: Path, target: Path) -> Path:
            calls.append(target)
            if len(calls) == 3:
                raise OSError(5, "Input/output error")
            os.replace(self, target)
            return target

        context.setattr(Path, "replace", fail_at_the_third)
        assert run("convert", source, tmp_path / "out", "--max-shard-size", "100KB")[0] == 2
    work = unfinished_path(tmp_path / "out")
    assert len(list((work / "folder").glob("*.safetensors"))) == 1
    assert json.loads((work / "conversion.json").read_text()).keys() == {"fingerprint"}
    shard = source / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, output = run("convert", source, tmp_path / "out", "--max-shard-size", "100KB", "--resume")
    assert code == 2 and "it holds the work of another source, other options or another version" in output
