"""Every field of PEFT's LoraConfig on experts: it does what its name says, or it is refused by name."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from conftest import TINY, V3_LIKE
from peft import LoraConfig, PeftModel, get_peft_model
from tolerances import assert_same
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from modeling_deepseekmoe import DeepseekConfig, DeepseekV3Config, expert_lora_config, optimize_expert_lora
from modeling_deepseekmoe.lora.options import _REFUSED, OTHER_COMPUTATIONS

SIZES = {**TINY, "num_hidden_layers": 4, "first_k_dense_replace": 1}
CONFIGS = {
    "deepseek": lambda: DeepseekConfig(**SIZES),
    "deepseek_v3": lambda: DeepseekV3Config(**{**SIZES, **V3_LIKE}),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **{key: value for key, value in SIZES.items() if key in ("vocab_size", "hidden_size", "num_hidden_layers",
           "num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size")},
        num_experts=8, num_experts_per_tok=2, mlp_only_layers=[0],
    ),
}  # fmt: skip
HONOURED = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern", "bias",
    "layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save", "trainable_token_indices",
    "target_modules", "inference_mode", "ensure_weight_tying", "layer_replication", "task_type",
}  # fmt: skip
# What says something of an adapter, or of the way it is computed, and nothing of what it computes.
NOTES = {
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "megatron_core", "qalora_group_size",
    "runtime_config", "peft_type",
}  # fmt: skip


def make(kind: str = "deepseek") -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]())


def adapted(kind: str = "deepseek", **options: Any) -> PeftModel:
    model = make(kind)
    return get_peft_model(model, expert_lora_config(model, r=4, **options))


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 12)[None]).logits


def where(model: nn.Module) -> dict[int, set[str]]:
    """For every layer what is adapted: `experts`, and modules by the last part of their names."""
    found: dict[int, set[str]] = {}
    for name, _ in model.named_parameters():
        if match := re.search(r"layers\.(\d+)\.(.+?)(?:\.base_layer)*\.lora_A", name):
            found.setdefault(int(match[1]), set()).add(match[2].rsplit(".", 1)[-1])
    return found


def ranks(model: nn.Module) -> dict[str, int]:
    """For every adapted matrix its rank."""
    found = {}
    for name, parameter in model.named_parameters():
        if match := re.search(r"layers\.(.+)\.lora_B", name):
            part = match[1].replace(".base_layer", "")
            stack = ".gate_up_proj" if ".base_layer" in match[1] else ".down_proj" if part.endswith(".experts") else ""
            found[part + stack] = parameter.shape[1] // (8 if stack else 1)
    return found


def test_every_field_has_its_place_in_the_table() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= HONOURED | NOTES | _REFUSED.keys(), fields - HONOURED - NOTES - _REFUSED.keys()
    assert not _REFUSED.keys() & HONOURED


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("options", "experts", "attention", "ffn"),
    [
        ({"layers_to_transform": [2]}, {2}, {2}, {2}),
        ({"layers_to_transform": 3}, {3}, {3}, {3}),
        ({"layers_to_transform": [1, 3], "layers_pattern": "layers"}, {1, 3}, {1, 3}, {1, 3}),
        ({"exclude_modules": ["layers.1.mlp.experts"]}, {2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}),
        ({"exclude_modules": r".*\.layers\.[12]\..*"}, {3}, {0, 3}, {0, 3}),
        ({"exclude_modules": ["self_attn.o_proj", "up_proj"]}, {1, 2, 3}, set(), set()),
    ],
    ids=str,
)
def test_options_that_choose_places(kind: str, options: dict, experts: set, attention: set, ffn: set) -> None:
    targets = ("o_proj", "up_proj")
    model = adapted(kind, target_modules=targets, **options)
    dense = {0} if kind == "qwen3_moe" else {0, 1, 2, 3}  # Qwen3's has no shared experts
    found = where(model)
    assert {layer for layer, names in found.items() if "experts" in names} == experts
    assert {layer for layer, names in found.items() if "o_proj" in names} == attention
    assert {layer for layer, names in found.items() if "up_proj" in names} == ffn & dense


@pytest.mark.filterwarnings("error:.*exclude_modules")
def test_an_excluded_projection_and_what_plain_peft_makes_of_the_file(tmp_path: Any) -> None:
    model = adapted(exclude_modules=["layers.2.mlp.experts.gate_up_proj"], layers_to_transform=[1, 2])
    parts = {name for name in ranks(model) if "experts" in name}
    assert parts == {"1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj", "2.mlp.experts.down_proj"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    for load in (optimize_expert_lora, lambda loaded: loaded):
        assert_same(logits_of(load(PeftModel.from_pretrained(make(), tmp_path))), logits_of(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_to_transform": [1, 7]}, r"layers_to_transform=\[1, 7\] is not allowed: the layers are 0 to 3"),
        ({"layers_to_transform": []}, r"layers_to_transform=\[\] is not allowed"),
        ({"modules_to_save": ["self_attn"], "target_modules": ["q_proj"]}, "model.layers.0.self_attn.q_proj, which"),
        ({"layers_to_transform": [0]}, r"'layers_to_transform': \[0\]\} is not allowed: .* no layer of \[1, 2, 3\]"),
        ({"exclude_modules": ["experts"]}, "it excludes model.layers.1.mlp.experts.gate_up_proj, and no layer"),
        ({"layers_to_transform": [2], "experts": {1: [0]}}, "`experts` selects some of these experts"),
        ({"exclude_modules": ["experts.gate_up_prj"]}, r"exclude_modules: \['experts.gate_up_prj'\] is not allowed"),
        ({"exclude_modules": "*layers"}, r"exclude_modules='\*layers' is not allowed: nothing to repeat"),
        ({"rank_pattern": {"w1": 2}}, "rank_pattern: 'w1' is not allowed: nothing that is adapted has a name"),
        ({"alpha_pattern": {r"layers\.0\.mlp\.experts": 2}}, "alpha_pattern: .* is not allowed: nothing that"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save: 'lm_haed' is not allowed: no module of the model"),
        ({"modules_to_save": ["mlp"]}, "a whole copy of it would be trained, and model.layers.1.mlp.experts"),
        ({"modules_to_save": ["experts"]}, "a whole copy of it would be trained"),
        ({"modules_to_save": ["q_proj"], "target_modules": ["up_proj"], "bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": 1}, "init_lora_weights=1 is not allowed: it must be True, False or 'gaussian'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not allowed"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not allowed: it must be 'LORA'"),
    ],
)
def test_options_that_leave_nothing_or_name_nothing(options: dict, message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        expert_lora_config(model, r=4, **options)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("field", sorted(_REFUSED))
def test_fields_that_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}=.* is not allowed: {re.escape(_REFUSED[field])}"):
        expert_lora_config(make(), r=4, **{field: [1]})
    if field != "target_parameters" and field in {known.name for known in dataclasses.fields(LoraConfig)}:
        assert not expert_lora_config(make(), **{field: None}).to_dict().get(field)
    assert OTHER_COMPUTATIONS.keys() <= _REFUSED.keys()


def test_patterns_may_name_modules_and_parameters() -> None:
    rank = {r"mlp\.experts": 2, r"layers\.2\.mlp\.experts\.down_proj": 3, "shared_experts.down_proj": 5, "o_proj": 6}
    found = ranks(adapted(target_modules=("o_proj", "shared_experts"), rank_pattern=rank))
    for layer in (1, 2, 3):
        assert found[f"{layer}.mlp.experts.gate_up_proj"] == 2
        assert found[f"{layer}.mlp.experts.down_proj"] == 2  # the first key that matches, as everywhere in PEFT
        assert found[f"{layer}.mlp.shared_experts.down_proj"] == 5
        assert found[f"{layer}.mlp.shared_experts.up_proj"] == 4 and found[f"{layer}.self_attn.o_proj"] == 6
    only_experts = ranks(adapted(target_modules=("shared_experts",), rank_pattern={"down_proj": 7}))
    assert only_experts["1.mlp.experts.down_proj"] == only_experts["1.mlp.shared_experts.down_proj"] == 7
    assert only_experts["1.mlp.experts.gate_up_proj"] == 4
    scaled = adapted(alpha_pattern={"experts": 40}, target_modules=("o_proj",))
    layer = scaled.base_model.model.model.layers[1]
    assert layer.mlp.experts.scaling["default"] == 10 and layer.self_attn.o_proj.scaling["default"] == 2


def test_layers_that_peft_replicates() -> None:
    """Copies share their weights, have adapters of their own, and count as layers."""
    model = adapted(layer_replication=[[0, 3], [1, 4]], target_modules=("o_proj",))
    base = model.get_base_model()
    assert base.config.num_hidden_layers == 6 and where(model).keys() == {0, 1, 2, 3, 4, 5}
    assert base.model.moe_layers == (1, 2, 3, 4, 5)
    model.train()(torch.arange(3, 12)[None], labels=torch.arange(3, 12)[None]).loss.backward()
    assert base.model.router_load.take().tokens_per_expert.sum(dim=1).tolist() == [9 * 3] * 5
    plain = make()
    assert base.model.layers[3].mlp.gate.weight.data_ptr() == base.model.layers[1].mlp.gate.weight.data_ptr()
    order = [0, 1, 2, 1, 2, 3]
    plain.model.layers = nn.ModuleList(plain.model.layers[place] for place in order)
    plain.config.num_hidden_layers = 6
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert_same(model.eval()(ids, use_cache=False).logits, plain.eval()(ids, use_cache=False).logits)
