"""Generated inputs for routing, and the comparison of the kernels with the reference: on the CPU in Triton's
interpreter, and the same on a GPU."""

from dataclasses import dataclass

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from tolerances import KERNEL_GRADIENT, KERNEL_WEIGHTS

from modeling_deepseekmoe import group_by_expert, route
from modeling_deepseekmoe.routing_eager import affinities
from modeling_deepseekmoe.routing_options import BIAS_PLACES, GROUP_SCORES, SCORE_FUNCTIONS

# Without a search for smaller failures, which takes minutes in the interpreter.
GENERATED = settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Quantised logits do not lie around zero: sigmoid(x) + sigmoid(-x) is 1 for every x, so that sums of two affinities
# would be equal in exact arithmetic, and the last bit of float32 would decide.
KINDS = (
    "normal",
    "large",
    "quantised",
    "equal",
    "one takes all",
    "nan",
    "infinite",
    "all infinite",
    "strided",
    "padded",
)


@dataclass(frozen=True)
class Case:
    """One call of `route`, without its tensors."""

    seed: int
    kind: str
    dtype: torch.dtype
    tokens: int
    experts: int
    top_k: int
    groups: int
    kept: int
    group_score: str
    score_function: str
    bias: str
    masked: str
    sequences: int
    normalize: bool
    scaling_factor: float
    epsilon: float
    statistics: bool
    bias_on: str = "scores"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Every option, sizes that are no powers of two, and now and then those of a released gate."""
    group_score = draw(st.sampled_from(GROUP_SCORES))
    size = draw(st.integers(2 if group_score == "top2_sum" else 1, 12))
    groups = draw(st.integers(1, 6))
    kept = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(kept * size, 10)))
    if draw(st.integers(0, 9)) == 0:
        size, groups, kept, top_k = draw(
            st.sampled_from([(64, 1, 1, 6), (20, 8, 3, 6), (32, 8, 4, 8), (384, 1, 1, 8), (33, 31, 31, 32)])
        )
    elif draw(st.integers(0, 9)) == 0:
        kept, top_k = groups, min(groups * size, 32)
    sequences = draw(st.integers(1, 3))
    bias = draw(st.sampled_from(["none", "normal", "negative", "quantised", "zero"]))
    # Where affinities are compared and not logits, two of very many differ by no more than their rounding now and
    # then: `check_rounding` is for those.
    few = bias == "none" or groups * size < 100
    # And a sigmoid that is almost 1 is rounded to it, or not.
    by_score = bias != "none" or (group_score == "top2_sum" and kept < groups)
    kind = draw(st.sampled_from([kind for kind in KINDS if not (by_score and kind == "large")]))
    return Case(
        seed=draw(st.integers(0, 2**20)),
        kind=kind,
        dtype=draw(st.sampled_from(DTYPES)),
        tokens=sequences * (draw(st.integers(1, 3 if few else 1)) if draw(st.integers(0, 19)) else 0),
        experts=groups * size,
        top_k=top_k,
        groups=groups,
        kept=kept,
        group_score=group_score,
        score_function=draw(st.sampled_from(SCORE_FUNCTIONS)),
        bias=bias,
        masked=draw(st.sampled_from(["none", "bool", "int64", "float32"])),
        sequences=sequences,
        normalize=draw(st.booleans()),
        scaling_factor=draw(st.sampled_from([1.0, 2.5, 0.0])),
        epsilon=draw(st.sampled_from([1e-20, 0.1])),
        statistics=draw(st.integers(0, 3)) > 0,
        bias_on=draw(st.sampled_from(BIAS_PLACES)) if groups == 1 else "scores",
    )


def logits_of(case: Case, device: str) -> torch.Tensor:
    """The gate logits (T, E) of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.tokens, case.experts)
    logits = torch.randn(shape, generator=generator)
    if case.kind == "large":
        logits = logits * 30
    elif case.kind == "quantised":
        logits = (logits * 2).round() / 2 + 0.3
    elif case.kind == "equal":
        logits = torch.full(shape, 0.7)
    elif case.kind == "one takes all":
        logits[:, case.experts // 2] += 12
    elif case.kind in ("nan", "infinite"):
        special = torch.rand(shape, generator=generator)
        logits = logits.masked_fill(special < 0.1, float("-inf")).masked_fill(special > 0.95, float("inf"))
        if case.kind == "nan":
            logits = logits.masked_fill((special > 0.4) & (special < 0.43), float("nan"))
    elif case.kind == "all infinite":
        logits = torch.where(torch.arange(case.tokens)[:, None] % 2 == 0, float("inf"), float("-inf")).expand(shape)
    elif case.kind == "strided":
        return logits.to(device, case.dtype).repeat_interleave(3, dim=1)[:, ::3]
    elif case.kind == "padded":
        return torch.cat([logits, logits], dim=1).to(device, case.dtype)[:, : case.experts]
    return logits.to(device, case.dtype)


def options_of(case: Case, device: str = "cpu") -> dict:
    """The other arguments."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    bias, mask = torch.randn(case.experts, generator=generator), torch.rand(case.tokens, generator=generator) > 0.3
    biases = {"none": None, "normal": bias * 0.1, "negative": bias * 0.1 - 3, "quantised": (bias * 4).round() / 8,
              "zero": bias * 0}  # fmt: skip
    bias = biases[case.bias]
    return {
        "score_function": case.score_function,
        "correction_bias": None if bias is None else bias.to(device),
        "num_groups": case.groups,
        "top_k_groups": case.kept,
        "group_score": case.group_score,
        "normalize": case.normalize,
        "scaling_factor": case.scaling_factor,
        "epsilon": case.epsilon,
        "token_mask": None if case.masked == "none" else mask.to(device, getattr(torch, case.masked)),
        "num_sequences": case.sequences,
        "statistics": case.statistics,
        "bias_on": case.bias_on,
    }


def check_route(case: Case, device: str = "cpu") -> None:
    """Ids and counts equal, weights, sums and gradients close; NaN and infinities in the same places."""
    logits = [logits_of(case, device).requires_grad_() for _ in range(2)]
    plans = [
        route(one, case.top_k, implementation=implementation, **options_of(case, device))
        for one, implementation in zip(logits, ("eager", "triton"), strict=True)
    ]
    expected, found = plans
    if device == "cpu":
        assert torch.equal(found.expert_ids, expected.expert_ids)
    elif not torch.equal(found.expert_ids, expected.expert_ids):
        check_swaps(case, logits[0], *(plan.expert_ids for plan in plans))
        return
    groupings = [
        group_by_expert(expected.expert_ids, case.experts, implementation=name) for name in ("eager", "triton")
    ]
    assert all(map(torch.equal, *groupings))
    assert found.expert_ids.is_contiguous() and expected.expert_ids.is_contiguous()
    assert found.weights.dtype == torch.float32
    scale = max(1.0, case.scaling_factor)
    close(found.weights, expected.weights, KERNEL_WEIGHTS * scale, KERNEL_WEIGHTS)
    generator = torch.Generator().manual_seed(case.seed + 2)
    factor = torch.randn(expected.weights.shape, generator=generator).to(device)
    objectives = [(plan.weights * factor).sum() for plan in plans]
    if case.statistics:
        assert torch.equal(found.counts_by_sequence, expected.counts_by_sequence)
        assert torch.equal(found.tokens_per_expert, expected.tokens_per_expert)
        close(found.score_sums, expected.score_sums, KERNEL_WEIGHTS * max(1, case.tokens), KERNEL_WEIGHTS)
        factor = torch.randn(expected.score_sums.shape, generator=generator).to(device)
        objectives = [one + (plan.score_sums * factor).sum() for one, plan in zip(objectives, plans, strict=True)]
    else:
        assert found.counts_by_sequence is found.score_sums is found.tokens_per_expert is None
    for objective in objectives:
        objective.backward()
    # What the gradient of a row with a NaN is, is left open.
    finite = ~logits[0].isnan().any(dim=1)
    rtol = KERNEL_GRADIENT if case.dtype == torch.float32 else float(torch.finfo(case.dtype).eps)
    gradients = [one.grad.float() for one in logits]
    close(gradients[1][finite], gradients[0][finite], KERNEL_GRADIENT * scale, rtol)


def check_swaps(case: Case, logits: torch.Tensor, expected: torch.Tensor, found: torch.Tensor) -> None:
    """On a GPU, whose exp is approximate, what was chosen instead may differ by rounding; by nothing where the logits
    themselves are compared."""
    options = options_of(case, logits.device.type)
    by_sum = case.group_score == "top2_sum" and case.kept < case.groups
    assert options["correction_bias"] is not None or by_sum
    on_logits = case.bias_on == "logits"
    choice = logits.detach().double() if on_logits else affinities(logits.detach().double(), case.score_function)
    choice = choice if options["correction_bias"] is None else choice + options["correction_bias"]
    if case.kept == case.groups:
        close(choice.gather(1, found), choice.gather(1, expected), 4 * torch.finfo(torch.float32).eps)


def close(found: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol, equal_nan=True)


def check_grouping(tokens: int, experts: int, top_k: int, seed: int, kind: str, device: str = "cpu") -> None:
    """Both implementations against what the words say: stable, complete, and where each expert begins."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(experts, (tokens, top_k), generator=generator)
    if kind == "one expert":
        ids = torch.full_like(ids, experts - 1)
    elif kind == "elsewhere":  # the id E: an expert of another rank
        ids = torch.randint(experts + 1, (tokens, top_k), generator=generator)
    elif kind == "few experts":
        ids = ids // 3 * 3
    ids = ids.to(torch.int32) if seed % 2 else ids
    choices = sorted(range(tokens * top_k), key=ids.flatten().tolist().__getitem__)
    for implementation in ("eager", "triton"):
        groups = group_by_expert(ids.to(device), experts, implementation=implementation)
        assert groups.permutation.dtype == groups.inverse.dtype == torch.int64 and groups.offsets.dtype == torch.int32
        assert groups.permutation.tolist() == choices
        assert groups.permutation[groups.inverse].tolist() == list(range(tokens * top_k))
        counts = [int((ids == expert).sum()) for expert in range(experts)]
        assert groups.offsets.diff().tolist() == counts and groups.offsets[0] == 0


def check_rounding(tokens: int, device: str = "cpu") -> int:
    """V3's gate at its real size. Where the implementations choose differently, what they chose instead differs by
    no more than affinities are rounded. Returns the number of tokens with such a difference."""
    logits, bias = torch.randn(tokens, 256, device=device), torch.randn(256, device=device) * 0.1
    options = {"score_function": "sigmoid", "correction_bias": bias, "num_groups": 8, "top_k_groups": 4,
               "group_score": "top2_sum", "normalize": True, "scaling_factor": 2.5}  # fmt: skip
    expected, found = (route(logits, 8, implementation=name, **options) for name in ("eager", "triton"))
    different = (expected.expert_ids != found.expert_ids).any(dim=1)
    close(found.weights[~different], expected.weights[~different], KERNEL_WEIGHTS * 2.5, KERNEL_WEIGHTS)
    choice = logits.double().sigmoid() + bias
    groups = choice.view(tokens, 8, 32).topk(2).values.sum(dim=-1).topk(5).values
    same_groups = groups[:, 3] - groups[:, 4] > 4 * torch.finfo(torch.float32).eps
    gaps = choice.gather(1, expected.expert_ids) - choice.gather(1, found.expert_ids)
    assert (gaps[different & same_groups].abs() <= 4 * torch.finfo(torch.float32).eps).all()
    return int(different.sum())
