# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Routing in plain torch: the reference of the kernels.

Shape letters: T tokens, E routed experts, K chosen experts of a token, N sequences of T / N tokens.
"""

import torch
from torch.nn.functional import softplus

from .routing_options import RoutingOptions

# What +inf counts as: next to the largest float32 number, which NaN counts as.
_INFINITY = 3.4028232635611926e38

# What an excluded expert counts as in float64: less than any other, and a group without experts as twice that.
_EXCLUDED = -1e300

# Measured on the CPU: up to so many values the number of operations counts; more than the other number are taken in
# parts, which stay in the cache.
_FEW_VALUES, _MANY_VALUES = 2**10, 2**17


def affinities(router_logits: torch.Tensor, score_function: str) -> torch.Tensor:
    """Compute the affinities s_it of tokens and experts.

    Args:
        router_logits (`torch.Tensor` of shape (..., E)): gate logits of any floating dtype.
        score_function (`str`): as for [`route`].

    Returns:
        `torch.Tensor` of the same shape, float32, or float64 for float64 logits; differentiable.
    """
    logits = router_logits if router_logits.dtype == torch.float64 else router_logits.float()
    if score_function == "sigmoid":
        return logits.sigmoid()
    largest = torch.finfo(torch.float32).max
    logits = logits.clamp(-largest, largest)
    if score_function == "softmax":
        return logits.softmax(dim=-1)
    # Far below zero log(1 + exp(x)) is exp(x), whose root neither underflows nor has an infinite slope.
    low = logits < -20
    far, near = logits.clamp(max=-20), logits.clamp(min=-20)
    return torch.where(low, (far / 2).exp(), softplus(near).sqrt())


def shares_of(scores: torch.Tensor) -> torch.Tensor:
    """Divide each token's affinities (..., E) by their sum, so that those of a sigmoid gate add up to one too."""
    return scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)


