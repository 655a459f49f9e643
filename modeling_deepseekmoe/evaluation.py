# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Measures of a model on text: perplexity and the load of every expert."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from .modeling_deepseekmoe import DeepseekMoeGate
from .routing import RoutingPlan


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is in its previous mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def perplexity(model: PreTrainedModel, batches: Iterable[torch.Tensor]) -> float:
    """exp of the mean cross entropy of all next tokens.

    Args:
        model: a causal language model.
        batches: `torch.LongTensor`s of token ids (B, S), S at least 2, without padding.

    Raises:
        ValueError: if there is no batch.
    """
    loss, tokens = 0.0, 0
    with evaluating(model):
        for input_ids in batches:
            input_ids, targets = input_ids.to(model.device), input_ids[:, 1:].numel()
            loss += float(model(input_ids, labels=input_ids).loss) * targets
            tokens += targets
    if not tokens:
        raise ValueError("batches is empty: at least one batch of tokens is needed.")
    return math.exp(loss / tokens)


def expert_load(model: PreTrainedModel, batches: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Number of tokens that every routed expert receives.

    Args:
        model: a model of this family.
        batches: `torch.LongTensor`s of token ids (B, S), without padding.

    Returns:
        For every MoE layer's index, a `torch.LongTensor` of shape (E,).

    Raises:
        ValueError: if the model has no MoE layer of this family.
    """
    gates = [module for module in model.modules() if isinstance(module, DeepseekMoeGate)]
    if not gates:
        raise ValueError(f"{type(model).__name__} has no MoE layer of this family: there is no load to measure.")
    loads = {layer_idx: torch.zeros(model.config.n_routed_experts, dtype=torch.long)
             for layer_idx in model.config.moe_layers}  # fmt: skip
    handles = [
        gate.register_forward_hook(_counting_hook(counts)) for gate, counts in zip(gates, loads.values(), strict=True)
    ]
    try:
        with evaluating(model):
            for input_ids in batches:
                model(input_ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return loads


def _counting_hook(counts: torch.Tensor) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, output: tuple[torch.Tensor, RoutingPlan]) -> None:
        chosen = output[1].expert_ids.flatten()
        counts.add_(torch.bincount(chosen, minlength=len(counts)).cpu())

    return hook


__all__ = ["evaluating", "expert_load", "perplexity"]
