# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Routing: from gate logits to the chosen experts and their weights.

There are two implementations of the same functions: `"eager"`, the reference in plain torch in `routing_eager`, and
`"triton"`, one kernel for each direction in `routing_triton`.

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

from dataclasses import dataclass

import torch

from .kernel_trial import compare, register_trial
from .routing_eager import route_eager
from .routing_options import RoutingOptions
from .routing_triton import route_triton, uses_triton

TRIAL = "routing"


class TooFewExpertsError(ValueError):
    """More experts are excluded than a token can do without."""


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
    epsilon: float = 1e-20,
    scaling_factor: float = 1.0,
    bias_on: str = "scores",
    expert_ids: torch.Tensor | None = None,
    excluded_experts: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    num_sequences: int = 1,
    statistics: bool = True,
    implementation: str = "auto",
) -> Routing:
    """Choose the top-K routed experts of every token. This is [`choose_experts`] with the options one by one.

    Args:
        router_logits (`torch.Tensor` of shape (T, E)): gate logits.
        top_k, score_function, num_groups, top_k_groups, group_score, normalize, epsilon, scaling_factor, bias_on,
            implementation: see [`RoutingOptions`].
        correction_bias, expert_ids, excluded_experts, token_mask, num_sequences, statistics: see [`choose_experts`].

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
        epsilon=epsilon,
        scaling_factor=scaling_factor,
        bias_on=bias_on,
        implementation=implementation,
    )
    return choose_experts(
        router_logits,
        options,
        correction_bias=correction_bias,
        expert_ids=expert_ids,
        excluded_experts=excluded_experts,
        token_mask=token_mask,
        num_sequences=num_sequences,
        statistics=statistics,
    )


def choose_experts(
    router_logits: torch.Tensor,
    options: RoutingOptions,
    *,
    correction_bias: torch.Tensor | None = None,
    expert_ids: torch.Tensor | None = None,
    excluded_experts: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    num_sequences: int = 1,
    statistics: bool = True,
) -> Routing:
    """Choose the top-K routed experts of every token.

    The choice is made by score plus bias, inside the best groups if there are groups. The weights are the scores of
    the chosen experts without the bias, gathered, so that no gradient flows through the choice or the bias.

    Args:
        router_logits (`torch.Tensor` of shape (T, E)): gate logits. float32, bfloat16 and float16 are computed in
            float32. float64 is computed in float64, in eager only.
        options ([`RoutingOptions`]): how the gate chooses.
        correction_bias (`torch.FloatTensor` of shape (E,), *optional*): the bias of auxiliary-loss-free balancing
            (2408.15664, eq. 3), finite numbers.
        expert_ids (`torch.LongTensor` of shape (T, K), *optional*): experts that are chosen already, as by token id in
            DeepSeek-V4's first layers. They may repeat. Bias and groups have no part, and plain torch computes.
        excluded_experts (`torch.BoolTensor` of shape (T, E), *optional*): experts that a token must not choose. The
            scores of the others stay as they are. Groups are ranked without them, those with too few experts left
            for their score last. Plain torch computes.
        token_mask (`torch.Tensor` of shape (T,), *optional*): nonzero for real tokens. The others are not counted.
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
    if expert_ids is not None:
        _check_given_ids(expert_ids, num_tokens, options, excluded_experts)
        return Routing(
            *route_eager(router_logits, options, None, token_mask, num_sequences, statistics, expert_ids.long())
        )
    if excluded_experts is not None:
        _check_excluded(excluded_experts, router_logits, options)
        chosen = route_eager(
            router_logits, options, correction_bias, token_mask, num_sequences, statistics, None, excluded_experts
        )
        _check_left(excluded_experts, chosen[0])
        return Routing(*chosen)
    sizes, case = (num_experts, options.top_k, options.compared_groups), options.trial_case(num_experts)
    fused = uses_triton(TRIAL, options.implementation, router_logits, *sizes, case=case)
    run = route_triton if fused else route_eager
    return Routing(*run(router_logits, options, correction_bias, token_mask, num_sequences, statistics))


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


def _check_given_ids(
    expert_ids: torch.Tensor, num_tokens: int, options: RoutingOptions, excluded: torch.Tensor | None
) -> None:
    if excluded is not None:
        raise ValueError("excluded_experts is not allowed with expert_ids, which are chosen already.")
    if not isinstance(expert_ids, torch.Tensor):
        raise ValueError(f"expert_ids of {type(expert_ids).__name__} are not allowed: they must be a tensor (T, K).")
    if expert_ids.shape != (num_tokens, options.top_k) or expert_ids.is_floating_point():
        raise ValueError(
            f"expert_ids of shape {tuple(expert_ids.shape)} and {expert_ids.dtype} are not allowed: they must be "
            f"whole numbers of shape (T, K) = ({num_tokens}, {options.top_k})."
        )
    if options.implementation == "triton":
        raise ValueError("implementation='triton' is not allowed with expert_ids: the kernels choose themselves.")


def _check_excluded(excluded: torch.Tensor, router_logits: torch.Tensor, options: RoutingOptions) -> None:
    if not isinstance(excluded, torch.Tensor) or excluded.dtype != torch.bool or excluded.shape != router_logits.shape:
        found = (
            f"{excluded.dtype} of shape {tuple(excluded.shape)}"
            if isinstance(excluded, torch.Tensor)
            else type(excluded).__name__
        )
        raise ValueError(
            f"excluded_experts as {found} is not allowed: it must be torch.bool of shape (T, E) = "
            f"{tuple(router_logits.shape)}."
        )
    if excluded.device != router_logits.device:
        raise ValueError(
            f"excluded_experts on device {excluded.device} is not allowed: router_logits are on "
            f"{router_logits.device}."
        )
    if options.implementation == "triton":
        raise ValueError("implementation='triton' is not allowed with excluded_experts: the kernels exclude none.")


def _check_left(excluded: torch.Tensor, expert_ids: torch.Tensor) -> None:
    if bool(excluded.gather(1, expert_ids).any()):
        raise TooFewExpertsError(
            f"excluded_experts leaves some token fewer than top_k={expert_ids.shape[1]} experts in the groups that it "
            "may use: exclude fewer."
        )


@register_trial(TRIAL)
def try_routing(
    device: torch.device,
    num_experts: int = 80,
    top_k: int = 3,
    score_function: str = "sigmoid",
    num_groups: int = 4,
    top_k_groups: int = 2,
    group_score: str = "top2_sum",
    bias_on: str = "scores",
) -> None:
    """Compare the kernels of routing with plain torch, with ties, a bias, padding, two sequences and a gradient.

    Raises:
        WrongKernelError: if they differ.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, num_experts, generator=generator, dtype=torch.float32)
    logits = logits.mul_(4).round_().div_(4).add_(0.1)  # many are equal, and no sums of two different scores
    bias = torch.randint(-2, 3, (num_experts,), generator=generator).to(torch.float32) / 7
    mask = torch.rand(40, generator=generator, dtype=torch.float32) < 0.8
    options = RoutingOptions(
        top_k, score_function, num_groups, top_k_groups, group_score, True, 0.25, scaling_factor=2.5, bias_on=bias_on
    )
    results = []
    for run, place in ((route_eager, torch.device("cpu")), (route_triton, device)):
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
    "TooFewExpertsError",
    "choose_experts",
    "route",
    "try_routing",
]
