# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""DeepSeek's balance losses on the models of other packages."""

import inspect

import torch
from torch import nn
from transformers import PreTrainedModel

from ..families.gate_rules import rule_of
from ..families.moe_layers import require_moe_layers
from ..modeling_deepseekmoe import DeepseekMoeModel
from .loss_coefficients import COEFFICIENTS, LossCoefficients
from .loss_hooks import AddedLosses

_LOSSES, _NOTED = "added_auxiliary_losses", "notes_auxiliary_losses"  # attributes of a model


def add_auxiliary_loss(
    model: nn.Module,
    *,
    expert: float = 0.0,
    device: float = 0.0,
    communication: float = 0.0,
    sequence: float = 0.0,
    z: float = 0.0,
    num_devices: int = 1,
    max_devices_per_token: int = 1,
    sequence_wise: bool = True,
) -> None:
    """Train a model of another package with DeepSeek's balance losses.

    In training they are added to `outputs.loss`, and `outputs.aux_loss` holds them alone. In evaluation nothing is
    added. A loss of the family's own (`output_router_logits`) is switched off, so that nothing is counted twice. Call
    this again for other coefficients; all of 0 remove the losses. `RouterStatsCallback` logs them. With
    `num_items_in_batch` a micro-batch counts by its share of the items.

    TRL's trainers ask for router logits, and add `outputs.aux_loss` times the config's `router_aux_loss_coef`. So it
    is divided by this then, and each loss keeps its coefficient. A config without that field gets it while there are
    losses: the largest coefficient. A warning says if nobody has added the losses.

    Args:
        model: a model of transformers whose gates [`route`] can express; wrapped or not.
        expert: coefficient of the expert-level loss (arXiv 2401.06066, eq. 12).
        device: of the device-level loss (2401.06066, eq. 15).
        communication: of the communication loss (2405.04434, eq. 29).
        sequence: of V3's sequence-wise loss (2412.19437, eq. 17).
        z: of the router z-loss (2202.08906, eq. 5).
        num_devices, max_devices_per_token: D and M of the losses over devices.
        sequence_wise: whether the first three are computed for each sequence, or over the batch.

    Raises:
        ValueError: for a model of this package, whose config has these losses; for a model without MoE layers; for a
            gate that is not understood, or a coefficient below 0.
    """
    coefficients = LossCoefficients(
        expert, device, communication, sequence, z, num_devices, max_devices_per_token, sequence_wise
    )
    whole = _checked(model, coefficients)
    before = vars(whole).get(_LOSSES)
    if before is not None and before.owner() not in (whole, None):
        raise ValueError(
            f"{type(model).__name__} is not allowed: it is a copy of a model with auxiliary losses, and shares them. "
            "Remove them before the model is copied."
        )
    if before is not None:
        vars(whole).pop(_LOSSES).remove()
    config = whole.config.get_text_config()
    for name in vars(whole).pop(_NOTED, ()):
        delattr(config, name)
    if coefficients.of_losses:
        setattr(whole, _LOSSES, AddedLosses(whole, coefficients))
        noted = {"router_aux_loss_coef": max(coefficients.of_losses.values()), "output_router_logits": False}
        noted = {name: value for name, value in noted.items() if not hasattr(config, name)}  # TRL looks for both
        for name, value in noted.items():
            setattr(config, name, value)
        setattr(whole, _NOTED, tuple(noted))


def _checked(model: nn.Module, coefficients: LossCoefficients) -> PreTrainedModel:
    """Check all arguments, and return the model of transformers inside."""
    for name in COEFFICIENTS:
        value = getattr(coefficients, name)
        if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value!r} is not allowed: it must be a finite number of at least 0.")
    if any(isinstance(module, DeepseekMoeModel) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is not allowed: the config of this package's models has these losses "
            "(aux_loss_alpha and others)."
        )
    whole = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if whole is None:
        raise ValueError(f"{type(model).__name__} is not allowed: it holds no model of transformers.")
    if not coefficients.of_losses:
        if coefficients != LossCoefficients():
            raise ValueError(f"No loss has a coefficient: one of {', '.join(COEFFICIENTS)} must be above 0.")
        return whole
    if (coefficients.device or coefficients.communication) and coefficients.num_devices < 2:
        raise ValueError(
            f"num_devices={coefficients.num_devices} is not allowed with device or communication: these losses are "
            "over at least 2 devices, and constant over one."
        )
    if "labels" not in inspect.signature(whole.forward).parameters:
        raise ValueError(
            f"{type(whole).__name__} is not allowed: it makes no loss. Give the language model that holds it."
        )
    _check_devices(whole, coefficients)
    return whole


def _check_devices(model: nn.Module, coefficients: LossCoefficients) -> None:
    """Try the losses on a few tokens, so that numbers that do not fit are refused before training."""
    layer = require_moe_layers(model)[0]
    logits, ids = torch.zeros(1, 1, layer.num_experts), torch.zeros(1, 1, 1, dtype=torch.long)
    try:
        coefficients.losses(rule_of(layer), logits, ids, None)
    except ValueError as error:  # by the names that they have here
        raise ValueError(str(error).replace("num_device_groups", "num_devices")) from None


__all__ = ["add_auxiliary_loss"]
