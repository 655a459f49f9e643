# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Routing in fused kernels, as operators of `torch.library`, so that `torch.compile` and CUDA graphs take them.

One launch chooses the experts, weighs, counts, and adds up what the balance losses need. One launch is its gradient.
Two launches bring the choices into the order of the experts. Nothing waits for the host. `routing` says what the
operators compute, and checks the arguments.
"""

import functools
import re
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from .configuration_checks import check_implementation
from .kernel_trial import Case, why_failed
from .routing_kernels import count_kernel, group_kernel, route_backward_kernel, route_kernel
from .triton_support import INTERPRETED, ceil_div, power_of_two, triton, why_no_triton

logger = logging.get_logger(__name__)

MAX_EXPERTS = 1024
MAX_TOP_K = 32
MAX_GROUPS = 64  # every group has a lane of every other one's
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 8  # of a program of routing, each of which has rows of its own
# CUDA's barrier orders what all warps of a program have added before what its first warp does next. ROCm's does not.
ORDER = "relaxed" if torch.version.hip is None else "acq_rel"
# Of a training step: every program adds its counts to the same numbers, and more of them would wait for each other.
MAX_PROGRAMS = 256
# A copy of this file on the Hub registers operators of its own.
_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)


def why_not_triton(tensor: torch.Tensor, num_experts: int, top_k: int = 1, num_groups: int = 1) -> str:
    """Return the reason why the kernels do not take an input; it is empty if they do.

    Args:
        tensor: logits, or expert ids.
        num_experts (`int`): E.
        top_k (`int`): K.
        num_groups (`int`): G; 1 if none is left out.
    """
    if reason := why_no_triton(tensor.device):
        return reason
    if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
        return f"the logits are {tensor.dtype}, and the kernels take float32, bfloat16 and float16"
    for size, largest, name in (
        (num_experts, MAX_EXPERTS, "experts"),
        (top_k, MAX_TOP_K, "choices of a token"),
        (num_groups, MAX_GROUPS, "groups"),
    ):
        if size > largest:
            return f"there are {size} {name}, and the kernels take at most {largest}"
    return ""


def uses_triton(trial: str, implementation: str, tensor: torch.Tensor, *sizes: int, case: Case = ()) -> bool:
    """Tell whether an implementation means the kernels for an input. [`why_not_triton`] says what `sizes` are.

    Args:
        trial: the trial that the kernels must have passed.
        implementation, tensor, sizes: what is asked for, and for what.
        case: the case of the trial.

    Raises:
        ValueError: for another implementation, or for `"triton"` if the kernels do not take the input, or have failed.
    """
    check_implementation(implementation)
    if implementation == "eager":
        return False
    if implementation == "triton":
        if reason := why_not_triton(tensor, *sizes) or why_failed(trial, tensor.device, case):
            raise ValueError(f"implementation='triton' is not allowed: {reason}.")
        return True
    reason = why_eager(trial, tensor, *sizes, case=case)
    if not torch.compiler.is_compiling():
        _tell(tensor.device.type, reason)
    return not reason


def why_eager(trial: str, tensor: torch.Tensor, *sizes: int, case: Case = ()) -> str:
    """Return the reason why `"auto"` means `"eager"` for an input; it is empty if it means the kernels."""
    reason = why_not_triton(tensor, *sizes) or why_failed(trial, tensor.device, case)
    return reason or ("the interpreter of Triton is for tests" if INTERPRETED else "")


@functools.cache
def _tell(device_type: str, reason: str) -> None:
    """Log once which implementation "auto" means: as a warning if there is a GPU that could do better."""
    if reason:
        log = logger.warning if device_type == "cuda" else logger.info
        log(f"Routing on {device_type}: implementation='auto' is 'eager', because {reason}.")
    else:
        logger.info(f"Routing on {device_type}: implementation='auto' is 'triton'.")


@functools.cache
def route_options(
    num_experts: int, top_k: int, num_groups: int, top_k_groups: int, warp_size: int = 32
) -> dict[str, int]:
    """Return the sizes that the forward kernel is compiled for, on a GPU with that many threads in a warp.

    A warp has one row at a time, or as many as fit into 32 threads. Where warps have 64, those of rows that are
    narrower do the same as others.
    """
    groups = num_groups if top_k_groups < num_groups else 1
    group_width = power_of_two(num_experts // groups)
    width = power_of_two(groups) * group_width
    return {
        "E": num_experts,
        "K": top_k,
        "K_WIDTH": power_of_two(top_k),
        "GROUPS": groups,
        "KEPT_GROUPS": top_k_groups if groups > 1 else 1,
        "WIDTH": width,
        "GROUP_WIDTH": group_width,
        "LANES": min(width, warp_size),
        "BLOCK": WARPS * max(32 // width, 1),
    }


def _warp_size(device: torch.device) -> int:
    """Return the number of threads of a warp."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


