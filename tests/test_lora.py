"""LoRA on stacked experts: equal to plain PEFT, without ever building a stack, and all that LoRA layers can do."""

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MLA, TINY, V3_LIKE
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from tolerances import LOW_PRECISION_CHANGE, LOW_PRECISION_LOSS, MERGED_LOGITS, assert_same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_deepseekmoe import (
    DeepseekMoeConfig,
    DeepseekMoeForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    ExpertSelection,
    expert_lora_config,
    optimize_expert_lora,
)
from modeling_deepseekmoe.experts import why_unsupported
from modeling_deepseekmoe.lora_layers import DirectLora, ExpertLora, LinearWeightLora
from modeling_deepseekmoe.modeling_deepseekmoe import DeepseekMoeExperts

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))


V3 = {**TINY, **V3_LIKE, "q_lora_rank": None, "first_k_dense_replace": 1}


def native_v3() -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(DeepseekV3Config(**V3, head_dim=4))


def native_v2() -> nn.Module:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    sizes = {**TINY, **MLA, "q_lora_rank": None, "first_k_dense_replace": 1, "head_dim": 4}
    return DeepseekV2ForCausalLM(DeepseekV2Config(**sizes, topk_method="greedy"))


def qwen3() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY, num_experts=8, head_dim=8))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=8))


MODELS = {
    "deepseekmoe": lambda: DeepseekMoeForCausalLM(DeepseekMoeConfig(**TINY)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**V3)),
    "transformers' DeepSeek-V2": native_v2,
    "transformers' DeepSeek-V3": native_v3,
    "transformers' Qwen3-MoE": qwen3,
    "transformers' Mixtral": mixtral,
}


def make(name: str = "deepseekmoe") -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def plain(model: nn.Module, parameters: list[str] | None = None, **kwargs: object) -> PeftModel:
    """An adapter of plain PEFT with random factors, also where PEFT would begin with zeros."""
    torch.manual_seed(2)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": [], "init_lora_weights": False, **kwargs}
    config = LoraConfig(target_parameters=parameters or STACKS, task_type="CAUSAL_LM", **fields)
    return get_peft_model(copy.deepcopy(model), config)


def direct(model: nn.Module, **kwargs: object) -> PeftModel:
    torch.manual_seed(2)
    fields = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **kwargs}
    return get_peft_model(copy.deepcopy(model), expert_lora_config(model, **fields))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS, **kwargs: object) -> torch.Tensor:
    return model(ids, **kwargs).logits


def direct_layers(model: nn.Module) -> list[DirectLora]:
    return [module for module in model.modules() if isinstance(module, DirectLora)]


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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_outputs_and_gradients_equal_those_of_peft(name: str, tokens: int) -> None:
    reference = plain(make(name))
    ours = optimize_expert_lora(copy.deepcopy(reference))
    assert not direct_layers(reference) and len(direct_layers(ours)) >= 4
    assert_equal_to_peft(reference, ours, torch.randint(3, 96, (1, tokens)))


@pytest.mark.parametrize("parameters", [STACKS[:1], STACKS[1:], STACKS], ids=["gate_up", "down", "both"])
@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_projections_ranks_and_scalings(parameters: list[str], rank: int, use_rslora: bool) -> None:
    reference = plain(make(), parameters, r=rank, use_rslora=use_rslora)
    assert_equal_to_peft(reference, optimize_expert_lora(copy.deepcopy(reference)), IDS)


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


def test_odd_widths() -> None:
    """Rows that are no multiple of 16 bytes, which torch's grouped product does not take."""
    torch.manual_seed(0)
    config = DeepseekMoeConfig(**{**TINY, "hidden_size": 36, "moe_intermediate_size": 13, "head_dim": 8})
    model = DeepseekMoeForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    reference = plain(model)
    assert_equal_to_peft(reference, optimize_expert_lora(copy.deepcopy(reference)), IDS)


