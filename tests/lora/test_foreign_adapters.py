"""Adapters that come by other ways than `PeftModel.from_pretrained`, from other versions of PEFT, and with more than
factors in them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN_ROOT, TINY, V3_LIKE
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers_of_tests import tokenizer
from tolerances import assert_same
from torch import nn
from transformers import AutoModelForCausalLM, pipeline

from modeling_deepseekmoe import (
    DeepseekConfig,
    DeepseekMoeConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    expert_lora_config,
    optimize_expert_lora,
)
from modeling_deepseekmoe.conversion import export_adapter, merge_adapter

SIZES = {**TINY, "vocab_size": 256, "first_k_dense_replace": 1, "hidden_size": 48, "head_dim": None}
MLA = {key: value for key, value in V3_LIKE.items() if key in ("num_key_value_heads", "kv_lora_rank",
       "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}  # fmt: skip
CONFIGS = {
    "deepseek": lambda: DeepseekConfig(**SIZES),
    "deepseekmoe": lambda: DeepseekMoeConfig(**SIZES),
    "deepseek_v2": lambda: DeepseekV2Config(**{**SIZES, **MLA}, q_lora_rank=None),
    "square": lambda: DeepseekConfig(**{**SIZES, "moe_intermediate_size": 48}),  # of which sizes tell nothing
    "deepseek_v3": lambda: DeepseekV3Config(**{**SIZES, **V3_LIKE}, num_nextn_predict_layers=0),
}
KINDS = [kind for kind in CONFIGS if kind != "square"]
INPUTS = torch.randint(3, 180, (2, 11), generator=torch.Generator().manual_seed(1))


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(INPUTS).logits


def with_noise(adapted: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if any(part in name for part in ("lora_B", "modules_to_save", "trainable_tokens_delta")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


# -------------------------------------------------------------------------------------- the API of transformers itself
@pytest.mark.parametrize("what", ["experts", "attention"])
@pytest.mark.parametrize("kind", KINDS)
def test_ways_to_load_an_adapter(kind: str, what: str, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    make(kind).save_pretrained(base)
    tokenizer().save_pretrained(base)
    tokenizer().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = (
        expert_lora_config(model, r=4)
        if what == "experts"
        else LoraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM")
    )
    adapted = with_noise(get_peft_model(model, config))
    adapted.save_pretrained(folder)
    expected = logits(adapted)
    assert (expected - logits(make(kind))).abs().max() > 0.1
    loaded = AutoModelForCausalLM.from_pretrained(base)
    loaded.load_adapter(str(folder))
    assert_same(logits(loaded), expected)
    assert_same(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    piped = pipeline("text-generation", model=str(folder), device="cpu").model
    assert_same(logits(piped), expected)


def test_a_checkpoint_is_still_checked_as_a_whole(tmp_path: Path) -> None:
    make("deepseek").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.3\.up_proj\.weight is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# ------------------------------------------------------------------ PEFT's layouts of other times and other models
def write_transposed(folder: Path, model: nn.Module, version: str | None, stacks: tuple[str, ...]) -> dict:
    """An adapter as PEFT 0.18 wrote it: it took a stack (E, a, b) for E maps from a to b. Returns what it adds."""
    generator, tensors, deltas, rank, alpha = torch.Generator().manual_seed(5), {}, {}, 4, 8
    for name, module in model.named_modules():
        if not name.endswith(".experts"):
            continue
        for stack in stacks:
            experts, a, b = getattr(module, stack).shape
            factor_a = 0.1 * torch.randn(experts * rank, a, generator=generator)
            factor_b = 0.1 * torch.randn(b, rank * experts, generator=generator)
            nested = "base_layer." if stack == "gate_up_proj" and len(stacks) == 2 else ""
            tensors[f"base_model.model.{name}.{nested}lora_A.weight"] = factor_a
            tensors[f"base_model.model.{name}.{nested}lora_B.weight"] = factor_b
            parts = factor_b.view(b, rank, experts), factor_a.view(experts, rank, a)
            deltas[f"{name}.{stack}"] = alpha / rank * torch.einsum("bre,era->eab", *parts)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": [], "task_type": "CAUSAL_LM",
              "target_parameters": [f"mlp.experts.{stack}" for stack in stacks]}  # fmt: skip
    config |= {} if version is None else {"peft_version": version}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


@pytest.mark.parametrize("kind", ["deepseek", "deepseek_v3", "square"])
@pytest.mark.parametrize(
    ("version", "stacks"),
    [
        ("0.18.1", ("gate_up_proj", "down_proj")),
        (None, ("gate_up_proj", "down_proj")),
        ("0.18.0", ("down_proj",)),
        (None, ("down_proj",)),
        ("0.18.1", ("gate_up_proj",)),
    ],
)
def test_stacks_as_peft_018_wrote_them(
    kind: str, version: str | None, stacks: tuple[str, ...], tmp_path: Path
) -> None:
    model = make(kind)
    model.save_pretrained(tmp_path / "base")
    deltas = write_transposed(tmp_path / "adapter", model, version, stacks)
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_parameter(name).add_(delta)
    expected = logits(model)
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    export_adapter(tmp_path / "adapter", tmp_path / "single", "per-expert")
    export_adapter(tmp_path / "single", tmp_path / "new", "peft")
    adapted = PeftModel.from_pretrained(make(kind), tmp_path / "new")
    assert_same(logits(optimize_expert_lora(adapted)), expected)
    merge_adapter(tmp_path / "base", tmp_path / "new", tmp_path / "merged again")
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged again")), expected)


def test_the_layout_of_today_is_told_from_it_by_its_shapes(tmp_path: Path) -> None:
    """Whatever version the config names."""
    adapted = with_noise(get_peft_model(make("deepseek"), expert_lora_config(make("deepseek"), r=4)))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.18.1"}))
    make("deepseek").save_pretrained(tmp_path / "base")
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_single_experts(kind: str, tmp_path: Path, warnings_of_package: list[str]) -> None:
    """PEFT reads those of V2 and V3, but for the shared experts; of the others it would drop all, without a word."""
    model = make(kind)
    config = expert_lora_config(model, r=2, target_modules=("o_proj", "shared_experts"))
    adapted = with_noise(get_peft_model(model, config))
    adapted.save_pretrained(tmp_path / "stacked")
    export_adapter(tmp_path / "stacked", tmp_path / "single", "per-expert")
    if kind in ("deepseek", "deepseekmoe"):
        with pytest.raises(ValueError, match=r"belong to single experts, and this model stacks them\. `deepseekmoe"):
            PeftModel.from_pretrained(make(kind), tmp_path / "single")
        with pytest.raises(ValueError, match="belong to single experts"):
            make(kind).load_adapter(str(tmp_path / "single"))
    else:
        PeftModel.from_pretrained(make(kind), tmp_path / "single")
        assert "12 of " in warnings_of_package[-1] and "NOT loaded" in warnings_of_package[-1]
        assert "shared_experts" in warnings_of_package[-1]
    warnings_of_package.clear()
    export_adapter(tmp_path / "single", tmp_path / "again", "peft")
    again = optimize_expert_lora(PeftModel.from_pretrained(make(kind), tmp_path / "again"))
    assert_same(logits(again), logits(adapted))
    assert not any("NOT loaded" in text for text in warnings_of_package)


def test_tensors_that_have_a_place_and_tensors_that_have_none(
    tmp_path: Path, warnings_of_package: list[str], tiny_model: Callable
) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    deep, flat = tiny_model(num_hidden_layers=3), tiny_model(num_hidden_layers=2)
    adapted = get_peft_model(deep, expert_lora_config(deep, r=2, target_modules=("o_proj",)))
    adapted.save_pretrained(tmp_path)
    state = {name: tensor for name, tensor in adapted.state_dict().items() if "lora_" in name}
    apply_activation_checkpointing(deep, check_fn=lambda module: type(module).__name__ == "DeepseekMoeDecoderLayer")
    adapted.load_state_dict(state, strict=False)
    assert not any("NOT loaded" in text for text in warnings_of_package)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = ["o_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    PeftModel.from_pretrained(flat, tmp_path)
    assert "6 of 14 tensors" in warnings_of_package[-1] and "no such layers or targets" in warnings_of_package[-1]


# ------------------------------------------------------------------------------ embeddings, heads and their rows
@pytest.mark.parametrize("resized", [None, 262])
@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ("lm_head",)},
        {"modules_to_save": ("embed_tokens", "lm_head")},
        {"trainable_token_indices": [9, 4, 255]},
        {"trainable_token_indices": {"embed_tokens": [7, 5]}},
    ],
    ids=["head", "embedding and head", "tokens", "tokens of a module"],
)
def test_merging_what_was_trained_beside(resized: int | None, fields: dict, tmp_path: Path) -> None:
    base = make("deepseek")
    if resized:
        base.resize_token_embeddings(resized)
    base.save_pretrained(tmp_path / "base")
    model = make("deepseek")
    if resized:
        model.resize_token_embeddings(resized)
        model.load_state_dict(base.state_dict())
    adapted = with_noise(get_peft_model(model, expert_lora_config(model, r=2, **fields)))
    # PEFT does so by itself where the base on the disk has another size.
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=bool(resized))
    expected = logits(adapted)
    report = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert report.tensors == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    export_adapter(tmp_path / "adapter", tmp_path / "single", "per-expert")
    merge_adapter(tmp_path / "base", tmp_path / "single", tmp_path / "merged as well")
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged as well")), expected)


def test_rows_of_a_tied_embedding(tmp_path: Path, tiny_model: Callable) -> None:
    """They are the head's too, for PEFT and in the file."""
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    adapted = with_noise(get_peft_model(model, expert_lora_config(model, r=2, trainable_token_indices=[9, 4])))
    adapted.save_pretrained(tmp_path / "adapter")
    ids = INPUTS % 96
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits, expected)


def test_a_base_that_is_not_resized(tmp_path: Path) -> None:
    make("deepseek").save_pretrained(tmp_path / "base")
    model = make("deepseek")
    model.resize_token_embeddings(262)
    adapted = get_peft_model(model, expert_lora_config(model, r=2))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(ValueError, match="was trained after resize_token_embeddings: load the base, resize it"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_copies_that_contradict_each_other(tmp_path: Path, tiny_model: Callable) -> None:
    model = tiny_model()
    get_peft_model(model, expert_lora_config(model, r=2)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    head = torch.randn(96, 32)
    save_file({**tensors, "base_model.model.lm_head.weight": head,
               "base_model.model.lm_head.modules_to_save.weight": head + 1}, file)  # fmt: skip
    with pytest.raises(ValueError, match="are for the same weight, and differ"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "per-expert")
    save_file({**tensors, "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": head[:3]}, file)
    with pytest.raises(ValueError, match="has 3 rows: its config names 0 tokens"):
        merge_adapter(GOLDEN_ROOT / "v1-mha", tmp_path / "adapter", tmp_path / "out")
