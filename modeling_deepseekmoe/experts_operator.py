# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The routed experts as one operator of `torch.library` with its gradient, so that `torch.compile` takes it whole.

The forward and backward passes are those of `experts_loop` (plain torch, one expert after the other) or of
`experts_triton` (all experts in each launch). Both keep the input, the routing and the first product (S, 2I) for the
backward pass. How the numbers of the first product are arranged depends on the implementation. There is no gradient of
the gradient, and none of forward mode.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .experts_gating import Gating
from .experts_loop import experts_backward_loop, experts_forward_loop
from .experts_operands import Adapter, ExpertGradients, ExpertOperands
from .experts_quantized import QuantizedStack
from .experts_triton import experts_backward_triton, experts_forward_triton
from .grouping import group_by_expert
from .routing_triton import group_choices

# A copy of this file on the Hub registers operators of its own.
_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)
# The stack itself, or the fields of a `QuantizedStack`.
_STACK = "Tensor {0}, Tensor? {0}_scales, Tensor? {0}_nested"
_ADAPTER = "Tensor? {0}_a, Tensor? {0}_b, float {0}_scale, float {0}_dropout, Tensor? {0}_seed"
_GATING = "str function, float? limit, float slope, float offset"  # the fields of a `Gating`
_INPUTS = ", ".join(
    [
        "Tensor hidden, Tensor expert_ids, Tensor weights",
        *(_STACK.format(name) for name in ("gate_up", "down")),
        "str format",
        _GATING,
        *(_ADAPTER.format(name) for name in ("gate_up", "down")),
    ]
)


_NO_ADAPTER = (None, None, 1.0, 0.0, None)  # in place of the fields of an `Adapter`


class _Inputs(NamedTuple):
    """The operator's inputs one by one, as `torch.library` wants them; or one value for each of them."""

    hidden: Any
    expert_ids: Any
    weights: Any
    gate_up: Any
    gate_up_scales: Any
    gate_up_nested: Any
    down: Any
    down_scales: Any
    down_nested: Any
    format: Any
    function: Any
    limit: Any
    slope: Any
    offset: Any
    gate_up_a: Any
    gate_up_b: Any
    gate_up_scale: Any
    gate_up_dropout: Any
    gate_up_seed: Any
    down_a: Any
    down_b: Any
    down_scale: Any
    down_dropout: Any
    down_seed: Any

    @classmethod
    def of(cls, operands: ExpertOperands) -> "_Inputs":
        """Make the inputs from operands."""
        quantized = isinstance(operands.down, QuantizedStack)
        values: list[Any] = [*operands[:3], *_tensors_of(operands.gate_up), *_tensors_of(operands.down)]
        values += [operands.down.format if quantized else "", *tuple(operands.gating)]
        for adapter in (operands.gate_up_adapter, operands.down_adapter):
            values += tuple(_NO_ADAPTER if adapter is None else adapter)  # a list of Dynamo (2.11) takes no subclass
        return cls(*values)

    def operands(self) -> ExpertOperands:
        """Make operands from the inputs, contiguous."""
        return ExpertOperands(
            self.hidden.contiguous(),
            self.expert_ids.contiguous(),
            self.weights.contiguous(),
            self._stack(self.gate_up, self.gate_up_scales, self.gate_up_nested),
            self._stack(self.down, self.down_scales, self.down_nested),
            Gating(self.function, self.limit, self.slope, self.offset),
            self._adapter(self.gate_up_a, self.gate_up_b, self.gate_up_scale, self.gate_up_dropout, self.gate_up_seed),
            self._adapter(self.down_a, self.down_b, self.down_scale, self.down_dropout, self.down_seed),
        )

    def _stack(self, stack: Any, scales: Any, nested: Any) -> Any:
        if not self.format:
            return stack.contiguous()
        nested = None if nested is None else nested.contiguous()
        return QuantizedStack(self.format, stack.contiguous(), scales.contiguous(), nested, self.hidden.dtype)

    @staticmethod
    def _adapter(factor_a: Any, *others: Any) -> Adapter | None:
        return None if factor_a is None else Adapter(factor_a, *others)

    def differentiable(self) -> ExpertGradients:
        """Collect the values of the inputs that can have a gradient."""
        return ExpertGradients(*(getattr(self, name) for name in ExpertGradients._fields))


