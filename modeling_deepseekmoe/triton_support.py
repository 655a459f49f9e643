# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Triton, if it is installed, and the decorators by which this package defines its kernels."""

import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # this file travels to machines that have no Triton, where nothing calls a kernel
    triton = tl = TensorDescriptor = None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


if triton is not None and _numbers(triton.__version__) < (3, 6):
    triton = tl = None

# Whether the kernels run on the CPU, in Triton's interpreter: TRITON_INTERPRET=1 was set when they were defined.
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


def _why_not_interpreted(of_triton: str, of_numpy: str) -> str:
    if _numbers(of_triton) < (3, 7) and _numbers(of_numpy) >= (2, 4):
        return f"the interpreter of Triton {of_triton} cannot use numpy {of_numpy} (pip install 'numpy<2.4')"
    return ""


_NO_INTERPRETER = _why_not_interpreted(triton.__version__, importlib.metadata.version("numpy")) if INTERPRETED else ""

# Numbers that change from batch to batch: a kernel is not compiled again for those that are 1 or multiples of 16.
_SIZES = (
    "row_stride", "sequence_length", "programs_per_sequence", "tokens_per_program", "num_tokens", "grad_stride_t",
    "grad_stride_k", "num_choices", "choices_per_program", "num_programs", "num_experts",
)  # fmt: skip


def jit(function: Callable) -> Any:
    """Compile a function that kernels call."""
    return function if triton is None else triton.jit(function)


def kernel(function: Callable) -> Any:
    """Compile a kernel, but not anew for sizes that change from batch to batch."""
    if triton is None:
        return function
    names = inspect.signature(function).parameters
    return triton.jit(function, do_not_specialize=[name for name in _SIZES if name in names])


def why_no_triton(device: torch.device) -> str:
    """Return the reason why kernels cannot run on a device; it is empty if they can."""
    if triton is None:
        return "triton is not installed, or too old (pip install 'triton>=3.6')"
    if device.type == "cpu" and INTERPRETED:
        return _NO_INTERPRETER
    if device.type != "cuda":
        return f"the tensors are on the device {device.type!r} (Triton needs 'cuda', for CUDA and ROCm)"
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if is_nvidia and torch.cuda.get_device_properties(device).major < 7:
        return "Triton needs a GPU of compute capability 7.0 or newer"
    return ""


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below a number of at least 1."""
    return 1 << (number - 1).bit_length()


def ceil_div(number: int, size: int) -> int:
    """Return how many parts of a size hold a number of things (`triton.cdiv` takes microseconds)."""
    return -(-number // size)


__all__ = [
    "INTERPRETED",
    "TensorDescriptor",
    "ceil_div",
    "jit",
    "kernel",
    "power_of_two",
    "tl",
    "triton",
    "why_no_triton",
]
