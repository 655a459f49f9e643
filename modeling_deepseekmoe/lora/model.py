# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""PEFT's model of LoRA for stacked experts: it computes their adapters directly, at the price of ordinary LoRA."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from torch import nn

from ..checkpoint_layout import STACKS
from ..support.peft_support import CombiningLoraModel, ParamWrapper, use_own_layers
from .config import ExpertLoraConfig, check_supported
from .layer import DirectLora, ExpertLora, create_layer, layer_class_of
from .options import check_dropout
from .parallel import refuse_dropout

_COMBINATIONS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")


@contextmanager
def _without_target_parameters(configs: list[LoraConfig]) -> Iterator[None]:
    """Hide the parameters that configs target, while PEFT checks what it does not support for its own wrappers."""
    targets = [config.target_parameters for config in configs]
    for config in configs:
        config.target_parameters = None
    try:
        yield
    finally:
        for config, target in zip(configs, targets, strict=True):
            config.target_parameters = target


class ExpertLoraModel(CombiningLoraModel):
    """PEFT's LoraModel, without its limits for adapters on stacked experts."""

    combined_targets: list[str] | None = None  # of the adapter that is being made of others

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the layers of an adapter; see `peft.tuners.tuners_utils.BaseTuner.inject_adapter`.

        The nesting of PEFT's wrappers is part of the names it saves. So PEFT asks that all adapters target the same
        parameters. Here every nesting is completed instead.
        """
        config = self.peft_config[adapter_name]
        if type(config) is LoraConfig:
            config.__class__ = ExpertLoraConfig  # so that it creates these layers, and is saved as they can be read
            config.experts = None
            use_own_layers(config, create_layer)
        if self.combined_targets is not None:
            config.target_parameters = self.combined_targets
        with _without_target_parameters([other for other in self.peft_config.values() if other is not config]):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        trained = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for parent_name, parent in list(self.model.named_modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, ExpertLora) and not isinstance(parent, ExpertLora):
                    child.order_chain(parent, child_name)
                    getattr(parent, child_name).complete(f"{parent_name}.{child_name}", self.peft_config)
        for parameter, is_trained in trained:  # completing one adapter switches all of a layer to it
            parameter.requires_grad_(is_trained)

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
            ValueError: for a combination that does not exist, or does not exist on stacked experts.
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
        for option in ("svd_clamp", "svd_driver"):
            if kwargs.get(option) is not None:
                raise ValueError(f"{option}={kwargs[option]!r} is not allowed on stacked experts.")
        first, configs = self.peft_config[adapters[0]], [self.peft_config[name] for name in adapters]
        self.combined_targets = sorted(set().union(*(config.target_parameters or () for config in configs)))
        # PEFT copies the first config. Its scaling must be 1, which with `lora_alpha` equal to the rank it is without
        # rsLoRA only.
        use_rslora, first.use_rslora = first.use_rslora, False
        try:
            with _without_target_parameters(configs):
                super().add_weighted_adapter(
                    adapters, weights, adapter_name, combination_type=combination_type, **kwargs
                )
        finally:
            first.use_rslora, self.combined_targets = use_rslora, None
        if combination_type == "cat" and len(adapters) > 1:
            for layer in self.modules():
                if isinstance(layer, ExpertLora) and adapter_name in layer.lora_A:
                    self._set_factors(layer, adapter_name, *layer.concatenated(adapters, weights))

    @staticmethod
    @torch.no_grad()
    def _set_factors(layer: ExpertLora, adapter_name: str, factor_a: torch.Tensor, factor_b: torch.Tensor) -> None:
        """Set the first rows of an adapter's rank. The others become zero."""
        rank = factor_a.shape[1]
        for target, values in zip(layer.factors(adapter_name), (factor_a, factor_b), strict=True):
            target.zero_()
            target[:, :rank].copy_(values)

    def combine_by_svd(
        self, layer: nn.Module, adapters: list[str], weights: list[float], rank: int, adapter_name: str
    ) -> bool:
        """Write a weighted combination of adapters on stacked experts into another one, without their products."""
        if not isinstance(layer, ExpertLora):
            return False
        factor_a, factor_b = layer.concatenated(adapters, weights)
        # The singular values of B A are those of the small product of their triangular factors.
        basis_b, small_b = torch.linalg.qr(factor_b.permute(2, 0, 1).float())
        basis_a, small_a = torch.linalg.qr(factor_a.transpose(1, 2).float())
        left, values, right = torch.linalg.svd(small_b @ small_a.transpose(1, 2), full_matrices=False)
        rank = min(rank, values.shape[-1])
        new_b = basis_b @ (left[..., :rank] * values[:, None, :rank])
        new_a = right[:, :rank] @ basis_a.transpose(1, 2)
        self._set_factors(layer, adapter_name, new_a, new_b.permute(1, 2, 0))
        return True


def optimize_expert_lora(peft_model: PeftModel, lora_dropout: float | None = None) -> PeftModel:
    """Make the adapters on stacked experts of a PEFT model fast, in place.

    These are the adapters that plain PEFT made or loaded, and all that are added later. The parameters stay the same
    objects, for an optimizer that has them.

    It also lifts what PEFT refuses for such adapters: dropout, mixed batches, adapters that target different
    projections, and `add_weighted_adapter` (`linear`, `cat`, `svd`, `ties`, `dare_linear`, `dare_ties`,
    `magnitude_prune`). Different projections and `add_weighted_adapter` need it also after `get_peft_model` with an
    [`expert_lora_config`].

    Args:
        peft_model: from `get_peft_model` or `PeftModel.from_pretrained`.
        lora_dropout: the dropout of all adapters on experts, for training; unchanged if `None`.

    Returns:
        The same model.

    Raises:
        ValueError: if it has no LoRA on stacked experts, or on experts of a kind that is not supported; for dropout
            where ranks share a batch.
    """
    if lora_dropout is not None:
        check_dropout(lora_dropout)
    tuner: Any = getattr(peft_model, "base_model", None)
    if type(tuner) not in (LoraModel, ExpertLoraModel):
        raise ValueError(
            f"peft_model: a {type(peft_model).__name__} is not allowed: it must be a PeftModel with LoRA."
        )
    wrappers = {name: module for name, module in tuner.named_modules() if isinstance(module, ParamWrapper)}
    on_experts = {name: module for name, module in wrappers.items() if module.parameter_name in STACKS}
    if not on_experts:
        raise ValueError("peft_model is not allowed: it has no adapter on stacked experts.")
    for name, wrapper in on_experts.items():
        check_supported(name, wrapper.get_base_layer())
        refuse_dropout(wrapper.get_param(), lora_dropout or 0.0, wrapper.get_base_layer())
    for wrapper in wrappers.values():
        _make_direct(wrapper)
        if lora_dropout is not None and isinstance(wrapper, ExpertLora):
            wrapper.set_dropout(lora_dropout)
    tuner.__class__ = ExpertLoraModel
    return peft_model


def _make_direct(wrapper: ParamWrapper) -> None:
    layer_class = layer_class_of(wrapper.get_base_layer(), wrapper.parameter_name)
    if layer_class is not None and not isinstance(wrapper, DirectLora):
        wrapper.__class__ = layer_class  # the same parameters under the same names: only the methods are others
        wrapper.prepare()


__all__ = ["ExpertLoraModel", "optimize_expert_lora"]
