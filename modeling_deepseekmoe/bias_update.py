# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Auxiliary-loss-free balancing (arXiv 2408.15664): the update of the gates' bias after every optimizer step.

Works on the models of this package, which count their choices themselves, and on every other model whose MoE blocks
have the structure of transformers' DeepSeek-V3: `experts`, called with (hidden states, ids, weights), and somewhere
beside them a bias named `e_score_correction_bias`. There the counting is switched on with [`track_router_load`].
"""

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .library_support import has_adapters
from .modeling_deepseekmoe import DeepseekMoeModel
from .router_load import RouterLoad, RouterLoadCounter, count_tokens, counts_as_training
from .sharded_files import whole_tensor
from .torch_support import in_backward_pass

logger = logging.get_logger(__name__)

UPDATES = ("sign", "centered_sign", "proportional")
BIAS_NAME = "e_score_correction_bias"
_TRACKER = "router_load_tracker"  # attribute of a decoder


@dataclass(frozen=True)
class BiasedGate:
    """One MoE layer's gate with a balancing bias.

    Attributes:
        name: the name of its MoE block in the model.
        owner: the module that holds the bias.
        router: the module whose parameters are the gate.
        experts: the module that receives the choices.
        saved: whether a file that is saved of the model holds the bias. That of an adapter does only where PEFT trains
            the gate as a whole copy.
    """

    name: str
    owner: nn.Module
    router: nn.Module
    experts: nn.Module
    saved: bool = True

    @property
    def bias(self) -> torch.Tensor:
        """The bias itself, E values."""
        return getattr(self.owner, BIAS_NAME)

    def whole_bias(self) -> torch.Tensor:
        """The bias without gradients, put together where FSDP2 has sharded it (all ranks must call this then)."""
        return whole_tensor(self.bias)

    @property
    def frozen(self) -> bool:
        """Whether the gate has parameters and none of them is trained, so that its bias is left alone too."""
        trained = [parameter.requires_grad for parameter in self.router.parameters() if parameter is not self.bias]
        return bool(trained) and not any(trained)

    @property
    def is_kept(self) -> str | None:
        """Why the bias is left as it is, if it is."""
        if self.frozen:
            return "frozen (no parameter of theirs is trained)"
        if not self.saved:
            return (
                "adapted by PEFT, whose files do not hold the bias (modules_to_save=['gate'], or train_router=True of "
                "expert_lora_config, trains and saves the whole gates)"
            )
        return None

    @torch.no_grad()
    def add(self, step: torch.Tensor) -> None:
        """Add E values to the bias in place, and first make it float32 for good: updates are far below bfloat16's
        resolution."""
        bias = self.bias
        if bias.dtype != torch.float32:
            if isinstance(bias, nn.Parameter):
                bias.data = bias.data.float()
            else:
                setattr(self.owner, BIAS_NAME, bias.float())
        step = step.to(self.bias.device).view(self.bias.shape)
        if isinstance(self.bias, DTensor):  # FSDP2 shards a bias that is a parameter
            step = distribute_tensor(step, self.bias.device_mesh, self.bias.placements)
        self.bias.add_(step)


def find_biased_gates(model: nn.Module) -> list[BiasedGate]:
    """All gates of a model that have a balancing bias, found by their structure, in the order of the layers.

    Args:
        model: a model of this package or another one, wrapped (DDP, PEFT) or not.

    Raises:
        ValueError: if a bias has no experts beside it, or if biases differ in size.
    """
    gates, owners = [], set()
    adapted, names = has_adapters(model), {module: name for name, module in model.named_modules()}
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        is_wrapper = "original_module" in dict(block.named_children())  # PEFT's, which shows what is in it
        if not isinstance(experts, nn.Module) or is_wrapper or ".original_module" in name:
            continue
        beside = [child for child in block.children() if child is not experts]
        for module in (block, *(module for child in beside for module in child.modules())):
            if isinstance(getattr(module, BIAS_NAME, None), torch.Tensor):
                owner = _owner_of_bias(module)
                router = next((child for child in beside if owner in child.modules()), None)
                saved = not adapted or ".modules_to_save." in names[owner]
                gates.append(BiasedGate(name, owner, router or getattr(block, "gate", block), experts, saved))
                owners.add(owner)
                break
    for name, module in model.named_modules():
        unknown = module not in owners and BIAS_NAME in dict(module.named_buffers(recurse=False))
        if unknown and not _is_peft_copy(name):
            raise ValueError(f"{name}.{BIAS_NAME} is not understood: there are no `experts` beside it.")
    if len({gate.bias.numel() for gate in gates}) > 1:
        raise ValueError(f"{type(model).__name__}: gates with different numbers of experts are not supported.")
    return gates


def _owner_of_bias(module: nn.Module) -> nn.Module:
    """The module that holds the bias which `module` shows: PEFT's wrappers show that of the copy in use."""
    bias = getattr(module, BIAS_NAME)

    def owns(part: nn.Module) -> bool:
        own = (*part.named_buffers(recurse=False), *part.named_parameters(recurse=False))
        return any(tensor is bias for _, tensor in own)

    return next(filter(owns, module.modules()))


