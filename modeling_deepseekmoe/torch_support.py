# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The five things that the package takes from torch beyond its documented interface, because they have no public form.

No other file uses a private name of torch. `tests/core/test_canaries.py` states what is relied on for each.
"""

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import nn


def in_backward_pass() -> bool:
    """Tell whether autograd runs a backward pass now. A checkpointed layer is computed again inside of one."""
    return torch._C._current_graph_task_id() != -1


def after_backward_pass(function: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs now has ended. To be called from inside of one."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


class Float32Buffers(nn.Module):
    """A module whose own buffers stay in float32, whatever `to`, `half` or `bfloat16` make of the model around it."""

    def _apply(self, *args: Any, **kwargs: Any) -> "Float32Buffers":
        before = dict(self.named_buffers(recurse=False))
        super()._apply(*args, **kwargs)
        for name, buffer in dict(self.named_buffers(recurse=False)).items():
            if buffer.is_floating_point() and buffer.dtype != torch.float32:
                kept = buffer if before[name].is_meta else before[name]
                setattr(self, name, kept.to(buffer.device, torch.float32))
        return self


def without_wrappers(name: str) -> str:
    """Return a parameter's name without the names of torch's wrappers: checkpointing, FSDP1, `torch.compile`.

    State dicts have names without them.
    """
    return re.sub(r"(^|\.)(_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)(?=\.)", "", name).lstrip(".")


def set_group_timeout(group: Any, seconds: float) -> None:
    """Set how many seconds the ranks of a process group wait for each other."""
    from torch.distributed import distributed_c10d  # some builds of torch are without it

    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def run_as_forward(module: nn.Module, method: str) -> None:
    """Let FSDP2 put a module's weights together for a method as for its forward, if it has the module in its hands."""
    if torch.compiler.is_compiling() or not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method  # slow to import

    if isinstance(module, FSDPModule) and method not in vars(module):
        register_fsdp_forward_method(module, method)


def decoder_of(model: nn.Module) -> Any:
    """Return the decoder of this family inside a model, wrapped or not; `None` if there is none."""
    return next((module for module in model.modules() if hasattr(module, "router_load")), None)


__all__ = [
    "Float32Buffers",
    "after_backward_pass",
    "decoder_of",
    "in_backward_pass",
    "run_as_forward",
    "set_group_timeout",
    "without_wrappers",
]
