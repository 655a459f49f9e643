# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The backend `"triton"` of the routed experts: the functions of `experts_loop` in fused kernels.

Each launch computes all experts. Forward: the first product reads the tokens where they lie, and ends with the
activation. The second product ends with the weights, and writes each choice to its token. A third launch adds up the
choices of each token: that is what a sum costs without atomics. Backward: one launch gives the gradients of the
activation and of the weights, two give that of the tokens, and each parameter takes one more. Nothing waits for the
host.

An adapter's product of low rank goes on inside the same sums. It costs a launch for its inner rows (S, R), and R more
columns. Quantised stacks are decoded inside the products or, in `"nf4"`, some experts before each launch, which waits
for the host (`experts_sources`).
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from .experts_gating import Gating
from .experts_kernels import (
    activation_gradient_kernel,
    combine_kernel,
    first_product_kernel,
    outer_kernel,
    product_kernel,
)
from .experts_operands import Adapter, ExpertGradients, ExpertOperands
from .experts_quantized import QuantizedStack
from .experts_sources import IN_PRODUCTS, NOTHING, Group, LowRank, all_experts, codes_of, decoded_groups, fit
from .experts_tiles import Problem, choose_tile, has_large_tiles
from .routing_triton import MAX_EXPERTS
from .triton_support import TensorDescriptor, ceil_div, power_of_two, why_no_triton

logger = logging.get_logger(__name__)

PART = 32  # columns of a tile that the gradient of the activation stores at a time
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_fused(device: torch.device, dtype: torch.dtype, num_experts: int) -> str:
    """Return the reason why the kernels do not take experts of a dtype; it is empty if they do."""
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


def precision(dtype: torch.dtype) -> str:
    """Return how torch's own products compute float32 on this machine: in TF32 if the user has allowed it."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and torch.version.hip is None else "ieee"


def _described(matrices: torch.Tensor, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return what a kernel reads matrices (E, in, out) through, themselves or a descriptor, and its arguments."""
    options = dict(options)
    wanted = options.pop("descriptors")
    contiguous, blocks = "rows", [1, options["BLOCK_IN"], options["BLOCK_COLUMNS"]]
    tensor = matrices
    if matrices.stride(2) != 1:
        contiguous, blocks, tensor = "columns", [1, blocks[2], blocks[1]], matrices.transpose(1, 2)
    steps = (tensor.data_ptr(), *(stride * tensor.itemsize for stride in tensor.stride()[:-1]))
    if not wanted:
        return matrices, options | {"DESCRIBED": ""}
    if tensor.stride(2) != 1 or any(step % 16 for step in steps):
        logger.warning_once(
            f"The rows of experts' matrices {tuple(tensor.shape[1:])} of {tensor.dtype} do not begin at multiples of "
            "16 bytes: their tile's descriptors are not used."
        )
        return matrices, options | {"DESCRIBED": ""}
    return TensorDescriptor.from_tensor(tensor, blocks), options | {"DESCRIBED": contiguous}


class _Reading(NamedTuple):
    """How a kernel reads some experts' matrices.

    Attributes:
        source: themselves, a descriptor or codes.
        scales (`torch.Tensor`, *optional*): of quantised ones.
        strides: of matrices or codes, and, if there are scales, how many of them an expert has.
        options: the arguments that the launch is compiled with.
    """

    source: Any
    scales: torch.Tensor | None
    strides: tuple[int | None, ...]
    options: dict[str, Any]


def _reading(group: Group, options: dict[str, Any], transposed: bool = True) -> _Reading:
    stack = group.matrices
    if isinstance(stack, QuantizedStack):
        options = {key: value for key, value in options.items() if key != "descriptors"}
        strides = *stack.codes.stride(), stack.scales[0].numel()
        return _Reading(stack.codes, stack.scales, strides, options | codes_of(stack, transposed) | group.sizes)
    source, options = _described(stack, options)
    dense = {"FORMAT": "", "PROJECTION": 0}
    return _Reading(source, None, (*stack.stride(), None), options | dense | group.sizes)


