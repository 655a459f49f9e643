# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""LoRA layers that compute x A B for every choice instead of merging the stack of experts.

PEFT adapts a stacked parameter with `ParamWrapper`, which adds the product of the factors to the whole stack in every
forward pass. The layers here are ParamWrappers with the same parameters under the same names. So PEFT saves, loads,
merges and switches them as its own. Only the forward pass is another one.

PEFT's layout of E experts' factors: `lora_A` is expert-major, (E * r, in), and `lora_B` rank-major, (out, r * E).

Shape letters as in `experts.py`: T tokens, D hidden, E experts, K choices, S = T * K choices; and r the rank.
"""

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn
from torch.distributed.tensor import DTensor

from ..checkpoint_layout import STACKS, layer_of
from ..experts import (
    FUSED_BACKENDS,
    choose_backend,
    compute_dtype,
    refuse_offloaded,
    run_experts,
    tell_backend,
    why_unsupported,
)
from ..experts_grouped import GroupedChoices, alignment, grouped_linear, run_grouped
from ..experts_operands import Adapter
from ..experts_quantized import QuantizedStack, stack_of
from ..support.expert_parts import LocalPart, run_on_ranks
from ..support.peft_support import ParamWrapper, get_pattern_key, note_shape, parallel_style_of, spread_ourselves
from .parallel import (
    LATENT_PROJECTION,
    ShardedLinearLora,
    hook_latent_projection,
    linear_with_factors,
    refuse_dropout,
    refuse_merging,
)


class DirectLora(ParamWrapper):
    """A ParamWrapper that never builds the merged weight in a forward pass. It allows dropout and mixed batches."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        self.prepare(kwargs.get("target_name", ""))
        experts = base_layer.get_base_layer() if isinstance(base_layer, ParamWrapper) else base_layer
        if isinstance(stack := stack_of(experts, parameter_name), QuantizedStack):
            note_shape(getattr(experts, parameter_name), stack.shape)  # a copy of a model has lost it
        super().__init__(base_layer, adapter_name, parameter_name, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config.lora_dropout)

    def prepare(self, target_name: str = "") -> None:
        """Set what a layer has beside a ParamWrapper's attributes."""
        self.target_name = target_name
        self.empty_adapters: set[str] = set()  # those of the other projection alone

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; see `peft.tuners.lora.LoraLayer.update_layer`.

        If it is restricted to some experts, both factors of all others start at zero. Their gradients are exactly zero
        too, so they stay zero.
        """
        for field in ("lora_bias", "fan_in_fan_out"):  # PEFT refuses them for the first adapter only
            if getattr(config, field):
                raise ValueError(f"{field}=True is not allowed for adapters of parameters.")
        spread_ourselves(self.get_base_layer())
        refuse_dropout(self.get_param(), config.lora_dropout, self.get_base_layer())
        own = hasattr(config, "experts")  # a plain LoraConfig with dropout is refused: it would be saved with it
        super().update_layer(adapter_name, r, lora_alpha, config=_without_dropout(config) if own else config, **kwargs)
        self._set_dropout(adapter_name, config.lora_dropout)
        selection = getattr(config, "experts", None)
        layer = layer_of(kwargs.get("target_name", self.target_name))
        if selection is not None and layer is not None and self.parameter_name in STACKS:
            others = torch.ones(self.num_experts, dtype=torch.bool)
            others[selection.get(layer, [])] = False
            with torch.no_grad():
                factor_a, factor_b = self.factors(adapter_name)
                factor_a[others.to(factor_a.device)] = 0
                factor_b[..., others.to(factor_b.device)] = 0

    def factors(self, adapter_name: str, part: LocalPart | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of the factors or of a rank's part of them: `lora_A` as (E, r, in), `lora_B` as (out, r, E)."""
        weight_a, weight_b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        factors = weight_a.unflatten(0, (self.num_experts, -1)), weight_b.unflatten(1, (-1, self.num_experts))
        return factors if part is None else part.of_factors(self.parameter_name, *factors)

    def stack(self) -> torch.Tensor | QuantizedStack:
        """Return the parameter that this layer adapts, or what it means if it is quantised."""
        return stack_of(self.get_base_layer(), self.parameter_name)

    def set_dropout(self, probability: float) -> None:
        """Set the dropout of all adapters, a probability in [0, 1)."""
        for adapter_name in self.lora_A:
            self._set_dropout(adapter_name, probability)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge adapters into the weight; see `peft.tuners.lora.layer.ParamWrapper.merge`.

        Raises:
            ValueError: for a sharded weight, or a quantised one.
        """
        refuse_merging(self.get_param())
        if isinstance(self.stack(), QuantizedStack):
            raise ValueError(
                "Merging is not allowed into quantised experts in memory: save the adapter and run "
                "`deepseekmoe merge` with the base to merge into."
            )
        super().merge(*args, **kwargs)

    def _set_dropout(self, adapter_name: str, probability: float) -> None:
        dropout = nn.Dropout(probability) if probability > 0 else nn.Identity()
        self.lora_dropout.update(nn.ModuleDict({adapter_name: dropout}))

    def _adapters_in_use(self, adapter_names: list[str] | None) -> list[str]:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        if self.merged:
            if adapter_names is not None:
                raise ValueError("adapter_names is not allowed while adapters are merged: call unmerge_adapter first.")
            return []
        wanted = self.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
        return [name for name in wanted if name in self.lora_A]


class ExpertLora(DirectLora):
    """LoRA on one stacked projection of routed experts. The outermost layer computes both projections."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapter_names: list[str] | None = None,
    ) -> torch.Tensor:
        """Compute the weighted sum of the chosen experts' outputs, with their adapters.

        Args:
            hidden_states (`torch.Tensor` of shape (T, D)).
            top_k_index (`torch.LongTensor` of shape (T, K)): expert ids.
            top_k_weights (`torch.Tensor` of shape (T, K)).
            adapter_names: for every sample of the batch the name of its adapter; PEFT passes them on.

        Returns:
            `torch.Tensor` of shape (T, D). Without an adapter in use the experts' own implementation computes it. With
            adapters the fused operator does, if it takes the experts, if the batch has one adapter or one set of them,
            and if no adapter of a set has a dropout. Else one product is computed after the other.

        Raises:
            ValueError: if `adapter_names` does not fit the batch, or is given while adapters are merged or where the
                experts are spread over ranks.
        """
        experts = self.get_base_layer()
        in_use = {layer.parameter_name: layer._adapters_in_use(adapter_names) for layer in self.chain()}
        if not any(in_use.values()):
            return experts(hidden_states, top_k_index, top_k_weights)
        refuse_offloaded(experts)
        part = LocalPart.of(experts)
        if part is None:
            return self._run(in_use, adapter_names, None, hidden_states, top_k_index, top_k_weights)
        if adapter_names is not None:
            raise ValueError("adapter_names is not allowed where the experts are spread over ranks.")
        compute = functools.partial(self._run, in_use, None, part)
        return run_on_ranks(experts, compute, hidden_states, top_k_index, top_k_weights)

    def _run(
        self,
        in_use: dict[str, list[str]],
        adapter_names: list[str] | None,
        part: LocalPart | None,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the outputs of the experts that this process holds, with both projections' adapters in use."""
        experts, layers = self.get_base_layer(), {layer.parameter_name: layer for layer in self.chain()}
        backend, reason = choose_backend(experts, hidden_states, top_k=top_k_index.shape[1])
        if adapter_names is not None:
            backend, reason = "grouped", "the samples of the batch have adapters of their own"
        elif not all(layer.fusible(in_use[name]) for name, layer in layers.items()):
            backend = "grouped"
            reason = "a dropout is an adapter's beside others or a correction, or is a module of its own"
        tell_backend(experts, hidden_states, backend, reason)
        if backend in FUSED_BACKENDS:
            adapters = [layers[name].combined(in_use[name], part) if name in layers else None for name in STACKS]
            return run_experts(experts, hidden_states, top_k_index, top_k_weights, adapters=adapters, backend=backend)
        tokens_of = _tokens_of_adapters(len(hidden_states), adapter_names, hidden_states.device)
        stacks, top_k = {name: stack_of(experts, name) for name in STACKS}, top_k_index.shape[-1]
        dtype = compute_dtype(stacks["gate_up_proj"])
        stacks = {name: stack.to(dtype) for name, stack in stacks.items()}

        def project(name: str, rows: torch.Tensor, choices: GroupedChoices) -> torch.Tensor:
            output = grouped_linear(rows, stacks[name], choices)
            for adapter in in_use.get(name, ()):
                if tokens_of is None:
                    output.add_(layers[name].delta(adapter, rows, choices, part))
                else:
                    own = tokens_of[adapter][choices.order // top_k].nonzero().squeeze(-1)
                    delta = layers[name].delta(adapter, rows[own], choices.select(own))
                    output.index_add_(0, own, delta.to(output.dtype))
            return output

        return run_grouped(experts, hidden_states, top_k_index, top_k_weights, project, len(experts.gate_up_proj))

    def chain(self) -> list["ExpertLora"]:
        """Collect the layers of this module's experts from here inwards, one for each adapted projection."""
        layer, found = self, []
        while isinstance(layer, ExpertLora):
            found.append(layer)
            layer = layer.base_layer
        return found

    def order_chain(self, parent: nn.Module, child_name: str) -> None:
        """Nest the two projections as PEFT nests them when it makes both at once, `down_proj` outside."""
        chain = self.chain()
        if [layer.parameter_name for layer in chain] == ["gate_up_proj", "down_proj"]:
            inner, outer = chain
            outer.base_layer, inner.base_layer = inner, outer.base_layer
            setattr(parent, child_name, outer)

    def complete(self, module_name: str, configs: dict[str, LoraConfig]) -> None:
        """Give the outer projection its part of every adapter of the inner one.

        The nesting is part of PEFT's names. An adapter of `gate_up_proj` alone is named as the outer layer, which is
        that of `down_proj` here. With factors of zero, which get no gradient, it is an adapter of both.

        Args:
            module_name: name of the experts in the model.
            configs: configs of all adapters. Those that are completed get one more target.
        """
        for name in [name for name in getattr(self.base_layer, "lora_A", ()) if name not in self.lora_A]:
            config, target = configs[name], f"{module_name}.{self.parameter_name}"
            rank, alpha = rank_and_alpha(config, target)
            self.update_layer(name, rank, alpha, config)
            trained = self.base_layer.lora_A[name].weight.requires_grad
            for factor in (self.lora_A[name], self.lora_B[name]):
                nn.init.zeros_(factor.weight)
                factor.weight.requires_grad_(trained)
            if not self.empty_adapters:
                self.register_load_state_dict_pre_hook(_give_factors_to_the_inner_layer)
            self.empty_adapters.add(name)
            config.target_parameters = [*(config.target_parameters or ()), target]

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; see `peft.tuners.tuners_utils.BaseTunerLayer.delete_adapter`."""
        super().delete_adapter(adapter_name)
        self.empty_adapters.discard(adapter_name)

    def concatenated(
        self, adapters: list[str], weights: list[float], part: LocalPart | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Join the factors of a weighted sum of adapters along the rank: (E, R, in), (out, R, E)."""
        own = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in self.lora_A]
        factors = [self.factors(name, part) for name, _ in own]
        scales = [weight * self.scaling[name] for name, weight in own]
        return (
            torch.cat([scale * factor_a for scale, (factor_a, _) in zip(scales, factors, strict=True)], dim=1),
            torch.cat([factor_b for _, factor_b in factors], dim=1),
        )

    def fusible(self, adapters: list[str]) -> bool:
        """Tell whether the fused operator computes these adapters as one.

        Several must not have dropouts, because each draws its own; the correction of a quantised stack is one of them.
        """
        dropouts = [self.lora_dropout[name] for name in adapters]
        known = all(type(dropout) in (nn.Dropout, nn.Identity) for dropout in dropouts)
        alone = len(adapters) < 2 and getattr(self.stack(), "correction", None) is None
        return known and (alone or not any(map(_probability, dropouts)))

    def combined(self, adapters: list[str], part: LocalPart | None = None) -> Adapter | None:
        """Sum some adapters, which must be [`fusible`], for the fused operator. Without any the result is `None`."""
        if not adapters:
            return None
        dtype, scale = compute_dtype(self.stack()), self.scaling[adapters[0]]
        if len(adapters) == 1:
            factor_a, factor_b = self.factors(adapters[0], part)
        else:
            (factor_a, factor_b), scale = self.concatenated(adapters, [1.0] * len(adapters), part), 1.0
        dropout = _probability(self.lora_dropout[adapters[0]])
        seed = torch.randint(2**62, (), device=factor_a.device) if dropout else None
        return Adapter(factor_a.to(dtype), factor_b.permute(2, 0, 1).to(dtype), scale, dropout, seed)

    def delta(
        self, adapter_name: str, rows: torch.Tensor, choices: GroupedChoices, part: LocalPart | None = None
    ) -> torch.Tensor:
        """Compute what an adapter adds to the projection.

        Args:
            adapter_name: name of one of this layer's adapters.
            rows (`torch.Tensor` of shape (S, in)): inputs in the order of `choices`.
            choices: grouped by expert.
            part: this process's part of the experts, if it holds only some.

        Returns:
            `torch.Tensor` of shape (S, out).
        """
        dtype = compute_dtype(self.stack())
        factor_a, factor_b = (factor.to(dtype) for factor in self.factors(adapter_name, part))
        rows = self.lora_dropout[adapter_name](rows).to(dtype)
        scaling = self.scaling[adapter_name]
        if len(rows) < len(factor_a):
            # Few choices: only their experts' factors are read, and any for those of experts that are elsewhere.
            expert_ids = choices.expert_ids.clamp(max=len(factor_a) - 1)
            inner = torch.bmm(factor_a.index_select(0, expert_ids), rows.unsqueeze(-1))
            outer = factor_b.flatten(0, 1).index_select(1, expert_ids).unflatten(0, factor_b.shape[:2])
            return (outer * (scaling * inner.squeeze(-1).t())).sum(dim=1).t()
        # One copy that makes B expert-major, instead of a strided read in every group's product.
        outer = factor_b.flatten(0, 1).t().contiguous().unflatten(1, factor_b.shape[:2])
        if missing := -outer.shape[-1] % alignment(dtype):
            factor_a, outer = F.pad(factor_a, (0, 0, 0, missing)), F.pad(outer, (0, missing))
        inner = grouped_linear(rows, factor_a, choices)
        return grouped_linear(inner * scaling, outer, choices)


def _give_factors_to_the_inner_layer(layer: ExpertLora, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Move the factors of an adapter of `gate_up_proj` alone to the inner layer.

    Its file names them as the outer layer's.
    """
    for name in layer.empty_adapters & set(getattr(layer.base_layer, "lora_A", ())):
        for factor, module in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            key = f"{factor}.{name}.weight"
            if prefix + key in state_dict and f"{prefix}base_layer.{key}" not in state_dict:
                state_dict[f"{prefix}base_layer.{key}"] = state_dict[prefix + key]
                state_dict[prefix + key] = torch.zeros_like(module[name].weight)


class LinearWeightLora(DirectLora):
    """LoRA on the weight of one `nn.Linear` that was named as a parameter.

    PEFT keeps the FFNs of a mixture apart from its experts in this way.
    """

    def forward(self, x: torch.Tensor, adapter_names: list[str] | None = None) -> torch.Tensor:
        """Apply the linear map with its adapters; (..., in) becomes (..., out)."""
        in_use = self._adapters_in_use(adapter_names)
        output = self.base_layer(x)
        if not in_use:
            return output
        rows, flat = x.flatten(0, -2), output.flatten(0, -2)
        tokens_of = _tokens_of_adapters(len(rows), adapter_names, x.device)
        for adapter in in_use:
            if tokens_of is None:
                flat = flat + self._delta(adapter, rows).to(flat.dtype)
            else:
                own = tokens_of[adapter].nonzero().squeeze(-1)
                flat = flat.index_add(0, own, self._delta(adapter, rows[own]).to(flat.dtype))
        return flat.view_as(output)

    def _delta(self, adapter_name: str, rows: torch.Tensor) -> torch.Tensor:
        dtype = self.get_param().dtype
        rows = self.lora_dropout[adapter_name](rows).to(dtype)
        factors = (factor[adapter_name].weight.to(dtype) for factor in (self.lora_A, self.lora_B))
        return linear_with_factors(self.get_param(), rows, *factors) * self.scaling[adapter_name]


# PEFT recognises the wrappers of a parameter, which it reuses for further adapters, by the name of their class.
ExpertLora.__name__ = LinearWeightLora.__name__ = ParamWrapper.__name__


def create_layer(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """Make the LoRA layer of a module or of one of its parameters, or return `None` if PEFT's own is the right one.

    Args:
        target: the module, or PEFT's wrapper around it.
        adapter_name, config, kwargs: what PEFT hands to its dispatchers.
    """
    parameter_name = kwargs.get("parameter_name")
    base_layer = target.get_base_layer() if isinstance(target, ParamWrapper) else target
    layer_class = layer_class_of(base_layer, parameter_name)
    if layer_class is not None:
        spread_ourselves(target)
        return layer_class(target, adapter_name, config=config, **kwargs)
    style, name = parallel_style_of(target), kwargs.get("target_name", type(target).__name__)
    if style == "colwise_gather_output":
        raise ValueError(f"LoRA on {name} is not allowed under tensor parallelism.")
    layer: nn.Module | None = None
    if type(target) is nn.Linear and isinstance(target.weight, DTensor) and not config.use_dora:
        spread_ourselves(target)
        layer = ShardedLinearLora(target, adapter_name, config=config, **kwargs)
    if style == LATENT_PROJECTION:
        if type(target) is not nn.Linear:
            raise ValueError(f"LoRA on {name}, a {type(target).__name__}, is not allowed under tensor parallelism.")
        layer = layer or Linear(target, adapter_name, config=config, **kwargs)
        hook_latent_projection(target, layer)
    return layer


def layer_class_of(base_layer: nn.Module, parameter_name: str | None) -> type[DirectLora] | None:
    """Return which of the layers here computes LoRA on a module's parameter, or `None`."""
    if parameter_name in STACKS and why_unsupported(base_layer) is None:
        return ExpertLora
    if parameter_name == "weight" and type(base_layer) is nn.Linear:
        return LinearWeightLora
    return None


def rank_and_alpha(config: LoraConfig, key: str) -> tuple[int, float]:
    """Return rank and alpha of an adapter at a module or parameter, with the patterns of its config."""
    return (
        config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), key), config.r),
        config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), key), config.lora_alpha),
    )


def _probability(dropout: nn.Module) -> float:
    """Return the probability with which a dropout leaves out a number now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _without_dropout(config: LoraConfig) -> LoraConfig:
    """Copy a config without dropout for PEFT's ParamWrapper, which cannot apply dropout and therefore refuses it."""
    plain = copy.copy(config)
    plain.lora_dropout = 0.0
    return plain


def _tokens_of_adapters(
    num_tokens: int, adapter_names: list[str] | None, device: torch.device
) -> dict[str, torch.Tensor] | None:
    """Find for every adapter of a mixed batch its own tokens, (T,) booleans; `None` for an ordinary batch."""
    if adapter_names is None:
        return None
    if not adapter_names or num_tokens % len(adapter_names):
        raise ValueError(
            f"adapter_names of length {len(adapter_names)} is not allowed for {num_tokens} tokens: there must be one "
            "name for each sample of the batch."
        )
    length = num_tokens // len(adapter_names)
    return {
        adapter: torch.tensor([name == adapter for name in adapter_names], device=device).repeat_interleave(length)
        for adapter in set(adapter_names)
    }


__all__ = ["DirectLora", "ExpertLora", "LinearWeightLora", "create_layer", "layer_class_of", "rank_and_alpha"]
