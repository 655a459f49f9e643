# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The part of the stacked experts that one rank computes with, if they are spread by expert or by tensor.

Shape letters: E experts, D hidden, I expert width, r rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..experts import IMPLEMENTATION
from ..transformers_support import experts_implementation_of

_Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LocalPart:
    """The part of the stacked experts that a rank computes with.

    Attributes:
        experts (`slice`): which of the E experts.
        width (`slice`): which of the I neurons of each.
        gradient_factor (`int`): number of ranks that share one batch.
    """

    experts: slice
    width: slice
    gradient_factor: int

    @classmethod
    def of(cls, experts: nn.Module) -> "LocalPart | None":
        """Find the part of an experts module, or `None` if its stacks are whole in computing (FSDP gathers them)."""
        stack = experts.gate_up_proj
        names = (stack.device_mesh.mesh_dim_names or ()) if isinstance(stack, DTensor) else ()
        if "ep" not in names and "tp" not in names:
            return None
        num_experts, columns, _ = stack.shape
        kept, width = slice(0, num_experts), slice(0, columns // 2)
        if "ep" in names:
            kept = own_chunk(num_experts, stack.device_mesh, "ep")
        else:
            width = own_chunk(columns // 2, stack.device_mesh, "tp")
        return cls(kept, width, experts.config.distributed_config.tp_size)

    def of_factors(
        self, stack: str, factor_a: torch.Tensor, factor_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut the part out of an adapter's factors: (E, r, in) and (out, r, E) of `gate_up_proj` or of `down_proj`."""
        factor_a, factor_b = factor_a[self.experts], factor_b[..., self.experts]
        if stack == "gate_up_proj":
            factor_b = factor_b.unflatten(0, (2, -1))[:, self.width].flatten(0, 1)
        else:
            factor_a = factor_a[..., self.width]
        return scale_gradient(factor_a, self.gradient_factor), scale_gradient(factor_b, self.gradient_factor)


def own_chunk(length: int, mesh: DeviceMesh, name: str) -> slice:
    size = -(-length // mesh.size(mesh.mesh_dim_names.index(name)))  # as `torch.chunk` and DTensor divide
    first = min(length, mesh.get_local_rank(name) * size)
    return slice(first, min(length, first + size))


def run_on_ranks(experts: nn.Module, compute: _Experts, *inputs: torch.Tensor) -> torch.Tensor:
    """Let transformers bring the tokens to the ranks and the outputs back, and compute with `compute` in between.

    Args:
        experts: the module whose forward transformers has replaced.
        compute: takes hidden states, ids and weights as the experts of this rank get them.
        inputs: hidden states (T, D), global expert ids (T, K) and weights (T, K).

    Raises:
        ValueError: for another experts implementation.
    """
    implementation = experts_implementation_of(experts.config)
    if implementation != IMPLEMENTATION:
        raise ValueError(
            f"experts_implementation={implementation!r} is not allowed for adapters on experts that are spread over "
            f"ranks: it must be {IMPLEMENTATION!r}."
        )
    experts.computes_with = compute
    try:
        return experts(*inputs)
    finally:
        del experts.computes_with


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: int) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


def scale_gradient(tensor: torch.Tensor, factor: int) -> torch.Tensor:
    """Return the tensor itself, but multiply its gradient by a factor."""
    return tensor if factor == 1 else _ScaledGradient.apply(tensor, factor)


__all__ = ["LocalPart", "run_on_ranks", "scale_gradient"]