def _tensors_of(stack: torch.Tensor | QuantizedStack) -> tuple[Any, Any, Any]:
    return (stack.codes, stack.scales, stack.nested) if isinstance(stack, QuantizedStack) else (stack, None, None)


def run_operator(operands: ExpertOperands, implementation: str) -> torch.Tensor:
    """Compute the weighted sum of the chosen experts' outputs, differentiably.

    Args:
        operands ([`ExpertOperands`]): with any strides.
        implementation: `"triton"`, or `"eager"`, which is the loop.

    Returns:
        `torch.Tensor` of shape (T, D), in the dtype of `operands.hidden`.
    """
    operands = operands.apart()
    # A trace is checked by a run without gradients, which must be the same.
    with_gradients = torch.is_grad_enabled() or torch.jit.is_tracing()
    differentiable = [tensor for tensor in operands.differentiable() if tensor is not None]
    keep = with_gradients and any(tensor.requires_grad for tensor in differentiable)
    return experts_op(*_Inputs.of(operands), keep, implementation)[0]


def _experts(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *inputs, keep, implementation = arguments
    operands = _Inputs(*inputs).operands()
    num_experts = len(operands.down)
    if implementation == "triton":
        permutation, _, offsets = group_choices(operands.expert_ids, num_experts, torch.int32, with_inverse=False)
        return *experts_forward_triton(operands, permutation, offsets, keep), permutation, offsets
    permutation, _, offsets = group_by_expert(operands.expert_ids, num_experts, implementation="eager")
    return *experts_forward_loop(operands, permutation, offsets, keep), permutation, offsets


def _experts_backward(grad: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    *inputs, permutation, offsets, kept, needs, implementation = arguments
    operands, wanted = _Inputs(*inputs).operands(), ExpertGradients(*needs)
    backward: Callable[..., Any] = experts_backward_triton if implementation == "triton" else experts_backward_loop
    gradients = backward(grad.contiguous(), operands, permutation, offsets, kept, wanted)
    return [gradient for gradient, need in zip(gradients, wanted, strict=True) if need]


def _fake(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *inputs, keep, implementation = arguments
    given = _Inputs(*inputs)
    num_choices = given.expert_ids.numel()
    return (
        given.hidden.new_empty(given.hidden.shape),
        given.hidden.new_empty((num_choices if keep else 0, given.gate_up.shape[1])),
        given.expert_ids.new_empty(num_choices, dtype=torch.int32 if implementation == "triton" else torch.int64),
        given.expert_ids.new_empty(len(given.gate_up) + 1, dtype=torch.int32),
    )


def _backward_fake(grad: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    *inputs, _permutation, _offsets, _kept, needs, _implementation = arguments
    values = _Inputs(*inputs).differentiable()
    return [value.new_empty(value.shape) for value, need in zip(values, needs, strict=True) if need]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *values, _keep, ctx.implementation = inputs
    _, kept, permutation, offsets = output
    ctx.mark_non_differentiable(kept, permutation, offsets)
    ctx.set_materialize_grads(False)
    ctx.numbers = [None if isinstance(value, torch.Tensor) else value for value in values]
    tensors = [value if isinstance(value, torch.Tensor) else None for value in values]
    ctx.save_for_backward(*tensors, permutation, offsets, kept)


def _backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    results: _Inputs = _NO_GRADIENTS
    if grad is not None:
        *tensors, permutation, offsets, kept = ctx.saved_tensors
        inputs = [number if tensor is None else tensor for tensor, number in zip(tensors, ctx.numbers, strict=True)]
        needs = _Inputs(*ctx.needs_input_grad[: len(_Inputs._fields)]).differentiable()
        gradients = experts_backward_op(grad, *inputs, permutation, offsets, kept, list(needs), ctx.implementation)
        wanted = [name for name, need in needs._asdict().items() if need]
        results = results._replace(**dict(zip(wanted, gradients, strict=True)))
    return (*results, None, None)  # of keep and implementation


_NO_GRADIENTS = _Inputs(*[None] * len(_Inputs._fields))

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

__all__ = ["run_operator"]
