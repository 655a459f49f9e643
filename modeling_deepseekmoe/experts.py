# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The routed experts as grouped products: grouping by expert, one product for each group, weighted sum.

LoRA on the experts and the training of chosen experts put their own products in place of the two projections. Works on
every experts module of transformers that stacks its weights as `gate_up_proj` (E, 2I, D) and `down_proj` (E, D, I).

Shape letters: T tokens, D hidden, E routed experts, K chosen experts, I expert width, S = T * K slots (a token at one
of its experts), G groups.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .checkpoint_layout import STACKS

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# What a product gets: the parameter's name, the rows of all slots in the order of their groups, and the slots.
Project = Callable[[str, torch.Tensor, "GroupedSlots"], torch.Tensor]


@dataclass(frozen=True)
class GroupedSlots:
    """All slots of a forward pass in the order of their groups, stable within a group.

    Attributes:
        group_ids (`torch.LongTensor` of shape (S,)): the group of every slot, ascending.
        order (`torch.LongTensor` of shape (S,)): where each of them was in the flattened (T, K).
        offsets (`torch.IntTensor` of shape (G,)): where every group ends.
    """

    group_ids: torch.Tensor
    order: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, group_ids: torch.Tensor, num_groups: int) -> "GroupedSlots":
        """Group slots, without waiting for the device.

        Args:
            group_ids (`torch.LongTensor` of any shape): below `num_groups`.
            num_groups: G.
        """
        ids, order = torch.sort(group_ids.flatten(), stable=True)
        groups = torch.arange(num_groups, device=ids.device)
        return cls(ids, order, torch.searchsorted(ids, groups, right=True, out_int32=True))

    def select(self, places: torch.Tensor) -> "GroupedSlots":
        """Some of the slots, (N,) ascending places; the groups stay the same."""
        ids, groups = self.group_ids[places], torch.arange(len(self.offsets), device=places.device)
        return GroupedSlots(ids, self.order[places], torch.searchsorted(ids, groups, right=True, out_int32=True))


_uncompiled_grouped_mm = torch.compiler.disable(F.grouped_mm)  # torch.compile takes it in bfloat16 only


def grouped_linear(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """One linear map for each group of rows.

    Args:
        rows (`torch.Tensor` of shape (S, in)): in the order of their groups.
        weight (`torch.Tensor` of shape (G, out, in)): any strides.
        offsets (`torch.IntTensor` of shape (G,)): where every group ends; the last one is S.

    Returns:
        `torch.Tensor` of shape (S, out), in the dtype of `weight`.
    """
    rows = rows.to(weight.dtype)
    if len(rows) == 0:
        return F.linear(rows, weight[0])
    if _takes_grouped_mm(weight):
        product = F.grouped_mm if weight.dtype == torch.bfloat16 else _uncompiled_grouped_mm
        return product(rows, weight.transpose(-2, -1), offs=offsets)
    ends = offsets.tolist()  # one product after the other
    groups = rows.split([end - start for start, end in zip([0, *ends], ends, strict=False)])
    return torch.cat([F.linear(group, own) for group, own in zip(groups, weight.unbind(), strict=True)])


def _takes_grouped_mm(weight: torch.Tensor) -> bool:
    """torch's grouped product wants rows of whole 16 bytes, and on a GPU of NVIDIA at least Ampere."""
    aligned = all(width % alignment(weight.dtype) == 0 for width in weight.shape[1:])
    return aligned and not (weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0))


def alignment(dtype: torch.dtype) -> int:
    """Elements in 16 bytes, of which torch's grouped product wants a multiple in every row."""
    return 16 // dtype.itemsize


def find_experts(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """The stacked experts of a model by their layers' indices: the name of the module (without PEFT's wrappers), and
    the module that holds the parameters."""
    found = {}
    for name, module in model.named_modules():
        stacks = [module._parameters.get(projection) for projection in STACKS]
        layer = LAYER.search(name)
        if layer is not None and all(stack is not None and stack.ndim == 3 for stack in stacks):
            found[int(layer[1])] = (name.replace(".base_layer", ""), module)
    return found


def why_unsupported(experts: nn.Module) -> str | None:
    """Why these experts cannot be computed by [`run_experts`], or `None` where they can."""
    for name in STACKS:
        parameter = getattr(experts, name, None)
        if not isinstance(parameter, torch.Tensor) or parameter.ndim != 3:
            return f"it has no stacked parameter {name} (E, out, in)"
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            return f"its {name} is stored as {parameter.dtype}"
    for flag, wanted, meaning in (
        ("has_gate", True, "its experts have no gate projection"),
        ("has_bias", False, "its experts have biases"),
        ("is_transposed", False, "its weights are stored transposed"),
        ("has_post_expert_norm", False, "its experts end with a norm"),
    ):
        if getattr(experts, flag, wanted) is not wanted:
            return meaning
    if hasattr(experts, "selected_ids"):
        return "some of its experts are trained apart; call merge_esft first"
    if not hasattr(experts, "_apply_gate"):
        return "it is not one of transformers' exchangeable experts implementations"
    return None


def run_experts(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    project: Project,
    group_ids: torch.Tensor | None = None,
    num_groups: int | None = None,
) -> torch.Tensor:
    """Sum of the chosen experts' outputs, weighted.

    Args:
        experts: the module with the activation and the number of experts.
        hidden_states (`torch.Tensor` of shape (T, D)).
        top_k_index (`torch.LongTensor` of shape (T, K)): expert ids.
        top_k_weights (`torch.Tensor` of shape (T, K)).
        project: computes `gate_up_proj` and `down_proj` of all slots.
        group_ids, num_groups: how to group the slots, (T, K) and G; by expert unless given.

    Returns:
        `torch.Tensor` of shape (T, D), in the dtype of `hidden_states`.

    Raises:
        ValueError: under expert parallelism, where a rank holds only some of the experts, and for weights that are
            offloaded.
    """
    if getattr(experts, "_is_expert_parallel", False):
        raise ValueError("Expert parallelism is not allowed together with adapted or partly trained experts.")
    if experts.gate_up_proj.is_meta:
        raise ValueError("Offloaded weights are not allowed together with adapted or partly trained experts.")
    if group_ids is None or num_groups is None:
        group_ids, num_groups = top_k_index, experts.gate_up_proj.shape[0]
    num_tokens, top_k = top_k_index.shape
    slots = GroupedSlots.of(group_ids, num_groups)
    # index_select and not indexing: its backward pass adds rows, where that of indexing adds single elements.
    rows = hidden_states.index_select(0, slots.order // top_k)
    rows = experts._apply_gate(project("gate_up_proj", rows, slots))
    rows = project("down_proj", rows, slots)
    rows = rows * top_k_weights.flatten().index_select(0, slots.order).unsqueeze(-1)
    back = torch.empty_like(slots.order)
    back[slots.order] = torch.arange(len(back), device=back.device)
    output = rows.index_select(0, back).view(num_tokens, top_k, rows.shape[-1]).sum(dim=1)
    return output.to(hidden_states.dtype)


__all__ = [
    "LAYER",
    "GroupedSlots",
    "Project",
    "alignment",
    "find_experts",
    "grouped_linear",
    "run_experts",
    "why_unsupported",
]
