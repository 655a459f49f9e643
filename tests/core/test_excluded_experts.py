"""Experts that tokens must not choose, against a loop."""

from dataclasses import replace

import pytest
import torch
from moe_loops import RULES, Rule, choose, counts_of
from tolerances import ROUTED_IN_DOUBLE

from modeling_deepseekmoe.routing import RoutingOptions, TooFewExpertsError, choose_experts


# Few values, more, and more than 2^17, which are taken in parts.
@pytest.mark.parametrize(("tokens", "experts"), [(5, 16), (100, 16), (257, 512)])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.score}-{rule.bias_on}-{rule.groups}-{rule.best}")
def test_excluded_experts_against_a_loop(rule: Rule, tokens: int, experts: int) -> None:
    """In every group two experts at least are left."""
    generator = torch.Generator().manual_seed(tokens)
    logits = (2 * torch.randn(tokens, experts, generator=generator)).double()
    bias = 0.4 * torch.randn(experts, generator=generator)
    excluded = (torch.rand(tokens, experts // 4, 4, generator=generator).argsort(-1) < 2).flatten(1)
    excluded &= torch.rand(tokens, experts, generator=generator) < 0.7
    options = rule.options
    for added in (None, bias):
        found = choose_experts(logits, options, correction_bias=added, excluded_experts=excluded, statistics=False)
        numbers = [0.0] * experts if added is None else added.tolist()
        for row, (of_token, out) in enumerate(zip(logits, excluded, strict=True)):
            ids, weights, _ = choose(of_token, rule, numbers, 3, excluded=out.nonzero().flatten().tolist())
            assert found.expert_ids[row].tolist() == ids
            assert found.weights[row].tolist() == pytest.approx(weights, abs=ROUTED_IN_DOUBLE)
        if added is None and rule.best == 1:  # logits are compared, which float32 does not round
            single = choose_experts(logits.float(), options, excluded_experts=excluded)
            assert torch.equal(single.expert_ids, found.expert_ids)
            assert single.tokens_per_expert.tolist() == counts_of(found.expert_ids.tolist(), experts)


@pytest.mark.parametrize("tokens", [5, 200])
def test_a_group_without_experts_comes_after_one_with_some(tokens: int) -> None:
    """However many tokens there are: three experts are left, one in group 1 and two in group 3."""
    excluded = torch.tensor([[True, True, True, False, True, True, False, False]]).expand(tokens, -1)
    options = RoutingOptions(3, "sigmoid", 4, 2, "top2_sum", True)
    found = choose_experts(torch.randn(tokens, 8), options, excluded_experts=excluded)
    assert found.expert_ids.sort(dim=1).values.tolist() == [[3, 6, 7]] * tokens


def test_excluded_experts_that_are_refused() -> None:
    logits, options = torch.randn(4, 8), RoutingOptions(3)
    for bad, message in (
        (torch.zeros(4, 7, dtype=torch.bool), r"torch\.bool of shape \(4, 7\) is not allowed: .* \(T, E\) = \(4, 8\)"),
        (torch.zeros(4, 8), r"torch\.float32 of shape \(4, 8\)"), ([[False] * 8] * 4, "excluded_experts as list"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            choose_experts(logits, options, excluded_experts=bad)
    excluded = torch.zeros(4, 8, dtype=torch.bool)
    excluded[:, :5] = True
    ids = choose_experts(logits, options, excluded_experts=excluded).expert_ids
    assert ids.sort().values.tolist() == [[5, 6, 7]] * 4
    excluded[2, 7] = True
    with pytest.raises(TooFewExpertsError, match="fewer than top_k=3"):
        choose_experts(logits, options, excluded_experts=excluded)
    with pytest.raises(ValueError, match="implementation='triton' is not allowed with excluded_experts"):
        choose_experts(logits, replace(options, implementation="triton"), excluded_experts=excluded)
