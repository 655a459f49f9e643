# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Merge an adapter, or the experts that ESFT trained, into a copy of a checkpoint's files, and verify the result.

No model is built, and no file is read whole. Beside the adapter, one weight of the base at a time is in memory. Files
of a base that is not quantised are copied, and their weights changed where they lie. Those of a quantised base are
written anew ([`quantised_bases`]).
"""

import filecmp
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling_deepseekmoe.checkpoint_layout import layer_of
from modeling_deepseekmoe.conversion.adapters.changes import (
    Change,
    Losses,
    MergingError,
    Shapes,
    check_sum,
    check_tied,
    merged,
    plan_changes,
)
from modeling_deepseekmoe.conversion.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from modeling_deepseekmoe.conversion.adapters.quantised_bases import QUANTISED, MergedFiles
from modeling_deepseekmoe.conversion.checkpoint import MANIFEST_NAME, TEMPLATE_FOLDERS, read_header, weight_files
from modeling_deepseekmoe.esft.files import SELECTION_NAME
from modeling_deepseekmoe.esft.files import WEIGHTS_NAME as ESFT_WEIGHTS_NAME
from modeling_deepseekmoe.support.folders import (
    FOREIGN_WEIGHTS,
    check_destination,
    local_folder,
    opened,
    unfinished_folder,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = ("keep", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergeReport:
    """What was merged and how it was verified.

    Attributes:
        weights: number of weights of the base that changed.
        tensors: number of tensors of the adapter. All of them were used.
        layer_errors: for every decoder layer that changed, the largest relative difference between the outputs of
            merged and unmerged weights on random inputs, by the norm. The key -1 stands for weights outside the
            layers.
        lost: how far rounding is off in these outputs, as a share of what the adapter changes, by the norm; of the
            format or dtype in which it is most.
        base, written: the formats of the base's quantised weights, and what they are written in; `None` if there are
            none.
    """

    weights: int
    tensors: int
    layer_errors: dict[int, float]
    lost: float = 0.0
    base: str | None = None
    written: str | None = None

    def __str__(self) -> str:
        worst = max(self.layer_errors.values(), default=0.0)
        how = f" of a base in {self.base}, written in {self.written}" if self.base else ""
        layers = f"{len(self.layer_errors)} layers{how}"
        return (
            f"{self.tensors} adapter tensors merged into {self.weights} weights of {layers}; "
            f"every value is the sum, rounded; merged against unmerged on random inputs, layer by layer: largest "
            f"relative difference {worst:.1e}; rounding is off by {self.lost:.1%} of what the adapter changes"
        )


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> MergeReport:
    """Merge an adapter into a checkpoint.

    Of a base that is not quantised the result has the files, names, dtypes and config. The quantised weights of
    another one (`"fp8"` in blocks, `"nf4"`, `"mxfp4"`) are decoded, and written in `dtype`. Sums are taken in float32.
    Then every changed weight is read again and compared, on random inputs, with the base's and the adapter's own.

    Args:
        base: folder or hub id of a checkpoint in safetensors files, with per-expert or stacked experts. It may be
            another one than the adapter was trained over: the same model, quantised or not.
        adapter: folder or hub id of a LoRA adapter in PEFT's or the per-expert layout, or a folder of `save_esft`.
        destination: folder to write. It must not exist or be empty. It appears only when it is complete and verified.
        dtype: of a quantised base, in what quantised weights are written: `"bfloat16"` (the default), `"float16"`,
            `"float32"`, or `"keep"` for the formats that they have.
        report: receives a line of progress for every file.

    Raises:
        ValueError: if a tensor of the adapter has no place in the base or another shape there, if a weight of the base
            is quantised in another way, if the dtype is not allowed, or if the destination is in use. The message
            names the tensor. Nothing is written then.
        MergingError: if the verification fails, or if rounding swallows the adapter: if it is off by more than 0.75
            times what the adapter changes. Nothing is written then.
        OSError: if a folder or file is missing.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not allowed: it must be one of {', '.join(DTYPES)}.")
    destination = check_destination(destination)
    base, adapter = local_folder(base), local_folder(adapter)
    files = {file: read_header(file) for file in weight_files(base)}
    if any(tensor.dtype in QUANTISED for tensors in files.values() for tensor in tensors):
        result = _merge_quantised(base, adapter, destination, dtype or "bfloat16", report)
    elif dtype in (None, "keep"):
        names = {file: {tensor.name: tensor.shape for tensor in tensors} for file, tensors in files.items()}
        result = _merge_plain(base, adapter, destination, names, report)
    else:
        raise ValueError(
            f"dtype={dtype!r} is not allowed: the base is not quantised, and the result has its dtypes. "
            "`deepseekmoe convert` changes them."
        )
    _report_left_out(base, adapter, report)
    return result


