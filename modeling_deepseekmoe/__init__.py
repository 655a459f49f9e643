# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""DeepSeekMoE for Hugging Face: the public names of the package. Importing it registers the family with AutoModel."""

from importlib import import_module
from typing import Any

from .configuration_deepseekmoe import DeepseekMoeConfig
from .configuration_dialects import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from .integrations.registration import register
from .remote_code import CODE_VERSION

__version__ = CODE_VERSION

# Imported when first used: the model classes alone take as long as the whole of `import torch`.
_LAZY = {
    "auxiliary_losses": (
        "communication_balance_loss",
        "device_balance_loss",
        "expert_balance_loss",
        "max_violation",
        "router_z_loss",
        "sequence_balance_loss",
    ),
    "balancing.added_losses": ("add_auxiliary_loss",),
    "balancing.bias_update": ("bias_step", "update_router_bias"),
    "balancing.tracking": ("take_router_load", "track_router_load", "untrack_router_load"),
    "balancing.callbacks": ("LoadBalancingCallback", "RouterStatsCallback"),
    "drafting.adding": ("add_mtp",),
    "esft.files": ("load_esft", "save_esft"),
    "esft.layer": ("merge_esft", "prepare_esft"),
    "esft.scoring": ("score_experts", "select_experts"),
    "esft.selection": ("ExpertSelection",),
    "analysis.inspection": ("ModelReport", "inspect_model"),
    "analysis.sections": ("Section",),
    "analysis.specialisation": ("Specialisation", "measure_specialisation"),
    "lora.config": ("ExpertLoraConfig", "expert_lora_config"),
    "lora.model": ("optimize_expert_lora",),
    "sharding.launch": ("sharding_of_launch",),
    "modeling_classification": (
        "DeepseekForSequenceClassification",
        "DeepseekForTokenClassification",
        "DeepseekMoeForSequenceClassification",
        "DeepseekMoeForTokenClassification",
        "DeepseekV2ForSequenceClassification",
        "DeepseekV2ForTokenClassification",
        "DeepseekV3ForSequenceClassification",
        "DeepseekV3ForTokenClassification",
    ),
    "modeling_deepseekmoe": (
        "DeepseekForCausalLM",
        "DeepseekModel",
        "DeepseekMoeForCausalLM",
        "DeepseekMoeModel",
        "DeepseekV2ForCausalLM",
        "DeepseekV2Model",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Model",
    ),
    "quantization.config": ("StackedExpertsConfig",),
    "quantization.correction": ("correct_rounding", "load_correction", "save_correction"),
    "mtp_generation": ("MtpAssistant", "mtp_assistant"),
    "modeling_pretrained": ("DeepseekMoePreTrainedModel",),
    "analysis.planning": ("MemoryPlan", "plan_training"),
    "router_load": ("RouterLoad",),
    "balancing.statistics": ("RouterStats",),
    "integrations.native_gates": ("add_balancing_bias", "route_native_gates"),
    "grouping": ("ExpertGroups", "group_by_expert"),
    "routing": ("Routing", "RoutingPlan", "choose_experts", "route"),
    "routing_options": ("RoutingOptions",),
    "support.tokenization": ("load_tokenizer",),
    "hub.callbacks": ("ModelCardCallback",),
    "sharding.files": ("save_sharded",),
    "sharding.trainer": ("ShardedTrainer", "last_complete_checkpoint"),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "DeepseekConfig",
    "DeepseekForCausalLM",
    "DeepseekForSequenceClassification",
    "DeepseekForTokenClassification",
    "DeepseekModel",
    "DeepseekMoeConfig",
    "DeepseekMoeForCausalLM",
    "DeepseekMoeForSequenceClassification",
    "DeepseekMoeForTokenClassification",
    "DeepseekMoeModel",
    "DeepseekMoePreTrainedModel",
    "DeepseekV2Config",
    "DeepseekV2ForCausalLM",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV2ForTokenClassification",
    "DeepseekV2Model",
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
    "ExpertGroups",
    "ExpertLoraConfig",
    "ExpertSelection",
    "LoadBalancingCallback",
    "MemoryPlan",
    "ModelCardCallback",
    "ModelReport",
    "MtpAssistant",
    "RouterLoad",
    "RouterStats",
    "RouterStatsCallback",
    "Routing",
    "RoutingOptions",
    "RoutingPlan",
    "Section",
    "ShardedTrainer",
    "Specialisation",
    "StackedExpertsConfig",
    "add_auxiliary_loss",
    "add_balancing_bias",
    "add_mtp",
    "bias_step",
    "choose_experts",
    "communication_balance_loss",
    "correct_rounding",
    "device_balance_loss",
    "expert_balance_loss",
    "expert_lora_config",
    "group_by_expert",
    "inspect_model",
    "last_complete_checkpoint",
    "load_correction",
    "load_esft",
    "load_tokenizer",
    "max_violation",
    "measure_specialisation",
    "merge_esft",
    "mtp_assistant",
    "optimize_expert_lora",
    "plan_training",
    "prepare_esft",
    "register",
    "route",
    "route_native_gates",
    "router_z_loss",
    "save_correction",
    "save_esft",
    "save_sharded",
    "score_experts",
    "select_experts",
    "sequence_balance_loss",
    "sharding_of_launch",
    "take_router_load",
    "track_router_load",
    "untrack_router_load",
    "update_router_bias",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register()
