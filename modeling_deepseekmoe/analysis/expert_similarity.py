# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""How alike the experts of a layer are: by their weights, and by what they make of the same tokens.

Shape letters: T tokens, E routed experts, D hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..families.moe_layers import MoeLayer
from ..support.models import evaluating, whole_tensor
from .evaluation import Choices, watched_batches
from .interventions import as_two_choices
from .sections import Section

_COLUMNS = 2**18  # of a stack that are widened at a time


def cosines(rows: torch.Tensor) -> torch.Tensor:
    """Compute the cosines (..., E, E) of vectors (..., E, D), in float64. Those of a vector of zeros are 0."""
    rows = rows.double()
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    return rows @ rows.transpose(-1, -2)


class UnreadableWeightsError(ValueError):
    """The weights of experts cannot be compared."""


def cosines_of_weights(layer: MoeLayer) -> torch.Tensor:
    """Compute the cosines (E, E) of all weights of the routed experts, without adapters.

    Raises:
        UnreadableWeightsError: if they are quantised, offloaded, or not stacked by experts.
    """
    named = {
        name: whole_tensor(parameter).flatten(1)
        for name, parameter in layer.experts.named_parameters()
        if parameter.ndim > 1 and "lora_" not in name
    }
    stacks, number = list(named.values()), getattr(layer.experts, "num_experts", layer.num_experts)
    for name, stack in named.items():
        if stack.is_meta:
            raise UnreadableWeightsError(f"{layer.name}.experts.{name} is offloaded to the disk or the CPU.")
        if not stack.is_floating_point() or stack.element_size() == 1:
            raise UnreadableWeightsError(f"{layer.name}.experts.{name} is quantised ({stack.dtype}).")
        if len(stack) != number:
            raise UnreadableWeightsError(f"{layer.name}.experts.{name} is not stacked by the {number} experts.")
    if not stacks:
        raise UnreadableWeightsError(f"{layer.name}.experts has no weights of its own.")
    products = torch.zeros(number, number, dtype=torch.float64)
    for stack in stacks:
        for part in stack.split(_COLUMNS, dim=1):
            wide = part.double()
            products += (wide @ wide.T).cpu()
    norms = products.diagonal().sqrt().clamp(min=1e-300)
    return products / torch.outer(norms, norms)


def measure_weights(layers: Sequence[MoeLayer]) -> Section:
    """Compare the weights of all pairs of experts."""
    section = Section(
        "weights",
        "Similarity of weights",
        "Cosine of all weights of two routed experts of a layer, in the order in which they lie: the mean of all "
        "pairs, and of every expert's cosine with the expert that is most like it.",
        "",
        "Near 0 for experts that were trained from scratch: the same function may have its neurons in another order. "
        "Upcycled copies of one shard begin at 1, and part as they are trained.",
    )
    rows = []
    for layer in layers:
        try:
            table = cosines_of_weights(layer)
        except UnreadableWeightsError as error:
            return replace(section, empty=str(error))
        rows.append({"layer": layer.index, **_summary(table)})
    adapted = any("lora_" in name for layer in layers for name, _ in layer.experts.named_parameters())
    return replace(
        section,
        figures={"layers": rows},
        summary=_sentence(rows),
        notes=("Adapters are left out: these are the base's.",) * adapted,
    )


def measure_outputs(
    model: PreTrainedModel, layers: Sequence[MoeLayer], batches: Sequence[torch.Tensor], count: int
) -> Section:
    """Compare what all pairs of experts make of the same tokens.

    Args:
        model: a model with MoE layers.
        layers: its MoE layers.
        batches: `torch.LongTensor`s of token ids (B, S), without padding.
        count: how many tokens are looked at, evenly spread over the text.
    """
    count = min(count, sum(batch.numel() for batch in batches))
    section = Section(
        "outputs",
        "Similarity of outputs",
        f"Cosine of what two routed experts of a layer give for the same token, whichever the token chose, as a mean "
        f"over {count} tokens: the mean of all pairs, and of every expert's cosine with the expert that is most like "
        "it. A token for which an expert gives zero is left out of its pairs.",
        "",
        "Near 0: the experts compute different things. Near 1: one could stand in for the other.",
    )
    if missing := [layer for layer in layers if not isinstance(getattr(layer.experts, "num_experts", None), int)]:
        return replace(section, empty=f"{missing[0].name}.experts does not say how many experts it has.")
    inputs = _inputs_of(model, layers, batches, count)
    rows = []
    with evaluating(model):
        for layer in layers:
            outputs = _outputs_of(layer.experts, inputs[layer.index], layer.experts.num_experts)
            rows.append({"layer": layer.index, **_summary(mean_cosines(outputs))})
    figures = {"tokens": len(inputs[layers[0].index]), "layers": rows}
    return replace(section, figures=figures, summary=_sentence(rows))


def mean_cosines(outputs: torch.Tensor) -> torch.Tensor:
    """Compute the mean cosines (E, E) over the tokens of outputs (E, T, D), without those where one of a pair is 0.

    They are NaN where no token is left.
    """
    given = (outputs != 0).any(dim=-1).double()
    return cosines(outputs.transpose(0, 1)).sum(dim=0) / (given @ given.T)


def _inputs_of(
    model: PreTrainedModel, layers: Sequence[MoeLayer], batches: Sequence[torch.Tensor], count: int
) -> dict[int, torch.Tensor]:
    """Run the model and keep what the experts of every layer receive (T, D), of tokens that are evenly spread."""
    wanted = torch.arange(count) * sum(batch.numel() for batch in batches) // count
    kept: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in layers}
    read = dict.fromkeys(kept, 0)

    def keep(layer: MoeLayer, choices: Choices) -> None:
        begin, hidden = read[layer.index], choices.hidden_states
        rows = wanted[(wanted >= begin) & (wanted < begin + len(hidden))] - begin
        kept[layer.index].append(hidden[rows.to(hidden.device)].clone())
        read[layer.index] = begin + len(hidden)

    for _ in watched_batches(model, batches, keep):
        pass
    return {index: torch.cat(parts) for index, parts in kept.items()}


def _outputs_of(experts: nn.Module, hidden_states: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Compute what every expert gives for all tokens, (E, T, D)."""
    ones = hidden_states.new_ones((len(hidden_states), 1))
    choices = [torch.full_like(ones, expert, dtype=torch.long) for expert in range(num_experts)]
    return torch.stack([experts(hidden_states, *as_two_choices(ids, ones)) for ids in choices])


def _sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how alike experts are, as a mean over the layers."""
    if any(row["mean"] is None for row in rows):
        return ""
    mean, nearest = (sum(row[key] for row in rows) / len(rows) for key in ("mean", "nearest"))
    return f"Mean cosine of two experts {mean:.3f}, of an expert and the one most like it {nearest:.3f}."


def _summary(table: torch.Tensor) -> dict[str, Any]:
    """Return a table of cosines, the mean of the pairs, and the mean over the experts of the one most alike.

    Pairs that are NaN have no part, and are `None`.
    """
    known = ~torch.eye(len(table), dtype=torch.bool, device=table.device) & ~table.isnan()
    nearest = table.masked_fill(~known, float("-inf")).amax(dim=1)
    several = bool(known.any())
    return {
        "mean": float(table[known].mean()) if several else None,
        "nearest": float(nearest[known.any(dim=1)].mean()) if several else None,
        "table": [[None if value != value else round(value, 4) for value in row] for row in table.tolist()],
    }


__all__ = ["cosines", "cosines_of_weights", "mean_cosines", "measure_outputs", "measure_weights"]