@functools.cache
def route_backward_options(num_experts: int, top_k: int) -> dict[str, int]:
    """Return the sizes that the backward kernel is compiled for."""
    width = power_of_two(num_experts)
    block = min(max(256 // width, 1), 32)
    return {"E": num_experts, "K": top_k, "K_WIDTH": power_of_two(top_k), "WIDTH": width, "BLOCK": block}


@functools.cache
def group_options(num_experts: int) -> dict[str, int]:
    """Return the sizes that the kernels of grouping are compiled for.

    Every choice of a block meets every other one, so a block has as few as fill the warps.
    """
    width = max(power_of_two(num_experts), 32)
    return {"WIDTH": width, "BLOCK": 64, "ROWS": max(4096 // width, 1)}


class _RouteInputs(NamedTuple):
    """The operator's inputs, or the gradients of those that have one."""

    router_logits: Any = None
    correction_bias: Any = None
    token_mask: Any = None
    top_k: Any = None
    score_function: Any = None
    num_groups: Any = None
    top_k_groups: Any = None
    group_score: Any = None
    epsilon: Any = None
    scaling_factor: Any = None
    bias_on_logits: Any = None
    num_sequences: Any = None
    statistics: Any = None


_NO_GRADIENTS = _RouteInputs()


def _route(
    router_logits: torch.Tensor,
    correction_bias: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    top_k: int,
    score_function: str,
    num_groups: int,
    top_k_groups: int,
    group_score: str,
    epsilon: float | None,
    scaling_factor: float,
    bias_on_logits: bool,
    num_sequences: int,
    statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = router_logits.shape
    logits = router_logits if router_logits.stride(1) == 1 else router_logits.contiguous()
    expert_ids = logits.new_empty((num_tokens, top_k), dtype=torch.int64)
    weights = logits.new_empty((num_tokens, top_k), dtype=torch.float32)
    rows = num_sequences if statistics else 0
    length = num_tokens // num_sequences if statistics else num_tokens
    score_sums = logits.new_empty((rows, num_experts), dtype=torch.float32)
    # One memset for all that is counted; even lengths, since a kernel is compiled once more for pointers that are not
    # multiples of 16 bytes.
    even_sums, even_rows = rows * num_experts + rows * num_experts % 2, rows + rows % 2
    zeros = logits.new_zeros(2 * even_sums + 2 * even_rows, dtype=torch.int64)
    counts, fixed_sums, nan_rows, arrivals = zeros.split([even_sums, even_sums, even_rows, even_rows])
    if not num_tokens:
        score_sums.zero_()
    else:
        options = route_options(num_experts, top_k, num_groups, top_k_groups, _warp_size(logits.device))
        blocks = ceil_div(length, options["BLOCK"])
        # The number of programs does not depend on the device: on all of them the same tokens are added up together.
        blocks_per_program = ceil_div(blocks, max(MAX_PROGRAMS // max(rows, 1), 1)) if statistics else 1
        programs = ceil_div(blocks, blocks_per_program)
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            route_kernel[(programs * max(rows, 1),)](
                logits,
                correction_bias if correction_bias is None else correction_bias.contiguous(),
                token_mask if token_mask is None else token_mask.contiguous(),
                *(expert_ids, weights, counts, fixed_sums, nan_rows, arrivals, score_sums),
                logits.stride(0),
                length,
                programs,
                blocks_per_program * options["BLOCK"],
                scaling_factor,
                epsilon or 0.0,
                **options,
                SCORE_FUNCTION=score_function,
                TOP2_SUM=group_score == "top2_sum",
                NORMALIZE=epsilon is not None,
                BIAS_ON_LOGITS=bias_on_logits,
                STATISTICS=statistics,
                ORDER=ORDER,
                num_warps=WARPS,
            )
    return expert_ids, weights, counts[: rows * num_experts].view(rows, num_experts), score_sums


def _route_backward(
    grad_weights: torch.Tensor | None,
    grad_sums: torch.Tensor | None,
    router_logits: torch.Tensor,
    expert_ids: torch.Tensor,
    token_mask: torch.Tensor | None,
    score_function: str,
    epsilon: float | None,
    scaling_factor: float,
) -> torch.Tensor:
    num_tokens, num_experts = router_logits.shape
    logits = router_logits if router_logits.stride(1) == 1 else router_logits.contiguous()
    grad_logits = logits.new_empty(logits.shape)
    if num_tokens:
        options = route_backward_options(num_experts, expert_ids.shape[1])
        strides = (0, 0) if grad_weights is None else grad_weights.stride()
        with torch.cuda.device_of(logits):
            route_backward_kernel[(ceil_div(num_tokens, options["BLOCK"]),)](
                logits,
                token_mask if token_mask is None else token_mask.contiguous(),
                expert_ids,
                grad_weights,
                grad_sums if grad_sums is None else grad_sums.contiguous(),
                grad_logits,
                num_tokens,
                logits.stride(0),
                *strides,
                num_tokens // len(grad_sums) if grad_sums is not None else num_tokens,
                scaling_factor,
                epsilon or 0.0,
                **options,
                SCORE_FUNCTION=score_function,
                NORMALIZE=epsilon is not None,
                num_warps=1,
            )
    return grad_logits


def group_choices(
    expert_ids: torch.Tensor, num_experts: int, dtype: torch.dtype, with_inverse: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Bring all choices into the order of their experts, in two launches.

    Args:
        expert_ids (`torch.Tensor` of shape (T, K)), num_experts: as for `group_by_expert`.
        dtype: that of the permutation and its inverse, int64 or int32.
        with_inverse: whether the inverse is wanted.

    Returns:
        Permutation, inverse and offsets of `ExpertGroups`.
    """
    ids = expert_ids.contiguous().flatten()
    permutation = torch.empty_like(ids, dtype=dtype)
    inverse = torch.empty_like(permutation) if with_inverse else None
    offsets = (ids.new_empty if len(ids) else ids.new_zeros)(num_experts + 1, dtype=torch.int32)
    if len(ids):
        options = group_options(num_experts)
        per_program = ceil_div(ceil_div(len(ids), options["BLOCK"]), 128) * options["BLOCK"]
        programs = ceil_div(len(ids), per_program)
        histograms = ids.new_empty((programs, num_experts), dtype=torch.int32)
        counting = {name: options[name] for name in ("WIDTH", "BLOCK")}
        with torch.cuda.device_of(ids):
            count_kernel[(programs,)](ids, histograms, len(ids), per_program, num_experts, **counting, num_warps=4)
            group_kernel[(programs,)](
                ids,
                histograms,
                permutation,
                inverse,
                offsets,
                len(ids),
                per_program,
                programs,
                num_experts,
                **options,
                num_warps=4,
            )
    return permutation, inverse, offsets


def _group_by_expert(expert_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    return group_choices(expert_ids, num_experts, torch.int64, with_inverse=True)


def _route_fake(
    router_logits: torch.Tensor, correction_bias: Any, token_mask: Any, top_k: int, *options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *_, num_sequences, statistics = options
    num_tokens, num_experts = router_logits.shape
    rows = num_sequences if statistics else 0
    return (
        router_logits.new_empty((num_tokens, top_k), dtype=torch.int64),
        router_logits.new_empty((num_tokens, top_k), dtype=torch.float32),
        router_logits.new_empty((rows, num_experts), dtype=torch.int64),
        router_logits.new_empty((rows, num_experts), dtype=torch.float32),
    )


def _group_by_expert_fake(expert_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    places = expert_ids.new_empty(expert_ids.numel(), dtype=torch.int64)
    return places, torch.empty_like(places), expert_ids.new_empty(num_experts + 1, dtype=torch.int32)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    given = _RouteInputs(*inputs)
    expert_ids, _, counts, _ = output
    ctx.mark_non_differentiable(expert_ids, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(given.router_logits, expert_ids, given.token_mask)
    ctx.options = (given.score_function, given.epsilon, given.scaling_factor)


def _backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    _, grad_weights, _, grad_sums = grads
    router_logits, expert_ids, token_mask = ctx.saved_tensors
    if grad_weights is None and grad_sums is None:
        return _NO_GRADIENTS
    grad = route_backward_op(grad_weights, grad_sums, router_logits, expert_ids, token_mask, *ctx.options)
    return _NO_GRADIENTS._replace(router_logits=grad)


if triton is not None:
    route_op = torch.library.custom_op(
        f"{_NAMESPACE}::route",
        _route,
        mutates_args=(),
        schema="(Tensor router_logits, Tensor? correction_bias, Tensor? token_mask, int top_k, str score_function, "
        "int num_groups, int top_k_groups, str group_score, float? epsilon, float scaling_factor, "
        "bool bias_on_logits, SymInt num_sequences, bool statistics) -> (Tensor, Tensor, Tensor, Tensor)",
    )
    route_op.register_fake(_route_fake)
    route_op.register_autograd(_backward, setup_context=_save_for_backward)
    route_backward_op = torch.library.custom_op(
        f"{_NAMESPACE}::route_backward",
        _route_backward,
        mutates_args=(),
        schema="(Tensor? grad_weights, Tensor? grad_sums, Tensor router_logits, Tensor expert_ids, "
        "Tensor? token_mask, str score_function, float? epsilon, float scaling_factor) -> Tensor",
    )
    route_backward_op.register_fake(lambda grad_weights, grad_sums, logits, *_: logits.new_empty(logits.shape))
    group_by_expert_op = torch.library.custom_op(
        f"{_NAMESPACE}::group_by_expert",
        _group_by_expert,
        mutates_args=(),
        schema="(Tensor expert_ids, int num_experts) -> (Tensor, Tensor, Tensor)",
    )
    group_by_expert_op.register_fake(_group_by_expert_fake)


def route_triton(
    router_logits: torch.Tensor,
    options: Any,
    correction_bias: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    num_sequences: int,
    statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Compute the fields of the `Routing` of checked arguments.

    Args:
        options: `RoutingOptions` of `routing`, which imports this file.
        router_logits, correction_bias, token_mask, num_sequences, statistics: as for `choose_experts` there.
    """
    expert_ids, weights, counts, score_sums = route_op(
        router_logits,
        correction_bias,
        token_mask,
        options.top_k,
        options.score_function,
        options.num_groups,
        options.top_k_groups,
        options.group_score,
        float(options.epsilon) if options.normalize else None,
        float(options.scaling_factor),
        options.bias_on == "logits",
        num_sequences,
        statistics,
    )
    return (expert_ids, weights, counts, score_sums) if statistics else (expert_ids, weights, None, None)


def group_by_expert_triton(
    expert_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the fields of the `ExpertGroups` of checked arguments."""
    return group_by_expert_op(expert_ids, num_experts)


__all__ = [
    "MAX_EXPERTS",
    "MAX_GROUPS",
    "MAX_TOP_K",
    "group_by_expert_triton",
    "group_choices",
    "route_triton",
    "uses_triton",
    "why_eager",
    "why_not_triton",
]
