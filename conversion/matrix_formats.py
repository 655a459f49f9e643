# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Matrices in fewer bits, as the tensors that stand in files for a `<name>.weight`.

- `"nf4"`: bitsandbytes' own tensors, those of a saved `Linear4bit`. It does the arithmetic.
- `"fp8"`: DeepSeek-V3's, `<name>.weight` and `<name>.weight_scale_inv` ([`block_fp8`]).
- `"mxfp4"`: those of DeepSeek-V4's experts, `<name>.weight` with two values a byte, the first in the lower half, and
  `<name>.weight_scale_inv` with a power of two (E8M0) for each block of 32.
"""

import functools
from typing import Any

import torch

from modeling_deepseekmoe.conversion.block_fp8 import BLOCK, FP8, SCALE_SUFFIX, block_scales, quantize, scale_shape
from modeling_deepseekmoe.experts_quantized import (
    FORMATS,
    FP8_BLOCK,
    MXFP4_BLOCK,
    NESTED_BLOCK,
    NF4_BLOCK,
    QuantizedMatrix,
    bitsandbytes_functional,
)

# What stands behind `<name>.weight` in the names of a format's tensors. Longer ones first.
NF4_STATE = ".quant_state.bitsandbytes__nf4"
SUFFIXES = (NF4_STATE, ".nested_quant_map", ".nested_absmax", SCALE_SUFFIX, ".quant_map", ".absmax", "")
E8M0 = torch.float8_e8m0fnu
_E8M0_BIAS, _LARGEST_POWER, _EXPONENT_OF_E2M1 = 127, 254, 2
_AT_A_TIME = 2**18  # weights
# Above each of these a value is rounded up to the next one of float4_e2m1. At every second of them too: to even.
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

_MEAN_ROUNDING = 1e-5  # relative error of a mean in float32
_LONGEST_NUMBER = len("-2.2250738585072014e-308")

Parts = dict[str, torch.Tensor]  # tensors by suffix


def check_width(kind: str, name: str, shape: tuple[int, ...]) -> None:
    """Check that a format takes a matrix of this shape, (..., out, in).

    Raises:
        ValueError: if a row is no whole number of blocks, which only `"fp8"` allows.
    """
    block = {"nf4": NF4_BLOCK, "mxfp4": MXFP4_BLOCK}.get(kind, 1)
    if shape[-1] % block:
        raise ValueError(
            f"format={kind!r} is not allowed for {name} of shape {tuple(shape)}: its blocks of {block} lie along the "
            f"last dimension, which must be a multiple of {block}. Choose 'fp8'."
        )


def encode(weight: torch.Tensor, kind: str, name: str = "the matrix", double_quantisation: bool = True) -> Parts:
    """Quantise a matrix.

    Args:
        weight (`torch.Tensor` of shape (out, in)): of a floating dtype.
        kind: one of `FORMATS`.
        name: the name for messages.
        double_quantisation: whether the scales of `"nf4"` are quantised too.

    Returns:
        The tensors of a file, by what stands behind `<name>.weight` in their names.

    Raises:
        ValueError: for another format, a width that it does not take, or values that are not finite.
    """
    if kind not in FORMATS:
        raise ValueError(f"format={kind!r} is not allowed: one of {', '.join(FORMATS)}.")
    check_width(kind, name, tuple(weight.shape))
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} holds values that are not finite, which no format of fewer bits keeps.")
    if kind == "fp8":
        scales = block_scales(weight)
        return {"": quantize(weight, scales), SCALE_SUFFIX: scales}
    if kind == "mxfp4":
        return _encode_mxfp4(weight)
    return parts_of(_encode_nf4(weight, name, double_quantisation), weight.dtype)


def _encode_nf4(weight: torch.Tensor, name: str, double_quantisation: bool) -> QuantizedMatrix:
    """Quantise some rows after the other: on the CPU bitsandbytes needs more than 64 bytes for each weight."""
    functional, step = bitsandbytes_functional(), max(_AT_A_TIME // weight.shape[1], 1)
    found = [
        functional.quantize_4bit(rows.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        for rows in weight.split(step)
    ]
    codes = torch.cat([of_rows.view(-1, weight.shape[1] // 2) for of_rows, _ in found])
    scales, nested = torch.cat([state.absmax for _, state in found]), None
    if double_quantisation:
        offset = scales.mean()
        if not torch.isfinite(offset):
            raise ValueError(
                f"{name} holds values up to {float(weight.abs().max()):g}: their scales have no mean in float32."
            )
        scales, state = functional.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
        nested = torch.cat([state.absmax, offset.view(1)]).unsqueeze(0)
    return QuantizedMatrix("nf4", codes, scales, nested)


def nested_scales(weight: torch.Tensor) -> torch.Tensor:
    """Compute the `.nested_absmax` that [`encode`] gives, without the codes, which take fifty times as long."""
    largest = weight.float().reshape(-1, NF4_BLOCK).abs().amax(1)
    return bitsandbytes_functional().quantize_blockwise(largest - largest.mean(), blocksize=NESTED_BLOCK)[1].absmax


def _encode_mxfp4(weight: torch.Tensor) -> Parts:
    """Quantise as the OCP Microscaling Formats 1.0 do in section 6.3: to nearest, ties to even, saturating at 6."""
    blocks = weight.float().unflatten(1, (-1, MXFP4_BLOCK))
    largest = blocks.abs().amax(-1)
    powers = torch.frexp(largest).exponent - 1 - _EXPONENT_OF_E2M1  # floor(log2) less the format's own
    powers = (powers + _E8M0_BIAS).clamp(0, _LARGEST_POWER).where(largest > 0, 0)
    scaled = torch.ldexp(blocks, (_E8M0_BIAS - powers).unsqueeze(-1)).flatten(1)
    sizes, codes = scaled.abs(), scaled.signbit().to(torch.uint8) << 3
    for index, middle in enumerate(_MIDDLES):
        codes += sizes >= middle if index % 2 else sizes > middle
    codes = codes[:, ::2] | codes[:, 1::2] << 4
    return {"": codes.view(torch.int8), SCALE_SUFFIX: powers.to(torch.uint8).view(E8M0)}  # as DeepSeek-V4's


def kind_of(parts: Parts, name: str) -> str | None:
    """Tell the format of a matrix from its tensors; `None` if it is not quantised.

    Raises:
        ValueError: if they are of no format that is known here.
    """
    weight = parts[""]
    if weight.dtype == FP8 and SCALE_SUFFIX in parts:
        return "fp8"
    if NF4_STATE in parts and weight.dtype == torch.uint8:
        return "nf4"
    four_bits = {torch.int8, torch.uint8, getattr(torch, "float4_e2m1fn_x2", torch.int8)}
    if weight.dtype in four_bits and parts.keys() == {"", SCALE_SUFFIX}:
        return "mxfp4"
    if parts.keys() == {""} and weight.is_floating_point() and weight.element_size() > 1:
        return None
    others = [f"{name}{suffix}" for suffix in parts if suffix]
    beside = f"with {', '.join(others)}" if others else "without scales"
    raise ValueError(f"{name} is stored as {weight.dtype} {beside}, which is not allowed: it is of no known format.")


def matrix_of(parts: Parts, name: str) -> QuantizedMatrix:
    """Read the tensors of a quantised matrix.

    Raises:
        ValueError: if they do not fit each other, or have other blocks than those of this package.
    """
    kind, weight = kind_of(parts, name), parts[""]
    if kind == "nf4":
        return _nf4_matrix(parts, name)
    if kind not in ("fp8", "mxfp4"):
        raise ValueError(f"{name} is stored as {weight.dtype}: it is not quantised.")
    codes, scales = weight.view(torch.uint8), parts[SCALE_SUFFIX]
    shape = (len(codes), codes.shape[1] * (1 if kind == "fp8" else 2))
    expected = scale_shape(shape) if kind == "fp8" else (shape[0], shape[1] // MXFP4_BLOCK)
    check_width(kind, name, shape)
    if tuple(scales.shape) != expected:
        block = BLOCK if kind == "fp8" else (1, MXFP4_BLOCK)
        raise ValueError(
            f"{name}{SCALE_SUFFIX} has the shape {tuple(scales.shape)}, which is not allowed for a matrix of {shape}: "
            f"blocks of {block[0]} x {block[1]} have {expected} scales."
        )
    if kind == "mxfp4":
        if scales.dtype not in (E8M0, torch.uint8):
            raise ValueError(f"{name}{SCALE_SUFFIX} is stored as {scales.dtype}, which is not allowed: E8M0 or uint8.")
        return QuantizedMatrix(kind, codes, scales.view(torch.uint8), None)
    return QuantizedMatrix(kind, codes, scales.to(torch.float32).unsqueeze(0), None)


def _nf4_matrix(parts: Parts, name: str) -> QuantizedMatrix:
    functional = bitsandbytes_functional()
    named = {f"weight{suffix}": tensor for suffix, tensor in parts.items() if suffix}
    state = functional.QuantState.from_dict(dict(named), parts[""].device)
    shape, nested = tuple(state.shape), None
    blocks = {"blocksize": (state.blocksize, NF4_BLOCK)}
    maps = [(state.code, functional.get_4bit_type("nf4", device="cpu"))]
    if state.nested:
        blocks["nested_blocksize"] = (state.state2.blocksize, NESTED_BLOCK)
        maps.append((state.state2.code, functional.create_dynamic_map()))
        nested = torch.cat([state.state2.absmax, state.offset.view(1)]).unsqueeze(0)
    for field, (found, wanted) in blocks.items():
        if found != wanted:
            raise ValueError(f"{name} has {field}={found}, which is not allowed: it must be {wanted}.")
    if any(not torch.equal(found.cpu(), wanted.cpu()) for found, wanted in maps):
        raise ValueError(f"{name} has another table of values than bitsandbytes' nf4, which is not allowed.")
    check_width("nf4", name, shape)
    return QuantizedMatrix("nf4", parts[""].view(shape[0], shape[1] // 2), state.absmax, nested)


def parts_of(matrix: QuantizedMatrix, dtype: torch.dtype) -> Parts:
    """Return the tensors of a file for a matrix, as [`encode`] does.

    Args:
        matrix: of one projection.
        dtype: the dtype that `"nf4"` notes for what is decoded.
    """
    if matrix.format == "fp8":
        return {"": matrix.codes.view(FP8), SCALE_SUFFIX: matrix.scales.squeeze(0)}
    if matrix.format == "mxfp4":
        return {"": matrix.codes.view(torch.int8), SCALE_SUFFIX: matrix.scales.view(E8M0)}
    functional = bitsandbytes_functional()
    options: dict[str, Any] = {}
    if matrix.nested is not None:
        code = functional.create_dynamic_map().to(matrix.codes.device)
        numbers = matrix.nested[0]
        state2 = functional.QuantState(
            absmax=numbers[:-1].contiguous(), code=code, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        options = {"offset": numbers[-1], "state2": state2}
    state = functional.QuantState(
        absmax=matrix.scales,
        shape=matrix.shape,
        code=functional.get_4bit_type("nf4", device=matrix.codes.device),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        **options,
    )
    return {"": matrix.codes.reshape(-1, 1), **{f".{key}": value for key, value in state.as_dict(packed=True).items()}}


def decode(parts: Parts, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Compute the matrix (out, in) of a file's tensors, which may not be quantised.

    Raises:
        ValueError: as [`matrix_of`].
    """
    if kind_of(parts, name) is None:
        return parts[""].to(dtype)
    matrix = matrix_of(parts, name)
    rows = torch.empty(matrix.shape, dtype=dtype, device=matrix.codes.device)
    return matrix.reader()(slice(0, len(rows)), rows)


