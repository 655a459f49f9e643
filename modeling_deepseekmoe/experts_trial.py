# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The trial of the experts' kernels: one layer with adapters, forward and backward, beside the loop in float32."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .experts_gating import Gating
from .experts_loop import experts_backward_loop, experts_forward_loop
from .experts_operands import Adapter, ExpertGradients, ExpertOperands
from .experts_quantized import QuantizedStack
from .experts_sources import IN_PRODUCTS
from .experts_tiles import Problem, Tile, gpu_of, measured_rule, use_tiles
from .experts_triton import experts_backward_triton, experts_forward_triton
from .grouping import group_by_expert
from .kernel_trial import compare, register_trial

TRIAL = "experts"
# Tokens, experts, of which one is never chosen and one is on another rank, K, D, I, R: as few kernels as possible.
_TOKENS, _EXPERTS, _TOP_K, _HIDDEN, _WIDTH, _RANK = 40, 5, 3, 64, 32, 16
_TOLERANCE = 2e-2  # of bfloat16, after two products


@register_trial(TRIAL)
def try_experts(device: torch.device, function: str = "silu", *numbers: str) -> None:
    """Compare output and gradients of the kernels in bfloat16 with those of the loop in float32.

    Two sizes of tiles are tried: those of a small layer, with adapters, and those of a large one, without, since a
    kernel takes half a second to compile.

    Args:
        device: where the kernels run.
        function, numbers: the [`Gating.trial_case`] of the experts and, if their stacks are decoded inside the
            products, the format.

    Raises:
        WrongKernelError: if they differ.
        Exception: whatever a kernel that does not compile or run raises.
    """

    def large(problem: Problem) -> Tile:
        """Choose the tile that a layer of a released model would have."""
        rows = 0 if problem.kind == "outer" else 512
        return measured_rule(problem._replace(rows=rows, columns=2048, inside=2048), gpu_of(device))

    # A limit that the numbers here reach, and do not meet: they are multiples of 1/64.
    limit, slope, offset = (
        0.51 if "clamp" in numbers else None,
        1.7 if "slope" in numbers else 1.0,
        "offset" in numbers,
    )
    gating = Gating(function, limit, slope, float(offset))
    operands, grad = _inputs(gating, next((word for word in numbers if word in IN_PRODUCTS), ""))
    results = []
    for adapted, choose in ((True, lambda _: None), (False, large)):
        if not adapted:
            operands = operands._replace(gate_up_adapter=None, down_adapter=None)
        with use_tiles(choose):
            results.append((_run(torch.device("cpu"), False, operands, grad), _run(device, True, operands, grad)))
    for expected, found in results:
        for name, result in found.items():
            compare(name, result, expected[name], _TOLERANCE)


def _run(
    device: torch.device, of_kernels: bool, operands: ExpertOperands, grad: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Compute output and gradients with the kernels in bfloat16, or with the loop in float32."""
    wanted = ExpertGradients(*(value is not None for value in operands.differentiable()))
    given = _moved(operands, device, of_kernels)
    # The order comes from plain torch: the grouping kernels have a trial of their own.
    permutation, _, offsets = group_by_expert(given.expert_ids, _EXPERTS, implementation="eager")
    gradient = grad.to(given.hidden)
    if of_kernels:
        order = permutation.to(torch.int32), offsets
        output, kept = experts_forward_triton(given, *order, True)
        gradients = experts_backward_triton(gradient, given, *order, kept, wanted)
    else:
        output, kept = experts_forward_loop(given, permutation, offsets, True)
        gradients = experts_backward_loop(gradient, given, permutation, offsets, kept, wanted)
    found = {f"the gradient of {name}": of for name, of in gradients._asdict().items() if of is not None}
    return {"the output": output} | found


def _inputs(gating: Gating, kind: str) -> tuple[ExpertOperands, torch.Tensor]:
    """Make the operands, and the gradient of the output, in numbers that bfloat16 has; stacks maybe in a format.

    It has the first product, too, of numbers as coarse as these: a gate near its limit would else be rounded to one of
    the two sides, and have a gradient on one of them.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float32) * scale).bfloat16().float()

    def coarse(*shape: int, unit: float) -> torch.Tensor:
        return torch.randint(-1, 2, shape, generator=generator).float() * unit

    ids = torch.stack([torch.randperm(_EXPERTS, generator=generator)[:_TOP_K] for _ in range(_TOKENS)])
    ids[ids == 3] = _EXPERTS  # another rank's
    ids[ids == 1] = 0  # equal choices of a token; the expert 1 has none
    hidden, gate_up = coarse(_TOKENS, _HIDDEN, unit=1), coarse(_EXPERTS, 2 * _WIDTH, _HIDDEN, unit=1 / 8)
    of_first = Adapter(coarse(_EXPERTS, _RANK, _HIDDEN, unit=1), coarse(_EXPERTS, 2 * _WIDTH, _RANK, unit=1 / 32), 0.5)
    of_second = Adapter(
        numbers(_EXPERTS, _RANK, _WIDTH, scale=_WIDTH**-0.5), numbers(_EXPERTS, _HIDDEN, _RANK, scale=0.2), 0.5
    )
    down = numbers(_EXPERTS, _HIDDEN, _WIDTH, scale=0.2)
    weights = torch.rand(_TOKENS, _TOP_K, generator=generator, dtype=torch.float32).bfloat16().float()
    operands = ExpertOperands(hidden, ids, weights, gate_up, down, gating, of_first, of_second)
    if kind:
        stacks = (_quantized(kind, 2, _HIDDEN, generator), _quantized(kind, 1, _WIDTH, generator))
        operands = operands._replace(gate_up=stacks[0], down=stacks[1])
    return operands, numbers(_TOKENS, _HIDDEN)


def _quantized(kind: str, projections: int, columns: int, generator: torch.Generator) -> QuantizedStack:
    """Make a stack in a format, of numbers that are multiples of 1/64."""

    def draw(values: Sequence[int], *shape: int) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    rows = 2 * _WIDTH if projections == 2 else _HIDDEN
    if kind == "mxfp4":
        codes, exponents = (
            draw(range(256), _EXPERTS, rows, columns // 2),
            draw((122, 123), _EXPERTS, rows, columns // 32),
        )
        return QuantizedStack(kind, codes.byte(), exponents.byte(), None, torch.float32)
    codes = draw((0, 48, 56, 60, 176, 184, 188), _EXPERTS, rows, columns)  # 0, 0.5, 1 and 1.5
    codes[0] = draw((0, 1, 2, 3, 129, 130, 131), rows, columns)  # subnormal: up to 3/512
    scales = draw((2, 4), _EXPERTS, projections, 1, 1) / 32
    scales[0] *= 256
    return QuantizedStack(kind, codes.byte(), scales.float(), None, torch.float32)


def _moved(operands: ExpertOperands, device: torch.device, to_bfloat16: bool) -> ExpertOperands:
    dtype = torch.bfloat16 if to_bfloat16 else torch.float32

    def moved(value: Any) -> Any:
        if value is None or isinstance(value, Gating):
            return value
        if isinstance(value, QuantizedStack):
            return replace(value, codes=value.codes.to(device), scales=value.scales.to(device), dtype=dtype)
        if isinstance(value, Adapter):
            return value._replace(factor_a=moved(value.factor_a), factor_b=moved(value.factor_b))
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return ExpertOperands(*map(moved, operands))


__all__ = ["TRIAL", "try_experts"]
