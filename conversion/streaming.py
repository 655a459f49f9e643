# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Plan the tensors to write: what each is made of, and how its values are read and computed block by block.

Memory never holds more than one block, however large a tensor is. Where nothing is computed, a block is a range of
bytes. Else it is a number of whole rows, a multiple of the 128 rows of an FP8 block.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from modeling_deepseekmoe.checkpoint_layout import BIAS_NAME
from modeling_deepseekmoe.conversion.block_fp8 import (
    BLOCK,
    FP8,
    SCALE_SUFFIX,
    Block,
    block_scales,
    dequantize,
    quantize,
    scale_shape,
)
from modeling_deepseekmoe.conversion.checkpoint import TensorSource
from modeling_deepseekmoe.conversion.tensor_table import Entry, Matrix, stack_shape, stacks

BLOCK_BYTES = 2**24


class Part(Protocol):
    """A piece of a tensor to write."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""

    @property
    def numel(self) -> int:
        """Number of values."""

    def blocks(self, source: TensorSource) -> Iterator[torch.Tensor]:
        """Yield the values in order, in tensors of the part's dtype. Let go of one before asking for the next."""


@dataclass(frozen=True, slots=True)
class Copied:
    """The stored values, as they are."""

    matrix: Matrix

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        return self.matrix.tensor.dtype

    @property
    def numel(self) -> int:
        """The stored number of values."""
        return math.prod(self.matrix.shape)

    def blocks(self, source: TensorSource) -> Iterator[torch.Tensor]:
        """Yield the values. Whole rows are contiguous, so that their blocks are ranges of values."""
        matrix = self.matrix
        if len(matrix.columns) != matrix.width:
            for first, last in row_blocks(matrix):
                yield _stored(matrix, source, first, last).contiguous()
            return
        start = matrix.rows.start * matrix.width
        for first, last in value_blocks(self.numel, self.dtype):
            yield source.read(matrix.tensor, start + first, start + last)


@dataclass(frozen=True, slots=True)
class Cast:
    """The stored values, multiplied by a factor and rounded to another dtype. FP8 values are dequantised.

    Raises:
        ValueError: from `blocks`, if a finite value is too large for the dtype.
    """

    matrix: Matrix
    dtype: torch.dtype
    factor: float = 1.0

    @property
    def numel(self) -> int:
        """The stored number of values."""
        return math.prod(self.matrix.shape)

    def blocks(self, source: TensorSource) -> Iterator[torch.Tensor]:
        """Yield the values, computed in float32, or in float64 if they are stored so."""
        for first, last in row_blocks(self.matrix):
            exact = values(self.matrix, source, first, last)
            cast = (exact * self.factor if self.factor != 1 else exact).to(self.dtype)
            if bool((torch.isinf(cast) & torch.isfinite(exact)).any()):
                raise ValueError(
                    f"Tensor {self.matrix.tensor.name} holds {float(exact.abs().max()):g}, which {self.dtype} cannot: "
                    f"its largest value is {torch.finfo(self.dtype).max:g}."
                )
            yield cast


@dataclass(frozen=True, slots=True)
class Quantized:
    """The stored values in DeepSeek-V3's FP8, or the scales of their blocks.

    Raises:
        ValueError: from `blocks`, if a value is not finite.
    """

    matrix: Matrix
    scales: bool
    block: Block = BLOCK

    @property
    def dtype(self) -> torch.dtype:
        """FP8, or float32 for the scales."""
        return torch.float32 if self.scales else FP8

    @property
    def numel(self) -> int:
        """Number of values, or of blocks."""
        return math.prod(scale_shape(self.matrix.shape, self.block) if self.scales else self.matrix.shape)

    def blocks(self, source: TensorSource) -> Iterator[torch.Tensor]:
        """Yield the values or the scales. The values compute the scales again, which is cheaper than to keep them."""
        for first, last in row_blocks(self.matrix, self.block[0]):
            exact = values(self.matrix, source, first, last)
            if not bool(torch.isfinite(exact).all()):
                raise ValueError(f"Tensor {self.matrix.tensor.name} holds values that are not finite: FP8 has none.")
            scales = block_scales(exact, self.block)
            yield scales if self.scales else quantize(exact, scales, self.block)


@dataclass(frozen=True)
class Constant:
    """Values that are in no file."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""
        return self.tensor.dtype

    @property
    def numel(self) -> int:
        """Number of the tensor's values."""
        return self.tensor.numel()

    def blocks(self, source: TensorSource) -> Iterator[torch.Tensor]:
        """Yield the tensor, as one block."""
        yield self.tensor.reshape(-1)


@dataclass(frozen=True)
class Output:
    """A tensor to write.

    Attributes:
        name, shape: name and shape of the tensor.
        parts: what it is made of, in the order of its values. All are of one dtype.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its values."""
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, source: TensorSource) -> torch.Tensor:
        """Read the whole tensor into memory of its own."""
        tensor, place = torch.empty(math.prod(self.shape), dtype=self.dtype), 0
        for part in self.parts:
            for block in part.blocks(source):
                tensor[place : place + block.numel()] = block.reshape(-1)
                place += block.numel()
        assert place == tensor.numel(), self.name
        return tensor.view(self.shape)

    def check(self) -> None:
        """Check that the parts fit together.

        Raises:
            ValueError: if the experts of a stack are stored in several dtypes.
        """
        dtypes = sorted({str(part.dtype) for part in self.parts})
        if len(dtypes) > 1:
            raise ValueError(
                f"{self.name} would be a stack of {' and '.join(dtypes)}, which is not allowed: choose a dtype for "
                "all of them, or layout='per-expert'."
            )
        assert sum(part.numel for part in self.parts) == math.prod(self.shape), self.name


