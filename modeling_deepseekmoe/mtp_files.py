# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The multi-token-prediction layers in checkpoints: what must be there, and the copies of the embedding and the head.

The released V3 repeats the model's embedding and head in each of these layers, and vLLM reads them there. In memory
there is one of each. Files of `deepseek_v3` get the copies again when they are saved, those of `deepseekmoe` do not.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import logging

from .checkpoint_layout import layer_of, mtp_layers
from .configuration_deepseekmoe import DeepseekMoeConfig

logger = logging.get_logger(__name__)

# The copies in a layer, by the names of what they repeat.
COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
MODEL_TYPES_WITH_COPIES = ("deepseek_v3",)
_ROWS_AT_ONCE = 4096


def patterns_to_ignore(config: DeepseekMoeConfig) -> list[str]:
    """Return patterns of the names that a checkpoint may hold and the model does not."""
    names = [re.escape(name) for name in COPIES] if config.mtp else [""]
    return [rf"(^|\.)layers\.{idx}\.{name}" for idx in mtp_layers(config) for name in names]


def check_mtp_tensors(config: DeepseekMoeConfig, found: Iterable[str], own: Iterable[str]) -> None:
    """Check that a checkpoint holds the layers that were asked for, or say which it holds in vain.

    Args:
        config: the model's config.
        found: names in the checkpoint, per-expert or stacked.
        own: names of the model's own tensors. Those of experts are checked with all others (`check_checkpoint`).

    Raises:
        ValueError: if `mtp` is set and a tensor of these layers is missing.
    """
    layers = mtp_layers(config)
    there = {name.removeprefix("model.") for name in found if layer_of(name) in layers}
    if not config.mtp:
        if there:
            logger.warning(
                f"{len(there)} tensors of the multi-token-prediction layer(s) {', '.join(map(str, layers))} are in "
                "the checkpoint and are not loaded: the model predicts one token, and is saved without them "
                "(num_nextn_predict_layers=0). from_pretrained(..., mtp=True) loads them."
            )
        return
    wanted = {name.removeprefix("model.") for name in own if layer_of(name) in layers and ".experts." not in name}
    if missing := sorted(wanted - there):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(
            f"Checkpoint tensor {missing[0]} is missing{more}: mtp=True needs the multi-token-prediction layer(s) "
            f"{', '.join(map(str, layers))} (num_nextn_predict_layers={len(layers)}). Load the model without "
            "mtp=True, and give it new layers with add_mtp(model)."
        )


def tell_differing_copies(config: DeepseekMoeConfig, files: Iterable[str]) -> None:
    """Warn of copies of the embedding and the head that are not equal to them: the model's own are used.

    Args:
        config: the model's config, with `mtp`.
        files: checkpoint files. Only safetensors files are compared.
    """
    place: dict[str, str] = {}
    for file in (str(file) for file in files):
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as handle:
                place |= dict.fromkeys(handle.keys(), file)
    for idx in mtp_layers(config):
        for suffix, original in COPIES.items():
            tied = original == "lm_head.weight" and original not in place
            original = COPIES["embed_tokens.weight"] if tied else original
            copy = f"model.layers.{idx}.{suffix}"
            if copy in place and original in place and not _equal(place, copy, original):
                logger.warning(
                    f"{copy} differs from {original}, which it should repeat. It is not loaded: the "
                    "multi-token-prediction layers share the model's embedding and head."
                )


def _equal(place: Mapping[str, str], one: str, other: str) -> bool:
    """Compare two matrices in files, some rows at a time."""
    with safe_open(place[one], framework="pt") as first, safe_open(place[other], framework="pt") as second:
        left, right = first.get_slice(one), second.get_slice(other)
        if left.get_shape() != right.get_shape():
            return False
        rows = range(0, left.get_shape()[0], _ROWS_AT_ONCE)
        return all(torch.equal(left[at : at + _ROWS_AT_ONCE], right[at : at + _ROWS_AT_ONCE]) for at in rows)


def forget_copies(model: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Take the copies out of a state dict, so that a plain `load_state_dict` of a saved file finds nothing unknown.

    A `load_state_dict` pre-hook of a language model.
    """
    for idx in mtp_layers(model.config) if model.config.mtp else ():
        for suffix in COPIES:
            state_dict.pop(f"{prefix}model.layers.{idx}.{suffix}", None)


def add_copies(model: Any, state_dict: dict[str, torch.Tensor], prefix: str = "", *args: Any) -> None:
    """Add the copies of the embedding and the head to a state dict of a language model with such layers, in place.

    Also a `state_dict` post-hook.
    """
    for idx in mtp_layers(model.config):
        root = f"{prefix}model.layers.{idx}."
        if f"{root}enorm.weight" not in state_dict:  # on another rank
            continue
        for suffix, original in COPIES.items():
            whole = state_dict.get(prefix + original, state_dict.get(prefix + COPIES["embed_tokens.weight"]))
            if whole is not None:  # on another rank
                state_dict[root + suffix] = whole.clone()


@contextmanager
def copies_are_saved(model: Any, given: dict[str, torch.Tensor] | None) -> Iterator[dict[str, torch.Tensor] | None]:
    """Let the copies of the embedding and the head be saved with a model whose files have them.

    Args:
        model: a language model.
        given: the state dict to be saved, if it was made elsewhere.

    Yields:
        The state dict to be saved in place of `given`.
    """
    if not model.config.mtp or model.config.model_type not in MODEL_TYPES_WITH_COPIES:
        yield given
        return
    if given is not None:
        given = dict(given)
        add_copies(model, given)
        yield given
        return
    handle = model.register_state_dict_post_hook(add_copies)
    try:
        yield None
    finally:
        handle.remove()


__all__ = [
    "COPIES",
    "add_copies",
    "check_mtp_tensors",
    "copies_are_saved",
    "forget_copies",
    "patterns_to_ignore",
    "tell_differing_copies",
]
