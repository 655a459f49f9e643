# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What a model's loss rises by when some of its experts may not be used.

Shape letters: L MoE layers, E routed experts, K chosen experts of a token.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from ..families.gate_rules import UnknownGateError
from ..families.moe_layers import SHARED_EXPERTS, MoeLayer
from ..routing import TooFewExpertsError
from .evaluation import RoutingTrace
from .interventions import Intervention, Rerouter, intervening, losses_of_blocks
from .routing_report import loads_of
from .sections import Section

SAME_SUM, SAME_SUM_ERROR = "rise_with_the_same_sum", "error_with_the_same_sum"
FEW_SEQUENCES = 8
LEAST_RISE = 1e-4  # nats
RATIOS = (1 / 16, 1 / 8, 3 / 16, 1 / 4)
PAPER = "arXiv 2401.06066"


@dataclass(frozen=True)
class Rise:
    """What a change adds to the loss, in nats per token.

    Attributes:
        rise: the mean over the tokens.
        error: its standard error, from the differences of the blocks; `None` for a single block.
    """

    rise: float
    error: float | None


NO_RISE = Rise(0.0, 0.0)


class Losses:
    """The loss of a model, block by block, as it is and under changes.

    Args:
        model: a causal language model.
        layers: its MoE layers.
        batches: `torch.LongTensor`s of token ids (B, S), without padding.
        progress: is called with the number of new tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[MoeLayer],
        batches: Sequence[torch.Tensor],
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.model, self.layers, self.batches, self.progress = model, layers, batches, progress
        self.rerouters: dict[int, Rerouter] = {}
        self.fixed: dict[int, str] = {}  # why the other layers keep their experts
        for layer in layers:
            try:
                self.rerouters[layer.index] = Rerouter.of(layer)
            except UnknownGateError as error:
                self.fixed[layer.index] = str(error)
        self.weights = torch.cat([torch.full((len(batch),), batch.shape[1] - 1.0) for batch in batches]).double()

    @cached_property
    def base(self) -> torch.Tensor:
        """The loss of every block, with nothing changed."""
        return self._read()

    @cached_property
    def chosen_again(self) -> Rise:
        """What choosing once more by the same rule adds: nothing, or every rise has it in it."""
        return self.rise(Intervention(at_most=self.top_k)) if self.rerouters else NO_RISE

    def _read(self) -> torch.Tensor:
        losses = losses_of_blocks(self.model, self.batches, self.progress)
        if not bool(losses.isfinite().all()):
            name, found = type(self.model).__name__, float(losses[~losses.isfinite()][0])
            raise ValueError(f"The loss of {name} on this text is {found}: nothing can be compared.")
        return losses

    def count_passes(self, ratios: Sequence[float], single_experts: int) -> int:
        """Count how often the model reads the text at most."""
        shared = sum(layer.shared_experts is not None for layer in self.layers)
        passes = 1 + (shared > 0) + (shared if single_experts else 0)
        if self.rerouters:
            experts = self.layers[0].num_experts
            masks = len(_numbers_masked(ratios, experts)) * (1 if self.all_normalise else 2)
            passes += 1 + masks + 2 * (shared > 0) + self.top_k - 1
            passes += min(single_experts, experts) * len(self.rerouters)
        return passes

    def point(self, found: Rise) -> dict[str, float | None]:
        """Return the loss with a rise, the rise and its error, as sections show them."""
        return {"loss": self.loss + found.rise, **vars(found)}

    @property
    def loss(self) -> float:
        """The mean over all tokens, in nats, with nothing changed."""
        return float((self.base * self.weights).sum() / self.weights.sum())

    def rise(self, change: Intervention, layers: Sequence[MoeLayer] | None = None) -> Rise:
        """Measure what a change in some layers, or in all, adds to the loss.

        Raises:
            TooFewExpertsError: if a token has too few experts left.
        """
        base = self.base  # read first: a compiled model keeps what it was when it was first run
        with intervening(self.layers if layers is None else layers, self.rerouters, change):
            losses = self._read()
        difference, weights = losses - base, self.weights / self.weights.sum()
        mean, count = (difference * weights).sum(), len(difference)
        variance = ((difference - mean) * weights).square().sum() * count / max(count - 1, 1)
        return Rise(float(mean), float(variance.sqrt()) if count > 1 else None)

    @property
    def why_fixed(self) -> str:
        """Why no layer's tokens can be sent to other experts; "" if some can."""
        return "" if self.rerouters else f"No token can be sent to other experts: {self._reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of the rises: few sequences, layers that keep their experts, choices that are not the
        model's.
        """
        found = []
        if len(self.weights) < FEW_SEQUENCES:
            found.append(
                f"The text has {_counted(len(self.weights), 'sequence')} only: rises and their errors mean little."
            )
        if self.fixed:
            layers = ", ".join(map(str, self.fixed))
            found.append(
                f"Of {len(self.layers)} MoE layers {len(self.fixed)} keep their experts ({layers}): {self._reason}"
            )
        if abs(self.chosen_again.rise) > LEAST_RISE:
            found.append(
                f"Choosing the same number of experts again moves the loss by {self.chosen_again.rise:+.4f} by itself "
                "(rounding, ties): smaller rises mean nothing."
            )
        return tuple(found)

    @property
    def _reason(self) -> str:
        return next(iter(self.fixed.values()))

    @property
    def all_normalise(self) -> bool:
        """Whether the weights of every token that can be sent to other experts add up to the same always."""
        return all(one.options.normalize for one in self.rerouters.values())

    @property
    def top_k(self) -> int:
        """K, the most of any layer whose tokens can be sent to other experts."""
        return max(one.options.top_k for one in self.rerouters.values())


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _rises(points: Sequence[Mapping[str, Any]], what: str) -> str:
    """Say in a few words what some changes add to the loss."""
    return ", ".join(f"{point['rise']:+.4f} with {what.format(**point)}" for point in points)


def _numbers_masked(ratios: Sequence[float], num_experts: int) -> list[int]:
    return sorted({math.floor(ratio * num_experts + 0.5) for ratio in ratios} - {0})


def measure_redundancy(losses: Losses, ratios: Sequence[float] = RATIOS) -> Section:
    """Mask the experts that each token's gate ranks highest, more and more of them."""
    section = Section(
        "redundancy",
        "Redundancy",
        "For each token the experts that its gate ranks highest are masked, in all layers, and the token goes to the "
        "next ones: the loss then. The share is that of all routed experts; once K are masked, the token has none of "
        "its own choices left. Scores are not shared out anew, unless the gate normalises: so the experts' outputs "
        "become smaller too. The rise with the same sum leaves that out: there the weights are multiplied, so that "
        "they add up to what they did before.",
        f"{PAPER}, figure 4",
        "The steeper it rises, the less the other experts know what the masked ones know: the less redundant they "
        "are. Where it falls again, groups of experts stand in for one another, as copies in an upcycled model do.",
        notes=losses.notes,
    )
    if losses.why_fixed:
        return replace(section, empty=losses.why_fixed, notes=())
    experts = losses.layers[0].num_experts
    counts = _numbers_masked(ratios, experts)
    points = [{"masked": 0, "share": 0.0, **losses.point(NO_RISE), SAME_SUM: 0.0, SAME_SUM_ERROR: 0.0}]
    notes = list(losses.notes)
    if any(ratio * experts % 1 for ratio in ratios):
        notes.append(f"Of {experts} experts {', '.join(map(str, counts)) or 'none'} are masked: shares are rounded.")
    for masked in counts:
        try:
            found = losses.rise(Intervention(masked=masked))
        except TooFewExpertsError as error:
            notes.append(f"{masked} masked: {error}")
            continue
        scaled = found if losses.all_normalise else losses.rise(Intervention(masked=masked, same_sum=True))
        same_sum = {SAME_SUM: scaled.rise, SAME_SUM_ERROR: scaled.error}
        points.append({"masked": masked, "share": masked / experts, **losses.point(found), **same_sum})
    if len(points) == 1:
        return replace(section, empty=" ".join(notes), notes=())
    figures = {"num_experts": experts, "top_k": losses.top_k, "points": points}
    rises = _rises(points[1:], "{masked} masked")
    summary = f"Each token uses {losses.top_k} of {experts}. The loss changes by {rises}."
    return replace(section, figures=figures, summary=summary, notes=tuple(notes))


