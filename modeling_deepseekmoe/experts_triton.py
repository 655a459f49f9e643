# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The routed experts in fused kernels: the same functions as in `experts_loop`, all experts in each launch.

Forward: the first product reads the tokens where they lie and ends with the activation; the second one ends with the
weights and writes each slot to its token; one launch adds up the slots of each token: that is what a sum costs without
atomics. Backward: the gradient of the activation and of the weights in one launch, that of the tokens in two, and one
for each parameter. Nothing waits for the host.

An adapter's product of low rank goes on inside the same sums: a launch for its inner rows (S, R), and R more columns.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .experts_kernels import (
    activation_gradient_kernel,
    combine_kernel,
    first_product_kernel,
    outer_kernel,
    product_kernel,
)
from .experts_loop import Adapter, factors_of
from .routing_triton import MAX_EXPERTS
from .triton_support import power_of_two, triton, why_no_triton

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_fused(device: torch.device, dtype: torch.dtype, num_experts: int) -> str:
    """The reason why the kernels do not take experts of a dtype; empty if they do."""
    if reason := why_no_triton(device):
        return reason
    if dtype not in _DTYPES:
        return f"the products are in {dtype}, and the kernels take float32, bfloat16 and float16"
    if num_experts > MAX_EXPERTS:
        return f"there are {num_experts} experts, and the kernels take at most {MAX_EXPERTS}"
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if is_nvidia and torch.cuda.get_device_properties(device).major < 8:
        return "the tiles need the shared memory of a GPU of compute capability 8.0 or newer"
    return ""


