# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Quantise matrices to DeepSeek-V3's FP8 format (arXiv 2412.19437, 3.3), and back.

Values are float8_e4m3, with a float32 scale for every 128 x 128 block: `weight = values * scale of its block`. The
scales of `<name>` are a tensor `<name>_scale_inv` of shape (ceil(rows / 128), ceil(columns / 128)). The last blocks of
a row or column may be smaller: `kv_a_proj_with_mqa` of the released V3 has 576 rows.
"""

import torch

FP8 = torch.float8_e4m3fn
BLOCK = (128, 128)
SCALE_SUFFIX = "_scale_inv"
_LARGEST = torch.finfo(FP8).max  # 448
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny

Block = tuple[int, int]


def scale_shape(shape: tuple[int, ...], block: Block = BLOCK) -> tuple[int, int]:
    """Return the shape of the scales of a matrix."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantize(values: torch.Tensor, scales: torch.Tensor, block: Block = BLOCK) -> torch.Tensor:
    """Compute the float32 matrix of FP8 values.

    Args:
        values (`torch.float8_e4m3fn` of shape (rows, columns)).
        scales (`torch.float32` of shape `scale_shape((rows, columns))`).
    """
    weight = values.float()
    for row, scale in enumerate(scales):
        weight[row * block[0] : (row + 1) * block[0]] *= _spread(scale, values.shape[1], block[1])
    return weight


def block_scales(weight: torch.Tensor, block: Block = BLOCK) -> torch.Tensor:
    """Compute the scales (float32, `scale_shape(weight.shape)`) of all blocks.

    A scale maps the largest value of its block to 448, the largest of the format. A block of zeros has the scale 1.
    """
    rows, columns = scale_shape(tuple(weight.shape), block)
    scales = torch.empty(rows, columns, device=weight.device)
    for row in range(rows):
        largest = weight[row * block[0] : (row + 1) * block[0]].float().abs().amax(0)
        padded = torch.nn.functional.pad(largest, (0, columns * block[1] - len(largest)))
        scales[row] = padded.view(columns, block[1]).amax(1) / _LARGEST
    return torch.where(scales == 0, 1.0, scales.clamp(min=_SMALLEST_SCALE))


def quantize(weight: torch.Tensor, scales: torch.Tensor, block: Block = BLOCK) -> torch.Tensor:
    """Round a matrix to FP8 values, to nearest.

    A value is off by at most 2**-4 of itself. If it is subnormal, it is off by at most 2**-10 of its block's scale.
    """
    values = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    for row, scale in enumerate(scales):
        rows = slice(row * block[0], (row + 1) * block[0])
        scaled = weight[rows].float() / _spread(scale, weight.shape[1], block[1])
        values[rows] = scaled.clamp_(-_LARGEST, _LARGEST).to(FP8)
    return values


def _spread(scale: torch.Tensor, columns: int, width: int) -> torch.Tensor:
    """Repeat a row of scales, one for every column."""
    return scale.repeat_interleave(width)[:columns]


__all__ = ["BLOCK", "FP8", "SCALE_SUFFIX", "block_scales", "dequantize", "quantize", "scale_shape"]
