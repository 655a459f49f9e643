# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""PEFT's config and model of LoRA, with adapters on stacked experts that are computed directly."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from .lora_layers import ExpertLora, create_layer

_COMBINATIONS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")


@dataclass
class ExpertLoraConfig(LoraConfig):
    """A `peft.LoraConfig` whose adapters on stacked experts are computed directly. It is saved as a plain LoraConfig
    that plain PEFT reads; since plain PEFT refuses dropout on parameters, it is saved with `lora_dropout` 0.

    Attributes:
        experts: for every layer the ids of the experts that get an adapter; all experts if `None`. In the saved
            adapter the factors of all others are zero.
    """

    experts: dict[int, list[int]] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._register_custom_module({nn.Module: create_layer})

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the fields of a LoraConfig."""
        fields = super().to_dict()
        del fields["experts"]
        if self.target_parameters:
            fields["lora_dropout"] = 0.0
        return fields


@contextmanager
def _hidden_target_parameters(configs: list[LoraConfig]) -> Iterator[None]:
    """While PEFT checks what it does not support for its own wrappers of parameters."""
    targets = [config.target_parameters for config in configs]
    for config in configs:
        config.target_parameters = None
    try:
        yield
    finally:
        for config, target in zip(configs, targets, strict=True):
            config.target_parameters = target


class ExpertLoraModel(LoraModel):
    """PEFT's LoraModel, without its limits for adapters on stacked experts."""

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        if type(config) is LoraConfig:
            config.__class__ = ExpertLoraConfig  # so that it creates these layers, and is saved as they can be read
            config.experts = None
            config._register_custom_module({nn.Module: create_layer})
        # PEFT asks that all adapters target the same parameters, because the nesting of its wrappers is part of the
        # names it saves. Here every nesting is completed.
        with _hidden_target_parameters([config]):
            super()._check_new_adapter_config(config)

    def _inject_parameters(self, *args: Any, **kwargs: Any) -> Any:
        targeted = super()._inject_parameters(*args, **kwargs)
        for parent_name, parent in list(self.model.named_modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, ExpertLora) and not isinstance(parent, ExpertLora):
                    child.order_chain(parent, child_name)
                    getattr(parent, child_name).complete(f"{parent_name}.{child_name}", self.peft_config)
        return targeted

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        **kwargs: Any,
    ) -> None:
        """Add the weighted combination of some adapters as a new one; see `peft.LoraModel.add_weighted_adapter`.

        Raises:
            ValueError: for a combination that does not exist, or not on stacked experts.
        """
        if combination_type not in _COMBINATIONS:
            raise ValueError(
                f"combination_type={combination_type!r} is not allowed on stacked experts: it must be one of "
                f"{', '.join(_COMBINATIONS)}."
            )
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters:
            raise ValueError(f"adapters={adapters!r} is not allowed: there are {sorted(self.peft_config)}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} is not allowed: there is an adapter of that name.")
        if kwargs.get("svd_clamp") is not None:
            raise ValueError("svd_clamp is not allowed on stacked experts.")
        with self._common_config(adapters):
            super().add_weighted_adapter(adapters, weights, adapter_name, combination_type=combination_type, **kwargs)
        if combination_type == "cat" and len(adapters) > 1:
            for layer in self.modules():
                if isinstance(layer, ExpertLora) and adapter_name in layer.lora_A:
                    self._set_factors(layer, adapter_name, *layer.concatenated(adapters, weights))

    @contextmanager
    def _common_config(self, adapters: list[str]) -> Iterator[None]:
        """PEFT copies the config of the first adapter: it must reach the targets of all of them, and its scaling must
        be 1, which with `lora_alpha` equal to the rank it is without rsLoRA only."""
        first = self.peft_config[adapters[0]]
        own = first.target_parameters, first.use_rslora
        targets = [self.peft_config[name].target_parameters or () for name in adapters]
        first.target_parameters, first.use_rslora = sorted(set().union(*targets)), False
        try:
            yield
        finally:
            first.target_parameters, first.use_rslora = own

    @staticmethod
    @torch.no_grad()
    def _set_factors(layer: ExpertLora, adapter_name: str, factor_a: torch.Tensor, factor_b: torch.Tensor) -> None:
        """Set the first rows of an adapter's rank; the others become zero."""
        rank = factor_a.shape[1]
        for target, values in zip(layer.factors(adapter_name), (factor_a, factor_b), strict=True):
            target.zero_()
            target[:, :rank].copy_(values)

    def _check_add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        configs = [self.peft_config[name] for name in adapters if name in self.peft_config]
        with _hidden_target_parameters(configs):
            return super()._check_add_weighted_adapter(adapters, *args, **kwargs)

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self, combination_type: str, adapters: list[str], weights: list[float], new_rank: int, target: nn.Module,
        target_lora_A: torch.Tensor, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if not isinstance(target, ExpertLora):
            return super()._svd_generalized_task_arithmetic_weighted_adapter(
                combination_type, adapters, weights, new_rank, target, target_lora_A, *args, **kwargs
            )
        adapter_name = next(name for name, layer in target.lora_A.items() if layer.weight is target_lora_A)
        factor_a, factor_b = target.concatenated(adapters, weights)
        # The singular values of B A are those of the small product of their triangular factors.
        basis_b, small_b = torch.linalg.qr(factor_b.permute(2, 0, 1).float())
        basis_a, small_a = torch.linalg.qr(factor_a.transpose(1, 2).float())
        left, values, right = torch.linalg.svd(small_b @ small_a.transpose(1, 2), full_matrices=False)
        rank = min(new_rank, values.shape[-1])
        new_b = basis_b @ (left[..., :rank] * values[:, None, :rank])
        new_a = right[:, :rank] @ basis_a.transpose(1, 2)
        self._set_factors(target, adapter_name, new_a, new_b.permute(1, 2, 0))
        return target_lora_A.data, target.lora_B[adapter_name].weight.data


__all__ = ["ExpertLoraConfig", "ExpertLoraModel"]
