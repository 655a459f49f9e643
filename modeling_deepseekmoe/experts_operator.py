# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The routed experts as one operator of `torch.library` with its gradient, so that `torch.compile` takes it whole.

Forward and backward are those of `experts_loop` (plain torch, one expert after the other) or of `experts_triton` (all
experts in each launch). What both keep for the backward pass is the input, the routing and the first product (S, 2I),
whose layout is that of the implementation. There is no gradient of the gradient, and none of forward mode.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

from .experts_loop import Adapter, experts_backward, experts_forward
from .experts_triton import experts_backward_triton, experts_forward_triton
from .routing import group_by_expert

# A copy of this file on the Hub registers operators of its own.
_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)
_ADAPTER = "Tensor? {0}_a, Tensor? {0}_b, float {0}_scale, float {0}_dropout, Tensor? {0}_seed"
_INPUTS = "Tensor hidden, Tensor expert_ids, Tensor weights, Tensor gate_up, Tensor down, " + ", ".join(
    _ADAPTER.format(name) for name in ("gate_up", "down")
)
_NUM_INPUTS = 15
# The inputs that have gradients, in the order of `experts_backward`.
_DIFFERENTIABLE = (0, 2, 3, 4, 5, 6, 10, 11)


def _with_adapters(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operator's inputs with its adapters put together."""
    adapters = [None if own[0] is None else Adapter(*own) for own in (inputs[5:10], inputs[10:])]
    return (*inputs[:5], *adapters)


def _experts(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *inputs, keep, implementation = arguments
    inputs[:5] = (tensor.contiguous() for tensor in inputs[:5])
    _, expert_ids, _, _, down = inputs[:5]
    permutation, _, offsets = group_by_expert(expert_ids, len(down), implementation=implementation)
    forward: Callable[..., Any] = experts_forward_triton if implementation == "triton" else experts_forward
    output, kept = forward(*_with_adapters(tuple(inputs)), permutation, offsets, keep)
    return output, kept, permutation, offsets


def _experts_backward(grad: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    *inputs, permutation, offsets, kept, needs, implementation = arguments
    inputs[:5] = (tensor.contiguous() for tensor in inputs[:5])
    backward: Callable[..., Any] = experts_backward_triton if implementation == "triton" else experts_backward
    gradients = backward(grad.contiguous(), *_with_adapters(tuple(inputs)), permutation, offsets, kept, needs)
    return [gradient for gradient, need in zip(gradients, needs, strict=True) if need]


def _fake(*arguments: Any) -> tuple[torch.Tensor, ...]:
    hidden, expert_ids, _, gate_up = arguments[:4]
    num_slots = expert_ids.numel()
    return (
        hidden.new_empty(hidden.shape),
        hidden.new_empty((num_slots if arguments[-2] else 0, gate_up.shape[1])),
        expert_ids.new_empty(num_slots, dtype=torch.int64),
        expert_ids.new_empty(len(gate_up) + 1, dtype=torch.int32),
    )


def _backward_fake(grad: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    *_, needs, _ = arguments
    inputs = [arguments[place] for place in _DIFFERENTIABLE]
    return [value.new_empty(value.shape) for value, need in zip(inputs, needs, strict=True) if need]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    tensors = [value if isinstance(value, torch.Tensor) else None for value in inputs[:_NUM_INPUTS]]
    ctx.numbers = [None if isinstance(value, torch.Tensor) else value for value in inputs[:_NUM_INPUTS]]
    ctx.implementation = inputs[-1]
    _, kept, permutation, offsets = output
    ctx.save_for_backward(*tensors, permutation, offsets, kept)


def _backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    results: list[torch.Tensor | None] = [None] * (_NUM_INPUTS + 2)
    if grad is not None:
        *tensors, permutation, offsets, kept = ctx.saved_tensors
        inputs = [number if tensor is None else tensor for tensor, number in zip(tensors, ctx.numbers, strict=True)]
        needs = [ctx.needs_input_grad[place] for place in _DIFFERENTIABLE]
        gradients = experts_backward_op(grad, *inputs, permutation, offsets, kept, needs, ctx.implementation)
        wanted = (place for place, need in zip(_DIFFERENTIABLE, needs, strict=True) if need)
        for place, gradient in zip(wanted, gradients, strict=True):
            results[place] = gradient
    return tuple(results)


experts_op = torch.library.custom_op(
    f"{_NAMESPACE}::experts",
    _experts,
    mutates_args=(),
    schema=f"({_INPUTS}, bool keep, str implementation) -> (Tensor, Tensor, Tensor, Tensor)",
)
experts_op.register_fake(_fake)
experts_op.register_autograd(_backward, setup_context=_save_for_backward)
experts_backward_op = torch.library.custom_op(
    f"{_NAMESPACE}::experts_backward",
    _experts_backward,
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, Tensor permutation, Tensor offsets, Tensor kept, bool[] needs, "
    "str implementation) -> Tensor[]",
)
experts_backward_op.register_fake(_backward_fake)

__all__ = ["experts_op"]
