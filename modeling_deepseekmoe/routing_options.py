# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The options by which a gate chooses its experts.

Shape letters: E routed experts, K chosen experts of a token, G expert groups.
"""

import math
from dataclasses import dataclass
from typing import NoReturn

from .kernel_trial import Case

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("max", "top2_sum")
BIAS_PLACES = ("scores", "logits")


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
        bias_on: what the balancing bias is added to for the choice: `"scores"`, the affinities (2408.15664), or
            `"logits"`, without groups.
        normalize: divide the chosen scores by their sum plus `epsilon`.
        epsilon, scaling_factor: what is added to that sum, and a factor on the weights: finite numbers of at least 0.
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
    epsilon: float = 1e-20
    scaling_factor: float = 1.0
    bias_on: str = "scores"
    implementation: str = "auto"

    @property
    def compared_groups(self) -> int:
        """Number of groups that are ranked; 1 if none is left out."""
        return self.num_groups if self.top_k_groups < self.num_groups else 1

    def trial_case(self, num_experts: int) -> Case:
        """Return what the kernels are compiled for, of a gate of E experts: the arguments of [`try_routing`]."""
        groups = self.compared_groups
        kept, group_score = (self.top_k_groups, self.group_score) if groups > 1 else (1, "max")
        # The number of experts is a tensor in a trace.
        return int(num_experts), self.top_k, self.score_function, groups, kept, group_score, self.bias_on

    def check(self, num_experts: int) -> None:
        """Raise a `ValueError` for an option that is not allowed for a gate of E experts."""
        if self.score_function not in SCORE_FUNCTIONS:
            _refuse("score_function", self.score_function, f"one of {SCORE_FUNCTIONS}")
        if self.group_score not in GROUP_SCORES:
            _refuse("group_score", self.group_score, f"one of {GROUP_SCORES}")
        if self.bias_on not in BIAS_PLACES:
            _refuse("bias_on", self.bias_on, f"one of {BIAS_PLACES}")
        if self.bias_on == "logits" and self.num_groups > 1:
            _refuse("bias_on", self.bias_on, "'scores' where there are groups")
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
        for name, number in (("scaling_factor", self.scaling_factor), ("epsilon", self.epsilon)):
            if not isinstance(number, (int, float)) or not 0 <= number < math.inf:
                _refuse(name, number, "a finite number of at least 0")


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}.")


__all__ = ["BIAS_PLACES", "GROUP_SCORES", "SCORE_FUNCTIONS", "RoutingOptions"]
