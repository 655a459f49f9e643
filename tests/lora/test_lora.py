"""LoRA on stacked experts: equal to plain PEFT, without ever building a stack, and all that LoRA layers can do."""

import copy
import gc
import json
from pathlib import Path

import pytest
import torch
from conftest import BOTH_SIZES, TINY
from lora_cases import IDS, MODELS, STACKS, V3, LargestTensor, direct, direct_layers, logits, make, plain
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tolerances import LOW_PRECISION_CHANGE, LOW_PRECISION_LOSS, MERGED_LOGITS, assert_same
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
from modeling_deepseekmoe.modeling_deepseekmoe import DeepseekMoeExperts


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


def several(tmp_path: Path) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """Adapters of other ranks, projections and experts in one model, and the logits of each alone."""
    model = make()
    adapted = optimize_expert_lora(direct(model))
    fields = {"init_lora_weights": False}
    adapted.add_adapter("down", expert_lora_config(model, r=2, projections=("down",), use_rslora=True, **fields))
    adapted.add_adapter("gate_up", LoraConfig(r=3, target_modules=[], target_parameters=STACKS[:1], **fields))
    adapted.add_adapter("chosen", expert_lora_config(model, r=5, experts={2: [1, 4]}, lora_dropout=0.2, **fields))
    adapted.eval()
    outputs = {}
    for name in ("default", "down", "gate_up", "chosen"):
        adapted.set_adapter(name)
        outputs[name] = logits(adapted)
        adapted.save_pretrained(tmp_path, selected_adapters=[name])
        folder = tmp_path if name == "default" else tmp_path / name
        assert_same(outputs[name], logits(PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()), name)
    with adapted.disable_adapter():
        outputs["__base__"] = logits(adapted)
    assert torch.equal(outputs["__base__"], logits(model))
    return adapted, outputs


@pytest.mark.parametrize("first", ["gate_up", "down"])
def test_adapters_of_one_projection_each_in_one_model(first: str, tmp_path: Path) -> None:
    """Whatever came first, every adapter keeps the names that it has alone."""
    model, second = make(), {"gate_up": "down", "down": "gate_up"}[first]
    adapted = optimize_expert_lora(direct(model, projections=(first,))).eval()
    before = logits(adapted)
    adapted.add_adapter("second", expert_lora_config(model, r=3, projections=(second,), init_lora_weights=False))
    adapted.add_adapter("both", expert_lora_config(model, r=2, init_lora_weights=False))
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), before)
    adapted.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second"), ("both", tmp_path / "both")):
        adapted.set_adapter(name)
        alone = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        assert_same(logits(alone), logits(adapted), name)
    loaded = optimize_expert_lora(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "both"))
    for name, folder in (("default2", tmp_path), ("second", tmp_path / "second")):
        loaded.load_adapter(folder, name)
        loaded.set_adapter(name)
        adapted.set_adapter(name.removesuffix("2"))
        assert_same(logits(loaded.eval()), logits(adapted), name)


def test_mixed_batches_equal_every_adapter_alone(tmp_path: Path) -> None:
    adapted, outputs = several(tmp_path)
    names = ["down", "__base__", "chosen", "default", "gate_up", "down"]
    found = logits(adapted, IDS[:1].expand(6, -1), adapter_names=names)
    for row, name in zip(found, names, strict=True):
        assert_same(row, outputs[name][0], name)
    found = adapted.generate(IDS[:1].expand(6, -1), adapter_names=names, max_new_tokens=4, do_sample=False)
    for row, name in zip(found, names, strict=True):
        adapted.set_adapter("default" if name == "__base__" else name)
        if name != "__base__":
            assert torch.equal(row, adapted.generate(IDS[:1], max_new_tokens=4, do_sample=False)[0]), name


def test_mixed_batches_of_shared_experts_and_attention() -> None:
    model = make()
    adapted = direct(model, target_modules=("shared_experts", "q_proj")).eval()
    adapted.add_adapter(
        "b", expert_lora_config(model, r=2, target_modules=("shared_experts",), init_lora_weights=False)
    )
    expected = logits(adapted)[0]
    found = logits(adapted, adapter_names=["default", "b"])
    assert_same(found[0], expected)
    adapted.set_adapter("b")
    assert_same(found[1], logits(adapted)[1])


def test_mixed_batches_in_bfloat16() -> None:
    model = make().to(torch.bfloat16)
    adapted = direct(model, target_modules=("shared_experts",)).eval()
    adapted.add_adapter(
        "b", expert_lora_config(model, r=2, target_modules=("shared_experts",), init_lora_weights=False)
    )
    found = logits(adapted, IDS[:1].expand(2, -1), adapter_names=["default", "b"])
    assert found.dtype == torch.bfloat16
    for row, name in zip(found, ("default", "b"), strict=True):
        adapted.set_adapter(name)
        assert (row - logits(adapted, IDS[:1])[0]).abs().max() <= LOW_PRECISION_LOSS


