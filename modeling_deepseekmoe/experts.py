# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The experts implementation `"deepseekmoe"`, for every model of transformers with experts that are stacked as
`gate_up_proj` (E, 2I, D) and `down_proj` (E, D, I): DeepSeek-V2 and V3, Qwen3-MoE, Mixtral, OLMoE, and this family.

Which way the experts are computed is chosen for every call ([`choose_way`]):
- `"triton"`: fused kernels for all experts (`experts_triton`), on CUDA and ROCm;
- `"loop"`: one expert after the other (`experts_loop`), on the CPU;
- `"grouped"`: torch's grouped products (`grouped_products`), everywhere else, and for small experts on the CPU;
- `"batched"`: each slot with its own copy of the weights, for few slots of small experts on the CPU, in inference, and
  in ONNX.

Shape letters: T tokens, D hidden, E routed experts, K chosen experts, I expert width, S = T * K slots (a token at one
of its experts).
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .checkpoint_layout import STACKS
from .experts_grouped import GroupedSlots, grouped_linear, run_grouped
from .experts_loop import Adapter
from .experts_operator import experts_op
from .experts_triton import why_not_fused
from .transformers_support import ALL_EXPERTS_FUNCTIONS, SiLUActivation, gating_of, plain_gating

logger = logging.get_logger(__name__)

IMPLEMENTATION = "deepseekmoe"
WAYS = ("triton", "loop", "grouped", "batched")
FUSED_WAYS = ("triton", "loop")
PLAIN_GATING = plain_gating()
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Hidden times width of an expert. Measured on two cores, with 8 and 64 experts: below it the calls of the loop cost
# more than what it saves.
LOOP_FROM = 2**18
# The same times slots; with more of them, copies of the weights cost more than the sort.
BATCHED_BELOW = 2**16


def refuse_offloaded(experts: nn.Module) -> None:
    """Raise a `ValueError` for adapted or partly trained experts whose weights are offloaded."""
    if experts.gate_up_proj.is_meta:
        raise ValueError("Offloaded weights are not allowed together with adapted or partly trained experts.")


def experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Sum of the chosen experts' outputs, weighted: what `experts_implementation="deepseekmoe"` calls.

    Under autocast the products are in its dtype, as those of `nn.Linear` are.

    Args:
        experts: the module that holds the stacks.
        hidden_states (`torch.Tensor` of shape (T, D)).
        top_k_index (`torch.LongTensor` of shape (T, K)): expert ids; the id E stands for an expert that another rank
            of an expert-parallel group holds, and is passed over.
        top_k_weights (`torch.Tensor` of shape (T, K)): of any floating dtype.

    Returns:
        `torch.Tensor` of shape (T, D), in the dtype of `hidden_states`.

    Raises:
        ValueError: for experts that are stored in another way.
    """
    reason = why_unsupported(experts)
    if reason is not None:
        raise ValueError(
            f"experts_implementation={IMPLEMENTATION!r} is not allowed for {type(experts).__name__}: {reason}. "
            "Choose 'grouped_mm', 'batched_mm' or 'eager'."
        )
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
    way: str | None = None,
) -> torch.Tensor:
    """[`experts_forward`] without its checks.

    Args:
        experts, hidden_states, top_k_index, top_k_weights: as there.
        stacks: weights to compute with instead of the module's own.
        adapters ([`Adapter`], *optional*): beside `gate_up_proj` and `down_proj`; `"triton"` and `"loop"` alone.
        way: one of `WAYS`; by default what [`choose_way`] says.

    Returns:
        `torch.Tensor` of shape (T, D), in the dtype of `hidden_states`.

    Raises:
        ValueError: for another way, or for adapters in a way that does not take them.
    """
    gate_up, down = (experts.gate_up_proj, experts.down_proj) if stacks is None else stacks
    dtype = compute_dtype(gate_up)
    if way is None:
        way, reason = choose_way(experts, hidden_states, top_k_index.numel(), gate_up)
        tell_way(experts, hidden_states, way, reason)
    if way not in WAYS or (way not in FUSED_WAYS and any(adapter is not None for adapter in adapters)):
        raise ValueError(f"way={way!r} is not allowed: one of {WAYS}, and with adapters one of {FUSED_WAYS}.")
    if way in FUSED_WAYS:
        gate_up, down, rows = (tensor.to(dtype) for tensor in (gate_up, down, hidden_states))
        differentiable = [rows, top_k_weights, gate_up, down]
        arguments: list[Any] = []
        for adapter in adapters:
            arguments += (None, None, 1.0, 0.0, None) if adapter is None else adapter
            differentiable += () if adapter is None else adapter[:2]
        # A trace is checked by a run without gradients, which must be the same.
        with_gradients = torch.is_grad_enabled() or torch.jit.is_tracing()
        keep = with_gradients and any(tensor.requires_grad for tensor in differentiable)
        implementation = "triton" if way == "triton" else "eager"
        output = experts_op(rows, top_k_index, top_k_weights, gate_up, down, *arguments, keep, implementation)[0]
        return output.to(hidden_states.dtype)
    gate_up, down = gate_up.to(dtype), down.to(dtype)
    if way == "batched":
        return _run_batched(experts, hidden_states, top_k_index, top_k_weights, gate_up, down)
    stack_of = dict(zip(STACKS, (gate_up, down), strict=True))

    def project(name: str, rows: torch.Tensor, slots: GroupedSlots) -> torch.Tensor:
        return grouped_linear(rows, stack_of[name], slots)

    return run_grouped(experts, hidden_states, top_k_index, top_k_weights, project, len(gate_up))


def find_experts(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """The stacked experts of a model by their layers' indices: the name of the module (without PEFT's wrappers), and
    the module that holds the parameters."""
    found = {}
    for name, module in model.named_modules():
        own, layer = dict(module.named_parameters(recurse=False)), LAYER.search(name)
        if layer is not None and all(projection in own and own[projection].ndim == 3 for projection in STACKS):
            found[int(layer[1])] = (name.replace(".base_layer", ""), module)
    return found


def why_unsupported(experts: nn.Module) -> str | None:
    """Why these experts cannot be computed by [`run_experts`], or `None` if they can."""
    for name in STACKS:
        parameter = getattr(experts, name, None)
        if not isinstance(parameter, torch.Tensor) or parameter.ndim != 3:
            return f"it has no stacked parameter {name} (E, out, in)"
        if not parameter.is_floating_point() or parameter.element_size() < 2:
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


def choose_way(
    experts: nn.Module, hidden_states: torch.Tensor, num_slots: int, stack: torch.Tensor | None = None
) -> tuple[str, str]:
    """How the experts are computed for an input, and why not in a fused way, where that is so.

    Args:
        experts: the module that holds the stacks.
        hidden_states (`torch.Tensor` of shape (T, D)).
        num_slots (`int`): S.
        stack (`torch.Tensor` of shape (E, 2I, D), *optional*): weights other than the module's `gate_up_proj`.

    Returns:
        One of `WAYS`, and the reason, empty for the fused ones.
    """
    stack = experts.gate_up_proj if stack is None else stack
    num_experts, columns, hidden_size = stack.shape
    size = columns // 2 * hidden_size
    if gating_of(type(experts)) is not PLAIN_GATING or not _is_silu(experts.act_fn):
        return "grouped", "their activation is not silu(gate) * up"
    if torch.onnx.is_in_onnx_export():
        return "batched", "ONNX has no other way"
    if hidden_states.device.type == "cuda":
        reason = why_not_fused(hidden_states.device, compute_dtype(stack), num_experts)
        return ("grouped", reason) if reason else ("triton", "")
    if hidden_states.device.type not in ("cpu", "meta"):
        return "grouped", f"the tensors are on the device {hidden_states.device.type!r}"
    if size >= LOOP_FROM or torch.compiler.is_compiling():
        return "loop", ""
    reason = f"an expert of {hidden_size} x {columns // 2} is so small that the calls would take longer"
    few = num_slots * size < BATCHED_BELOW and not torch.jit.is_tracing()
    if not torch.is_grad_enabled() and few:
        return "batched", reason
    return "grouped", reason


def compute_dtype(stack: torch.Tensor) -> torch.dtype:
    """The dtype of the products with a stack: its own, or autocast's, which leaves float64 alone."""
    kind = stack.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast and stack.dtype != torch.float64 else stack.dtype


