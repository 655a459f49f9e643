# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Merge changes into a checkpoint with quantised weights: files are written anew, a weight in memory at a time.

Weights are found by the names of their tensors, so that the model may be of any family. FP8 has DeepSeek-V3's blocks.
Of a weight that changes, the decoded values and the change are added in float32, and encoded again or rounded.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from modeling_deepseekmoe.checkpoint_layout import layer_of
from modeling_deepseekmoe.conversion.adapters.changes import (
    Change,
    Losses,
    MergingError,
    Shapes,
    check_sum,
    merged,
)
from modeling_deepseekmoe.conversion.block_fp8 import (
    FP8,
    SCALE_SUFFIX,
    Block,
    block_scales,
    quantize,
    scale_shape,
)
from modeling_deepseekmoe.conversion.checkpoint import (
    CONFIG_NAME,
    Checkpoint,
    StoredTensor,
    TensorSource,
    small_files,
)
from modeling_deepseekmoe.conversion.description import fp8_block, read_config
from modeling_deepseekmoe.conversion.locating import PACKED_DTYPES, Matrix, packed_of
from modeling_deepseekmoe.conversion.matrix_formats import NF4_STATE, SUFFIXES, is_encoded
from modeling_deepseekmoe.conversion.streaming import packed_parts, values
from modeling_deepseekmoe.conversion.targets import Target, Tensors, outputs_of
from modeling_deepseekmoe.conversion.tensor_table import Entry
from modeling_deepseekmoe.conversion.writing import FolderPlan, check_space, fill_folder, make_shards

QUANTISED = (FP8, *PACKED_DTYPES)
_SHARD_SIZE = "5GB"


class MergedSource(TensorSource):
    """The weights of a checkpoint that change, in float32, computed when they are read. The last stays in memory."""

    def __init__(self, checkpoint: Checkpoint, matrices: dict[str, Matrix], changes: dict[str, Change]) -> None:
        self.checkpoint, self.matrices, self.changes = checkpoint, matrices, changes
        shapes = {name: shape_of(matrices[name]) for name in changes}
        super().__init__(StoredTensor(name, torch.float32, shape) for name, shape in shapes.items())
        self._last: tuple[str, torch.Tensor] | None = None

    def read(self, tensor: StoredTensor, first: int, last: int) -> torch.Tensor:
        """Do as [`TensorSource.read`], also for the checkpoint's own tensors."""
        if tensor.file is not None:
            return self.checkpoint.read(tensor, first, last)
        if self._last is None or self._last[0] != tensor.name:
            self._last = None
            self._last = tensor.name, self.sum_of(tensor.name).reshape(-1)
        return self._last[1][first:last]

    def base_of(self, name: str) -> torch.Tensor:
        """Decode a weight of the base, in float32."""
        return decoded(self.matrices[name], self.checkpoint)

    def sum_of(self, name: str) -> torch.Tensor:
        """Compute a weight with its change, in float32."""
        return merged(self.base_of(name), self.changes[name])


