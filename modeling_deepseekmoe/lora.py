# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""LoRA on the routed experts through PEFT: its configs, its commands, its files, at the price of LoRA.

[`expert_lora_config`] makes a config for `peft.get_peft_model`; [`optimize_expert_lora`] speeds up an adapter that
PEFT itself made or loaded. Both work on this family and on every model of transformers with the same stacked experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from .esft import ExpertSelection
from .experts import PROJECTIONS, find_experts, why_unsupported
from .lora_layers import DirectLora, ExpertLora, create_layer, layer_class_of

_PARAMETERS = {"gate_up": "gate_up_proj", "down": "down_proj"}
_COMBINATIONS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
# PEFT reads these names, wherever they stand in a V2 or V3 model, as the old per-expert names of the routed experts.
_FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


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


def expert_lora_config(
    model: nn.Module,
    r: int = 16,
    lora_alpha: float | None = None,
    *,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    init_lora_weights: bool | str = True,
    target_modules: Sequence[str] = (),
    experts: str | Path | Mapping[int, Sequence[int]] | ExpertSelection | None = None,
    projections: Sequence[str] = ("gate_up", "down"),
    train_router: bool = False,
    modules_to_save: Sequence[str] = (),
    task_type: str | None = "CAUSAL_LM",
    **kwargs: Any,
) -> ExpertLoraConfig:
    """A config for `peft.get_peft_model` that adapts the routed experts.

    Args:
        model: a model of this family, or any other of transformers with experts stacked as `gate_up_proj` (E, 2I, D)
            and `down_proj` (E, D, I): its DeepSeek-V2 and V3, Qwen3-MoE, Mixtral, OLMoE, ...
        r: rank, of every expert's adapter.
        lora_alpha: the adapter counts `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`; 2 * r by default.
        lora_dropout: probability, drawn for every token at every expert; also of the `target_modules`.
        use_rslora: scale by the square root of the rank.
        init_lora_weights: `True`, `False` (B is random too) or `"gaussian"`.
        target_modules: linear maps to adapt beside the experts, by the end of their names or by the name of a module
            that holds them: `("self_attn", "shared_experts")`, `("q_proj", "v_proj")`.
        experts: restrict the adapter to these ids of these layers, or to those of an `esft.json`. Layers that are not
            named get none.
        projections: `"gate_up"` (one A serves both halves), `"down"`, or both.
        train_router: train the gates too, as whole copies. Their balancing bias is saved with the adapter.
        modules_to_save: further modules to train as whole copies.
        task_type: PEFT's.
        kwargs: other fields of `peft.LoraConfig`.

    Raises:
        ValueError: for a value that is not allowed, or a model without such experts.
    """
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"r={r!r} is not allowed: it must be an integer of at least 1.")
    lora_alpha = 2 * r if lora_alpha is None else lora_alpha
    if not lora_alpha > 0:
        raise ValueError(f"lora_alpha={lora_alpha!r} is not allowed: it must be above 0.")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout={lora_dropout!r} is not allowed: it must be at least 0 and below 1.")
    if init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights={init_lora_weights!r} is not allowed: it must be True, False or 'gaussian'."
        )
    if kwargs.get("use_dora"):
        raise ValueError(
            "use_dora=True is not allowed: its magnitudes need the norms of every expert's merged weight in every "
            "step, and plain PEFT could not read the adapter. Use use_rslora, or a higher rank."
        )
    projections = [projections] if isinstance(projections, str) else list(projections)
    unknown = [name for name in projections if name not in _PARAMETERS]
    if unknown or not projections:
        raise ValueError(f"projections={projections!r} is not allowed: choose from 'gate_up' and 'down'.")
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    blocks = _supported_experts(model)
    selection = None if experts is None else ExpertSelection.of(experts).checked(model)
    layers = None if selection is None else [layer for layer, ids in selection.experts.items() if ids]
    if layers is None or set(layers) == set(blocks):
        prefixes = sorted({".".join(name.split(".")[-2:]) for name, _ in blocks.values()})
    else:
        prefixes = [blocks[layer][0] for layer in layers]
    parameters = [f"{prefix}.{_PARAMETERS[name]}" for prefix in prefixes for name in dict.fromkeys(projections)]
    target_modules = list(target_modules) + (["shared_experts"] if selection and selection.shared_experts else [])
    modules, more_parameters = _linear_targets(model, target_modules)
    gates = _gates(model, blocks) if train_router else []
    return ExpertLoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        init_lora_weights=init_lora_weights,
        target_modules=modules,
        target_parameters=parameters + more_parameters,
        modules_to_save=[*modules_to_save, *gates] or None,
        task_type=task_type,
        experts=None if selection is None else selection.experts,
        **kwargs,
    )


