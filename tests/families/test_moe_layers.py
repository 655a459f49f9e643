"""The MoE layers of transformers' own families: where they are found, and how their gates choose."""

import copy
import logging

import other_families
import pytest
import torch
import transformers
from packaging.version import Version
from tolerances import assert_same
from torch import nn

from modeling_deepseekmoe import route_native_gates, track_router_load
from modeling_deepseekmoe.families.gate_rules import UnknownGateError, rule_of, tensor_at
from modeling_deepseekmoe.families.moe_layers import find_moe_layers, require_moe_layers

IDS = torch.randint(3, 100, (2, 10), generator=torch.Generator().manual_seed(1))
# One of every kind: as V3 to the letter, V2, softmax with and without a norm, a bias of another name or place, one on
# the logits, a fixed choice by token id, softmax of the chosen, an offset, a scale outside the gate, another epsilon.
EXPRESSED = ("deepseek_v3", "glm4_moe", "glm_moe_dsa", "deepseek_v2", "qwen3_moe", "mixtral", "olmoe", "afmoe",
             "hy_v3", "minimax_m2", "ernie4_5_moe", "kolibri1", "deepseek_v4", "granitemoe", "gpt_oss",
             "laguna", "lfm2_moe")  # fmt: skip


NEED_A_BATCH = ("granitemoe", "laguna")
# Before, Granite's gates returned ids first, and were left to themselves.
LOGITS_FIRST = Version(transformers.__version__) >= Version("5.23")


def family(name: str) -> nn.Module:
    model = other_families.family(name)
    generator = torch.Generator().manual_seed(3)
    for layer in find_moe_layers(model):
        if layer.bias is not None:
            with torch.no_grad():
                layer.bias.tensor.copy_(torch.randn(layer.bias.tensor.shape, generator=generator) * 0.2)
        for buffer in layer.gate.buffers() if layer.gate is not None else ():
            if buffer.ndim == 2 and not buffer.is_floating_point():  # a table of experts for each token id
                buffer.copy_(torch.rand(len(buffer), 8, generator=generator).topk(buffer.shape[1]).indices)
    return model


def outputs(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
    """Logits, all gradients, and the choices of every layer, sorted."""
    chosen: list[torch.Tensor] = []
    handles = [
        layer.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1].sort(dim=1).values))
        for layer in find_moe_layers(model)
    ]
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.square().mean().backward()
    for handle in handles:
        handle.remove()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, chosen


@pytest.mark.parametrize("name", EXPRESSED)
def test_fused_routing_is_the_familys_own(name: str) -> None:
    if name == "granitemoe" and not LOGITS_FIRST:
        pytest.skip("its gate returns ids first")
    own = family(name).train()
    fused = copy.deepcopy(own)
    assert route_native_gates(fused) == len(find_moe_layers(own))
    (expected, gradients, choices), (found, found_gradients, found_choices) = outputs(own), outputs(fused)
    assert all(map(torch.equal, choices, found_choices)) and len(choices) >= len(find_moe_layers(own))
    assert_same(found, expected)
    assert set(found_gradients) == set(gradients)
    for key, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[key], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


def test_the_bias_is_found_under_every_name() -> None:
    expected = {
        "glm4_moe": ("Glm4MoeTopkRouter", "e_score_correction_bias"),
        "afmoe": ("AfmoeSparseMoeBlock", "expert_bias"),
        "ernie4_5_moe": ("Ernie4_5_MoeStatics", "e_score_correction_bias"),
        "minimax_m2": ("MiniMaxM2SparseMoeBlock", "e_score_correction_bias"),
        "lfm2_moe": ("Lfm2MoeSparseMoeBlock", "expert_bias"),
        "gpt_oss": None,  # its `bias` is one of the logits, and trained
    }
    for name, found in expected.items():
        bias = find_moe_layers(family(name))[-1].bias
        assert (bias and (type(bias.owner).__name__, bias.name)) == found