def test_one_expert_in_all() -> None:
    torch.manual_seed(0)
    config = DeepseekMoeConfig(**{**TINY, "n_routed_experts": 1, "num_experts_per_tok": 1})
    reference = plain(DeepseekMoeForCausalLM(config).eval())
    assert_equal_to_peft(reference, optimize_expert_lora(copy.deepcopy(reference)), IDS)


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.elements = max(self.elements, tensor.numel())
        return result


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


# ------------------------------------------------------------------------------------- router, chosen experts, saving
def test_a_trained_router_and_its_bias_are_saved_with_the_adapter(tmp_path: Path) -> None:
    from modeling_deepseekmoe import update_router_bias

    for name in ("deepseek_v3", "transformers' DeepSeek-V3"):
        model = make(name)
        ours = get_peft_model(copy.deepcopy(model), expert_lora_config(model, r=4, train_router=True))
        if name.startswith("transformers"):
            from modeling_deepseekmoe import track_router_load

            track_router_load(ours)
        optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            ours.train()(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            update_router_bias(ours, 0.5)
        gate = ours.base_model.model.model.layers[1].mlp.gate.modules_to_save["default"]
        before = model.model.layers[1].mlp.gate
        assert gate.e_score_correction_bias.abs().max() >= 0.5 and not torch.equal(gate.weight, before.weight)
        folder = tmp_path / name[:8]
        ours.save_pretrained(folder)
        saved = load_file(folder / "adapter_model.safetensors")
        assert sum(key.endswith("gate.e_score_correction_bias") for key in saved) == 2
        reference = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        assert_same(logits(reference), logits(ours.eval()), name)


def test_a_router_that_is_not_named_stays_frozen() -> None:
    ours = direct(make("deepseek_v3"))
    assert not any(".gate." in name for name, p in ours.named_parameters() if p.requires_grad)


def test_only_the_chosen_experts_learn(tmp_path: Path) -> None:
    """With weight decay, dropout and random factors at the start; in plain PEFT, which knows nothing of it, too."""
    model = make()
    ours = direct(model, experts={1: [0, 6], 2: [3]}, lora_dropout=0.1)
    ours.save_pretrained(tmp_path)
    plain_one = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, is_trainable=True)
    for adapted in (ours, plain_one):
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        start = {name: p.clone() for name, p in adapted.named_parameters()}
        for _ in range(3):
            adapted.train()(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert any(not torch.equal(p, start[name]) for name, p in adapted.named_parameters())
        for layer, chosen in ((1, [0, 6]), (2, [3])):
            outer = adapted.base_model.model.model.layers[layer].mlp.experts
            for wrapper in (outer, outer.base_layer):
                assert isinstance(wrapper, ParamWrapper)
                changed = wrapper.get_delta_weight("default").flatten(1).abs().amax(1).nonzero().flatten()
                assert changed.tolist() == chosen


def test_layers_without_a_chosen_expert_get_no_adapter(tmp_path: Path) -> None:
    path = tmp_path / "esft.json"
    path.write_text(
        json.dumps({"experts": {"1": [], "2": [5, 3]}, "shared_experts": True, "non_expert_modules": False})
    )
    ours = direct(make(), experts=path)
    experts = [layer.mlp.experts for layer in ours.base_model.model.model.layers[1:]]
    assert [isinstance(module, ExpertLora) for module in experts] == [False, True]
    assert sum(isinstance(module, LinearWeightLora) for module in ours.modules()) == 6


# ------------------------------------------------------------------------------------------ several adapters, closely
def test_a_second_config_from_a_model_that_has_adapters_already() -> None:
    model = make("deepseek_v3")
    fields = {"r": 3, "target_modules": ("self_attn", "shared_experts"), "init_lora_weights": False}
    expected = expert_lora_config(model, **fields)
    adapted = optimize_expert_lora(direct(model, target_modules=("q_proj", "shared_experts"), train_router=True))
    for again in (expert_lora_config(adapted, **fields), expert_lora_config(adapted.get_base_model(), **fields)):
        assert again.target_modules == expected.target_modules
        assert set(again.target_parameters) == set(expected.target_parameters)
    assert all(
        n.startswith("model.layers.1.") for n in expert_lora_config(adapted, experts={1: [0]}).target_parameters
    )
    adapted.add_adapter("b", again)
    layers = [module for module in adapted.modules() if hasattr(module, "lora_A")]
    assert sum("b" in layer.lora_A for layer in layers) == 3 * 4 + 2 * 3 + 2 * 2


def test_targets_by_one_name_and_all_of_them() -> None:
    model = make()
    assert expert_lora_config(model, target_modules="q_proj").target_modules == {"q_proj"}
    config = expert_lora_config(model, target_modules="all-linear")
    assert not any("lm_head" in name for name in config.target_modules) and len(config.target_modules) == 3 * 4
    assert sum(name.endswith(".weight") for name in config.target_parameters) == 3 + 2 * 3


def test_an_adapter_of_gate_up_alone_is_loaded_beside_one_of_both(tmp_path: Path) -> None:
    model = make()
    alone = direct(model, projections=("gate_up",)).eval()
    alone.save_pretrained(tmp_path)
    adapted = optimize_expert_lora(direct(model))
    adapted.load_adapter(tmp_path, "x", is_trainable=True)
    adapted.set_adapter("x")
    assert_same(logits(adapted.eval()), logits(alone))
    adapted.train()(IDS, labels=IDS).loss.backward()
    outer = [layer for layer in direct_layers(adapted) if layer.parameter_name == "down_proj"]
    for weight in [factor["x"].weight for layer in outer for factor in (layer.lora_A, layer.lora_B)]:
        assert not weight.any() and not weight.grad.any()


def test_a_deleted_adapter_leaves_nothing_for_the_next_one_of_its_name(tmp_path: Path) -> None:
    model = make()
    alone = direct(model, projections=("down",)).eval()
    alone.save_pretrained(tmp_path)
    adapted = optimize_expert_lora(direct(model))
    adapted.add_adapter("x", expert_lora_config(model, projections=("gate_up",)))
    adapted.delete_adapter("x")
    adapted.load_adapter(tmp_path, "x")
    adapted.set_adapter("x")
    assert_same(logits(adapted.eval()), logits(alone))


def test_adapters_that_share_only_some_layers_and_have_ranks_of_their_own(tmp_path: Path) -> None:
    """Only the layers that both have are completed, with the rank that the config gives them."""
    model = make()
    adapted = optimize_expert_lora(direct(model, experts={1: [0, 1]}))
    fields = {"r": 4, "projections": ("gate_up",), "init_lora_weights": False}
    fields |= {"rank_pattern": {"experts.gate_up_proj": 8}, "alpha_pattern": {"experts.gate_up_proj": 3}}
    adapted.add_adapter("b", expert_lora_config(model, **fields))
    adapted.set_adapter("b")
    ranks = [(layer.r["b"], layer.scaling["b"]) for layer in direct_layers(adapted) if layer.parameter_name[0] == "g"]
    assert ranks == [(8, 3 / 8), (8, 3 / 8)]
    expected = logits(adapted.eval())
    adapted.save_pretrained(tmp_path, selected_adapters=["b"])
    assert_same(logits(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "b").eval()), expected)