def test_two_active_adapters_add_up() -> None:
    reference = plain(make())
    reference.add_adapter("b", LoraConfig(r=2, target_modules=[], target_parameters=STACKS, init_lora_weights=False))
    ours = optimize_expert_lora(copy.deepcopy(reference))
    for model in (reference, ours):
        model.base_model.set_adapter(["default", "b"])
        model.eval()
    assert_same(logits(ours), logits(reference))


def test_merging_and_unmerging(tmp_path: Path) -> None:
    adapted, outputs = several(tmp_path)
    adapted.set_adapter("default")
    reference = PeftModel.from_pretrained(make(), tmp_path).eval()
    adapted.merge_adapter(["default"])
    reference.merge_adapter()
    assert (logits(adapted) - outputs["default"]).abs().max() <= MERGED_LOGITS
    assert torch.equal(logits(adapted), logits(reference))
    with pytest.raises(ValueError, match=r"adapter_names is not allowed while adapters are merged"):
        logits(copy.deepcopy(adapted), adapter_names=["default", "down"])  # PEFT leaves its hooks after an error
    adapted.unmerge_adapter()
    assert_same(logits(adapted), outputs["default"])
    adapted.merge_adapter(["default"])
    with adapted.disable_adapter():  # takes the merge back, as PEFT's layers do
        assert_same(logits(adapted), outputs["__base__"])
    merged = adapted.merge_and_unload(adapter_names=["down"])
    assert type(merged.model.layers[1].mlp.experts) is DeepseekMoeExperts
    assert (logits(merged) - outputs["down"]).abs().max() <= MERGED_LOGITS
    assert not any("lora" in name for name in merged.state_dict())


def test_unloading_gives_the_base_back() -> None:
    model = make()
    unloaded = direct(model).unload()
    assert unloaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(unloaded), logits(model))


@pytest.mark.parametrize(("combination", "settings"), [("cat", {}), ("svd", {"svd_rank": 14})])
def test_weighted_sums_are_exact_with_enough_rank(combination: str, settings: dict, tmp_path: Path) -> None:
    adapted, _ = several(tmp_path)
    names, weights = ["default", "down", "chosen", "gate_up"], [0.5, -2.0, 1.5, 1.0]
    adapted.add_weighted_adapter(names, weights, "sum", combination_type=combination, **settings)
    checked = 0
    for layer in direct_layers(adapted):
        own = [(name, weight) for name, weight in zip(names, weights, strict=True) if name in layer.lora_A]
        expected = sum(weight * layer.get_delta_weight(name) for name, weight in own)
        assert_same(layer.get_delta_weight("sum"), expected, layer.target_name)
        checked += 1
    assert checked == 4
    adapted.set_adapter("sum")
    found = logits(adapted)
    adapted.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert_same(logits(PeftModel.from_pretrained(make(), tmp_path / "sum").eval()), found)


def test_a_smaller_rank_is_the_nearest_one() -> None:
    """Eckart and Young, expert by expert, with a rank below the sum."""
    adapted = optimize_expert_lora(direct(make()))
    adapted.add_adapter("b", expert_lora_config(make(), r=4, init_lora_weights=False))
    adapted.add_weighted_adapter(["default", "b"], [1.0, 1.0], "near", combination_type="svd", svd_rank=3)
    layer = direct_layers(adapted)[0]
    exact = (layer.get_delta_weight("default") + layer.get_delta_weight("b"))[5]
    left, values, right = torch.linalg.svd(exact.detach(), full_matrices=False)
    assert_same(layer.get_delta_weight("near")[5], left[:, :3] @ torch.diag(values[:3]) @ right[:3])


@pytest.mark.parametrize("combination", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_other_combinations_are_those_of_peft(combination: str) -> None:
    """They work on the factors, element by element, whatever their layout."""
    from peft.utils.merge_utils import magnitude_prune, task_arithmetic, ties

    adapted = optimize_expert_lora(direct(make()))
    adapted.add_adapter("b", expert_lora_config(make(), r=4, init_lora_weights=False))
    settings = {} if combination == "linear" else {"density": 0.5}
    adapted.add_weighted_adapter(["default", "b"], [1.0, 0.5], "new", combination_type=combination, **settings)
    layer = direct_layers(adapted)[0]
    factors = [layer.lora_A[name].weight.data for name in ("default", "b")]
    weights = torch.tensor([2.0**0.5, 1.0])  # square roots of weight times scaling
    formulas = {
        "linear": lambda: task_arithmetic(factors, weights),
        "ties": lambda: ties(factors, weights, 0.5, "total"),
        "magnitude_prune": lambda: magnitude_prune(factors, weights, 0.5),
    }
    if combination in formulas:
        assert_same(layer.lora_A["new"].weight, formulas[combination]())
    assert layer.lora_A["new"].weight.isfinite().all() and layer.lora_A["new"].weight.any()


def test_a_combination_that_does_not_exist_for_experts() -> None:
    adapted = optimize_expert_lora(direct(make()))
    with pytest.raises(ValueError, match=r"combination_type='ties_svd' is not allowed on stacked experts: .* linear"):
        adapted.add_weighted_adapter(["default"], [1.0], "new", combination_type="ties_svd")
    assert "new" not in adapted.peft_config


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
