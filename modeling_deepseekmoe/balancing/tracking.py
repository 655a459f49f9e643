# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The counts of a model's choices: where they are kept, and the hooks that count on models of other packages."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..families.moe_layers import MoeLayer, require_moe_layers
from ..modeling_deepseekmoe import DeepseekMoeModel
from ..router_load import RouterLoad, RouterLoadCounter, count_tokens, counts_as_training
from ..torch_support import in_backward_pass

logger = logging.get_logger(__name__)
_TRACKER = "router_load_tracker"  # attribute of a decoder


def take_router_load(model: nn.Module, *, process_group: Any = None) -> RouterLoad:
    """Return what the gates did in training since the last call, summed over the ranks, and begin to count again.

    [`update_router_bias`] does this itself. Call this instead for a model without a bias, to feed [`RouterStats`].

    Args:
        model: a model of this package, or another one after [`track_router_load`]; wrapped or not.
        process_group: the data-parallel ranks; `None` for all.

    Raises:
        ValueError: if nothing was counted. With several ranks it is a warning, because others may have counted.
    """
    counter = router_load_counter(model)
    distributed = dist.is_available() and dist.is_initialized()
    if counter.load is None:
        problem = (
            f"{type(model).__name__}: no token was routed in training since the counts were taken last. Only forward "
            "passes in training mode and with gradients count, and only one may take the counts: one callback, or "
            "one call, for every optimizer step."
        )
        if not distributed:
            raise ValueError(problem)
        logger.warning_once(f"{problem} This rank counts nothing here; others may.")
    device = next(model.parameters()).device
    # Of all ranks, those of transformers' tensor parallelism are given the same tokens.
    sizes = [module.tp_size or 1 for module in model.modules() if isinstance(module, PreTrainedModel)]
    replicas = max(sizes, default=1) if process_group is None else 1
    return counter.take(device).all_reduce(process_group, replicas=replicas)


def router_load_counter(model: nn.Module) -> RouterLoadCounter:
    """Return the counter of a model.

    Raises:
        ValueError: if the model is not of this package and [`track_router_load`] was not called.
    """
    for module in model.modules():
        if isinstance(module, DeepseekMoeModel):
            return module.router_load
        if _TRACKER in vars(module):
            return vars(module)[_TRACKER].counter
    raise ValueError(
        f"{type(model).__name__} does not count its tokens itself: call track_router_load(model) before training."
    )


def tracked_counter(model: nn.Module) -> RouterLoadCounter | None:
    """Return the counter of a model of another package, if its tokens are counted now."""
    return next((vars(module)[_TRACKER].counter for module in model.modules() if _TRACKER in vars(module)), None)


# ------------------------------------------------------------------------------------------- models of other packages
class _Tracker:
    """Hooks that count the choices of a model which does not do so itself.

    One is on its decoder, which every wrapper calls with the batch. One is on the experts of every block. They are
    methods, so that a deep copy of the model has a tracker of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = require_moe_layers(model)
        sizes = {layer.num_experts for layer in layers}
        if len(sizes) > 1:
            raise ValueError(f"{type(model).__name__}: gates with different numbers of experts are not supported.")
        self.counter = RouterLoadCounter(tuple(layer.index for layer in layers), sizes.pop())
        self.counting = False
        self.token_mask: torch.Tensor | None = None
        pretrained = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        decoder = model if pretrained is None else pretrained.base_model
        self.handles = [decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True)]
        for place, layer in enumerate(layers):
            hook = functools.partial(self._count, place, layer)
            self.handles.append(layer.experts.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
        setattr(decoder, _TRACKER, self)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    @torch.compiler.disable
    def _before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.counting = counts_as_training(decoder)
        self.token_mask = given_mask(args, kwargs)

    @torch.compiler.disable
    def _count(
        self, place: int, layer: MoeLayer, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # Under checkpointing this runs again in the backward pass, while a graph task is running.
        if not self.counting or in_backward_pass():
            return
        (expert_ids, _), mask = layer.choices_of(args, kwargs), self.token_mask
        if mask is not None and len(expert_ids) % len(mask) == 0:  # of a cached prefix there are no tokens
            mask = mask[:, -(len(expert_ids) // len(mask)) :] if len(expert_ids) else mask
        if mask is not None and mask.numel() != len(expert_ids):
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)} is not allowed: {layer.name} routes {len(expert_ids)} "
                "tokens."
            )
        counts = count_tokens(expert_ids, self.counter.num_experts, mask)
        load = self.counter.begin(counts.device)
        load.tokens_per_expert[place] += counts.to(load.tokens_per_expert.device)
        if place == 0:
            load.micro_batches += 1
            load.tokens += len(expert_ids) if mask is None else (mask != 0).sum().to(load.tokens.device)


def given_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the mask (B, S) that a decoder is called with, nonzero for real tokens; `None` if it has no such mask."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def track_router_load(model: nn.Module) -> RouterLoadCounter:
    """Begin to count the tokens of every expert in training, and forget what was counted before.

    Models of this package always count. On others, hooks are set on the decoder and the experts. The 2-D
    `attention_mask` of the call says what is padding. Recomputation under gradient checkpointing is not counted.

    Args:
        model: the model, wrapped or not.

    Returns:
        The model's [`RouterLoadCounter`].

    Raises:
        ValueError: for a model without MoE layers, or with experts that are not called with expert ids.
    """
    if not any(isinstance(module, DeepseekMoeModel) for module in model.modules()):
        untrack_router_load(model)
        _Tracker(model)
    counter = router_load_counter(model)
    counter.load = None
    return counter


def untrack_router_load(model: nn.Module) -> None:
    """Remove the hooks of [`track_router_load`]. Models of this package go on counting."""
    for module in model.modules():
        if _TRACKER in vars(module):
            vars(module).pop(_TRACKER).remove()


__all__ = [
    "given_mask",
    "router_load_counter",
    "take_router_load",
    "track_router_load",
    "tracked_counter",
    "untrack_router_load",
]
