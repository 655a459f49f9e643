# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Routing: from gate logits to the chosen experts and their weights.

There are two implementations of the same functions: `"eager"`, the reference in plain torch here, and `"triton"`, one
kernel for each direction in `routing_triton`.

How experts are compared: the affinity is a growing function of the logit. If nothing is added to the affinities, the
logits themselves are compared, so that nothing is lost where affinities round to the same number. With a bias, or with
groups ranked by a sum, float32 affinities are compared, plus the bias. Of equal values the lower id wins, of experts
as of groups. Affinities have rounding errors. Values that differ by no more than these may change places between the
two implementations, as between two devices.

Infinite logits count as the largest finite float32 numbers. That gives the limits: a logit of +inf takes the whole
softmax. The weights of a row with a NaN are NaN, and its ids are valid. Where values are compared, a NaN is the
largest number.

Shape letters: T tokens, E routed experts, K chosen experts of a token, G expert groups, N sequences of T / N tokens.
"""

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch.nn.functional import softplus

from .kernel_trial import compare, register_trial
from .routing_triton import route_triton, uses_triton

TRIAL = "routing"
SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("max", "top2_sum")

# What +inf counts as: next to the largest float32 number, which NaN counts as.
_INFINITY = 3.4028232635611926e38

# Measured on the CPU: up to so many values the number of operations counts; more than the other number are taken in
# parts, which stay in the cache.
_FEW_VALUES, _MANY_VALUES = 2**10, 2**17


@dataclass(frozen=True)
class Routing:
    """The decision of a gate: where every token goes.

    Attributes:
        expert_ids (`torch.LongTensor` of shape (T, K)): the chosen experts, best first by the score that chose them.
        weights (`torch.FloatTensor` of shape (T, K)): their gate weights, float32 (float64 for float64 logits),
            differentiable.
        counts_by_sequence (`torch.LongTensor` of shape (N, E), *optional*): real tokens of every sequence that chose
            each expert; `None` if `statistics=False`.
        score_sums (`torch.FloatTensor` of shape (N, E), *optional*): sum over the real tokens of every sequence of
            their affinities, in the dtype of `weights`. Each token's affinities are first divided by their sum over
            the experts. The balance losses are made of this and of `counts_by_sequence`. Differentiable.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor
    counts_by_sequence: torch.Tensor | None = None
    score_sums: torch.Tensor | None = None

    @property
    def tokens_per_expert(self) -> torch.Tensor | None:
        """Real tokens that chose each expert, a `torch.LongTensor` of shape (E,)."""
        counts = self.counts_by_sequence
        if counts is None:
            return None
        return counts[0] if len(counts) == 1 else counts.sum(dim=0)


