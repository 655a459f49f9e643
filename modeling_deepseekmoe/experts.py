# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The experts implementation `"deepseekmoe"`, for this family and other models of transformers with stacked experts.

It computes experts that are stacked as `gate_up_proj` (E, 2I, D) and `down_proj` (E, D, I): DeepSeek-V2 and V3,
Qwen3-MoE, Mixtral, OLMoE, and this family.

The backend is chosen for every call ([`choose_backend`]):
- `"triton"`: fused kernels for all experts (`experts_triton`), on CUDA and ROCm;
- `"loop"`: one expert after the other (`experts_loop`), on the CPU;
- `"grouped"`: torch's grouped products (`experts_grouped`), everywhere else, and on the CPU for small experts, and for
  few tokens in 16 bits without a gradient.

Shape letters: T tokens, D hidden, E routed experts, K chosen experts, I expert width, S = T * K choices (a token at
one of its experts).
"""

import functools
from collections.abc import Sequence

import torch
from torch import nn
from transformers.utils import logging

from .checkpoint_layout import STACKS
from .experts_gating import SILU, Gating, gating_numbers
from .experts_grouped import GroupedChoices, grouped_linear, run_grouped
from .experts_operands import Adapter, ExpertOperands
from .experts_operator import run_operator
from .experts_products import WIDEN_FROM, has_instructions
from .experts_quantized import FORMAT_ATTRIBUTE, QuantizedStack, stack_of
from .experts_sources import IN_PRODUCTS
from .experts_trial import TRIAL as EXPERTS_TRIAL
from .experts_triton import why_not_fused
from .grouping import TRIAL as GROUPING_TRIAL
from .kernel_trial import why_failed
from .transformers_support import ALL_EXPERTS_FUNCTIONS, gating_of

logger = logging.get_logger(__name__)

IMPLEMENTATION = "deepseekmoe"
BACKENDS = ("triton", "loop", "grouped")
FUSED_BACKENDS = ("triton", "loop")
# Hidden times width of an expert. Measured on two cores, with 8 and 64 experts: below it the calls of the loop cost
# more than what it saves.
LOOP_FROM = 2**18
_OTHER_GATING = (
    "their activation is neither silu(gate) * up, with or without a clamp, slope and offset, nor gelu(gate) * up in "
    "the tanh form"
)


def refuse_offloaded(experts: nn.Module) -> None:
    """Raise a `ValueError` if the weights of adapted or partly trained experts are offloaded."""
    if experts.gate_up_proj.is_meta:
        raise ValueError("Offloaded weights are not allowed together with adapted or partly trained experts.")


def experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute the weighted sum of the chosen experts' outputs. `experts_implementation="deepseekmoe"` calls this.

    Under autocast the products are in its dtype, as those of `nn.Linear` are.

    Args:
        experts: the module that holds the stacks.
        hidden_states (`torch.Tensor` of shape (T, D)).
        top_k_index (`torch.LongTensor` of shape (T, K)): expert ids. The id E stands for an expert that another rank
            of an expert-parallel group holds, and is passed over.
        top_k_weights (`torch.Tensor` of shape (T, K)): of any floating dtype.

    Returns:
        `torch.Tensor` of shape (T, D), in the dtype of `hidden_states`.

    Raises:
        ValueError: if the experts are not supported; [`why_unsupported`] gives the reason.
    """
    reason = why_unsupported(experts)
    if reason is not None:
        raise ValueError(
            f"experts_implementation={IMPLEMENTATION!r} is not allowed for {type(experts).__name__}: {reason}. "
            "Choose 'grouped_mm', 'batched_mm' or 'eager'."
        )
    if torch.onnx.is_in_onnx_export():  # which has neither this operator nor grouped products
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](experts, hidden_states, top_k_index, top_k_weights)
    computes_with = experts.__dict__.get("computes_with")  # set while adapters compute on ranks that share the experts
    if computes_with is not None:
        return computes_with(hidden_states, top_k_index, top_k_weights)
    return run_experts(experts, hidden_states, top_k_index, top_k_weights)