def _is_peft_copy(name: str) -> bool:
    """Whether PEFT keeps this module only as the original of a trained copy."""
    return ".original_module" in name or ".modules_to_save" in name


def bias_step(tokens_per_expert: torch.Tensor, update_rate: float = 1e-3, update: str = "sign") -> torch.Tensor:
    """What one update adds to the bias.

    With the load c_i of an expert over the whole global batch and the violation e_i = mean(c) - c_i:

    - `"sign"`: gamma * sign(e_i) (arXiv 2408.15664, algorithm 1; V3),
    - `"centered_sign"`: gamma * (sign(e_i) - mean(sign(e))), which keeps the sum of the bias (Moonlight),
    - `"proportional"`: gamma * e_i / mean(c), the violation itself relative to the mean load.

    The sign is taken of whole numbers, and is exact.

    Args:
        tokens_per_expert (`torch.LongTensor` of shape (..., E)): c.
        update_rate (`float`): gamma, above 0.
        update (`str`): the rule.

    Returns:
        `torch.FloatTensor` of shape (..., E); 0 for a layer without tokens.

    Raises:
        ValueError: for an unknown rule or a rate that is not a positive number.
    """
    check_update(update_rate, update)
    counts = tokens_per_expert.long()
    total = counts.sum(dim=-1, keepdim=True)
    violation = total - counts.shape[-1] * counts  # E times the paper's
    if update == "proportional":
        return update_rate * (violation / total.clamp(min=1)).float()
    step = violation.sign().float()
    if update == "centered_sign":
        step = step - step.mean(dim=-1, keepdim=True)
    return update_rate * step


def check_update(update_rate: float, update: str) -> None:
    """Raise a `ValueError` for an unknown rule or a rate that is not a positive number."""
    if update not in UPDATES:
        raise ValueError(f"update={update!r} is not allowed: it must be one of {', '.join(map(repr, UPDATES))}.")
    if not isinstance(update_rate, (int, float)) or isinstance(update_rate, bool) or not 0 < update_rate < math.inf:
        raise ValueError(f"update_rate={update_rate!r} is not allowed: it must be a finite number above 0.")


def update_router_bias(
    model: nn.Module, update_rate: float = 1e-3, update: str = "sign", *, process_group: Any = None
) -> RouterLoad:
    """Update the bias of a model's gates from the tokens of the whole global batch; call it after `optimizer.step()`.

    The counts of all micro-batches since the last call are summed over the ranks, so that every rank makes the same
    update. Only forward passes in training mode and with gradients count, padding never does. Gates of which nothing
    is trained keep their bias, and so do those that PEFT adapts, unless it trains whole copies: the adapter's file
    would not hold it. A line in the log says so once.

    Args:
        model: a model of this package, or another one after [`track_router_load`]; wrapped or not.
        update_rate (`float`): gamma, above 0.
        update (`str`): `"sign"`, `"centered_sign"` or `"proportional"`, see [`bias_step`].
        process_group: the data-parallel ranks; `None` for all.

    Returns:
        The [`RouterLoad`] of the step, summed over the ranks: what [`RouterStats`] adds up.

    Raises:
        ValueError: for a model without a balancing bias, if nothing was counted, or for arguments that are not
            allowed.
    """
    check_update(update_rate, update)
    gates = require_biased_gates(model)
    counter = router_load_counter(model)
    if len(gates) != len(counter.layers):
        raise ValueError(
            f"{type(model).__name__} holds {len(gates)} gates with a balancing bias and counts {len(counter.layers)} "
            "layers: it takes one whole model, not several in one module and no stage of a pipeline."
        )
    load = take_router_load(model, process_group=process_group)
    for gate, step in zip(gates, bias_step(load.tokens_per_expert, update_rate, update), strict=True):
        if gate.is_kept is None:
            gate.add(step)
    tell_kept(gates)
    counter.steps_without_update = 0
    return load


def tell_kept(gates: list[BiasedGate]) -> None:
    """Say once how many gates keep their bias, and why."""
    reasons = [gate.is_kept for gate in gates]
    for reason in dict.fromkeys(filter(None, reasons)):
        logger.warning_once(
            f"{reasons.count(reason)} of {len(gates)} gates are {reason}: their balancing bias is left as it is."
        )


def require_biased_gates(model: nn.Module) -> list[BiasedGate]:
    """[`find_biased_gates`], and a `ValueError` if there is none."""
    gates = find_biased_gates(model)
    if not gates:
        raise ValueError(
            f"{type(model).__name__} has no gate with a balancing bias ({BIAS_NAME}), so that there is nothing to "
            "update: it takes a model with topk_method='noaux_tc'. Other gates are balanced by aux_loss_alpha."
        )
    return gates


