# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Merge an adapter, or the experts that ESFT trained, into a copy of a checkpoint's files, and verify the result.

No model is built, and no file is read whole. Beside the adapter, one weight of the base at a time is in memory.
"""

import filecmp
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modeling_deepseekmoe.checkpoint_layout import BIAS_NAME, STACKS, layer_of
from modeling_deepseekmoe.conversion.adapters.files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    LowRank,
    is_stack,
    per_expert_parts,
    read_adapter,
    split_expert,
)
from modeling_deepseekmoe.conversion.checkpoint import MANIFEST_NAME, TEMPLATE_FOLDERS, read_header, weight_files
from modeling_deepseekmoe.esft.files import SELECTION_NAME, read_esft
from modeling_deepseekmoe.esft.files import WEIGHTS_NAME as ESFT_WEIGHTS_NAME
from modeling_deepseekmoe.support.folders import (
    FOREIGN_WEIGHTS,
    check_destination,
    local_folder,
    opened,
    unfinished_folder,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ROUNDING = 1e-6  # relative error of what is computed in float32

Shapes = dict[str, tuple[int, ...]]


class MergingError(RuntimeError):
    """The merged checkpoint does not compute what the base and the adapter compute."""


@dataclass(frozen=True)
class MergeReport:
    """What was merged and how it was verified.

    Attributes:
        weights: number of weights of the base that changed.
        tensors: number of tensors of the adapter. All of them were used.
        layer_errors: for every decoder layer that changed, the largest relative difference between the outputs of
            merged and unmerged weights on random inputs, by the norm. The key -1 stands for weights outside the
            layers.
    """

    weights: int
    tensors: int
    layer_errors: dict[int, float]

    def __str__(self) -> str:
        worst = max(self.layer_errors.values(), default=0.0)
        return (
            f"{self.tensors} adapter tensors merged into {self.weights} weights of {len(self.layer_errors)} layers; "
            f"every value is the sum, rounded; merged against unmerged on random inputs, layer by layer: largest "
            f"relative difference {worst:.1e}"
        )


@dataclass
class _Change:
    """Changes of one weight of the base: low-rank sums and replacements, each at a place inside it."""

    sums: list[tuple[Any, LowRank]] = field(default_factory=list)
    replacements: list[tuple[Any, torch.Tensor]] = field(default_factory=list)


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    destination: str | Path,
    *,
    report: Callable[[str], None] = lambda line: None,
) -> MergeReport:
    """Merge an adapter into a checkpoint.

    The result has the base's files, names, dtypes and config. Sums are taken in float32. Then every changed weight is
    read again and compared, on random inputs, with the base's and the adapter's own.

    Args:
        base: folder or hub id of a checkpoint in safetensors files, with per-expert or stacked experts.
        adapter: folder or hub id of a LoRA adapter in PEFT's or the per-expert layout, or a folder of `save_esft`.
        destination: folder to write. It must not exist or be empty. It appears only when it is complete and verified.
        report: receives a line of progress for every file.

    Raises:
        ValueError: if a tensor of the adapter has no place in the base or another shape there, if a weight of the base
            is quantised, or if the destination is in use. The message names the tensor. Nothing is written then.
        MergingError: if the verification fails. Nothing is written then.
        OSError: if a folder or file is missing.
    """
    destination = check_destination(destination)
    base, adapter = local_folder(base), local_folder(adapter)
    files = weight_files(base)
    shapes: Shapes = {}
    names_in: dict[Path, list[str]] = {}
    for file in files:
        with opened(file) as handle:
            names_in[file] = list(handle.keys())
            shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in names_in[file]}
    changes, tensors = _plan(adapter, shapes)
    _check_tied(base, changes)
    with unfinished_folder(destination) as unfinished:
        errors: dict[int, float] = {}
        for number, file in enumerate(files, start=1):
            own = {name: changes[name] for name in names_in[file] if name in changes}
            report(f"[{number}/{len(files)}] {file.name}: {len(own)} of {len(names_in[file])} weights change")
            shutil.copyfile(file, unfinished / file.name)
            _merge_file(file, unfinished / file.name, own)
            _verify_file(file, unfinished / file.name, own, errors)
        for file in base.iterdir():
            if file.is_file() and not file.name.endswith((*FOREIGN_WEIGHTS, ".safetensors", MANIFEST_NAME)):
                shutil.copyfile(file, unfinished / file.name)
        for name in TEMPLATE_FOLDERS:
            if (base / name).is_dir():
                shutil.copytree(base / name, unfinished / name)
        _report_left_out(base, adapter, report)
    return MergeReport(len(changes), tensors, dict(sorted(errors.items())))


def _report_left_out(base: Path, adapter: Path, report: Callable[[str], None]) -> None:
    """Report which files of the adapter's folder are not in the result, and whether the adapter names another base."""
    ours = (CONFIG_NAME, WEIGHTS_NAME, ESFT_WEIGHTS_NAME, SELECTION_NAME, "README.md", "training_args.bin")
    others = [file for file in adapter.iterdir() if file.is_file() and file.name not in ours]
    differ = [file.name for file in others if not _same_file(file, base / file.name)]
    if differ:
        report(f"{', '.join(sorted(differ))} of the adapter: not taken, the base's files stay. Copy what is wanted.")
    if (adapter / CONFIG_NAME).is_file():
        named = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if named and Path(named).name != base.resolve().name and named.split("/")[-1] not in str(base.resolve()):
            report(f"The adapter names {named} as its base, and this is {base}.")


