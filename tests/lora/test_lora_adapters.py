"""LoRA on stacked experts: routers, chosen experts, several adapters in one model, and bad input."""

import copy
import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import TINY, Golden
from lora_cases import IDS, STACKS, direct, direct_layers, logits, make, plain
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from tolerances import assert_same
from torch import nn

from modeling_deepseekmoe import ExpertSelection, expert_lora_config, optimize_expert_lora
from modeling_deepseekmoe.experts import why_unsupported
from modeling_deepseekmoe.lora.layer import ExpertLora, LinearWeightLora
from modeling_deepseekmoe.support.expert_parts import LocalPart


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
    with pytest.raises(ValueError, match=r"svd_clamp=0\.9 is not allowed"):
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
        ({"r": "8"}, r"r='8' is not allowed: it must be an integer of at least 1"),
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
    assert expert_lora_config(model, train_router=True).modules_to_save == ["mlp.gate", "mlp.router"]


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


def test_experts_that_are_spread_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = direct(make()).eval()
    wanted = logits(ours)
    whole = LocalPart(slice(0, 8), slice(0, 16), 1)  # what a rank holds that is alone in its groups
    monkeypatch.setattr(LocalPart, "of", lambda experts: whole)
    assert_same(logits(ours), wanted)
    ours.config._experts_implementation = "grouped_mm"
    with pytest.raises(ValueError, match=r"experts_implementation='grouped_mm' is not allowed for adapters"):
        logits(ours)
    with pytest.raises(ValueError, match="adapter_names is not allowed where the experts are spread over ranks"):
        ours(IDS, adapter_names=["default"] * len(IDS))


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


def test_adding_an_adapter_by_transformers_own_way_works_or_says_what_does(v1: Golden) -> None:
    """transformers 5.24 wants a PEFT that was not released with it."""
    from transformers.integrations.peft import MIN_PEFT_VERSION

    model = v1.model()
    config = LoraConfig(target_modules=["q_proj"])
    wanted, installed = (
        [int(part) for part in number.split(".")[:2]] for number in (MIN_PEFT_VERSION, version("peft"))
    )
    if wanted <= installed:
        model.add_adapter(config)
        assert model.active_adapters() == ["default"]
    else:
        with pytest.raises(ValueError, match=r"use a version >= .*Call peft\.get_peft_model\(model, config\) instead"):
            model.add_adapter(config)
    assert get_peft_model(v1.model(), config).peft_config["default"].r == config.r


@pytest.mark.parametrize("trained", [True, False])
def test_another_adapter_leaves_what_is_trained_of_the_first_one_as_it_was(trained: bool) -> None:
    """Also where it is of one projection alone, and the layers of the other are completed."""
    model = optimize_expert_lora(direct(make(), r=2))
    first = [parameter for name, parameter in model.named_parameters() if ".default." in name]
    for parameter in first:
        parameter.requires_grad_(trained)
    model.add_adapter("other", expert_lora_config(model, r=2, projections="gate_up"))
    found = {parameter.requires_grad for parameter in first}
    assert found == {trained}
