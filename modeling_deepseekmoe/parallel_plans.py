# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The plans by which transformers spreads a model over devices: by tensor, by expert and by layer."""

from typing import Any

PIPELINE_PLAN: dict[str, Any] = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}

_EXPERT_PARALLEL = {
    "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "layers.*.mlp.experts.down_proj": "grouped_gemm",
    "layers.*.mlp.experts": "ep_dispatch_experts",
}
_MHA = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
_MLA = {
    "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
_ROUTED = {
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
}


def expert_parallel_plan() -> dict[str, str] | None:
    """Return the expert-parallel plan, or `None` if the installed transformers cannot follow it.

    It must dispatch tokens to experts on other devices without help from the gate (5.17 cannot, 5.23 can).
    """
    from .transformers_support import ALL_PARALLEL_STYLES

    known = set(ALL_PARALLEL_STYLES.keys())
    return dict(_EXPERT_PARALLEL) if known.issuperset(_EXPERT_PARALLEL.values()) else None


def expert_parallel_size(config: Any) -> int:
    """Return the number of ranks that hold distinct experts, or 1 if transformers has not spread the model."""
    return getattr(getattr(config, "distributed_config", None), "ep_size", None) or 1


def _ffn(prefix: str) -> dict[str, str]:
    return {f"{prefix}.gate_proj": "colwise", f"{prefix}.up_proj": "colwise", f"{prefix}.down_proj": "rowwise"}


def tensor_parallel_plan(config: Any) -> dict[str, str]:
    """Make the tensor-parallel plan of a [`DeepseekMoeConfig`].

    It has a rule for every kind of module in the model, and no others: transformers warns of rules that match nothing.
    """
    if config.attention_type == "mla":
        query = "q_proj" if config.q_lora_rank is None else "q_b_proj"
        plan = {**_MLA, f"layers.*.self_attn.{query}": "colwise"}
    else:
        plan = dict(_MHA)
    if len(config.moe_layers) < config.num_hidden_layers:
        plan |= _ffn("layers.*.mlp")
    if config.moe_layers:
        plan |= _ROUTED
        if config.shared_intermediate_size:
            plan |= _ffn("layers.*.mlp.shared_experts")
    return plan


__all__ = ["PIPELINE_PLAN", "expert_parallel_plan", "expert_parallel_size", "tensor_parallel_plan"]