def take_router_load(model: nn.Module, *, process_group: Any = None) -> RouterLoad:
    """What the gates did in training since the last call, summed over the ranks; the counting begins again.

    [`update_router_bias`] does this itself; call it instead for a model without a bias, to feed [`RouterStats`].

    Args:
        model: a model of this package, or another one after [`track_router_load`]; wrapped or not.
        process_group: the data-parallel ranks; `None` for all.

    Raises:
        ValueError: if nothing was counted. With several ranks it is a warning, since others may have counted.
    """
    counter = router_load_counter(model)
    distributed = dist.is_available() and dist.is_initialized()
    if counter.load is None:
        problem = (
            f"{type(model).__name__}: no token was routed in training since the counts were taken last. Only forward "
            "passes in training mode and with gradients count, and only one may take the counts: one callback, or "
            "one call, for every optimizer step."
        )
        if not distributed:
            raise ValueError(problem)
        logger.warning_once(f"{problem} This rank counts nothing here; others may.")
    device = next(model.parameters()).device
    # Of all ranks, those of transformers' tensor parallelism are given the same tokens.
    sizes = [module.tp_size or 1 for module in model.modules() if isinstance(module, PreTrainedModel)]
    replicas = max(sizes, default=1) if process_group is None else 1
    return counter.take(device).all_reduce(process_group, replicas=replicas)


def router_load_counter(model: nn.Module) -> RouterLoadCounter:
    """The counter of a model.

    Raises:
        ValueError: if the model is not of this package and [`track_router_load`] was not called.
    """
    for module in model.modules():
        if isinstance(module, DeepseekMoeModel):
            return module.router_load
        if _TRACKER in vars(module):
            return vars(module)[_TRACKER].counter
    raise ValueError(
        f"{type(model).__name__} does not count its tokens itself: call track_router_load(model) before training."
    )


# ------------------------------------------------------------------------------------------- models of other packages
class _Tracker:
    """Hooks that count the choices of a model which does not do so itself: one on its decoder, which every wrapper
    calls with the batch, and one on the experts of every block. They are methods, so that a deep copy of the model has
    a tracker of its own."""

    def __init__(self, model: nn.Module) -> None:
        gates = find_biased_gates(model)
        if not gates:
            raise ValueError(
                f"{type(model).__name__} is not allowed: tokens are counted in this package's models, and in others "
                f"that have a gate with a balancing bias ({BIAS_NAME}). `deepseekmoe report` shows what gates do."
            )
        layers = [re.search(r"\d+", gate.name) for gate in gates]
        self.counter = RouterLoadCounter(
            tuple(idx if match is None else int(match[0]) for idx, match in enumerate(layers)), gates[0].bias.numel()
        )
        self.counting = False
        self.token_mask: torch.Tensor | None = None
        pretrained = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        decoder = model if pretrained is None else pretrained.base_model
        self.handles = [decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True)]
        for idx, gate in enumerate(gates):
            hook = functools.partial(self._count, idx, gate.name)
            self.handles.append(gate.experts.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
        setattr(decoder, _TRACKER, self)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    @torch.compiler.disable
    def _before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.counting = counts_as_training(decoder)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self.token_mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

    @torch.compiler.disable
    def _count(self, idx: int, name: str, experts: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Under checkpointing this runs again in the backward pass, while a graph task is running.
        if not self.counting or in_backward_pass():
            return
        expert_ids = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
        if not isinstance(expert_ids, torch.Tensor) or expert_ids.is_floating_point() or expert_ids.ndim != 2:
            raise ValueError(
                f"{name}.experts was not called with (hidden states, expert ids, weights), which are to be counted."
            )
        mask = self.token_mask
        if mask is not None and mask.numel() != len(expert_ids):
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)} is not allowed: {name} routes {len(expert_ids)} tokens."
            )
        counts = count_tokens(expert_ids.long(), self.counter.num_experts, mask)
        load = self.counter.begin(counts.device)
        load.tokens_per_expert[idx] += counts.to(load.tokens_per_expert.device)
        if idx == 0:
            load.micro_batches += 1
            load.tokens += len(expert_ids) if mask is None else (mask != 0).sum().to(load.tokens.device)


def track_router_load(model: nn.Module) -> RouterLoadCounter:
    """Begin to count the tokens of every expert in training, and forget what was counted before.

    Models of this package always count. On others, hooks are set on the decoder and the experts; padding is what the
    2-D `attention_mask` of the call says. Recomputation under gradient checkpointing is not counted.

    Args:
        model: the model, wrapped or not.

    Returns:
        The model's [`RouterLoadCounter`].

    Raises:
        ValueError: for a model of another package without a balancing bias.
    """
    if not any(isinstance(module, DeepseekMoeModel) for module in model.modules()):
        untrack_router_load(model)
        _Tracker(model)
    counter = router_load_counter(model)
    counter.load = None
    return counter


def untrack_router_load(model: nn.Module) -> None:
    """Remove the hooks of [`track_router_load`]; models of this package go on counting."""
    for module in model.modules():
        if _TRACKER in vars(module):
            vars(module).pop(_TRACKER).remove()


__all__ = [
    "UPDATES",
    "BiasedGate",
    "bias_step",
    "check_update",
    "find_biased_gates",
    "require_biased_gates",
    "router_load_counter",
    "take_router_load",
    "track_router_load",
    "untrack_router_load",
    "update_router_bias",
]
