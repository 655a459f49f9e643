# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint of the family, understood: its config, its tensors, and which of them is what."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling_deepseekmoe import DeepseekMoeConfig
from modeling_deepseekmoe.configuration import config_from_dict
from modeling_deepseekmoe.registration import without_model_classes

from .block_fp8 import BLOCK, FP8, SCALE_SUFFIX, Block, scale_shape
from .checkpoint import CONFIG_NAME, Checkpoint, StoredTensor, TensorSource, check_inside, parse_json
from .tensor_table import Entry, Located, Matrix, entries, locate, stack_shape, stacks


@dataclass(frozen=True)
class Description:
    """A checkpoint of the family, understood.

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
        """Of the experts, as stored."""
        stacked = any(entry.stack in self.source.tensors for entry in self.wanted.values())
        return "stacked" if stacked else "per-expert"

    @property
    def experts(self) -> int:
        """E, the number of routed experts."""
        return self.config.n_routed_experts or 0

    def matrix(self, name: str) -> Matrix | None:
        """Where an official tensor lies; a tied head is the embedding."""
        found = self.located.matrices.get(name)
        if found is None and name == "lm_head.weight" and self.config.tie_word_embeddings:
            return self.located.matrices["model.embed_tokens.weight"]
        return found


def describe(folder: str | Path) -> Description:
    """Read the config, the index and all headers of a checkpoint of the family.

    Raises:
        ValueError: for a config that is not allowed, damaged files, and tensors that do not fit the config.
        OSError: for a file that is missing.
    """
    folder = Path(folder)
    raw = read_config(folder)
    return understand(Checkpoint(folder), raw, as_config(raw, folder))


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder.

    Raises:
        ValueError: if there is none, or it is not readable, or a link to another place.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"folder={str(folder)!r} is not allowed: it must hold a {CONFIG_NAME}.")
    check_inside(path, folder)
    return parse_json(path)


def as_config(raw: dict[str, Any], folder: Path | None = None) -> DeepseekMoeConfig:
    """A `config.json` as this package's class; raises `ValueError` for what cannot be read."""
    try:
        with without_model_classes():
            return config_from_dict(raw)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{CONFIG_NAME} of {folder} cannot be read as a config: {error}") from error


def understand(
    source: TensorSource, raw: dict[str, Any], config: DeepseekMoeConfig, wanted: dict[str, Entry] | None = None
) -> Description:
    """Match tensors with a config, which is also there as its file has it; raises `ValueError` if they do not fit."""
    wanted = entries(config) if wanted is None else wanted
    block = _fp8_block(raw)
    located = locate(wanted, source.tensors, config.n_routed_experts or 0, block)
    return Description(source, raw, config, wanted, located, block)


def _fp8_block(raw: dict[str, Any]) -> Block:
    quantization = raw.get("quantization_config")
    if quantization is None:
        return BLOCK
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "fp8":
        raise ValueError(f"quant_method={method!r} is not allowed: only 'fp8' (blocks, as DeepSeek-V3) is read.")
    block = quantization.get("weight_block_size", BLOCK)
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ValueError(f"weight_block_size={block!r} is not allowed: it must be two integers of at least 1.")
    return block[0], block[1]


def planned(raw: dict[str, Any], config: DeepseekMoeConfig, weight_map: dict[str, str] | None) -> Description:
    """The checkpoint of a config, without its values: with the tensors of an index, or all but those of
    multi-token-prediction layers.

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
    if any(name not in shapes for name in names):
        for stack, members in stacks(wanted).items():
            shapes[stack] = stack_shape(members, config.n_routed_experts)
    tensors = []
    for name in names:
        plain = name.removesuffix(SCALE_SUFFIX)
        if plain != name and plain in shapes and weight_map and plain in weight_map:
            shape, own = (*shapes[plain][:-2], *scale_shape(shapes[plain][-2:])), torch.float32
        else:
            quantized = weight_map is not None and name + SCALE_SUFFIX in weight_map
            own = torch.float32 if name.endswith("e_score_correction_bias") else FP8 if quantized else dtype
            shape = shapes.get(name, ())
        tensors.append(StoredTensor(name, own, shape))
    return understand(TensorSource(tensors), raw, config, wanted)


__all__ = ["Description", "as_config", "describe", "planned", "read_config", "understand"]