def value_blocks(number: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Divide a number of stored values into ranges that are small enough to have in memory."""
    step = max(1, BLOCK_BYTES // dtype.itemsize)
    for first in range(0, number, step):
        yield first, min(first + step, number)


def row_blocks(matrix: Matrix, high: int | None = None) -> Iterator[tuple[int, int]]:
    """Divide rows into ranges that are small enough to compute with in float32.

    Ranges are multiples of the `high` rows of an FP8 block.
    """
    high = matrix.block[0] if high is None else high
    step = max(1, BLOCK_BYTES // max(1, 4 * high * matrix.width)) * high
    for first in range(0, len(matrix.rows), step):
        yield first, min(first + step, len(matrix.rows))


def values(matrix: Matrix, source: TensorSource, first: int, last: int) -> torch.Tensor:
    """Read rows `first` to `last` of a matrix as float32, or as float64 if they are stored so. FP8 is dequantised."""
    if matrix.scales is None:
        stored = _stored(matrix, source, first, last)
        return stored.to(torch.promote_types(stored.dtype, torch.float32))
    high = matrix.block[0]
    # Copied, because the values may lie in another file.
    scales = _stored(matrix.scales, source, first // high, -(-last // high)).to(torch.float32, copy=True)
    return dequantize(_stored(matrix, source, first, last), scales, matrix.block)


def _stored(matrix: Matrix, source: TensorSource, first: int, last: int) -> torch.Tensor:
    start = matrix.rows.start
    flat = source.read(matrix.tensor, (start + first) * matrix.width, (start + last) * matrix.width)
    return flat.view(last - first, matrix.width)[:, matrix.columns.start : matrix.columns.stop]


# -------------------------------------------------------------------------------------------------- dtypes and layouts
def parts_of(entry: Entry, matrix: Matrix, dtype: str, block: Block = BLOCK) -> tuple[Part, Part | None]:
    """Return how a tensor is written: its values and, if they are FP8, their scales.

    Args:
        entry: what the tensor is.
        matrix: where it lies.
        dtype: `"keep"`, `"fp8"` (for the linear layers; the rest is kept), or a dtype's name (for all tensors but the
            gates' bias, which is float32 in every model of the family).
        block: rows and columns of the FP8 blocks to make.
    """
    if dtype == "fp8" and entry.linear and matrix.scales is None:
        return Quantized(matrix, False, block), Quantized(matrix, True, block)
    if dtype in ("keep", "fp8"):
        return Copied(matrix), None if matrix.scales is None else Copied(matrix.scales)
    wanted = torch.float32 if entry.name.endswith(BIAS_NAME) else getattr(torch, dtype)
    if matrix.scales is None and matrix.tensor.dtype == wanted:
        return Copied(matrix), None
    return Cast(matrix, wanted), None


def outputs(
    wanted: Mapping[str, Entry], parts: Mapping[str, tuple[Part, Part | None]], layout: str, experts: int
) -> Iterator[Output]:
    """Yield the tensors to write, in the order of `wanted`.

    Args:
        wanted: all official tensors.
        parts: by official name, the values and scales of those that are written.
        layout: `"per-expert"` or `"stacked"`.
        experts: E, the number of routed experts.

    Raises:
        ValueError: if the experts of a stack would have several dtypes.
    """
    members = stacks(wanted) if layout == "stacked" else {}
    for name, entry in wanted.items():
        if entry.stack in members:
            group = [member for member in members.pop(entry.stack) if member.name in parts]
            if group:
                yield from _pair(
                    entry.stack, stack_shape(group, experts), [parts[member.name] for member in group], experts
                )
        elif name in parts and (layout != "stacked" or entry.stack is None):
            yield from _pair(name, entry.shape, [parts[name]])


def _pair(
    name: str, shape: tuple[int, ...], members: list[tuple[Part, Part | None]], experts: int = 1
) -> Iterable[Output]:
    """Make a tensor and, if it has some, its scales."""
    found = [Output(name, shape, tuple(part for part, _ in members))]
    scales = tuple(scale for _, scale in members if scale is not None)
    found[0].check()
    if scales:
        rows, columns = _scale_shape(members[0][0])
        whole = (experts, len(members) // experts * rows, columns) if len(shape) == 3 else (rows, columns)
        found.append(Output(name + SCALE_SUFFIX, whole, scales))
        found[1].check()
    return found


def _scale_shape(part: Part) -> tuple[int, int]:
    assert isinstance(part, (Copied, Quantized))
    block = part.block if isinstance(part, Quantized) else part.matrix.block
    return scale_shape(part.matrix.shape, block)


__all__ = [
    "Cast",
    "Constant",
    "Copied",
    "Output",
    "Part",
    "Quantized",
    "outputs",
    "parts_of",
    "row_blocks",
    "value_blocks",
    "values",
]
