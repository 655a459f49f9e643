# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The balance losses of training, and the measure of imbalance, as pure functions of affinities and choices.

Shape letters: B batch, S sequence, E routed experts, K chosen experts of a token, D device groups.

Only the affinities carry a gradient. How often an expert or a device was chosen is a constant. Padding enters neither
the frequencies nor the means. A sequence of nothing but padding does not enter the mean over sequences. The arithmetic
is float32, or float64 for float64 input.
"""

import math
from typing import Any, NamedTuple

import torch

from .configuration_checks import LOSS_FIELDS
from .configuration_deepseekmoe import DeepseekMoeConfig
from .routing import Routing, route
from .routing_eager import shares_of

# The order of the losses wherever they stand in one vector.
LOSS_NAMES = tuple(LOSS_FIELDS)


def expert_balance_loss(
    scores: torch.Tensor,
    expert_ids: torch.Tensor,
    alpha: float,
    *,
    token_mask: torch.Tensor | None = None,
    sequence_wise: bool = True,
) -> torch.Tensor:
    """Compute the expert-level balance loss, alpha * sum_i f_i P_i (arXiv 2401.06066, eq. 12 to 14).

    f_i = E / (K T) * (tokens that chose expert i). P_i is the mean over tokens of the affinity s_it. A perfectly
    balanced gate gives exactly alpha. Affinities that do not sum to one, as a sigmoid gate's, are first divided by
    their sum over the experts (2412.19437, eq. 19).

    Args:
        scores (`torch.Tensor` of shape (B, S, E)): affinities of every token and routed expert.
        expert_ids (`torch.LongTensor` of shape (B, S, K)): the chosen experts.
        alpha (`float`): coefficient, at least 0.
        token_mask (`torch.Tensor` of shape (B, S), *optional*): nonzero for real tokens.
        sequence_wise (`bool`): compute f and P for each sequence, and average the losses (`seq_aux` in the official
            configs). If `False`, compute them over all tokens of the batch.

    Returns:
        `torch.Tensor`: a scalar; 0 where every token is padding.

    Raises:
        ValueError: if `alpha` is negative, or if the shapes do not fit together.
    """
    _check(alpha, scores, token_mask, expert_ids)
    return alpha * _balance(scores, expert_ids, token_mask, sequence_wise).expert_loss()


def device_balance_loss(
    scores: torch.Tensor,
    expert_ids: torch.Tensor,
    alpha: float,
    num_device_groups: int,
    *,
    token_mask: torch.Tensor | None = None,
    sequence_wise: bool = True,
) -> torch.Tensor:
    """Compute the device-level balance loss, alpha * sum_d f'_d P'_d (arXiv 2401.06066, eq. 15 to 17).

    The experts lie on D devices, in equal groups of consecutive experts. f'_d is the mean of f_i over the group of
    device d, and P'_d is the sum of P_i. f and P are those of [`expert_balance_loss`]. Perfectly balanced devices give
    exactly alpha.

    Args:
        scores, expert_ids, token_mask, sequence_wise: as for [`expert_balance_loss`].
        alpha (`float`): coefficient, at least 0.
        num_device_groups (`int`): D, a divisor of E.

    Returns:
        `torch.Tensor`: a scalar.

    Raises:
        ValueError: if `alpha` is negative, if D does not divide E, or if the shapes do not fit together.
    """
    _check(alpha, scores, token_mask, expert_ids)
    _check_device_groups(num_device_groups, scores.shape[-1])
    return alpha * _balance(scores, expert_ids, token_mask, sequence_wise).device_loss(num_device_groups)


def communication_balance_loss(
    scores: torch.Tensor,
    expert_ids: torch.Tensor,
    alpha: float,
    num_device_groups: int,
    max_devices_per_token: int,
    *,
    token_mask: torch.Tensor | None = None,
    sequence_wise: bool = True,
) -> torch.Tensor:
    """Compute the communication balance loss, alpha * sum_d f''_d P''_d (arXiv 2405.04434, eq. 29 to 31).

    f''_d = D / (M T) * (tokens sent to device d). A token counts once for a device, however many of its experts lie
    there. P''_d is the sum of P_i over the group of the device. The loss is alpha where every token is sent to M
    devices and every device gets equally many tokens.

    Args:
        scores, expert_ids, token_mask, sequence_wise: as for [`expert_balance_loss`].
        alpha (`float`): coefficient, at least 0.
        num_device_groups (`int`): D, a divisor of E.
        max_devices_per_token (`int`): M, between 1 and D.

    Returns:
        `torch.Tensor`: a scalar.

    Raises:
        ValueError: if `alpha` is negative, if D does not divide E, if M is outside 1 to D, or if the shapes do not fit
            together.
    """
    _check(alpha, scores, token_mask, expert_ids)
    _check_device_groups(num_device_groups, scores.shape[-1])
    if not 1 <= max_devices_per_token <= num_device_groups:
        raise ValueError(
            f"max_devices_per_token={max_devices_per_token} is not allowed: it must lie between 1 and "
            f"num_device_groups={num_device_groups}."
        )
    balance = _balance(scores, expert_ids, token_mask, sequence_wise)
    sent = _tokens_per_device(expert_ids, token_mask, num_device_groups, scores.shape[-1])
    return alpha * balance.communication_loss(sent, max_devices_per_token)


def sequence_balance_loss(
    scores: torch.Tensor, top_k: int, alpha: float, *, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the complementary sequence-wise balance loss (arXiv 2412.19437, eq. 17 to 20).

    The loss is alpha * sum_i f_i P_i for every sequence, averaged over the sequences. It differs from
    [`expert_balance_loss`] in one point: f counts the K highest affinities themselves. The balancing bias and the
    groups decide where a token really goes, but they do not enter f.

    Args:
        scores (`torch.Tensor` of shape (B, S, E)): affinities, without bias.
        top_k (`int`): K, between 1 and E.
        alpha (`float`): coefficient, at least 0.
        token_mask (`torch.Tensor` of shape (B, S), *optional*): nonzero for real tokens.

    Returns:
        `torch.Tensor`: a scalar.

    Raises:
        ValueError: if `alpha` is negative, if K is outside 1 to E, or if the shapes do not fit together.
    """
    _check(alpha, scores, token_mask)
    if not 1 <= top_k <= scores.shape[-1]:
        raise ValueError(f"top_k={top_k} is not allowed: it must lie between 1 and the {scores.shape[-1]} experts.")
    return alpha * _balance(scores, scores.detach().topk(top_k, dim=-1).indices, token_mask, True).expert_loss()