def measure_shared(losses: Losses) -> Section:
    """Switch the shared experts off, with as many routed experts as before and with one more."""
    section = Section(
        "shared",
        "Shared against routed experts",
        "Loss when the shared experts of all layers give zero, and each token uses one more routed expert instead.",
        f"{PAPER}, section 4.5: 1.808 becomes 2.414 for DeepSeekMoE 2B",
        "The more it rises, the less routed experts can stand in for what the shared ones know.",
        notes=losses.notes,
    )
    if all(layer.shared_experts is None for layer in losses.layers):
        names = " or ".join(SHARED_EXPERTS)
        return replace(
            section,
            empty=f"The model has no shared experts: nothing beside the routed ones is named {names}.",
            notes=(),
        )
    cases = {"on": NO_RISE, "off": losses.rise(Intervention(shared_off=True))}
    missing = losses.why_fixed
    if not missing:
        try:
            cases["off, one more routed"] = losses.rise(Intervention(shared_off=True, more=1))
            cases["on, one more routed"] = losses.rise(Intervention(more=1))
        except TooFewExpertsError as error:
            missing = str(error)
    notes = (*losses.notes, *([f"No case with one more routed expert: {missing}"] if missing else []))
    points = [{"shared experts": case, **losses.point(found)} for case, found in cases.items()]
    summary = f"The loss changes by {_rises(points[1:], 'the shared experts {shared experts}')}."
    return replace(section, figures={"points": points}, summary=summary, notes=notes)