def block_options(num_slots: int, num_experts: int, columns: int, inside: int, dtype: torch.dtype) -> dict[str, int]:
    """The tile of a product, and the warps for it. An expert's slots should fill a tile; float32, which the matrix
    units of a GPU do not multiply, has smaller ones. Chosen from registers and shared memory (in bfloat16 nothing
    spills), and not yet by measurement on a GPU."""
    narrow = dtype == torch.float32
    rows = power_of_two(max(num_slots // num_experts, 1))
    rows = min(max(rows, 16), 64 if narrow else 128)
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_COLUMNS": min(max(power_of_two(columns), 16), 64 if narrow else 128),
        "BLOCK_IN": min(max(power_of_two(inside), 16), 32 if narrow else 64),
        "num_warps": 8 if rows == 128 else 4,
        "num_stages": 3,
    }


def first_product_options(
    num_slots: int, num_experts: int, columns: int, inside: int, dtype: torch.dtype
) -> dict[str, int]:
    """The same for the first product, which has two sums for each place."""
    options = block_options(num_slots, num_experts, columns, inside, dtype)
    return {**options, "BLOCK_COLUMNS": min(options["BLOCK_COLUMNS"], 64)}


def gradient_options(
    num_slots: int, num_experts: int, columns: int, inside: int, dtype: torch.dtype
) -> dict[str, int]:
    """The same for the gradient of the activation, which ends with five numbers for each place."""
    options = first_product_options(num_slots, num_experts, columns, inside, dtype)
    rows = min(options["BLOCK_ROWS"], 64)
    return {**options, "BLOCK_ROWS": rows, "num_warps": 8 if rows == 64 else 4}


def outer_options(rows: int, columns: int, dtype: torch.dtype) -> dict[str, int]:
    """The tile of a parameter's gradient."""
    largest = 64 if dtype == torch.float32 else 128
    blocks = {"BLOCK_M": rows, "BLOCK_N": columns}
    blocks = {name: min(max(power_of_two(size), 16), largest) for name, size in blocks.items()}
    warps = 8 if 128 in blocks.values() else 4
    return {**blocks, "BLOCK_ROWS": 32 if dtype == torch.float32 else 64, "num_warps": warps, "num_stages": 3}


def precision(dtype: torch.dtype) -> str:
    """What torch's own products do with float32 on this machine: TF32 where the user has allowed it."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and torch.version.hip is None else "ieee"


class _Launcher:
    """The launches for one routing, with what all of them are given."""

    def __init__(self, permutation: torch.Tensor, offsets: torch.Tensor, top_k: int, dtype: torch.dtype) -> None:
        self.permutation, self.offsets, self.dtype = permutation, offsets, dtype
        self.num_slots, self.num_experts = len(permutation), len(offsets) - 1
        self.constants = {"TOP_K": top_k, "PRECISION": precision(dtype)}
        self.sizes = {**self.constants, "E": self.num_experts, "E_WIDTH": power_of_two(self.num_experts)}

    def grid(self, options: dict[str, int], columns: int) -> tuple[int]:
        """Programs for the most tiles that there can be: an expert with slots has at most one that is not full."""
        rows = self.num_slots // options["BLOCK_ROWS"] + min(self.num_slots, self.num_experts)
        return (rows * triton.cdiv(columns, options["BLOCK_COLUMNS"]),)

    def product(
        self,
        rows: torch.Tensor,
        matrices: torch.Tensor,
        *,
        by_token: bool,
        weights: torch.Tensor | None = None,
        to_slots: bool = False,
        inner: torch.Tensor | None = None,
        factors: torch.Tensor | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows times (E, in, out), (S, out): see the kernel."""
        _, inside, columns = matrices.shape
        out = rows.new_empty(self.num_slots, columns)
        options = block_options(self.num_slots, self.num_experts, columns, inside, self.dtype)
        if dropout:  # with its mask the tile for sm_80 would spill (Triton 3.9)
            options["BLOCK_IN"] = min(options["BLOCK_IN"], 32)
        product_kernel[self.grid(options, columns)](
            rows,
            matrices,
            inner,
            factors,
            weights,
            self.permutation,
            self.offsets,
            out,
            seed if dropout else None,
            scale,
            dropout,
            *matrices.stride(),
            *_strides(factors),
            IN=inside,
            OUT=columns,
            **_rank(inner),
            BY_TOKEN=by_token,
            TO_SLOTS=to_slots,
            **self.sizes,
            **options,
        )
        return out

    def inner(self, rows: torch.Tensor, adapter: Adapter | None, by_token: bool) -> torch.Tensor | None:
        """An adapter's inner rows (S, R), with dropout and scale."""
        if adapter is None:
            return None
        factor = adapter.factor_a.transpose(1, 2)
        return self.product(rows, factor, by_token=by_token, scale=adapter.scale, **_noise(adapter))

    def inner_gradient(self, grad: torch.Tensor, adapter: Adapter | None, by_token: bool) -> torch.Tensor | None:
        """The gradient at an adapter's inner rows (S, R), with the scale."""
        if adapter is None:
            return None
        return self.product(grad, adapter.factor_b, by_token=by_token, scale=adapter.scale)

    def outer(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        *,
        left_by_token: bool = False,
        right_by_token: bool = False,
        dropout: float = 0.0,
        seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A parameter's gradient (E, M, N): see the kernel."""
        rows, columns = left.shape[1], right.shape[1]
        out = left.new_empty(self.num_experts, rows, columns)
        options = outer_options(rows, columns, self.dtype)
        tiles = triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(columns, options["BLOCK_N"])
        outer_kernel[(self.num_experts * tiles,)](
            left,
            right,
            self.permutation,
            self.offsets,
            out,
            seed if dropout else None,
            dropout,
            M=rows,
            N=columns,
            LEFT_BY_TOKEN=left_by_token,
            RIGHT_BY_TOKEN=right_by_token,
            **self.constants,
            **options,
        )
        return out

    def combine(self, by_slot: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        """The sums of the tokens' slots, (T, D)."""
        num_tokens, top_k = expert_ids.shape
        hidden_size = by_slot.shape[1]
        out = by_slot.new_empty(num_tokens, hidden_size)
        columns = min(power_of_two(hidden_size), 512)
        combine_kernel[(triton.cdiv(num_tokens, 4), triton.cdiv(hidden_size, columns))](
            by_slot,
            expert_ids,
            out,
            num_tokens,
            E=self.num_experts,
            TOP_K=top_k,
            D=hidden_size,
            BLOCK_TOKENS=4,
            BLOCK_COLUMNS=columns,
        )
        return out


def experts_forward_triton(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_adapter: Adapter | None,
    down_adapter: Adapter | None,
    permutation: torch.Tensor,
    offsets: torch.Tensor,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`experts_loop.experts_forward`] in kernels; `kept` has each slot's gates and ups beside each other."""
    width, num_slots = down.shape[-1], len(permutation)
    kept = hidden.new_empty(num_slots if keep else 0, 2 * width)
    if not num_slots:
        return torch.zeros_like(hidden), kept
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        launch = _Launcher(permutation, offsets, weights.shape[1], hidden.dtype)
        inner = launch.inner(hidden, gate_up_adapter, by_token=True)
        factors = None if gate_up_adapter is None else gate_up_adapter.factor_b
        act = hidden.new_empty(num_slots, width)
        options = first_product_options(num_slots, len(down), width, hidden.shape[1], hidden.dtype)
        first_product_kernel[launch.grid(options, width)](
            hidden,
            gate_up,
            inner,
            factors,
            permutation,
            offsets,
            kept if keep else None,
            act,
            *gate_up.stride(),
            *_strides(factors),
            D=hidden.shape[1],
            WIDTH=width,
            **_rank(inner),
            **launch.sizes,
            **options,
        )
        by_slot = launch.product(
            act,
            down.transpose(1, 2),
            by_token=False,
            weights=weights,
            to_slots=True,
            inner=launch.inner(act, down_adapter, by_token=False),
            factors=None if down_adapter is None else down_adapter.factor_b.transpose(1, 2),
        )
        return launch.combine(by_slot, expert_ids), kept


def experts_backward_triton(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_adapter: Adapter | None,
    down_adapter: Adapter | None,
    permutation: torch.Tensor,
    offsets: torch.Tensor,
    kept: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """[`experts_loop.experts_backward`] in kernels."""
    width, num_slots = down.shape[-1], len(permutation)
    factors = factors_of(gate_up_adapter, down_adapter)
    if not num_slots:
        inputs = (hidden, weights, gate_up, down, *factors)
        return [value.new_zeros(value.shape) if need else None for value, need in zip(inputs, needs, strict=True)]
    results: list[torch.Tensor | None] = [None] * len(needs)
    with torch.cuda.device_of(hidden):
        launch = _Launcher(permutation, offsets, weights.shape[1], hidden.dtype)
        inner = launch.inner_gradient(grad, down_adapter, by_token=True)
        options = gradient_options(num_slots, len(down), width, hidden.shape[1], hidden.dtype)
        both = hidden.new_empty(num_slots, 2 * width)
        act = hidden.new_empty(num_slots, width) if any((needs[3], *needs[6:])) else None
        parts = weights.new_zeros(num_slots, triton.cdiv(width, options["BLOCK_COLUMNS"]), dtype=torch.float32)
        noise = _noise(down_adapter)
        activation_gradient_kernel[launch.grid(options, width)](
            grad,
            down,
            inner,
            factors[2],
            kept,
            weights,
            permutation,
            offsets,
            both,
            act,
            parts,
            noise["seed"],
            noise["dropout"],
            *down.stride(),
            *_strides(factors[2]),
            D=hidden.shape[1],
            WIDTH=width,
            **_rank(inner),
            **launch.sizes,
            **options,
        )
        if needs[1]:
            results[1] = parts.sum(dim=1).view_as(weights).to(weights.dtype)
        if needs[3]:
            results[3] = launch.outer(grad, act, left_by_token=True)
        if needs[6]:
            results[6] = launch.outer(inner, act, **noise)
        if needs[7]:
            results[7] = launch.outer(grad, launch.inner(act, down_adapter, by_token=False), left_by_token=True)
        inner = launch.inner_gradient(both, gate_up_adapter, by_token=False) if needs[0] or needs[4] else None
        noise = _noise(gate_up_adapter)
        if needs[0]:
            by_slot = launch.product(
                both, gate_up, by_token=False, to_slots=True, inner=inner, factors=factors[0], **noise
            )
            results[0] = launch.combine(by_slot, expert_ids)
        if needs[2]:
            results[2] = launch.outer(both, hidden, right_by_token=True)
        if needs[4]:
            results[4] = launch.outer(inner, hidden, right_by_token=True, **noise)
        if needs[5]:
            results[5] = launch.outer(both, launch.inner(hidden, gate_up_adapter, by_token=True))
    return results


def _noise(adapter: Adapter | None) -> dict[str, Any]:
    if adapter is None or not adapter.dropout:
        return {"dropout": 0.0, "seed": None}
    return {"dropout": adapter.dropout, "seed": adapter.seed}


def _strides(factors: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if factors is None else factors.stride()


def _rank(inner: torch.Tensor | None) -> dict[str, int]:
    rank = 1 if inner is None else inner.shape[1]
    return {"R": rank, "BLOCK_R": min(max(power_of_two(rank), 16), 64)}


__all__ = ["experts_backward_triton", "experts_forward_triton", "why_not_fused"]
