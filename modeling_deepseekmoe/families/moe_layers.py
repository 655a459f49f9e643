# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The MoE layers of a model, of this family or of another one, found by their structure.

All of transformers' models with stacked experts agree in this: a block holds `experts`, which are called with (hidden
states, expert ids, weights), and a gate beside them, which returns the logits first. The rest differs, and is found
here: what the gate is called, where the balancing bias lies and what its name is. `gate_rules` finds out how the gate
chooses.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint_layout import STACKS, layer_of

logger = logging.get_logger(__name__)

# What structure cannot tell: what a gate, and shared experts, are called.
GATES = ("gate", "router")
SHARED_EXPERTS = ("shared_experts", "shared_expert", "shared_mlp")
# A balancing bias has a longer name: `bias` alone is what a product ends with.
BIAS = "bias"


@dataclass(frozen=True)
class BalancingBias:
    """A tensor that is added to the scores for the choice alone.

    Attributes:
        owner: the module that holds it: the gate, a part of it, or the block.
        name: its name there.
    """

    owner: nn.Module
    name: str

    @property
    def tensor(self) -> torch.Tensor:
        """The bias itself, of as many values as the gate has experts."""
        return getattr(self.owner, self.name)


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of a model.

    Attributes:
        index: the decoder layer it belongs to.
        name: the name of the block in the model.
        block: the module that holds gate and experts. For a family without such a block it is the decoder layer.
        experts: the module that is called with (hidden states, expert ids, weights).
        gate: the module that chooses, or `None` if there is none beside the experts.
        gate_name: its name in the block.
        shared_experts: the module of the shared experts, in the block or beside it, if there is one.
        bias: the balancing bias, if there is one.
    """

    index: int
    name: str
    block: nn.Module
    experts: nn.Module
    gate: nn.Module | None
    gate_name: str
    shared_experts: nn.Module | None
    bias: BalancingBias | None

    def __deepcopy__(self, memo: dict[int, Any]) -> "MoeLayer":
        """Return the layer itself: a hook that holds it must not copy a model with the module it is on."""
        return self

    @property
    def gate_path(self) -> str:
        """The name of the gate in the model."""
        return f"{self.name}.{self.gate_name}"

    @property
    def num_experts(self) -> int:
        """E, the number of experts that the gate chooses among, also where ranks share them."""
        if self.bias is not None:
            return self.bias.tensor.numel()
        weight = getattr(self.gate, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2:
            return weight.shape[0]
        return int(self.experts.num_experts)

    @property
    def has_skip_class(self) -> bool:
        """Whether the gate chooses among one more class, for tokens that no expert computes (Zaya).

        Such a token comes to the experts with the id 0 and the weight 0.
        """
        return self.bias is not None and self.bias.tensor.numel() == getattr(self.experts, "num_experts", 0) + 1

    def choices_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the expert ids and their weights, (T, K) both, from a call of the experts.

        Raises:
            ValueError: if they were called with something else.
        """
        expert_ids = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
        weights = kwargs.get("top_k_weights", args[2] if len(args) > 2 else None)
        are_tensors = isinstance(expert_ids, torch.Tensor) and isinstance(weights, torch.Tensor)
        if expert_ids is None or not are_tensors or expert_ids.is_floating_point() or expert_ids.ndim != 2:
            raise ValueError(
                f"{self.name}.experts was not called with (hidden states, expert ids, weights), which are to be "
                "counted."
            )
        expert_ids = expert_ids.long()
        if self.has_skip_class:
            expert_ids = expert_ids.masked_fill(weights == 0, self.num_experts - 1)
        return expert_ids, weights

    @property
    def why_not_counted(self) -> str:
        """The reason why choices cannot be read from the experts' call; it is empty if they can."""
        kind = type(self.experts).__name__
        if isinstance(self.experts, nn.ModuleList | nn.ModuleDict):
            return f"its experts are a {kind} of single modules, which are not called with expert ids"
        if not hasattr(self.experts, "num_experts") and self.bias is None:
            return f"its experts ({kind}) do not say how many they are"
        parameters = inspect.signature(type(self.experts).forward).parameters
        takes_all = any(parameter.kind == parameter.VAR_POSITIONAL for parameter in parameters.values())
        if len(parameters) < 4 and not takes_all:  # self included
            return f"its experts ({kind}) are not called with (hidden states, expert ids, weights)"
        return ""


def find_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """Find the MoE layers of a model, in the order of the modules.

    Of a model with several towers they are those of the language model; an info line names the others.

    Args:
        model: any model, wrapped (DDP, PEFT) or not.

    Raises:
        ValueError: if a bias named `e_score_correction_bias` has no experts beside it.
    """
    names = {module: name for name, module in model.named_modules()}
    found = list(_layers(names))
    _refuse_unknown_biases(names, found)
    inside = _language_model(model, names)
    layers = [layer for layer in found if layer.name.startswith(inside)]
    if len(layers) < len(found):
        others = next(layer.name for layer in found if layer not in layers)
        logger.info_once(
            f"{type(model).__name__}: the MoE layers outside its language model are left alone, as {others}."
        )
    return layers