def test_layers_are_those_of_the_language_model() -> None:
    layers = find_moe_layers(family("qwen3_moe"))
    assert [layer.index for layer in layers] == [0, 1, 2, 3] and layers[0].name == "model.layers.0.mlp"
    glm = find_moe_layers(family("glm4_moe"))
    assert [layer.index for layer in glm] == [1, 2, 3]
    assert glm[0].shared_experts is not None and layers[0].shared_experts is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("phimoe", r"router \(PhimoeTopKRouter\) is not allowed: route\(\) has no options"),
        ("inkling", "it must have one matrix with 8 rows, one an expert, and has weight .10, 64., global_scale"),
    ],
)
def test_gates_of_an_unknown_kind_are_named(name: str, reason: str) -> None:
    model = family(name)
    with pytest.raises(UnknownGateError, match=reason):
        rule_of(find_moe_layers(model)[0])
    with pytest.raises(ValueError, match=reason):
        route_native_gates(model)
    track_router_load(model)  # what they choose can be counted all the same


def test_what_only_small_scores_show() -> None:
    model = family("glm4_moe")
    gate = find_moe_layers(model)[0].gate

    class Floored(type(gate)):
        """Its weights have a floor."""

        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits, weights, ids = super().forward(hidden_states)
            floor = logits.sigmoid().gather(1, ids).sum(1, keepdim=True).clamp(max=1e-3) / 1e-3
            return logits, weights * floor, ids

    gate.__class__ = Floored
    reason = r"gate .*its (weights|gradients) differ from those of route"
    with pytest.raises(UnknownGateError, match=reason):
        rule_of(find_moe_layers(model)[0])


@pytest.mark.parametrize("name", [*EXPRESSED, "muse_spark"])
def test_what_is_added_to_a_sum_of_scores(name: str) -> None:
    """Nothing that shows, but for LFM2: Muse Spark's 1e-15 does not. Also where all scores are small."""
    if name == "granitemoe" and not LOGITS_FIRST:
        pytest.skip("its gate returns ids first")
    layer = find_moe_layers(family(name))[-1]
    rule = rule_of(layer)
    assert rule.options.epsilon == (1e-6 if name == "lfm2_moe" else 1e-20)
    if rule.table or rule.takes or not rule.options.normalize:
        return
    with torch.no_grad():
        hidden = torch.rand(20, tensor_at(layer.gate, rule.matrix).shape[1]) + 0.5
        matrix = tensor_at(layer.gate, rule.matrix)
        matrix.copy_(-matrix.abs() - 0.01)
        matrix *= 25 / -(hidden @ matrix.T).mean() / rule.factor
        logits, weights, ids = layer.gate(hidden[None] if name in NEED_A_BATCH else hidden)
        found = rule.route(
            layer.gate, rule.logits(layer.gate, hidden), None if layer.bias is None else layer.bias.tensor
        )
    assert logits.mean() < -20
    found_weights = found.weights.gather(1, found.expert_ids.argsort(dim=1))
    expected = weights.float().view_as(found_weights).gather(1, ids.view_as(found.expert_ids).argsort(dim=1))
    torch.testing.assert_close(found_weights, expected, rtol=1e-4, atol=1e-6)


def test_experts_that_are_not_stacked_are_named() -> None:
    model = other_families.family("llama4")
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.feed_forward .* its experts \(Llama4TextExperts\) are not"
    ):
        track_router_load(model)
    with pytest.raises(ValueError, match="Linear has no MoE layer: no module of it holds `experts`"):
        require_moe_layers(nn.Linear(2, 2))


def test_some_gates_are_left_to_themselves(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("modeling_deepseekmoe"), "propagate", True)
    model = family("qwen3_moe")
    model.model.layers[1].mlp.gate.scale = nn.Parameter(torch.ones(1))
    assert route_native_gates(model) == 3
    assert "1 of 4 gates choose by themselves" in caplog.text
    assert "model.layers.1.mlp.gate (Qwen3MoeTopKRouter) is not allowed: it has parameters whose part" in caplog.text


def test_a_rule_keeps_the_familys_dtypes() -> None:
    granite = (("granitemoe", (False, True, False)),) if LOGITS_FIRST else ()
    for name, dtypes in (("deepseek_v3", (True, True, True)), ("qwen3_moe", (False, False, False)),
                         ("mixtral", (False, False, True)), *granite):  # fmt: skip
        rule = rule_of(find_moe_layers(family(name))[-1])
        assert (rule.in_float32, rule.logits_in_float32, rule.weights_in_float32) == dtypes
        own = family(name).to(torch.bfloat16)
        gate = find_moe_layers(own)[-1].gate
        hidden = torch.randn(1, 5, 64).bfloat16()
        expected = gate(hidden)
        route_native_gates(own)
        assert [tensor.dtype for tensor in gate(hidden)] == [tensor.dtype for tensor in expected]
