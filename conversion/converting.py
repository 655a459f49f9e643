# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Convert checkpoints to another dialect, layout or dtype, streamed from one folder to another."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling_deepseekmoe.checkpoint_layout import BIAS_NAME
from modeling_deepseekmoe.configuration import list_presets, load_preset
from modeling_deepseekmoe.configuration_deepseekmoe import DeepseekMoeConfig, without_model_classes
from modeling_deepseekmoe.conversion.block_fp8 import BLOCK
from modeling_deepseekmoe.conversion.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    TensorSource,
    listed,
    read_index,
    small_files,
)
from modeling_deepseekmoe.conversion.description import (
    QUANT_METHOD,
    Description,
    as_config,
    planned,
    read_config,
    understand,
)
from modeling_deepseekmoe.conversion.dialects import architectures_of, check_dialect, check_same, translate
from modeling_deepseekmoe.conversion.streaming import Constant, Output
from modeling_deepseekmoe.conversion.targets import FOUR_BITS, Target, Tensors, outputs, outputs_of, plain
from modeling_deepseekmoe.conversion.tensor_table import entries
from modeling_deepseekmoe.conversion.writing import FolderPlan, make_shards, say_nothing, write_folder
from modeling_deepseekmoe.remote_code import CODE_VERSION
from modeling_deepseekmoe.support.folders import local_folder

