"""LoRA on stacked experts: equal to plain PEFT, without ever building a stack, and all that LoRA layers can do."""

import copy
import gc
import json
from pathlib import Path

import pytest
import torch
from conftest import BOTH_SIZES, TINY
from lora_cases import IDS, MODELS, STACKS, V3, LargestTensor, direct, direct_layers, logits, make, plain, several
from peft import PeftModel
from safetensors.torch import load_file
from tolerances import LOW_PRECISION_CHANGE, assert_same
from torch import nn

from modeling_deepseekmoe import (
    DeepseekMoeConfig,
    DeepseekMoeForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    expert_lora_config,
    optimize_expert_lora,
)
from modeling_deepseekmoe.lora.layer import ExpertLora, LinearWeightLora


# ----------------------------------------------------------------------------------------------- equal to plain PEFT
def assert_equal_to_peft(reference: PeftModel, ours: PeftModel, ids: torch.Tensor) -> None:
    """Logits, and the gradients of every adapter parameter."""
    results = []
    for model in (reference, ours):
        output = model.train()(ids).logits
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results.append((output, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (expected, expected_gradients), (found, gradients) = results
    assert_same(found, expected, "logits")
    assert gradients.keys() == expected_gradients.keys() and len(gradients) > 0
    for name, gradient in gradients.items():
        assert_same(gradient, expected_gradients[name], name)


@BOTH_SIZES
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_outputs_and_gradients_equal_those_of_peft(name: str, tokens: int) -> None:
    reference = plain(make(name))
    ours = optimize_expert_lora(copy.deepcopy(reference))
    assert not direct_layers(reference) and len(direct_layers(ours)) >= 4
    assert_equal_to_peft(reference, ours, torch.randint(3, 96, (1, tokens)))


@BOTH_SIZES
@pytest.mark.parametrize("parameters", [STACKS[:1], STACKS[1:], STACKS], ids=["gate_up", "down", "both"])
@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_projections_ranks_and_scalings(parameters: list[str], rank: int, use_rslora: bool) -> None:
    reference = plain(make(), parameters, r=rank, use_rslora=use_rslora)
    assert_equal_to_peft(reference, optimize_expert_lora(copy.deepcopy(reference)), IDS)


@BOTH_SIZES
@pytest.mark.parametrize("tokens", [3, 40])
def test_experts_without_tokens_have_a_gradient_of_zero(tokens: int) -> None:
    """Five of eight experts get nothing, two of the others nearly everything."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**V3, "n_group": 1, "topk_group": 1})).eval()
    for layer in (1, 2):
        model.model.layers[layer].mlp.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9, 9] + [0] * 5))
    reference = plain(model)
    ours = optimize_expert_lora(copy.deepcopy(reference))
    assert_equal_to_peft(reference, ours, torch.randint(3, 96, (1, tokens)))
    for layer in direct_layers(ours):
        for gradient in (layer.lora_A["default"].weight.grad.unflatten(0, (8, -1)).transpose(0, -1),
                         layer.lora_B["default"].weight.grad.unflatten(1, (-1, 8))):  # fmt: skip
            used = gradient.flatten(0, -2).abs().amax(0) > 0
            assert used.tolist() == [True] * 3 + [False] * 5


@BOTH_SIZES
def test_odd_widths() -> None:
    """Rows that are no multiple of 16 bytes, which torch's grouped product does not take."""
    torch.manual_seed(0)
    config = DeepseekMoeConfig(**{**TINY, "hidden_size": 36, "moe_intermediate_size": 13, "head_dim": 8})
    model = DeepseekMoeForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    reference = plain(model)
    assert_equal_to_peft(reference, optimize_expert_lora(copy.deepcopy(reference)), IDS)


@BOTH_SIZES
def test_one_expert_in_all() -> None:
    torch.manual_seed(0)
    config = DeepseekMoeConfig(**{**TINY, "n_routed_experts": 1, "num_experts_per_tok": 1})
    reference = plain(DeepseekMoeForCausalLM(config).eval())
    assert_equal_to_peft(reference, optimize_expert_lora(copy.deepcopy(reference)), IDS)


def test_no_stack_is_ever_built() -> None:
    """Forward and backward, many tokens and one, with dropout; plain PEFT builds it, so the test can fail."""
    torch.manual_seed(0)
    config = DeepseekMoeConfig(**{**TINY, "hidden_size": 64, "moe_intermediate_size": 128, "n_routed_experts": 16})
    model = DeepseekMoeForCausalLM(config).requires_grad_(False)
    stack = model.model.layers[1].mlp.experts.down_proj.numel()
    largest = {}
    for way, adapted in (("ours", direct(model, lora_dropout=0.1)), ("peft", plain(model))):
        with LargestTensor() as mode:
            adapted.train()(IDS).logits.sum().backward()
            logits(adapted.eval(), IDS[:1, :1])
        largest[way] = mode.elements
    assert largest["ours"] < stack <= largest["peft"]


# ----------------------------------------------------------------------------------------------------- files, configs
@pytest.mark.parametrize("name", MODELS)
def test_what_we_save_plain_peft_reads_and_the_other_way_round(name: str, tmp_path: Path) -> None:
    model = make(name)
    shared = ("shared_experts",) if "deepseek" in name.lower() else ()
    ours = direct(model, lora_dropout=0.3, target_modules=("self_attn", *shared)).eval()
    ours.save_pretrained(tmp_path / "ours")
    reference = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert not direct_layers(reference)
    assert_same(logits(reference), logits(ours))
    reference.save_pretrained(tmp_path / "peft")
    again = optimize_expert_lora(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "peft")).eval()
    assert torch.equal(logits(again), logits(ours))
    first, second = (load_file(tmp_path / way / "adapter_model.safetensors") for way in ("ours", "peft"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0 and "experts" not in config
    assert config.keys() == json.loads((tmp_path / "peft" / "adapter_config.json").read_text()).keys()


@pytest.mark.parametrize("name", ["deepseekmoe", "deepseek_v3", "transformers' DeepSeek-V3"])
def test_targets_beside_the_experts(name: str) -> None:
    """PEFT takes `gate_proj` in a V3 model for that of the routed experts; here the shared experts get it."""
    model = direct(make(name), target_modules=("q_proj", "shared_experts"), lora_dropout=0.1)
    kinds = {key: type(module) for key, module in model.named_modules() if hasattr(module, "lora_A")}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        assert kinds[f"base_model.model.model.layers.1.mlp.shared_experts.{projection}"] is LinearWeightLora
        assert f"base_model.model.model.layers.0.mlp.{projection}" not in kinds
    assert "base_model.model.model.layers.0.self_attn.q_proj" in kinds
    assert sum(kind is ExpertLora for kind in kinds.values()) == 4
    loss = model.train()(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if p.requires_grad)


def test_a_dense_layer_is_adapted_only_where_it_is_named() -> None:
    model = direct(make(), target_modules=("layers.0.mlp",))
    names = [name for name, module in model.named_modules() if isinstance(module, LinearWeightLora)]
    assert names == [f"base_model.model.model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]


# ------------------------------------------------------------------------------------------------------ what LoRA can
class Halves(nn.Module):
    """A dropout that zeroes every second row and is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(rows))
        return rows * (torch.arange(len(rows)) % 2).view(-1, 1)


@BOTH_SIZES
def test_dropout_falls_on_the_inputs_of_the_adapter_alone() -> None:
    """Against a loop over tokens and choices."""
    ours = direct(make(), lora_dropout=0.5).eval()
    outer = ours.base_model.model.model.layers[1].mlp.experts
    down, gate_up = outer.chain()
    assert [type(layer.lora_dropout["default"]) for layer in (down, gate_up)] == [nn.Dropout] * 2
    masks = {"gate_up_proj": Halves(), "down_proj": Halves()}
    for layer in (down, gate_up):
        layer.lora_dropout["default"] = masks[layer.parameter_name]
    torch.manual_seed(3)
    hidden, experts = torch.randn(5, 32), outer.get_base_layer()
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(5)])
    weights = torch.rand(5, 3)
    found = outer(hidden, ids, weights)
    assert masks["gate_up_proj"].rows == masks["down_proj"].rows == [15]
    place = torch.empty(15, dtype=torch.long)  # of every slot in the order by expert
    place[torch.sort(ids.flatten(), stable=True).indices] = torch.arange(15)
    expected = torch.zeros(5, 32)
    for token in range(5):
        for choice in range(3):
            expert, kept = ids[token, choice], place[3 * token + choice] % 2
            values = hidden[token]
            for layer, stack in ((gate_up, experts.gate_up_proj), (down, experts.down_proj)):
                factor_a, factor_b = layer.factors("default")
                delta = factor_b[..., expert] @ factor_a[expert] @ (values * kept)
                values = stack[expert] @ values + 2 * delta
                if layer is gate_up:
                    gate, up = values.chunk(2)
                    values = nn.functional.silu(gate) * up
            expected[token] += weights[token, choice] * values
    assert_same(found, expected)


def test_dropout_of_shared_experts_falls_on_the_inputs_of_the_adapter_too() -> None:
    ours = direct(make(), lora_dropout=0.5, target_modules=("shared_experts",))
    layer = ours.base_model.model.model.layers[1].mlp.shared_experts.up_proj
    assert type(layer.lora_dropout["default"]) is nn.Dropout
    layer.lora_dropout["default"] = Halves()
    rows = torch.randn(2, 3, 32)
    kept = rows * (torch.arange(6) % 2).view(2, 3, 1)
    delta = 2 * kept @ layer.lora_A["default"].weight.t() @ layer.lora_B["default"].weight.t()
    assert_same(layer(rows), rows @ layer.base_layer.weight.t() + delta)


def test_dropout_of_all_adapters_on_experts_and_of_nothing_else() -> None:
    adapted = direct(make(), target_modules=("shared_experts",))
    adapted.add_adapter("b", expert_lora_config(make(), r=2, target_modules=("shared_experts",)))
    optimize_expert_lora(adapted, lora_dropout=0.25)
    for layer in direct_layers(adapted):
        for name in ("default", "b"):
            assert getattr(layer.lora_dropout[name], "p", 0) == (0.25 if isinstance(layer, ExpertLora) else 0)


def test_dropout_in_training_only_and_set_afterwards() -> None:
    ours = direct(make(), lora_dropout=0.5)
    assert not torch.equal(logits(ours.train()), logits(ours))
    assert_same(logits(ours.eval()), logits(direct(make()).eval()))
    reference = optimize_expert_lora(plain(make()), lora_dropout=0.5)
    assert not torch.equal(logits(reference.train()), logits(reference))
    assert_same(logits(optimize_expert_lora(reference, lora_dropout=0.0)), logits(reference.eval()))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        ours = direct(make(), target_modules=("self_attn",)).train()
        if checkpointing:
            ours.enable_input_require_grads()
            ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        ours(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert_same(gradients[1][name], gradient, name)


@BOTH_SIZES
@pytest.mark.parametrize("tokens", [1, 9])
def test_autocast_and_low_precision(tokens: int) -> None:
    """What the adapter changes, on a base in bfloat16 and under autocast, for few and for many slots. PEFT keeps the
    adapters in float32."""
    ids = IDS[:1, :tokens]
    base = make()
    adapted = direct(base).eval()
    change = logits(adapted, ids) - logits(base, ids)
    low_base = make().to(torch.bfloat16)
    low = direct(low_base)
    assert all(p.dtype == torch.float32 for n, p in low.named_parameters() if "lora_" in n)
    found = {"bfloat16": logits(low.eval(), ids) - logits(low_base, ids)}
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = logits(adapted, ids) - logits(base, ids)
        adapted.train()(ids).logits.float().square().mean().backward()
    for name, value in found.items():
        assert (value.float() - change).norm() <= LOW_PRECISION_CHANGE * change.norm(), name
    low.train()(ids).logits.float().square().mean().backward()
    for model in (low, adapted):
        assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


@BOTH_SIZES
def test_compiled() -> None:
    ours = direct(make())
    expected = logits(ours.eval())
    assert_same(logits(torch.compile(ours)), expected)


def test_switching_leaks_nothing(tmp_path: Path) -> None:
    adapted, outputs = several(tmp_path)

    def state() -> tuple[int, int, int]:
        gc.collect()
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in adapted.modules())
        return hooks, sum(isinstance(item, torch.Tensor) for item in gc.get_objects()), len(list(adapted.modules()))

    def switch(times: int) -> None:
        for number in range(times):
            name = ("default", "down", "gate_up", "chosen")[number % 4]
            adapted.set_adapter(name)
            assert_same(logits(adapted), outputs[name])
            logits(adapted, adapter_names=["down", "chosen"])
            with adapted.disable_adapter():
                logits(adapted)

    switch(4)
    before = state()
    switch(100)
    after = state()
    assert after[0] == before[0] and after[1] <= before[1] and after[2] == before[2]