@dataclass(frozen=True)
class RoutingOptions:
    """The options by which a gate chooses.

    Attributes:
        top_k: K, at most E and at most the number of experts in `top_k_groups` groups.
        score_function: `"softmax"` (arXiv 2401.06066, eq. 5), `"sigmoid"` (2412.19437, eq. 15), or `"sqrtsoftplus"`,
            the square root of log(1 + exp(logit)), the gate of DeepSeek-V4.
        num_groups, top_k_groups: number of groups of consecutive experts, and of groups that a token may use
            (2405.04434, section 2.2.2). `num_groups` divides E.
        group_score: `"max"` (V2) or `"top2_sum"` (V3) of the scores in a group.
        normalize: divide the chosen scores by their sum plus 1e-20.
        scaling_factor: factor on the weights, a finite number of at least 0.
        implementation: `"eager"`, `"triton"`, or `"auto"`: Triton on a CUDA or ROCm device if it is installed and
            takes the input (E up to 1024, K up to 32, G up to 64), else eager. The log says which, at level INFO, or
            as a warning if a GPU could do better. The kernels have no gradient of the gradient.
    """

    top_k: int
    score_function: str = "softmax"
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: str = "max"
    normalize: bool = False
    scaling_factor: float = 1.0
    implementation: str = "auto"

    @property
    def compared_groups(self) -> int:
        """Number of groups that are ranked; 1 if none is left out."""
        return self.num_groups if self.top_k_groups < self.num_groups else 1

    def check(self, num_experts: int) -> None:
        """Raise a `ValueError` for an option that is not allowed for a gate of E experts."""
        if self.score_function not in SCORE_FUNCTIONS:
            _refuse("score_function", self.score_function, f"one of {SCORE_FUNCTIONS}")
        if self.group_score not in GROUP_SCORES:
            _refuse("group_score", self.group_score, f"one of {GROUP_SCORES}")
        top_k, groups, kept = self.top_k, self.num_groups, self.top_k_groups
        for name, value in (("top_k", top_k), ("num_groups", groups), ("top_k_groups", kept)):
            if not isinstance(value, int) or isinstance(value, bool):
                _refuse(name, value, "an integer")
        if not 1 <= top_k <= num_experts:
            _refuse("top_k", top_k, f"an integer between 1 and the {num_experts} experts")
        if groups < 1 or num_experts % groups:
            _refuse("num_groups", groups, f"a divisor of the {num_experts} experts")
        if not 1 <= kept <= groups:
            _refuse("top_k_groups", kept, f"an integer between 1 and num_groups={groups}")
        size = num_experts // groups
        if kept * size < top_k:
            _refuse("top_k", top_k, f"at most the {kept * size} experts of top_k_groups={kept} groups")
        if self.compared_groups > 1 and self.group_score == "top2_sum" and size < 2:
            _refuse("num_groups", groups, "such that a group holds two experts, for group_score='top2_sum'")
        if not isinstance(self.scaling_factor, (int, float)) or not 0 <= self.scaling_factor < math.inf:
            _refuse("scaling_factor", self.scaling_factor, "a finite number of at least 0")


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
    token_mask: torch.Tensor | None = None,
    num_sequences: int = 1,
    statistics: bool = True,
    implementation: str = "auto",
) -> Routing:
    """Choose the top-K routed experts of every token. This is [`choose_experts`] with the options one by one.

    Args:
        router_logits (`torch.Tensor` of shape (T, E)): gate logits.
        top_k, score_function, num_groups, top_k_groups, group_score, normalize, scaling_factor, implementation: see
            [`RoutingOptions`].
        correction_bias, token_mask, num_sequences, statistics: see [`choose_experts`].

    Returns:
        [`Routing`].

    Raises:
        ValueError: if an argument is not allowed. The message names it, its value and what is allowed.
    """
    options = RoutingOptions(
        top_k=top_k,
        score_function=score_function,
        num_groups=num_groups,
        top_k_groups=top_k_groups,
        group_score=group_score,
        normalize=normalize,
        scaling_factor=scaling_factor,
        implementation=implementation,
    )
    return choose_experts(
        router_logits,
        options,
        correction_bias=correction_bias,
        token_mask=token_mask,
        num_sequences=num_sequences,
        statistics=statistics,
    )


def choose_experts(
    router_logits: torch.Tensor,
    options: RoutingOptions,
    *,
    correction_bias: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    num_sequences: int = 1,
    statistics: bool = True,
) -> Routing:
    """Choose the top-K routed experts of every token.

    The choice is made by score plus bias, inside the best groups if there are groups. The weights are the scores of
    the chosen experts without the bias. They are gathered, not recovered by subtraction, so that no gradient flows
    through the choice or the bias.

    Args:
        router_logits (`torch.Tensor` of shape (T, E)): gate logits. float32, bfloat16 and float16 are computed in
            float32. float64 is computed in float64, in eager only.
        options ([`RoutingOptions`]): how the gate chooses.
        correction_bias (`torch.FloatTensor` of shape (E,), *optional*): the bias of auxiliary-loss-free balancing
            (2408.15664, eq. 3), finite numbers.
        token_mask (`torch.Tensor` of shape (T,), *optional*): nonzero for real tokens. The others are routed too, but
            are not counted.
        num_sequences (`int`): N, a divisor of T: the number of equal runs of consecutive tokens that are counted
            apart.
        statistics (`bool`): whether `counts_by_sequence` and `score_sums` are wanted.

    Returns:
        [`Routing`].

    Raises:
        ValueError: if an argument is not allowed. The message names it, its value and what is allowed.
    """
    _check_tensors(router_logits, correction_bias, token_mask)
    num_tokens, num_experts = router_logits.shape
    options.check(num_experts)
    if statistics and (num_sequences < 1 or num_tokens % num_sequences):
        raise ValueError(f"num_sequences={num_sequences} is not allowed: it must divide the {num_tokens} tokens.")
    compared = num_experts, options.top_k, options.compared_groups
    run = route_triton if uses_triton(TRIAL, options.implementation, router_logits, *compared) else _route_eager
    return Routing(*run(router_logits, options, correction_bias, token_mask, num_sequences, statistics))


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


