# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Measure a model on text: its perplexity, the load of every expert, and a trace of all choices."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..modeling_deepseekmoe import DeepseekMoeModel
from ..moe import DeepseekMoeBlock
from ..router_load import count_tokens, sum_of_entropies
from ..routing import Routing
from ..routing_eager import affinities
from ..support.models import evaluating


def perplexity(model: PreTrainedModel, batches: Iterable[torch.Tensor]) -> float:
    """Compute exp of the mean cross entropy over all next tokens.

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


@dataclass(frozen=True)
class RoutingTrace:
    """Every choice that a model's gates made for some tokens. Shape letters: L MoE layers, T tokens, K choices.

    Attributes:
        layers: indices of the MoE layers.
        num_experts: E.
        token_ids (`torch.LongTensor` of shape (T,)): the tokens.
        batch_lengths: tokens in every batch.
        expert_ids (`torch.ShortTensor` of shape (L, T, K)): the chosen experts, best first.
        weights (`torch.FloatTensor` of shape (L, T, K)): the gate weights of the choices.
        entropy (`torch.FloatTensor` of shape (L,)): entropy of a token's affinities in nats, as a mean over the
            tokens.
    """

    layers: tuple[int, ...]
    num_experts: int
    token_ids: torch.Tensor
    batch_lengths: tuple[int, ...]
    expert_ids: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor


def expert_load(model: PreTrainedModel, batches: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Count the tokens that every routed expert receives.

    Args:
        model: a model of this family.
        batches: `torch.LongTensor`s of token ids (B, S), without padding.

    Returns:
        For every MoE layer's index, a `torch.LongTensor` of shape (E,).

    Raises:
        ValueError: if the model has no MoE layer of this family.
    """
    loads: dict[int, torch.Tensor] = {}

    def count(layer: int, router_logits: torch.Tensor, routing: Routing) -> None:
        counts = count_tokens(routing.expert_ids, router_logits.shape[-1], None).cpu()
        loads[layer] = loads[layer] + counts if layer in loads else counts

    for _ in _watched_batches(model, batches, count):
        pass
    return loads


def trace_routing(model: PreTrainedModel, batches: Iterable[torch.Tensor]) -> RoutingTrace:
    """Run the model and keep every choice of its gates: 6 bytes of memory for each token, layer and choice.

    Args:
        model: a model of this family.
        batches: `torch.LongTensor`s of token ids (B, S), without padding.

    Raises:
        ValueError: if the model has no MoE layer of this family, or if there is no batch.
    """
    layers = tuple(moe_blocks(model))
    ids: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    weights: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    entropies = dict.fromkeys(layers, 0.0)

    def keep(layer: int, router_logits: torch.Tensor, routing: Routing) -> None:
        ids[layer].append(routing.expert_ids.to("cpu", torch.int16))
        weights[layer].append(routing.weights.float().cpu())
        entropies[layer] += float(sum_of_entropies(affinities(router_logits, model.config.scoring_func), None))

    tokens = [input_ids.flatten().cpu() for input_ids in _watched_batches(model, batches, keep)]
    if not tokens:
        raise ValueError("batches is empty: at least one batch of tokens is needed.")
    token_ids = torch.cat(tokens)
    return RoutingTrace(
        layers=layers,
        num_experts=model.config.n_routed_experts,
        token_ids=token_ids,
        batch_lengths=tuple(len(batch) for batch in tokens),
        expert_ids=torch.stack([torch.cat(ids[layer]) for layer in layers]),
        weights=torch.stack([torch.cat(weights[layer]) for layer in layers]),
        entropy=torch.tensor([entropies[layer] / len(token_ids) for layer in layers]),
    )


def moe_blocks(model: PreTrainedModel) -> dict[int, DeepseekMoeBlock]:
    """Return the MoE blocks of a model by their layers' indices.

    Raises:
        ValueError: if the model has none of this family.
    """
    decoder = next((module for module in model.modules() if isinstance(module, DeepseekMoeModel)), None)
    blocks = {} if decoder is None else {layer: decoder.layers[layer].mlp for layer in decoder.config.moe_layers}
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no MoE layer of this family: there is no load to measure.")
    return blocks


def _watched_batches(
    model: PreTrainedModel, batches: Iterable[torch.Tensor], watch: Callable[[int, torch.Tensor, Routing], None]
) -> Iterator[torch.Tensor]:
    """Run the model on every batch and yield the batch.

    Call `watch` with every layer's index, gate logits and routing.
    """
    blocks = moe_blocks(model)

    def hook_of(layer: int) -> Callable[..., None]:
        return lambda module, args, output: watch(layer, *output)

    handles = [block.gate.register_forward_hook(hook_of(layer)) for layer, block in blocks.items()]
    try:
        with evaluating(model):
            for input_ids in batches:
                model(input_ids.to(model.device), use_cache=False, logits_to_keep=1)
                yield input_ids
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["RoutingTrace", "expert_load", "moe_blocks", "perplexity", "trace_routing"]