class _Launcher:
    """The launches for one routing, with the arguments that all of them share."""

    def __init__(self, permutation: torch.Tensor, offsets: torch.Tensor, top_k: int, dtype: torch.dtype) -> None:
        self.permutation, self.offsets, self.dtype = permutation, offsets, dtype
        self.num_choices, self.num_experts = len(permutation), len(offsets) - 1
        self.constants = {"TOP_K": top_k, "PRECISION": precision(dtype)}

    @functools.cached_property
    def ends(self) -> list[int]:
        """The offsets as numbers. This waits for the device."""
        return self.offsets.tolist()

    def groups(self, stack: Any, transposed: bool) -> Iterable[Group]:
        """Divide a stack into what one launch each computes: all experts, unless they are decoded before."""
        if isinstance(stack, QuantizedStack) and stack.format not in IN_PRODUCTS:
            return decoded_groups(stack, self.offsets, self.ends, transposed)
        return [all_experts(stack, self.offsets, self.num_choices, transposed)]

    def tile(self, kind: str, columns: int, inside: int) -> dict[str, Any]:
        """Choose the tile of a launch, as its arguments."""
        rows = 0 if kind == "outer" else power_of_two(max(self.num_choices // self.num_experts, 1))
        problem = Problem(kind, self.dtype, rows, columns, inside)
        return choose_tile(problem, self.permutation.device).options(kind)

    def grid(self, group: Group, options: dict[str, int], columns: int) -> tuple[int]:
        """Return the number of programs for the most tiles that there can be.

        An expert with choices has at most one tile that is not full.
        """
        rows = group.num_choices // options["BLOCK_ROWS"] + min(group.num_choices, len(group.matrices))
        return (rows * ceil_div(columns, options["BLOCK_COLUMNS"]),)

    def product(
        self,
        rows: torch.Tensor,
        stack: Any,
        *,
        by_token: bool,
        transposed: bool = False,
        weights: torch.Tensor | None = None,
        to_choices: bool = False,
        beside: LowRank = NOTHING,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """Multiply rows by a stack (E, in, out), or transposed (E, out, in). See `product_kernel`."""
        inside, columns = stack.shape[:0:-1] if transposed else stack.shape[1:]
        out = rows.new_empty(self.num_choices, columns)
        options = self.tile("product", columns, inside)
        if beside.dropout:  # with its mask the usual tile would spill (sm_80, Triton 3.9)
            options |= {"BLOCK_COLUMNS": min(options["BLOCK_COLUMNS"], 128), "BLOCK_IN": min(options["BLOCK_IN"], 32)}
        options = fit(options, stack, transposed)
        for group in self.groups(stack, transposed):
            reading = _reading(group, options, transposed)
            product_kernel[self.grid(group, options, columns)](
                rows,
                reading.source,
                reading.scales,
                beside.inner,
                beside.part(group.experts),
                weights,
                self.permutation,
                group.offsets,
                out,
                beside.seed,
                scale,
                beside.dropout,
                *reading.strides,
                *beside.strides,
                IN=inside,
                OUT=columns,
                **beside.rank,
                BY_TOKEN=by_token,
                TO_CHOICES=to_choices,
                **self.constants,
                **reading.options,
            )
        return out

    def inner(self, rows: torch.Tensor, adapter: Adapter | None, by_token: bool) -> torch.Tensor | None:
        """Compute an adapter's inner rows (S, R), with dropout and scale."""
        if adapter is None:
            return None
        factor = adapter.factor_a.transpose(1, 2)
        return self.product(rows, factor, by_token=by_token, scale=adapter.scale, beside=_noise(adapter))

    def inner_gradient(self, grad: torch.Tensor, adapter: Adapter | None, by_token: bool) -> torch.Tensor | None:
        """Compute the gradient at an adapter's inner rows (S, R), with the scale."""
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
        noise: LowRank = NOTHING,
    ) -> torch.Tensor:
        """Compute a parameter's gradient (E, M, N). See `outer_kernel`."""
        rows, columns = left.shape[1], right.shape[1]
        out = left.new_empty(self.num_experts, rows, columns)
        options = self.tile("outer", columns, rows)
        tiles = ceil_div(rows, options["BLOCK_M"]) * ceil_div(columns, options["BLOCK_N"])
        outer_kernel[(self.num_experts * tiles,)](
            left,
            right,
            self.permutation,
            self.offsets,
            out,
            noise.seed,
            noise.dropout,
            M=rows,
            N=columns,
            LEFT_BY_TOKEN=left_by_token,
            RIGHT_BY_TOKEN=right_by_token,
            **self.constants,
            **options,
        )
        return out

    def combine(self, by_choice: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        """Sum the choices of every token, (T, D)."""
        num_tokens, top_k = expert_ids.shape
        hidden_size = by_choice.shape[1]
        out = by_choice.new_empty(num_tokens, hidden_size)
        columns = min(power_of_two(hidden_size), 512)
        combine_kernel[(ceil_div(num_tokens, 4), ceil_div(hidden_size, columns))](
            by_choice,
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
    operands: ExpertOperands, permutation: torch.Tensor, offsets: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as [`experts_loop.experts_forward_loop`] does, in kernels.

    The permutation is int32, which the kernels read with half the bytes.
    """
    hidden, gate_up, down = operands.hidden, operands.gate_up, operands.down
    width, num_choices = down.shape[-1], len(permutation)
    kept = hidden.new_empty(num_choices if keep else 0, 2 * width)
    if not num_choices:
        return torch.zeros_like(hidden), kept
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        launch = _Launcher(permutation, offsets, operands.weights.shape[1], hidden.dtype)
        inner = launch.inner(hidden, operands.gate_up_adapter, by_token=True)
        first = LowRank(inner, None if operands.gate_up_adapter is None else operands.gate_up_adapter.factor_b)
        act = hidden.new_empty(num_choices, width)
        options = fit(launch.tile("first", width, hidden.shape[1]), gate_up, True)
        for group in launch.groups(gate_up, transposed=True):
            reading = _reading(group, options)
            first_product_kernel[launch.grid(group, options, width)](
                hidden,
                reading.source,
                reading.scales,
                first.inner,
                first.part(group.experts),
                permutation,
                group.offsets,
                kept if keep else None,
                act,
                *reading.strides[:1],
                *reading.strides[2:0:-1],
                *reading.strides[3:],
                *first.strides,
                D=hidden.shape[1],
                WIDTH=width,
                **first.rank,
                **launch.constants,
                # Hopper needs fewer registers to store a half of the columns at a time, and Ampere more.
                PART=options["BLOCK_COLUMNS"] // (2 if has_large_tiles(hidden.device) else 1),
                **_constants(operands.gating),
                **reading.options,
            )
        second = NOTHING
        if operands.down_adapter is not None:
            inner = launch.inner(act, operands.down_adapter, by_token=False)
            second = LowRank(inner, operands.down_adapter.factor_b.transpose(1, 2))
        by_choice = launch.product(
            act, down, transposed=True, by_token=False, weights=operands.weights, to_choices=True, beside=second
        )
        return launch.combine(by_choice, operands.expert_ids), kept


def experts_backward_triton(
    grad: torch.Tensor,
    operands: ExpertOperands,
    permutation: torch.Tensor,
    offsets: torch.Tensor,
    kept: torch.Tensor,
    needs: ExpertGradients,
) -> ExpertGradients:
    """Do as [`experts_loop.experts_backward_loop`] does, in kernels."""
    differentiable = operands.differentiable()
    if not len(permutation):
        empty = zip(differentiable, needs, strict=True)
        return ExpertGradients(*(value.new_zeros(value.shape) if need else None for value, need in empty))
    with torch.cuda.device_of(operands.hidden):
        launch = _Launcher(permutation, offsets, operands.weights.shape[1], operands.hidden.dtype)
        inner = launch.inner_gradient(grad, operands.down_adapter, by_token=True)
        both, act, grad_weights = _pass_second_product(launch, grad, operands, inner, kept, needs)
        results = _NO_GRADIENTS._replace(weights=grad_weights)
        noise = _noise(operands.down_adapter)
        if needs.down:
            results = results._replace(down=launch.outer(grad, act, left_by_token=True))
        if needs.down_a:
            results = results._replace(down_a=launch.outer(inner, act, noise=noise))
        if needs.down_b:
            inner = launch.inner(act, operands.down_adapter, by_token=False)
            results = results._replace(down_b=launch.outer(grad, inner, left_by_token=True))
        return _pass_first_product(launch, both, operands, needs, results)


def _pass_second_product(
    launch: _Launcher,
    grad: torch.Tensor,
    operands: ExpertOperands,
    inner: torch.Tensor | None,
    kept: torch.Tensor,
    needs: ExpertGradients,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Go back through the second product and the activation, in one launch.

    Returns:
        The gradient of the first product (S, 2I), the activation (S, I) if parameters need it, and the gradient of the
        gate's weights (T, K) if it is wanted.
    """
    hidden, weights, down = operands.hidden, operands.weights, operands.down
    width, num_choices = down.shape[-1], launch.num_choices
    noise, adapter = _noise(operands.down_adapter), operands.down_adapter
    options = launch.tile("activation_gradient", width, hidden.shape[1])
    if noise.dropout:  # as for a product
        options["BLOCK_COLUMNS"] = min(options["BLOCK_COLUMNS"], 64)
    both = hidden.new_empty(num_choices, 2 * width)
    act = hidden.new_empty(num_choices, width) if any(needs.of_second_product) else None
    options = fit(options, down, False)
    parts = weights.new_zeros(num_choices, ceil_div(width, options["BLOCK_COLUMNS"]), dtype=torch.float32)
    beside = LowRank(inner, None if adapter is None else adapter.factor_a)
    part = PART if operands.gating.limit is None else PART // 2  # a clamp needs gates and ups as they were, too
    for group in launch.groups(down, transposed=False):
        reading = _reading(group, options, transposed=False)
        activation_gradient_kernel[launch.grid(group, options, width)](
            grad,
            reading.source,
            reading.scales,
            beside.inner,
            beside.part(group.experts),
            kept,
            weights,
            launch.permutation,
            group.offsets,
            both,
            act,
            parts,
            noise.seed,
            noise.dropout,
            *reading.strides,
            *beside.strides,
            D=hidden.shape[1],
            WIDTH=width,
            PART=part,
            **_constants(operands.gating),
            **beside.rank,
            **launch.constants,
            **reading.options,
        )
    return both, act, parts.sum(dim=1).view_as(weights).to(weights.dtype) if needs.weights else None


def _pass_first_product(
    launch: _Launcher,
    both: torch.Tensor,
    operands: ExpertOperands,
    needs: ExpertGradients,
    results: ExpertGradients,
) -> ExpertGradients:
    """Add the gradients of the tokens and of the first product's parameters to the results."""
    hidden, adapter = operands.hidden, operands.gate_up_adapter
    needs_inner = needs.hidden or needs.gate_up_a
    inner = launch.inner_gradient(both, adapter, by_token=False) if needs_inner else None
    noise = _noise(adapter)
    if needs.hidden:
        beside = noise._replace(inner=inner, factors=None if adapter is None else adapter.factor_a)
        by_choice = launch.product(both, operands.gate_up, by_token=False, to_choices=True, beside=beside)
        results = results._replace(hidden=launch.combine(by_choice, operands.expert_ids))
    if needs.gate_up:
        results = results._replace(gate_up=launch.outer(both, hidden, right_by_token=True))
    if needs.gate_up_a:
        results = results._replace(gate_up_a=launch.outer(inner, hidden, right_by_token=True, noise=noise))
    if needs.gate_up_b:
        results = results._replace(gate_up_b=launch.outer(both, launch.inner(hidden, adapter, by_token=True)))
    return results


def _constants(gating: Gating) -> dict[str, float | None]:
    """Return the numbers of the activation that a kernel is compiled for."""
    linear, cubic = gating.sigmoid
    return {"LIMIT": gating.limit, "LINEAR": linear, "CUBIC": cubic, "OFFSET": gating.offset}


def _noise(adapter: Adapter | None) -> LowRank:
    """Return an adapter's dropout alone."""
    if adapter is None or not adapter.dropout:
        return NOTHING
    return LowRank(dropout=adapter.dropout, seed=adapter.seed)


_NO_GRADIENTS = ExpertGradients(*[None] * len(ExpertGradients._fields))

__all__ = ["experts_backward_triton", "experts_forward_triton", "why_not_fused"]
