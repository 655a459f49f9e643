"""The routing reference against an independent loop over tokens in double precision, and what the arguments may be."""

import math

import pytest
import torch
from tolerances import ROUTED_IN_DOUBLE, SAME_COMPUTATION, assert_same

from modeling_deepseekmoe import group_by_expert, route, routing_eager
from modeling_deepseekmoe.routing_eager import affinities
from modeling_deepseekmoe.routing_options import SCORE_FUNCTIONS

V3 = {"score_function": "sigmoid", "num_groups": 4, "top_k_groups": 2, "group_score": "top2_sum", "normalize": True}
CASES = {
    "v1": {},
    "v1-norm": {"normalize": True},
    "v2": {"num_groups": 4, "top_k_groups": 2, "scaling_factor": 16.0},
    "v3": {**V3, "scaling_factor": 2.5, "biased": True},
    "v3-negative-bias": {**V3, "biased": True, "shift": -5.0},
    "v3-without-bias": V3,
    "v4": {"score_function": "sqrtsoftplus", "normalize": True, "biased": True},
    "epsilon": {**V3, "epsilon": 0.2},
    "sqrtsoftplus": {"score_function": "sqrtsoftplus", "scaling_factor": 0.5},
    "sigmoid": {"score_function": "sigmoid"},
    "softmax-bias": {"biased": True},
    "softmax-top2": {"num_groups": 3, "top_k_groups": 1, "group_score": "top2_sum"},
}


def scores_of(logits: list[float], function: str) -> list[float]:
    if function == "softmax":
        total = math.fsum(math.exp(value - max(logits)) for value in logits)
        return [math.exp(value - max(logits)) / total for value in logits]
    if function == "sigmoid":
        return [1 / (1 + math.exp(-value)) for value in logits]
    return [math.sqrt(math.log1p(math.exp(value))) for value in logits]


def route_token(logits: list[float], bias: list[float], top_k: int, case: dict) -> tuple[list[int], list[float]]:
    """One token, by the papers' words: score, bias, groups, choice, weights. Python's sort keeps the order of equal
    values, which gives them to the lower id."""
    scores = scores_of(logits, case.get("score_function", "softmax"))
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
        total = sum(weights) + case.get("epsilon", 1e-20)
        weights = [weight / total for weight in weights]
    return chosen, [weight * case.get("scaling_factor", 1.0) for weight in weights]


def options_of(case: dict, experts: int, dtype: torch.dtype, quantised: bool = False) -> dict:
    bias = torch.randn(experts, dtype=dtype) * 0.3
    bias = (bias * 4).round() / 4 if quantised else bias
    options = {key: value for key, value in case.items() if key not in ("biased", "shift")}
    return {**options, "correction_bias": bias + case.get("shift", 0.0) if case.get("biased") else None}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["normal", "quantised", "equal"])
@pytest.mark.parametrize("tokens", [0, 1, 37, 90])  # of 24 experts: few values, and many
def test_against_a_loop_over_tokens(name: str, dtype: torch.dtype, kind: str, tokens: int) -> None:
    case, experts, top_k = CASES[name], 24, 4
    logits = torch.randn(tokens, experts, dtype=dtype) * 2
    if kind != "normal":
        logits = logits.round() / 2 + 0.3 if kind == "quantised" else torch.full_like(logits, 0.7)
    options = options_of(case, experts, dtype, kind == "quantised")
    plan = route(logits, top_k, **options)
    assert plan.weights.dtype == dtype and plan.expert_ids.shape == plan.weights.shape == (tokens, top_k)
    bias = [0.0] * experts if options["correction_bias"] is None else options["correction_bias"].tolist()
    tolerance = ROUTED_IN_DOUBLE if dtype == torch.float64 else SAME_COMPUTATION
    counts, sums = [0] * experts, [0.0] * experts
    for token in range(tokens):
        ids, weights = route_token(logits[token].tolist(), bias, top_k, case)
        assert plan.expert_ids[token].tolist() == ids
        assert plan.weights[token].tolist() == pytest.approx(weights, rel=tolerance, abs=0)
        scores = scores_of(logits[token].tolist(), case.get("score_function", "softmax"))
        for expert in range(experts):
            counts[expert] += expert in ids
            sums[expert] += scores[expert] / sum(scores)
    assert plan.tokens_per_expert.tolist() == counts and plan.counts_by_sequence.tolist() == [counts]
    assert plan.score_sums[0].tolist() == pytest.approx(sums, rel=tolerance * 10)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 5), (7, 3), (8, 8), (17, 2), (400, 32)])
