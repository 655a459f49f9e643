# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Compute the routing report of a model: what its gates do with a text, in numbers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..auxiliary_losses import max_violation
from ..families.moe_layers import MoeLayer
from ..moe import DeepseekMoeGate
from ..router_load import count_tokens
from .evaluation import RoutingTrace, score_function_of, trace_routing, traced_layers
from .texts import check_vocabulary, token_batches

_LEAST_EXPECTED = 5


def loads_of(trace: RoutingTrace) -> torch.Tensor:
    """Count the tokens of every expert in every layer (L, E)."""
    return count_loads(trace.expert_ids, trace.num_experts)


def count_loads(expert_ids: Iterable[torch.Tensor], num_experts: int) -> torch.Tensor:
    """Count the tokens of every expert (N, E) among N tensors of choices (T, K), which may differ in T."""
    return torch.stack([count_tokens(ids.long(), num_experts, None) for ids in expert_ids])


def batch_violations_of(trace: RoutingTrace) -> torch.Tensor:
    """Compute MaxVio of every batch (batches, L)."""
    parts = trace.expert_ids.split(list(trace.batch_lengths), dim=1)
    return torch.stack([max_violation(count_loads(part, trace.num_experts)) for part in parts])


def co_activation_of(trace: RoutingTrace, layer: int) -> torch.Tensor:
    """Compute how often pairs of experts are chosen together, over what independent choices would give.

    The independent choices have the same loads.

    Args:
        trace: all choices.
        layer: index of a MoE layer.

    Returns:
        `torch.FloatTensor` of shape (E, E), symmetric. It is NaN on the diagonal, and for pairs of which fewer than
        five tokens are expected: there the ratio would be chance.
    """
    ids = trace.expert_ids[trace.layers.index(layer)].long()
    chosen = torch.zeros(len(ids), trace.num_experts).scatter_(1, ids, 1.0)
    pairs, load = chosen.T @ chosen, chosen.sum(dim=0)
    # Choices of one token are distinct: without preference, a token that chose i chooses j with the chance
    # (K - 1) / K * load_j / T / (1 - load_i / (K T)), which is symmetrised here.
    top_k, total = ids.shape[1], float(len(ids))
    share = load / total
    expected = total * torch.outer(share, share) * (top_k - 1) / top_k
    expected = expected / (1 - (share[:, None] + share[None]) / (2 * top_k))
    return (pairs / expected).fill_diagonal_(float("nan")).masked_fill(expected < _LEAST_EXPECTED, float("nan"))


def top_tokens_of(trace: RoutingTrace, layer: int, count: int = 5) -> list[list[dict[str, Any]]]:
    """Find the tokens that are typical for every expert: those with the highest log-odds, in standard errors.

    The odds that a choice of the expert is of this token are compared with the odds among the choices of all other
    experts. Both counts are increased by what the token would give an expert at even load, K n / E for n occurrences,
    so that rare tokens are not typical by chance (Monroe et al. 2008, eq. 16 and 22).

    Args:
        trace: all choices.
        layer: index of a MoE layer.
        count: tokens for each expert.

    Returns:
        For every expert a list of `token_id`, `count` (choices of this expert), `share` (of the token's occurrences)
        and `log_odds` (in standard errors), highest first. Only tokens above zero are in it.
    """
    ids = trace.expert_ids[trace.layers.index(layer)].long()
    tokens, inverse, occurrences = trace.token_ids.unique(return_inverse=True, return_counts=True)
    table = torch.zeros(len(tokens) * trace.num_experts, dtype=torch.float64)
    cells = (inverse[:, None] * trace.num_experts + ids).flatten()
    table = table.scatter_add_(0, cells, torch.ones(cells.numel(), dtype=torch.float64))
    table = table.view(len(tokens), trace.num_experts)
    prior = (occurrences * (ids.shape[1] / trace.num_experts)).double()[:, None]
    own, others = table + prior, table.sum(dim=1, keepdim=True) - table + prior
    odds = [of.log() - (of.sum(dim=0) - of).clamp(min=1e-300).log() for of in (own, others)]
    scores = (odds[0] - odds[1]) / (1 / own + 1 / others).sqrt()
    best = scores.masked_fill(table == 0, 0.0).topk(min(count, len(tokens)), dim=0)
    return [
        [
            {
                "token_id": int(tokens[row]),
                "count": int(table[row, expert]),
                "share": float(table[row, expert] / occurrences[row]),
                "log_odds": score,
            }
            for row, score in zip(best.indices[:, expert].tolist(), best.values[:, expert].tolist(), strict=True)
            if score > 0
        ]
        for expert in range(trace.num_experts)
    ]


def shown_top_tokens(trace: RoutingTrace, layer: int, show: Callable[[int], str] | None) -> list[list[dict[str, Any]]]:
    """Return [`top_tokens_of`], each entry with the text of its token if `show` makes some."""
    found = top_tokens_of(trace, layer)
    if show is None:
        return found
    return [[{"token": show(entry["token_id"]), **entry} for entry in entries] for entries in found]