def _same_file(first: Path, second: Path) -> bool:
    return second.is_file() and filecmp.cmp(first, second, shallow=False)


# ------------------------------------------------------------------------------------------------------------ the plan
def _plan(adapter: Path, shapes: Shapes) -> tuple[dict[str, _Change], int]:
    """Plan the changes of the base's weights. Also return the number of the adapter's tensors."""
    changes: dict[str, _Change] = {}
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
        changes.setdefault(name, _Change()).replacements.append((place, tensor))
    for name, (indices, tensor) in rows.items():
        if name in shapes and max(indices) >= shapes[name][0]:
            raise ValueError(_mismatch(sources[name], f"token {max(indices)}", name, shapes))
        _check_shape(name, indices, tuple(tensor.shape), sources[name], shapes)
        changes.setdefault(name, _Change()).replacements.append((indices, tensor))
    for target, update in updates.items():
        for name, place, part in _parts(target, update, shapes):
            _check_shape(name, place, part.shape, update.sources[0], shapes)
            changes.setdefault(name, _Change()).sums.append((place, part))
    if not changes:
        raise ValueError(f"{adapter} is not allowed as an adapter: it holds no tensors.")
    return changes, number


def _check_tied(base: Path, changes: dict[str, _Change]) -> None:
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


# -------------------------------------------------------------------------------------------- writing and verification
def _merge_file(source: Path, destination: Path, changes: dict[str, _Change]) -> None:
    """Overwrite the weights that change, where they lie in the copy. Names, shapes and dtypes stay."""
    offsets = {tensor.name: tensor.offset for tensor in read_header(destination)}
    with opened(source) as before, destination.open("r+b") as file:
        for name, change in changes.items():
            merged = _merged(name, before.get_tensor(name), change)
            file.seek(offsets[name])
            file.write(merged.contiguous().view(torch.uint8).numpy().tobytes())


def _merged(name: str, weight: torch.Tensor, change: _Change) -> torch.Tensor:
    if weight.dtype not in _DTYPES:
        raise ValueError(f"{name} of the base is stored as {weight.dtype}, which is not allowed: dequantise it first.")
    weight = weight.clone()
    for place, tensor in change.replacements:
        weight[place] = tensor.to(weight.dtype)
    for place, part in change.sums:
        delta = part.scaling * (part.factor_b.float() @ part.factor_a.float())
        weight[place] = (weight[place].float() + delta).to(weight.dtype)
    return weight


def _verify_file(source: Path, merged: Path, changes: dict[str, _Change], errors: dict[int, float]) -> None:
    """Read what was written and compare it with the base and the adapter. Keep the largest error of every layer."""
    generator = torch.Generator().manual_seed(0)
    with opened(source) as before, opened(merged) as after:
        for name, change in changes.items():
            old, new = before.get_tensor(name), after.get_tensor(name)
            layer = layer_of(name)
            key = -1 if layer is None else layer
            base = old.clone()
            for place, tensor in change.replacements:
                base[place] = tensor.to(old.dtype)
            if not change.sums and not torch.equal(new, base):
                raise MergingError(f"{name}: what was written is not what the adapter holds.")
            errors.setdefault(key, 0.0)
            for place, part in change.sums:
                errors[key] = max(errors[key], _error_of(name, base[place], new[place], part, generator))


def _error_of(name: str, base: torch.Tensor, merged: torch.Tensor, part: LowRank, generator: torch.Generator) -> float:
    """Compute the relative error of the outputs on random inputs, after a check of every single value.

    In float64: `x W + s (x A) B` against `x W'`, and `W'` within half a unit in the last place of `W + s B A`.
    """
    factor_a, factor_b = part.factor_a.double(), part.factor_b.double() * part.scaling
    wanted = base.double() + factor_b @ factor_a
    rounding = (torch.finfo(base.dtype).eps / 2 + _ROUNDING) * wanted.abs()
    rounding += _ROUNDING * (factor_b.abs() @ factor_a.abs() + base.abs()) + torch.finfo(base.dtype).tiny
    wrong = int((~((merged.double() - wanted).abs() <= rounding)).sum())
    inputs = torch.randn(8, part.shape[1], generator=generator, dtype=torch.float64)
    expected = inputs @ base.double().t() + (inputs @ factor_a.t()) @ factor_b.t()
    difference = inputs @ merged.double().t() - expected
    error = float(difference.norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))
    if wrong:
        raise MergingError(
            f"{name}: {wrong} of {wanted.numel()} merged values are not the rounded sum of base and adapter; on "
            f"random inputs merged and unmerged outputs differ by {error:.1e}."
        )
    return error


__all__ = ["MergeReport", "MergingError", "merge_adapter"]
