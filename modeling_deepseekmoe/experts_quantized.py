# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Stacks of routed experts in 8 or 4 bits a weight, and how they are read.

A stack stays as it is stored. What computes with it decodes some rows of one expert at a time, into memory that the
next rows get again. So there is never a decoded copy of a stack. `quantization` makes such stacks and loads them.

Formats:
- `"nf4"` (QLoRA, arXiv 2305.14314): four bits that number the 16 quantiles of a normal distribution, and the largest
  absolute value of each block of 64 weights of a row. With double quantisation these are 8 bits wide, with a float32
  for 256 of them and an offset. bitsandbytes does the arithmetic.
- `"fp8"` (DeepSeek-V3, arXiv 2412.19437, 3.3): float8_e4m3 values and a float32 scale for each 128 x 128 block of a
  projection.
- `"mxfp4"` (OCP Microscaling Formats 1.0): float4_e2m1 values and a power of two for each block of 32 of a row.

Shape letters: E experts, I expert width, P projections one below the other (gate and up, or down alone), n rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

FORMATS = ("nf4", "fp8", "mxfp4")
NF4_BLOCK, FP8_BLOCK, MXFP4_BLOCK = 64, 128, 32
NESTED_BLOCK = 256  # scales of "nf4" that share a float32
# What a module of experts has beside its codes `gate_up_proj` and `down_proj`, and what tells the format.
SCALES, NESTED = "_scales", "_nested"
CORRECTION = ("_correction_a", "_correction_b")  # factors that give back what rounding took, if there are any
FORMAT_ATTRIBUTE, DTYPE_ATTRIBUTE = "storage_format", "compute_dtype"
# The values of float4_e2m1, by their four bits: a sign, two of the exponent and one of the fraction.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


