"""MoE blocks as loops over tokens and experts. They have nothing of the package but the weights."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from conftest import TINY, V3_LIKE
from other_families import family
from tolerances import DOUBLE, KERNEL_WEIGHTS
from torch import nn

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseekmoe.routing_options import RoutingOptions

GENERATOR = torch.Generator().manual_seed(3)
PROSE, CODE = (torch.randint(low, low + 50, (4, 9), generator=GENERATOR) for low in (3, 40))
TEXT = {"prose": list(PROSE[:3].split(2)), "code": list(CODE.split(2))}
BLOCKS = [batch for own in TEXT.values() for batch in own]


@dataclass(frozen=True)
class Rule:
    """How a gate chooses, as its paper says."""

    score: str = "softmax"
    groups: int = 1
    kept: int = 1
    best: int = 1  # experts of a group whose values are added
    normalises: bool = False
    scale: float = 1.0
    bias_on: str = "scores"
    dtype: torch.dtype = torch.float64  # of the scores
    product: torch.dtype = torch.float64
    tolerance: float = DOUBLE

    @property
    def options(self) -> RoutingOptions:
        """The same, of three experts a token, for the package."""
        group_score = {1: "max", 2: "top2_sum"}[self.best]
        of_groups = self.groups, self.kept, group_score, self.normalises
        return RoutingOptions(3, self.score, *of_groups, scaling_factor=self.scale, bias_on=self.bias_on)


@dataclass(frozen=True)
class Change:
    """What is changed, in one layer or in all."""

    masked: int = 0
    expert: int | None = None
    top_k: int = 3
    same_sum: bool = False
    shared: bool = True
    layer: int | None = None


OWN = {"n_routed_experts": 16, "router_dtype": "auto", "norm_topk_prob": False}
OF_V2 = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 4.0}
# transformers' gates score in float32, whatever the dtype of the model is. The last bit of such a score depends on how
# many torch computes at once, and that bit of a weight is seen in the loss, at 1e-7.
IN_FLOAT32 = {"dtype": torch.float32, "tolerance": KERNEL_WEIGHTS, "normalises": True}
CASES: dict[str, tuple[Rule, dict[str, Any]]] = {
    "v1": (Rule(), OWN),
    "v2": (Rule(groups=4, kept=2, scale=4.0), OWN | OF_V2),
    "v3": (Rule("sigmoid", 4, 2, 2, True, 2.5), OWN | V3_LIKE),
    "glm4_moe": (
        Rule("sigmoid", 2, 1, 2, product=torch.float32, **IN_FLOAT32),
        {"n_routed_experts": 16, "num_local_experts": 16, "n_group": 2, "topk_group": 1},
    ),
    "qwen3_moe": (Rule(**IN_FLOAT32), {"norm_topk_prob": True}),
}


# Of gates that are called alone.
RULES = (
    *(Rule(score, normalises=score == "sigmoid") for score in ("softmax", "sigmoid", "sqrtsoftplus")),
    *(Rule(score, bias_on="logits", scale=1.5) for score in ("softmax", "sqrtsoftplus")),
    *(Rule(score, 4, 2, 1, score == "sigmoid") for score in ("softmax", "sigmoid")),
    *(Rule(score, 4, 2, 2, score == "sigmoid", 2.5) for score in ("softmax", "sigmoid", "sqrtsoftplus")),
)


def model_of(name: str, **more: Any) -> nn.Module:
    """A tiny model in float64, with balancing biases that change choices."""
    fields = CASES[name][1]
    torch.manual_seed(0)
    if name in ("v1", "v2", "v3"):
        model = DeepseekMoeForCausalLM(DeepseekMoeConfig(**{**TINY, **fields, **more}))
    else:
        model = family(name, **fields, **more)
        model.set_experts_implementation("eager")  # the only one in float64
    for module in model.modules():
        if getattr(module, "e_score_correction_bias", None) is not None:
            module.e_score_correction_bias.normal_(std=0.3)
    return model.double().eval().requires_grad_(False)


def choose(
    logits: torch.Tensor, rule: Rule, bias: Sequence[float], top_k: int, masked: int = 0, excluded: Sequence[int] = ()
) -> tuple[list[int], list[float], set[int]]:
    """The experts of one token, best first, their weights, and the experts that it must not choose."""
    functions = {"softmax": partial(torch.softmax, dim=-1), "sigmoid": torch.sigmoid}
    scores = functions.get(rule.score, lambda x: x.exp().log1p().sqrt())(logits.to(rule.dtype)).tolist()
    compared = scores if rule.bias_on == "scores" else logits.tolist()
    values = [value + more for value, more in zip(compared, bias, strict=True)]
    ranked = sorted(range(len(values)), key=lambda expert: -values[expert])
    out, size = {*excluded, *ranked[:masked]}, len(values) // rule.groups

    def value_of(group: int) -> float:  # one with fewer experts than are added comes last
        left = [values[expert] for expert in ranked if expert // size == group and expert not in out]
        return sum(left[: rule.best]) if len(left) >= rule.best else -math.inf

    groups = sorted(range(rule.groups), key=lambda group: -value_of(group))[: rule.kept]
    chosen = [expert for expert in ranked if expert not in out and expert // size in groups][:top_k]
    assert len(chosen) == top_k
    total = sum(scores[expert] for expert in chosen) if rule.normalises else 1.0
    return chosen, [rule.scale * scores[expert] / total for expert in chosen], out


def output_of(experts: nn.Module, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    gate, up = (experts.gate_up_proj[expert] @ hidden).chunk(2)
    return experts.down_proj[expert] @ (F.silu(gate) * up)


class Loop:
    """A copy of a model whose MoE blocks are loops.

    `seen` holds by layer what they did with each token: its hidden state, the ids, their weights, and what was masked.
    """

    def __init__(self, model: nn.Module, rule: Rule) -> None:
        self.model, self.rule, self.change = copy.deepcopy(model).eval(), rule, Change()
        layers = enumerate(self.model.model.layers)
        self.blocks = {index: layer.mlp for index, layer in layers if hasattr(layer.mlp, "experts")}
        for index, block in self.blocks.items():
            block.forward = partial(self.forward, index, block)

    def forward(self, index: int, block: nn.Module, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        change = self.change if self.change.layer in (None, index) else Change()
        tokens, wide = hidden.flatten(0, 1), self.rule.product
        outputs, bias = torch.zeros_like(tokens), getattr(block.gate, "e_score_correction_bias", None)
        logits = F.linear(tokens.to(wide), block.gate.weight.to(wide))
        added = [0.0] * len(block.gate.weight) if bias is None else bias.tolist()
        excluded = () if change.expert is None else (change.expert,)
        for row, token in enumerate(tokens):
            ids, weights, out = choose(logits[row], self.rule, added, change.top_k, change.masked, excluded)
            if change.same_sum:
                _, before, _ = choose(logits[row], self.rule, added, 3)
                weights = [weight * sum(before) / sum(weights) for weight in weights]
            for expert, weight in zip(ids, weights, strict=True):
                outputs[row] += weight * output_of(block.experts, expert, token)
            self.seen[index].append((token, ids, weights, out))
        if getattr(block, "shared_experts", None) is not None and change.shared:
            outputs += block.shared_experts(tokens)
        outputs = outputs.view_as(hidden)
        return (outputs, None) if isinstance(self.model, DeepseekMoeForCausalLM) else outputs

    @torch.no_grad()
    def losses(self, batches: Sequence[torch.Tensor], change: Change) -> torch.Tensor:
        """Of every block."""
        self.change, self.seen, losses = change, {index: [] for index in self.blocks}, []
        for batch in batches:
            for row, of_row in zip(batch, self.model(input_ids=batch, use_cache=False).logits, strict=True):
                following = zip(of_row[:-1].double(), row[1:].tolist(), strict=True)
                losses.append(sum(-of_token.log_softmax(-1)[token] for of_token, token in following) / (len(row) - 1))
        return torch.stack(losses)


def counts_of(choices: Sequence[Sequence[int]], experts: int) -> list[int]:
    return [sum(ids.count(expert) for ids in choices) for expert in range(experts)]


def distance(one: Sequence[int], other: Sequence[int]) -> float:
    divergence = 0.0
    for a, b in zip(one, other, strict=True):
        p, q = a / sum(one), b / sum(other)
        divergence += sum(x / 2 * math.log2(2 * x / (p + q)) for x in (p, q) if x)
    return math.sqrt(max(divergence, 0.0))


def number(shares: Sequence[float]) -> float:
    total = sum(shares)
    return math.exp(-sum(share / total * math.log(share / total) for share in shares if share))
