"""Make a tiny model of every MoE family of the installed transformers. It finds the families by itself.

A family is a folder of `transformers.models` whose modeling file has stacked experts. Its config is shrunk by the
names of its fields: sizes, ranks, counts. What a family needs beyond that stands in OVERRIDES.
"""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

MODELS = Path(transformers.__file__).parent / "models"
# What marks a modeling file with routed experts. The first are stacked, and their implementation can be exchanged.
STACKED, UNSTACKED = (
    "@use_experts_implementation",
    re.compile(r"class \w*Experts\w*\(nn\.|class \w*TopKRouter|self\.experts = nn\."),
)
LAYERS = 4
SIZES: dict[str, Any] = {
    "vocab_size": 128, "unpadded_vocab_size": 128,
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 3, "moe_topk": 3, "top_k_experts": 3, "moe_k": 3, "num_experts_per_token": 3,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_head_dim": 24, "o_lora_rank": 16, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "sliding_window": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
    "mamba_n_groups": 2, "n_groups": 2, "ssm_state_size": 16, "mamba_expand": 2, "mamba_dt_rank": 8,
    "global_head_dim": 16, "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128, "initializer_range": 0.2, "depth": 2, "embed_dim": 32, "num_heads": 2,
    "out_hidden_size": 64, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
}  # fmt: skip
GROUPED = {"n_group": 4, "topk_group": 2}
# Lists with an entry for each layer: the config makes them anew.
LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "moe_layer_freq", "attention_types", "no_rope_layers",
         "block_types", "full_attention_idxs", "hybrid_layer_pattern")  # fmt: skip
# Their defaults may be None, for a dense model.
FORCED = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_topk", "top_k_experts")
TOWER = {"num_hidden_layers": 1, "encoder_layers": 1, "d_model": 32, "encoder_ffn_dim": 32, 
         "downsample_hidden_size": 8,
         "encoder_attention_heads": 2, "output_dim": 64}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * (LAYERS - 1)]}},
    "diffusion_gemma": {"text_config": {"moe_intermediate_size": 32}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [32, 32], 
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}}},
    "gemma4": {"enable_moe_block": True, "moe_intermediate_size": 32},
    "glm4v_moe": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                       "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}},
    "dots1": {"n_shared_experts": 1},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "index_kpool": 4, "qk_rope_head_dim": 0}},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hy_v4_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                      "mrope_section": [2, 1, 1]}}},
    "longcat_flash": {"num_layers": LAYERS // 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32,
                      "zero_expert_num": 4, "head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
                   "text_config": {"moe_hidden_size": 48, "mlp_layer_types": ["dense", *["sparse"] * (LAYERS - 1)]}},
    "qwen3_omni_moe": {"vision_start_token_id": 3},
    "qwen4_exp": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                  "indexer_compress_ratio": 2, "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8},
    "step3p7": {"text_config": {"sliding_window": 16, "share_expert_dim": 32}},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def families() -> list[str]:
    """List the families that have routed experts, by the names of their folders."""
    found = []
    for folder in sorted(MODELS.iterdir()):
        file = folder / f"modeling_{folder.name}.py"
        if not file.exists():
            continue
        text = file.read_text(encoding="utf-8")
        others = "experts" in text and UNSTACKED.search(text) and ("router" in text or "gate" in text)
        if STACKED in text or others:
            found.append(folder.name)
    return found


def model_class(family: str) -> type[PreTrainedModel]:
    """Choose the class of a family: its causal language model or, without one, what generates from images and text."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    own = {
        name: value for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
    }  # fmt: skip
    for ending in (
        "ForCausalLM",
        "ThinkerForConditionalGeneration",
        "ForConditionalGeneration",
        "ForBlockDiffusion",
        "ForTokenClassification",
        "Model",
    ):
        chosen = [value for name, value in own.items() if name.endswith(ending)]
        if chosen:
            return min(chosen, key=lambda value: len(value.__name__))
    raise ValueError(f"{family} has no model class")


def usual_value(config: PreTrainedConfig, name: str) -> Any:
    """Return a field's default; None if each layer has another."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers has an error of its own for fields of which each layer has another value
        return None


def shrunk(
    config_class: type[PreTrainedConfig], overrides: dict[str, Any], is_tower: bool = False
) -> PreTrainedConfig:
    """Make a small config of a class."""
    usual = config_class()
    fields = {*inspect.signature(config_class).parameters, *vars(usual)}
    sizes = SIZES | TOWER if is_tower else SIZES
    values = {
        name: size for name, size in sizes.items()
        if name in fields and (name in FORCED or isinstance(usual_value(usual, name), (int, float)))
    }  # fmt: skip
    if usual_value(usual, "kv_lora_rank"):  # latent attention has as many heads of keys, and widths of its own
        values.pop("head_dim", None)
        if "num_key_value_heads" in values:
            values["num_key_value_heads"] = values["num_attention_heads"]
    groups = usual_value(usual, "n_group")
    if isinstance(groups, int) and groups > 1 and "n_group" in fields:
        values |= GROUPED
    values |= {name: None for name in LISTS if name in fields and isinstance(usual_value(usual, name), list)}
    for name in getattr(config_class, "sub_configs", {}):
        if isinstance(usual_value(usual, name), PreTrainedConfig):
            inner = shrunk(type(getattr(usual, name)), overrides.get(name, {}), is_tower or "text" not in name)
            values[name] = inner
    values |= {
        name: value for name, value in overrides.items() if name not in getattr(config_class, "sub_configs", {})
    }
    return config_class(**values)


def _config_class(kind: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    """Return the class of a model's config: the one that its class is annotated with, of several that it may take."""
    annotated = vars(kind).get("__annotations__", {}).get("config")
    return annotated if inspect.isclass(annotated) else kind.config_class


def tiny_model(family: str, **more: Any) -> PreTrainedModel:
    """Make a tiny model of a family with random weights, the same ones each time."""
    kind = model_class(family)
    config = shrunk(_config_class(kind), OVERRIDES.get(family, {}) | more)
    torch.manual_seed(0)
    return kind(config).float()
