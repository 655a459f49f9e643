# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The gates of a model that have a balancing bias: found by their structure, read and changed through one class."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import logging

from ..checkpoint_layout import BIAS_NAME
from ..support.library_support import has_adapters
from ..support.models import whole_tensor

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class BiasedGate:
    """One MoE layer's gate with a balancing bias.

    Attributes:
        name: the name of its MoE block in the model.
        owner: the module that holds the bias.
        router: the module whose parameters are the gate.
        experts: the module that receives the choices.
        saved: whether a file that is saved of the model holds the bias. The file of an adapter does only if PEFT
            trains the gate as a whole copy.
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
        """Return the bias without gradients, put together if FSDP2 has sharded it (all ranks must then call this)."""
        return whole_tensor(self.bias)

    @property
    def frozen(self) -> bool:
        """Whether the gate has parameters and none of them is trained. Its bias is then left alone too."""
        trained = [parameter.requires_grad for parameter in self.router.parameters() if parameter is not self.bias]
        return bool(trained) and not any(trained)

    @property
    def is_kept(self) -> str | None:
        """The reason why the bias is left as it is, or `None` if it is updated."""
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
        """Add E values to the bias in place, and first make it float32 for good.

        Updates are far below bfloat16's resolution.
        """
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
    """Find all gates of a model that have a balancing bias, by their structure, in the order of the layers.

    Args:
        model: a model of this package or another one, wrapped (DDP, PEFT) or not.

    Raises:
        ValueError: if a bias has no experts beside it, or if biases differ in size.
    """
    gates, owners = [], set()
    adapted, names = has_adapters(model), {module: name for name, module in model.named_modules()}
    for block, name in names.items():
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module) or ".original_module" in name:
            continue
        if "original_module" in dict(block.named_children()):  # PEFT's wrapper, which shows what is in it
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
    for module, name in names.items():
        unknown = module not in owners and BIAS_NAME in dict(module.named_buffers(recurse=False))
        if unknown and not _is_peft_copy(name):
            raise ValueError(f"{name}.{BIAS_NAME} is not understood: there are no `experts` beside it.")
    if len({gate.bias.numel() for gate in gates}) > 1:
        raise ValueError(f"{type(model).__name__}: gates with different numbers of experts are not supported.")
    return gates


def _owner_of_bias(module: nn.Module) -> nn.Module:
    """Find the module that holds the bias which `module` shows. PEFT's wrappers show that of the copy in use."""
    bias = getattr(module, BIAS_NAME)

    def owns(part: nn.Module) -> bool:
        own = (*part.named_buffers(recurse=False), *part.named_parameters(recurse=False))
        return any(tensor is bias for _, tensor in own)

    return next(filter(owns, module.modules()))


def _is_peft_copy(name: str) -> bool:
    """Tell whether PEFT keeps this module as a trained copy, or as the original of one."""
    return ".original_module" in name or ".modules_to_save" in name


def tell_kept(gates: list[BiasedGate]) -> None:
    """Warn once how many gates keep their bias, and why."""
    reasons = [gate.is_kept for gate in gates]
    for reason in dict.fromkeys(filter(None, reasons)):
        logger.warning_once(
            f"{reasons.count(reason)} of {len(gates)} gates are {reason}: their balancing bias is left as it is."
        )


def require_biased_gates(model: nn.Module) -> list[BiasedGate]:
    """Find the gates as [`find_biased_gates`] does, and raise a `ValueError` if there is none."""
    gates = find_biased_gates(model)
    if not gates:
        raise ValueError(
            f"{type(model).__name__} has no gate with a balancing bias ({BIAS_NAME}), so that there is nothing to "
            "update: it takes a model with topk_method='noaux_tc'. Other gates are balanced by aux_loss_alpha."
        )
    return gates


__all__ = ["BiasedGate", "find_biased_gates", "require_biased_gates"]
