# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Route the models of transformers with this package: the same choices in fewer launches, and biases for all gates."""

from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint_layout import BIAS_NAME
from ..configuration_checks import check_implementation
from ..families.gate_rules import RULE, GateRule, UnknownGateError, rule_of
from ..families.moe_layers import BalancingBias, MoeLayer, find_moe_layers, require_moe_layers
from ..moe import DeepseekMoeGate
from ..support.folders import opened
from ..support.library_support import has_adapters, replace_forward
from ..triton_support import why_no_triton

logger = logging.get_logger(__name__)


def route_native_gates(model: nn.Module, implementation: str = "auto") -> int:
    """Let the gates of a model of transformers choose the experts with [`route`].

    The rule of each gate is found by trying (`families.gate_rules`), so that choices, weights and gradients stay those
    of the family. The order of a token's choices changes: best first, and ties go to the lower id. Scores are computed
    in float32, also where the family takes the model's dtype. The `forward` of the gates is replaced, so call this
    after loading, and before `torch.compile`. Call it again to change the implementation.

    Args:
        model: any model that holds such gates.
        implementation (`str`): as for [`route`].

    Returns:
        `int`: the number of gates. A warning names those that are left as they are, and why.

    Raises:
        ValueError: if `implementation` is another one, or if the model has no gate that [`route`] can express.
    """
    check_implementation(implementation)
    if implementation == "triton":
        for device in {parameter.device for parameter in model.parameters()}:
            if reason := why_no_triton(device):
                raise ValueError(f"implementation='triton' is not allowed: {reason}.")
    layers = [layer for layer in find_moe_layers(model) if not isinstance(layer.gate, DeepseekMoeGate)]
    if not layers:
        raise ValueError(
            f"model of class {type(model).__name__} is not allowed: it has no gates of transformers' own models."
        )
    refused: list[str] = []
    for layer in layers:
        try:
            _replace(layer, rule_of(layer), layer.bias, implementation)
        except UnknownGateError as error:
            refused.append(str(error))
    if len(refused) == len(layers):
        raise ValueError(refused[0])
    if refused:
        logger.warning(f"{len(refused)} of {len(layers)} gates choose by themselves. {refused[0]}")
    return len(layers) - len(refused)


def add_balancing_bias(model: nn.Module, checkpoint: str | Path | None = None) -> int:
    """Give the gates of a model of transformers a balancing bias, where they have none.

    This changes the model: its gates choose by score plus bias from then on, and `LoadBalancingCallback` moves it.
    Each gate gets a buffer `e_score_correction_bias` of zeros, in float32, which is saved with the model. Whoever
    loads the files must call this function too: transformers itself drops the bias, and names it as unexpected. The
    config notes `added_balancing_bias`.

    Args:
        model: any model whose gates [`route`] can express.
        checkpoint: the folder of a model that was saved with such biases, to read them from.

    Returns:
        The number of gates that were given one. Gates with a fixed choice, and those with a bias, stay as they are.

    Raises:
        ValueError: if a gate is not understood, or if none needs one; with a checkpoint, if it holds none.
    """
    layers = [layer for layer in require_moe_layers(model) if layer.bias is None]
    if has_adapters(model):
        raise ValueError(
            f"{type(model).__name__} is not allowed: it has adapters of PEFT. Give its gates a bias before "
            "get_peft_model, so that copies of them (train_router=True) have it too."
        )
    if not layers or any(isinstance(layer.gate, DeepseekMoeGate) for layer in layers):
        what = "its gates have a balancing bias already" if not layers else "it takes topk_method='noaux_tc'"
        raise ValueError(f"{type(model).__name__} is not allowed: {what}.")
    rules = [(layer, rule_of(layer)) for layer in layers]  # before anything is changed
    rules = [(layer, rule) for layer, rule in rules if not rule.table]
    if not rules:
        raise ValueError(
            f"{type(model).__name__} is not allowed: its gates have a balancing bias already, or choose from a table."
        )
    noted = any(getattr(module.config, "added_balancing_bias", False)
                for module in model.modules() if isinstance(module, PreTrainedModel))  # fmt: skip
    if noted and checkpoint is None:
        logger.warning(
            f"The config of {type(model).__name__} notes that its checkpoint holds balancing biases. They begin with "
            "zeros now: add_balancing_bias(model, folder) reads them."
        )
    names = [f"{layer.gate_path}.{BIAS_NAME}" for layer, _ in rules]
    stored = {} if checkpoint is None else _stored_biases(Path(checkpoint), names)
    for (layer, rule), name in zip(rules, names, strict=True):
        gate = layer.gate
        assert gate is not None
        values = stored.get(name, torch.zeros(layer.num_experts))
        if values.shape != (layer.num_experts,):
            raise ValueError(
                f"{name} of shape {tuple(values.shape)} is not allowed: there are {layer.num_experts} experts."
            )
        device = next(gate.parameters()).device
        if device.type == "meta":
            raise ValueError(f"{name.rpartition('.')[0]} is not allowed: its weights are offloaded.")
        gate.register_buffer(BIAS_NAME, values.to(device, torch.float32))
        _replace(layer, rule, BalancingBias(gate, BIAS_NAME), "auto")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.added_balancing_bias = True
    return len(rules)


def _stored_biases(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Read the biases of a checkpoint. The names there may have another beginning."""
    if not folder.is_dir():
        raise ValueError(f"checkpoint={str(folder)!r} is not allowed: it must be a folder on this machine.")
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with opened(file) as handle:
            keys = [key for key in handle.keys() if key.endswith(BIAS_NAME)]  # noqa: SIM118 - the handle is no mapping
            found |= {key.rpartition("layers.")[2]: handle.get_tensor(key) for key in keys}
    ends = {name: name.rpartition("layers.")[2] for name in names}
    missing = [name for name, end in ends.items() if end not in found]
    if missing:
        raise ValueError(f"checkpoint={str(folder)!r} is not allowed: it holds no {missing[0]}.")
    return {name: found[end] for name, end in ends.items()}


def _replace(layer: MoeLayer, rule: GateRule, bias: BalancingBias | None, implementation: str) -> None:
    assert layer.gate is not None
    if "bias" in rule.takes:  # the block hands it over
        bias = None
    vars(layer.gate)[RULE] = rule
    replace_forward(layer.gate, partial(_forward, layer.gate, rule.with_implementation(implementation), bias))


def _forward(
    gate: nn.Module,
    rule: GateRule,
    bias: BalancingBias | None,
    hidden_states: torch.Tensor,
    argument: torch.Tensor | None = None,
    **named: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what the gate does. Return logits (T, E), weights (T, K) and ids (T, K)."""
    argument = named.get(rule.takes, argument) if rule.takes else None
    logits = rule.logits(gate, hidden_states)
    routing = rule.route(gate, logits, None if bias is None else bias.tensor, argument, statistics=False)
    wide = torch.float32 if rule.logits_in_float32 else logits.dtype
    dtype = torch.float32 if rule.weights_in_float32 else hidden_states.dtype
    return logits.to(wide), routing.weights.to(dtype), routing.expert_ids


__all__ = ["add_balancing_bias", "route_native_gates"]
