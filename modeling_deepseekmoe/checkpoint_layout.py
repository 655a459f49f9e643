# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The official per-expert layout of checkpoints: its mapping to stacked parameters, and the checks of a checkpoint.

On disk every routed expert has three tensors, `...mlp.experts.N.{gate,up,down}_proj.weight`. In memory they are two
stacked parameters, `...mlp.experts.gate_up_proj` (E, 2I, D) and `...mlp.experts.down_proj` (E, D, I).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import logging

from .configuration_deepseekmoe import DeepseekMoeConfig
from .experts_quantized import FORMAT_ATTRIBUTE
from .torch_support import decoder_of, without_wrappers

logger = logging.get_logger(__name__)

MODEL_TYPES = ("deepseekmoe", "deepseek", "deepseek_v2", "deepseek_v3")
# Every stacked parameter, and the official projections that are its rows, one below the other.
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_EXPERT_NAME = re.compile(r"^(layers\.(\d+)\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
_GATE_WEIGHT = ".mlp.gate.weight"
# What stands behind the name of a quantised matrix in that of its scales: of bitsandbytes, and of DeepSeek-V3 and V4.
OF_QUANTISED = (".absmax", "_scale_inv")
LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.")
# The balancing bias of a gate, a name that every generation and its relatives share.
BIAS_NAME = "e_score_correction_bias"

Shapes = dict[str, tuple[int, ...]]


def layer_of(name: str) -> int | None:
    """Return the index of the decoder layer that a module or tensor of this name lies in, or `None` outside of
    them."""
    match = LAYER.search(f"{name}.")
    return None if match is None else int(match[1])


def register_checkpoint_layout() -> None:
    """Tell transformers how per-expert tensors become stacked parameters, and back when saving.

    The mapping of `deepseek_v2` and `deepseek_v3` equals the one that transformers holds for its own classes. It is
    registered again, because transformers applies a mapping to classes from outside only where they registered it.
    """
    # Slow to import, and the models that call this have loaded it anyway.
    from .transformers_support import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        register_checkpoint_conversion_mapping,
    )

    for model_type in MODEL_TYPES:
        stacking = [
            WeightConverter(
                source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
                target_patterns="mlp.experts.gate_up_proj",
                operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(
                source_patterns="mlp.experts.*.down_proj.weight",
                target_patterns="mlp.experts.down_proj",
                operations=[MergeModulelist(dim=0)],
            ),
        ]
        register_checkpoint_conversion_mapping(model_type, stacking, overwrite=True)


@dataclass(frozen=True)
class Stored:
    """The shapes of a checkpoint's or state dict's tensors, and the dtypes of its gates, before any tensor is read.

    Attributes:
        shapes: shapes of all tensors, by name.
        gates (`dict[str, torch.dtype]`): dtypes of the gates' weights, by name without `model.`.
    """

    shapes: Shapes = field(default_factory=dict)
    gates: dict[str, torch.dtype] = field(default_factory=dict)

    @classmethod
    def of_files(cls, files: Iterable[str]) -> "Stored":
        """Read the shapes and dtypes from checkpoint files. No weight is read (a pickled one is mapped)."""
        stored = cls()
        for file in files:
            if not str(file).endswith(".safetensors"):
                part = cls.of_state_dict(torch.load(file, map_location="meta", weights_only=True, mmap=True))
                stored.shapes.update(part.shapes)
                stored.gates.update(part.gates)
                continue
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                    tensor = handle.get_slice(name)
                    stored.shapes[name] = tuple(tensor.get_shape())
                    if name.endswith(_GATE_WEIGHT):
                        stored.gates[name.removeprefix("model.")] = tensor[:0].dtype
        return stored

    @classmethod
    def of_state_dict(cls, state_dict: Mapping[str, torch.Tensor]) -> "Stored":
        """Collect the shapes and dtypes of a state dict."""
        gates = {name: tensor for name, tensor in state_dict.items() if name.endswith(_GATE_WEIGHT)}
        dtypes = {name.removeprefix("model."): tensor.dtype for name, tensor in gates.items()}
        return cls({name: tuple(tensor.shape) for name, tensor in state_dict.items()}, dtypes)


def mtp_layers(config: DeepseekMoeConfig) -> range:
    """Return the indices of the multi-token-prediction layers in a checkpoint: they follow the decoder layers."""
    return range(config.num_hidden_layers, config.num_hidden_layers + (config.num_nextn_predict_layers or 0))


def check_number_of_layers(decoder: Any) -> None:
    """Check before a training step that no layer is left out, and warn once of what saving will ask for.

    Raises:
        ValueError: if there are more layers than the config has: the last of them would not be trained.
    """
    there, wanted = len(decoder.decoder_layers), decoder.config.num_hidden_layers
    problem = f"num_hidden_layers={wanted} is not that of this model, which has {there} layers"
    advice = f"set model.config.num_hidden_layers = {there}"
    if there > wanted:
        raise ValueError(f"{problem}, of which the last would not be trained: {advice}.")
    if there < wanted:
        logger.warning_once(f"{problem}: {advice} before it is saved.")


@contextmanager
def config_of_what_is_saved(model: Any) -> Iterator[None]:
    """Let a model's config say what the files will hold, while they are saved: the layers that the model has.

    Raises:
        ValueError: if the model's layers are not those of its config: nobody could load the files.
    """
    config = model.config
    decoder = decoder_of(model)
    number_of_mtp = 0 if decoder is None else len(decoder.layers) - len(decoder.decoder_layers)
    if decoder is not None and not getattr(model, "peft_config", None):  # of which the adapter alone is saved
        number, by_config = len(decoder.decoder_layers), config.moe_layers
        there = tuple(idx for idx in decoder.moe_layers if idx < number)
        if number != config.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers={config.num_hidden_layers} is not allowed for this model, which has "
                f"{number} layers: set model.config.num_hidden_layers = {number}."
            )
        if there != by_config:
            raise ValueError(
                f"first_k_dense_replace={config.first_k_dense_replace}, moe_layer_freq={config.moe_layer_freq} is not "
                f"allowed for this model: by these its layers with experts are {by_config}, and they are {there}."
            )
    promised, config.num_nextn_predict_layers = config.num_nextn_predict_layers, number_of_mtp
    try:
        yield
    finally:
        config.num_nextn_predict_layers = promised


