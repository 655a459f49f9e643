# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Measure how specialised the experts of a model are: by what it loses without them, and by what they do.

The measures are those of DeepSeekMoE (arXiv 2401.06066, section 4.5) and of ESFT (2407.01906, section 3), and more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..families.moe_layers import MoeLayer
from ..support.models import is_sharded
from .ablations import (
    RATIOS,
    Losses,
    measure_activation,
    measure_redundancy,
    measure_shared,
    measure_single_experts,
)
from .evaluation import RoutingTrace, trace_routing, traced_layers
from .expert_domains import measure_domains, measure_effective_experts
from .expert_similarity import measure_outputs, measure_weights
from .routing_report import facts_of, shown_top_tokens
from .sections import Section
from .texts import check_vocabulary


@dataclass(frozen=True)
class Specialisation:
    """What [`measure_specialisation`] has measured.

    Attributes:
        title: name of the model.
        facts: name and value of what stands at the top of the page.
        loss: mean cross entropy of the tokens in nats, with nothing changed.
        sections: the measures by their keys: `redundancy`, `shared`, `single`, `activation`, `domains`, `effective`,
            `weights`, `outputs`.
        trace: all choices of the gates.
    """

    title: str
    facts: dict[str, str]
    loss: float
    sections: dict[str, Section]
    trace: RoutingTrace = field(repr=False)

    def to_dict(self, show: Callable[[int], str] | None = None) -> dict[str, Any]:
        """Return all numbers, with what they mean and, of empty sections, the reason.

        Args:
            show: makes text of a token id, for the typical tokens of every expert. Without it they have ids alone.
        """
        return {
            "title": self.title,
            "facts": self.facts,
            "loss": self.loss,
            "tokens": len(self.trace.token_ids),
            "sections": {key: section.to_dict() for key, section in self.sections.items()},
            "typical_tokens": [
                {"layer": layer, "experts": shown_top_tokens(self.trace, layer, show)} for layer in self.trace.layers
            ],
        }


def measure_specialisation(
    model: PreTrainedModel,
    domains: Mapping[str, Sequence[torch.Tensor]],
    *,
    title: str,
    source: str,
    ratios: Sequence[float] = RATIOS,
    single_experts: int = 0,
    output_tokens: int = 128,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Specialisation:
    """Measure how specialised the routed and the shared experts of a model are.

    The model reads the text once for every change: about K + 10 times for K chosen experts (K + 14 if the gate does
    not normalise), and with `single_experts` `single_experts + 1` times more for every MoE layer.

    Args:
        model: a causal language model with MoE layers, of this family or another one.
        domains: for the name of every domain, batches: `torch.LongTensor`s of token ids (B, S), S at least 2, without
            padding. A single entry, of any name, is a text without domains.
        title: name of the model.
        source: name of the data.
        ratios: shares of the routed experts that are masked in `redundancy`, between 0 and 1.
        single_experts: how many routed experts of each layer are masked one by one, the busiest first.
        output_tokens: number of tokens for which every expert's output is computed.
        progress: is called with the number of tokens that were read so far, and that will be at most.

    Raises:
        ValueError: if the model has no MoE layer, if one is not understood, if there is no text, if its loss is not
            finite, or if a number is not allowed.
    """
    domains = _read_again_and_again(domains)
    _check(domains, ratios, single_experts, output_tokens)
    layers = traced_layers(model)
    _refuse_expert_parallelism(model, layers)
    batches = [batch.long() for own in domains.values() for batch in own]
    check_vocabulary(model.config.get_text_config(), batches)
    tokens = sum(batch.numel() for batch in batches)
    losses = Losses(model, layers, batches)
    # Two more passes are for the trace and the outputs.
    done = _Done(progress, (losses.count_passes(ratios, single_experts) + 2) * tokens)
    losses.progress = done.add
    weights = measure_weights(layers)  # first, since it may fail
    trace = trace_routing(model, batches)
    done.add(tokens)
    sections = [
        measure_redundancy(losses, ratios),
        measure_shared(losses),
        measure_single_experts(losses, trace, single_experts),
        measure_activation(losses),
        *_by_choices(domains, trace),
        weights,
        measure_outputs(model, layers, batches, output_tokens),
    ]
    progress(done.total, done.total)
    facts = facts_of(model, layers, trace) | _facts_of_text(model, source, batches)
    facts["loss"] = f"{losses.loss:.4f} nats"
    return Specialisation(title, facts, losses.loss, {section.key: section for section in sections}, trace)


def _read_again_and_again(domains: Any) -> dict[str, Any]:
    """Make lists of batches that may be generators."""
    if not isinstance(domains, Mapping):
        kind = type(domains).__name__
        raise ValueError(f"domains of type {kind} is not allowed: it must be a dict, as {{'': batches}}.")
    return {name: own if isinstance(own, torch.Tensor) else list(own) for name, own in domains.items()}


def _facts_of_text(model: PreTrainedModel, source: str, batches: Sequence[torch.Tensor]) -> dict[str, str]:
    tokens, sequences, longest = (
        sum(map(torch.numel, batches)),
        sum(map(len, batches)),
        max(b.shape[1] for b in batches),
    )
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "data": source,
        "tokens": f"{tokens:,} in {sequences:,} sequences of at most {longest:,}",
    }


