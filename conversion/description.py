# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Describe a checkpoint of the family: read its config and headers, and find out which tensor is what."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling_deepseekmoe.checkpoint_layout import BIAS_NAME, layer_of
from modeling_deepseekmoe.configuration import config_from_dict
from modeling_deepseekmoe.configuration_deepseekmoe import DeepseekMoeConfig, without_model_classes
from modeling_deepseekmoe.conversion.block_fp8 import BLOCK, FP8, SCALE_SUFFIX, Block, scale_shape
from modeling_deepseekmoe.conversion.checkpoint import (
    CONFIG_NAME,
    Checkpoint,
    StoredTensor,
    TensorSource,
    check_inside,
    parse_json,
)
from modeling_deepseekmoe.conversion.locating import Located, Matrix, locate
from modeling_deepseekmoe.conversion.matrix_formats import NF4_STATE, layout_of
from modeling_deepseekmoe.conversion.tensor_table import Entry, entries, head_of, stack_shape, stacks
from modeling_deepseekmoe.experts_quantized import FORMATS

QUANT_METHOD = "stacked_experts"  # of the quantiser that loads folders with routed experts in one of the `FORMATS`
# What is counted or listed as soon as a config is made; the largest models have a hundredth of it.
_MOST = {"num_hidden_layers": 10**4, "num_nextn_predict_layers": 10**4, "num_labels": 10**6}
_LARGEST_BLOCK = 2**16
# What transformers raises for values that no config should have.
_ODD = (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class Description:
    """A checkpoint of the family, with its tensors matched to its config.

    Attributes:
        source: its tensors.
        raw: its `config.json`.
        config: the same, as this package's class.
        wanted: all tensors that the config asks for.
        located: where they lie.
        block: rows and columns of its FP8 blocks.
    """

    source: TensorSource
    raw: dict[str, Any]
    config: DeepseekMoeConfig
    wanted: dict[str, Entry]
    located: Located
    block: Block

    @property
    def layout(self) -> str:
        """Layout of the experts, as stored."""
        stacked = any(entry.stack in self.source.tensors for entry in self.wanted.values())
        return "stacked" if stacked else "per-expert"

    @property
    def has_mtp(self) -> bool:
        """Whether there are multi-token-prediction layers."""
        return any(self.wanted[name].mtp_layer is not None for name in self.located.matrices)

    @property
    def experts(self) -> int:
        """E, the number of routed experts."""
        return self.config.n_routed_experts or 0

    def matrix(self, name: str) -> Matrix | None:
        """Find where an official tensor lies. For a tied head, this is the embedding."""
        found = self.located.matrices.get(name)
        if found is None and name == "lm_head.weight" and self.config.tie_word_embeddings:
            return self.located.matrices["model.embed_tokens.weight"]
        return found


def describe(folder: str | Path) -> Description:
    """Read the config, the index and all headers of a checkpoint of the family.

    Raises:
        ValueError: if the config is not allowed, if files are damaged, or if the tensors do not fit the config.
        OSError: if a file is missing.
    """
    folder = Path(folder)
    raw = read_config(folder)
    return understand(Checkpoint(folder), raw, as_config(raw, folder))


def read_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a folder.

    Raises:
        ValueError: if it is not readable, or a link to another place.
        OSError: if there is none.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} lacks {CONFIG_NAME}.")
    check_inside(path, folder)
    return parse_json(path)


def as_config(raw: dict[str, Any], folder: Path | None = None) -> DeepseekMoeConfig:
    """Make a config of this package from a `config.json`. Raise ValueError, naming the file, if it cannot be read."""
    try:
        if isinstance(raw, dict):
            _check_raw(raw)
        with without_model_classes():
            return config_from_dict(raw)
    except (ValueError, *_ODD) as error:
        raise ValueError(f"{folder / CONFIG_NAME if folder else CONFIG_NAME}: {error}") from error


def _check_raw(raw: dict[str, Any]) -> None:
    """Raise ValueError if a field would do harm when a config is made of it."""
    for name in raw:
        if callable(getattr(DeepseekMoeConfig, name, None)):
            raise ValueError(f"{name!r} is not allowed as a field.")
    architectures = raw.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise ValueError(f"architectures={architectures!r} is not allowed: it must be a list of names.")
    for name in architectures or ():
        head_of(name)
    fp8_block(raw)
    for name, most in _MOST.items():
        if raw.get(name) is not None and not (type(raw[name]) is int and 0 <= raw[name] <= most):
            raise ValueError(f"{name}={raw[name]!r} is not allowed: it must be an integer from 0 to {most}.")


def understand(
    source: TensorSource, raw: dict[str, Any], config: DeepseekMoeConfig, wanted: dict[str, Entry] | None = None
) -> Description:
    """Match tensors with a config, of which `raw` is the file's content. Raise ValueError if they do not fit."""
    if wanted is None:
        with_mtp = _check_sizes(config, source)
        wanted = entries(config, mtp=with_mtp)
    block = fp8_block(raw)
    located = locate(wanted, source.tensors, config.n_routed_experts or 0, block)
    return Description(source, raw, config, wanted, located, block)


