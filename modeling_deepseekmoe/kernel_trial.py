# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The kernels prove themselves: before they are used on a GPU they compute a small case, beside plain torch.

A kernel that is right on one GPU can be wrong on another one, or not compile there, with a version of Triton or of a
driver that nobody has tried. Where a trial fails, plain torch computes, and one warning says why. Where it passes, a
file beside Triton's cache says so to the next process with the same GPU, versions and kernels.

A kernel can be right for one size and wrong for another: Triton 3.6 reduced rows of 64 experts wrongly, and no others.
So a trial can have a case, which is what the caller is about to compute, and is held once for each.

`routing`, `grouping` and `experts_trial` register their trials here.
"""

import contextlib
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .triton_support import triton

logger = logging.get_logger(__name__)

DEVICES = ("cuda",)  # types of devices on which the kernels are tried
Trial = Callable[..., None]
Case = tuple[int | float | str | None, ...]
_TRIALS: dict[str, Trial] = {}
_OUTCOMES: dict[tuple[str, torch.device, Case], str] = {}
_LOCK = threading.RLock()
# What the kernels and their trials consist of: a record is for these very files.
_SOURCES = (
    "experts_blocks", "experts_decoding", "experts_gating", "experts_kernels", "experts_loop", "experts_quantized",
    "experts_sources", "experts_tiles", "experts_trial", "experts_triton", "grouping", "kernel_trial", "routing",
    "routing_eager", "routing_kernels", "routing_options", "routing_triton", "triton_support",
)  # fmt: skip


class WrongKernelError(Exception):
    """A kernel's result differs from that of plain torch."""


def register_trial(name: str) -> Callable[[Trial], Trial]:
    """Register the decorated function as a trial, of a device and a case. It raises where a kernel is wrong."""

    def register(trial: Trial) -> Trial:
        _TRIALS[name] = trial
        return trial

    return register


def why_failed(name: str, device: torch.device, case: Case = ()) -> str:
    """Return why a trial has failed on a device; it is empty if it passed, or is not held on such devices.

    The first call for a case runs the trial, unless a record says that it has passed on this machine.
    """
    return _outcome(name, device, case) if device.type in DEVICES else ""


@torch.compiler.assume_constant_result
def _outcome(name: str, device: torch.device, case: Case) -> str:
    with _LOCK:
        if (name, device, case) not in _OUTCOMES:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return ""  # nothing may wait now; the next call that is not captured tries
            _OUTCOMES[name, device, case] = _try(name, device, case)
        return _OUTCOMES[name, device, case]


def _try(name: str, device: torch.device, case: Case) -> str:
    record = record_path(name, device, case)
    if record.exists():
        return ""
    errors: list[Exception] = []

    def run() -> None:
        try:
            _TRIALS[name](device, *case)
        except Exception as error:  # of the compiler, the driver or the comparison: the reason is told
            errors.append(error)

    # Tracing, exporting, autocast and default devices are modes of a thread, and none of this one.
    thread = threading.Thread(target=run, name="deepseekmoe-trial")
    with _allowed_to_wait(device):
        thread.start()
        thread.join()
    if not errors:
        _keep(record, {**identity(device), "case": case})
        return ""
    first = str(errors[0]).strip().partition("\n")[0][:300]
    of_case = f" for {', '.join(map(str, case))}" if case else ""
    reason = f"the trial of the {name} kernels{of_case} failed on {device} ({type(errors[0]).__name__}: {first})"
    logger.warning(f"{reason}. Plain torch computes instead. `deepseekmoe kernels` runs the trial again.")
    return reason


@contextlib.contextmanager
def _allowed_to_wait(device: torch.device) -> Iterator[None]:
    """Let a trial wait for the GPU where a program has made that an error. This is not a thread's own."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def compare(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Compare a result with plain torch's, by the norm of the difference.

    Raises:
        WrongKernelError: if it differs by more than `tolerance` times the norm, or has another shape.
    """
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if found.shape != expected.shape:
        raise WrongKernelError(f"{name} has the shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    difference = float((found - expected).norm())
    if not difference <= tolerance * float(expected.norm()):
        raise WrongKernelError(f"{name} differs by {difference:.1e}, and its norm is {float(expected.norm()):.1e}")


def identity(device: torch.device) -> dict[str, Any]:
    """Describe what a record is for: GPU, versions, and a digest of the kernels' source."""
    gpu = torch.cuda.get_device_properties(device).name if device.type == "cuda" else device.type
    return {
        "gpu": gpu,
        "runtime": torch.version.hip or torch.version.cuda,
        "torch": torch.__version__,
        "triton": None if triton is None else triton.__version__,
        "kernels": _digest(),
    }


def record_path(name: str, device: torch.device, case: Case = ()) -> Path:
    """Return the file that says that a trial has passed."""
    text = json.dumps({**identity(device), "case": case}, sort_keys=True)
    folder = Path(triton.knobs.cache.dir) / "deepseekmoe"
    return folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


@functools.cache
def _digest() -> str:
    texts = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in _SOURCES]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def _keep(record: Path, content: dict[str, Any]) -> None:
    """Write a record in one step. Other processes may do the same."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        unfinished = record.with_name(f"{record.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(record)
    except OSError as error:
        logger.info(f"That the kernels have passed their trial cannot be kept in {record.parent}: {error}.")


def forget_outcomes() -> None:
    """Forget what this process knows of the trials. Records stay."""
    with _LOCK:
        _OUTCOMES.clear()


__all__ = [
    "Case",
    "WrongKernelError",
    "compare",
    "forget_outcomes",
    "identity",
    "record_path",
    "register_trial",
    "why_failed",
]
