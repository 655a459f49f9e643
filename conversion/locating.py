# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Match the tensors of a checkpoint with those that its config asks for, and say where each of them lies.

A matrix is a range of rows of a stored tensor. In FP8 it has scales beside it. In four bits ("nf4", "mxfp4") it is
packed: several tensors of its own, which are only decoded together.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from modeling_deepseekmoe.conversion.block_fp8 import BLOCK, FP8, SCALE_SUFFIX, Block, scale_shape
from modeling_deepseekmoe.conversion.checkpoint import StoredTensor, listed
from modeling_deepseekmoe.conversion.matrix_formats import E8M0, NF4_STATE, SUFFIXES, check_width, layout_of
from modeling_deepseekmoe.conversion.tensor_table import Entry, stack_shape, stacks

# Computed from the config, and stored by old versions of transformers.
DERIVED = re.compile(r"^(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")
PACKED_DTYPES = (torch.uint8, torch.int8)
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, FP8)


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix in four bits.

    Attributes:
        kind: `"nf4"` or `"mxfp4"`.
        tensors: its tensors, by what stands behind its name in their names.
    """

    kind: str
    tensors: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Size of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Matrix:
    """Where the values of one official tensor lie: a range of rows of a stored tensor, which is taken as a matrix.

    Attributes:
        tensor: the stored tensor.
        rows: its rows. A vector is one row.
        columns: its columns. Only a part of a down projection has fewer than all.
        scales: for FP8 values, where their scales lie.
        block: for FP8 values, rows and columns of a block.
        packed: for values in four bits, all their tensors. Rows and columns are those of the values then.
    """

    tensor: StoredTensor
    rows: range
    columns: range
    scales: "Matrix | None" = None
    block: Block = BLOCK
    packed: Packed | None = None

    @classmethod
    def whole(cls, tensor: StoredTensor) -> "Matrix":
        """Take a stored tensor as it is."""
        width = tensor.shape[-1] if tensor.shape else 1
        return cls(tensor, range(tensor.numel // width if width else 0), range(width))

    @property
    def format(self) -> str | None:
        """The format that its values are quantised to, or `None`."""
        if self.packed is not None:
            return self.packed.kind
        return None if self.scales is None else "fp8"

    @property
    def width(self) -> int:
        """Columns of the stored tensor."""
        return self.tensor.shape[-1] if self.tensor.shape else 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.rows), len(self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of its values and scales in the file."""
        if self.packed is not None:
            return self.packed.nbytes
        own = len(self.rows) * len(self.columns) * self.tensor.dtype.itemsize
        return own + (0 if self.scales is None else self.scales.nbytes)

    def part(self, rows: range | None = None, columns: range | None = None) -> "Matrix":
        """Take some of its rows or columns. This is not for quantised values: it would cut their blocks."""
        assert self.format is None
        rows = range(len(self.rows)) if rows is None else rows
        columns = range(len(self.columns)) if columns is None else columns
        return replace(
            self,
            rows=self.rows[rows.start : rows.stop],
            columns=self.columns[columns.start : columns.stop],
        )


@dataclass
class Located:
    """The tensors of a checkpoint, matched with what its config asks for.

    Attributes:
        matrices: by official name, where each tensor lies.
        absent: official names of optional tensors, and of multi-token-prediction layers, that are not there.
        derived: names of stored tensors that follow from the config and are not read.
    """

    matrices: dict[str, Matrix]
    absent: set[str] = field(default_factory=set)
    derived: list[str] = field(default_factory=list)