class RoutingReport:
    """The numbers of a trace. [`make_page`] makes a page of them.

    Args:
        trace: all choices, see [`trace_routing`].
        tokenizer: the tokenizer that shows the tokens.
        title: name of the model.
        facts: name and value of what stands at the top of the page.
    """

    def __init__(
        self, trace: RoutingTrace, tokenizer: PreTrainedTokenizerBase, title: str, facts: dict[str, str]
    ) -> None:
        self.trace = trace
        self.tokenizer = tokenizer
        self.title = title
        self.facts = facts
        self.loads = loads_of(trace)
        self.global_violation = max_violation(self.loads).tolist()
        self.batch_violation = batch_violations_of(trace).mean(dim=0).tolist()
        self.dead_experts = (self.loads == 0).sum(dim=1).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers: the facts, and a dict for every layer.

        The dict of a layer holds its load, MaxVio, dead experts, entropy, quantiles of the gate weights by rank, the
        pairs of experts that are chosen together most, and the top tokens of every expert.
        """
        layers = []
        for idx, layer in enumerate(self.trace.layers):
            weights = self.trace.weights[idx].sort(dim=-1, descending=True).values
            quantiles = weights.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0).T
            layers.append(
                {
                    "layer": layer,
                    "tokens_per_expert": self.loads[idx].tolist(),
                    "max_violation_global": self.global_violation[idx],
                    "max_violation_batch": self.batch_violation[idx],
                    "dead_experts": self.dead_experts[idx],
                    "entropy": None if self.trace.entropy[idx].isnan() else float(self.trace.entropy[idx]),
                    "gate_weight_quantiles": {"levels": [0.1, 0.5, 0.9], "by_rank": quantiles.tolist()},
                    "most_co_activated": self.most_co_activated(layer),
                    "top_tokens": shown_top_tokens(self.trace, layer, self.show),
                }
            )
        return {"title": self.title, "facts": self.facts, "tokens": len(self.trace.token_ids), "layers": layers}

    def most_co_activated(self, layer: int, count: int = 5) -> list[dict[str, Any]]:
        """Find the pairs of experts that are chosen together most, compared with independent choices."""
        table = co_activation_of(self.trace, layer).nan_to_num(0.0).triu(1)
        best = table.flatten().topk(min(count, table.numel()))
        return [
            {"experts": list(divmod(cell, self.trace.num_experts)), "observed_over_expected": value}
            for cell, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if value > 0
        ]

    def show(self, token_id: int) -> str:
        """Decode one token."""
        return shown_token(self.tokenizer, token_id)


def shown_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """Decode one token. A piece of a character, which has no text of its own, is shown as the tokenizer names it."""
    token = tokenizer.decode([token_id])
    return str(tokenizer.convert_ids_to_tokens(token_id)) if "\ufffd" in token else token


def make_report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterator[str],
    *,
    title: str,
    source: str,
    max_tokens: int = 32768,
    block_size: int = 512,
    batch_size: int = 4,
) -> RoutingReport:
    """Run a model on texts and report what its gates do.

    Args:
        model: a model with MoE layers, of this family or another one.
        tokenizer: its tokenizer.
        texts: for example from [`read_texts`].
        title: name of the model.
        source: name of the data.
        max_tokens, block_size, batch_size: see [`token_batches`]. Blocks are no longer than the model allows.

    Raises:
        ValueError: if the model has no MoE layer, if the tokenizer is not the model's, or if a size is not allowed.
    """
    layers, config = traced_layers(model), model.config.get_text_config()
    block_size = min(block_size, config.max_position_embeddings)
    batches = token_batches(texts, tokenizer, max_tokens=max_tokens, block_size=block_size, batch_size=batch_size)
    check_vocabulary(config, batches)
    trace = trace_routing(model, batches)
    tokens = f"{len(trace.token_ids):,} in batches of {batches[0].numel():,}"
    facts = facts_of(model, layers, trace) | {"data": source, "tokens": tokens}
    return RoutingReport(trace, tokenizer, title, facts)


def facts_of(model: PreTrainedModel, layers: Sequence[MoeLayer], trace: RoutingTrace) -> dict[str, str]:
    """Say what a model's MoE layers are: the names and values of what stands at the top of a page."""
    config = model.config.get_text_config()
    if hasattr(config, "n_shared_experts"):
        shared = f"{config.n_shared_experts or 0} shared"
    else:
        shared = "no shared" if layers[0].shared_experts is None else "with shared experts"
    return {
        "model type": config.model_type,
        "MoE layers": f"{len(trace.layers)} of {config.num_hidden_layers}",
        "experts": f"{shared}, {trace.num_experts} routed, {trace.expert_ids.shape[-1]} for each token",
        "gate": _describe_gate(layers[-1]),
    }


def _describe_gate(layer: MoeLayer) -> str:
    """Say in a few words how a gate scores and chooses."""
    if isinstance(layer.gate, DeepseekMoeGate):
        return f"{layer.gate.config.scoring_func}, {layer.gate.config.topk_method}"
    score = score_function_of(layer) or "scores that are not understood"
    return f"{type(layer.gate).__name__}: {score}{' plus bias' if layer.bias is not None else ''}"


__all__ = ["RoutingReport", "count_loads", "facts_of", "make_report", "shown_token", "shown_top_tokens"]