class MergedFiles:
    """The files of a quantised checkpoint with changes merged into it.

    Args:
        base: the checkpoint's folder.
        dtype: `"keep"`, or the dtype that quantised weights are written in.

    Attributes:
        shapes: shapes of all weights by name, as a model has them.
        formats, written: the names of its formats, and of what quantised weights are written in.
        changes: what is merged, without changes of nothing.

    Raises:
        ValueError: if a weight is quantised in a way that is not known here.
        OSError: if a file is missing.
    """

    def __init__(self, base: Path, dtype: str) -> None:
        self.base, self.dtype, self.raw = base, dtype, read_config(base)
        self.block = fp8_block(self.raw)
        self.checkpoint = Checkpoint(base)
        self.matrices = stored_matrices(self.checkpoint, self.block)
        self.shapes: Shapes = {name: shape_of(matrix) for name, matrix in self.matrices.items()}
        self.formats = ", ".join(sorted({one.format for one in self.matrices.values() if one.format is not None}))
        self.written = self.formats if dtype == "keep" else dtype
        self.changes: dict[str, Change] = {}

    def write(self, changes: dict[str, Change], folder: Path, report: Callable[[str], None]) -> None:
        """Write the files.

        Args:
            changes: by names of weights.
            folder: an empty folder.
            report: receives a line for every file.

        Raises:
            ValueError: if a format or dtype cannot hold a value.
            OSError: if the disk is full or cannot be written to.
        """
        self.changes = {name: change for name, change in changes.items() if not change.is_nothing}
        source = MergedSource(self.checkpoint, self.matrices, self.changes)
        encoded = {name: Target(name) for name in ("nf4", "mxfp4")}  # which keep the last matrix that they encoded
        tensors = [
            output
            for name, matrix in self.matrices.items()
            for output in self._tensors(name, matrix, source.tensors.get(name), encoded).values()
        ]
        copies = small_files(self.base, code=True)
        plan = FolderPlan(make_shards(tensors, _SHARD_SIZE), {CONFIG_NAME: self._config()}, copies)
        check_space(folder, plan)
        fill_folder(plan, source, folder, report=report)

    def _tensors(self, name: str, matrix: Matrix, changed: StoredTensor | None, encoded: dict[str, Target]) -> Tensors:
        kind = matrix.format
        # As `outputs_of` tells apart what is encoded in which format: linear layers in FP8, and experts in four bits.
        entry = Entry(name, shape_of(matrix), linear=True, stack=name if matrix.packed is not None else None)
        if changed is None:
            return outputs_of(entry, matrix, Target("keep" if kind is None else self.dtype))
        summed = Matrix.whole(changed)
        if kind is None:
            return outputs_of(entry, summed, Target(_name(matrix.tensor.dtype)))
        if self.dtype != "keep":
            return outputs_of(entry, summed, Target(self.dtype))
        if matrix.packed is None:
            return outputs_of(entry, summed, Target("fp8", self.block))
        nested = ".nested_absmax" in matrix.packed.tensors
        return outputs_of(entry, summed, replace(encoded[kind], double_quantisation=nested))

    def _config(self) -> bytes:
        if self.dtype == "keep":
            return (self.base / CONFIG_NAME).read_bytes()
        raw = {name: value for name, value in self.raw.items() if name != "quantization_config"}
        names = [name for name in ("dtype", "torch_dtype") if name in raw] or ["torch_dtype"]
        raw |= dict.fromkeys(names, self.dtype)
        return (json.dumps(raw, indent=2, sort_keys=True) + "\n").encode()

    def verify(self, folder: Path, losses: Losses) -> None:
        """Read what was written and compare it with the base and the adapter.

        Raises:
            MergingError: if a sum is wrong, or if something else was written than the sum, rounded.
        """
        written = Checkpoint(folder)
        found = stored_matrices(written, self.block)
        source = MergedSource(self.checkpoint, self.matrices, self.changes)
        for name, change in self.changes.items():
            base, total, own = source.base_of(name), source.sum_of(name), Losses()
            layer = layer_of(name)
            key = -1 if layer is None else layer
            replaced = merged(base, Change([], change.replacements))
            if not change.sums and not torch.equal(total, replaced):
                raise MergingError(f"{name}: what is merged is not what the adapter holds.")
            for place, part in change.sums:
                check_sum(name, replaced[place], total[place], part, own, key)
            if not self._is_rounded(found[name], written, total):
                raise MergingError(f"{name}: what was written is not the sum of base and adapter, rounded.")
            if base.ndim == 2:
                new, inputs = decoded(found[name], written).double(), losses.inputs(base.shape[-1])
                exact = total.double()
                expected = inputs @ exact.t()
                kind = found[name].format or _name(found[name].tensor.dtype)
                losses.note(key, kind, inputs @ (new - exact).t(), inputs @ (exact - base.double()).t(), expected)
            losses.layer_errors.setdefault(key, 0.0)

    def _is_rounded(self, matrix: Matrix, written: Checkpoint, total: torch.Tensor) -> bool:
        """Tell whether a weight that was written is a float32 one, rounded or encoded."""
        name = matrix.tensor.name
        if matrix.packed is not None:
            return is_encoded(packed_parts(matrix, written), total, name)
        if matrix.scales is None:
            stored = written.read(matrix.tensor, 0, matrix.tensor.numel)
            return torch.equal(stored, total.to(matrix.tensor.dtype).reshape(-1))
        scales = block_scales(total, self.block)
        stored = written.read(matrix.scales.tensor, 0, matrix.scales.tensor.numel)
        if not torch.equal(stored.view(scales.shape), scales):
            return False
        codes = written.read(matrix.tensor, 0, matrix.tensor.numel).view(torch.uint8)
        return torch.equal(codes, quantize(total, scales, self.block).view(torch.uint8).reshape(-1))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_of(matrix: Matrix) -> tuple[int, ...]:
    """Return the shape of a weight, as a model has it."""
    return matrix.shape if matrix.packed is not None else matrix.tensor.shape


