# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Verify that a checkpoint is whole, or that two of them hold the same model, in whatever layouts and dtypes."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from modeling_deepseekmoe.checkpoint_layout import BIAS_NAME
from modeling_deepseekmoe.conversion.block_fp8 import FP8, block_scales, quantize
from modeling_deepseekmoe.conversion.checkpoint import (
    CONFIG_NAME,
    DTYPE_NAMES,
    INDEX_NAME,
    MANIFEST_NAME,
    check_inside,
    listed,
    parse_json,
)
from modeling_deepseekmoe.conversion.description import Description, describe
from modeling_deepseekmoe.conversion.dialects import architectures_of, forward_fields
from modeling_deepseekmoe.conversion.locating import PACKED_DTYPES, Matrix
from modeling_deepseekmoe.conversion.matrix_formats import is_encoded, matrix_of
from modeling_deepseekmoe.conversion.streaming import packed_parts, row_blocks, value_blocks, values
from modeling_deepseekmoe.conversion.unfinished_work import write_small
from modeling_deepseekmoe.support.folders import local_folder

IDENTICAL, ROUNDED, DEQUANTIZED, QUANTIZED = "identical", "equal after rounding", "dequantised", "quantised"
_BITS = {FP8: 8, torch.bfloat16: 16, torch.float16: 16, torch.float32: 32, torch.float64: 64}


class VerificationError(RuntimeError):
    """A checkpoint is not whole, or two of them do not hold the same model. The message lists what was found."""


@dataclass(frozen=True)
class VerificationReport:
    """What was verified. All of it holds.

    Attributes:
        tensors, nbytes: number and size of the tensors that were read.
        digest: SHA-256 over the hashes of all tensors, in the order of their names.
        manifest: `"written"`, `"checked"`, or `None` if there was none.
        compared: for a comparison, the number of tensors by how they are equal.
        notes: what else was found.
        max_logit_difference: for a comparison with logits, the largest absolute difference.
    """

    tensors: int
    nbytes: int
    digest: str
    manifest: str | None = None
    compared: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    max_logit_difference: float | None = None

    def __str__(self) -> str:
        lines = [f"{self.tensors:,} tensors, {self.nbytes / 1e9:,.3f} GB: names, shapes and values are in order"]
        lines.append(f"SHA-256 of all tensors: {self.digest}")
        if self.manifest:
            lines.append(f"manifest {MANIFEST_NAME}: {self.manifest}")
        if self.compared:
            lines.append("compared: " + ", ".join(f"{number:,} {how}" for how, number in self.compared.items()))
        if self.max_logit_difference is not None:
            lines.append(f"largest difference of the logits on random tokens: {self.max_logit_difference:.2e}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def verify(
    folder: str | Path,
    other: str | Path | None = None,
    *,
    write_manifest: bool = False,
    logits: bool = False,
    tolerance: float = 1e-3,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[[int], None] = lambda size: None,
) -> VerificationReport:
    """Check a checkpoint, and compare it with another one.

    The headers must fit the files and the index, and the tensors the config. All values must be finite. Every tensor
    is hashed, and the hashes must be those of the folder's manifest, if it has one. A comparison looks up every tensor
    of one checkpoint in the other. Both must have the same bytes; if the dtypes differ, one must be the other one
    rounded, quantised or dequantised. The configs must describe the same computation.

    Args:
        folder: folder or hub id of a checkpoint of the family.
        other: another one, of any layout, dtype and dialect.
        write_manifest: if all holds, write the hashes to `tensors.sha256.json` in the folder, instead of checking
            them.
        logits: in a comparison, also run both models on random tokens, with one layer in memory at a time.
        tolerance: largest absolute difference of the logits.
        report: receives a line at every step.
        progress: receives numbers of bytes that were read. They add up to about [`bytes_to_read`].

    Raises:
        ValueError: if the files cannot be read, or do not fit the index or the config.
        VerificationError: if they can, and something else does not hold.
        OSError: if a file is missing or cannot be written.
    """
    if logits and other is None:
        raise ValueError("logits=True is not allowed without another checkpoint to compare with.")
    path = local_folder(folder)
    found = describe(path)
    problems: list[str] = []
    report(f"Reading {len(found.source.tensors):,} tensors of {path}")
    hashes = _read_all(found, problems, progress)
    manifest = None
    if (path / MANIFEST_NAME).is_file() and not write_manifest:
        check_inside(path / MANIFEST_NAME, path)
        _check_manifest(path / MANIFEST_NAME, hashes, problems)
        manifest = "checked"
    notes = (*_index_notes(path, _size(found)), *_config_notes(found))
    result = VerificationReport(len(hashes), _size(found), _digest(hashes), manifest, notes=notes)
    if other is not None and not problems:
        report(f"Comparing with {other}")
        second = describe(local_folder(other))
        compared, more = _compare(found, second, problems, progress)
        result = replace(result, compared=compared, notes=(*notes, *more))
        if logits and not problems:
            report("Running both models on random tokens")
            result = replace(result, max_logit_difference=_compare_logits(found, second, tolerance, problems))
    if problems:
        raise VerificationError("; ".join(problems))
    if write_manifest:
        _write_manifest(path / MANIFEST_NAME, hashes)
        result = replace(result, manifest="written")
    return result