LAYOUTS = ("per-expert", "stacked")
STORED_DTYPES = ("keep", "float32", "bfloat16", "float16", "fp8", *FOUR_BITS)
_FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK),
}


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write. It is made without reading a weight.

    Attributes:
        source: what is read. It is a plan of names and shapes if the weights are not there.
        folder: what is written.
        dialect, layout, dtype: as asked for, or else the source's own.
        notes: what the user should know.
        has_weights: whether the source's weights are there.
    """

    source: TensorSource
    folder: FolderPlan
    dialect: str
    layout: str
    dtype: str
    notes: tuple[str, ...]
    has_weights: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files. The `progress` of [`convert`] adds up to this."""
        return sum(shard.nbytes for shard in self.folder.shards)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain numbers and strings."""
        return {
            "dialect": self.dialect,
            "layout": self.layout,
            "dtype": self.dtype,
            "source_tensors": len(self.source.tensors),
            "source_bytes": sum(tensor.nbytes for tensor in self.source.tensors.values()),
            "tensors": sum(len(shard.outputs) for shard in self.folder.shards),
            "tensors_by_dtype": self._by_dtype(),
            "files": {shard.name: shard.nbytes for shard in self.folder.shards},
            "other_files": sorted([*self.folder.texts, *self.folder.copies]),
            "bytes": self.folder.nbytes,
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        """Return the plan as lines."""
        facts = self.to_dict()
        files = [f"  {name}  {size / 1e9:,.3f} GB" for name, size in facts["files"].items()]
        if len(files) > 12:
            files = [*files[:6], f"  ... {len(files) - 12} more", *files[-6:]]
        counts = ", ".join(f"{count:,} {name}" for name, count in facts["tensors_by_dtype"].items())
        return "\n".join(
            [
                f"{facts['source_tensors']:,} tensors, {facts['source_bytes'] / 1e9:,.3f} GB "
                f"-> {facts['tensors']:,} tensors ({counts})",
                f"dialect {self.dialect}, layout {self.layout}, dtype {self.dtype}, {len(facts['files']):,} files:",
                *files,
                f"  {', '.join(facts['other_files'])}",
                f"disk needed: {facts['bytes'] / 1e9:,.3f} GB",
                *(f"note: {note}" for note in self.notes),
            ]
        )

    def _by_dtype(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for shard in self.folder.shards:
            for output in shard.outputs:
                name = str(output.dtype).removeprefix("torch.")
                counts[name] = counts.get(name, 0) + 1
        return counts


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Stop the garbage collector while a plan is made.

    It would search some hundred thousand objects, which have no cycles.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_garbage_collection()
def plan_conversion(
    source: str | Path,
    *,
    to: str | None = None,
    layout: str | None = None,
    dtype: str = "keep",
    max_shard_size: str | int = "5GB",
    drop_mtp: bool = False,
    without_weights: bool = False,
) -> ConversionPlan:
    """Plan what [`convert`] would write: every file, tensor and size. No weight is read.

    Args:
        source: folder or hub id of a checkpoint of the family. Without weights, it may also be a preset's name, or a
            folder with only a config and an index.
        to: dialect. The default is the source's.
        layout: `"per-expert"` or `"stacked"`. The default is the source's, or per-expert if the dialect changes or if
            the experts are written in four bits, which cannot be stacked.
        dtype: `"keep"`, `"float32"`, `"bfloat16"`, `"float16"`, `"fp8"` (DeepSeek-V3's blocks, for all linear layers),
            `"nf4"` or `"mxfp4"` (for the routed experts; of the rest, what is quantised becomes bfloat16).
        max_shard_size: bytes or a text such as `"5GB"`. A larger tensor gets a file of its own.
        drop_mtp: leave the multi-token-prediction layers out.
        without_weights: if the weights are not there, plan from the config, and from the index if there is one.

    Raises:
        ValueError: if an option is not allowed, if the source is damaged or does not fit its config, or if the target
            cannot express it.
        OSError: if a file is missing.
        ImportError: if bitsandbytes is needed for `"nf4"` and not installed.
    """
    _check_options(to, layout, dtype)
    folder, found, missing = _source(source, without_weights)
    dialect = to or found.config.model_type
    own = dialect == found.config.model_type and dtype not in FOUR_BITS
    layout = layout or (found.layout if own else LAYOUTS[0])
    notes = _notes_on(found, missing, drop_mtp)
    target = _target(found, dtype, notes)
    config, text = _translated_config(found, dialect, dtype, drop_mtp)
    if dialect != found.config.model_type and config.loss_alphas != found.config.loss_alphas:
        notes.append(f"balance losses in training: {found.config.loss_alphas} here, {config.loss_alphas} there")
    tensors = _tensors(found, config, layout, target, drop_mtp)
    copies = {} if folder is None else small_files(folder, code=dialect == found.config.model_type)
    origin = {
        "version": CODE_VERSION,
        "dtype": dtype,
        "source": found.source.identity if isinstance(found.source, Checkpoint) else None,
    }
    plan = FolderPlan(make_shards(tensors, max_shard_size), {CONFIG_NAME: text}, copies, origin)
    return ConversionPlan(found.source, plan, dialect, layout, dtype, tuple(notes), not missing)


def _check_options(to: str | None, layout: str | None, dtype: str) -> None:
    for field, value, allowed in (("layout", layout, (*LAYOUTS, None)), ("dtype", dtype, STORED_DTYPES)):
        if value not in allowed:
            raise ValueError(
                f"{field}={value!r} is not allowed: it must be one of {', '.join(filter(None, allowed))}."
            )
    if to is not None:
        check_dialect(to)


def _notes_on(found: Description, missing: list[str], drop_mtp: bool) -> list[str]:
    """Return notes on the source."""
    notes = []
    if missing:
        notes.append(
            f"weights that are not here: {listed(missing)}; sizes follow from the config, nothing was checked"
        )
    if found.located.derived:
        notes.append(f"{len(found.located.derived)} tensors of rotary embeddings follow from the config: left out")
    mtp = [name for name in found.located.matrices if found.wanted[name].mtp_layer is not None]
    if drop_mtp and mtp:
        notes.append(f"{len(mtp)} tensors of multi-token-prediction layers are left out")
    promised = found.config.num_nextn_predict_layers
    if promised and not mtp and found.source.tensors:
        notes.append(f"num_nextn_predict_layers={promised}, and there are no tensors of such layers")
    return notes


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    resume: bool = False,
    report: Callable[[str], None] = say_nothing,
    progress: Callable[[int], None] = say_nothing,
    **options: Any,
) -> ConversionPlan:
    """Convert a checkpoint to another dialect, layout of the experts, or dtype.

    Tensors are streamed: one file of the source is mapped at a time, and one block of a tensor is in memory. What is
    not computed is copied byte for byte, FP8 values and their scales included. Config, generation config, tokenizer
    and all other small files come along. The destination appears when it is complete.

    Args:
        source: as for [`plan_conversion`].
        destination: folder to write. It must not exist or be empty.
        resume: go on with what an interrupted run has left.
        report: receives a line for every file.
        progress: receives numbers of bytes that were written. They add up to the plan's `nbytes`.
        options: options of [`plan_conversion`]: `to`, `layout`, `dtype`, `max_shard_size`, `drop_mtp`.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: as [`plan_conversion`]; also if the destination is in use, or if the dtype cannot hold a value.
        OSError: if a file is missing, or if the disk is full or cannot be written to. What is finished is kept beside
            the destination, for `resume`.
    """
    if "without_weights" in options:
        raise TypeError("convert() takes no without_weights: that is for plans, see plan_conversion.")
    plan = plan_conversion(source, **options)
    carry_out(plan, destination, resume=resume, report=report, progress=progress)
    return plan


def carry_out(
    plan: ConversionPlan,
    destination: str | Path,
    *,
    resume: bool = False,
    report: Callable[[str], None] = say_nothing,
    progress: Callable[[int], None] = say_nothing,
) -> None:
    """Carry out a plan: the second half of [`convert`], for those who want to see the plan first."""
    if not plan.has_weights:
        raise ValueError("The plan cannot be carried out: the source's weights are not there.")
    write_folder(plan.folder, plan.source, destination, resume=resume, report=report, progress=progress)


# ---------------------------------------------------------------------------------------------------------- the source
def _source(source: str | Path, without_weights: bool) -> tuple[Path | None, Description, list[str]]:
    """Return the source's folder, what it holds, and which of its weight files are not there."""
    if without_weights and not Path(source).is_dir() and str(source) in list_presets():
        with without_model_classes():
            config = load_preset(str(source))
        return None, planned(config.to_diff_dict(), config, None), [WEIGHTS_NAME]
    folder = local_folder(source, weights=not without_weights)
    raw = read_config(folder)
    config = as_config(raw, folder)
    if without_weights:
        weight_map = read_index(folder)
        names = [WEIGHTS_NAME] if weight_map is None else sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            return folder, planned(raw, config, weight_map), missing
    return folder, understand(Checkpoint(folder), raw, config), []


# ---------------------------------------------------------------------------------------------------------- the target
def _target(found: Description, dtype: str, notes: list[str]) -> Target:
    """Return how tensors are to be written. Note what changes beside the routed experts."""
    if dtype not in FOUR_BITS:
        return Target(dtype, found.block)
    if not any(entry.stack is not None for entry in found.wanted.values()):
        raise ValueError(f"dtype={dtype!r} is not allowed: it is for routed experts, and the model has none.")
    quantised = [name for name, matrix in found.located.matrices.items() if matrix.format is not None]
    if others := sum(found.wanted[name].stack is None for name in quantised):
        notes.append(f"{others} quantised tensors that are not of routed experts become bfloat16")
    written = _quantization(found.raw.get("quantization_config"), dtype)
    return Target(dtype, found.block, written["double_quantisation"])


def _tensors(
    found: Description, config: DeepseekMoeConfig, layout: str, target: Target, drop_mtp: bool
) -> list[Output]:
    """Make the tensors of the target config from the source's."""
    wanted = found.wanted if config is found.config else entries(config, mtp=found.has_mtp)
    made: dict[str, Tensors] = {}
    used = set()
    for name, entry in wanted.items():
        matrix = found.matrix(name)
        if matrix is not None and not (entry.optional and name in found.located.absent):
            made[name] = outputs_of(entry, matrix, target)
            used.add(name)
        elif name.endswith(BIAS_NAME) and name not in found.wanted:
            made[name] = plain(entry, Constant(torch.zeros(entry.shape)))
        elif not entry.optional and name not in found.located.absent:
            raise ValueError(f"The target's config asks for {name}, which the checkpoint does not have.")
    lost = [
        name
        for name in found.located.matrices
        if name not in used and not (drop_mtp and found.wanted[name].mtp_layer is not None)
    ]
    if lost:
        raise ValueError(f"The target's config has no place for {listed(lost)}.")
    return list(outputs(wanted, made, layout, found.experts))


def _translated_config(
    found: Description, dialect: str, dtype: str, drop_mtp: bool
) -> tuple[DeepseekMoeConfig, bytes]:
    """Return the target's config, and the text of its file. Both are the source's own, except for what changes."""
    raw, config = dict(found.raw), found.config
    if dialect not in ("deepseekmoe", "deepseek_v3") and found.has_mtp and not drop_mtp:
        raise ValueError(
            f"The checkpoint cannot be expressed in dialect {dialect!r}: it has multi-token-prediction layers "
            f"(num_nextn_predict_layers={config.num_nextn_predict_layers}). Leave them out with --drop-mtp."
        )
    if dialect != config.model_type:
        raw = json.loads(translate(config, dialect).to_json_string())
        raw |= {name: found.raw[name] for name in ("quantization_config",) if name in found.raw}
    promised = raw.get("num_nextn_predict_layers", config.num_nextn_predict_layers)
    if promised and (drop_mtp or dialect not in ("deepseekmoe", "deepseek_v3")):
        raw["num_nextn_predict_layers"] = 0
    if not raw.get("architectures"):
        raw["architectures"] = architectures_of(dialect, None)
    if dtype == "fp8" or dtype in FOUR_BITS:
        raw["quantization_config"] = _quantization(raw.get("quantization_config"), dtype)
    elif dtype != "keep":
        raw.pop("quantization_config", None)
        names = [name for name in ("dtype", "torch_dtype") if name in raw] or ["torch_dtype"]
        raw |= dict.fromkeys(names, dtype)
    if raw == found.raw and isinstance(found.source, Checkpoint):
        return config, (found.source.folder / CONFIG_NAME).read_bytes()
    text = (json.dumps(raw, indent=2, sort_keys=True) + "\n").encode()
    written = config if raw == found.raw else as_config(raw)
    check_same(config, written)
    return written, text


def _quantization(stored: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
    """Return the `quantization_config` for a quantised dtype. What the source is stored in already stays as it is."""
    stored = stored or {}
    if dtype == "fp8":
        # That of a model with other linear layers than experts in FP8.
        return stored if stored.get("quant_method") == "fp8" and QUANT_METHOD not in stored else _FP8_CONFIG
    double = stored.get("double_quantisation", True) if stored.get("format") == dtype else True
    return {
        "quant_method": QUANT_METHOD,
        "format": dtype,
        "double_quantisation": double,
        "skip_layers": [],
        "compute_dtype": None,
        "linears": None,
    }


__all__ = ["LAYOUTS", "STORED_DTYPES", "ConversionPlan", "carry_out", "convert", "plan_conversion"]
