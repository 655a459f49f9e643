# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The routed experts as a chain of torch's operations: grouping by expert, one product for all groups, weighted sum.

For what the fused operator does not take: other activations, other devices, several adapters at once, small experts.

Shape letters: T tokens, D hidden, E routed experts, K chosen experts, I expert width, S = T * K slots (a token at one
of its experts), G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .transformers_support import gating_of

# What a product gets: the parameter's name, the rows of all slots in the order of their groups, and the slots.
Project = Callable[[str, torch.Tensor, "GroupedSlots"], torch.Tensor]


@dataclass(frozen=True)
class GroupedSlots:
    """All slots of a forward pass in the order of their groups, stable within a group.

    Attributes:
        group_ids (`torch.LongTensor` of shape (S,)): the group of every slot, ascending.
        order (`torch.LongTensor` of shape (S,)): where each of them was in the flattened (T, K).
        offsets (`torch.IntTensor` of shape (G,)): where every group ends. Behind the last one are slots of the group
            G, experts that another rank of an expert-parallel group holds.
    """

    group_ids: torch.Tensor
    order: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, group_ids: torch.Tensor, num_groups: int) -> "GroupedSlots":
        """Group slots, without waiting for the device.

        Args:
            group_ids (`torch.LongTensor` of any shape): `num_groups` at most.
            num_groups: G.
        """
        ids, order = torch.sort(group_ids.flatten(), stable=True)
        groups = torch.arange(num_groups, device=ids.device)
        return cls(ids, order, torch.searchsorted(ids, groups, right=True, out_int32=True))

    def select(self, places: torch.Tensor) -> "GroupedSlots":
        """Some of the slots, (N,) ascending places; the groups stay the same."""
        ids, groups = self.group_ids[places], torch.arange(len(self.offsets), device=places.device)
        return GroupedSlots(ids, self.order[places], torch.searchsorted(ids, groups, right=True, out_int32=True))


def grouped_linear(rows: torch.Tensor, weight: torch.Tensor, slots: GroupedSlots) -> torch.Tensor:
    """One linear map for each group of rows.

    Args:
        rows (`torch.Tensor` of shape (S, in)): in the order of their groups.
        weight (`torch.Tensor` of shape (G, out, in)): any strides.
        slots ([`GroupedSlots`]): the groups.

    Returns:
        `torch.Tensor` of shape (S, out), in the dtype of `weight`; rows behind the last group have any content.
    """
    rows, offsets = rows.to(weight.dtype), slots.offsets
    if len(rows) == 0:
        return F.linear(rows, weight[0])
    # The second one, of transformers, makes one product after the other.
    product = F.grouped_mm if _takes_grouped_mm(weight) else torch.ops.transformers.grouped_mm_fallback
    return product(rows, weight.transpose(-2, -1), offs=offsets)


def _takes_grouped_mm(weight: torch.Tensor) -> bool:
    """torch's grouped product wants rows of whole 16 bytes, on a GPU of NVIDIA at least Ampere, and, to be compiled,
    bfloat16."""
    if torch.compiler.is_compiling() and weight.dtype != torch.bfloat16:
        return False
    known = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    aligned = known and all(width % alignment(weight.dtype) == 0 for width in weight.shape[1:])
    return aligned and not (weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0))


def alignment(dtype: torch.dtype) -> int:
    """Elements in 16 bytes, of which torch's grouped product wants a multiple in every row."""
    return 16 // dtype.itemsize


def run_grouped(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    project: Project,
    num_experts: int,
) -> torch.Tensor:
    """Sum of the chosen experts' outputs, weighted.

    Args:
        experts: the module with the activation.
        hidden_states (`torch.Tensor` of shape (T, D)).
        top_k_index (`torch.LongTensor` of shape (T, K)): expert ids; the id E, of an expert elsewhere, is passed over.
        top_k_weights (`torch.Tensor` of shape (T, K)).
        project: computes `gate_up_proj` and `down_proj` of all slots.
        num_experts: E.

    Returns:
        `torch.Tensor` of shape (T, D), in the dtype of `hidden_states`.
    """
    num_tokens, top_k = top_k_index.shape
    slots = GroupedSlots.of(top_k_index, num_experts)
    # index_select and not indexing: its backward pass adds rows, where that of indexing adds single elements.
    rows = hidden_states.index_select(0, slots.order // top_k)
    elsewhere = None
    # The products leave rows of any content there, in both passes. Only on the CPU is it free to look.
    in_view = rows.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
    if not in_view or (len(rows) and slots.group_ids[-1] >= num_experts):
        elsewhere = (slots.group_ids >= num_experts).unsqueeze(-1)
    rows = _without(rows, elsewhere)
    rows = project("gate_up_proj", rows, slots)
    rows = project("down_proj", gating_of(experts)(_without(rows, elsewhere)), slots)
    rows = _without(rows, elsewhere) * top_k_weights.flatten().index_select(0, slots.order).unsqueeze(-1)
    back = torch.empty_like(slots.order)
    back[slots.order] = torch.arange(len(back), device=back.device)
    output = rows.index_select(0, back).view(num_tokens, top_k, rows.shape[-1]).sum(dim=1)
    return output.to(hidden_states.dtype)


def _without(rows: torch.Tensor, elsewhere: torch.Tensor | None) -> torch.Tensor:
    return rows if elsewhere is None else rows.masked_fill(elsewhere, 0)


__all__ = ["GroupedSlots", "Project", "alignment", "grouped_linear", "run_grouped"]
