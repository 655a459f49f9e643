# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What an adapter changes of its base: found by name, added in float32, and checked in float64."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modeling_deepseekmoe.checkpoint_layout import BIAS_NAME, STACKS
from modeling_deepseekmoe.conversion.adapters.files import (
    LowRank,
    is_stack,
    per_expert_parts,
    read_adapter,
    split_expert,
)
from modeling_deepseekmoe.esft.files import WEIGHTS_NAME as ESFT_WEIGHTS_NAME
from modeling_deepseekmoe.esft.files import read_esft

_ROUNDING = 1e-6  # relative error of what is computed in float32
_MOST_LOST = 0.75  # of what an adapter changes
_INPUTS = 8

Shapes = dict[str, tuple[int, ...]]


class MergingError(RuntimeError):
    """The merged checkpoint does not compute what the base and the adapter compute."""


@dataclass
class Change:
    """Changes of one weight of the base: low-rank sums and replacements, each at a place inside it."""

    sums: list[tuple[Any, LowRank]] = field(default_factory=list)
    replacements: list[tuple[Any, torch.Tensor]] = field(default_factory=list)

    @property
    def is_nothing(self) -> bool:
        """Whether it changes nothing: factors of zeros, as experts have that an adapter leaves out."""
        zeros = all(not part.factor_a.any() or not part.factor_b.any() for _, part in self.sums)
        return zeros and not self.replacements


def plan_changes(adapter: Path, shapes: Shapes) -> tuple[dict[str, Change], int]:
    """Plan the changes of the base's weights. Also return the number of the adapter's tensors.

    Args:
        adapter: folder of a LoRA adapter, or of `save_esft`.
        shapes: shapes of the base's weights, by name.

    Raises:
        ValueError: if a tensor of the adapter has no place in the base, or another shape there. The message names it.
        OSError: if a file is missing.
    """
    changes: dict[str, Change] = {}
    updates: dict[str, LowRank] = {}
    if (adapter / ESFT_WEIGHTS_NAME).is_file():
        replacements = read_esft(adapter)
        sources = {name: name for name in replacements}
        rows, number = {}, len(replacements)
    else:
        content = read_adapter(adapter)
        updates, replacements, sources = content.updates, content.replacements, content.sources
        rows, number = content.rows, 2 * len(content.updates) + len(content.others)
    for target, tensor in replacements.items():
        name, place = _locate(target, shapes)
        _check_shape(name, place, tuple(tensor.shape), sources[target], shapes)
        changes.setdefault(name, Change()).replacements.append((place, tensor))
    for name, (indices, tensor) in rows.items():
        if name in shapes and max(indices) >= shapes[name][0]:
            raise ValueError(_mismatch(sources[name], f"token {max(indices)}", name, shapes))
        _check_shape(name, indices, tuple(tensor.shape), sources[name], shapes)
        changes.setdefault(name, Change()).replacements.append((indices, tensor))
    for target, update in updates.items():
        for name, place, part in _parts(target, update, shapes):
            _check_shape(name, place, part.shape, update.sources[0], shapes)
            changes.setdefault(name, Change()).sums.append((place, part))
    if not changes:
        raise ValueError(f"{adapter} is not allowed as an adapter: it holds no tensors.")
    return changes, number


def check_tied(base: Path, changes: dict[str, Change]) -> None:
    """Raise ValueError if one of two tied weights would change alone."""
    config = base / "config.json"
    tied = config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("tie_word_embeddings")
    for name, change in changes.items():
        whole = change.sums or any(not isinstance(place, list) for place, _ in change.replacements)
        if tied and whole and name.endswith(("embed_tokens.weight", "lm_head.weight")):
            raise ValueError(
                f"An adapter of {name} is not allowed for a base with tie_word_embeddings=true: embedding and head "
                "are one weight there, and a merged checkpoint cannot change one of them alone."
            )


def _parts(target: str, update: LowRank, shapes: Shapes) -> list[tuple[str, Any, LowRank]]:
    """Divide an update into two-dimensional parts: name of the base's weight, place inside it, part."""
    if not is_stack(target):
        name, place = _locate(target, shapes)
        return [(name, place, update)]
    number = len(update.factor_b)
    if target in shapes:
        if shapes[target][0] != number:
            raise ValueError(_mismatch(update.sources[0], f"{number} experts", target, shapes))
        return [(target, expert, update.part(expert)) for expert in range(number)]
    experts = target.rsplit(".", 1)[0]
    if f"{experts}.{number}.down_proj.weight" in shapes:
        raise ValueError(f"Adapter tensor {update.sources[0]} is of {number} experts: the base has more in {experts}.")
    return [(name, (), part) for name, part in per_expert_parts(target, update).items()]


def _locate(target: str, shapes: Shapes) -> tuple[str, Any]:
    """Find a weight in the base: its name, and the place inside it.

    For an expert's weight, the place may be a part of a stack.
    """
    parts = split_expert(target.removesuffix(".weight"))
    if target in shapes or parts is None:
        return target, ()
    experts, expert, projection = parts
    stack = next(name for name, projections in STACKS.items() if projection in projections)
    name = f"{experts}.{stack}"
    if name not in shapes:
        return target, ()
    rows = shapes[name][1] // len(STACKS[stack])
    half = STACKS[stack].index(projection)
    return name, (expert, slice(half * rows, (half + 1) * rows))


def _check_shape(name: str, place: Any, shape: tuple[int, ...], source: str, shapes: Shapes) -> None:
    fits = name in shapes
    if fits:
        try:
            fits = tuple(torch.empty(shapes[name], device="meta")[place].shape) == tuple(shape)
        except IndexError:
            fits = False
    if not fits:
        raise ValueError(_mismatch(source, f"a weight of shape {tuple(shape)}", name, shapes))


