# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Merging an adapter, or the experts that ESFT trained, into a checkpoint: file by file, then verified.

No model is built: at any time one file of the base and the adapter are in memory.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling_deepseekmoe.checkpoint_layout import read_shapes
from modeling_deepseekmoe.experts import LAYER
from modeling_deepseekmoe.folders import check_destination, local_folder, unfinished_folder
from modeling_deepseekmoe.selected_experts import SELECTION_NAME
from modeling_deepseekmoe.selected_experts import WEIGHTS_NAME as ESFT_WEIGHTS_NAME

from .adapter_files import STACKS, LowRank, is_stack, read_adapter, split_expert

INDEX_NAME = "model.safetensors.index.json"
_FOREIGN_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".safetensors")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COMPUTED = 1e-5  # relative error of float32 sums


class MergingError(RuntimeError):
    """The merged checkpoint does not compute what the base and the adapter compute."""


@dataclass(frozen=True)
class MergeReport:
    """What was merged and how it was verified.

    Attributes:
        weights: number of weights of the base that changed.
        tensors: number of tensors of the adapter; all of them were used.
        layer_errors: for every decoder layer that changed, the largest relative difference between the outputs of
            merged and unmerged weights on random inputs, by the norm; -1 stands for weights outside the layers.
    """

    weights: int
    tensors: int
    layer_errors: dict[int, float]

    def __str__(self) -> str:
        worst = max(self.layer_errors.values(), default=0.0)
        return (
            f"{self.tensors} adapter tensors merged into {self.weights} weights of {len(self.layer_errors)} layers; "
            f"merged against unmerged on random inputs, layer by layer: largest relative difference {worst:.1e}"
        )


@dataclass
class _Change:
    """What happens to one weight of the base: low-rank sums and replacements, each at a place inside it."""

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
        destination: folder to write; must not exist or be empty. It appears only when it is complete and verified.
        report: receives a line of progress for every file.

    Raises:
        ValueError: naming a tensor of the adapter that has no place in the base or another shape there, a weight of
            the base that is quantised, or a destination in use. Nothing is written then.
        MergingError: if the verification fails. Nothing is written then.
        OSError: if a folder or file is missing.
    """
    destination = check_destination(destination)
    base, adapter = local_folder(base), local_folder(adapter)
    files = weight_files(base)
    places = {name: file for file in files for name in read_shapes([str(file)])}
    shapes = read_shapes(map(str, files))
    changes, tensors = _plan(adapter, shapes)
    with unfinished_folder(destination) as unfinished:
        for number, file in enumerate(files, start=1):
            report(f"[{number}/{len(files)}] {file.name}")
            _merge_file(file, unfinished / file.name, changes)
        errors = _verify(places, unfinished, changes, report)
        for file in base.iterdir():
            if file.is_file() and not file.name.endswith(_FOREIGN_WEIGHTS):
                shutil.copyfile(file, unfinished / file.name)
    return MergeReport(len(changes), tensors, errors)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, from its index if it has one.

    Raises:
        ValueError: for an index that names a file outside the folder.
        OSError: if a file is missing, or there is none.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{INDEX_NAME} names {outside[0]!r}, which is not allowed: it must lie in the folder.")
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise FileNotFoundError(f"{folder} lacks {missing[0] if missing else 'any .safetensors file'}.")
    return [folder / name for name in names]


# ------------------------------------------------------------------------------------------------------------ the plan
def _plan(adapter: Path, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, _Change], int]:
    """What happens to which weights of the base, and the number of the adapter's tensors."""
    changes: dict[str, _Change] = {}
    if (adapter / SELECTION_NAME).is_file():
        updates: dict[str, LowRank] = {}
        replacements = load_file(adapter / ESFT_WEIGHTS_NAME)
        tensors = len(replacements)
    else:
        content = read_adapter(adapter)
        updates, replacements = content.updates, content.replacements
        tensors = 2 * len(updates) + len(replacements)
    for target, update in updates.items():
        for name, place, part in _parts(target, update, shapes):
            _check_shape(name, place, part.shape, f"Adapter tensor {update.sources[0]}", shapes)
            changes.setdefault(name, _Change()).sums.append((place, part))
    for target, tensor in replacements.items():
        name, place = _locate(target, shapes)
        _check_shape(name, place, tuple(tensor.shape), f"Adapter tensor {target}", shapes)
        changes.setdefault(name, _Change()).replacements.append((place, tensor))
    if not changes:
        raise ValueError(f"{adapter} is not allowed as an adapter: it holds no tensors.")
    return changes, tensors


