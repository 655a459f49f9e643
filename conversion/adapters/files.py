# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Read LoRA adapters from disk: find out what every tensor of the file does to which weight of the base.

Two layouts are read. PEFT's own for stacked experts (`target_parameters`) nests one layer for each adapted parameter:
`experts.base_layer.lora_A.weight` inside and `experts.lora_A.weight` outside. There `lora_A` is expert-major (E * r,
in) and `lora_B` rank-major (out, r * E). PEFT before 0.19 wrote (E * r, out) and (in, r * E), which is read too. The
per-expert layout has one pair for every linear map, `experts.3.gate_proj.lora_A.weight` (r, in) and `lora_B` (out, r).
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig

from modeling_deepseekmoe.checkpoint_layout import STACKS
from modeling_deepseekmoe.lora.layer import rank_and_alpha
from modeling_deepseekmoe.lora.options import OTHER_COMPUTATIONS
from modeling_deepseekmoe.support.folders import read_tensors

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_UNSUPPORTED = (*OTHER_COMPUTATIONS, "layer_replication")
# Other ways to begin change the base's weights, so that the saved factors are not what is added to them.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_FACTOR = re.compile(r"^(?P<module>.+?)(?P<nested>(?:\.base_layer)*)\.lora_(?P<factor>[AB])\.weight$")
_TOKENS = ".token_adapter.trainable_tokens_delta"
_EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.(?P<id>\d+)\.(?P<projection>gate_proj|up_proj|down_proj)$")


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one weight: `scaling * factor_b @ factor_a`.

    Attributes:
        factor_a: (r, in), or (E, r, in) for a stack.
        factor_b: (out, r), or (E, out, r) for a stack.
        scaling: `alpha / r`, or `alpha / sqrt(r)`.
        sources: names of the tensors in the adapter's file.
    """

    factor_a: torch.Tensor
    factor_b: torch.Tensor
    scaling: float
    sources: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The rank, r."""
        return self.factor_a.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it belongs to."""
        return (*self.factor_b.shape[:-1], self.factor_a.shape[-1])

    def part(self, expert: int, rows: slice = slice(None)) -> "LowRank":
        """Take the part of one expert from a stack, or only some rows of it (one half of gate_up)."""
        return LowRank(self.factor_a[expert], self.factor_b[expert, rows], self.scaling, self.sources)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter folder.

    Attributes:
        config: its LoraConfig.
        updates: what the adapter adds to a weight, by the weight's name in the base
            (`model.layers.1.mlp.experts.gate_up_proj` or `...q_proj.weight`).
        replacements: weights that replace the base's, by name: those that were trained as whole copies, and those that
            PEFT saves beside an adapted head or embedding, resized or not.
        rows: rows of an embedding that were trained (`trainable_token_indices`), by name: their numbers and values.
        sources: names of the tensors in the adapter's file, by the names of the replacements and rows.
        others: all tensors of the file but the factors, under the names that they have there.
    """

    config: LoraConfig
    updates: dict[str, LowRank]
    replacements: dict[str, torch.Tensor]
    rows: dict[str, tuple[list[int], torch.Tensor]]
    sources: dict[str, str]
    others: dict[str, torch.Tensor]


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Read an adapter folder and find out what every tensor means.

    Raises:
        ValueError: if it is no LoRA adapter, or if a tensor is not understood. The message names the first such
            tensor.
        OSError: if a file is missing.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: it is no adapter folder.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{folder / CONFIG_NAME} is not allowed as a config of an adapter: {error}") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder}: peft_type {config.peft_type} is not allowed: it must be LORA.")
    for field in _UNSUPPORTED:
        if getattr(config, field, None):
            raise ValueError(f"{folder}: {field}={getattr(config, field)!r} is not allowed: only plain LoRA is.")
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise ValueError(
            f"{folder}: init_lora_weights={config.init_lora_weights!r} is not allowed: such an adapter belongs to "
            "weights that it has changed itself. Let PEFT convert it into plain LoRA when it is saved."
        )
    tensors = read_tensors(folder / WEIGHTS_NAME)
    factors: dict[tuple[str, int], dict[str, str]] = {}
    others: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix(PREFIX)
        match = _FACTOR.match(plain)
        if match:
            key = (match["module"], match["nested"].count(".base_layer"))
            factors.setdefault(key, {})[match["factor"]] = name
        elif "lora_" in plain:
            raise ValueError(f"Adapter tensor {name} is not supported: only lora_A and lora_B of weights are.")
        else:
            others[name] = tensor
    replacements, rows, sources = _trained_copies(others, config)
    updates = {}
    raw = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))  # PEFT fills in its own version
    transposed = _are_transposed(factors, tensors, config, raw.get("peft_version"))
    for (module, depth), names in factors.items():
        if names.keys() != {"A", "B"}:
            raise ValueError(
                f"Adapter tensor {next(iter(names.values()))} has no partner: lora_A and lora_B go together."
            )
        target = _target_of(module, depth, {level for name, level in factors if name == module}, config)
        pair = tensors[names["A"]], tensors[names["B"]]
        updates[target] = _low_rank(target, *pair, names, config, transposed and is_stack(target))
    return StoredAdapter(config, updates, replacements, rows, sources, others)


