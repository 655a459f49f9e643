# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What the kernels of the routed experts read: stacks, dense and quantised, and what goes on beside them.

A stack in `"fp8"` or `"mxfp4"` is read as it is stored, and decoded inside the product (`experts_decoding`). Of one in
`"nf4"`, whose values and nested scales come from tables, some experts that have choices are decoded at a time, into
memory that the next ones get again. The kernels are then those of dense stacks, with the offsets of these experts.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .experts_grouped import decoded_runs, experts_at_a_time
from .experts_quantized import FP8_BLOCK, MXFP4_BLOCK, QuantizedStack
from .triton_support import power_of_two

IN_PRODUCTS = ("fp8", "mxfp4")  # formats that are decoded inside the products


class LowRank(NamedTuple):
    """The part of a product that goes on inside its sums: inner rows times factors.

    Attributes:
        inner (`torch.Tensor` of shape (S, R), *optional*): the inner rows of an adapter; `None` without one.
        factors (`torch.Tensor` of shape (E, R, out), *optional*): the other factor, with any strides.
        dropout, seed: those of the adapter, if its mask falls on this product.
    """

    inner: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    dropout: float = 0.0
    seed: torch.Tensor | None = None

    def part(self, experts: slice) -> torch.Tensor | None:
        """Return the factors of some experts."""
        return None if self.factors is None else self.factors[experts]

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the factors."""
        return (0, 0, 0) if self.factors is None else self.factors.stride()

    @property
    def rank(self) -> dict[str, int]:
        """Sizes of the adapter that a kernel is compiled for."""
        rank = 1 if self.inner is None else self.inner.shape[1]
        return {"R": rank, "BLOCK_R": min(max(power_of_two(rank), 16), 64)}


NOTHING = LowRank()


class Group(NamedTuple):
    """Some experts of a stack, as a launch gets them.

    Attributes:
        matrices (`torch.Tensor` of shape (n, in, out), or [`QuantizedStack`]): theirs.
        experts (`slice`): their numbers.
        offsets (`torch.IntTensor` of shape (m + 1,)): theirs, and empty ones behind, so that m is the same for all
            groups of a stack.
        num_choices (`int`): how many choices they have at most.
    """

    matrices: Any
    experts: slice
    offsets: torch.Tensor
    num_choices: int

    @property
    def sizes(self) -> dict[str, int]:
        """The number of experts, as a kernel is compiled for it."""
        number = len(self.offsets) - 1
        return {"E": number, "E_WIDTH": power_of_two(number)}


def all_experts(stack: Any, offsets: torch.Tensor, num_choices: int, transposed: bool) -> Group:
    """Return a stack as one group. Quantised matrices stay as they lie.

    Args:
        stack (`torch.Tensor` or [`QuantizedStack`] of shape (E, out, in)): or, if it is not transposed, (E, in, out).
        offsets (`torch.IntTensor` of shape (E + 1,)): of the experts' choices.
        num_choices: S.
        transposed: whether the product is with the transposed matrices.
    """
    matrices = stack.transpose(1, 2) if transposed and isinstance(stack, torch.Tensor) else stack
    return Group(matrices, slice(0, len(stack)), offsets, num_choices)


def decoded_groups(
    stack: QuantizedStack, offsets: torch.Tensor, ends: Sequence[int], transposed: bool
) -> Iterator[Group]:
    """Decode some experts that have choices at a time, into the same memory.

    Args:
        stack, offsets, transposed: as of [`all_experts`].
        ends: the offsets as numbers.
    """
    number = experts_at_a_time(stack)
    for experts, matrices in decoded_runs(stack, ends):
        places = torch.arange(experts.start, experts.start + number + 1, device=offsets.device)
        yield Group(
            matrices.transpose(1, 2) if transposed else matrices,
            experts,
            offsets.index_select(0, places.clamp_(max=experts.stop)),
            ends[experts.stop] - ends[experts.start],
        )


def fit(options: dict[str, Any], stack: Any, transposed: bool) -> dict[str, Any]:
    """Fit a tile to a stack that is decoded inside the product; that of another one stays.

    It reads no descriptors. In the direction in which a row lies, it must have whole blocks of `"mxfp4"`, and no more
    than one of `"fp8"`. Whatever the usual tile caps the registers at, it has as many as it wants.
    """
    if not isinstance(stack, QuantizedStack) or stack.format not in IN_PRODUCTS:
        return options
    name = "BLOCK_IN" if transposed else "BLOCK_COLUMNS"
    size = max(options[name], MXFP4_BLOCK) if stack.format == "mxfp4" else min(options[name], FP8_BLOCK)
    return {key: value for key, value in options.items() if key != "maxnreg"} | {name: size, "descriptors": 0}


def codes_of(stack: QuantizedStack, transposed: bool) -> dict[str, Any]:
    """Return what tells a kernel how the codes of a stack lie."""
    rows = stack.shape[1] // (stack.scales.shape[1] if stack.format == "fp8" else 1)
    return {"FORMAT": stack.format, "DESCRIBED": "columns" if transposed else "rows", "PROJECTION": rows}


__all__ = ["IN_PRODUCTS", "NOTHING", "Group", "LowRank", "all_experts", "codes_of", "decoded_groups", "fit"]
