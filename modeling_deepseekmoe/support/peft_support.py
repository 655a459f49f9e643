# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The names that the package takes from PEFT beyond its documented interface.

No other file uses a private name of PEFT, or imports from its inner modules. `tests/core/test_canaries_of_others.py`
states what is relied on for each.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn


def use_own_layers(config: LoraConfig, create_layer: Callable[..., nn.Module | None]) -> None:
    """Let PEFT make its layers with `create_layer`. If that returns `None`, PEFT makes them as it does without."""
    config._register_custom_module({nn.Module: create_layer})


def is_of_adapter(module: nn.Module) -> bool:
    """Tell whether a module is PEFT's own: a model with an adapter, or a layer of one."""
    return isinstance(module, PeftModel | BaseTunerLayer)


def adapts_module(config: LoraConfig, name: str) -> bool:
    """Tell whether PEFT adapts a module of this name, by the target, exclusion and layer fields of a config."""
    return bool(check_target_module_exists(config, name))


def variant_fields() -> set[str]:
    """Return the fields of a LoraConfig that ask for another computation than x A B. PEFT marks them."""
    return {field.name for field in fields(LoraConfig) if field.metadata.get("is_lora_variant")}


def parallel_style_of(layer: nn.Module) -> str | None:
    """Return how transformers spreads a layer over ranks, as PEFT has noted it there."""
    return getattr(layer, "_hf_tp_plan", None)


def spread_ourselves(layer: nn.Module) -> None:
    """Keep PEFT from spreading the adapter of a layer over ranks, by removing its note on the layer.

    PEFT goes by that note alone.
    """
    layer._hf_tp_plan = None


def mesh_of(layer: nn.Module) -> Any:
    """Return the ranks over which transformers has spread a layer, as PEFT has noted them there."""
    return layer._hf_device_mesh


def note_shape(parameter: Any, shape: tuple[int, ...]) -> None:
    """Note on a parameter that is stored otherwise what shape it stands for, where PEFT reads that.

    It is the name that DeepSpeed has for it.
    """
    parameter.ds_shape = shape


class CombiningLoraModel(LoraModel):
    """PEFT's LoraModel, in which a subclass may say how `svd` combines the adapters of a layer."""

    def combine_by_svd(
        self, layer: nn.Module, adapters: list[str], weights: list[float], rank: int, adapter_name: str
    ) -> bool:
        """Write the weighted combination of a layer's adapters into another one, as closely as its rank allows.

        Args:
            layer: a LoRA layer.
            adapters, weights: names of the adapters to combine, and their weights.
            rank: rank of the new adapter.
            adapter_name: name of the new adapter.

        Returns:
            Whether it was done. If not, PEFT does it.
        """
        return False

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self, combination_type: str, adapters: list[str], weights: list[float], *arguments: Any, **kwargs: Any
    ) -> Any:
        new_rank, target, target_lora_A, target_lora_B, *_ = arguments
        adapter_name = next((name for name, layer in target.lora_A.items() if layer.weight is target_lora_A), None)
        if adapter_name is not None and self.combine_by_svd(target, adapters, weights, new_rank, adapter_name):
            return target_lora_A.data, target_lora_B.data
        return super()._svd_generalized_task_arithmetic_weighted_adapter(
            combination_type, adapters, weights, *arguments, **kwargs
        )


__all__ = [
    "CombiningLoraModel",
    "ParamWrapper",
    "adapts_module",
    "get_pattern_key",
    "is_of_adapter",
    "mesh_of",
    "note_shape",
    "parallel_style_of",
    "spread_ourselves",
    "use_own_layers",
    "variant_fields",
]
