# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Routing: from gate logits to the chosen experts and their weights, in plain torch.

Shape letters: T tokens, E routed experts, K chosen experts of a token, G expert groups.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RoutingPlan:
    """Where every token goes.

    Attributes:
        expert_ids (`torch.LongTensor` of shape (T, K)): the chosen experts, best first by the score that chose them.
        weights (`torch.FloatTensor` of shape (T, K)): their gate weights, float32, differentiable.
        scores (`torch.FloatTensor` of shape (T, E)): the affinities s_it of every token and expert, float32, without
            bias, normalisation or scaling; what the balance losses are made of.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor


def route(
    router_logits: torch.Tensor,
    top_k: int,
    *,
    score_function: str = "softmax",
    correction_bias: torch.Tensor | None = None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    group_score: str = "max",
    normalize: bool = False,
    scaling_factor: float = 1.0,
) -> RoutingPlan:
    """Choose the top-K routed experts of every token.

    The choice is made on score plus bias, inside the best groups where there are groups; experts of dropped groups
    count as -inf. The weights are the scores of the chosen experts without the bias (gathered, not recovered by
    subtraction), so that no gradient flows through the choice or the bias.

    Args:
        router_logits (`torch.Tensor` of shape (T, E)): gate logits of any floating dtype; the arithmetic is float32.
        top_k (`int`): K, at most E and at most the number of experts in `top_k_groups` groups.
        score_function (`str`): `"softmax"` (arXiv 2401.06066, eq. 5) or `"sigmoid"` (2412.19437, eq. 15).
        correction_bias (`torch.Tensor` of shape (E,), *optional*): the bias of auxiliary-loss-free balancing
            (2408.15664, eq. 3).
        num_groups, top_k_groups (`int`): groups of consecutive experts, and how many of them a token may use
            (2405.04434, section 2.2.2). `num_groups` divides E.
        group_score (`str`): `"max"` (V2) or `"top2_sum"` (V3) of the scores in a group.
        normalize (`bool`): divide the chosen scores by their sum plus 1e-20.
        scaling_factor (`float`): factor on the weights.

    Returns:
        [`RoutingPlan`].

    Raises:
        ValueError: for an unknown `score_function` or `group_score`.
    """
    logits = router_logits.float()
    if score_function == "softmax":
        scores = logits.softmax(dim=-1)
    elif score_function == "sigmoid":
        scores = logits.sigmoid()
    else:
        raise ValueError(f"score_function={score_function!r} is not allowed: it must be 'softmax' or 'sigmoid'.")

    choice_scores = scores.detach()
    if correction_bias is not None:
        choice_scores = choice_scores + correction_bias
    if top_k_groups < num_groups:
        choice_scores = _keep_best_groups(choice_scores, num_groups, top_k_groups, group_score)
    expert_ids = choice_scores.topk(top_k, dim=-1).indices

    weights = scores.gather(1, expert_ids)
    if normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return RoutingPlan(expert_ids, weights * scaling_factor, scores)


def _keep_best_groups(scores: torch.Tensor, num_groups: int, top_k_groups: int, group_score: str) -> torch.Tensor:
    """Set the scores (T, E) of all experts outside each token's best groups to -inf."""
    grouped = scores.unflatten(-1, (num_groups, -1))
    if group_score == "max":
        group_scores = grouped.amax(dim=-1)
    elif group_score == "top2_sum":
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    else:
        raise ValueError(f"group_score={group_score!r} is not allowed: it must be 'max' or 'top2_sum'.")
    best_groups = group_scores.topk(top_k_groups, dim=-1).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best_groups, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)


__all__ = ["RoutingPlan", "route"]