def measure_activation(losses: Losses) -> Section:
    """Let each token use fewer routed experts, down to one."""
    section = Section(
        "activation",
        "Fewer activated experts",
        "Loss when each token uses only the best of the experts that it would use, as if K were smaller. A gate that "
        "normalises gives them the weight of those left out; with one that does not, the experts' outputs become "
        "smaller too.",
        f"{PAPER}, figure 5",
        "Where it is flat, the model can be run with fewer experts (num_experts_per_tok in most configs), which "
        "computes less and takes the same memory; one trained with fewer would be better still.",
        notes=losses.notes,
    )
    if losses.why_fixed:
        return replace(section, empty=losses.why_fixed, notes=())
    if losses.top_k == 1:
        return replace(section, empty="K = 1: each token uses one routed expert already.", notes=())
    points = [{"activated": losses.top_k, **losses.point(NO_RISE)}]
    for top_k in range(losses.top_k - 1, 0, -1):
        points.append({"activated": top_k, **losses.point(losses.rise(Intervention(at_most=top_k)))})
    summary = f"The loss changes by {_rises(points[1:], '{activated}')}, of {losses.top_k} for each token."
    return replace(section, figures={"points": points}, summary=summary)


def measure_single_experts(losses: Losses, trace: RoutingTrace, count: int) -> Section:
    """Mask single routed experts for all tokens, and switch off the shared ones, in one layer at a time."""
    of_layer = losses.layers[0].num_experts
    count = min(count, of_layer)
    section = Section(
        "single",
        "One expert at a time",
        "Rise of the loss when one routed expert of one layer is masked for all tokens, and when the shared experts "
        "of that layer give zero. "
        + (
            f"The routed experts are {'all' if count == of_layer else f'the {count} busiest'} of each layer."
            * (count > 0)
        ),
        "",
        "A shared expert that carries common knowledge is missed more than any routed one.",
        notes=losses.notes,
    )
    if count == 0:
        return replace(section, empty="Not asked for: --single-experts N measures it.", notes=())
    if losses.why_fixed:
        return replace(section, empty=losses.why_fixed, notes=())
    rows: list[dict[str, Any]] = []
    notes = list(losses.notes)
    for loads, layer in zip(loads_of(trace), losses.layers, strict=True):
        shared = None if layer.shared_experts is None else losses.rise(Intervention(shared_off=True), [layer])
        experts = []
        busiest = loads.argsort(descending=True, stable=True)[:count].tolist()
        for expert in busiest if layer.index in losses.rerouters else []:
            try:
                found = losses.rise(Intervention(expert=expert), [layer])
            except TooFewExpertsError as error:
                notes.append(f"Layer {layer.index}, expert {expert}: {error}")
                continue
            experts.append({"expert": expert, "share": float(loads[expert] / loads.sum()), **vars(found)})
        rows.append({"layer": layer.index, "shared_off": None if shared is None else vars(shared), "experts": experts})
    figures = {"tried": count, "layers": rows}
    return replace(section, figures=figures, summary=_most_missed(rows), notes=tuple(notes))


def _most_missed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say which routed expert is missed most, and in how many layers the shared ones are missed more than any."""
    found = [(one["rise"], row["layer"], one["expert"]) for row in rows for one in row["experts"]]
    if not found:
        return ""
    rise, layer, expert = max(found)
    said = f"The routed expert missed most, of {len(found)} tried, is {expert} in layer {layer} ({rise:+.4f})."
    pairs = [
        (row["shared_off"]["rise"], max(one["rise"] for one in row["experts"]))
        for row in rows
        if row["shared_off"] is not None and row["experts"]
    ]
    if pairs:
        more = sum(shared > routed for shared, routed in pairs)
        said += f" In {more} of {_counted(len(pairs), 'layer')} the shared ones are missed more than any of them."
    return said


__all__ = [
    "RATIOS",
    "Losses",
    "Rise",
    "measure_activation",
    "measure_redundancy",
    "measure_shared",
    "measure_single_experts",
]
