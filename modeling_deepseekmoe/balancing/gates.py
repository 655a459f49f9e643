# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The gates of a model that have a balancing bias: found by their structure, read and changed through one class."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import logging

from ..families.moe_layers import BalancingBias, MoeLayer, find_moe_layers
from ..support.library_support import has_adapters
from ..support.models import whole_tensor

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class BiasedGate:
    """One MoE layer's gate with a balancing bias.

    Attributes:
        layer: the MoE layer.
        place: its place among all MoE layers of the model.
        saved: whether a file that is saved of the model holds the bias. The file of an adapter does only if PEFT
            trains the gate as a whole copy.
    """

    layer: MoeLayer
    place: int
    saved: bool = True

    @property
    def _own(self) -> BalancingBias:
        assert self.layer.bias is not None
        return self.layer.bias

    @property
    def bias(self) -> torch.Tensor:
        """The bias itself, E values."""
        return self._own.tensor

    def whole_bias(self) -> torch.Tensor:
        """Return the bias without gradients, put together if FSDP2 has sharded it (all ranks must then call this)."""
        return whole_tensor(self.bias)

    @property
    def frozen(self) -> bool:
        """Whether the gate has parameters and none of them is trained. Its bias is then left alone too."""
        router = self.layer.gate or self.layer.block
        trained = [parameter.requires_grad for parameter in router.parameters() if parameter is not self.bias]
        return bool(trained) and not any(trained)

    @property
    def is_kept(self) -> str | None:
        """The reason why the bias is left as it is, or `None` if it is updated."""
        if self.frozen:
            return "frozen (no parameter of theirs is trained)"
        if not self.saved and self._own.owner is self.layer.block:
            return "in a model with adapters, whose files do not hold a bias that lies beside the gate"
        if not self.saved:
            return (
                "adapted by PEFT, whose files do not hold the bias (modules_to_save=['gate'], or train_router=True of "
                "expert_lora_config, trains and saves the whole gates)"
            )
        return None

    @torch.no_grad()
    def add(self, step: torch.Tensor) -> None:
        """Add E values to the bias in place, and first make it float32 for good.

        Updates are far below bfloat16's resolution. A class for tokens that no expert computes keeps its value.
        """
        bias = self.bias
        if isinstance(bias, DTensor) and bias.dtype != torch.float32:
            raise ValueError(
                f"{self.layer.name}: its balancing bias is sharded in {bias.dtype}, in which updates get lost. Make "
                "it a float32 tensor before the model is sharded."
            )
        if self.layer.has_skip_class:
            step = torch.cat([step[:-1], step.new_zeros(1)])
        if bias.dtype != torch.float32:
            if isinstance(bias, nn.Parameter):
                bias.data = bias.data.float()
            else:
                setattr(self._own.owner, self._own.name, bias.float())
        step = step.to(self.bias.device).view(self.bias.shape)
        if isinstance(self.bias, DTensor):  # FSDP2 shards a bias that is a parameter
            step = distribute_tensor(step, self.bias.device_mesh, self.bias.placements)
        self.bias.add_(step)


def find_biased_gates(model: nn.Module, layers: list[MoeLayer] | None = None) -> list[BiasedGate]:
    """Find all gates of a model that have a balancing bias, under whatever name, in the order of the layers.

    Args:
        model: a model of this package or another one, wrapped (DDP, PEFT) or not.
        layers: its MoE layers, if they were found already.

    Raises:
        ValueError: if a bias has no experts beside it, or if biases differ in size.
    """
    gates = []
    adapted, names = has_adapters(model), {module: name for name, module in model.named_modules()}
    for place, layer in enumerate(find_moe_layers(model) if layers is None else layers):
        if layer.bias is not None:
            saved = not adapted or ".modules_to_save." in names[layer.bias.owner]
            gates.append(BiasedGate(layer, place, saved))
    if len({gate.bias.numel() for gate in gates}) > 1:
        raise ValueError(f"{type(model).__name__}: gates with different numbers of experts are not supported.")
    return gates


def tell_kept(gates: list[BiasedGate]) -> None:
    """Warn once how many gates keep their bias, and why."""
    reasons = [gate.is_kept for gate in gates]
    for reason in dict.fromkeys(filter(None, reasons)):
        logger.warning_once(
            f"{reasons.count(reason)} of {len(gates)} gates are {reason}: their balancing bias is left as it is."
        )


def require_biased_gates(model: nn.Module, layers: list[MoeLayer] | None = None) -> list[BiasedGate]:
    """Find the gates as [`find_biased_gates`] does, and raise a `ValueError` if there is none."""
    gates = find_biased_gates(model, layers)
    if not gates:
        raise ValueError(
            f"{type(model).__name__} has no gate with a balancing bias, so that there is nothing to update: it takes "
            "a model with topk_method='noaux_tc', or one of another family with such a bias. "
            "add_balancing_bias(model) gives one to others, before PEFT has adapted them. Or balance by losses: "
            "aux_loss_alpha of this package's config, add_auxiliary_loss for other families."
        )
    return gates


__all__ = ["BiasedGate", "find_biased_gates", "require_biased_gates"]