def _trained_copies(
    others: dict[str, torch.Tensor], config: LoraConfig
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[list[int], torch.Tensor]], dict[str, str]]:
    """Return the replacements, rows and sources of a [`StoredAdapter`].

    PEFT saves embeddings whose size has changed under the names that its wrappers give them: the trained copy (twice),
    the original, the rows.
    """
    replacements: dict[str, torch.Tensor] = {}
    rows: dict[str, tuple[list[int], torch.Tensor]] = {}
    sources: dict[str, str] = {}
    for name, tensor in others.items():
        plain = name.removeprefix(PREFIX)
        if plain.endswith(_TOKENS):
            module = plain.removesuffix(_TOKENS)
            indices = config.trainable_token_indices or []
            if isinstance(indices, dict):
                indices = next((own for key, own in indices.items() if f".{module}".endswith(f".{key}")), [])
            if len(indices) != len(tensor):
                raise ValueError(
                    f"Adapter tensor {name} has {len(tensor)} rows: its config names {len(indices)} tokens."
                )
            rows[f"{module}.weight"], sources[f"{module}.weight"] = (list(indices), tensor), name
            continue
        if ".original_module." in plain:
            continue  # what the trained copy beside it replaces
        target = plain.replace(".base_layer", "").replace(".modules_to_save", "").replace(".token_adapter", "")
        if target in replacements and not torch.equal(replacements[target], tensor):
            raise ValueError(f"Adapter tensors {sources[target]} and {name} are for the same weight, and differ.")
        replacements[target] = tensor
        sources.setdefault(target, name)
    return replacements, rows, sources


def _are_transposed(
    factors: dict[tuple[str, int], dict[str, str]],
    tensors: dict[str, torch.Tensor],
    config: LoraConfig,
    version: str | None,
) -> bool:
    """Tell whether the factors of stacks are as PEFT before 0.19 wrote them.

    It took a stack's second axis for the input: `lora_A` (E * r, 2I) and `lora_B` (D, r * E) of gate_up. If both
    projections are there, the shapes tell. Else the version in the file tells; PEFT before 0.18 wrote none.
    """
    shapes: dict[str, dict[str, tuple[int, int]]] = {}
    for (module, depth), names in factors.items():
        if module.endswith(".experts") and names.keys() == {"A", "B"}:
            levels = {level for name, level in factors if name == module}
            stack = _target_of(module, depth, levels, config).rpartition(".")[2]
            shapes.setdefault(module, {})[stack] = (tensors[names["A"]].shape[-1], tensors[names["B"]].shape[0])
    for found in shapes.values():
        if found.keys() == set(STACKS):
            (gate_up_a, gate_up_b), (down_a, down_b) = found["gate_up_proj"], found["down_proj"]
            now, before = (down_b, 2 * down_a), (2 * down_b, down_a)
            if now != before and (gate_up_a, gate_up_b) in (now, before):
                return (gate_up_a, gate_up_b) == before
    numbers = re.match(r"0\.(\d+)\.", version or "0.17.")
    return bool(shapes) and numbers is not None and int(numbers[1]) < 19