def _parts(target: str, update: LowRank, shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, Any, LowRank]]:
    """The two-dimensional parts of an update: name of the base's weight, place inside it, part."""
    if not is_stack(target):
        name, place = _locate(target, shapes)
        return [(name, place, update)]
    experts, stack = target.rsplit(".", 1)
    number, rows = len(update.factor_b), update.factor_b.shape[1] // len(STACKS[stack])
    if target in shapes:
        if shapes[target][0] != number:
            raise ValueError(_mismatch(f"Adapter tensor {update.sources[0]}", f"{number} experts", target, shapes))
        return [(target, expert, update.part(expert)) for expert in range(number)]
    if f"{experts}.{number}.down_proj.weight" in shapes:
        raise ValueError(f"Adapter tensor {update.sources[0]} is of {number} experts: the base has more in {experts}.")
    return [
        (f"{experts}.{expert}.{projection}.weight", (), update.part(expert, slice(half * rows, (half + 1) * rows)))
        for expert in range(number)
        for half, projection in enumerate(STACKS[stack])
    ]


def _locate(target: str, shapes: dict[str, tuple[int, ...]]) -> tuple[str, Any]:
    """Where a weight is in the base: its name and the place inside, which is a part of a stack for one expert's."""
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


def _check_shape(
    name: str, place: Any, shape: tuple[int, ...], source: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    fits = name in shapes
    if fits:
        try:
            fits = tuple(torch.empty(shapes[name], device="meta")[place].shape) == tuple(shape)
        except IndexError:
            fits = False
    if not fits:
        raise ValueError(_mismatch(source, f"a weight of shape {tuple(shape)}", name, shapes))


def _mismatch(source: str, found: str, name: str, shapes: dict[str, tuple[int, ...]]) -> str:
    base = f"{name} of shape {shapes[name]}" if name in shapes else f"no weight {name}"
    return f"{source} is for {found}, which is not allowed: the base has {base}."


# -------------------------------------------------------------------------------------------- writing and verification
def _merge_file(source: Path, destination: Path, changes: dict[str, _Change]) -> None:
    tensors = {}
    with safe_open(str(source), framework="pt") as handle:
        metadata = handle.metadata()
        for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
            tensors[name] = handle.get_tensor(name)
            if name in changes:
                tensors[name] = _merged(name, tensors[name], changes[name])
    save_file(tensors, destination, metadata=metadata)


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


def _verify(
    places: dict[str, Path], merged: Path, changes: dict[str, _Change], report: Callable[[str], None]
) -> dict[int, float]:
    """The largest relative error of every layer, from what was written."""
    errors: dict[int, float] = {}
    generator = torch.Generator().manual_seed(0)
    for number, (name, change) in enumerate(changes.items(), start=1):
        if number % 1000 == 0:
            report(f"{number} of {len(changes)} weights verified")
        with (
            safe_open(str(places[name]), framework="pt") as before,
            safe_open(str(merged / places[name].name), framework="pt") as after,
        ):
            old, new = before.get_tensor(name), after.get_tensor(name)
        tolerance = max(torch.finfo(old.dtype).eps / 2, _COMPUTED)
        layer = LAYER.search(name)
        key = int(layer[1]) if layer else -1
        for place, tensor in change.replacements:
            if not torch.equal(new[place], tensor.to(new.dtype)):
                raise MergingError(f"{name}: what was written is not what the adapter holds.")
            errors.setdefault(key, 0.0)
        for place, part in change.sums:
            inputs = torch.randn(8, part.shape[1], generator=generator, dtype=torch.float64)
            inner = inputs @ part.factor_a.double().t()
            expected = inputs @ old[place].double().t() + part.scaling * (inner @ part.factor_b.double().t())
            found = inputs @ new[place].double().t()
            error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
            if not error <= tolerance:
                raise MergingError(
                    f"{name}: merged and unmerged outputs differ by {error:.1e}, more than {tolerance:.1e}."
                )
            errors[key] = max(errors.get(key, 0.0), error)
    return dict(sorted(errors.items()))


__all__ = ["MergeReport", "MergingError", "merge_adapter", "weight_files"]
