# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The backend `"grouped"` of the routed experts: a chain of torch's operations.

It groups the choices by expert, computes one product for all groups, and sums with the weights. It is for what the
fused operator does not take: other activations, other devices, several adapters at once, small experts.

Shape letters: T tokens, D hidden, E routed experts, K chosen experts, I expert width, S = T * K choices (a token at
one of its experts).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .experts_quantized import QuantizedStack
from .grouping import group_by_expert
from .transformers_support import gating_of

# What a product gets: the parameter's name, the rows of all choices in the order of their experts, and the choices.
Project = Callable[[str, torch.Tensor, "GroupedChoices"], torch.Tensor]


# Bytes of the decoded experts of a quantised stack that there are at a time.
WORKSPACE = 2**28


class GroupedChoices(NamedTuple):
    """Choices in the order of their experts, as the grouped products take them.

    Attributes:
        expert_ids (`torch.LongTensor` of shape (S,)): the expert of every choice, ascending.
        order (`torch.LongTensor` of shape (S,)): the index of each choice in the flattened (T, K).
        offsets (`torch.IntTensor` of shape (E,)): the end of every expert's choices. Behind the last end lie the
            choices with the id E: their experts are held by another rank of an expert-parallel group.
    """

    expert_ids: torch.Tensor
    order: torch.Tensor
    offsets: torch.Tensor

    def select(self, places: torch.Tensor) -> "GroupedChoices":
        """Select some of the choices by their places, (N,) in ascending order."""
        ids, experts = self.expert_ids[places], torch.arange(len(self.offsets), device=places.device)
        return GroupedChoices(ids, self.order[places], torch.searchsorted(ids, experts, right=True, out_int32=True))


def grouped_linear(rows: torch.Tensor, weight: torch.Tensor | QuantizedStack, choices: GroupedChoices) -> torch.Tensor:
    """Apply one linear map for each expert to its rows.

    Args:
        rows (`torch.Tensor` of shape (S, in)): in the order of their experts.
        weight (`torch.Tensor` of shape (E, out, in), or a [`QuantizedStack`]): any strides. Of a quantised stack some
            experts are decoded at a time, `WORKSPACE` bytes of them.
        choices ([`GroupedChoices`]): the choices that the rows belong to.

    Returns:
        `torch.Tensor` of shape (S, out), in the dtype of `weight`. Rows behind those of the last expert have any
        content.
    """
    rows, offsets = rows.to(weight.dtype), choices.offsets
    if isinstance(weight, QuantizedStack):
        return _QuantizedLinear.apply(rows, weight, offsets)
    if len(rows) == 0:
        return F.linear(rows, weight[0])
    # The second one, of transformers, makes one product after the other.
    product = F.grouped_mm if _takes_grouped_mm(weight) else torch.ops.transformers.grouped_mm_fallback
    return product(rows, weight.transpose(-2, -1), offs=offsets)


class _QuantizedLinear(torch.autograd.Function):
    """Products with a quantised stack, whose decoded experts are not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, stack: QuantizedStack, offsets: torch.Tensor) -> torch.Tensor:
        ctx.stack, ctx.offsets = stack, offsets
        output = rows.new_zeros(len(rows), stack.shape[1])
        for matrices, places, ends in _decoded(stack, offsets):
            output[places] = grouped_linear(rows[places], matrices, GroupedChoices(ends, ends, ends))
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        stack = ctx.stack
        result = grad.new_zeros(len(grad), stack.shape[2])
        for matrices, places, ends in _decoded(stack, ctx.offsets):
            part = grad[places].contiguous()
            result[places] = grouped_linear(part, matrices.transpose(1, 2), GroupedChoices(ends, ends, ends))
        return result, None, None


def _decoded(stack: QuantizedStack, offsets: torch.Tensor) -> Iterator[tuple[torch.Tensor, slice, torch.Tensor]]:
    """Decode some experts at a time, and only where there are choices.

    Returns:
        For each group the matrices (n, out, in), the places of its choices, and their ends within the group (n,).
    """
    ends = [0, *offsets.tolist()]
    for experts, matrices in decoded_runs(stack, ends):
        places = slice(ends[experts.start], ends[experts.stop])
        yield matrices, places, offsets[experts] - places.start


def experts_at_a_time(stack: QuantizedStack) -> int:
    """Compute how many decoded experts of a stack fit into `WORKSPACE` bytes; at least one, and no more than all."""
    _, rows, columns = stack.shape
    return min(max(WORKSPACE // (rows * columns * stack.dtype.itemsize), 1), len(stack))


def decoded_runs(stack: QuantizedStack, ends: Sequence[int]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Decode some experts that have choices at a time, neighbours, into the same memory.

    Args:
        stack: the stack.
        ends: the offsets of the experts' choices, (E + 1,).

    Returns:
        For each run the numbers of its experts, and their matrices (n, out, in).
    """
    number = experts_at_a_time(stack)
    workspace = stack.new_workspace(number)
    for experts in runs_of(ends, number):
        yield experts, stack.decode(experts, workspace[: experts.stop - experts.start])


