# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Stacks of quantised matrices, made of one matrix after the other.

Shape letters: E experts, P projections of a stack, one below the other.
"""

from typing import NamedTuple

import torch

from ..conversion.block_fp8 import scale_shape
from ..experts_quantized import (
    MXFP4_BLOCK,
    NESTED,
    NESTED_BLOCK,
    NF4_BLOCK,
    SCALES,
    QuantizedMatrix,
)


class StackFormat(NamedTuple):
    """How a stack (E, out, in) is stored.

    Attributes:
        kind: one of `FORMATS`.
        shape (`tuple[int, int, int]`): (E, out, in).
        projections: P.
        nested: whether the scales of `"nf4"` are quantised too.
    """

    kind: str
    shape: tuple[int, int, int]
    projections: int
    nested: bool

    def scales(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of the tensors beside the codes, by what stands behind the stack's name.

        float32 is kept as int32, of the same bits.
        """
        num_experts, rows, columns = self.shape
        if self.kind == "fp8":
            blocks = scale_shape((rows // self.projections, columns))
            return {SCALES: ((num_experts, self.projections, *blocks), torch.int32)}
        if self.kind == "mxfp4":
            return {SCALES: ((num_experts, rows, columns // MXFP4_BLOCK), torch.uint8)}
        number = rows * columns // NF4_BLOCK
        if not self.nested:
            return {SCALES: ((num_experts, number), torch.int32)}
        groups = -(-(number // self.projections) // NESTED_BLOCK)
        return {
            SCALES: ((num_experts, number), torch.uint8),
            NESTED: ((num_experts, self.projections, groups + 1), torch.int32),
        }

    def codes(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of the codes."""
        num_experts, rows, columns = self.shape
        return (num_experts, rows, columns if self.kind == "fp8" else columns // 2), torch.uint8


class NewStack:
    """Tensors of a quantised stack, filled a matrix at a time.

    Args:
        stored: how it is stored.
        device: where.
    """

    def __init__(self, stored: StackFormat, device: torch.device) -> None:
        self.format = stored
        parts = {"": stored.codes(), **stored.scales()}
        self.tensors = {name: torch.empty(shape, dtype=kind, device=device) for name, (shape, kind) in parts.items()}

    @property
    def on_cpu(self) -> bool:
        """Whether it is in the memory of the CPU."""
        return self.tensors[""].device.type == "cpu"

    def put(self, expert: int, projection: int, matrix: QuantizedMatrix) -> None:
        """Copy one expert's matrix of a projection to its place."""
        for name, (values, place) in self._places(expert, projection, matrix).items():
            target = self.tensors[name][expert][place]
            target.copy_((values.view(target.dtype) if values.dtype != target.dtype else values).view(target.shape))

    def _places(self, expert: int, projection: int, matrix: QuantizedMatrix) -> dict[str, tuple[torch.Tensor, slice]]:
        def share(tensor: torch.Tensor) -> slice:
            number = tensor.shape[1] // self.format.projections
            return slice(projection * number, (projection + 1) * number)

        own = slice(projection, projection + 1)
        scales = own if self.format.kind == "fp8" else share(self.tensors[SCALES])
        places = {"": (matrix.codes, share(self.tensors[""])), SCALES: (matrix.scales, scales)}
        if matrix.nested is not None:
            places[NESTED] = (matrix.nested, own)
        return places


__all__ = ["NewStack", "StackFormat"]
