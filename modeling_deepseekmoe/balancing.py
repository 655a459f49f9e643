# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Balance losses, as pure functions of affinities and choices."""

import torch


def expert_balance_loss(
    scores: torch.Tensor,
    expert_ids: torch.Tensor,
    alpha: float,
    *,
    token_mask: torch.Tensor | None = None,
    sequence_wise: bool = True,
) -> torch.Tensor:
    """Expert-level balance loss, alpha * sum_i f_i P_i (arXiv 2401.06066, eq. 12 to 14).

    f_i = E / (K T) * (tokens that chose expert i) and P_i = mean over tokens of the affinity s_it; only P carries a
    gradient. A perfectly balanced router gives exactly alpha. Affinities that do not sum to one (a sigmoid gate's)
    are divided by their sum over the experts first (2412.19437, eq. 19).

    Args:
        scores (`torch.Tensor` of shape (B, S, E)): affinities of every token and routed expert.
        expert_ids (`torch.LongTensor` of shape (B, S, K)): the chosen experts.
        alpha (`float`): coefficient.
        token_mask (`torch.Tensor` of shape (B, S), *optional*): nonzero for real tokens. Padding enters neither f nor
            P, and a sequence of nothing but padding does not enter the mean over sequences.
        sequence_wise (`bool`): compute f and P for each sequence and average the losses (`seq_aux` in the official
            configs), instead of over all tokens of the batch.

    Returns:
        `torch.Tensor`: a float32 scalar (float64 for float64 scores); 0 where every token is padding.

    Raises:
        ValueError: if `token_mask` is not of shape (B, S).
    """
    if token_mask is not None and token_mask.shape != scores.shape[:2]:
        raise ValueError(
            f"token_mask of shape {tuple(token_mask.shape)} is not allowed: it must be (batch, sequence) = "
            f"{tuple(scores.shape[:2])}."
        )
    num_experts, top_k = scores.shape[-1], expert_ids.shape[-1]
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    mask = scores.new_ones(scores.shape[:2]) if token_mask is None else (token_mask != 0).to(scores)
    if not sequence_wise:
        scores, expert_ids, mask = scores.flatten(0, 1)[None], expert_ids.flatten(0, 1)[None], mask.flatten()[None]

    tokens = mask.sum(dim=1)  # (B,)
    divisor = tokens.clamp(min=1).unsqueeze(-1)
    choices = torch.zeros_like(scores[:, 0]).scatter_add_(
        1, expert_ids.flatten(1), mask.repeat_interleave(top_k, dim=1)
    )
    f = choices * num_experts / (top_k * divisor)  # (B, E)
    p = (scores * mask.unsqueeze(-1)).sum(dim=1) / divisor  # (B, E)
    sequences = (tokens > 0).sum().clamp(min=1)
    return alpha * (f * p).sum() / sequences


__all__ = ["expert_balance_loss"]