def _mismatch(source: str, found: str, name: str, shapes: Shapes) -> str:
    base = f"{name} of shape {shapes[name]}" if name in shapes else f"no weight {name}"
    hint = ""
    if name not in shapes:
        if name.endswith("lm_head.weight"):
            hint = " Is its head tied to the embedding?"
        elif f"model.{name}" in shapes:
            hint = f" It has model.{name}: the adapter is of a model without a head."
        elif name.endswith(BIAS_NAME):
            hint = (
                " Was it trained after add_balancing_bias? Then do that with the base too, save_pretrained it, and "
                "merge into that folder."
            )
        elif ".experts." in name or ".gate." in name:
            hint = (
                " Is it of this base? The files of some other families have names of their own: merge these in "
                "Python, by merge_and_unload() or load_esft(model, folder), and save_pretrained."
            )
    elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
        hint = (
            " The adapter was trained after resize_token_embeddings: load the base, resize it in the same way, "
            "save_pretrained it, and merge into that folder."
        )
    return f"Adapter tensor {source} is for {found}, which is not allowed: the base has {base}.{hint}"


# -------------------------------------------------------------------------------------------- the sums and their check
def merged(weight: torch.Tensor, change: Change) -> torch.Tensor:
    """Return a copy of a weight with its changes. Sums are taken in float32, and rounded to its dtype."""
    weight = weight.clone()
    for place, tensor in change.replacements:
        weight[place] = tensor.to(weight.dtype)
    for place, part in change.sums:
        delta = part.scaling * (part.factor_b.float() @ part.factor_a.float())
        weight[place] = (weight[place].float() + delta).to(weight.dtype)
    return weight


@dataclass
class Losses:
    """How far merged outputs are from unmerged ones, on random inputs.

    Attributes:
        layer_errors: for every decoder layer, the largest relative error of an output, by the norm. The key -1 stands
            for weights outside the layers.
        generator: for the inputs.
    """

    layer_errors: dict[int, float] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    _squares: dict[str, tuple[float, float]] = field(default_factory=dict)  # of differences, and of changes

    @property
    def lost(self) -> float:
        """How far rounding is off, as a share of what the adapter changes, by the norm."""
        return max(self._shares().values(), default=0.0)

    def _shares(self) -> dict[str, float]:
        return {kind: (off / changed) ** 0.5 for kind, (off, changed) in self._squares.items() if changed}

    def note(
        self, layer: int, kind: str, difference: torch.Tensor, changed: torch.Tensor, whole: torch.Tensor
    ) -> float:
        """Note the outputs of a weight.

        Args:
            layer: the decoder layer, or -1.
            kind: the format or dtype that the weight is written in.
            difference, changed, whole: how far the outputs are off, what the adapter changes, and all of it.

        Returns:
            The relative error.
        """
        off, before = self._squares.get(kind, (0.0, 0.0))
        self._squares[kind] = off + float(difference.norm()) ** 2, before + float(changed.norm()) ** 2
        error = float(difference.norm() / whole.norm().clamp_min(torch.finfo(torch.float64).tiny))
        self.layer_errors[layer] = max(self.layer_errors.get(layer, 0.0), error)
        return error

    def inputs(self, width: int) -> torch.Tensor:
        """Draw inputs (n, width) in float64."""
        return torch.randn(_INPUTS, width, generator=self.generator, dtype=torch.float64)

    def check(self) -> None:
        """Refuse a result in which rounding has swallowed the adapter.

        Raises:
            MergingError: with the figures.
        """
        for kind, share in self._shares().items():
            if share > _MOST_LOST:
                worst = max(self.layer_errors.values())
                raise MergingError(
                    f"Rounding to {kind} is off by {share:.2f} times what the adapter changes, in the outputs on "
                    f"random inputs, and at most {_MOST_LOST:g} is allowed: the merged model would hardly differ from "
                    f"its base, or differ at random (largest relative error of a weight's outputs: {worst:.1e}). "
                    "Merge into a dtype with more bits, or keep the adapter beside the base."
                )


def check_sum(name: str, base: torch.Tensor, found: torch.Tensor, part: LowRank, losses: Losses, layer: int) -> None:
    """Check every value of a sum, and note its outputs on random inputs.

    In float64: `x W + s (x A) B` against `x W'`, and `W'` within half a unit in the last place of `W + s B A`.

    Raises:
        MergingError: if a value is another one.
    """
    factor_a, factor_b = part.factor_a.double(), part.factor_b.double() * part.scaling
    wanted = base.double() + factor_b @ factor_a
    rounding = (torch.finfo(found.dtype).eps / 2 + _ROUNDING) * wanted.abs()
    rounding += _ROUNDING * (factor_b.abs() @ factor_a.abs() + base.abs()) + torch.finfo(found.dtype).tiny
    wrong = int((~((found.double() - wanted).abs() <= rounding)).sum())
    inputs = losses.inputs(part.shape[1])
    changed = (inputs @ factor_a.t()) @ factor_b.t()
    expected = inputs @ base.double().t() + changed
    kind = str(found.dtype).removeprefix("torch.")
    error = losses.note(layer, kind, inputs @ found.double().t() - expected, changed, expected)
    if wrong:
        raise MergingError(
            f"{name}: {wrong} of {wanted.numel()} merged values are not the rounded sum of base and adapter; on "
            f"random inputs merged and unmerged outputs differ by {error:.1e}."
        )


__all__ = ["Change", "Losses", "MergingError", "Shapes", "check_sum", "check_tied", "merged", "plan_changes"]
