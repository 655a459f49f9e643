"""Models whose layers or experts were taken out, put in or exchanged; and what a saved config promises."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import V3_LIKE, Golden
from safetensors.torch import load_file
from synthetic import PLAIN_CONFIG, dequantized, v3_tensors, write
from tolerances import assert_same
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_deepseekmoe import (
    DeepseekMoeConfig,
    DeepseekMoeForCausalLM,
    DeepseekMoeModel,
    DeepseekMoePreTrainedModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LoadBalancingCallback,
    RouterStats,
    save_sharded,
    take_router_load,
    update_router_bias,
)
from modeling_deepseekmoe.conversion import upcycle_model, verify

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
Make = Callable[..., DeepseekMoeForCausalLM]


def keep(model: nn.Module, places: list[int]) -> nn.Module:
    """Leave these layers, and say so in the config and to the cache."""
    model.model.layers = nn.ModuleList(model.model.layers[place] for place in places)
    model.config.num_hidden_layers = len(places)
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    return model


def step(model: nn.Module) -> torch.Tensor:
    """One training step's counts, by layer."""
    model.train()(IDS, labels=IDS).loss.backward()
    return take_router_load(model).tokens_per_expert.sum(dim=1)


@pytest.mark.parametrize("gate", [{}, V3_LIKE], ids=["softmax", "noaux"])
@pytest.mark.parametrize(
    ("places", "moe_layers"),
    [([0, 1, 2], (1, 2)), ([0, 1, 3, 4], (1, 2, 3)), ([0, 4, 1], (1, 2)), ([1, 2], (0, 1)), ([0], ())],
)
def test_layers_that_are_left(tiny_model: Make, gate: dict, places: list[int], moe_layers: tuple[int, ...]) -> None:
    model = tiny_model(num_hidden_layers=5, **gate)
    step(model)  # with all layers first, so that there are counts of other sizes
    keep(model, places)
    assert model.model.moe_layers == moe_layers
    if moe_layers:
        stats = RouterStats(model)
        assert step(model).tolist() == [IDS.numel() * 3] * len(moe_layers)
        model(IDS, labels=IDS).loss.backward()
        stats.add(update_router_bias(model) if gate else take_router_load(model))
        assert stats.to_dict()["layers"] == list(moe_layers)
    out = model.eval().generate(IDS[:1], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    whole = model(out[:, :-1], use_cache=False).logits[:, -4:].argmax(-1)
    assert torch.equal(out[:, -4:], whole)


def test_cut_layers_are_saved_and_loaded(tiny_model: Make, tmp_path: Path) -> None:
    model = keep(tiny_model(num_hidden_layers=5), [0, 1, 3]).eval()
    model.save_pretrained(tmp_path / "cut")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert_same(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("save", [lambda model, folder: model.save_pretrained(folder), save_sharded])
def test_a_model_is_not_saved_under_another_models_config(
    tiny_model: Make, save: Callable, tmp_path: Path, warnings_of_package: list[str]
) -> None:
    model = tiny_model(num_hidden_layers=4)
    model.model.layers.append(copy.deepcopy(model.model.layers[-1]))
    with pytest.raises(
        ValueError, match=r"which has 5 layers, of which the last would not be trained: set model.config"
    ):
        model(IDS, labels=IDS)
    model.model.layers = model.model.layers[:3]
    model(IDS, labels=IDS)
    assert "has 3 layers: set model.config.num_hidden_layers = 3 before it is saved" in warnings_of_package[-1]
    with pytest.raises(ValueError, match=r"num_hidden_layers=4 .* set model.config.num_hidden_layers = 3"):
        save(model, tmp_path / "out")
    keep(model, [1, 2])
    with pytest.raises(ValueError, match=r"first_k_dense_replace=1, .* experts are \(1,\), and they are \(0, 1\)"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    model.config.first_k_dense_replace = 0
    save(model, tmp_path / "out")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits, model.eval()(IDS).logits)


def test_a_layer_that_becomes_dense_and_experts_that_are_pruned(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=4)
    model.model.layers[2].mlp = copy.deepcopy(model.model.layers[0].mlp)
    assert model.model.moe_layers == (1, 3) and len(step(model)) == 2
    model = tiny_model(**V3_LIKE)
    step(model)
    for layer in model.model.layers[1:]:
        gate, experts = layer.mlp.gate, layer.mlp.experts
        gate.weight = nn.Parameter(gate.weight[:4])
        gate.e_score_correction_bias = gate.e_score_correction_bias[:4]
        experts.gate_up_proj, experts.down_proj = (
            nn.Parameter(stack[:4]) for stack in (experts.gate_up_proj, experts.down_proj)
        )
        experts.num_experts = 4
    model.config.n_routed_experts, model.config.n_group, model.config.topk_group = 4, 1, 1
    assert step(model).tolist() == [IDS.numel() * 3] * 2 and model.model.router_load.num_experts == 4
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same(again(IDS).logits, model.eval()(IDS).logits)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_drafts_of_the_first_layers(golden: Golden) -> None:
    """transformers lets the first layers draft for all; native models agree with their own text too."""
    model = golden.model()
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    greedy = model.generate(IDS[:1, :7], **settings)
    assert torch.equal(model.generate(IDS[:1, :7], assistant_early_exit=1, **settings), greedy)
    assert torch.equal(model.generate(IDS[:1, :7], **settings), greedy)


def test_a_block_inside_a_wrapper(tiny_model: Make) -> None:
    """As PEFT's copies are, which pass on what they are given."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model(**V3_LIKE)
    expected = model(IDS, labels=IDS).loss
    take_router_load(model)
    lora = LoraConfig(target_modules=["o_proj"], modules_to_save=["mlp"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora).train()
    assert_same(adapted(IDS, labels=IDS).loss, expected)
    assert take_router_load(adapted).tokens_per_expert.sum() > 0
    adapted(IDS, labels=IDS).loss.backward()
    update_router_bias(adapted)
    moved = [name for name, bias in adapted.named_buffers() if name.endswith("correction_bias") and bias.any()]
    assert len(moved) == 2 and all(".modules_to_save.default.gate." in name for name in moved)


class Reward(DeepseekMoePreTrainedModel):
    """A head of somebody's own."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__(config)
        self.backbone = DeepseekMoeModel(config)
        self.post_init()


def test_a_model_with_its_decoder_elsewhere(tiny_config: Callable, tmp_path: Path) -> None:
    model = Reward(tiny_config())
    model.save_pretrained(tmp_path / "saved")
    model.backbone.layers = model.backbone.layers[:2]
    with pytest.raises(ValueError, match=r"set model\.config\.num_hidden_layers = 2"):
        model.save_pretrained(tmp_path / "cut")


# --------------------------------------------------------------------------------------------- what a config promises
def saved_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("save", [lambda model, folder: model.save_pretrained(folder), save_sharded])
def test_no_layers_for_several_tokens_are_promised(
    save: Callable, tmp_path: Path, warnings_of_package: list[str]
) -> None:
    folder = write(tmp_path / "source", dequantized(v3_tensors()), PLAIN_CONFIG)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "is saved without them (num_nextn_predict_layers=0)" in warnings_of_package[-1]
    save(model, tmp_path / "saved")
    assert saved_config(tmp_path / "saved")["num_nextn_predict_layers"] == 0
    assert model.config.num_nextn_predict_layers == saved_config(folder)["num_nextn_predict_layers"] == 1
    assert not any("layer" in note for note in verify(tmp_path / "saved").notes)
    fresh = DeepseekV3ForCausalLM(DeepseekV3Config(**{**model.config.to_dict(), "num_nextn_predict_layers": 1}))
    save(fresh, tmp_path / "fresh")
    assert saved_config(tmp_path / "fresh")["num_nextn_predict_layers"] == 0


def test_a_file_that_promises_them(v3: Golden, tmp_path: Path) -> None:
    """As those that earlier versions, and transformers, have saved."""
    assert v3.config["num_nextn_predict_layers"] == 1
    (note,) = verify(v3.folder).notes
    assert "num_nextn_predict_layers=1, and there are no tensors of such layers" in note and "write 0" in note


def test_the_rotary_base_is_in_the_file(golden: Golden, tmp_path: Path) -> None:
    """For readers that have no default."""
    golden.model().save_pretrained(tmp_path)
    content = saved_config(tmp_path)
    own, transformers_own = content.get("rope_theta"), content.get("rope_parameters") or {}
    assert (own or transformers_own.get("rope_theta")) == golden.config["rope_theta"]
    assert content["rope_scaling"] == golden.config["rope_scaling"]


@pytest.mark.parametrize("dialect", ["deepseekmoe", "deepseek"])
def test_an_upcycled_config_names_its_class(dialect: str, source: Path, tmp_path: Path) -> None:
    from modeling_deepseekmoe.conversion import UpcyclingPlan, upcycle

    plan = UpcyclingPlan(shared_width=16, num_shards=2, num_copies=2, dialect=dialect)
    upcycle(source, tmp_path / "out", plan, check_tokens=2)
    name = {"deepseekmoe": "DeepseekMoeForCausalLM", "deepseek": "DeepseekForCausalLM"}[dialect]
    assert saved_config(tmp_path / "out")["architectures"] == [name]
    dense = AutoModelForCausalLM.from_pretrained(source)
    assert upcycle_model(dense, plan).config.architectures == [name]
    notes = verify(tmp_path / "out").notes
    assert ["llama.cpp ignores norm_topk_prob" in note for note in notes] == [True] * (dialect == "deepseek")
    content = saved_config(tmp_path / "out")
    del content["architectures"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    assert any(f'"architectures": ["{name}"]' in note for note in verify(tmp_path / "out").notes)


def test_a_callback_on_cut_layers(tiny_model: Make, tmp_path: Path) -> None:
    from training import train

    model = keep(tiny_model(num_hidden_layers=5, **V3_LIKE), [0, 1, 4])
    trainer, _ = train(model, tmp_path, LoadBalancingCallback(), max_steps=2)
    assert "router/max_violation_batch" in trainer.state.log_history[0]
    assert model.model.layers[2].mlp.gate.e_score_correction_bias.abs().sum() > 0