def _digest(hashes: dict[str, dict[str, Any]]) -> str:
    """Compute one hash of all hashes."""
    return hashlib.sha256("".join(hashes[name]["sha256"] for name in sorted(hashes)).encode()).hexdigest()


def bytes_to_read(folder: str | Path, other: str | Path | None = None) -> int:
    """Return what the progress of [`verify`] adds up to, except for tied weights. Raise as `verify` does."""
    size = _size(describe(local_folder(folder)))
    return size if other is None else 2 * size


def _size(found: Description) -> int:
    return sum(tensor.nbytes for tensor in found.source.tensors.values())


# ----------------------------------------------------------------------------------------------------- one checkpoint
def _read_all(found: Description, problems: list[str], progress: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """Hash every tensor, and look for values that are not finite."""
    hashes, wrong = {}, []
    for name, tensor in found.source.tensors.items():
        digest, finite = hashlib.sha256(), True
        for first, last in value_blocks(tensor.numel, tensor.dtype):
            block = found.source.read(tensor, first, last)
            digest.update(memoryview(block.view(torch.uint8).numpy()))
            if block.dtype not in PACKED_DTYPES:
                finite = finite and bool(torch.isfinite(block.float() if block.dtype.itemsize == 1 else block).all())
            progress(block.nbytes)
            del block
        if not finite:
            wrong.append(name)
        hashes[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "sha256": digest.hexdigest(),
        }
    if wrong:
        problems.append(f"values that are not finite (NaN or infinity): {_with_files(found, wrong)}")
    else:
        problems += _packed_problems(found)
    return hashes


def _packed_problems(found: Description) -> Iterator[str]:
    """Decode the matrices in four bits, and yield what is wrong with them."""
    for name, matrix in found.located.matrices.items():
        if matrix.packed is not None:
            try:
                finite = bool(torch.isfinite(values(matrix, found.source, 0, len(matrix.rows))).all())
            except ValueError as error:
                yield str(error).rstrip(".")
            else:
                if not finite:
                    yield f"{name} is decoded to values that are not finite (NaN or infinity)"


def _with_files(found: Description, names: list[str]) -> str:
    files = [found.source.tensors[name].file for name in names]
    return listed(f"{name} in {file.name if file else '?'}" for name, file in zip(names, files, strict=True))


def _write_manifest(path: Path, hashes: dict[str, dict[str, Any]]) -> None:
    content = {"config": _file_hash(path.with_name(CONFIG_NAME)), "tensors": hashes}
    write_small(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_manifest(path: Path, hashes: dict[str, dict[str, Any]], problems: list[str]) -> None:
    content = parse_json(path)
    known = content.get("tensors") if isinstance(content, dict) else None
    if not isinstance(known, dict):
        raise ValueError(f"{path.name} is not allowed: it must be JSON with an object 'tensors'.")
    if content.get("config") != _file_hash(path.with_name(CONFIG_NAME)):
        problems.append(f"{CONFIG_NAME} is not what the manifest says")
    for what, names in (
        ("not in the manifest", hashes.keys() - known.keys()),
        ("in the manifest alone", known.keys() - hashes.keys()),
        ("not what the manifest says", {name for name in hashes.keys() & known if hashes[name] != known[name]}),
    ):
        if names:
            problems.append(f"tensors {what}: {listed(sorted(names))}")


def _index_notes(folder: Path, size: int) -> Iterator[str]:
    """Yield a note if the index's total size is wrong.

    Nothing depends on it, and the released V3's is that of other files.
    """
    if (folder / INDEX_NAME).is_file():
        metadata = parse_json(folder / INDEX_NAME).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if total is not None and total != size:
            yield f"the index gives a total_size of {total}, and the tensors have {size} bytes"


def _config_notes(found: Description) -> Iterator[str]:
    """Yield notes on what other readers of the checkpoint would look for in vain, or ignore."""
    config, promised = found.config, found.config.num_nextn_predict_layers
    if promised and not found.has_mtp:
        yield (
            f"num_nextn_predict_layers={promised}, and there are no tensors of such layers: write 0 into "
            f"{CONFIG_NAME}, since readers that predict several tokens look for them"
        )
    if not found.raw.get("architectures"):
        names = json.dumps(architectures_of(config.model_type, None))
        yield f'{CONFIG_NAME} lacks a field that converters look at first: add "architectures": {names}'
    if config.model_type == "deepseek" and config.gate_normalizes:
        yield "llama.cpp ignores norm_topk_prob for model_type 'deepseek': what it computes is another model"


# --------------------------------------------------------------------------------------------------- two checkpoints
def _compare(
    first: Description, second: Description, problems: list[str], progress: Callable[[int], None]
) -> tuple[dict[str, int], list[str]]:
    _compare_configs(first, second, problems)
    compared: dict[str, int] = {}
    notes: list[str] = []
    different, alone, left_out = [], [], 0
    for name in {**first.wanted, **second.wanted}:
        here, there = first.matrix(name), second.matrix(name)
        if here is None or there is None:
            if here is None and there is None:
                continue
            found = first if there is None else second
            if found.wanted[name].mtp_layer is not None:
                left_out += 1
            elif not (name.endswith(BIAS_NAME) and not _largest(found, name)):
                alone.append(name)
        elif here.shape != there.shape:
            different.append(name)
        else:
            how = _how_equal(first, here, second, there)
            if how is None:
                different.append(name)
            else:
                compared[how] = compared.get(how, 0) + 1
        if here is not None:
            progress(here.nbytes)
    if left_out:
        notes.append(f"{left_out} tensors of multi-token-prediction layers are in one of the two alone")
    if alone:
        problems.append(f"tensors of one of the two alone: {listed(alone)}")
    if different:
        problems.append(f"tensors that differ: {listed(different)}")
    return compared, notes


def _compare_configs(first: Description, second: Description, problems: list[str]) -> None:
    here, there = forward_fields(first.config), forward_fields(second.config)
    for fields in (here, there):
        fields.pop(BIAS_NAME, None)  # compared as a tensor, and zeros where there is none
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            problems.append(f"the configs differ in {name}: {here.get(name)!r} and {there.get(name)!r}")


def _largest(found: Description, name: str) -> float:
    """Find the largest absolute value of a vector."""
    matrix = found.matrix(name)
    assert matrix is not None
    return float(values(matrix, found.source, 0, 1).abs().max())


def _how_equal(first: Description, here: Matrix, second: Description, there: Matrix) -> str | None:
    """Find out how two tensors are equal; return `None` if they are not."""
    if here.format == there.format:
        if here.format is not None or here.tensor.dtype == there.tensor.dtype:
            same = _same_packed if here.packed is not None else _same_values
            return IDENTICAL if same(first, here, second, there) else None
        return ROUNDED if _same_rounded(first, here, second, there) else None
    if (here.format is None or there.format is None) and _same_rounded(first, here, second, there):
        return DEQUANTIZED
    pairs = ((first, here, second, there), (second, there, first, here))
    quantised = any(pair[3].format is not None and _is_quantized(*pair) for pair in pairs)
    return QUANTIZED if quantised else None


def _same_values(first: Description, here: Matrix, second: Description, there: Matrix) -> bool:
    """Tell whether two tensors of one dtype have the same bytes, and the same scales if they have some."""
    if (
        here.scales is not None
        and there.scales is not None
        and (here.block != there.block or not _same_values(first, here.scales, second, there.scales))
    ):
        return False
    for start, stop in _ranges(here, there):
        if not torch.equal(_bytes(first, here, start, stop), _bytes(second, there, start, stop)):
            return False
    return True


def _same_packed(first: Description, here: Matrix, second: Description, there: Matrix) -> bool:
    """Tell whether two matrices in one format of four bits have the same codes and scales."""
    one, two = (
        matrix_of(packed_parts(matrix, found.source), matrix.tensor.name)
        for found, matrix in ((first, here), (second, there))
    )
    if (one.nested is None) != (two.nested is None):
        return False
    same_nested = one.nested is None or torch.equal(one.nested, two.nested)
    return same_nested and torch.equal(one.codes, two.codes) and torch.equal(one.scales, two.scales)


def _bytes(found: Description, matrix: Matrix, start: int, stop: int) -> torch.Tensor:
    row = matrix.rows.start
    block = found.source.read(matrix.tensor, (row + start) * matrix.width, (row + stop) * matrix.width)
    return block.view(torch.uint8)


def _same_rounded(first: Description, here: Matrix, second: Description, there: Matrix) -> bool:
    """Tell whether one of two tensors is the other one, rounded to fewer bits. What is quantised is decoded first."""

    def is_rounded(exact: tuple[Description, Matrix], rounded: tuple[Description, Matrix]) -> bool:
        dtype = rounded[1].tensor.dtype
        return all(
            torch.equal(
                values(exact[1], exact[0].source, start, stop).to(dtype),
                values(rounded[1], rounded[0].source, start, stop).to(dtype),
            )
            for start, stop in _ranges(here, there)
        )

    one, two = (first, here), (second, there)
    if here.format is not None or there.format is not None:
        return is_rounded(one, two) if here.format is not None else is_rounded(two, one)
    bits = _BITS[here.tensor.dtype] - _BITS[there.tensor.dtype]
    return (bits >= 0 and is_rounded(one, two)) or (bits <= 0 and is_rounded(two, one))


def _is_quantized(plain: Description, weight: Matrix, packed: Description, quantized: Matrix) -> bool:
    """Tell whether codes and scales are what the other tensor is quantised to."""
    if quantized.packed is not None:
        exact, parts = values(weight, plain.source, 0, len(weight.rows)), packed_parts(quantized, packed.source)
        return bool(torch.isfinite(exact).all()) and is_encoded(parts, exact, quantized.tensor.name)
    assert quantized.scales is not None
    high = quantized.block[0]
    for start, stop in _ranges(weight, quantized):
        exact = values(weight, plain.source, start, stop)
        scales = block_scales(exact, quantized.block)
        found = values(quantized.scales, packed.source, start // high, -(-stop // high))
        own = quantize(exact, scales, quantized.block).view(torch.uint8).reshape(-1)
        if not torch.equal(found, scales) or not torch.equal(own, _bytes(packed, quantized, start, stop)):
            return False
    return True


def _ranges(here: Matrix, there: Matrix) -> Iterator[tuple[int, int]]:
    """Divide rows into ranges that cut no FP8 block, and no matrix in four bits, of either tensor."""
    return row_blocks(there if there.packed else here, math.lcm(here.block[0], there.block[0]))


def _compare_logits(first: Description, second: Description, tolerance: float, problems: list[str]) -> float:
    from modeling_deepseekmoe.conversion.streamed_model import checkpoint_model, logits_of

    tokens = torch.randint(first.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    results = [logits_of(checkpoint_model(found), tokens) for found in (first, second)]
    difference = float((results[0] - results[1]).abs().max())
    if not difference <= tolerance:
        problems.append(f"the logits differ by {difference:.2e}, and {tolerance:g} is allowed")
    return difference


__all__ = ["VerificationError", "VerificationReport", "bytes_to_read", "verify"]