def check_checkpoint(config: DeepseekMoeConfig, found: Mapping[str, tuple[int, ...]], expected: Shapes) -> None:
    """Check a checkpoint's names and shapes before anything is read from it.

    Args:
        config: the model's config.
        found: names and shapes in the checkpoint, per-expert or stacked.
        expected: names and shapes of the model's own state dict (stacked).

    Raises:
        ValueError: if an expert of a MoE layer is missing, if there is one too many, or if a tensor has the wrong
            shape. Other tensors that are missing or unknown are left to transformers' loading report.
    """
    found = {name.removeprefix("model."): shape for name, shape in found.items()}
    expected = {name.removeprefix("model."): shape for name, shape in expected.items()}
    _check_experts(config, found)
    for name, shape in found.items():
        wanted = _expected_shape(name, expected)
        quantised = any(name + suffix in found for suffix in OF_QUANTISED)  # the quantiser knows their shapes
        if wanted is not None and tuple(shape) != wanted and not quantised:
            raise ValueError(
                f"Checkpoint tensor {name} has shape {tuple(shape)}, which is not allowed: "
                f"the config asks for {wanted}."
            )


def _check_experts(config: DeepseekMoeConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    present: dict[int, dict[str, set[int]]] = {}
    for name in found:
        if match := _EXPERT_NAME.match(name):
            present.setdefault(int(match[2]), {}).setdefault(match[4], set()).add(int(match[3]))
    routed = set(range(config.n_routed_experts or 0))
    of_mtp = set(mtp_layers(config))
    with_experts = set(config.moe_layers) | (of_mtp if config.mtp else set())
    for layer_idx in sorted(set(present) | with_experts):
        stacks = {f"layers.{layer_idx}.mlp.experts.{stack}" for stack in STACKS}
        if (layer_idx in of_mtp and not config.mtp) or stacks <= found.keys():
            continue
        wanted = routed if layer_idx in with_experts else set()
        allowed = f"experts 0 to {len(wanted) - 1} (n_routed_experts={len(wanted)})" if wanted else "no expert"
        for projection in PROJECTIONS:
            ids = present.get(layer_idx, {}).get(projection, set())
            for problem, odd in (("is missing", wanted - ids), ("is one too many", ids - wanted)):
                if odd:
                    more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
                    raise ValueError(
                        f"Checkpoint tensor layers.{layer_idx}.mlp.experts.{min(odd)}.{projection}.weight "
                        f"{problem}{more}: layer {layer_idx} must hold {allowed}."
                    )


def _expected_shape(name: str, expected: Shapes) -> tuple[int, ...] | None:
    if name in expected:
        return expected[name]
    match = _EXPERT_NAME.match(name)
    if match is None:
        return None
    if match[4] == "down_proj":
        stacked = expected.get(f"{match[1]}.down_proj")
        return None if stacked is None else stacked[1:]
    stacked = expected.get(f"{match[1]}.gate_up_proj")
    return None if stacked is None else (stacked[1] // 2, stacked[2])


def stack_expert_tensors(
    module: nn.Module,
    state_dict: dict[str, torch.Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Let `load_state_dict` of the stacked experts read per-expert tensors too (a `load_state_dict` pre-hook).

    `from_pretrained` stacks them through transformers' mapping. Trainer resumes with a plain `load_state_dict` of the
    saved file, which has the official names. Without this hook the experts of a resumed run would be random. A shard
    that holds only some of the experts sets those and leaves the others. Quantised stacks have a hook of their own.
    """
    if hasattr(module, FORMAT_ATTRIBUTE):
        return
    intermediate = module.gate_up_proj.shape[1] // 2
    rows = {"gate_proj": slice(0, intermediate), "up_proj": slice(intermediate, None), "down_proj": slice(None)}
    for stack, projections in STACKS.items():
        names = {
            f"{prefix}{expert}.{projection}.weight": (expert, rows[projection])
            for expert in range(len(module.gate_up_proj))
            for projection in projections
        }
        found = [name for name in names if name in state_dict]
        if not found:
            continue
        missing = [name for name in names if name not in state_dict]
        parameter = getattr(module, stack).detach()
        missing_keys += missing
        if parameter.is_meta and missing:
            continue  # there are no values for the others to keep
        stacked = torch.empty_like(parameter, device="cpu") if parameter.is_meta else parameter.clone()
        for name in found:
            tensor, (expert, where) = state_dict.pop(name), names[name]
            target = stacked[expert, where]
            if tensor.shape != target.shape:
                error_msgs.append(f"size mismatch for {name}: {tuple(tensor.shape)}, not {tuple(target.shape)}.")
            else:
                target.copy_(tensor)
        state_dict[f"{prefix}{stack}"] = stacked


def refuse_single_experts(given: Iterable[str], own: Iterable[str]) -> None:
    """Raise a `ValueError` if an adapter has factors for experts, and the model takes none there.

    PEFT knows how to put the factors of single experts together for V2 and V3 alone.

    Args:
        given: names in the adapter.
        own: names of the model's parameters, those of its adapters among them.
    """

    def of_experts(names: Iterable[str]) -> list[str]:
        return [name for name in names if ".experts." in name and ".lora_" in name]

    found = of_experts(given)
    if found and not of_experts(own):
        raise ValueError(
            f"{len(found)} tensors of the adapter, {found[0]} among them, are not allowed: they belong to single "
            "experts, and this model stacks them. `deepseekmoe export-adapter ADAPTER OUT --layout peft "
            "--num-experts E` writes the same adapter for stacked experts."
        )


def report_lost_adapters(module: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """Warn of an adapter's tensors that have no place in a decoder (a `load_state_dict` pre-hook).

    PEFT would drop them without a word.

    Raises:
        ValueError: for adapters of single experts, which are stacked here.
    """
    given = [name for name in state_dict if ".lora_" in name and name.startswith(prefix)]
    if not given:
        return
    own = {prefix + without_wrappers(name) for name, _ in module.named_parameters()}
    refuse_single_experts(given, own)
    lost = [name for name in given if without_wrappers(name) not in own]
    if lost:
        logger.warning(
            f"{len(lost)} of {len(given)} tensors of the adapter have no place in the model and are NOT loaded: "
            f"{', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}. It has no such layers or targets; or the "
            "adapter is in the per-expert layout, of which PEFT leaves out the shared experts: `deepseekmoe "
            "export-adapter ADAPTER OUT --layout peft` writes all of it."
        )


__all__ = [
    "BIAS_NAME",
    "LAYER",
    "MODEL_TYPES",
    "OF_QUANTISED",
    "PROJECTIONS",
    "STACKS",
    "Stored",
    "check_checkpoint",
    "check_number_of_layers",
    "config_of_what_is_saved",
    "layer_of",
    "mtp_layers",
    "refuse_single_experts",
    "register_checkpoint_layout",
    "report_lost_adapters",
    "stack_expert_tensors",
]