def test_weighted_sums_with_rslora_first() -> None:
    model = make()
    fields = {"target_modules": ("q_proj", "shared_experts"), "init_lora_weights": False}
    adapted = optimize_expert_lora(direct(model, use_rslora=True, **fields))
    adapted.add_adapter("b", expert_lora_config(model, r=3, **fields))
    adapted.add_weighted_adapter(["default", "b"], [0.5, -2.0], "sum", combination_type="cat")
    layers = [module for module in adapted.modules() if hasattr(module, "lora_A") and "sum" in module.lora_A]
    assert len(layers) == 3 + 2 * 3 + 2 * 2
    for layer in layers:
        expected = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("b")
        assert_same(layer.get_delta_weight("sum"), expected)
    assert adapted.peft_config["default"].use_rslora
    assert {name.rsplit(".", 1)[0] for name in adapted.peft_config["default"].target_parameters} == {
        "mlp.experts", *(f"shared_experts.{name}_proj" for name in ("gate", "up", "down"))}  # fmt: skip
    before = [layer.lora_A["b"].weight.clone() for layer in layers]
    for adapters, name, message in (
        (["default"], "b", r"adapter_name='b' is not allowed: there is an adapter of that name"),
        (
            ["default", "nope"],
            "c",
            r"adapters=\['default', 'nope'\] is not allowed: there are \['b', ",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            adapted.add_weighted_adapter(adapters, [1.0] * len(adapters), name, combination_type="cat")
    with pytest.raises(ValueError, match="svd_clamp is not allowed"):
        adapted.add_weighted_adapter(["default"], [1.0], "c", combination_type="svd", svd_clamp=0.9)
    assert all(torch.equal(layer.lora_A["b"].weight, kept) for layer, kept in zip(layers, before, strict=True))


def test_a_plain_config_with_dropout_is_refused_where_it_could_not_be_loaded() -> None:
    """Without `optimize_expert_lora` PEFT would save its dropout, and refuse the file."""
    adapted = direct(make())
    config = LoraConfig(r=2, lora_dropout=0.1, target_modules=[], target_parameters=STACKS)
    with pytest.raises(ValueError, match="does not work with lora_dropout != 0"):
        adapted.add_adapter("b", config)


@pytest.mark.parametrize("field", ["lora_bias", "fan_in_fan_out"])
def test_fields_that_parameters_cannot_have(field: str) -> None:
    adapted = optimize_expert_lora(direct(make()))
    with pytest.raises(ValueError, match=rf"{field}=True is not allowed for adapters of parameters"):
        adapted.add_adapter("b", LoraConfig(r=2, target_modules=[], target_parameters=STACKS, **{field: True}))


def test_shared_experts_of_a_selection_under_another_name() -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {**TINY, "num_experts": 8, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes))
    config = expert_lora_config(model, experts=ExpertSelection({0: [1]}, shared_experts=True))
    assert {name for name in config.target_parameters if "shared" in name} == {
        f"shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")
    }


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r": 0}, r"r=0 is not allowed: it must be an integer of at least 1"),
        ({"r": -4}, r"r=-4 is not allowed"),
        ({"r": 2.5}, r"r=2\.5 is not allowed"),
        ({"lora_alpha": -1}, r"lora_alpha=-1 is not allowed"),
        ({"lora_alpha": 0}, r"lora_alpha=0 is not allowed: it must be above 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0 is not allowed: it must be at least 0 and below 1"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' is not allowed: .* 'gaussian'"),
        ({"use_dora": True}, r"use_dora=True is not allowed: .* plain PEFT could not read"),
        ({"projections": ("gate", "down")}, r"projections=\['gate', 'down'\] is not allowed: choose from 'gate_up'"),
        ({"projections": ()}, r"projections=\[\] is not allowed"),
        ({"target_modules": ("w1",)}, r"target_modules: 'w1' is not allowed: .* There are down_proj, gate_proj"),
        ({"experts": {1: [8]}}, r"expert 8 of layer 1 is not allowed: it must be from 0 to 7"),
        ({"experts": {1: [-1]}}, r"expert -1 of layer 1 is not allowed"),
        ({"experts": {0: [1]}}, r"layer 0 is not allowed: the layers with routed experts are \[1, 2\]"),
        ({"experts": {1: [2, 2]}}, r"\[2, 2\] of layer 1 is not allowed: an expert is named twice"),
        ({"experts": 3}, r"experts: 3 is not allowed: it must map layers to lists of expert ids"),
        ({"experts": {1: []}}, r"an empty selection is not allowed"),
        ({"experts": ExpertSelection({1: [0]}, non_expert_modules=True)}, r"non_expert_modules=True is not allowed"),
    ],
)
def test_bad_configs(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert_lora_config(make(), **kwargs)


def test_models_without_such_experts(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    with pytest.raises(ValueError, match="LlamaForCausalLM has no stacked experts"):
        expert_lora_config(LlamaForCausalLM(LlamaConfig(**small)))
    gpt_oss = GptOssForCausalLM(GptOssConfig(**small, num_local_experts=4, head_dim=8))
    with pytest.raises(ValueError, match=r"mlp\.experts \(GptOssExperts\) is not allowed .*: its experts have biases"):
        expert_lora_config(gpt_oss)
    with pytest.raises(ValueError, match="it has no adapter on stacked experts"):
        optimize_expert_lora(get_peft_model(make(), LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="it must be a PeftModel with LoRA"):
        optimize_expert_lora(make())
    with pytest.raises(ValueError, match=r"lora_dropout=-0\.1 is not allowed"):
        optimize_expert_lora(plain(make()), lora_dropout=-0.1)
    (tmp_path / "esft.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="it must have an object 'experts'"):
        expert_lora_config(make(), experts=tmp_path / "esft.json")


class Stacks(nn.Module):
    """Experts of another kind, by what transformers notes about them."""

    def __init__(self, dtype: torch.dtype = torch.float32, **notes: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 4, dtype=dtype), requires_grad=False)
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 2, dtype=dtype), requires_grad=False)
        for name, value in {"_apply_gate": True, **notes}.items():
            setattr(self, name, value)


def test_why_other_experts_are_not_supported() -> None:
    assert why_unsupported(Stacks()) is None
    assert why_unsupported(Stacks(has_gate=False)) == "its experts have no gate projection"
    assert why_unsupported(Stacks(has_bias=True)) == "its experts have biases"
    assert why_unsupported(Stacks(is_transposed=True)) == "its weights are stored transposed"
    assert why_unsupported(Stacks(has_post_expert_norm=True)) == "its experts end with a norm"
    assert why_unsupported(Stacks(torch.float8_e4m3fn)) == "its gate_up_proj is stored as torch.float8_e4m3fn"
    assert "no stacked parameter gate_up_proj" in why_unsupported(nn.Linear(2, 2))
    plain = Stacks()
    del plain._apply_gate
    assert "exchangeable experts implementations" in why_unsupported(plain)


def test_a_router_under_another_name() -> None:
    model = make()
    model.model.layers[2].mlp.router = model.model.layers[2].mlp.gate
    del model.model.layers[2].mlp.gate
    with pytest.raises(
        ValueError, match=r"train_router=True is not allowed .* it has no module model\.layers\.2\.mlp\.gate"
    ):
        expert_lora_config(model, train_router=True)


def test_what_the_config_begins_with() -> None:
    model = make()
    config = expert_lora_config(model)
    assert (config.r, config.lora_alpha, config.task_type, config.modules_to_save) == (16, 32, "CAUSAL_LM", None)
    assert set(config.target_parameters) == set(STACKS) and isinstance(config, LoraConfig)
    assert expert_lora_config(model, modules_to_save=("norm",), train_router=True).modules_to_save == [
        "norm",
        "mlp.gate",
    ]
    layer = direct_layers(direct(model, r=16, init_lora_weights="gaussian"))[0]
    assert not layer.lora_B["default"].weight.any()
    assert layer.lora_A["default"].weight.std().item() == pytest.approx(1 / 16, rel=0.1)


def test_expert_parallelism_is_refused_and_not_ignored() -> None:
    ours = direct(make())
    ours.base_model.model.model.layers[1].mlp.experts.get_base_layer()._is_expert_parallel = True
    with pytest.raises(ValueError, match="Expert parallelism is not allowed"):
        logits(ours)


def test_offloaded_weights_are_refused() -> None:
    ours = direct(make())
    ours.base_model.model.model.layers[1].mlp.experts.get_base_layer().to("meta")
    with pytest.raises(ValueError, match="Offloaded weights are not allowed"):
        logits(ours)


def test_names_that_do_not_fit_a_mixed_batch() -> None:
    ours = direct(make()).eval()
    with pytest.raises(ValueError, match=r"adapter_names of length 4 is not allowed for 18 tokens"):
        ours.base_model.model.model.layers[1].mlp.experts(
            torch.randn(18, 32), torch.zeros(18, 1, dtype=torch.long), torch.ones(18, 1), adapter_names=["default"] * 4
        )
