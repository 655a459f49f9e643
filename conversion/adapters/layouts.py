# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Write adapters on routed experts in another layout: PEFT's stacked one, or one pair of factors for every linear map.

Both directions are exact. A joint gate_up adapter has one A for both halves of its rows. Gate and up each get that A,
and their half of B. Back, gate and up with different A need twice the rank, with one A below the other and a
block-diagonal B. If both A are the same, bit for bit, the rank stays. All experts of a layer must have one rank and
one alpha.

The per-expert layout is for tools whose models have a module for every expert. Plain PEFT can also read it on models
that stack their experts, if it knows their old names (`deepseek_v2`, `deepseek_v3` and others), but then without
shared experts.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from modeling_deepseekmoe.checkpoint_layout import LAYER, PROJECTIONS
from modeling_deepseekmoe.conversion.adapters.files import (
    PREFIX,
    WEIGHTS_NAME,
    LowRank,
    StoredAdapter,
    is_stack,
    per_expert_parts,
    read_adapter,
    split_expert,
)
from modeling_deepseekmoe.support.folders import check_destination, local_folder, unfinished_folder

LAYOUTS = ("per-expert", "peft")


def export_adapter(adapter: str | Path, destination: str | Path, layout: str, num_experts: int | None = None) -> int:
    """Write an adapter in another layout.

    Args:
        adapter: folder or hub id of a LoRA adapter, in either layout.
        destination: folder to write. It must not exist or be empty.
        layout: `"per-expert"` or `"peft"`.
        num_experts: for `"peft"`, the number of experts in every layer of the model. Experts without an adapter then
            get one of zeros. Without this number, every expert must have an adapter.

    Returns:
        The number of tensors written.

    Raises:
        ValueError: if the layout is unknown, if the adapter has no routed experts, or if the layout cannot express it:
            experts of one projection with different ranks or scalings, or experts of a layer that are missing.
        OSError: if a file is missing.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not allowed: it must be 'per-expert' or 'peft'.")
    if num_experts is not None and layout != "peft":
        raise ValueError(f"num_experts={num_experts} is not allowed with layout={layout!r}: it is for 'peft'.")
    destination = check_destination(destination)
    content = read_adapter(local_folder(adapter))
    if not any(is_stack(name) or split_expert(name.removesuffix(".weight")) for name in content.updates):
        raise ValueError(f"{adapter} is not allowed: it has no adapter on routed experts to write in another layout.")
    per_expert = layout == "per-expert"
    updates = _to_per_expert(content.updates) if per_expert else _to_peft(content.updates, num_experts)
    config = _config(content, updates, layout)
    tensors = {name: tensor.contiguous() for name, tensor in content.others.items()}
    for target, update in updates.items():
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in _tensors(target, update, updates)}
    with unfinished_folder(destination) as unfinished:
        save_file(tensors, unfinished / WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(unfinished))
    return len(tensors)


def _to_per_expert(updates: dict[str, LowRank]) -> dict[str, LowRank]:
    result: dict[str, LowRank] = {}
    for target, update in updates.items():
        result |= per_expert_parts(target, update) if is_stack(target) else {target: update}
    return result


def _to_peft(updates: dict[str, LowRank], num_experts: int | None) -> dict[str, LowRank]:
    result: dict[str, LowRank] = {}
    layers: dict[str, dict[str, dict[int, LowRank]]] = {}
    for target, update in updates.items():
        parts = split_expert(target.removesuffix(".weight"))
        if parts is None:
            result[target] = update
        else:
            layers.setdefault(parts[0], {}).setdefault(parts[2], {})[parts[1]] = update
    ids = [expert for projections in layers.values() for pairs in projections.values() for expert in pairs]
    number = 1 + max(ids, default=-1) if num_experts is None else num_experts
    if ids and max(ids) >= number:
        raise ValueError(f"num_experts={number} is not allowed: the adapter has an expert {max(ids)}.")
    for experts, projections in layers.items():
        stacks = {
            name: _stacked(f"{experts}.*.{name}", pairs, number, fill=num_experts is not None)
            for name, pairs in projections.items()
        }
        if "down_proj" in stacks:
            result[f"{experts}.down_proj"] = stacks["down_proj"]
        if stacks.keys() & {"gate_proj", "up_proj"}:
            result[f"{experts}.gate_up_proj"] = _joined(experts, stacks)
    return result


def _stacked(name: str, pairs: dict[int, LowRank], number: int, fill: bool) -> LowRank:
    first = next(iter(pairs.values()))
    if len({(pair.rank, pair.scaling, pair.shape) for pair in pairs.values()}) > 1:
        raise ValueError(
            f"Adapter: the experts of {name} have adapters of different ranks, scalings or shapes, which the layout "
            "'peft' cannot express."
        )
    missing = sorted(set(range(number)) - set(pairs))
    if missing and not fill:
        raise ValueError(
            f"Adapter: expert {missing[0]} of {name} is missing. If it is to have none, give num_experts, the number "
            "of experts in every layer."
        )
    zeros = torch.zeros_like(first.factor_a), torch.zeros_like(first.factor_b)
    ordered = [(pairs[e].factor_a, pairs[e].factor_b) if e in pairs else zeros for e in range(number)]
    factors_a, factors_b = zip(*ordered, strict=True)
    return replace(first, factor_a=torch.stack(factors_a), factor_b=torch.stack(factors_b))


def _joined(experts: str, stacks: dict[str, LowRank]) -> LowRank:
    if not {"gate_proj", "up_proj"} <= stacks.keys():
        only = stacks.get("gate_proj") or stacks["up_proj"]
        empty = replace(only, factor_b=torch.zeros_like(only.factor_b))
        stacks = {"gate_proj": empty, "up_proj": empty, **stacks}
    gate, up = stacks["gate_proj"], stacks["up_proj"]
    if gate.scaling != up.scaling or gate.shape != up.shape:
        raise ValueError(f"Adapter: gate_proj and up_proj of {experts} differ in scaling or shape: they do not join.")
    if gate.factor_a.shape == up.factor_a.shape and torch.equal(gate.factor_a, up.factor_a):
        return replace(gate, factor_b=torch.cat([gate.factor_b, up.factor_b], dim=1))
    blocks = [torch.block_diag(*pair) for pair in zip(gate.factor_b, up.factor_b, strict=True)]
    return replace(gate, factor_a=torch.cat([gate.factor_a, up.factor_a], dim=1), factor_b=torch.stack(blocks))


def _tensors(target: str, update: LowRank, updates: Iterable[str]) -> list[tuple[str, torch.Tensor]]:
    factor_a, factor_b, module = update.factor_a, update.factor_b, target.removesuffix(".weight")
    if is_stack(target):
        module, stack = target.rsplit(".", 1)
        if stack == "gate_up_proj" and f"{module}.down_proj" in updates:
            module += ".base_layer"
        factor_a, factor_b = factor_a.flatten(0, 1), factor_b.permute(1, 2, 0).flatten(1)
    factors = (("A", factor_a), ("B", factor_b))
    return [(f"{module}.lora_{name}.weight", factor.clone().contiguous()) for name, factor in factors]


def _config(content: StoredAdapter, updates: dict[str, LowRank], layout: str) -> LoraConfig:
    """Make the config of the new layout.

    Targets name exactly what there is. Patterns hold the ranks and alphas that differ from those of the whole adapter.
    """
    config, modules, parameters = content.config, [], []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target, update in updates.items():
        module = target.removesuffix(".weight")
        parts = split_expert(module)
        if is_stack(target):
            parameters.append(target)
        elif layout == "peft" and module.endswith(PROJECTIONS):
            parameters.append(target)  # as a module PEFT would take it for the routed experts
        elif parts is None:
            modules.append(module)
        key = re.escape(target if target in parameters else module)
        if parts is not None:
            key = rf"{re.escape(parts[0])}(\.\d+)?\.{parts[2]}"
        alpha = update.scaling * (math.sqrt(update.rank) if config.use_rslora else update.rank)
        own = (update.rank, alpha)
        if own != (ranks.setdefault(key, update.rank), alphas.setdefault(key, alpha)):
            raise ValueError(f"Adapter: {target} has another rank or scaling than its neighbours: {layout!r} has one.")
    return replace(
        config,
        peft_version=None,  # the installed one: what is written is its layout
        rank_pattern={key: rank for key, rank in ranks.items() if rank != config.r},
        alpha_pattern={key: alpha for key, alpha in alphas.items() if not math.isclose(alpha, config.lora_alpha)},
        target_modules=_module_targets(modules, updates),
        target_parameters=parameters or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _module_targets(modules: list[str], updates: Iterable[str]) -> list[str] | str:
    """Return a list of names or, if there are experts, a regular expression.

    The expression also matches the names without the experts' numbers. By these PEFT recognises old per-expert
    adapters of models that now stack their experts.
    """
    names = [name.removesuffix(".weight") for name in updates]
    experts = [parts for parts in map(split_expert, names) if parts is not None]
    if not experts:
        return modules
    projections = "|".join(sorted({projection for _, _, projection in experts}))
    blocks = _by_layers(dict.fromkeys(name for name, _, _ in experts))
    patterns = [rf"{block}(\.\d+)?\.({projections})" for block in blocks]
    return rf"(.*\.)?({'|'.join([*patterns, *_by_layers(modules)])})"


def _by_layers(names: Iterable[str]) -> list[str]:
    """Make regular expressions that match these names and no others. Names that differ only in the layer share one."""
    layers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = LAYER.search(name)
        start, end = match.span(1) if match else (len(name), len(name))
        layers.setdefault((name[:start], name[end:]), []).append(name[start:end])
    return [
        re.escape(before) + (f"({'|'.join(numbers)})" if any(numbers) else "") + re.escape(after)
        for (before, after), numbers in layers.items()
    ]


__all__ = ["LAYOUTS", "export_adapter"]
