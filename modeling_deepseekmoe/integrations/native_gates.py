# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Route transformers' own DeepSeek-V2 and V3 models with this package: the same choices in fewer launches."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..configuration_checks import check_implementation
from ..routing import route
from ..support.library_support import replace_forward
from ..transformers_support import DeepseekV2TopkRouter, DeepseekV3TopkRouter


def route_native_gates(model: nn.Module, implementation: str = "auto") -> int:
    """Let the gates of a transformers model, `deepseek_v2` or `deepseek_v3`, choose the experts with [`route`].

    Weights, outputs and what is computed stay as transformers has them: V2's `norm_topk_prob` still has no effect.
    Only the order of a token's choices changes: best first, and ties go to the lower id. The `forward` of the gates is
    replaced, so call this after loading, and before `torch.compile`. Call it again to change the implementation.

    Args:
        model: any module that holds such gates.
        implementation (`str`): as for [`route`].

    Returns:
        `int`: the number of gates.

    Raises:
        ValueError: if `implementation` is another one, or if the model has no such gates.
    """
    check_implementation(implementation)
    forwards = {DeepseekV2TopkRouter: _forward_v2, DeepseekV3TopkRouter: _forward_v3}
    gates = [module for module in model.modules() if type(module) in forwards]
    if not gates:
        raise ValueError(
            f"model of class {type(model).__name__} is not allowed: it must hold gates of transformers' own "
            "DeepSeek-V2 or V3 classes."
        )
    for gate in gates:
        replace_forward(gate, partial(forwards[type(gate)], gate, implementation))
    return len(gates)


def _forward_v2(
    gate: nn.Module, implementation: str, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    limited = gate.topk_method == "group_limited_greedy"
    router_logits = _router_logits(gate, hidden_states)
    routing = route(
        router_logits,
        gate.top_k,
        num_groups=gate.num_group if limited else 1,
        top_k_groups=gate.topk_group if limited else 1,
        scaling_factor=gate.routed_scaling_factor,
        statistics=False,
        implementation=implementation,
    )
    return router_logits, routing.weights, routing.expert_ids


def _forward_v3(
    gate: nn.Module, implementation: str, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    router_logits = _router_logits(gate, hidden_states)
    routing = route(
        router_logits,
        gate.top_k,
        score_function="sigmoid",
        correction_bias=gate.e_score_correction_bias,
        num_groups=gate.num_group,
        top_k_groups=gate.topk_group,
        group_score="top2_sum",
        normalize=gate.norm_topk_prob,
        scaling_factor=gate.routed_scaling_factor,
        statistics=False,
        implementation=implementation,
    )
    return router_logits, routing.weights, routing.expert_ids


def _router_logits(gate: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden_states.view(-1, gate.hidden_dim).float(), gate.weight.float())


__all__ = ["route_native_gates"]
