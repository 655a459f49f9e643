# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Say which method fits this machine: its GPU, or its memory if it has none."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil  # accelerate depends on it
import torch
from transformers import PreTrainedConfig

from ..analysis.counted_model import CountedModel
from ..analysis.inspection import gigabytes
from ..analysis.planning import METHODS, Layout, MemoryPlan, plan_memory
from .options import FinetuneOptions

_SEVERAL = "For several GPUs write_script gives a script to start from."
_LAYOUT = Layout("single_gpu.yaml")
# Assumed on a CPU: Python with its libraries, and the activations once more, for what experts in plain torch keep and
# what the allocator does not give back. What a model of 314 M parameters took with 1,176 tokens in a micro-batch, of
# what is planned so: lora 6.5 of 7.3 GB, qlora 4.5 of 6.4, esft 7.1 of 7.3, full 8.7 of 10.7.
_CPU_PROCESS, _CPU_ACTIVATIONS = 10**9, 1.0
_CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")  # of Linux: what a container may use


@dataclass(frozen=True)
class Machine:
    """Where a run computes.

    Attributes:
        memory: bytes that are free: of the GPU, or of the machine.
        gpu: name of the GPU, or `None` where there is none.
        bfloat16: whether products in bfloat16 are to be used.
    """

    memory: int
    gpu: str | None
    bfloat16: bool

    @property
    def device(self) -> str:
        """The device of the model."""
        return "cpu" if self.gpu is None else "cuda:0"

    def __str__(self) -> str:
        where = "of this machine's memory (no GPU)" if self.gpu is None else f"of {self.gpu}"
        return f"{gigabytes(self.memory)} {where} are free"


def this_machine() -> Machine:
    """Look at the machine.

    Raises:
        ValueError: if several GPUs are visible, of which a run takes one, or several processes were launched.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is not allowed: a run is one process. {_SEVERAL}")
    if not torch.cuda.is_available():
        return Machine(_free_memory(), None, False)
    if torch.cuda.device_count() > 1:
        number = torch.cuda.device_count()
        raise ValueError(f"{number} GPUs are visible, and a run takes one: set CUDA_VISIBLE_DEVICES=0. {_SEVERAL}")
    return Machine(
        torch.cuda.mem_get_info(0)[0],
        torch.cuda.get_device_name(0),
        torch.cuda.is_bf16_supported(including_emulation=False),
    )


def _free_memory() -> int:
    free = int(psutil.virtual_memory().available)
    try:
        return min(free, int(_CONTROL_GROUP.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return free


@dataclass(frozen=True)
class MethodPlan:
    """What a method needs here.

    Attributes:
        method: the method.
        plan: its memory; `None` if it cannot be used.
        recompute: whether activations are recomputed in it.
        needs: bytes, with what is assumed of a CPU.
        fits: whether it fits.
        reason: why it cannot be used.
    """

    method: str
    plan: MemoryPlan | None
    recompute: bool
    needs: int
    fits: bool
    reason: str = ""


def choose_dtype(options: FinetuneOptions, machine: Machine) -> str:
    """Return the dtype of the weights: float32 for full training and on a CPU, else bfloat16."""
    if options.dtype != "auto":
        return options.dtype
    return "bfloat16" if machine.bfloat16 and options.method != "full" else "float32"


def plan_methods(
    config: PreTrainedConfig, options: FinetuneOptions, machine: Machine, longest: int, esft_share: float | None = None
) -> list[MethodPlan]:
    """Work out what every method needs, for sequences of this length.

    Activations are recomputed if the options say so, or if they leave it open and it fits only so.

    Args:
        config: config of the model.
        options: what is trained, and how.
        machine: where.
        longest: tokens of the longest sequence.
        esft_share: share of the experts that are selected, if it is known.

    Raises:
        ValueError: if the model cannot be planned with the method of the options.
    """
    counted, plans = CountedModel.of(config), []
    for method in dict.fromkeys((*METHODS, options.method)):
        own = options if method == options.method else replace(options, method=method, dtype="auto")
        tries = (False, True) if options.recompute is None else (options.recompute,)
        try:
            found = [_plan(config, counted, own, machine, longest, esft_share, recompute) for recompute in tries]
        except ValueError as error:
            if method == options.method:
                raise
            plans.append(MethodPlan(method, None, False, 0, False, str(error).rstrip(".")))
            continue
        fitting = [place for place, plan in enumerate(found) if _needed(plan, machine) <= machine.memory]
        place = fitting[0] if fitting else -1
        needs = _needed(found[place], machine)
        plans.append(MethodPlan(method, found[place], tries[place], needs, bool(fitting)))
    return plans


def _needed(plan: MemoryPlan, machine: Machine) -> int:
    """Return the bytes that a run needs here."""
    if machine.gpu is not None:
        return plan.total
    return plan.total + _CPU_PROCESS + round(_CPU_ACTIVATIONS * plan.parts["activations"])


def _plan(
    config: PreTrainedConfig,
    counted: CountedModel,
    options: FinetuneOptions,
    machine: Machine,
    longest: int,
    esft_share: float | None,
    recompute: bool,
) -> MemoryPlan:
    weights = choose_dtype(options, machine)
    settings: dict[str, Any] = {"lora_rank": options.rank}
    if options.method == "qlora":
        settings |= {"format": options.format, "correction_rank": options.correction_rank}
    if esft_share is not None:
        settings["esft_share"] = esft_share
    return plan_memory(
        config,
        _LAYOUT,
        counted=counted,
        method=options.method,
        weights=weights,
        compute="bfloat16" if machine.bfloat16 else weights,
        tokens=options.batch_size * longest,
        checkpointing=recompute,
        cuda=machine.gpu is not None,
        **settings,
    )


def fitting_table(plans: Sequence[MethodPlan], machine: Machine, chosen: str) -> str:
    """Make a table: a line for every method, with the memory that it needs, and whether it fits."""
    lines = [f"{machine}"]
    width = max(len(one.method) for one in plans)
    for one in plans:
        if one.plan is None:
            lines.append(f"  {one.method:<{width}}  cannot be used: {one.reason}")
            continue
        how = ", with activations recomputed" if one.recompute else ""
        mark = "  <- this run" if one.method == chosen else ""
        says = "fits" if one.fits else "does not fit"
        lines.append(f"  {one.method:<{width}}  needs {gigabytes(one.needs):>12}: {says}{how}{mark}")
    return "\n".join(lines)


__all__ = ["Machine", "MethodPlan", "choose_dtype", "fitting_table", "plan_methods", "this_machine"]