def run_experts(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    stacks: tuple[torch.Tensor, torch.Tensor] | None = None,
    adapters: Sequence[Adapter | None] = (None, None),
    backend: str | None = None,
) -> torch.Tensor:
    """Do as [`experts_forward`] does, without its checks.

    Args:
        experts, hidden_states, top_k_index, top_k_weights: as there.
        stacks: weights to compute with instead of the module's own.
        adapters ([`Adapter`], *optional*): those beside `gate_up_proj` and `down_proj`. Only `"triton"` and `"loop"`
            take them.
        backend: one of `BACKENDS`; by default what [`choose_backend`] says.

    Returns:
        `torch.Tensor` of shape (T, D), in the dtype of `hidden_states`.

    Raises:
        ValueError: for another backend, for adapters with one that does not take them, or in an export to ONNX.
    """
    _refuse_onnx(experts)
    gate_up, down = (stack_of(experts, name) for name in STACKS) if stacks is None else stacks
    dtype, gating = compute_dtype(gate_up), gating_numbers(experts)
    adapted = any(adapter is not None for adapter in adapters)
    if backend is None:
        # Few tokens would have a backend that takes no adapters.
        backend, reason = choose_backend(experts, hidden_states, gate_up, None if adapted else top_k_index.shape[1])
        tell_backend(experts, hidden_states, backend, reason)
    elif backend == "triton" and (reason := _why_not_triton(hidden_states.device, dtype, gate_up, gating)):
        raise ValueError(f"backend='triton' is not allowed: {reason}.")
    if backend not in BACKENDS or (backend not in FUSED_BACKENDS and adapted):
        raise ValueError(
            f"backend={backend!r} is not allowed: one of {BACKENDS}, and with adapters one of {FUSED_BACKENDS}."
        )
    gate_up, down = gate_up.to(dtype), down.to(dtype)
    if backend in FUSED_BACKENDS:
        if gating is None:
            raise ValueError(f"backend={backend!r} is not allowed: {_OTHER_GATING}. It must be 'grouped'.")
        operands = ExpertOperands(
            hidden_states.to(dtype), top_k_index, top_k_weights, gate_up, down, gating, *adapters
        )
        return run_operator(operands, "triton" if backend == "triton" else "eager").to(hidden_states.dtype)
    by_name = dict(zip(STACKS, (gate_up, down), strict=True))

    def project(name: str, rows: torch.Tensor, choices: GroupedChoices) -> torch.Tensor:
        return grouped_linear(rows, by_name[name], choices)

    return run_grouped(experts, hidden_states, top_k_index, top_k_weights, project, len(gate_up))


def _refuse_onnx(experts: nn.Module) -> None:
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            f"An export of {type(experts).__name__} to ONNX is not allowed, which has no grouped products: call "
            "merge_and_unload() of an adapted model or merge_esft(model) first, or join sharded experts. Plain "
            "experts export as they are."
        )


def why_unsupported(experts: nn.Module) -> str | None:
    """Return the reason why [`run_experts`] cannot compute these experts, or `None` if it can."""
    for name in STACKS:
        parameter = getattr(experts, name, None)
        if not isinstance(parameter, torch.Tensor) or parameter.ndim != 3:
            return f"it has no stacked parameter {name} (E, out, in)"
        quantized = hasattr(experts, FORMAT_ATTRIBUTE)
        if not quantized and (not parameter.is_floating_point() or parameter.element_size() < 2):
            return f"its {name} is stored as {parameter.dtype}"
    for flag, wanted, meaning in (
        ("has_gate", True, "its experts have no gate projection"),
        ("has_bias", False, "its experts have biases"),
        ("is_transposed", False, "its weights are stored transposed"),
        ("has_post_expert_norm", False, "its experts end with a norm"),
    ):
        if getattr(experts, flag, wanted) is not wanted:
            return meaning
    if hasattr(experts, "selected_ids"):
        return "some of its experts are trained apart; call merge_esft first"
    if gating_of(experts) is None:
        return "it is not one of transformers' exchangeable experts implementations"
    return None


