# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The order of all tokens' choices by expert, so that each expert computes its tokens together.

There are two implementations of the same function: `"eager"` in plain torch here, and `"triton"` in `routing_triton`.

Shape letters: T tokens, E routed experts, K chosen experts of a token.
"""

from typing import NamedTuple

import torch

from .kernel_trial import compare, register_trial
from .routing_triton import group_by_expert_triton, uses_triton

TRIAL = "grouping"


class ExpertGroups(NamedTuple):
    """The choices of all tokens, in the order of their experts. Choice `s` is the `s % K`-th of token `s // K`.

    Attributes:
        permutation (`torch.LongTensor` of shape (T * K,)): the choices expert by expert. Those of an expert are in the
            order of the tokens.
        inverse (`torch.LongTensor` of shape (T * K,)): the place of each choice in `permutation`.
        offsets (`torch.IntTensor` of shape (E + 1,)): expert `i` has `permutation[offsets[i] : offsets[i + 1]]`.
            `torch._grouped_mm` takes `offsets[1:]`.
    """

    permutation: torch.Tensor
    inverse: torch.Tensor
    offsets: torch.Tensor


def group_by_expert(expert_ids: torch.Tensor, num_experts: int, *, implementation: str = "auto") -> ExpertGroups:
    """Bring the choices of all tokens into the order of their experts, without waiting for the host.

    Args:
        expert_ids (`torch.LongTensor` or `torch.IntTensor` of shape (T, K)): the choices, from 0 to E - 1. The id E
            stands for an expert that another rank of an expert-parallel group holds: such choices come last, behind
            `offsets[E]`. Other ids are not checked for, and give an order that means nothing.
        num_experts (`int`): E.
        implementation (`str`): as for [`route`].

    Returns:
        [`ExpertGroups`].

    Raises:
        ValueError: if the ids are not integers of shape (T, K), or if there is less than one expert.
    """
    if expert_ids.ndim != 2 or expert_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"expert_ids of shape {tuple(expert_ids.shape)} and {expert_ids.dtype} are not allowed: they must be "
            "int64 or int32 of shape (T, K)."
        )
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} is not allowed: it must be at least 1.")
    if expert_ids.numel() > 2**30:
        raise ValueError(f"expert_ids of {expert_ids.numel()} choices are not allowed: offsets are int32, for 2^30.")
    if uses_triton(TRIAL, implementation, expert_ids, num_experts):
        return ExpertGroups(*group_by_expert_triton(expert_ids, num_experts))
    ids = expert_ids.flatten()
    if num_experts < 2**15 - 1:
        ids = ids.to(torch.int16)  # sorted several times as fast on the CPU
    ids, permutation = ids.sort(stable=True)
    places = torch.arange(len(permutation), device=ids.device)
    inverse = torch.empty_like(permutation).scatter_(0, permutation, places)
    bounds = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    return ExpertGroups(permutation, inverse, torch.searchsorted(ids, bounds, out_int32=True))


@register_trial(TRIAL)
def try_grouping(device: torch.device) -> None:
    """Compare the kernels of grouping with plain torch: several runs, experts without choices, and choices elsewhere.

    Raises:
        WrongKernelError: if they differ.
    """
    ids = torch.randint(0, 7, (90, 3), generator=torch.Generator().manual_seed(0)) * 5  # 0 to 30, every fifth
    expected = group_by_expert(ids, 29, implementation="eager")
    for name, found, other in zip(
        ExpertGroups._fields, group_by_expert_triton(ids.to(device), 29), expected, strict=True
    ):
        compare(f"the {name}", found, other, 0.0)


__all__ = ["TRIAL", "ExpertGroups", "group_by_expert", "try_grouping"]
