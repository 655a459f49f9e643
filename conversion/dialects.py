# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Translate configs from one dialect to another. Refuse if the new config would describe another computation."""

import dataclasses
from typing import Any

from modeling_deepseekmoe.checkpoint_layout import BIAS_NAME
from modeling_deepseekmoe.configuration import config_from_dict
from modeling_deepseekmoe.configuration_deepseekmoe import DeepseekMoeConfig, without_model_classes
from modeling_deepseekmoe.configuration_dialects import CONFIG_CLASSES
from modeling_deepseekmoe.conversion.tensor_table import TABLES, head_of

DIALECTS = tuple(TABLES)
# What the released code of the first generation computes.
DEEPSEEK_ROPE_TYPES = ("default", "linear", "dynamic")
_CLASSES = {config_class.model_type: config_class for config_class in CONFIG_CLASSES}
# Fields of a forward pass that mean the same in every dialect.
_FORWARD_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_type",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rope_parameters",
    "attention_bias",
    "hidden_act",
    "rms_norm_eps",
    "moe_layers",
)
_ROUTING_FIELDS = (
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_intermediate_size",
    "scoring_func",
    "gate_normalizes",
    "gate_scaling_factor",
    "router_dtype",
)


def translate(config: DeepseekMoeConfig, dialect: str) -> DeepseekMoeConfig:
    """Translate a config into another dialect, for the same model.

    A tied head becomes a tensor of its own in the official dialects, because their other readers do not tie.

    Args:
        config: config of any dialect.
        dialect: `"deepseekmoe"`, `"deepseek"`, `"deepseek_v2"` or `"deepseek_v3"`.

    Raises:
        ValueError: naming the field that the dialect cannot express.
    """
    check_dialect(dialect)
    fields = {field.name for field in dataclasses.fields(DeepseekMoeConfig)}
    content = {name: value for name, value in config.to_dict().items() if name not in ("auto_map", "model_type")}
    content |= {name: getattr(config, name) for name in fields & content.keys()}
    content |= _gate_fields(config, dialect)
    content["architectures"] = architectures_of(dialect, config.architectures)
    if dialect != "deepseek_v3" and "expert" not in config.loss_alphas:
        content["aux_loss_alpha"] = 0.0  # the third generation ignores what its files say
    if dialect != "deepseekmoe":
        content["tie_word_embeddings"] = False
    try:
        with without_model_classes():
            translated = config_from_dict({**content, "model_type": dialect})
    except ValueError as error:
        raise ValueError(f"The checkpoint cannot be expressed in dialect {dialect!r}: {error}") from error
    check_same(config, translated)
    if dialect != config.model_type:
        _check_released_code(config, dialect)
    return translated


def architectures_of(dialect: str, architectures: list[str] | None) -> list[str]:
    """Return the field `architectures` of a dialect's `config.json`, with the heads that `architectures` names.

    If it names none, return a language model's: readers such as llama.cpp's converter look at this field first.
    """
    prefix = _CLASSES[dialect].__name__.removesuffix("Config")
    return [prefix + head_of(name) for name in architectures or ["ForCausalLM"]]


def check_dialect(dialect: str) -> None:
    """Raise ValueError unless this is the name of a dialect."""
    if dialect not in DIALECTS:
        raise ValueError(f"to={dialect!r} is not allowed: it must be one of {', '.join(DIALECTS)}.")


def forward_fields(config: DeepseekMoeConfig) -> dict[str, Any]:
    """Collect what a forward pass depends on, under the same names for every dialect."""
    found = {name: getattr(config, name) for name in _FORWARD_FIELDS}
    rope = dict(config.rope_parameters or {})
    rope.pop("type", None)
    found["rope_parameters"] = rope
    if rope.get("rope_type", "default") != "default":
        found["max_position_embeddings"] = config.max_position_embeddings  # some types of scaling begin there
    if len(config.moe_layers) < config.num_hidden_layers:
        found["intermediate_size"] = config.intermediate_size
    if config.attention_type == "mla":
        found["rope_interleave"] = config.rope_interleave
    if config.moe_layers:
        found |= {name: getattr(config, name) for name in _ROUTING_FIELDS}
        groups, kept = config.gate_groups
        ranked = (config.topk_method, groups, kept) if kept < groups else ("all experts", 1, 1)
        found["groups (topk_method, n_group, topk_group)"] = ranked
        found[BIAS_NAME] = config.topk_method == "noaux_tc"
    return found


def _gate_fields(config: DeepseekMoeConfig, dialect: str) -> dict[str, Any]:
    """Return the gate's fields in a dialect's words. `check_same` finds later what the dialect cannot say."""
    if not config.n_routed_experts:
        return {}
    fields: dict[str, Any] = {"routed_scaling_factor": config.gate_scaling_factor}
    allowed = _CLASSES[dialect].allowed_topk_methods
    groups, kept = config.gate_groups
    if config.topk_method not in allowed and kept == groups:  # groups that exclude nothing
        if config.topk_method == "group_limited_greedy" and "greedy" in allowed:
            fields["topk_method"] = "greedy"
        elif "noaux_tc" in allowed:
            fields |= {"topk_method": "noaux_tc", "n_group": 1, "topk_group": 1}  # with a bias of zeros
    return fields


def check_same(config: DeepseekMoeConfig, translated: DeepseekMoeConfig) -> None:
    """Raise ValueError if a translated config describes another computation.

    Raises:
        ValueError: naming the first difference.
    """
    dialect = translated.model_type
    found, wanted = forward_fields(translated), forward_fields(config)
    if wanted.get(BIAS_NAME) is False:
        found[BIAS_NAME] = False  # zeros, which change nothing
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"The checkpoint cannot be expressed in dialect {dialect!r}: its {name} is {value!r}, and there it "
                f"would be {found.get(name)!r}."
            )


def _check_released_code(config: DeepseekMoeConfig, dialect: str) -> None:
    """Raise ValueError if a dialect's config can express a setting, but its released code would not compute it."""
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if dialect == "deepseek" and rope_type not in DEEPSEEK_ROPE_TYPES:
        raise ValueError(
            f"The checkpoint cannot be expressed in dialect {dialect!r}: its rope_type is {rope_type!r}, and it must "
            f"be one of {', '.join(DEEPSEEK_ROPE_TYPES)}."
        )
    if dialect in ("deepseek_v2", "deepseek_v3") and not config.rope_interleave:
        raise ValueError(
            f"The checkpoint cannot be expressed in dialect {dialect!r}: its rope_interleave is False, and the "
            "released code always interleaves."
        )


__all__ = ["DEEPSEEK_ROPE_TYPES", "DIALECTS", "check_dialect", "check_same", "forward_fields", "translate"]