Reader = Callable[[slice, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class QuantizedStack:
    """The matrices (E, out, in) of one stack, in one of the `FORMATS`. They have no gradient.

    Attributes:
        format (`str`).
        codes (`torch.uint8` of shape (E, out, bytes of a row)): a byte a weight, or two weights a byte: in `"nf4"` the
            first is in the upper half, in `"mxfp4"` in the lower one.
        scales: of `"nf4"` (E, out * in / 64), float32 or, with double quantisation, uint8; of `"fp8"` float32
            (E, P, ceil(out / P / 128), ceil(in / 128)); of `"mxfp4"` uint8 (E, out, in / 32), the exponent plus 127.
        nested (`torch.float32` of shape (E, P, m + 1), *optional*): of double quantisation: a number for each 256
            scales of a projection, and behind them what is added to all of its scales.
        dtype (`torch.dtype`): that of the products.
        correction (tensors (E, R, in) and (E, out, R), *optional*): A and B of B A, which is added to what the codes
            mean.
    """

    format: str
    codes: torch.Tensor
    scales: torch.Tensor
    nested: torch.Tensor | None
    dtype: torch.dtype
    correction: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        """(E, out, in)."""
        num_experts, rows, row_bytes = self.codes.shape
        return torch.Size((num_experts, rows, row_bytes if self.format == "fp8" else 2 * row_bytes))

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def __len__(self) -> int:
        return len(self.codes)

    def to(self, dtype: torch.dtype) -> "QuantizedStack":
        """Return the same stack for products in another dtype."""
        return self if dtype == self.dtype else replace(self, dtype=dtype)

    def unbind(self) -> "list[QuantizedMatrix]":
        """Return what is stored of every expert's matrix, without the correction."""
        nested = [None] * len(self) if self.nested is None else self.nested.unbind()
        parts = zip(self.codes.unbind(), self.scales.unbind(), nested, strict=True)
        return [QuantizedMatrix(self.format, *part) for part in parts]

    def new_workspace(self, number: int) -> torch.Tensor:
        """Allocate memory for the decoded matrices of so many experts."""
        return torch.empty((number, *self.shape[1:]), dtype=self.dtype, device=self.device)

    def decode(self, experts: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the matrices (n, out, in) of some experts, in the dtype of the products, or write them to `out`."""
        matrices = self.unbind()[experts]
        decoded = self.new_workspace(len(matrices)) if out is None else out
        for matrix, target in zip(matrices, decoded, strict=True):
            rows = matrix.reader()(slice(0, len(target)), target)
            if rows is not target:
                target.copy_(rows)
        if self.correction is not None:
            factor_a, factor_b = (factor[experts].to(decoded.dtype) for factor in self.correction)
            decoded.baddbmm_(factor_b, factor_a)
        return decoded


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """One expert's matrix (out, in): its part of each tensor of a [`QuantizedStack`]."""

    format: str
    codes: torch.Tensor
    scales: torch.Tensor
    nested: torch.Tensor | None

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        rows, row_bytes = self.codes.shape
        return torch.Size((rows, row_bytes if self.format == "fp8" else 2 * row_bytes))

    def __len__(self) -> int:
        return len(self.codes)

    def projections(self, number: int) -> "list[QuantizedMatrix]":
        """Return the matrices that it consists of, one below the other."""
        nested = [None] * number if self.nested is None else self.nested.split(1)
        parts = zip(self.codes.chunk(number), self.scales.chunk(number), nested, strict=True)
        return [QuantizedMatrix(self.format, *part) for part in parts]

    def reader(self) -> "Reader":
        """Return a function that decodes some rows (n, in).

        It takes them as a slice, and contiguous memory (n, in) of a floating dtype, which it may use for the result.
        """
        read = {"nf4": _read_nf4, "fp8": _read_fp8, "mxfp4": _read_mxfp4}[self.format](self)

        def rounded(rows: slice, out: torch.Tensor) -> torch.Tensor:
            if self.format == "nf4" or out.dtype == torch.float32:
                return read(rows, out)
            # Once, after the scale.
            return out.copy_(read(rows, torch.empty(out.shape, dtype=torch.float32, device=out.device)))

        return rounded


def stack_of(experts: nn.Module, name: str) -> torch.Tensor | QuantizedStack:
    """Return a stack of a module of experts: its parameter, or what its parameters mean if they are quantised."""
    codes, kind = getattr(experts, name), getattr(experts, FORMAT_ATTRIBUTE, None)
    if kind is None:
        return codes
    if codes.dtype != torch.uint8:
        raise ValueError(
            f"{type(experts).__name__}.{name} is {codes.dtype}, which is not allowed for experts in {kind!r}: the "
            "codes are uint8. Something has loaded or cast them."
        )
    # Numbers are kept as integers of the same bits: `model.to(dtype)` rounds everything that is floating.
    scales, nested = getattr(experts, name + SCALES), getattr(experts, name + NESTED, None)
    scales = scales.view(torch.float32) if scales.dtype == torch.int32 else scales
    nested = None if nested is None else nested.view(torch.float32)
    factor_a, factor_b = (getattr(experts, name + suffix, None) for suffix in CORRECTION)
    correction = None if factor_a is None or factor_b is None else (factor_a, factor_b)
    return QuantizedStack(kind, codes, scales, nested, getattr(experts, DTYPE_ATTRIBUTE), correction)


# --------------------------------------------------------------------------------------------------------------- nf4
def bitsandbytes_functional() -> Any:
    """Import the functional interface of bitsandbytes.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise ImportError(
            "format='nf4' needs bitsandbytes, which does its arithmetic: pip install 'modeling-deepseekmoe[quant]'."
        ) from error
    return functional


@functools.cache
def _dynamic_map(device: torch.device) -> torch.Tensor:
    """Return the 256 values of the scales' 8 bits."""
    return bitsandbytes_functional().create_dynamic_map().to(device)


def _read_nf4(matrix: QuantizedMatrix) -> Reader:
    functional, columns = bitsandbytes_functional(), matrix.shape[1]
    scales = matrix.scales if matrix.nested is None else _wide_scales(matrix.scales, matrix.nested)
    scales = scales.view(len(matrix), columns // NF4_BLOCK)

    def read(rows: slice, out: torch.Tensor) -> torch.Tensor:
        codes = matrix.codes[rows]
        state = functional.QuantState(
            absmax=scales[rows].reshape(-1),
            shape=torch.Size((len(codes), columns)),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=torch.float32 if out.dtype == torch.float64 else out.dtype,
        )
        return functional.dequantize_4bit(codes.reshape(-1, 1), state).to(out.dtype)

    return read


def _wide_scales(scales: torch.Tensor, nested: torch.Tensor) -> torch.Tensor:
    """Compute the float32 scales (out * in / 64,) of double quantisation."""
    functional, code = bitsandbytes_functional(), _dynamic_map(scales.device)
    return torch.cat([
        functional.dequantize_blockwise(
            of_projection, absmax=numbers[:-1].contiguous(), code=code, blocksize=NESTED_BLOCK
        )
        + numbers[-1]
        for of_projection, numbers in zip(scales.chunk(len(nested)), nested, strict=True)
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------------ fp8 and mxfp4
def _read_fp8(matrix: QuantizedMatrix) -> Reader:
    rows_of_projection = len(matrix) // len(matrix.scales)
    row = torch.arange(len(matrix), device=matrix.codes.device)
    block = row // rows_of_projection * matrix.scales.shape[1] + row % rows_of_projection // FP8_BLOCK
    scales = matrix.scales.flatten(0, 1)

    def read(rows: slice, out: torch.Tensor) -> torch.Tensor:
        return _scale(_look_up(matrix.codes[rows], "fp8", out), scales[block[rows]], FP8_BLOCK)

    return read


def _read_mxfp4(matrix: QuantizedMatrix) -> Reader:
    powers = _powers(matrix.codes.device)

    def read(rows: slice, out: torch.Tensor) -> torch.Tensor:
        exponents = matrix.scales[rows]
        scales = powers.index_select(0, exponents.reshape(-1).int()).view(exponents.shape)
        return _scale(_look_up(matrix.codes[rows], "mxfp4", out), scales, MXFP4_BLOCK)

    return read


def _scale(values: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Multiply values (n, in), in place, by scales (n, ceil(in / block)). The last block of a row may be shorter."""
    whole = values.shape[1] // block
    values[:, : whole * block].unflatten(1, (whole, block)).mul_(scales[:, :whole, None])
    if whole < scales.shape[1]:
        values[:, whole * block :].mul_(scales[:, whole:])
    return values


def _look_up(codes: torch.Tensor, kind: str, out: torch.Tensor) -> torch.Tensor:
    """Write the values of codes (n, bytes of a row) into a contiguous float32 tensor (n, in).

    Two values are read from a table at a time. Torch converts float8 to float32 ten times more slowly.
    """
    codes = codes.reshape(-1)
    if kind == "fp8":
        if codes.numel() % 2 or codes.storage_offset() % 2 or out.storage_offset() % 2:
            return out.copy_(codes.view(torch.float8_e4m3fn).view(out.shape))
        codes = codes.view(torch.uint16)
    pairs = out.view(-1).view(torch.float64)
    assert codes.numel() == pairs.numel()  # or torch would resize it
    torch.index_select(_pairs(kind, codes.device), 0, codes.int(), out=pairs)
    return out


@functools.cache
def _pairs(kind: str, device: torch.device) -> torch.Tensor:
    """Return the pairs of float32 that two bytes ("fp8") or one byte ("mxfp4") stand for, each as one float64."""
    if kind == "fp8":
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        first, second = values.repeat(256), values.repeat_interleave(256)
    else:
        values = torch.tensor(E2M1)
        first, second = values.repeat(16), values.repeat_interleave(16)
    return torch.stack([first, second], dim=1).to(device).view(torch.float64).squeeze(1)


@functools.cache
def _powers(device: torch.device) -> torch.Tensor:
    """Return the values of E8M0: powers of two from 2**-127 to 2**127, and NaN."""
    return torch.tensor([*(2.0 ** (exponent - 127) for exponent in range(255)), torch.nan], device=device)


__all__ = [
    "CORRECTION",
    "DTYPE_ATTRIBUTE",
    "E2M1",
    "FORMATS",
    "FORMAT_ATTRIBUTE",
    "FP8_BLOCK",
    "MXFP4_BLOCK",
    "NESTED",
    "NESTED_BLOCK",
    "NF4_BLOCK",
    "SCALES",
    "QuantizedMatrix",
    "QuantizedStack",
    "bitsandbytes_functional",
    "stack_of",
]
