# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""How the kernels of the routed experts read a block of a quantised matrix: as bytes, decoded in registers.

`experts_quantized` says what the formats are. What is computed here has the values of its decoders: float32, rounded
once to the dtype of the products, after the scale.

No GPU's conversion is used: the bits of a value are moved to where float16 (of float8_e4m3) or float32 (of
float4_e2m1) has them. That is the value times a power of two, without rounding, also where it is subnormal.
"""

from __future__ import annotations

from .experts_quantized import FP8_BLOCK, MXFP4_BLOCK
from .triton_support import jit, tl

_FP8_BLOCK = FP8_BLOCK if tl is None else tl.constexpr(FP8_BLOCK)
_MXFP4_BLOCK = MXFP4_BLOCK if tl is None else tl.constexpr(MXFP4_BLOCK)


@jit
def fp8_values(codes):
    """Compute 1/256 of the values of float8_e4m3. NaN stays NaN."""
    # The sign's bit comes to the places 15 and 14, of which the second one is cleared.
    bits = (codes.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -16385
    bits = tl.where((codes & 127) == 127, 32256, bits)  # the largest code, which would be 480
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@jit
def mxfp4_values(codes):
    """Compute the values of float4_e2m1, each in a byte of its own."""
    codes = codes.to(tl.uint32)
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126


@jit
def mxfp4_scales(exponents):
    """Compute the values of E8M0: powers of two, of which the smallest one is subnormal, and NaN."""
    bits = exponents.to(tl.uint32) << 23
    bits = tl.where(exponents == 0, 4194304, tl.where(exponents == 255, 2143289344, bits))
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@jit
def decode_block(
    codes,
    scales,
    row,
    there,
    first,
    COLUMNS: tl.constexpr,
    PROJECTION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Read a block (BLOCK_ROWS, BLOCK_COLUMNS) of an expert's stored matrix (out, in), as float32.

    Its columns begin with `first`, a multiple of BLOCK_COLUMNS. In a row of the block numbers in "fp8" have one scale,
    and those in "mxfp4" have whole blocks of scales. There are zeros beyond the matrix.

    Args:
        codes, scales: pointers to those of the expert.
        row, there: the rows, and which of them there are.
        COLUMNS: in.
        PROJECTION: the rows of a projection, which has blocks of scales of its own.
    """
    if FORMAT == "fp8":
        column = first + tl.arange(0, BLOCK_COLUMNS)
        exists = there[:, None] & (column < COLUMNS)[None, :]
        values = fp8_values(tl.load(codes + row[:, None] * COLUMNS + column[None, :], mask=exists, other=0))
        OF_PROJECTION: tl.constexpr = (PROJECTION + _FP8_BLOCK - 1) // _FP8_BLOCK
        OF_ROW: tl.constexpr = (COLUMNS + _FP8_BLOCK - 1) // _FP8_BLOCK
        block = row // PROJECTION * OF_PROJECTION + row % PROJECTION // _FP8_BLOCK
        scale = tl.load(scales + block * OF_ROW + first // _FP8_BLOCK, mask=there, other=0.0)
        return values * (scale * 256.0)[:, None]
    else:
        HALF: tl.constexpr = BLOCK_COLUMNS // 2
        NUMBER: tl.constexpr = BLOCK_COLUMNS // _MXFP4_BLOCK
        byte = first // 2 + tl.arange(0, HALF)
        exists = there[:, None] & (byte < COLUMNS // 2)[None, :]
        pairs = tl.load(codes + row[:, None] * (COLUMNS // 2) + byte[None, :], mask=exists, other=0)
        number = first // _MXFP4_BLOCK + tl.arange(0, NUMBER)
        exists = there[:, None] & (number < COLUMNS // _MXFP4_BLOCK)[None, :]
        exponents = tl.load(scales + row[:, None] * (COLUMNS // _MXFP4_BLOCK) + number[None, :], mask=exists, other=0)
        values = mxfp4_values(tl.join(pairs & 15, pairs >> 4))
        values = tl.reshape(values, [BLOCK_ROWS, NUMBER, _MXFP4_BLOCK]) * mxfp4_scales(exponents)[:, :, None]
        return tl.reshape(values, [BLOCK_ROWS, BLOCK_COLUMNS])


__all__ = ["decode_block"]