class _Done:
    """The tokens that were read so far, of all."""

    def __init__(self, progress: Callable[[int, int], None], total: int) -> None:
        self.progress, self.total, self.tokens = progress, total, 0

    def add(self, tokens: int) -> None:
        self.tokens += tokens
        self.progress(self.tokens, self.total)


def _by_choices(domains: Mapping[str, Sequence[torch.Tensor]], trace: RoutingTrace) -> list[Section]:
    lengths = {name: [batch.shape[1] for batch in own for _ in batch] for name, own in domains.items()}
    return [
        measure_domains(trace, lengths),
        measure_effective_experts(trace, [length for own in lengths.values() for length in own]),
    ]


def _refuse_expert_parallelism(model: PreTrainedModel, layers: Sequence[MoeLayer]) -> None:
    for layer in layers if is_sharded(model) else []:
        own = getattr(layer.experts, "num_experts", layer.num_experts)
        if own < layer.num_experts and not layer.has_skip_class:
            raise ValueError(
                f"{layer.name}.experts holds {own} of the {layer.num_experts} experts, which ranks share: load the "
                "model without expert parallelism."
            )


def _check(
    domains: Mapping[str, Sequence[torch.Tensor]], ratios: Sequence[float], single_experts: int, output_tokens: int
) -> None:
    if not domains:
        raise ValueError("domains is not allowed: it is empty, and at least one text is needed.")
    for name, own in domains.items():
        if isinstance(own, torch.Tensor) or not own:
            found = "a tensor" if isinstance(own, torch.Tensor) else "no batch"
            raise ValueError(f"domains[{name!r}] is not allowed: it is {found}, and must be a list of batches (B, S).")
        for batch in own:
            whole = isinstance(batch, torch.Tensor) and not batch.is_floating_point() and batch.dtype != torch.bool
            if not whole or batch.ndim != 2 or batch.shape[1] < 2 or not len(batch):
                what = (
                    f"{batch.dtype} of shape {tuple(batch.shape)}" if hasattr(batch, "shape") else type(batch).__name__
                )
                raise ValueError(
                    f"domains[{name!r}]: {what} is not allowed: it must hold whole numbers (B, S), S at least 2."
                )
    if not ratios or any(not 0 < ratio < 1 for ratio in ratios):
        raise ValueError(f"ratios={list(ratios)} is not allowed: they must be numbers above 0 and below 1.")
    for name, value, least in (("single_experts", single_experts, 0), ("output_tokens", output_tokens, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} is not allowed: it must be an integer of at least {least}.")


__all__ = ["Specialisation", "measure_specialisation"]