def runs_of(ends: Sequence[int], number: int) -> list[slice]:
    """Divide the experts that have choices into runs of neighbours, of at most so many.

    Args:
        ends: the offsets of the experts' choices, (E + 1,).
        number: the most experts of a run.
    """
    runs: list[slice] = []
    for expert in range(len(ends) - 1):
        if ends[expert] == ends[expert + 1]:
            continue
        if runs and runs[-1].stop == expert and expert - runs[-1].start < number:
            runs[-1] = slice(runs[-1].start, expert + 1)
        else:
            runs.append(slice(expert, expert + 1))
    return runs


def _takes_grouped_mm(weight: torch.Tensor) -> bool:
    """Tell whether torch's grouped product takes a stack.

    Its rows must be whole multiples of 16 bytes. A GPU of NVIDIA must be at least Ampere. To be compiled, the stack
    must be bfloat16.
    """
    if torch.compiler.is_compiling() and weight.dtype != torch.bfloat16:
        return False
    known = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    aligned = known and all(width % alignment(weight.dtype) == 0 for width in weight.shape[1:])
    return aligned and not (weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0))


def alignment(dtype: torch.dtype) -> int:
    """Return the number of elements in 16 bytes. torch's grouped product wants a multiple of it in every row."""
    return 16 // dtype.itemsize


def run_grouped(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    project: Project,
    num_experts: int,
) -> torch.Tensor:
    """Compute the weighted sum of the chosen experts' outputs.

    Args:
        experts: the module with the activation.
        hidden_states (`torch.Tensor` of shape (T, D)).
        top_k_index (`torch.LongTensor` of shape (T, K)): expert ids. The id E, of an expert elsewhere, is passed over.
        top_k_weights (`torch.Tensor` of shape (T, K)).
        project: computes `gate_up_proj` and `down_proj` of all choices.
        num_experts: E.

    Returns:
        `torch.Tensor` of shape (T, D), in the dtype of `hidden_states`.
    """
    num_tokens, top_k = top_k_index.shape
    groups = group_by_expert(top_k_index, num_experts)
    choices = GroupedChoices(
        top_k_index.flatten().index_select(0, groups.permutation), groups.permutation, groups.offsets[1:]
    )
    # index_select and not indexing: its backward pass adds rows, where that of indexing adds single elements.
    rows = hidden_states.index_select(0, choices.order // top_k)
    elsewhere = None
    # The products leave rows of any content there, in both passes. Only on the CPU is it free to look.
    in_view = rows.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
    if not in_view or (len(rows) and choices.expert_ids[-1] >= num_experts):
        elsewhere = (choices.expert_ids >= num_experts).unsqueeze(-1)
    rows = _without(rows, elsewhere)
    rows = project("gate_up_proj", rows, choices)
    rows = project("down_proj", gating_of(experts)(_without(rows, elsewhere)), choices)
    rows = _without(rows, elsewhere) * top_k_weights.flatten().index_select(0, choices.order).unsqueeze(-1)
    output = rows.index_select(0, groups.inverse).view(num_tokens, top_k, rows.shape[-1]).sum(dim=1)
    return output.to(hidden_states.dtype)


def _without(rows: torch.Tensor, elsewhere: torch.Tensor | None) -> torch.Tensor:
    return rows if elsewhere is None else rows.masked_fill(elsewhere, 0)


__all__ = [
    "GroupedChoices",
    "Project",
    "alignment",
    "decoded_runs",
    "experts_at_a_time",
    "grouped_linear",
    "run_grouped",
    "runs_of",
]
