# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The folder of a run: what is in it, whether a run may begin or go on there.

`finetune.yaml` holds the options, and `run.json` what else the weights depend on. Both are written before anything is
trained. `result.json` is written last: a run that has it is over.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..sharding.trainer import last_complete_checkpoint
from ..support.folders import check_destination, unfinished_file
from .options import FinetuneOptions, read_options

OPTIONS, RUN, RESULT, SELECTION = "finetune.yaml", "run.json", "result.json", "esft.json"
CORRECTION = "correction.safetensors"
BEFORE, AFTER, CHECKPOINTS = "before", "after", "checkpoints"
TRAINED = {"lora": "adapter", "qlora": "adapter", "esft": "experts", "full": "model"}
_OWN = (OPTIONS, RUN, RESULT, SELECTION, CORRECTION, BEFORE, AFTER, CHECKPOINTS, *dict.fromkeys(TRAINED.values()))
# Options that have no part in the weights.
_FREE = ("output", "logging_steps", "save_steps", "report_tokens", "report_to", "keep_checkpoints")
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")


@dataclass(frozen=True)
class RunFolder:
    """The folder that a run writes.

    Attributes:
        path: the folder.
    """

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def stored(self) -> FinetuneOptions | None:
        """The options of the run that is there."""
        if not (self / OPTIONS).is_file():
            return None
        return FinetuneOptions.of({**read_options(self / OPTIONS), "output": str(self.path)})

    @property
    def checkpoint(self) -> str | None:
        """The newest checkpoint that is complete."""
        return last_complete_checkpoint(self / CHECKPOINTS)

    def check(self, options: FinetuneOptions, overwrite: bool) -> FinetuneOptions:
        """Find out whether a run with these options may begin, or go on, and return its options.

        Raises:
            ValueError: if the folder holds something else, a run that is over, or one with other options.
        """
        stored = self.stored
        if stored is None and not (self.path.is_dir() and all(map(_is_rest, self.path.iterdir()))):
            check_destination(self.path)
        if stored is None or overwrite:
            return options
        if (self / RESULT).exists():
            raise ValueError(
                f"output={str(self.path)!r} is not allowed: the run there is over. Give another folder, or overwrite."
            )
        options = options.completed_by(stored)
        for one in fields(options):
            new, old = getattr(options, one.name), getattr(stored, one.name)
            if one.name not in _FREE and not _same(one.name, new, old):
                raise ValueError(
                    f"{one.name}={new!r} is not allowed: the run in {self.path} has {old!r}. Give the same options to "
                    "go on with it, another folder, or overwrite."
                )
        return options

    def check_data(self, digest: str) -> None:
        """Raise ValueError if the run that is there began with other data."""
        if (self / RUN).is_file() and json.loads((self / RUN).read_text(encoding="utf-8"))["data"] != digest:
            raise ValueError(
                f"data: the rows are not those that the run in {self.path} began with. Give another folder, or "
                "overwrite."
            )

    def begin(self, options: FinetuneOptions, digest: str, *, overwrite: bool) -> list[str]:
        """Write what the run depends on, or compare it with what is there.

        Returns:
            What differs from the environment in which the run began.
        """
        if overwrite:
            self._remove(_OWN)
        self.path.mkdir(parents=True, exist_ok=True)
        now = _environment()
        if (self / RUN).is_file():
            then = json.loads((self / RUN).read_text(encoding="utf-8"))["environment"]
            return [f"{name} was {old}, and is {now[name]}" for name, old in then.items() if now[name] != old]
        write_whole(self / OPTIONS, options.to_yaml())
        write_whole(self / RUN, json.dumps({"data": digest, "environment": now}, indent=2) + "\n")
        return []

    @contextmanager
    def undone_by_errors(self) -> Iterator[None]:
        """Remove what was written at the beginning of a run, if an error inside shows that it cannot begin."""
        try:
            yield
        except Exception:
            if self.checkpoint is None and not (self / BEFORE).exists():
                self._remove(_OWN)
                if not any(self.path.iterdir()):
                    self.path.rmdir()
            raise

    def remove_rests(self) -> None:
        """Remove what an interrupted run has left that is not complete, or that follows from its training."""
        self._remove((AFTER, *TRAINED.values(), *(path.name for path in self.path.iterdir() if _is_rest(path))))
        if (self / CHECKPOINTS).is_dir():
            last = self.checkpoint
            for path in (self / CHECKPOINTS).glob("checkpoint-*"):
                if last is None or _step(path) > _step(Path(last)):
                    shutil.rmtree(path)

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints of a training that is over."""
        self._remove((CHECKPOINTS,))

    def _remove(self, names: tuple[str, ...]) -> None:
        for path in (self / name for name in names):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def free_name(self, name: str) -> Path:
        """Return a path in the folder that does not exist."""
        path, number = self / name, 2
        while path.exists():
            path, number = self / f"{name}-{number}", number + 1
        return path


def _is_rest(path: Path) -> bool:
    """Tell whether a kill has left this: a file or folder that was not complete, see [`unfinished_folder`]."""
    return path.name.endswith(".unfinished") or any(path.name.startswith(f".{name}-") for name in _OWN)


def _same(name: str, new: Any, old: Any) -> bool:
    if name in ("model", "data", "eval_data", "tokenizer") and new and old:
        return bool(new == old or (Path(new).exists() and Path(new).resolve() == Path(old).resolve()))
    return bool(new == old)


def _step(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdigit() else 0


def _environment() -> dict[str, Any]:
    """Return what the last bits of a result may depend on, beside the options."""
    return {**{name: version(name) for name in _LIBRARIES}, "threads": torch.get_num_threads()}


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    with unfinished_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


__all__ = [
    "AFTER",
    "BEFORE",
    "CHECKPOINTS",
    "CORRECTION",
    "OPTIONS",
    "RESULT",
    "RUN",
    "SELECTION",
    "TRAINED",
    "RunFolder",
    "write_whole",
]
