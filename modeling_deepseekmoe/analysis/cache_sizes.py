# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What the cache of a model keeps of one token: by a formula for this package's models, for others measured."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..configuration_deepseekmoe import DeepseekMoeConfig
from .counted_model import CountedModel
from .meta_models import reason_of

# The third is so much longer that a cache shows it which keeps something of every 128 tokens (DeepSeek-V4).
LENGTHS = (1, 2, 130)


class UnknownCacheError(ValueError):
    """It cannot be told what the cache keeps of one token."""


def kv_cache_elements_per_token(counted: CountedModel) -> int:
    """Count the elements that the cache keeps of one token, in all layers.

    A layer with a sliding window counts as long as the window is not full. What keeps its size counts nothing.

    Raises:
        UnknownCacheError: if the model cannot be run on the meta device, or if its cache does not grow evenly.
    """
    config = counted.model.config
    if isinstance(config, DeepseekMoeConfig):  # keys and values, or MLA's latent and rotary key
        if config.attention_type == "mla":
            return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
        return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    try:
        first, second, long = (_cached(counted, length) for length in LENGTHS)
    except UnknownCacheError:
        raise
    except Exception as error:  # whatever the model of a family raises on the meta device
        raise UnknownCacheError(f"a run on the meta device fails: {reason_of(error)}") from error
    for place, elements in long.items():
        before = second.get(place, 0)
        growth = before - first.get(place, 0)
        if elements - before > (LENGTHS[2] - LENGTHS[1]) * growth:
            raise UnknownCacheError(f"its cache does not grow by the same with every token ({place})")
    return sum(second.values()) - sum(first.values())


@torch.no_grad()
def _cached(counted: CountedModel, length: int) -> dict[str, int]:
    """Run the language model on tokens. Return the elements of every tensor of its cache, by where it lies there."""
    model, verbosity = counted.language_model, logging.get_verbosity()
    replaced: list[nn.Module] = [layer.experts for layer in counted.layers]
    logging.set_verbosity_error()  # what it says of kernels and speed is not about the user's run
    for experts in replaced:  # they look at ids, and what they compute has this shape
        vars(experts)["forward"] = lambda hidden_states, *_, **__: hidden_states
    try:
        ids = torch.zeros((1, length), dtype=torch.long, device="meta")
        outputs = model(input_ids=ids, use_cache=True)
    finally:
        logging.set_verbosity(verbosity)
        for experts in replaced:
            del vars(experts)["forward"]
    cache = next((one for name in ("past_key_values", "cache_params") if (one := outputs.get(name)) is not None), None)
    if cache is None:
        raise UnknownCacheError(f"{type(model).__name__} returns no cache")
    return {place: tensor.numel() for place, tensor in _tensors_in(cache, "cache", set())}


def _tensors_in(value: Any, place: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _tensors_in(one, f"{place}.{key}", seen)
    elif isinstance(value, list | tuple):
        for idx, one in enumerate(value):
            yield from _tensors_in(one, f"{place}.{idx}", seen)
    elif type(value).__module__.startswith("transformers.") and not isinstance(value, nn.Module):
        yield from _tensors_in(vars(value), place, seen)


__all__ = ["UnknownCacheError", "kv_cache_elements_per_token"]