def route_eager(
    router_logits: torch.Tensor,
    options: RoutingOptions,
    correction_bias: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    num_sequences: int,
    statistics: bool,
    expert_ids: torch.Tensor | None = None,
    excluded: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Compute the fields of the [`Routing`] of checked arguments. Given ids (T, K) are taken as they are.

    Experts that are excluded, (T, E), come last.
    """
    logits = router_logits if router_logits.dtype == torch.float64 else router_logits.float()
    score_function = options.score_function
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # once, for inputs of any length
    if expert_ids is not None:
        pass
    elif logits.device.type == "cpu" and logits.numel() > _MANY_VALUES and not recorded:
        size = max(_MANY_VALUES // logits.shape[1], 1)
        parts = logits.detach().split(size)
        without = [None] * len(parts) if excluded is None else excluded.split(size)
        expert_ids = torch.cat(
            [_choose(part, correction_bias, options, out) for part, out in zip(parts, without, strict=True)]
        )
    else:
        expert_ids = _choose(logits.detach(), correction_bias, options, excluded)

    if score_function == "softmax":
        weights = affinities(logits, score_function).gather(1, expert_ids)
    else:
        weights = affinities(logits.gather(1, expert_ids), score_function)
    if options.normalize:
        weights = weights.div(weights.sum(dim=-1, keepdim=True).add_(options.epsilon))
    elif score_function != "softmax":
        weights = weights + 0.0 * weights.detach().sum(dim=-1, keepdim=True)  # one NaN makes the row NaN
    # Neither a quotient nor a sum nor gathered values are needed by their own gradients.
    if options.scaling_factor != 1.0:
        weights.mul_(float(options.scaling_factor))
    if not statistics:
        return expert_ids, weights, None, None
    return expert_ids, weights, *_statistics(logits, expert_ids, token_mask, score_function, num_sequences)


def _choose(
    logits: torch.Tensor,
    correction_bias: torch.Tensor | None,
    options: RoutingOptions,
    excluded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose the ids (T, K) by logits without a graph."""
    largest = torch.finfo(torch.float32).max
    grouped = options.compared_groups > 1
    on_logits = correction_bias is None or options.bias_on == "logits"
    if on_logits and not (grouped and options.group_score == "top2_sum"):
        values = logits.nan_to_num(nan=largest, posinf=_INFINITY, neginf=-largest)
        if correction_bias is not None:
            values = (values + correction_bias.detach().to(values.dtype)).clamp_(-largest, _INFINITY)
            values.masked_fill_(logits.isnan(), largest)
    else:
        values = _rounded_affinities(logits, options.score_function)
        if correction_bias is not None:
            values += correction_bias.detach().to(values.dtype)
        values.nan_to_num_(nan=largest, posinf=_INFINITY, neginf=-largest)
    if excluded is not None:
        values = values.double().masked_fill(excluded, _EXCLUDED)
    return _highest_in_groups(values, options) if grouped else _highest(values, options.top_k)


def _rounded_affinities(logits: torch.Tensor, score_function: str) -> torch.Tensor:
    """Compute affinities that are equal for equal logits.

    On the CPU torch computes the last few elements of a tensor in another way than all others. Their last bit may
    differ, and equal logits would no longer tie. float64 rounded to float32 does not differ. For float64 logits each
    distinct value is computed once. (A softmax is computed row by row.)
    """
    if logits.device.type != "cpu" or score_function == "softmax":
        return affinities(logits, score_function)
    if logits.dtype == torch.float64:
        values, where = logits.unique(return_inverse=True)
        return affinities(values, score_function)[where]
    wide = logits.double()
    return (wide.sigmoid_() if score_function == "sigmoid" else affinities(wide, score_function)).float()


def _highest_in_groups(values: torch.Tensor, options: RoutingOptions) -> torch.Tensor:
    """Find the ids (T, K) of the highest values of (T, E) in each row's best groups, the highest first."""
    top_k, num_groups, top_k_groups = options.top_k, options.num_groups, options.top_k_groups
    size = values.shape[1] // num_groups
    grouped = values.view(-1, num_groups, size)
    few = values.numel() <= _FEW_VALUES and not torch.onnx.is_in_onnx_export()
    if options.group_score == "max":
        group_scores = grouped.amax(dim=-1)
    elif few:
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    else:  # the same, several times as fast for many tokens
        best, where = grouped.max(dim=-1, keepdim=True)
        group_scores = (best + grouped.scatter(-1, where, float("-inf")).amax(dim=-1, keepdim=True)).squeeze(-1)
        group_scores.clamp_(max=torch.finfo(torch.float32).max)
    if few:
        dropped = _highest(group_scores, num_groups)[:, top_k_groups:]
        dropped = dropped.unsqueeze(-1).expand(-1, -1, size)
        return _highest(grouped.scatter(1, dropped, float("-inf")).flatten(1), top_k)
    # Fewer candidates, in the order of their ids, so that the first of equal ones is the lowest.
    groups = _highest(group_scores, top_k_groups).sort(dim=-1).values
    candidates = (groups.unsqueeze(-1) * size + torch.arange(size, device=groups.device)).flatten(1)
    return candidates.gather(1, _highest(values.gather(1, candidates), top_k))


def _highest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Find the positions (T, count) of the highest values of every row (T, width), the highest first.

    Of equal values the one at the lower position comes first.
    """
    width, onnx = values.shape[-1], torch.onnx.is_in_onnx_export()  # which has no stable sort
    few = values.numel() <= _FEW_VALUES or width <= 16
    if (few or values.device.type != "cpu" or values.dtype == torch.float64 or width > 2**13) and not onnx:
        return values.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()
    # A stable sort takes four times as long as `topk`, which leaves equal values in any order. In float64 there is
    # room between two float32 numbers: every value is lowered by its position times 2^-40 of its size, or of next to
    # nothing where it is zero.
    wide = values.double()
    sizes, positions = wide.abs().add_(2.0**-200), torch.arange(width, dtype=wide.dtype, device=wide.device)
    return torch.addcmul(wide, sizes, positions, value=-(2.0**-40)).topk(count, dim=-1).indices


def _statistics(
    logits: torch.Tensor,
    expert_ids: torch.Tensor,
    token_mask: torch.Tensor | None,
    score_function: str,
    num_sequences: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `counts_by_sequence` and `score_sums` of a [`Routing`]."""
    num_tokens, num_experts = logits.shape
    if token_mask is not None:
        logits = logits.masked_fill((token_mask == 0).unsqueeze(-1), 0.0)  # so that no NaN reaches its gradient
    scores = affinities(logits, score_function)
    if score_function != "softmax":
        scores = shares_of(scores)
    chosen = torch.ones_like(expert_ids)
    if token_mask is not None:
        real = (token_mask != 0).unsqueeze(-1)
        scores, chosen = torch.where(real, scores, 0.0), chosen * real
    score_sums = scores.view(num_sequences, num_tokens // num_sequences, num_experts).sum(dim=1)
    counts = torch.zeros((num_sequences, num_experts), dtype=torch.long, device=logits.device)
    per_sequence = num_tokens // num_sequences * expert_ids.shape[1]
    shape = (num_sequences, per_sequence)
    return counts.scatter_add_(1, expert_ids.view(shape), chosen.view(shape)), score_sums


__all__ = ["affinities", "route_eager", "shares_of"]