def find_experts(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Find the stacked experts of a model, by the indices of their layers.

    Returns:
        For every layer the name of the module (without PEFT's wrappers), and the module that holds the parameters.

    Raises:
        ValueError: if a layer has two such modules.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for layer in find_moe_layers(model):
        name = f"{layer.name}.experts".lstrip(".")
        for module in stacked_modules(layer):
            if layer.index in found:
                raise ValueError(
                    f"{name} is not allowed: layer {layer.index} has other experts, {found[layer.index][0]}, and "
                    "experts are named by their layer."
                )
            found[layer.index] = (name, module)
    return found


def stacked_modules(layer: MoeLayer) -> list[nn.Module]:
    """Find the modules of a layer's experts that hold stacks: one, below PEFT's wrappers, or none."""

    def holds_stacks(module: nn.Module) -> bool:
        own = dict(module.named_parameters(recurse=False))
        return all(stack in own and own[stack].ndim == 3 for stack in STACKS)

    return [module for module in layer.experts.modules() if holds_stacks(module)]


def unwrapped(layer: MoeLayer) -> MoeLayer:
    """Return a layer whose gate PEFT trains as a copy with the gate as it was."""
    original = None if layer.gate is None else dict(layer.gate.named_children()).get("original_module")
    if original is None:
        return layer
    return replace(layer, gate=original, bias=_bias_of(layer.block, layer.experts, {layer.gate_name: original}))


def require_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """Find the MoE layers as [`find_moe_layers`] does.

    Raises:
        ValueError: if there is none, or if one cannot be counted.
    """
    layers = find_moe_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoE layer: no module of it holds `experts` and beside them one of "
            f"{', '.join(GATES)}."
        )
    for layer in layers:
        if reason := layer.why_not_counted:
            raise ValueError(f"{layer.name} ({type(layer.block).__name__}) is not allowed: {reason}.")
    return layers


def _layers(names: dict[nn.Module, str]) -> Iterator[MoeLayer]:
    place = 0
    modules = {name: module for module, name in names.items()}
    for block, name in names.items():
        experts = dict(block.named_children()).get("experts")  # its own: wrappers show what is in them
        if experts is None or ".original_module" in name:
            continue
        beside = {child_name: child for child_name, child in block.named_children() if child is not experts}
        around = dict(modules[name.rpartition(".")[0]].named_children()) if name else {}  # GraniteMoeShared
        shared = next((of[wanted] for of in (beside, around) for wanted in SHARED_EXPERTS if wanted in of), None)
        gates = {child_name: child for child_name, child in beside.items() if child is not shared}
        bias = _bias_of(block, experts, gates)
        gate_name = next((wanted for wanted in GATES if wanted in gates), "")
        if not gate_name and bias is not None:
            gate_name = next((key for key, child in gates.items() if bias.owner in child.modules()), "")
        if not gate_name and bias is None:
            continue
        index = _index(name, place)
        place += 1
        yield MoeLayer(index, name, block, experts, gates.get(gate_name), gate_name, shared, bias)


def _bias_of(block: nn.Module, experts: nn.Module, beside: dict[str, nn.Module]) -> BalancingBias | None:
    """Find the balancing bias of a block, on the block itself or in a module beside the experts."""
    sizes = {len(p) for child in beside.values() for p in child.parameters() if p.ndim == 2}
    if (number := getattr(experts, "num_experts", None)) is not None:
        sizes |= {number, number + 1}  # the last one is a class of tokens that no expert computes
    for module in (block, *(part for child in beside.values() for part in child.modules())):
        own = (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False))
        for name, tensor in own:
            one_a_gate = tensor.ndim == 1 or (tensor.ndim == 2 and len(tensor) == 1)
            if BIAS in name and name != BIAS and one_a_gate and tensor.is_floating_point() and tensor.numel() in sizes:
                return BalancingBias(_in_use(module, beside), name)
    return None


def _in_use(owner: nn.Module, beside: dict[str, nn.Module]) -> nn.Module:
    """Return the module whose bias is in use: PEFT's wrapper shows that of the copy it trains."""
    for child in beside.values():
        parts = dict(child.named_children())
        if "original_module" not in parts:
            continue
        for path, module in parts["original_module"].named_modules():
            if module is owner:
                copies = dict(parts["modules_to_save"].named_children())
                active = [copies[name] for name in copies if name in getattr(child, "active_adapters", [])]
                in_use = active or list(copies.values())
                return in_use[0].get_submodule(path) if in_use else owner
    return owner


def _index(name: str, place: int) -> int:
    """Return the layer in a block's name, or the first number there, or else the place of the block among all."""
    layer = layer_of(name)
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    return layer if layer is not None else (numbers or [place])[0]


def _language_model(model: nn.Module, names: dict[nn.Module, str]) -> str:
    """Return the name of the language model inside a model of several towers; it is empty for others."""
    whole = next((module for module in names if isinstance(module, PreTrainedModel)), None)
    if whole is None:
        return ""
    config = whole.config.get_text_config()
    if config is whole.config:
        return ""
    inner = [name for module, name in names.items() if isinstance(module, PreTrainedModel) and module.config is config]
    return inner[0] if inner else ""


def _refuse_unknown_biases(names: dict[nn.Module, str], layers: list[MoeLayer]) -> None:
    known = {layer.bias.owner for layer in layers if layer.bias is not None}
    for module, name in names.items():
        for buffer, tensor in module.named_buffers(recurse=False):
            is_copy = ".original_module" in name or ".modules_to_save" in name  # of PEFT
            if buffer == "e_score_correction_bias" and module not in known and not is_copy:
                raise ValueError(
                    f"{name}.{buffer} is not understood: there are no `experts` beside it, {tensor.numel()} of them."
                )


__all__ = [
    "BalancingBias",
    "MoeLayer",
    "find_experts",
    "find_moe_layers",
    "require_moe_layers",
    "stacked_modules",
    "unwrapped",
]