def _supported_experts(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    blocks = find_experts(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no stacked experts: there is nothing for expert LoRA to adapt.")
    for name, experts in blocks.values():
        _check_supported(name, experts)
    return blocks


def _gates(model: nn.Module, blocks: dict[int, tuple[str, nn.Module]]) -> list[str]:
    names = [f"{name.rpartition('.')[0]}.gate" for name, _ in blocks.values()]
    missing = [name for name in names if name not in dict(model.named_modules())]
    if missing:
        raise ValueError(
            f"train_router=True is not allowed for {type(model).__name__}: it has no module {missing[0]}."
        )
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def _check_supported(name: str, experts: nn.Module) -> None:
    reason = why_unsupported(experts)
    if reason is not None:
        raise ValueError(f"{name} ({type(experts).__name__}) is not allowed for expert LoRA: {reason}.")


def _linear_targets(model: nn.Module, target_modules: Sequence[str]) -> tuple[list[str], list[str]]:
    """`target_modules` as the names that PEFT's `target_modules` and `target_parameters` understand."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    modules: dict[str, None] = {}
    parameters: dict[str, None] = {}
    for target in target_modules:
        found = [f".{name}" for name in linears if f".{target}." in f".{name}."]
        if not found:
            leaves = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ValueError(
                f"target_modules: {target!r} is not allowed: no linear map has that name. There are "
                f"{', '.join(leaves)}."
            )
        for name in found:
            suffix = name[name.rindex(f".{target}") + 1 :]
            if suffix.rsplit(".", 1)[-1] in _FFN_PROJECTIONS:
                parameters[f"{suffix}.weight"] = None
            else:
                modules[suffix] = None
    return list(modules), list(parameters)


def optimize_expert_lora(peft_model: PeftModel, lora_dropout: float | None = None) -> PeftModel:
    """Make the adapters on stacked experts of a PEFT model fast, in place: those that plain PEFT made or loaded, and
    all that are added later. Parameters, optimizers and names stay what they are.

    It also lifts what PEFT refuses for such adapters: dropout, mixed batches, adapters that target different
    projections, `add_weighted_adapter` (`linear`, `cat`, `svd`, `ties`, `dare_linear`, `dare_ties`,
    `magnitude_prune`). For the last two it is also needed after `get_peft_model` with an [`expert_lora_config`].

    Args:
        peft_model: from `get_peft_model` or `PeftModel.from_pretrained`.
        lora_dropout: the dropout of all adapters on experts, for training; unchanged if `None`.

    Returns:
        The same model.

    Raises:
        ValueError: if it has no LoRA on stacked experts, or on experts of a kind that is not supported.
    """
    if lora_dropout is not None and not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout={lora_dropout!r} is not allowed: it must be at least 0 and below 1.")
    tuner: Any = getattr(peft_model, "base_model", None)
    if type(tuner) not in (LoraModel, ExpertLoraModel):
        raise ValueError(
            f"peft_model: a {type(peft_model).__name__} is not allowed: it must be a PeftModel with LoRA."
        )
    wrappers = [module for module in tuner.modules() if isinstance(module, ParamWrapper)]
    on_experts = [module for module in wrappers if module.parameter_name in PROJECTIONS]
    if not on_experts:
        raise ValueError(
            "peft_model is not allowed: it has no adapter on stacked experts, which is what there is to speed up."
        )
    for wrapper in on_experts:
        _check_supported("target_parameters", wrapper.get_base_layer())
    for wrapper in wrappers:
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
        for parent in list(self.model.modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, ExpertLora) and not isinstance(parent, ExpertLora):
                    child.order_chain(parent, child_name)
                    getattr(parent, child_name).complete(self.peft_config)
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
        first = self.peft_config[adapters[0]]
        own = first.target_parameters
        # The new adapter takes its targets from the first one, and must reach those of all.
        first.target_parameters = sorted(
            {name for key in adapters for name in self.peft_config[key].target_parameters or ()}
        )
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, combination_type=combination_type, **kwargs)
        finally:
            first.target_parameters = own
        if combination_type == "cat" and len(adapters) > 1:
            for layer in self.modules():
                if isinstance(layer, ExpertLora) and adapter_name in layer.lora_A:
                    factor_a, factor_b = layer.concatenated(adapters, weights)
                    self._set_factors(layer, adapter_name, factor_a / layer.scaling[adapter_name], factor_b)

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
        self._set_factors(target, adapter_name, new_a / target.scaling[adapter_name], new_b.permute(1, 2, 0))
        return target_lora_A.data, target.lora_B[adapter_name].weight.data


__all__ = ["ExpertLoraConfig", "ExpertLoraModel", "expert_lora_config", "optimize_expert_lora"]