def is_encoded(parts: Parts, weight: torch.Tensor, name: str) -> bool:
    """Tell whether a file's tensors are those that [`encode`] makes of a weight.

    The offset of double quantisation is a mean, whose last bits depend on the number of threads. So the scales are
    compared with what the stored offset gives, and the offset with the mean.

    Raises:
        ValueError: as [`matrix_of`] and [`encode`].
    """
    found = matrix_of(parts, name)
    own = matrix_of(encode(weight.float(), found.format, name, double_quantisation=False), name)
    if own.shape != found.shape or not torch.equal(own.codes, found.codes):
        return False
    if found.nested is None:
        return torch.equal(own.scales, found.scales)
    numbers, mean = found.nested[0], float(own.scales.double().mean())
    scales, state = bitsandbytes_functional().quantize_blockwise(own.scales - numbers[-1], blocksize=NESTED_BLOCK)
    same = torch.equal(scales, found.scales) and torch.equal(state.absmax, numbers[:-1])
    return same and abs(float(numbers[-1]) - mean) <= _MEAN_ROUNDING * mean + torch.finfo(torch.float32).tiny


@functools.lru_cache(maxsize=64)
def layout_of(
    kind: str, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, double_quantisation: bool = True
) -> Parts:
    """Return the tensors that [`encode`] makes of a matrix of this shape and dtype, on the meta device.

    The state of `"nf4"`, a text with a number in it, is as long as the longest. Behind a shorter one may stand spaces,
    which bitsandbytes passes over: see [`fill_state`].

    Raises:
        ValueError: if the format does not take this width.
        ImportError: for `"nf4"`, if bitsandbytes is not installed.
    """
    check_width(kind, "a matrix", shape)
    rows, columns = shape
    if kind == "fp8":
        found = {"": ((rows, columns), FP8), SCALE_SUFFIX: (scale_shape(shape), torch.float32)}
    elif kind == "mxfp4":
        found = {"": ((rows, columns // 2), torch.int8), SCALE_SUFFIX: ((rows, columns // MXFP4_BLOCK), E8M0)}
    else:
        number = rows * columns // NF4_BLOCK
        found = {"": ((rows * columns // 2, 1), torch.uint8), ".quant_map": ((16,), torch.float32)}
        found[".absmax"] = ((number,), torch.uint8 if double_quantisation else torch.float32)
        if double_quantisation:
            found |= {".nested_absmax": ((-(-number // NESTED_BLOCK),), torch.float32)}
            found |= {".nested_quant_map": ((256,), torch.float32)}
        found[NF4_STATE] = ((_longest_state(shape, dtype, double_quantisation),), torch.uint8)
    return {suffix: torch.empty(size, dtype=own, device="meta") for suffix, (size, own) in found.items()}


def _longest_state(shape: tuple[int, int], dtype: torch.dtype, double_quantisation: bool) -> int:
    scales = torch.empty(0, dtype=torch.uint8 if double_quantisation else torch.float32)
    nested = torch.zeros(1, 2) if double_quantisation else None
    matrix = QuantizedMatrix("nf4", torch.empty(shape[0], shape[1] // 2, dtype=torch.uint8), scales, nested)
    return len(parts_of(matrix, dtype)[NF4_STATE]) + (_LONGEST_NUMBER - len("0.0") if double_quantisation else 0)


def fill_state(state: torch.Tensor, length: int) -> torch.Tensor:
    """Fill the state of `"nf4"` up with spaces, so that a file's size is known before its values are."""
    return torch.nn.functional.pad(state, (0, length - len(state)), value=ord(" "))


def bytes_a_weight(kind: str, double_quantisation: bool = True) -> float:
    """Return the bytes that a weight takes in a large matrix, its share of the scales among them."""
    if kind == "fp8":
        return 1 + 4 / FP8_BLOCK**2
    if kind == "mxfp4":
        return 0.5 + 1 / MXFP4_BLOCK
    return 0.5 + (1 + 4 / NESTED_BLOCK if double_quantisation else 4) / NF4_BLOCK


__all__ = [
    "NF4_STATE",
    "SUFFIXES",
    "Parts",
    "bytes_a_weight",
    "check_width",
    "decode",
    "encode",
    "fill_state",
    "is_encoded",
    "kind_of",
    "layout_of",
    "matrix_of",
    "nested_scales",
    "parts_of",
]