def _merge_plain(
    base: Path, adapter: Path, destination: Path, names: dict[Path, Shapes], report: Callable[[str], None]
) -> MergeReport:
    """Merge into copies of the base's files."""
    shapes = {name: shape for own in names.values() for name, shape in own.items()}
    changes, tensors = plan_changes(adapter, shapes)
    check_tied(base, changes)
    losses = Losses()
    with unfinished_folder(destination) as unfinished:
        for number, (file, own_names) in enumerate(names.items(), start=1):
            own = {name: changes[name] for name in own_names if name in changes}
            report(f"[{number}/{len(names)}] {file.name}: {len(own)} of {len(own_names)} weights change")
            shutil.copyfile(file, unfinished / file.name)
            _merge_file(file, unfinished / file.name, own)
            _verify_file(file, unfinished / file.name, own, losses)
        losses.check()
        for file in base.iterdir():
            if file.is_file() and not file.name.endswith((*FOREIGN_WEIGHTS, ".safetensors", MANIFEST_NAME)):
                shutil.copyfile(file, unfinished / file.name)
        for name in TEMPLATE_FOLDERS:
            if (base / name).is_dir():
                shutil.copytree(base / name, unfinished / name)
    return MergeReport(len(changes), tensors, dict(sorted(losses.layer_errors.items())), losses.lost)


def _merge_quantised(
    base: Path, adapter: Path, destination: Path, dtype: str, report: Callable[[str], None]
) -> MergeReport:
    """Merge into files of other tensors than the base's."""
    merging = MergedFiles(base, dtype)
    changes, tensors = plan_changes(adapter, merging.shapes)
    check_tied(base, changes)
    losses = Losses()
    with unfinished_folder(destination) as unfinished:
        merging.write(changes, unfinished, report)
        merging.verify(unfinished, losses)
        losses.check()
    weights = len(merging.changes)
    errors = dict(sorted(losses.layer_errors.items()))
    return MergeReport(weights, tensors, errors, losses.lost, merging.formats, merging.written)


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


# -------------------------------------------------------------------------------------------- writing and verification
def _merge_file(source: Path, destination: Path, changes: dict[str, Change]) -> None:
    """Overwrite the weights that change, where they lie in the copy. Names, shapes and dtypes stay."""
    offsets = {tensor.name: tensor.offset for tensor in read_header(destination)}
    with opened(source) as before, destination.open("r+b") as file:
        for name, change in changes.items():
            weight = before.get_tensor(name)
            if weight.dtype not in _DTYPES:
                raise ValueError(
                    f"{name} of the base is stored as {weight.dtype}, which is not allowed: dequantise it first."
                )
            file.seek(offsets[name])
            file.write(merged(weight, change).contiguous().view(torch.uint8).numpy().tobytes())


def _verify_file(source: Path, written: Path, changes: dict[str, Change], losses: Losses) -> None:
    """Read what was written and compare it with the base and the adapter."""
    with opened(source) as before, opened(written) as after:
        for name, change in changes.items():
            old, new = before.get_tensor(name), after.get_tensor(name)
            layer = layer_of(name)
            key = -1 if layer is None else layer
            base = old.clone()
            for place, tensor in change.replacements:
                base[place] = tensor.to(old.dtype)
            if not change.sums and not torch.equal(new, base):
                raise MergingError(f"{name}: what was written is not what the adapter holds.")
            losses.layer_errors.setdefault(key, 0.0)
            for place, part in change.sums:
                check_sum(name, base[place], new[place], part, losses, key)


__all__ = ["MergeReport", "MergingError", "merge_adapter"]