def test_odd_sizes(experts: int, top_k: int) -> None:
    logits = torch.randn(11, experts)
    plan = route(logits, top_k, normalize=True)
    for token in range(11):
        ids, weights = route_token(logits[token].double().tolist(), [0.0] * experts, top_k, CASES["v1-norm"])
        assert plan.expert_ids[token].tolist() == ids
        assert plan.weights[token].tolist() == pytest.approx(weights, rel=SAME_COMPUTATION)


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 6), (3, 6), (1, 17), (37, 18), (4097, 9), (300, 64)])
def test_ties_go_to_the_lower_id(function: str, biased: bool, shape: tuple[int, int]) -> None:
    """Wherever the values lie in memory: on the CPU torch computes the last few of a tensor in another way."""
    for value in torch.randn(20):
        logits = torch.full(shape, float(value))
        bias = torch.full((shape[1],), 0.1) if biased else None
        plan = route(logits, 4, score_function=function, correction_bias=bias, statistics=False)
        assert plan.expert_ids.tolist() == [[0, 1, 2, 3]] * shape[0]


@pytest.mark.parametrize("tokens", [2, 500])
def test_signs_of_zero_are_equal_and_order_holds_across_zero(tokens: int) -> None:
    inf = float("inf")
    row = torch.tensor([-0.0, 0.0, -1.0, -1.0, 1e-45, -1e-45, 3e38, -3e38, 0.0, -inf, inf, -inf, inf, 2, 2, 3, 3, 0.0])
    plan = route(row.repeat(tokens, 1), 18)
    assert plan.expert_ids.tolist() == [[10, 12, 6, 15, 16, 13, 14, 4, 0, 1, 8, 17, 5, 2, 3, 7, 9, 11]] * tokens


@pytest.mark.parametrize("name", CASES)
def test_many_tokens_are_taken_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, options = torch.randn(101, 24), options_of(CASES[name], 24, torch.float32)
    whole = route(logits, 4, **options)
    monkeypatch.setattr(routing_eager, "_MANY_VALUES", 300)
    parts = route(logits, 4, **options)
    assert torch.equal(parts.expert_ids, whole.expert_ids) and torch.equal(parts.weights, whole.weights)


def test_dropped_groups_stay_dropped_where_biased_scores_are_negative() -> None:
    """With 0 instead of -inf for dropped groups, as in the released V3 code, they would win here."""
    bias = torch.full((8,), -2.0)
    plan = route(torch.randn(20, 8), 3, score_function="sigmoid", correction_bias=bias, num_groups=4, top_k_groups=2,
                 group_score="top2_sum")  # fmt: skip
    for ids in plan.expert_ids.tolist():
        assert len({expert // 2 for expert in ids}) <= 2


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(name: str, masked: bool) -> None:
    """Of the weights and of the sums. The choice is a constant, and the bias has no gradient."""
    logits = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    options = options_of(CASES[name], 12, torch.float64)
    mask = torch.tensor([1, 0, 1, 1, 1, 0]) if masked else None
    if options["correction_bias"] is not None:
        options["correction_bias"].requires_grad_()

    def outputs(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        plan = route(logits, 4, token_mask=mask, num_sequences=2, **options)
        return plan.weights, plan.score_sums

    assert torch.autograd.gradcheck(outputs, logits)
    weights, _ = outputs(logits)
    weights.square().sum().backward()
    assert options["correction_bias"] is None or options["correction_bias"].grad is None


def test_statistics_of_sequences_without_masked_tokens() -> None:
    logits = torch.randn(12, 7)
    mask = torch.arange(12) % 5 != 0
    plan = route(logits, 3, score_function="sigmoid", token_mask=mask, num_sequences=3)
    assert plan.counts_by_sequence.shape == plan.score_sums.shape == (3, 7)
    shares = logits.sigmoid() / logits.sigmoid().sum(dim=1, keepdim=True)
    for sequence in range(3):
        tokens = [token for token in range(4 * sequence, 4 * sequence + 4) if mask[token]]
        counts = torch.bincount(plan.expert_ids[tokens].flatten(), minlength=7)
        assert torch.equal(plan.counts_by_sequence[sequence], counts)
        torch.testing.assert_close(plan.score_sums[sequence], shares[tokens].sum(dim=0))
    assert torch.equal(plan.tokens_per_expert, plan.counts_by_sequence.sum(dim=0))
    assert route(logits, 3, statistics=False).tokens_per_expert is None


def test_a_nan_shows_in_the_weights_and_the_ids_are_valid() -> None:
    for function in SCORE_FUNCTIONS:
        for normalize in (False, True):
            logits = torch.randn(300, 12)
            logits[7, 5] = logits[7, 2] = logits[299] = float("nan")
            plan = route(logits, 4, score_function=function, normalize=normalize, num_sequences=3)
            assert plan.weights.isnan().all(dim=1).nonzero().flatten().tolist() == [7, 299]
            assert plan.expert_ids[7, :2].tolist() == [2, 5] and plan.expert_ids[299].tolist() == [0, 1, 2, 3]
            assert all(len(set(ids)) == 4 and max(ids) < 12 for ids in plan.expert_ids.tolist())
            assert plan.score_sums.isnan().all(dim=1).tolist() == [True, False, True]
            above = route(torch.tensor([[float("inf"), float("nan"), 0.0]]), 1, score_function=function)
            assert above.expert_ids.tolist() == [[1]] and above.weights.isnan().all()
            masked = route(logits, 4, score_function=function, token_mask=torch.arange(300) % 292 != 7)
            assert masked.score_sums.isfinite().all()


def test_infinite_logits_are_limits() -> None:
    inf = float("inf")
    logits = torch.tensor([[inf, 0, 1, -inf], [inf, 2, inf, 0], [-inf, -inf, -inf, -inf], [0, 1, -inf, -inf]])
    plan = route(logits, 3)
    assert plan.expert_ids.tolist() == [[0, 2, 1], [0, 2, 1], [0, 1, 2], [1, 0, 2]]
    e = math.e
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.25], [e / (1 + e), 1 / (1 + e), 0]]
    torch.testing.assert_close(plan.weights, torch.tensor(expected))
    sigmoid = route(logits, 3, score_function="sigmoid", normalize=True).weights
    torch.testing.assert_close(sigmoid[1], torch.tensor([1, 1, 1 / (1 + math.exp(-2))]) / (2 + 1 / (1 + math.exp(-2))))
    assert not sigmoid[2].any()
    root = route(logits, 3, score_function="sqrtsoftplus", normalize=True).weights
    torch.testing.assert_close(root[:3], torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 0]]))


