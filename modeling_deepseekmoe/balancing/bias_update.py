# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The update of the gates' bias after every optimizer step: auxiliary-loss-free balancing (arXiv 2408.15664).

It works on the models of this package, which count their choices themselves, and on every other model whose gates have
a balancing bias, under whatever name (`families.moe_layers`). [`track_router_load`] switches the counting on there.
"""

import math
from typing import Any

import torch
from torch import nn

from ..families.moe_layers import find_moe_layers
from ..router_load import RouterLoad
from .gates import require_biased_gates, tell_kept
from .tracking import router_load_counter, take_router_load

UPDATES = ("sign", "centered_sign", "proportional")


def bias_step(tokens_per_expert: torch.Tensor, update_rate: float = 1e-3, update: str = "sign") -> torch.Tensor:
    """Compute what one update adds to the bias.

    c_i is the load of an expert over the whole global batch, and e_i = mean(c) - c_i is its violation:

    - `"sign"`: gamma * sign(e_i) (arXiv 2408.15664, algorithm 1; V3),
    - `"centered_sign"`: gamma * (sign(e_i) - mean(sign(e))), which keeps the sum of the bias (Moonlight),
    - `"proportional"`: gamma * e_i / mean(c), the violation itself relative to the mean load.

    The sign is taken of whole numbers, and is exact.

    Args:
        tokens_per_expert (`torch.LongTensor` of shape (..., E)): c.
        update_rate (`float`): gamma, above 0.
        update (`str`): the rule.

    Returns:
        `torch.FloatTensor` of shape (..., E); 0 for a layer without tokens.

    Raises:
        ValueError: for an unknown rule or a rate that is not a positive number.
    """
    check_update(update_rate, update)
    counts = tokens_per_expert.long()
    total = counts.sum(dim=-1, keepdim=True)
    violation = total - counts.shape[-1] * counts  # E times the paper's
    if update == "proportional":
        return update_rate * (violation / total.clamp(min=1)).float()
    step = violation.sign().float()
    if update == "centered_sign":
        step = step - step.mean(dim=-1, keepdim=True)
    return update_rate * step


def check_update(update_rate: float, update: str) -> None:
    """Raise a `ValueError` for an unknown rule or a rate that is not a positive number."""
    if update not in UPDATES:
        raise ValueError(f"update={update!r} is not allowed: it must be one of {', '.join(map(repr, UPDATES))}.")
    if not isinstance(update_rate, (int, float)) or isinstance(update_rate, bool) or not 0 < update_rate < math.inf:
        raise ValueError(f"update_rate={update_rate!r} is not allowed: it must be a finite number above 0.")


def update_router_bias(
    model: nn.Module, update_rate: float = 1e-3, update: str = "sign", *, process_group: Any = None
) -> RouterLoad:
    """Update the bias of a model's gates from the tokens of the whole global batch. Call it after `optimizer.step()`.

    The counts of all micro-batches since the last call are summed over the ranks, so that every rank makes the same
    update. Only forward passes in training mode and with gradients count. Padding never counts. Gates of which nothing
    is trained keep their bias. So do gates that PEFT adapts, unless it trains whole copies: the adapter's file would
    not hold the bias. A line in the log says so once.

    Args:
        model: a model of this package, or another one after [`track_router_load`]; wrapped or not.
        update_rate (`float`): gamma, above 0.
        update (`str`): `"sign"`, `"centered_sign"` or `"proportional"`, see [`bias_step`].
        process_group: the data-parallel ranks; `None` for all.

    Returns:
        The [`RouterLoad`] of the step, summed over the ranks, for [`RouterStats`] to add.

    Raises:
        ValueError: for a model without a balancing bias, if nothing was counted, or for arguments that are not
            allowed.
    """
    check_update(update_rate, update)
    layers = find_moe_layers(model)
    gates = require_biased_gates(model, layers)
    counter = router_load_counter(model)
    if len(layers) != len(counter.layers):
        raise ValueError(
            f"{type(model).__name__} holds {len(layers)} MoE layers and counts {len(counter.layers)}: it takes one "
            "whole model, not several in one module and no stage of a pipeline."
        )
    load = take_router_load(model, process_group=process_group)
    steps = bias_step(load.tokens_per_expert, update_rate, update)
    for gate in gates:
        if gate.is_kept is None:
            gate.add(steps[gate.place])
    tell_kept(gates)
    counter.is_balanced = True
    return load


__all__ = ["UPDATES", "bias_step", "check_update", "update_router_bias"]