def decoded(matrix: Matrix, source: TensorSource) -> torch.Tensor:
    """Read a whole weight in float32, in memory of its own."""
    return values(matrix, source, 0, len(matrix.rows)).to(torch.float32, copy=True).view(shape_of(matrix))


def stored_matrices(checkpoint: Checkpoint, block: Block) -> dict[str, Matrix]:
    """Find the weights of a checkpoint, each with the tensors that belong to it, by name.

    Args:
        checkpoint: of any model.
        block: rows and columns of FP8 blocks.

    Raises:
        ValueError: if a weight is quantised in a way that is not known, or in a stack.
    """
    tensors, found = checkpoint.tensors, {}
    for name, tensor in tensors.items():
        if any(suffix and name.endswith(suffix) and name.removesuffix(suffix) in tensors for suffix in SUFFIXES):
            continue
        if tensor.dtype not in QUANTISED:
            found[name] = Matrix.whole(tensor)
            continue
        if len(tensor.shape) != 2:
            raise ValueError(
                f"{name} of the base is a quantised stack of shape {tensor.shape}, which is not allowed: "
                "`deepseekmoe convert --layout per-expert` takes it apart."
            )
        if tensor.dtype in PACKED_DTYPES:
            shape = _packed_shape(checkpoint, name)
            packed = packed_of(Entry(name, shape, linear=True), tensors)
            found[name] = Matrix(tensor, range(shape[0]), range(shape[1]), packed=packed)
            continue
        scales = tensors.get(name + SCALE_SUFFIX)
        wanted = scale_shape(tensor.shape, block)
        if scales is None or scales.shape != wanted:
            beside = f"of shape {scales.shape}" if scales else "missing"
            raise ValueError(
                f"{name} of the base is stored as {tensor.dtype}, and {name}{SCALE_SUFFIX} is {beside}, which is not "
                f"allowed: blocks of {block[0]} x {block[1]} have scales of shape {wanted}."
            )
        found[name] = replace(Matrix.whole(tensor), scales=Matrix.whole(scales), block=block)
    return found


def _packed_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """Find out the shape of a matrix in four bits."""
    tensor, state = checkpoint.tensors[name], checkpoint.tensors.get(name + NF4_STATE)
    if state is None:
        return tensor.shape[0], 2 * tensor.shape[1]
    try:
        rows, columns = json.loads(bytes(checkpoint.read(state, 0, state.numel).numpy()))["shape"]
        return int(rows), int(columns)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{state.name} of the base is not allowed: it holds no shape of a matrix.") from error


__all__ = ["QUANTISED", "MergedFiles", "MergedSource", "stored_matrices"]
