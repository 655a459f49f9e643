# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Scores of how much a task uses every expert (arXiv 2407.01906), and the selection of the best experts.

Shape letters: B batch, S sequence, T tokens, E routed experts, K choices.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..families.gate_rules import UnknownGateError, rule_of
from ..families.moe_layers import MoeLayer, find_experts, find_moe_layers
from ..support.models import evaluating, run_decoder
from .selection import ExpertSelection

METHODS = ("gate", "token")
Scores = dict[int, torch.Tensor]


def score_experts(
    model: nn.Module,
    dataloader: Iterable[Any],
    method: str = "gate",
    max_tokens: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Scores:
    """Score how much a task uses every expert (arXiv 2407.01906, eq. 6 and 7), in one pass that keeps no logits.

    The gate score of an expert is its gate weight g, averaged over the tokens of a sample and then over the samples.
    The token score is the same average of 1[g > 0] / K. Weights count without the routed scaling factor.

    Args:
        model: a model of this family, or any other of transformers with stacked experts.
        dataloader: yields `torch.LongTensor`s (B, S) of token ids, or dicts with `input_ids` and, if there is padding,
            `attention_mask` (B, S). Every row is a sample.
        method: `"gate"` or `"token"`.
        max_tokens: stop after so many tokens, padding not counted. The sample in which they end counts with those that
            came before. `None`: no limit.
        progress: is called with the number of new tokens after every batch.

    Returns:
        For every layer with routed experts a `torch.DoubleTensor` of shape (E,).

    Raises:
        ValueError: for an unknown method, a `max_tokens` below 1, a model without such experts, or no tokens.
    """
    blocks = _checked_blocks(model, method, max_tokens)
    sums = {
        layer: torch.zeros(experts.gate_up_proj.shape[0], dtype=torch.float64)
        for layer, (_, experts) in blocks.items()
    }
    scaling, samples, tokens = _scaling_factors(model), dict.fromkeys(sums, 0), 0
    decoder = getattr(model, "get_base_model", lambda: model)().base_model  # no head: no logits
    choices: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with evaluating(model), _watching(model, choices):
        for batch in dataloader:
            input_ids, mask = _ids_and_mask(batch, decoder.config.vocab_size)
            if max_tokens is not None:
                mask = mask & (mask.flatten().cumsum(0).view_as(mask) <= max_tokens - tokens)
            if not mask.any():
                continue
            device = decoder.device
            padding = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            kwargs = {} if padding is None else {"attention_mask": padding.to(device)}
            depths = run_decoder(decoder, input_ids.to(device), **kwargs)
            ahead = enumerate(depths, start=getattr(decoder.config, "num_hidden_layers", 0))
            masks = dict.fromkeys(sums, mask) | {idx: depth.real.cpu() & mask for idx, depth in ahead}
            for layer, (expert_ids, weights) in choices.items():
                sums[layer] += _sum_over_samples(
                    expert_ids, weights / scaling[layer], masks[layer], method, len(sums[layer])
                )
                samples[layer] += int(masks[layer].any(dim=1).sum())
            tokens += int(mask.sum())
            progress(int(mask.sum()))
            if tokens == max_tokens:
                break
    if not tokens:
        raise ValueError("dataloader is not allowed: it yields no tokens, and at least one is needed.")
    return {layer: total / max(samples[layer], 1) for layer, total in sums.items()}


def _checked_blocks(model: nn.Module, method: str, max_tokens: int | None) -> dict[int, tuple[str, nn.Module]]:
    """Check all arguments, and return the experts of the model."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not allowed: it must be 'gate' or 'token'.")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} is not allowed: it must be at least 1.")
    blocks = find_experts(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no stacked experts: there is nothing to score.")
    return blocks


def _scaling_factors(model: nn.Module) -> dict[int, float]:
    """Return what each layer's gate multiplies its weights by."""
    config, factors = model.config, {}
    own = getattr(config, "gate_scaling_factor", None)
    for layer in find_moe_layers(model):
        if own is not None:
            factors[layer.index] = float(own)
            continue
        try:
            factors[layer.index] = rule_of(layer).options.scaling_factor
        except UnknownGateError:  # the name that most families have
            factors[layer.index] = float(getattr(config, "routed_scaling_factor", None) or 1.0)
    return factors


def _ids_and_mask(batch: Any, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    for name, tensor in (("input_ids", input_ids), ("attention_mask", mask)):
        wanted = isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and not tensor.is_floating_point()
        if not wanted and not (tensor is None and name == "attention_mask"):
            found = (
                f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor)
            )
            raise ValueError(f"dataloader: {name} as {found} is not allowed: it must hold whole numbers (B, S).")
    assert isinstance(input_ids, torch.Tensor)
    if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocabulary:
        raise ValueError(f"dataloader: token {int(input_ids.max())} is not allowed: there are {vocabulary}.")
    return input_ids, torch.ones_like(input_ids, dtype=torch.bool).cpu() if mask is None else mask.bool().cpu()


@contextmanager
def _watching(model: nn.Module, choices: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Keep the ids and weights (T, K) that the experts of every layer receive in the latest forward pass."""

    def keep(layer: MoeLayer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        expert_ids, weights = layer.choices_of(args, kwargs)
        if layer.has_skip_class:  # which is no expert
            expert_ids = expert_ids.masked_fill(weights == 0, 0)
        choices[layer.index] = (expert_ids.cpu(), weights.double().cpu())

    scored = find_experts(model)
    handles = [
        layer.experts.register_forward_pre_hook(functools.partial(keep, layer), with_kwargs=True)
        for layer in find_moe_layers(model)
        if layer.index in scored
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sum_over_samples(
    expert_ids: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor, method: str, num_experts: int
) -> torch.Tensor:
    """Sum the scores of a batch's samples, (E,)."""
    total, top_k = torch.zeros(num_experts, dtype=torch.float64), expert_ids.shape[-1]
    batch = zip(expert_ids.view(*mask.shape, top_k), weights.view(*mask.shape, top_k), mask, strict=True)
    for sample_ids, sample_weights, sample_mask in batch:
        if not sample_mask.any():
            continue
        ids, values = sample_ids[sample_mask].flatten(), sample_weights[sample_mask].flatten()
        if method == "token":
            values = (values > 0).double() / top_k
        total += torch.bincount(ids, weights=values, minlength=num_experts) / int(sample_mask.sum())
    return total


def select_experts(scores: Mapping[int, torch.Tensor | Sequence[float]], threshold: float) -> dict[int, list[int]]:
    """Select the best experts of every layer until their scores add up to the threshold (arXiv 2407.01906, eq. 8).

    Args:
        scores: for every layer a score for each expert, as [`score_experts`] gives. Of equal scores the lower id wins.
        threshold: the paper takes 0.1 for gate scores and 0.2 for token scores.

    Returns:
        For every layer the ids, best first. It has all experts if even these do not reach the threshold.

    Raises:
        ValueError: for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold!r} is not allowed: it must be above 0 and at most 1.")
    selected = {}
    for layer, values in scores.items():
        values = torch.as_tensor(values, dtype=torch.float64)
        if values.ndim != 1 or not bool(values.isfinite().all()):
            raise ValueError(
                f"scores of layer {layer} are not allowed: they must be finite numbers, one for each expert."
            )
        order, ids, reached = torch.argsort(values, descending=True, stable=True).tolist(), [], 0.0
        for expert in order:
            if reached >= threshold:
                break
            ids.append(expert)
            reached += float(values[expert])
        selected[layer] = ids
    return selected


def save_scores(scores: Scores, method: str, path: str | Path) -> None:
    """Write scores as DeepSeek's ESFT release does: `{"gate_scores": {layer: {expert: score}}}`."""
    content = {
        f"{method}_scores": {
            str(layer): {str(expert): round(score, 6) for expert, score in enumerate(values.tolist())}
            for layer, values in scores.items()
        }
    }
    Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")


def selection_table(selection: ExpertSelection, scores: Scores) -> str:
    """Make a table with a line for every layer: how many experts are selected, their share of the score, and which."""
    lines = ["layer | selected | share of the score | experts"]
    for layer, ids in selection.experts.items():
        values = scores[layer]
        share = float(values[ids].sum() / values.sum())
        lines.append(f"{layer:5} | {len(ids):3} of {len(values)} | {share:18.1%} | {' '.join(map(str, ids))}")
    selected = sum(map(len, selection.experts.values()))
    total = sum(len(values) for values in scores.values())
    return "\n".join([*lines, f"  all | {selected} of {total} experts, {selected / total:.1%}"])


__all__ = ["METHODS", "save_scores", "score_experts", "select_experts", "selection_table"]
