# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Token dropping in training: a device that gets too many tokens leaves out those with the lowest affinity."""

import torch

from .routing import Routing


def drop_tokens(
    routing: Routing,
    scores: torch.Tensor,
    num_device_groups: int,
    capacity_factor: float,
    *,
    token_mask: torch.Tensor | None = None,
    protected: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop the choices beyond the budget of each device (arXiv 2405.04434, section 2.2.4).

    The experts lie on D devices in equal groups of consecutive experts. A device's budget is
    `capacity_factor * T * K / D` choices, rounded up. T is the number of real tokens of this micro-batch on this rank.
    The choices of the highest affinity stay inside the budget, and of equal ones the earlier. All others are dropped.
    Protected tokens use the budget up, but are never dropped.

    Args:
        routing: the [`Routing`] of T tokens.
        scores (`torch.Tensor` of shape (T, E)): their affinities.
        num_device_groups (`int`): D, a divisor of E.
        capacity_factor (`float`): above 0; 1.0 in the paper.
        token_mask (`torch.Tensor` of shape (T,), *optional*): nonzero for real tokens. Padding neither uses the budget
            nor is dropped.
        protected (`torch.BoolTensor` of shape (T,), *optional*): tokens whose choices are all kept.

    Returns:
        The gate weights (T, K) with 0 for dropped choices, and the number of dropped choices, an int64 scalar.
    """
    expert_ids = routing.expert_ids
    num_tokens, top_k = expert_ids.shape
    num_experts = scores.shape[-1]
    real = expert_ids.new_ones(num_tokens, dtype=torch.bool) if token_mask is None else token_mask != 0
    # The small amount keeps a product that is whole in exact arithmetic from being rounded up.
    budget = (real.sum().double() * (capacity_factor * top_k / num_device_groups) - 1e-6).ceil()

    # Every device's choices from the highest affinity to the lowest, protected ones first: a choice's place in that
    # order decides. One sort by affinity, then a stable one by device.
    affinity = scores.detach().gather(1, expert_ids)
    if protected is not None:
        affinity = affinity.masked_fill(protected.unsqueeze(-1), float("inf"))
    takes_part = real.unsqueeze(-1).expand(-1, top_k).flatten()
    devices = expert_ids // (num_experts // num_device_groups)
    devices = devices.flatten().masked_fill(~takes_part, num_device_groups)
    by_affinity = affinity.flatten().argsort(descending=True, stable=True)
    order = by_affinity[devices[by_affinity].argsort(stable=True)]
    counts = torch.zeros(num_device_groups + 1, dtype=torch.long, device=devices.device)
    counts = counts.scatter_add_(0, devices, torch.ones_like(devices))
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    place = place - starts[devices]

    dropped = takes_part & (place >= budget)
    if protected is not None:
        dropped &= ~protected.unsqueeze(-1).expand(-1, top_k).flatten()
    return routing.weights.masked_fill(dropped.view_as(expert_ids), 0.0), dropped.sum()


__all__ = ["drop_tokens"]
