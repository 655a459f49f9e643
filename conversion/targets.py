# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Plan the tensors to write: what stands in files for each official tensor, in a dtype and a layout."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from modeling_deepseekmoe.checkpoint_layout import BIAS_NAME
from modeling_deepseekmoe.conversion.block_fp8 import BLOCK, SCALE_SUFFIX, Block, scale_shape
from modeling_deepseekmoe.conversion.locating import PACKED_DTYPES, Matrix
from modeling_deepseekmoe.conversion.matrix_formats import bitsandbytes_functional, check_width, layout_of
from modeling_deepseekmoe.conversion.streaming import (
    Cast,
    Constant,
    Copied,
    Encoded,
    LastEncoded,
    Output,
    Part,
    Quantized,
)
from modeling_deepseekmoe.conversion.tensor_table import Entry, stacks

FOUR_BITS = ("nf4", "mxfp4")


@dataclass(frozen=True)
class Target:
    """How tensors are to be written.

    Attributes:
        dtype: `"keep"`; `"fp8"` (of the linear layers; the rest is kept); `"nf4"` or `"mxfp4"` (of the routed experts;
            the rest is kept, or becomes bfloat16 if it is quantised); or a dtype's name (of all tensors but the gates'
            bias, which is float32 in every model of the family).
        block: rows and columns of the FP8 blocks to make.
        double_quantisation: whether the scales of `"nf4"` are quantised too.
        last: for what is encoded.
    """

    dtype: str
    block: Block = BLOCK
    double_quantisation: bool = True
    last: LastEncoded = field(default_factory=LastEncoded)


Tensors = dict[str, Output]  # what stands in files for one official tensor, by what stands behind its name


def plain(entry: Entry, part: Part) -> Tensors:
    """Write a tensor as one tensor of the shape that the config asks for."""
    return {"": Output(entry.name, entry.shape, (part,))}


def outputs_of(entry: Entry, matrix: Matrix, target: Target) -> Tensors:
    """Return how a tensor is written: its values and, if they are quantised, what belongs to them.

    Args:
        entry: what the tensor is.
        matrix: where it lies.
        target: how it is to be written.

    Raises:
        ValueError: if the format does not take its width.
        ImportError: for `"nf4"`, if bitsandbytes is not installed.
    """
    dtype = target.dtype
    if dtype in FOUR_BITS and entry.stack is not None and matrix.format != dtype:
        return _encoded(entry, matrix, target)
    if dtype in FOUR_BITS and entry.stack is None and matrix.format is not None:
        dtype = "bfloat16"
    if dtype == "fp8" and entry.linear and matrix.format != "fp8":
        rows, columns = matrix.shape
        found = plain(entry, Quantized(matrix, False, target.block))
        scales = Quantized(matrix, True, target.block)
        shape = scale_shape((rows, columns), target.block)
        return found | {SCALE_SUFFIX: Output(entry.name + SCALE_SUFFIX, shape, (scales,))}
    if dtype in ("keep", "fp8", *FOUR_BITS):
        return _copied(entry, matrix)
    wanted = torch.float32 if entry.name.endswith(BIAS_NAME) else getattr(torch, dtype)
    as_it_is = matrix.format is None and matrix.tensor.dtype == wanted
    return plain(entry, Copied(matrix) if as_it_is else Cast(matrix, wanted))


def _copied(entry: Entry, matrix: Matrix) -> Tensors:
    if matrix.packed is not None:
        return {
            suffix: Output(entry.name + suffix, one.shape, (Copied(Matrix.whole(one)),))
            for suffix, one in matrix.packed.tensors.items()
        }
    found = plain(entry, Copied(matrix))
    if matrix.scales is not None:
        found[SCALE_SUFFIX] = Output(entry.name + SCALE_SUFFIX, matrix.scales.shape, (Copied(matrix.scales),))
    return found


def _encoded(entry: Entry, matrix: Matrix, target: Target) -> Tensors:
    kind, double = target.dtype, target.double_quantisation
    check_width(kind, entry.name, entry.shape)
    found = {}
    for suffix in layout_of(kind, matrix.shape, double_quantisation=double):
        part = Encoded(matrix, kind, suffix, double, target.last)
        made = {".quant_map": _nf4_map, ".nested_quant_map": _scale_map}.get(suffix)
        found[suffix] = Output(entry.name + suffix, tuple(part.shape), (Constant(made()) if made else part,))
    return found


@functools.cache
def _nf4_map() -> torch.Tensor:
    return bitsandbytes_functional().get_4bit_type("nf4", device="cpu")


@functools.cache
def _scale_map() -> torch.Tensor:
    return bitsandbytes_functional().create_dynamic_map()


def outputs(
    wanted: Mapping[str, Entry], tensors: Mapping[str, Tensors], layout: str, experts: int
) -> Iterator[Output]:
    """Yield the tensors to write, in the order of `wanted`.

    Args:
        wanted: all official tensors.
        tensors: by official name, what stands in files for those that are written.
        layout: `"per-expert"` or `"stacked"`.
        experts: E, the number of routed experts.

    Raises:
        ValueError: if the experts of a stack would have several dtypes, or four bits.
    """
    members = stacks(wanted) if layout == "stacked" else {}
    for name, entry in wanted.items():
        if entry.stack in members:
            group = [tensors[member.name] for member in members.pop(entry.stack) if member.name in tensors]
            if group:
                yield from _stacked(entry.stack, group, experts)
        elif name in tensors and (layout != "stacked" or entry.stack is None):
            yield from tensors[name].values()


def _stacked(stack: str, members: list[Tensors], experts: int) -> Iterator[Output]:
    """Put the tensors of a stack's matrices, and their scales, one below the other."""
    if any(one[""].dtype in PACKED_DTYPES for one in members):
        raise ValueError(
            f"layout='stacked' is not allowed for {stack}: in four bits the tensors of each matrix are its own. "
            "Choose layout='per-expert', or another dtype."
        )
    for suffix, first in members[0].items():
        rows, columns = first.shape
        shape = (experts, len(members) // experts * rows, columns)
        stacked = Output(stack + suffix, shape, tuple(part for one in members for part in one[suffix].parts))
        stacked.check()
        yield stacked


__all__ = ["FOUR_BITS", "Target", "Tensors", "outputs", "outputs_of", "plain"]