def router_z_loss(
    router_logits: torch.Tensor, alpha: float, *, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the router z-loss, alpha * mean over tokens of (log sum_i exp(logit_i))^2 (arXiv 2202.08906, eq. 5).

    Args:
        router_logits (`torch.Tensor` of shape (B, S, E)): raw gate logits.
        alpha (`float`): coefficient, at least 0.
        token_mask (`torch.Tensor` of shape (B, S), *optional*): nonzero for real tokens.

    Returns:
        `torch.Tensor`: a scalar; 0 where every token is padding.

    Raises:
        ValueError: if `alpha` is negative, or if the mask has another shape.
    """
    _check(alpha, router_logits, token_mask)
    logits = router_logits if router_logits.dtype == torch.float64 else router_logits.float()
    squares = logits.logsumexp(dim=-1).square()
    if token_mask is None:
        return alpha * squares.mean()
    real = token_mask != 0
    return alpha * (squares * real).sum() / real.sum().clamp(min=1)


def auxiliary_losses(
    config: DeepseekMoeConfig, router_logits: torch.Tensor, routing: Routing, token_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Compute the losses that a config asks for, coefficients included.

    Args:
        config: holds the coefficients, in `config.loss_alphas`.
        router_logits (`torch.Tensor` of shape (B, S, E)): raw gate logits.
        routing: the [`Routing`] of the B * S tokens, with the statistics of B sequences and the same mask.
        token_mask (`torch.Tensor` of shape (B, S), *optional*): nonzero for real tokens.

    Returns:
        `torch.Tensor` of shape (5,) in the order of `LOSS_NAMES`, 0 for losses that are switched off; `None` if all of
        them are.
    """
    alphas = config.loss_alphas
    if not alphas:
        return None
    for alpha in alphas.values():  # fields can be set after the config was checked, and trainers do so
        _check_alpha(alpha)
    _check_shapes(router_logits, token_mask)
    batch_shape, num_experts = router_logits.shape[:2], router_logits.shape[2]
    counts, score_sums, expert_ids = routing.counts_by_sequence, routing.score_sums, routing.expert_ids
    rows = max(batch_shape[0], 1)
    if counts is None or score_sums is None or len(counts) != rows or len(expert_ids) != batch_shape.numel():
        raise ValueError(
            f"routing is not allowed: it must be that of the {batch_shape.numel()} tokens, with statistics=True and "
            f"num_sequences={rows}."
        )
    top_k, tokens = expert_ids.shape[-1], _tokens_per_sequence(token_mask, batch_shape, score_sums)
    num_groups, max_devices = config.device_groups
    losses: dict[str, torch.Tensor] = {}
    balance = _balance_of_sums(counts, score_sums, tokens, top_k, config.seq_aux)
    if "expert" in alphas:
        losses["expert"] = alphas["expert"] * balance.expert_loss()
    if "device" in alphas:
        losses["device"] = alphas["device"] * balance.device_loss(num_groups)
    if "communication" in alphas:
        sent = _tokens_per_device(expert_ids.unflatten(0, batch_shape), token_mask, num_groups, num_experts)
        losses["communication"] = alphas["communication"] * balance.communication_loss(sent, max_devices)
    if "sequence" in alphas:
        by_affinity = _counts_by_affinity(config, router_logits, routing, token_mask)
        of_sequences = _balance_of_sums(by_affinity, score_sums, tokens, top_k, True)
        losses["sequence"] = alphas["sequence"] * of_sequences.expert_loss()
    if "router_z" in alphas:
        losses["router_z"] = router_z_loss(router_logits, alphas["router_z"], token_mask=token_mask)
    zero = score_sums.new_zeros(())
    return torch.stack([losses.get(name, zero) for name in LOSS_NAMES])


def max_violation(tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """Compute MaxVio, (max_i load_i - mean load) / mean load (arXiv 2408.15664, eq. 4).

    Args:
        tokens_per_expert (`torch.Tensor` of shape (..., E)): tokens of every expert, for example (layers, E).

    Returns:
        `torch.FloatTensor` of shape (...): 0 for a balanced load, E / K - 1 where all tokens choose the same K
        experts; NaN where there are no tokens.
    """
    load = tokens_per_expert.float()
    mean = load.mean(dim=-1)
    return (load.amax(dim=-1) - mean) / mean


class _Balance(NamedTuple):
    """The terms of the losses on choices: a row for every sequence, or one row for the whole batch."""

    f: torch.Tensor  # (B, E)
    p: torch.Tensor  # (B, E)
    tokens: torch.Tensor  # (B, 1), real tokens of every row

    def expert_loss(self) -> torch.Tensor:
        return self._mean(self.f * self.p)

    def device_loss(self, num_groups: int) -> torch.Tensor:
        f, p = (values.unflatten(-1, (num_groups, -1)) for values in (self.f, self.p))
        return self._mean(f.mean(dim=-1) * p.sum(dim=-1))

    def communication_loss(self, sent: torch.Tensor, max_devices: int) -> torch.Tensor:
        """Compute the loss from `sent` (sequences, D), the tokens that are sent to every device."""
        num_groups = sent.shape[-1]
        sent = sent.sum(dim=0, keepdim=True) if len(self.tokens) == 1 else sent
        f = sent * num_groups / (max_devices * self.tokens.clamp(min=1))
        return self._mean(f * self.p.unflatten(-1, (num_groups, -1)).sum(dim=-1))

    def _mean(self, products: torch.Tensor) -> torch.Tensor:
        """Sum products (B, ...), and divide by the number of rows that hold a real token."""
        return products.sum() / (self.tokens > 0).sum().clamp(min=1)


def _balance(
    scores: torch.Tensor, expert_ids: torch.Tensor, token_mask: torch.Tensor | None, sequence_wise: bool
) -> _Balance:
    """Make the terms of the losses from affinities (B, S, E) and choices (B, S, K)."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    shares = shares_of(scores)
    chosen = torch.ones_like(expert_ids)
    if token_mask is not None:
        real = (token_mask != 0).unsqueeze(-1)
        shares, chosen = torch.where(real, shares, 0.0), chosen * real
    counts = chosen.new_zeros(len(scores), scores.shape[-1]).scatter_add_(1, expert_ids.flatten(1), chosen.flatten(1))
    tokens = _tokens_per_sequence(token_mask, scores.shape[:2], scores)
    return _balance_of_sums(counts, shares.sum(dim=1), tokens, expert_ids.shape[-1], sequence_wise)


def _balance_of_sums(
    counts: torch.Tensor, score_sums: torch.Tensor, tokens: torch.Tensor, top_k: int, sequence_wise: bool
) -> _Balance:
    """Make the terms of the losses from every sequence's counts and score sums, (B, E), and real tokens, (B, 1)."""
    if not sequence_wise:
        counts, score_sums, tokens = (values.sum(dim=0, keepdim=True) for values in (counts, score_sums, tokens))
    divisor = tokens.clamp(min=1)
    return _Balance(counts.to(score_sums) * counts.shape[-1] / (top_k * divisor), score_sums / divisor, tokens)


def _tokens_per_sequence(token_mask: torch.Tensor | None, batch_shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    if token_mask is None:
        return like.new_full((batch_shape[0], 1), batch_shape[1])
    return (token_mask != 0).sum(dim=1, keepdim=True).to(like)


def _tokens_per_device(
    expert_ids: torch.Tensor, token_mask: torch.Tensor | None, num_groups: int, num_experts: int
) -> torch.Tensor:
    """Count every sequence's real tokens that are sent to each device (B, D). Several experts there count once."""
    devices = expert_ids // (num_experts // num_groups)
    shape = (*expert_ids.shape[:2], num_groups)
    sent = torch.zeros(shape, dtype=torch.float32, device=expert_ids.device).scatter_(-1, devices, 1.0)
    if token_mask is not None:
        sent = sent * (token_mask != 0).unsqueeze(-1)
    return sent.sum(dim=1)


def _counts_by_affinity(
    config: DeepseekMoeConfig, router_logits: torch.Tensor, routing: Routing, token_mask: torch.Tensor | None
) -> Any:
    """Count every sequence's real tokens that have each expert among their K highest affinities (B, E).

    The bias and the groups do not matter here.
    """
    groups, kept = config.gate_groups
    if config.topk_method != "noaux_tc" and kept == groups:
        return routing.counts_by_sequence
    by_affinity = route(
        router_logits.detach().flatten(0, 1),
        routing.expert_ids.shape[-1],
        token_mask=None if token_mask is None else token_mask.flatten(),
        num_sequences=len(router_logits) or 1,
        implementation=config.router_implementation,
    )
    return by_affinity.counts_by_sequence


def _check(
    alpha: float, values: torch.Tensor, token_mask: torch.Tensor | None, expert_ids: torch.Tensor | None = None
) -> None:
    _check_alpha(alpha)
    _check_shapes(values, token_mask, expert_ids)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha={alpha} is not allowed: it must be a finite number of at least 0.")


def _check_shapes(
    values: torch.Tensor, token_mask: torch.Tensor | None, expert_ids: torch.Tensor | None = None
) -> None:
    if values.ndim != 3:
        raise ValueError(f"A tensor of shape {tuple(values.shape)} is not allowed: it must be (batch, sequence, E).")
    shape = tuple(values.shape[:2])
    if token_mask is not None and token_mask.shape != shape:
        raise ValueError(
            f"token_mask of shape {tuple(token_mask.shape)} is not allowed: it must be (batch, sequence) = {shape}."
        )
    if expert_ids is not None and (expert_ids.ndim != 3 or expert_ids.shape[:2] != shape):
        raise ValueError(
            f"expert_ids of shape {tuple(expert_ids.shape)} are not allowed: they must be (batch, sequence, K) with "
            f"(batch, sequence) = {shape}."
        )


def _check_device_groups(num_device_groups: int, num_experts: int) -> None:
    if num_device_groups < 1 or num_experts % num_device_groups:
        raise ValueError(
            f"num_device_groups={num_device_groups} is not allowed: it must divide the {num_experts} experts evenly."
        )


__all__ = [
    "LOSS_NAMES",
    "auxiliary_losses",
    "communication_balance_loss",
    "device_balance_loss",
    "expert_balance_loss",
    "max_violation",
    "router_z_loss",
    "sequence_balance_loss",
]