def locate(
    wanted: Mapping[str, Entry], tensors: Mapping[str, StoredTensor], experts: int = 0, block: Block = BLOCK
) -> Located:
    """Match stored tensors with what a config asks for. The matrices of experts may be stored per expert or in stacks.

    Args:
        wanted: [`entries`] of the config.
        tensors: the stored tensors.
        experts: E, the number of routed experts.
        block: rows and columns of an FP8 block.

    Raises:
        ValueError: listing the tensors that no row explains, that are missing, or that have another shape; or naming
            one whose dtype is no format that is known.
    """
    located = Located({})
    used: set[str] = set()
    missing: list[str] = []
    for stack, members in stacks(wanted).items():
        if stack in tensors:
            _locate_stack(located, used, stack, members, tensors, experts, block)
    for name, entry in wanted.items():
        if name in located.matrices:
            if name in tensors:
                raise ValueError(f"Tensor {name} is there twice: alone, and in the stack {entry.stack}.")
        elif name in tensors:
            located.matrices[name], own = _locate_one(entry, tensors, block)
            used |= own
        else:
            missing.append(name)
    located.derived = [name for name, tensor in tensors.items() if DERIVED.match(name) and len(tensor.shape) == 1]
    used |= set(located.derived)
    unknown = [_place(tensor) for name, tensor in tensors.items() if name not in used]
    lacking = _lacking(located, wanted, missing)
    problems = [f"has no place for: {listed(unknown)}"] if unknown else []
    problems += [f"asks for what is missing: {listed(lacking)}"] if lacking else []
    if problems:
        raise ValueError(f"The tensors do not fit the config, which {', and '.join(problems)}.")
    return located


def _locate_one(entry: Entry, tensors: Mapping[str, StoredTensor], block: Block) -> tuple[Matrix, set[str]]:
    """Locate a tensor that is stored under its official name. Also return the names of all that belong to it."""
    tensor = tensors[entry.name]
    if tensor.dtype in PACKED_DTYPES:
        packed = packed_of(entry, tensors)
        rows, columns = entry.shape
        own = {one.name for one in packed.tensors.values()}
        return Matrix(tensor, range(rows), range(columns), packed=packed), own
    scales = tensors.get(entry.name + SCALE_SUFFIX)
    return _matrix(tensor, entry.shape, scales, block), {entry.name} | ({scales.name} if scales else set())


def packed_of(entry: Entry, tensors: Mapping[str, StoredTensor]) -> Packed:
    """Collect the tensors of a matrix in four bits, and compare them with what its format has.

    Args:
        entry: name and shape of the matrix.
        tensors: all stored tensors.

    Raises:
        ValueError: naming a tensor that is missing, that is one too many, or that has another shape or dtype.
        ImportError: for `"nf4"`, if bitsandbytes is not installed.
    """
    parts = {suffix: found for suffix in SUFFIXES if (found := tensors.get(entry.name + suffix)) is not None}
    tensor = parts[""]
    if NF4_STATE in parts and tensor.dtype == torch.uint8:
        kind = "nf4"
    elif parts.keys() == {"", SCALE_SUFFIX}:
        kind = "mxfp4"
    else:
        raise _stored_otherwise(tensor, "it has no scales of a format that is known")
    if not entry.linear:
        raise _stored_otherwise(tensor, "only linear layers can be quantised")
    shape = (entry.shape[0], entry.shape[1])
    check_width(kind, entry.name, shape)
    expected = layout_of(kind, shape, double_quantisation=".nested_absmax" in parts)
    for suffix in sorted(expected.keys() | parts.keys()):
        if suffix not in parts:
            raise ValueError(f"Checkpoint tensor {_place(tensor)} lacks {entry.name}{suffix}, which {kind} has.")
        found = parts[suffix]
        if suffix not in expected:
            raise ValueError(f"Checkpoint tensor {_place(found)} is not allowed: {kind} has no such tensor.")
        wanted = expected[suffix]
        dtypes = {torch.int8: PACKED_DTYPES, E8M0: (E8M0, torch.uint8)}.get(wanted.dtype, (wanted.dtype,))
        fits = suffix == NF4_STATE or found.shape == tuple(wanted.shape)
        if not fits or found.dtype not in dtypes:
            raise ValueError(
                f"Checkpoint tensor {_place(found)} has shape {found.shape} and dtype {found.dtype}, which is not "
                f"allowed: {kind} of {entry.shape} has {tuple(wanted.shape)} and {wanted.dtype}."
            )
    return Packed(kind, {suffix: parts[suffix] for suffix in expected})


