# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The linear maps of a model that an adapter can lie beside, and those that it cannot."""

from torch import nn

from .moe_layers import find_moe_layers

INDEXER = "indexer"  # what families call the module that chooses the tokens of their attention


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of all linear maps of the base, also in a model that has adapters already."""
    names = {
        _of_base(name): None
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name and ".modules_to_save." not in name
    }
    return list(names)


def odd_linears(model: nn.Module) -> dict[str, str]:
    """Return the names of linear maps that get no adapter, and what they are.

    Of an indexer (DeepSeek-V3.2, V4) only which tokens it chooses has an effect, so that it gets no gradient. Classes
    of a family's own, as V4's grouped maps and some gates, compute something else than a linear map does.
    """
    odd = {}
    for name, module in model.named_modules():
        kind = type(module)
        if not isinstance(module, nn.Linear):
            continue
        if f".{INDEXER}." in f".{name}.":
            odd[_of_base(name)] = "of an indexer, which gets no gradient"
        elif kind.forward is not nn.Linear.forward and kind.__module__.startswith("transformers.models."):
            odd[_of_base(name)] = f"a {kind.__name__}, which is no plain linear map"
    return odd


def gate_names(model: nn.Module) -> tuple[str, ...]:
    """Return what the names of everything in the gates of MoE layers begin with."""
    return tuple(f"{layer.gate_path}." for layer in find_moe_layers(model) if layer.gate is not None)


def _of_base(name: str) -> str:
    return name.replace(".base_layer", "").replace(".original_module", "")


__all__ = ["gate_names", "linear_names", "odd_linears"]
