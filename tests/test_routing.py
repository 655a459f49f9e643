"""The routing reference against an independent loop over tokens in double precision."""

import math

import pytest
import torch
from tolerances import SAME_COMPUTATION

from modeling_deepseekmoe import route

CASES = {
    "v1": {"score_function": "softmax"},
    "v1-norm": {"score_function": "softmax", "normalize": True},
    "v2-groups": {"score_function": "softmax", "num_groups": 4, "top_k_groups": 2, "group_score": "max",
                  "scaling_factor": 16.0},
    "v3": {"score_function": "sigmoid", "num_groups": 4, "top_k_groups": 2, "group_score": "top2_sum",
           "normalize": True, "scaling_factor": 2.5, "biased": True},
    "v3-negative-bias": {"score_function": "sigmoid", "num_groups": 4, "top_k_groups": 2, "group_score": "top2_sum",
                         "normalize": True, "biased": True, "shift": -5.0},
    "softmax-bias": {"score_function": "softmax", "biased": True},
}  # fmt: skip


def route_token(logits: list[float], bias: list[float], top_k: int, case: dict) -> tuple[list[int], list[float]]:
    """One token, by the papers' words: score, bias, groups, choice, weights."""
    if case["score_function"] == "softmax":
        total = sum(math.exp(value - max(logits)) for value in logits)
        scores = [math.exp(value - max(logits)) / total for value in logits]
    else:
        scores = [1 / (1 + math.exp(-value)) for value in logits]
    choice = [score + offset for score, offset in zip(scores, bias, strict=True)]
    groups = case.get("num_groups", 1)
    size = len(logits) // groups

    def rank(group: int) -> float:
        members = sorted(choice[group * size : (group + 1) * size], reverse=True)
        return members[0] if case.get("group_score", "max") == "max" else members[0] + members[1]

    kept = sorted(range(groups), key=rank, reverse=True)[: case.get("top_k_groups", 1)]
    allowed = [expert for expert in range(len(logits)) if expert // size in kept]
    chosen = sorted(allowed, key=lambda expert: choice[expert], reverse=True)[:top_k]
    weights = [scores[expert] for expert in chosen]
    if case.get("normalize"):
        total = sum(weights) + 1e-20
        weights = [weight / total for weight in weights]
    return chosen, [weight * case.get("scaling_factor", 1.0) for weight in weights]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_against_a_loop_over_tokens(name: str, tokens: int) -> None:
    case = CASES[name]
    logits = torch.randn(tokens, 12) * 2
    bias = torch.randn(12) * 0.3 + case.get("shift", 0.0) if case.get("biased") else torch.zeros(12)
    options = {key: value for key, value in case.items() if key not in ("biased", "shift")}
    plan = route(logits, 4, correction_bias=bias if case.get("biased") else None, **options)
    assert plan.expert_ids.shape == plan.weights.shape == (tokens, 4)
    for token in range(tokens):
        ids, weights = route_token(logits[token].double().tolist(), bias.double().tolist(), 4, case)
        assert plan.expert_ids[token].tolist() == ids
        assert plan.weights[token].tolist() == pytest.approx(weights, rel=SAME_COMPUTATION)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 5), (7, 3), (8, 8)])
def test_odd_sizes(experts: int, top_k: int) -> None:
    logits = torch.randn(11, experts)
    plan = route(logits, top_k, normalize=True)
    for token in range(11):
        ids, weights = route_token(logits[token].double().tolist(), [0.0] * experts, top_k, {**CASES["v1-norm"]})
        assert plan.expert_ids[token].tolist() == ids
        assert plan.weights[token].tolist() == pytest.approx(weights, rel=SAME_COMPUTATION)


def test_dropped_groups_stay_dropped_where_biased_scores_are_negative() -> None:
    """With 0 instead of -inf for dropped groups, as in the released V3 code, they would win here."""
    bias = torch.full((8,), -2.0)
    plan = route(torch.randn(20, 8), 3, score_function="sigmoid", correction_bias=bias, num_groups=4, top_k_groups=2,
                 group_score="top2_sum")  # fmt: skip
    for ids in plan.expert_ids.tolist():
        assert len({expert // 2 for expert in ids}) <= 2


def test_gradients_flow_through_the_weights_only() -> None:
    logits = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    plan = route(logits, 3, score_function="sigmoid", correction_bias=bias, normalize=True, scaling_factor=2.5)
    plan.weights[:, 0].sum().backward()
    assert bias.grad is None
    unchosen = torch.ones(5, 8, dtype=torch.bool).scatter(1, plan.expert_ids, False)
    assert (logits.grad[unchosen] == 0).all() and (logits.grad[~unchosen] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_routed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(9, 6).to(dtype)
    plan, reference = route(logits, 2), route(logits.float(), 2)
    assert plan.weights.dtype == plan.scores.dtype == torch.float32
    assert torch.equal(plan.weights, reference.weights) and torch.equal(plan.expert_ids, reference.expert_ids)


def test_unknown_functions() -> None:
    with pytest.raises(ValueError, match=r"score_function='tanh' .* 'softmax' or 'sigmoid'"):
        route(torch.randn(2, 4), 2, score_function="tanh")
    with pytest.raises(ValueError, match=r"group_score='mean' .* 'max' or 'top2_sum'"):
        route(torch.randn(2, 4), 2, num_groups=2, top_k_groups=1, group_score="mean")