def _check_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"Checkpoint tensor {_place(tensor)} has shape {tensor.shape}, which is not allowed: the config asks for "
            f"{shape}."
        )


def _matrix(tensor: StoredTensor, shape: tuple[int, ...], scales: StoredTensor | None, block: Block = BLOCK) -> Matrix:
    _check_shape(tensor, shape)
    if tensor.dtype not in _PLAIN_DTYPES:
        raise _stored_otherwise(tensor, "values and scales of 8 bits that are known are FP8 (e4m3) with float32")
    if (tensor.dtype == FP8) != (scales is not None):
        found = "has no scales" if scales is None else f"is {tensor.dtype} and has scales"
        raise ValueError(f"Checkpoint tensor {_place(tensor)} {found}: FP8 values need {tensor.name}{SCALE_SUFFIX}.")
    rows = range(shape[0]) if len(shape) == 2 else range(1)
    if scales is None:
        return Matrix(tensor, rows, range(shape[-1]))
    if len(shape) != 2:
        raise ValueError(f"Checkpoint tensor {_place(tensor)} of shape {shape} is FP8: only matrices can be.")
    own = _matrix(scales, scale_shape((shape[0], shape[1]), block), None)
    return Matrix(tensor, rows, range(shape[1]), own, block)


def _locate_stack(
    located: Located,
    used: set[str],
    stack: str,
    members: list[Entry],
    tensors: Mapping[str, StoredTensor],
    experts: int,
    block: Block,
) -> None:
    tensor, scales = tensors[stack], tensors.get(stack + SCALE_SUFFIX)
    rows, columns = members[0].shape
    scale_rows, scale_columns = scale_shape((rows, columns), block)
    flat = replace(tensor, shape=(len(members) * rows, columns))
    _check_shape(tensor, stack_shape(members, experts))
    if tensor.dtype not in _PLAIN_DTYPES:
        raise _stored_otherwise(tensor, "of stacks only values that are not quantised, or FP8, are read")
    whole_scales = (experts, len(members) // experts * scale_rows, scale_columns)
    if scales is not None and scales.shape != whole_scales:
        raise ValueError(
            f"Checkpoint tensor {_place(scales)} has shape {scales.shape}, which is not allowed: it must be "
            f"{whole_scales}, the scales of each matrix one below the other."
        )
    flat_scales = replace(scales, shape=(len(members) * scale_rows, scale_columns)) if scales else None
    if (tensor.dtype == FP8) != (scales is not None):
        raise ValueError(
            f"Checkpoint tensor {_place(tensor)}: FP8 values, and only these, need {stack}{SCALE_SUFFIX}."
        )
    for number, entry in enumerate(members):
        own = None
        if flat_scales is not None:
            first = number * scale_rows
            own = Matrix(flat_scales, range(first, first + scale_rows), range(scale_columns))
        located.matrices[entry.name] = Matrix(
            flat, range(number * rows, (number + 1) * rows), range(columns), own, block
        )
    used |= {stack} | ({scales.name} if scales else set())


def _lacking(located: Located, wanted: Mapping[str, Entry], missing: list[str]) -> list[str]:
    """Return the missing names that must not be missing, and note the others as absent."""
    present = {wanted[name].mtp_layer for name in located.matrices}
    some_mtp = present != {None}  # all such layers may be missing, but not one of several
    located.absent = {
        name for name in missing if wanted[name].optional or (wanted[name].mtp_layer is not None and not some_mtp)
    }
    return [name for name in missing if name not in located.absent]


def _stored_otherwise(tensor: StoredTensor, reason: str) -> ValueError:
    return ValueError(
        f"Checkpoint tensor {_place(tensor)} is stored as {tensor.dtype}, which is not allowed: {reason}."
    )


def _place(tensor: StoredTensor) -> str:
    """Return the name of a tensor, and of its file."""
    return f"{tensor.name} ({tensor.file.name})" if tensor.file else tensor.name


__all__ = ["PACKED_DTYPES", "Located", "Matrix", "Packed", "locate", "packed_of"]