def _check_sizes(config: DeepseekMoeConfig, source: TensorSource) -> bool:
    """Check that config and tensors agree on the numbers of layers and experts, before all tensors are named.

    Return whether there are multi-token-prediction layers.
    """
    layers = 1 + max((layer for name in source.tensors if (layer := layer_of(name)) is not None), default=-1)
    if config.num_hidden_layers > layers:
        raise ValueError(
            f"{CONFIG_NAME}: num_hidden_layers={config.num_hidden_layers} is not allowed: the checkpoint has tensors "
            f"of {layers} layers."
        )
    with_mtp = layers > config.num_hidden_layers
    if with_mtp and config.num_nextn_predict_layers > layers - config.num_hidden_layers:
        raise ValueError(
            f"{CONFIG_NAME}: num_nextn_predict_layers={config.num_nextn_predict_layers} is not allowed: the "
            f"checkpoint has tensors of {layers - config.num_hidden_layers} layers beyond num_hidden_layers."
        )
    gates = [tensor for name, tensor in source.tensors.items() if name.endswith("mlp.gate.weight")]
    experts = config.n_routed_experts or 0
    if experts > 1 and config.moe_layers and (not gates or gates[0].shape[:1] != (experts,)):
        found = f"{gates[0].name} has the shape {gates[0].shape}" if gates else "the checkpoint has no mlp.gate.weight"
        raise ValueError(f"{CONFIG_NAME}: n_routed_experts={experts} is not allowed: {found}.")
    return with_mtp


def fp8_block(raw: dict[str, Any]) -> Block:
    """Read the rows and columns of a checkpoint's FP8 blocks from its `config.json`.

    Raise ValueError if the quantisation is another one.
    """
    quantization = raw.get("quantization_config")
    if quantization is None:
        return BLOCK
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method == QUANT_METHOD:
        if quantization.get("format") not in FORMATS:
            raise ValueError(
                f"format={quantization.get('format')!r} is not allowed in quantization_config: it must be one of "
                f"{', '.join(FORMATS)}."
            )
        return BLOCK
    if method != "fp8":
        raise ValueError(
            f"quant_method={method!r} is not allowed: only 'fp8' (blocks, as DeepSeek-V3) and {QUANT_METHOD!r} "
            f"(routed experts in {', '.join(FORMATS)}) are read."
        )
    block = quantization.get("weight_block_size", BLOCK)
    if (
        not isinstance(block, (list, tuple))
        or len(block) != 2
        or not all(type(number) is int and 0 < number <= _LARGEST_BLOCK for number in block)
    ):
        raise ValueError(
            f"weight_block_size={block!r} is not allowed: it must be two integers from 1 to {_LARGEST_BLOCK}."
        )
    return block[0], block[1]


def planned(raw: dict[str, Any], config: DeepseekMoeConfig, weight_map: dict[str, str] | None) -> Description:
    """Describe the checkpoint of a config without its values.

    It has the tensors of an index. Without an index, it has all tensors but those of multi-token-prediction layers.

    Raises:
        ValueError: listing the tensors of the index that the config has no place for, or that are missing.
    """
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    wanted = entries(config)
    if weight_map is None:
        names = [name for name, entry in wanted.items() if entry.mtp_layer is None]
    else:
        names = list(weight_map)
    shapes = {name: entry.shape for name, entry in wanted.items()}
    block, experts = fp8_block(raw), config.n_routed_experts or 0
    scales: dict[str, tuple[int, ...]] = {
        name: scale_shape((shape[0], shape[1]), block) for name, shape in shapes.items() if len(shape) == 2
    }
    if any(name not in shapes for name in names):
        for stack, members in stacks(wanted).items():
            shapes[stack] = stack_shape(members, experts)
            rows, columns = scales[members[0].name]
            scales[stack] = (experts, len(members) // experts * rows, columns)
    tensors, beside = [], _packed_tensors(wanted, weight_map or {}, raw)
    shape: tuple[int, ...]
    for name in names:
        if name in beside:
            tensors.append(beside[name])
            continue
        plain = name.removesuffix(SCALE_SUFFIX)
        if plain != name and plain in scales and weight_map and plain in weight_map:
            shape, own = scales[plain], torch.float32
        else:
            quantized = weight_map is not None and name + SCALE_SUFFIX in weight_map
            own = torch.float32 if name.endswith(BIAS_NAME) else FP8 if quantized else dtype
            shape = shapes.get(name, ())
        tensors.append(StoredTensor(name, own, shape))
    return understand(TensorSource(tensors), raw, config, wanted)


def _packed_tensors(
    wanted: dict[str, Entry], weight_map: dict[str, str], raw: dict[str, Any]
) -> dict[str, StoredTensor]:
    """Describe the tensors of all matrices in four bits that an index names."""
    found = {}
    scaled = "mxfp4" if (raw.get("quantization_config") or {}).get("format") == "mxfp4" else None
    for name, entry in wanted.items():
        experts = entry.stack is not None and f"{name}{SCALE_SUFFIX}" in weight_map
        kind = "nf4" if f"{name}{NF4_STATE}" in weight_map else scaled if experts else None
        if kind is not None and len(entry.shape) == 2:
            nested = f"{name}.nested_absmax" in weight_map
            for suffix, one in layout_of(kind, (entry.shape[0], entry.shape[1]), double_quantisation=nested).items():
                found[name + suffix] = StoredTensor(name + suffix, one.dtype, tuple(one.shape))
    return found


__all__ = ["QUANT_METHOD", "Description", "as_config", "describe", "fp8_block", "planned", "read_config", "understand"]