# ------------------------------------------------------------------------------------------------------------ checks
def _check_tensors(
    router_logits: torch.Tensor, correction_bias: torch.Tensor | None, token_mask: torch.Tensor | None
) -> None:
    if router_logits.ndim != 2 or not router_logits.is_floating_point() or router_logits.shape[1] < 1:
        raise ValueError(
            f"router_logits of shape {tuple(router_logits.shape)} and {router_logits.dtype} are not allowed: they "
            "must be floating point numbers of shape (T, E) with at least one expert."
        )
    for name, tensor, size, axis in (("correction_bias", correction_bias, 1, "E"), ("token_mask", token_mask, 0, "T")):
        if tensor is None:
            continue
        length, device = router_logits.shape[size], router_logits.device
        if tensor.ndim != 1 or tensor.shape[0] != length:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} is not allowed: it must be ({axis},) = ({length},)."
            )
        if tensor.device != device:
            raise ValueError(f"{name} on device {tensor.device} is not allowed: router_logits are on {device}.")
    if correction_bias is not None and not correction_bias.is_floating_point():
        raise ValueError(f"correction_bias of {correction_bias.dtype} is not allowed: it must be floating point.")


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}.")


# -------------------------------------------------------------------------------------------------- plain torch
def _route_eager(
    router_logits: torch.Tensor,
    options: RoutingOptions,
    correction_bias: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    num_sequences: int,
    statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Compute the fields of the [`Routing`] of checked arguments."""
    logits = router_logits if router_logits.dtype == torch.float64 else router_logits.float()
    score_function = options.score_function
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # once, for inputs of any length
    if logits.device.type == "cpu" and logits.numel() > _MANY_VALUES and not recorded:
        parts = logits.detach().split(max(_MANY_VALUES // logits.shape[1], 1))
        expert_ids = torch.cat([_choose(part, correction_bias, options) for part in parts])
    else:
        expert_ids = _choose(logits.detach(), correction_bias, options)

    if score_function == "softmax":
        weights = affinities(logits, score_function).gather(1, expert_ids)
    else:
        weights = affinities(logits.gather(1, expert_ids), score_function)
    if options.normalize:
        weights = weights.div(weights.sum(dim=-1, keepdim=True).add_(1e-20))
    elif score_function != "softmax":
        weights = weights + 0.0 * weights.detach().sum(dim=-1, keepdim=True)  # one NaN makes the row NaN
    # Neither a quotient nor a sum nor gathered values are needed by their own gradients.
    if options.scaling_factor != 1.0:
        weights.mul_(float(options.scaling_factor))
    if not statistics:
        return expert_ids, weights, None, None
    return expert_ids, weights, *_statistics(logits, expert_ids, token_mask, score_function, num_sequences)


def _choose(logits: torch.Tensor, correction_bias: torch.Tensor | None, options: RoutingOptions) -> torch.Tensor:
    """Choose the ids (T, K) by logits without a graph."""
    largest = torch.finfo(torch.float32).max
    grouped = options.compared_groups > 1
    if correction_bias is None and not (grouped and options.group_score == "top2_sum"):
        values = logits.nan_to_num(nan=largest, posinf=_INFINITY, neginf=-largest)
    else:
        values = _rounded_affinities(logits, options.score_function)
        if correction_bias is not None:
            values += correction_bias.detach().to(values.dtype)
        values.nan_to_num_(nan=largest, posinf=_INFINITY, neginf=-largest)
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


@register_trial(TRIAL)
def try_routing(device: torch.device) -> None:
    """Compare the kernels of routing with plain torch: V3's gate, with ties, padding, two sequences and a gradient.

    80 experts in 4 groups have 128 lanes: a row is read in parts, as in the released models.

    Raises:
        WrongKernelError: if they differ.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 80, generator=generator, dtype=torch.float32).mul_(4).round_().div_(4)  # many are equal
    bias = torch.randint(-2, 3, (80,), generator=generator).to(torch.float32) / 4
    mask = torch.rand(40, generator=generator, dtype=torch.float32) < 0.8
    options = RoutingOptions(3, "sigmoid", 4, 2, "top2_sum", True, 2.5)
    results = []
    for run, place in ((_route_eager, torch.device("cpu")), (route_triton, device)):
        leaf = logits.to(place).requires_grad_()
        ids, weights, counts, sums = run(leaf, options, bias.to(place), mask.to(place), 2, True)
        assert sums is not None
        total = weights.square().sum() + sums.square().sum()
        results.append((ids, weights, counts, sums, *torch.autograd.grad(total, leaf)))
    names = ("the ids", "the weights", "the counts", "the sums of scores", "the gradient")
    for name, expected, found in zip(names, *results, strict=True):
        compare(name, found, expected, 1e-5 if found.is_floating_point() else 0.0)


RoutingPlan = Routing  # its name until 0.10

__all__ = [
    "TRIAL",
    "Routing",
    "RoutingOptions",
    "RoutingPlan",
    "affinities",
    "choose_experts",
    "route",
    "shares_of",
    "try_routing",
]