def _is_silu(activation: Any) -> bool:
    return activation is nn.functional.silu or isinstance(activation, (nn.SiLU, SiLUActivation))


def tell_way(experts: nn.Module, hidden_states: torch.Tensor, way: str, reason: str) -> None:
    """Log once in which way a class of experts is computed, and why not in a fused one; a warning on a GPU."""
    if not torch.compiler.is_compiling():
        _tell(type(experts).__name__, hidden_states.device.type, way, reason)


@functools.cache
def _tell(kind: str, device_type: str, way: str, reason: str) -> None:
    because = f", because {reason}" if reason else ""
    log = logger.warning if reason and device_type == "cuda" else logger.info
    log(f"{kind}: experts_implementation={IMPLEMENTATION!r} computes the way {way!r} on {device_type}{because}.")


def _run_batched(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """One copy of its expert's weights for every slot; what experts that are elsewhere would add is left out."""
    num_tokens, top_k = top_k_index.shape
    ids = top_k_index.flatten()
    elsewhere = (ids >= len(gate_up)).view(num_tokens, top_k, 1)
    ids = ids.clamp(max=len(gate_up) - 1)

    def project(rows: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
        return torch.bmm(stack.index_select(0, ids), rows.to(stack.dtype).unsqueeze(-1)).squeeze(-1)

    width = hidden_states.shape[-1]
    rows = hidden_states.unsqueeze(1).expand(-1, top_k, -1).reshape(num_tokens * top_k, width)
    rows = project(gating_of(experts)(project(rows, gate_up)), down).view(num_tokens, top_k, width)
    rows = rows.masked_fill(elsewhere, 0) * top_k_weights.unsqueeze(-1).masked_fill(elsewhere, 0)
    return rows.sum(dim=1).to(hidden_states.dtype)


def register_experts(override: bool = True) -> None:
    """Make the implementation known to transformers.

    Args:
        override: replace one of the same name, which a copy of this code may have registered.
    """
    if override or IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


# A copy that was loaded from the Hub leaves the installed package's in place.
register_experts(override=not __name__.startswith("transformers_modules."))

__all__ = [
    "FUSED_WAYS",
    "IMPLEMENTATION",
    "LAYER",
    "WAYS",
    "choose_way",
    "compute_dtype",
    "experts_forward",
    "find_experts",
    "refuse_offloaded",
    "register_experts",
    "run_experts",
    "tell_way",
    "why_unsupported",
]
