"""Adapters in other layouts: one pair of factors for every expert, there and back, and what cannot be expressed."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_cases import DEEPSEEK, PREFIX, adapter, applied_by_loop, per_expert_adapter, save_base
from lora_cases import STACKS, logits, make
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tolerances import MERGED_LOGITS, assert_same

from modeling_deepseekmoe.conversion import export_adapter, merge_adapter


@pytest.mark.parametrize("name", DEEPSEEK)
def test_the_per_expert_layout_there_and_back(name: str, tmp_path: Path) -> None:
    model = make(name)
    adapted = adapter(model, tmp_path / "peft", target_modules=("self_attn", "shared_experts"))
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    written = export_adapter(tmp_path / "peft", tmp_path / "per-expert", "per-expert")
    exported = load_file(tmp_path / "per-expert" / "adapter_model.safetensors")
    assert written == len(exported) == len(tensors) - 8 + 2 * 2 * 8 * 3
    prefix = "base_model.model.model.layers.1.mlp.experts.3"
    assert exported[f"{prefix}.gate_proj.lora_A.weight"].shape == (4, 32)
    assert torch.equal(exported[f"{prefix}.gate_proj.lora_A.weight"], exported[f"{prefix}.up_proj.lora_A.weight"])
    assert exported[f"{prefix}.down_proj.lora_B.weight"].shape == (32, 4)
    assert_same(logits(applied_by_loop(model, tmp_path / "per-expert")), logits(adapted))

    export_adapter(tmp_path / "per-expert", tmp_path / "back", "peft")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in back)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "back").eval()
    assert_same(logits(again), logits(adapted))
    save_base(model, tmp_path / "base")
    merge_adapter(tmp_path / "base", tmp_path / "per-expert", tmp_path / "merged")
    assert (logits(type(model).from_pretrained(tmp_path / "merged")) - logits(adapted)).abs().max() <= MERGED_LOGITS


@pytest.mark.parametrize("name", ["deepseek_v3", "transformers' DeepSeek-V3"])
def test_plain_peft_reads_the_per_expert_layout_of_models_that_it_knows(name: str, tmp_path: Path) -> None:
    model = make(name)
    adapted = adapter(model, tmp_path / "peft", target_modules=("q_proj",))
    export_adapter(tmp_path / "peft", tmp_path / "per-expert", "per-expert")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "per-expert").eval()
    assert_same(logits(loaded), logits(adapted))


@pytest.mark.parametrize("stack", STACKS)
def test_one_projection_alone_in_the_per_expert_layout(stack: str, tmp_path: Path) -> None:
    model = make()
    adapted = adapter(model, tmp_path / "peft", projections=("gate_up",) if "gate" in stack else ("down",))
    export_adapter(tmp_path / "peft", tmp_path / "per-expert", "per-expert")
    export_adapter(tmp_path / "per-expert", tmp_path / "back", "peft")
    assert_same(logits(applied_by_loop(model, tmp_path / "per-expert")), logits(adapted))
    assert_same(logits(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "back").eval()), logits(adapted))


def test_gate_and_up_with_factors_of_their_own_need_twice_the_rank(tmp_path: Path) -> None:
    model = make()
    source = per_expert_adapter(tmp_path / "theirs", lambda tensors: None)
    expected = logits(applied_by_loop(model, source))
    export_adapter(source, tmp_path / "peft", "peft")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "peft").eval()
    assert_same(logits(loaded), expected)
    assert loaded.peft_config["default"].rank_pattern and loaded.peft_config["default"].alpha_pattern
    save_base(model, tmp_path / "base")
    for number, folder in enumerate((source, tmp_path / "peft")):
        merge_adapter(tmp_path / "base", folder, tmp_path / f"merged{number}")
        merged = type(model).from_pretrained(tmp_path / f"merged{number}")
        assert (logits(merged) - expected).abs().max() <= MERGED_LOGITS
    export_adapter(tmp_path / "peft", tmp_path / "again", "per-expert")
    assert_same(logits(applied_by_loop(model, tmp_path / "again")), expected)


def without_up(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".up_proj." in name]:
        del tensors[name]


def without_gate(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".gate_proj." in name]:
        del tensors[name]


@pytest.mark.parametrize("change", [without_up, without_gate])
def test_one_half_of_gate_up(change: Callable, tmp_path: Path) -> None:
    model = make()
    source = per_expert_adapter(tmp_path / "theirs", change)
    export_adapter(source, tmp_path / "peft", "peft")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "peft").eval()
    assert_same(logits(loaded), logits(applied_by_loop(model, source)))


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda t: [t.pop(f"{PREFIX}.5.down_proj.lora_{factor}.weight") for factor in "AB"], {},
         r"expert 5 of .*\.\*\.down_proj is missing"),
        (lambda t: t.pop(f"{PREFIX}.5.down_proj.lora_A.weight"), {}, r"down_proj\.lora_B\.weight has no partner"),
        (lambda t: t.update({f"{PREFIX}.5.up_proj.lora_A.weight": torch.ones(4, 32),
                             f"{PREFIX}.5.up_proj.lora_B.weight": torch.ones(16, 4)}),
         {"rank_pattern": {"layers.1.mlp.experts.5.up_proj": 4}}, r"experts of .*\.up_proj have adapters of diff"),
        (lambda t: None, {"alpha_pattern": {"up_proj": 9}}, r"gate_proj and up_proj of .* differ in scaling"),
        (lambda t: None, {"alpha_pattern": {r"layers\.2.*down_proj": 9}}, None),
        (lambda t: t.update({f"{PREFIX}.0.gate_proj.lora_magnitude_vector": torch.ones(16)}), {},
         r"lora_magnitude_vector is not supported: only lora_A and lora_B"),
        (lambda t: t.update({f"{PREFIX}.0.gate_proj.lora_A.weight": torch.ones(2, 32)}), {},
         r"gate_proj\.lora_A\.weight of shape \(2, 32\) is not allowed beside .* of shape \(16, 3\) and rank 3"),
    ],
)  # fmt: skip
def test_what_a_layout_cannot_express(change: Callable, fields: dict, message: str | None, tmp_path: Path) -> None:
    source = per_expert_adapter(tmp_path / "theirs", change, **fields)
    if message is None:
        export_adapter(source, tmp_path / "peft", "peft")
        loaded = PeftModel.from_pretrained(make(), tmp_path / "peft")
        layers = [loaded.base_model.model.model.layers[layer].mlp.experts for layer in (1, 2)]
        assert [module.scaling["default"] for module in layers] == [2.0, 3.0]
        return
    with pytest.raises(ValueError, match=message):
        export_adapter(source, tmp_path / "peft", "peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_exporting_keeps_the_router_and_names_no_other_layer(tmp_path: Path) -> None:
    model = make()
    adapter(model, tmp_path / "peft", train_router=True, experts={2: [0]}, target_modules=("layers.1.self_attn",))
    export_adapter(tmp_path / "peft", tmp_path / "per-expert", "per-expert")
    exported = load_file(tmp_path / "per-expert" / "adapter_model.safetensors")
    assert sum(name.endswith("mlp.gate.weight") for name in exported) == 2
    pattern = json.loads((tmp_path / "per-expert" / "adapter_config.json").read_text())["target_modules"]
    for name, wanted in (
        ("model.layers.2.mlp.experts.7.up_proj", True),
        ("model.layers.2.mlp.experts.up_proj", True),
        ("model.layers.1.self_attn.q_proj", True),
        ("model.layers.1.mlp.experts.7.up_proj", False),
        ("model.layers.22.mlp.experts.7.up_proj", False),
        ("model.layers.2.self_attn.q_proj", False),
        ("model.layers.2.mlp.shared_experts.up_proj", False),
    ):
        assert bool(re.fullmatch(pattern, name)) is wanted, name


def test_one_expert_with_a_rank_of_its_own_has_no_pattern(tmp_path: Path) -> None:
    def wider(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}.5.up_proj.lora_A.weight"] = torch.ones(4, 32)
        tensors[f"{PREFIX}.5.up_proj.lora_B.weight"] = torch.ones(16, 4)

    source = per_expert_adapter(tmp_path / "theirs", wider, rank_pattern={"layers.1.mlp.experts.5.up_proj": 4})
    with pytest.raises(ValueError, match=r"experts\.5\.up_proj.* has another rank or scaling than its neighbours"):
        export_adapter(source, tmp_path / "again", "per-expert")


def test_other_bad_exports(tmp_path: Path) -> None:
    source = per_expert_adapter(tmp_path / "theirs", lambda tensors: None)
    with pytest.raises(ValueError, match=r"layout='megatron' is not allowed: it must be 'per-expert' or 'peft'"):
        export_adapter(source, tmp_path / "x", "megatron")
    with pytest.raises(ValueError, match=r"destination=.* must not exist, or be an empty folder"):
        export_adapter(source, source, "peft")
    get_peft_model(make(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "attention")
    with pytest.raises(ValueError, match="it has no adapter on routed experts"):
        export_adapter(tmp_path / "attention", tmp_path / "x", "peft")
    with pytest.raises(OSError, match="is no folder"):
        export_adapter(tmp_path / "nothing here", tmp_path / "x", "peft")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"holds no adapter_config\.json"):
        export_adapter(tmp_path / "empty", tmp_path / "x", "peft")
    (source / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        export_adapter(source, tmp_path / "x", "peft")
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match=r"use_dora=True is not allowed: only plain LoRA is"):
        export_adapter(source, tmp_path / "x", "peft")
