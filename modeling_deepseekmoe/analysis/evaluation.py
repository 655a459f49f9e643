# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Measure a model on text: its perplexity, the load of every expert, and a trace of all choices."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..families.gate_rules import UnknownGateError, rule_of
from ..families.moe_layers import MoeLayer, require_moe_layers
from ..moe import DeepseekMoeGate
from ..router_load import count_tokens, sum_of_entropies
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
            tokens; NaN for a gate whose scores are not understood.
    """

    layers: tuple[int, ...]
    num_experts: int
    token_ids: torch.Tensor
    batch_lengths: tuple[int, ...]
    expert_ids: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor


@dataclass(frozen=True)
class Choices:
    """What one layer did with one batch: hidden states (T, D), gate logits (T, E), expert ids and weights (T, K)."""

    hidden_states: torch.Tensor
    logits: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor


def expert_load(model: PreTrainedModel, batches: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Count the tokens that every routed expert receives.

    Args:
        model: a model with MoE layers, of this family or another one.
        batches: `torch.LongTensor`s of token ids (B, S), without padding.

    Returns:
        For every MoE layer's index, a `torch.LongTensor` of shape (E,).

    Raises:
        ValueError: if the model has no MoE layer, or if one is not understood.
    """
    loads: dict[int, torch.Tensor] = {}

    def count(layer: MoeLayer, choices: Choices) -> None:
        counts = count_tokens(choices.expert_ids, layer.num_experts, None).cpu()
        loads[layer.index] = loads[layer.index] + counts if layer.index in loads else counts

    for _ in watched_batches(model, batches, count):
        pass
    return loads


def trace_routing(model: PreTrainedModel, batches: Iterable[torch.Tensor]) -> RoutingTrace:
    """Run the model and keep every choice of its gates: 6 bytes of memory for each token, layer and choice.

    Args:
        model: a model with MoE layers, of this family or another one.
        batches: `torch.LongTensor`s of token ids (B, S), without padding.

    Raises:
        ValueError: if the model has no MoE layer, if one is not understood, or if there is no batch.
    """
    layers = traced_layers(model)
    indices = tuple(layer.index for layer in layers)
    ids: dict[int, list[torch.Tensor]] = {layer: [] for layer in indices}
    weights: dict[int, list[torch.Tensor]] = {layer: [] for layer in indices}
    entropies = dict.fromkeys(indices, 0.0)
    scores = {layer.index: score_function_of(layer) for layer in layers}

    def keep(layer: MoeLayer, choices: Choices) -> None:
        ids[layer.index].append(choices.expert_ids.to("cpu", torch.int16))
        weights[layer.index].append(choices.weights.float().cpu())
        score = scores[layer.index]
        entropy = float("nan") if score is None else float(sum_of_entropies(affinities(choices.logits, score), None))
        entropies[layer.index] += entropy

    tokens = [input_ids.flatten().cpu() for input_ids in watched_batches(model, batches, keep)]
    if not tokens:
        raise ValueError("batches is empty: at least one batch of tokens is needed.")
    token_ids = torch.cat(tokens)
    return RoutingTrace(
        layers=indices,
        num_experts=layers[0].num_experts,
        token_ids=token_ids,
        batch_lengths=tuple(len(batch) for batch in tokens),
        expert_ids=torch.stack([torch.cat(ids[layer]) for layer in indices]),
        weights=torch.stack([torch.cat(weights[layer]) for layer in indices]),
        entropy=torch.tensor([entropies[layer] / len(token_ids) for layer in indices]),
    )


def traced_layers(model: PreTrainedModel) -> list[MoeLayer]:
    """Return the MoE layers of a model, which must differ in their index and agree in their number of experts.

    Raises:
        ValueError: if there is none, or if they do not.
    """
    layers = [layer for layer in require_moe_layers(model) if not is_mtp_layer_of(model, layer.index)]
    indices, sizes = [layer.index for layer in layers], {layer.num_experts for layer in layers}
    if len(set(indices)) < len(indices) or len(sizes) > 1:
        raise ValueError(
            f"{type(model).__name__} is not allowed: it has several MoE blocks in a layer, or layers with different "
            "numbers of experts."
        )
    return layers


def is_mtp_layer_of(model: PreTrainedModel, index: int) -> bool:
    """Tell whether a layer of a model is one of multi-token prediction, which does not run with the others."""
    config = model.config
    return bool(getattr(config, "mtp", False)) and index >= config.num_hidden_layers


def score_function_of(layer: MoeLayer) -> str | None:
    """Return how a layer's gate scores, or `None` if that is not understood."""
    if isinstance(layer.gate, DeepseekMoeGate):
        return layer.gate.options.score_function
    try:
        return rule_of(layer).options.score_function
    except UnknownGateError:
        return None


def watched_batches(
    model: PreTrainedModel, batches: Iterable[torch.Tensor], watch: Callable[[MoeLayer, Choices], None]
) -> Iterator[torch.Tensor]:
    """Run the model on every batch and yield the batch. Call `watch` with every layer and its choices."""
    logits: dict[int, torch.Tensor] = {}

    def hooks_of(layer: MoeLayer) -> list[Any]:
        def keep_logits(module: torch.nn.Module, args: Any, output: Any) -> None:
            logits[layer.index] = output[0]

        def see(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = logits[layer.index].reshape(-1, logits[layer.index].shape[-1])
            hidden_states = args[0] if args else kwargs["hidden_states"]
            watch(layer, Choices(hidden_states.flatten(0, -2), found, *layer.choices_of(args, kwargs)))

        if layer.gate is None:
            raise ValueError(f"{layer.name} is not allowed: there is no gate beside its experts.")
        before = layer.experts.register_forward_pre_hook(see, with_kwargs=True)
        return [layer.gate.register_forward_hook(keep_logits), before]

    handles = [handle for layer in traced_layers(model) for handle in hooks_of(layer)]
    try:
        with evaluating(model):
            for input_ids in batches:
                model(input_ids=input_ids.to(model.device), use_cache=False, logits_to_keep=1)
                if not logits:
                    raise ValueError(
                        f"The gates of this {type(model).__name__} are not called as modules, so that their choices "
                        "cannot be seen. A compiled model does that: take it before torch.compile."
                    )
                yield input_ids
    finally:
        for handle in handles:
            handle.remove()


__all__ = [
    "Choices",
    "RoutingTrace",
    "expert_load",
    "perplexity",
    "score_function_of",
    "trace_routing",
    "traced_layers",
    "watched_batches",
]