def _target_of(module: str, depth: int, depths: Iterable[int], config: LoraConfig) -> str:
    """Find the weight that a pair of factors belongs to."""
    if module.endswith(".experts"):
        named = config.target_parameters or ()
        stacks = [stack for stack in STACKS if any(f".{module}.{stack}".endswith(f".{name}") for name in named)]
        nesting = stacks[::-1]  # PEFT wraps gate_up_proj first, so that down_proj is the outer layer
        if set(depths) != set(range(len(nesting))):
            raise ValueError(
                f"Adapter: {module} has factors at {len(set(depths))} levels, and target_parameters names {stacks}."
            )
        return f"{module}.{nesting[depth]}"
    if depth:
        raise ValueError(f"Adapter: a parameter of {module} under base_layer is not supported.")
    return f"{module}.weight"


def _low_rank(
    target: str,
    weight_a: torch.Tensor,
    weight_b: torch.Tensor,
    names: dict[str, str],
    config: LoraConfig,
    transposed: bool,
) -> LowRank:
    as_parameter = any(f".{target}".endswith(f".{name}") for name in config.target_parameters or ())
    key = target if as_parameter else target.removesuffix(".weight")  # what PEFT matches the patterns with
    rank, alpha = rank_and_alpha(config, key)
    if rank < 1:
        raise ValueError(f"Adapter: r={rank} of {key} is not allowed: it must be at least 1.")
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    rows, columns = weight_a.shape[0], weight_b.shape[-1]
    if (
        weight_a.ndim != 2
        or weight_b.ndim != 2
        or rows != columns
        or rows % rank
        or (not is_stack(target) and rows != rank)
    ):
        raise ValueError(
            f"Adapter tensor {names['A']} of shape {tuple(weight_a.shape)} is not allowed beside {names['B']} of "
            f"shape {tuple(weight_b.shape)} and rank {rank}."
        )
    if is_stack(target):
        weight_a = weight_a.unflatten(0, (-1, rank))
        weight_b = weight_b.unflatten(1, (rank, -1)).permute(2, 0, 1)
        if transposed:
            weight_a, weight_b = weight_b.transpose(1, 2), weight_a.transpose(1, 2)
    return LowRank(weight_a, weight_b, scaling, tuple(names.values()))


def per_expert_parts(target: str, update: LowRank) -> dict[str, LowRank]:
    """Divide a stack's update into parts, by the official per-expert names of their weights."""
    experts, stack = target.rsplit(".", 1)
    rows = update.factor_b.shape[1] // len(STACKS[stack])
    return {
        f"{experts}.{expert}.{projection}.weight": update.part(expert, slice(half * rows, (half + 1) * rows))
        for expert in range(len(update.factor_b))
        for half, projection in enumerate(STACKS[stack])
    }


def is_stack(target: str) -> bool:
    """Tell whether a name is that of a stacked parameter."""
    return target.endswith(tuple(f".experts.{stack}" for stack in STACKS))


def split_expert(name: str) -> tuple[str, int, str] | None:
    """Split `...experts.3.gate_proj` into its parts; return `None` for another name."""
    match = _EXPERT.match(name)
    return None if match is None else (match["experts"], int(match["id"]), match["projection"])


__all__ = ["LowRank", "StoredAdapter", "is_stack", "per_expert_parts", "read_adapter", "split_expert"]
