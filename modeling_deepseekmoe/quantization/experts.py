# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Modules of experts whose stacks are quantised."""

import functools
from typing import Any

import torch
from torch import nn

from ..checkpoint_layout import OF_QUANTISED, STACKS
from ..conversion.matrix_formats import check_width
from ..experts import IMPLEMENTATION, experts_forward, why_unsupported
from ..experts_quantized import (
    CORRECTION,
    DTYPE_ATTRIBUTE,
    FORMAT_ATTRIBUTE,
    NESTED,
    SCALES,
    QuantizedStack,
    stack_of,
)
from ..families.moe_layers import find_moe_layers, stacked_modules
from ..support.peft_support import note_shape
from ..transformers_support import experts_implementation_of
from .config import StackedExpertsConfig
from .stacking import StackFormat


class QuantizedExperts(nn.Module):
    """A mixin for the class of an experts module with quantised stacks."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the weighted sum of the chosen experts' outputs, as the class itself does.

        Raises:
            ValueError: if something else than this package's implementation would read the codes as weights.
        """
        if torch.onnx.is_in_onnx_export():
            raise ValueError("An export to ONNX is not allowed for quantised experts: call model.dequantize() first.")
        if hasattr(self, "parametrizations"):
            raise ValueError(
                "Adapters that PEFT merges in every forward pass are not allowed on quantised experts: call "
                "optimize_expert_lora(model), or make the adapter with expert_lora_config(model)."
            )
        if not hasattr(self, "config"):  # its class has one way to compute, which reads the stacks (Step-3.7)
            return experts_forward(self, *args, **kwargs)
        implementation = experts_implementation_of(self.config)
        if implementation != IMPLEMENTATION:
            raise ValueError(
                f"experts_implementation={implementation!r} is not allowed for quantised experts: it must be "
                f"{IMPLEMENTATION!r}."
            )
        return super().forward(*args, **kwargs)

    def stored(self, name: str) -> StackFormat:
        """Return how one of the stacks is stored."""
        stack = stack_of(self, name)
        assert isinstance(stack, QuantizedStack)
        num_experts, rows, columns = stack.shape
        return StackFormat(stack.format, (num_experts, rows, columns), len(STACKS[name]), stack.nested is not None)

    def extra_repr(self) -> str:
        """Describe what the class's parameters do not show."""
        return ", ".join(f"{name}={getattr(self, name, None)}" for name in (FORMAT_ATTRIBUTE, DTYPE_ATTRIBUTE))


def prepare_experts(model: nn.Module, config: StackedExpertsConfig, dtype: torch.dtype) -> list[str]:
    """Make the experts of a model ready to be loaded quantised, on the meta device.

    The stacks themselves stay until then: transformers makes its choices by their dtype.

    Args:
        model: a model of this family, or any other of transformers with stacked experts.
        config: says which, and how.
        dtype: that of the products, unless the config has one.

    Returns:
        The names of the modules.

    Raises:
        ValueError: if there are no such experts, or some that this cannot quantise.
    """
    layers, names = find_moe_layers(model), []
    unknown = set(config.skip_layers) - {layer.index for layer in layers}
    if unknown:
        raise ValueError(
            f"skip_layers={config.skip_layers} is not allowed: layer {min(unknown)} has no routed experts; those that "
            f"have are {sorted(layer.index for layer in layers)}."
        )
    wanted = [layer for layer in layers if layer.index not in config.skip_layers]
    for layer in wanted:
        name, found = f"{layer.name}.experts", stacked_modules(layer)
        for experts in found:
            reason = why_unsupported(experts)
            if reason is not None:
                raise ValueError(f"{name} ({type(experts).__name__}) is not allowed to be quantised: {reason}.")
            _prepare(experts, name, config, config.products_in or dtype)
            names.append(name)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no stacked experts to quantise: no layer of it holds gate_up_proj (E, 2I, D) "
            "and down_proj (E, D, I)."
        )
    return names


