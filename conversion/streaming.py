# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What the tensors to write are made of, and how their values are read and computed block by block.

Memory never holds more than one block, however large a tensor is. Where nothing is computed, a block is a range of
bytes. Else it is a number of whole rows, a multiple of the 128 rows of an FP8 block. A matrix in four bits is one
block: its tensors are only encoded and decoded together.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from modeling_deepseekmoe.conversion.block_fp8 import (
    BLOCK,
    FP8,
    Block,
    block_scales,
    dequantize,
    quantize,
    scale_shape,
)
from modeling_deepseekmoe.conversion.checkpoint import TensorSource
from modeling_deepseekmoe.conversion.locating import Matrix
from modeling_deepseekmoe.conversion.matrix_formats import (
    NF4_STATE,
    Parts,
    decode,
    encode,
    fill_state,
    layout_of,
    nested_scales,
)

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


@dataclass
class LastEncoded:
    """The last matrix that was encoded: its tensors stand one behind the other in a file.

    Attributes:
        key: which matrix it was, and how it was encoded.
        parts: its tensors.
    """

    key: object = None
    parts: Parts = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One of the tensors of a matrix in four bits.

    Attributes:
        matrix: the stored values.
        kind: `"nf4"` or `"mxfp4"`.
        suffix: which of the format's tensors.
        double_quantisation: whether the scales of `"nf4"` are quantised too.
        last: what is encoded is kept here until the next matrix is.

    Raises:
        ValueError: from `blocks`, if a value is not finite.
    """

    matrix: Matrix
    kind: str
    suffix: str
    double_quantisation: bool
    last: LastEncoded

    @property
    def dtype(self) -> torch.dtype:
        """The format's."""
        return self._layout.dtype

    @property
    def shape(self) -> torch.Size:
        """The format's."""
        return self._layout.shape

    @property
    def numel(self) -> int:
        """The format's number of values."""
        return self._layout.numel()

    @property
    def _layout(self) -> torch.Tensor:
        return layout_of(self.kind, self.matrix.shape, self._exact, self.double_quantisation)[self.suffix]

    @property
    def _exact(self) -> torch.dtype:
        """The dtype of what is encoded."""
        stored = self.matrix.tensor.dtype
        return stored if self.matrix.format is None and stored != torch.float64 else torch.float32

    def blocks(self, source: TensorSource) -> Iterator[torch.Tensor]:
        """Yield the tensor, as one block."""
        matrix = self.matrix
        if self.suffix == ".nested_absmax":  # apart from the others, since files begin with wide values
            yield nested_scales(self._values(source))
            return
        key = (matrix, self.kind, self.double_quantisation)
        if self.last.key != key:
            self.last.key, self.last.parts = None, {}
            name = f"Tensor {matrix.tensor.name}"
            self.last.parts = encode(self._values(source), self.kind, name, self.double_quantisation)
            self.last.key = key
        tensor = self.last.parts[self.suffix]
        yield fill_state(tensor, self.numel) if self.suffix == NF4_STATE else tensor.reshape(-1)

    def _values(self, source: TensorSource) -> torch.Tensor:
        read = _stored if self.matrix.format is None else values
        return read(self.matrix, source, 0, len(self.matrix.rows)).to(self._exact)


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

    Ranges are multiples of the `high` rows of an FP8 block. A matrix in four bits is one range.
    """
    high = matrix.block[0] if high is None else high
    step = max(1, BLOCK_BYTES // max(1, 4 * high * matrix.width)) * high
    if matrix.packed is not None:
        step = len(matrix.rows)
    for first in range(0, len(matrix.rows), step):
        yield first, min(first + step, len(matrix.rows))


def values(matrix: Matrix, source: TensorSource, first: int, last: int) -> torch.Tensor:
    """Read rows `first` to `last` of a matrix as float32, or as float64 if they are stored so. FP8 is dequantised.

    A matrix in four bits is decoded as a whole.

    Raises:
        ValueError: if the tensors of a matrix in four bits do not fit each other.
    """
    if matrix.packed is not None:
        parts, name = packed_parts(matrix, source), matrix.tensor.name
        decoded = decode(parts, name)
        if tuple(decoded.shape) != matrix.shape:
            raise ValueError(f"{name}{NF4_STATE} has shape={list(decoded.shape)}: {list(matrix.shape)} is allowed.")
        return decoded[first:last]
    if matrix.scales is None:
        stored = _stored(matrix, source, first, last)
        return stored.to(torch.promote_types(stored.dtype, torch.float32))
    high = matrix.block[0]
    # Copied, because the values may lie in another file.
    scales = _stored(matrix.scales, source, first // high, -(-last // high)).to(torch.float32, copy=True)
    return dequantize(_stored(matrix, source, first, last), scales, matrix.block)


def packed_parts(matrix: Matrix, source: TensorSource) -> Parts:
    """Read the tensors of a matrix in four bits into memory of their own."""
    assert matrix.packed is not None
    found = matrix.packed.tensors.items()
    return {suffix: source.read(one, 0, one.numel).clone().view(one.shape) for suffix, one in found}


def _stored(matrix: Matrix, source: TensorSource, first: int, last: int) -> torch.Tensor:
    start = matrix.rows.start
    flat = source.read(matrix.tensor, (start + first) * matrix.width, (start + last) * matrix.width)
    return flat.view(last - first, matrix.width)[:, matrix.columns.start : matrix.columns.stop]


__all__ = [
    "Cast",
    "Constant",
    "Copied",
    "Encoded",
    "LastEncoded",
    "Output",
    "Part",
    "Quantized",
    "packed_parts",
    "row_blocks",
    "value_blocks",
    "values",
]