def test_sqrtsoftplus_far_from_zero() -> None:
    logits = torch.tensor([-1e4, -200.0, -60.0, -19.999, -20.001, 0.0, 19.0, 21.0, 1e4], requires_grad=True)
    found = affinities(logits, "sqrtsoftplus")
    found.sum().backward()
    for value, score, slope in zip(logits.tolist(), found.tolist(), logits.grad.tolist(), strict=True):
        softplus = value if value > 30 else math.log1p(math.exp(value))
        exact = math.sqrt(softplus)
        assert score == pytest.approx(exact, rel=1e-6, abs=1e-30)
        sigmoid = 1 / (1 + math.exp(-value)) if value > -700 else 0.0
        assert slope == pytest.approx(sigmoid / (2 * exact) if exact else 0.0, rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_routed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(9, 6).to(dtype)
    plan, reference = route(logits, 2), route(logits.float(), 2)
    assert plan.weights.dtype == plan.score_sums.dtype == torch.float32
    assert torch.equal(plan.weights, reference.weights) and torch.equal(plan.expert_ids, reference.expert_ids)


REFUSED = {
    "score_function='tanh' .* 'sqrtsoftplus'": {"score_function": "tanh"},
    "group_score='mean' .* 'top2_sum'": {"group_score": "mean"},
    "implementation='cuda' .* 'triton'": {"implementation": "cuda"},
    "top_k=0 .* between 1 and the 8 experts": {"top_k": 0},
    "top_k=9 .* between 1 and the 8 experts": {"top_k": 9},
    "num_groups=3 .* divisor of the 8 experts": {"num_groups": 3},
    "num_groups=0 .* divisor of the 8 experts": {"num_groups": 0},
    "top_k_groups=5 .* between 1 and num_groups=4": {"num_groups": 4, "top_k_groups": 5},
    "top_k_groups=0 .* between 1 and num_groups=1": {"top_k_groups": 0},
    "top_k=3 .* at most the 2 experts of top_k_groups=1": {"num_groups": 4, "top_k": 3},
    "num_groups=8 .* holds two experts": {"num_groups": 8, "top_k_groups": 4, "group_score": "top2_sum"},
    "num_groups=2.0 .* integer": {"num_groups": 2.0},
    "top_k=True .* integer": {"top_k": True},
    "scaling_factor='2' .* finite": {"scaling_factor": "2"},
    "scaling_factor=-1.0 .* at least 0": {"scaling_factor": -1.0},
    "scaling_factor=nan .* finite": {"scaling_factor": math.nan},
    "scaling_factor=inf .* finite": {"scaling_factor": math.inf},
    "epsilon=-1e-06 .* at least 0": {"epsilon": -1e-6},
    r"num_sequences=3 .* 4 tokens": {"num_sequences": 3},
    r"router_logits of shape \(8,\)": {"router_logits": torch.zeros(8)},
    r"router_logits of shape \(4, 0\)": {"router_logits": torch.zeros(4, 0)},
    r"router_logits .* torch.int64 are not allowed": {"router_logits": torch.zeros(4, 8, dtype=torch.long)},
    r"correction_bias of shape \(7,\) .* \(E,\) = \(8,\)": {"correction_bias": torch.zeros(7)},
    r"correction_bias of torch.int64": {"correction_bias": torch.zeros(8, dtype=torch.long)},
    r"correction_bias on device meta .* cpu": {"correction_bias": torch.zeros(8, device="meta")},
    r"token_mask of shape \(4, 1\) .* \(T,\) = \(4,\)": {"token_mask": torch.ones(4, 1)},
    r"token_mask on device meta": {"token_mask": torch.ones(4, device="meta")},
    r"implementation='triton' .* torch.float64": {"router_logits": torch.zeros(4, 8, dtype=torch.float64),
                                                   "implementation": "triton"},
    r"implementation='triton' .* 1025 experts": {"router_logits": torch.zeros(4, 1025), "implementation": "triton"},
    r"implementation='triton' .* 33 choices of a token": {"router_logits": torch.zeros(4, 64), "top_k": 33,
                                                "implementation": "triton"},
    "top_k=2.0 .* integer": {"top_k": 2.0},
    "implementation='triton' .* 65 groups": {"router_logits": torch.zeros(4, 130), "num_groups": 65,
                                             "top_k_groups": 2, "implementation": "triton"},
    r"implementation='triton' .* device 'meta'": {"router_logits": torch.zeros(4, 8, device="meta"),
                                                  "implementation": "triton"},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_allowed(message: str) -> None:
    if "implementation='triton'" in message:
        pytest.importorskip("triton")
    with pytest.raises(ValueError, match=message):
        route(**{"router_logits": torch.zeros(4, 8), "top_k": 2, **REFUSED[message]})


def test_ids_that_cannot_be_grouped() -> None:
    with pytest.raises(ValueError, match=r"expert_ids of shape \(6,\)"):
        group_by_expert(torch.zeros(6, dtype=torch.long), 4)
    with pytest.raises(ValueError, match=r"expert_ids .* torch.float32"):
        group_by_expert(torch.zeros(6, 2), 4)
    with pytest.raises(ValueError, match="num_experts=0"):
        group_by_expert(torch.zeros(6, 2, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="implementation='cuda'"):
        group_by_expert(torch.zeros(6, 2, dtype=torch.long), 4, implementation="cuda")
    groups = group_by_expert(torch.tensor([[40000, 3]]), 2**16)  # more than 16 bits hold
    assert groups.permutation.tolist() == [1, 0] and groups.offsets[[0, 3, 4, 40000, 40001]].tolist() == [
        0,
        0,
        1,
        1,
        2,
    ]


def test_a_bias_on_the_logits_chooses_and_does_not_weigh() -> None:
    """Against a loop over the tokens."""
    torch.manual_seed(0)
    logits, bias = torch.randn(50, 9), torch.randn(9)
    found = route(logits, 3, score_function="sigmoid", correction_bias=bias, bias_on="logits", normalize=True)
    for token, row in enumerate(logits.tolist()):
        chosen = sorted(range(9), key=lambda expert: -(row[expert] + float(bias[expert])))[:3]
        scores = [1 / (1 + math.exp(-row[expert])) for expert in chosen]
        assert found.expert_ids[token].tolist() == chosen
        assert_same(found.weights[token], torch.tensor([score / sum(scores) for score in scores]))
    with pytest.raises(
        ValueError, match="bias_on='logits' is not allowed: it must be 'scores' where there are groups"
    ):
        route(torch.randn(2, 8), 2, num_groups=2, bias_on="logits")
    with pytest.raises(ValueError, match="bias_on='nothing' is not allowed"):
        route(logits, 3, bias_on="nothing")


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_given_experts_are_weighed_and_counted(score_function: str) -> None:
    """As DeepSeek-V4's first layers choose by token id; an expert may come twice."""
    torch.manual_seed(0)
    logits, ids = torch.randn(6, 7, requires_grad=True), torch.randint(7, (6, 3))
    found = route(logits, 3, score_function=score_function, expert_ids=ids, normalize=True, scaling_factor=1.5)
    scores = affinities(logits, score_function).gather(1, ids)
    expected = 1.5 * scores / scores.sum(dim=1, keepdim=True)
    assert torch.equal(found.expert_ids, ids)
    assert_same(found.weights, expected)
    assert torch.equal(found.tokens_per_expert, ids.flatten().bincount(minlength=7))
    factor = torch.randn(6, 3)
    assert_same(
        *(torch.autograd.grad((of * factor).sum(), logits, retain_graph=True)[0] for of in (found.weights, expected))
    )
    for wrong in (ids[:5], ids.float(), ids[:, :2]):
        with pytest.raises(ValueError, match=r"expert_ids of shape .* are not allowed"):
            route(logits, 3, expert_ids=wrong)
    with pytest.raises(ValueError, match="implementation='triton' is not allowed with expert_ids"):
        route(logits, 3, expert_ids=ids, implementation="triton")