def _prepare(experts: nn.Module, name: str, config: StackedExpertsConfig, dtype: torch.dtype) -> None:
    for stack, projections in STACKS.items():
        shape = tuple(getattr(experts, stack).shape)
        check_width(config.format, f"{name}.{stack}", shape)
        stored = StackFormat(config.format, shape, len(projections), config.double_quantisation)
        for suffix, (of_scales, kind) in stored.scales().items():
            tensor = torch.empty(of_scales, dtype=kind, device="meta")
            experts.register_parameter(stack + suffix, nn.Parameter(tensor, requires_grad=False))
        getattr(experts, stack).requires_grad_(False)
    setattr(experts, FORMAT_ATTRIBUTE, config.format)
    setattr(experts, DTYPE_ATTRIBUTE, dtype)
    experts.register_load_state_dict_pre_hook(_keep_own_stacks)
    plain: Any = type(experts)
    experts.__class__ = _quantized_class(plain)


@functools.cache
def _quantized_class(plain: type) -> type:
    return type(f"Quantized{plain.__name__}", (QuantizedExperts, plain), {"plain_class": plain})


def _keep_own_stacks(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Keep `load_state_dict` from changing quantised stacks: what it is given of them must be their own.

    It is given whole stacks, or all matrices by their official names, as Trainer gives it the file of a checkpoint.
    """
    errors: list[str] = args[-1]
    if not hasattr(module, FORMAT_ATTRIBUTE):
        return
    for name, projections in STACKS.items():
        own, given = getattr(module, name), state.get(prefix + name)
        if given is not None and (given.dtype != own.dtype or given.shape != own.shape):
            what = f"{given.dtype} of {tuple(given.shape)}"
            errors.append(f"{prefix}{name} is quantised, and {what} is not what it holds.")
            state[prefix + name] = own.detach()
        if not any(f"{prefix}0.{projection}.weight" in state for projection in projections):
            continue
        for expert, whole in enumerate(stack_of(module, name).unbind()):
            for projection, matrix in zip(projections, whole.projections(len(projections)), strict=True):
                official = f"{prefix}{expert}.{projection}.weight"
                found = {key: state.pop(key) for key in list(state) if key.startswith(official)}
                values = {official: matrix.codes, **{official + end: matrix.scales for end in OF_QUANTISED}}
                if any(key in values and not _same_bytes(part, values[key]) for key, part in found.items()):
                    errors.append(
                        f"{official} is not what {prefix}{name} holds, which is quantised and stays: use "
                        "from_pretrained."
                    )
        for own_name, parameter in module.named_parameters(recurse=False):
            if own_name.startswith(name):
                state[prefix + own_name] = parameter.detach()


def _same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    bytes_of = [tensor.detach().cpu().contiguous().view(torch.uint8).flatten() for tensor in (first, second)]
    return torch.equal(*bytes_of)


def note_shapes(experts: nn.Module) -> None:
    """Tell PEFT the shapes of a module's stacks."""
    for name in STACKS:
        note_shape(getattr(experts, name), stack_of(experts, name).shape)


@torch.no_grad()
def dequantize_experts(experts: QuantizedExperts, dtype: torch.dtype) -> None:
    """Make the stacks of a module parameters of a floating dtype again, in place."""
    for name in STACKS:
        stack = stack_of(experts, name)
        assert isinstance(stack, QuantizedStack)
        experts.register_parameter(name, nn.Parameter(stack.to(dtype).decode(slice(None))))
        for suffix in (SCALES, NESTED, *CORRECTION):
            if hasattr(experts, name + suffix):
                delattr(experts, name + suffix)
    delattr(experts, FORMAT_ATTRIBUTE)
    delattr(experts, DTYPE_ATTRIBUTE)
    experts.__class__ = type(experts).plain_class


__all__ = ["QuantizedExperts", "dequantize_experts", "note_shapes", "prepare_experts"]