def choose_backend(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    stack: torch.Tensor | QuantizedStack | None = None,
    top_k: int | None = None,
) -> tuple[str, str]:
    """Choose the backend for an input. If it is not a fused one, say why.

    Args:
        experts: the module that holds the stacks.
        hidden_states (`torch.Tensor` of shape (T, D)).
        stack (`torch.Tensor` or [`QuantizedStack`] of shape (E, 2I, D), *optional*): weights other than the module's
            `gate_up_proj`.
        top_k (`int`, *optional*): K.

    Returns:
        One of `BACKENDS`, and the reason, which is empty for the fused ones.
    """
    stack = stack_of(experts, "gate_up_proj") if stack is None else stack
    num_experts, columns, hidden_size = stack.shape
    quantized = isinstance(stack, QuantizedStack)
    gating = gating_numbers(experts)
    if gating is None:
        return "grouped", _OTHER_GATING
    if hidden_states.device.type == "cuda":
        reason = _why_not_triton(hidden_states.device, compute_dtype(stack), stack, gating)
        return ("grouped", reason) if reason else ("triton", "")
    if hidden_states.device.type not in ("cpu", "meta"):
        return "grouped", f"the tensors are on the device {hidden_states.device.type!r}"
    if quantized or torch.compiler.is_compiling() or torch.jit.is_tracing():  # for any number of tokens
        return "loop", ""
    dtype = compute_dtype(stack)
    few = top_k is not None and len(hidden_states) * top_k < WIDEN_FROM * num_experts
    if few and dtype.itemsize == 2 and not torch.is_grad_enabled() and not experts.training:
        return "grouped", "an expert has so few tokens that its products are the fastest as they are stored"
    if not has_instructions(dtype):  # the loop widens
        return "loop", ""
    if columns // 2 * hidden_size >= LOOP_FROM:
        return "loop", ""
    return "grouped", f"an expert of {hidden_size} x {columns // 2} is so small that the calls would take longer"


def _why_not_triton(
    device: torch.device, dtype: torch.dtype, stack: torch.Tensor | QuantizedStack, gating: Gating | None
) -> str:
    """Return why the kernels do not compute such experts: they do not take them, or have failed a trial."""
    case = () if gating is None else gating.trial_case
    if isinstance(stack, QuantizedStack) and stack.format in IN_PRODUCTS:  # the others have the kernels of dense ones
        case = (*(case or (SILU.function,)), stack.format)
    reason = why_not_fused(device, dtype, len(stack))
    return reason or why_failed(GROUPING_TRIAL, device) or why_failed(EXPERTS_TRIAL, device, case)


def compute_dtype(stack: torch.Tensor | QuantizedStack) -> torch.dtype:
    """Return the dtype of the products with a stack: its own, or autocast's. Autocast leaves float64 alone."""
    kind = stack.device.type
    if kind == "meta" or stack.dtype == torch.float64:
        return stack.dtype
    # Dynamo of torch 2.11 cannot trace the first question, and compiles for devices that have autocast.
    autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if autocast and torch.is_autocast_enabled(kind) else stack.dtype


def tell_backend(experts: nn.Module, hidden_states: torch.Tensor, backend: str, reason: str) -> None:
    """Log once which backend computes a class of experts. If it is not a fused one, say why: on a GPU as a warning."""
    if not torch.compiler.is_compiling():
        _tell(type(experts).__name__, hidden_states.device.type, backend, reason)


@functools.cache
def _tell(kind: str, device_type: str, backend: str, reason: str) -> None:
    because = f", because {reason}" if reason else ""
    log = logger.warning if reason and device_type == "cuda" else logger.info
    how = f"the backend {backend!r} on {device_type}{because}"
    log(f"{kind}: experts_implementation={IMPLEMENTATION!r} computes with {how}.")


def register_experts(override: bool = True) -> None:
    """Make the implementation known to transformers.

    Args:
        override: replace an implementation of the same name, which a copy of this code may have registered.
    """
    if override or IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


# A copy that was loaded from the Hub leaves the installed package's in place.
register_experts(override=not __name__.startswith("transformers_modules."))

__all__ = [
    "BACKENDS",
    "FUSED_BACKENDS",
    "IMPLEMENTATION",
    "choose_backend",
    "compute_dtype",
    "experts_forward",
    "refuse_offloaded",
    "register_experts",
    "run_experts",
    "tell_backend",
    "why_unsupported",
]
