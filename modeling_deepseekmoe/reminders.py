# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The warnings that a model gives once while it trains, if something is missing that its config asks for.

There are two: nothing updates the balancing bias, or whoever made the loss left the auxiliary losses out. Both are
found when a training forward begins.
"""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .configuration_checks import LOSS_FIELDS
from .torch_support import changes_of

logger = logging.get_logger(__name__)

STEPS_UNTIL_WARNING = 50


class Reminders:
    """The warnings that a decoder has given, and what it has seen of its training.

    A copy of the decoder has its own.
    """

    def __init__(self) -> None:
        self.told_of_updates = False
        self.told_of_losses = False
        self.changes: int | None = None  # of the gates' weights, when the last training forward began

    def remind(self, model: Any) -> None:
        """Look at the steps since the last training forward, and warn if something is missing.

        Args:
            model: a decoder with a `RouterLoadCounter` as `router_load`.
        """
        if torch.compiler.is_compiling():
            return
        if not self.told_of_losses:
            self._look_at_losses(model)
        if not self.told_of_updates and model.config.topk_method == "noaux_tc":
            self._look_at_updates(model)

    def _look_at_losses(self, model: Any) -> None:
        counter = model.router_load
        if counter.reached:
            self.told_of_losses = True  # there is nothing to tell
        elif counter.watched and counter.passed:
            self.told_of_losses = True
            logger.warning(
                f"The auxiliary losses of {type(model).__name__}, {fields_of_losses(model.config)}, are computed and "
                "NOT trained: whoever made the loss of the first step left out outputs.aux_loss (no labels given to "
                "the model, label smoothing, a loss function of your own, a trainer that takes the logits alone, "
                "router_aux_loss_coef=0 in TRL). Where it can be told to, let it add outputs.aux_loss; else set these "
                "fields of model.config to 0."
            )

    def _look_at_updates(self, model: Any) -> None:
        changes = sum(changes_of(weight) for weight in _trained_gates(model))
        stepped = self.changes is not None and changes != self.changes
        self.changes = changes
        counter = model.router_load
        counter.steps_without_update += stepped
        if counter.steps_without_update >= STEPS_UNTIL_WARNING:
            self.told_of_updates = True
            logger.warning(
                f"{type(model).__name__} has trained for {STEPS_UNTIL_WARNING} steps, and nothing updates the bias of "
                "its gates (topk_method='noaux_tc'): nothing balances its experts. Add "
                "callbacks=[LoadBalancingCallback()] to the Trainer, or call update_router_bias(model) after every "
                "optimizer.step(); both are in the package modeling_deepseekmoe."
            )


def fields_of_losses(config: Any) -> dict[str, float]:
    """Return the coefficients of the auxiliary losses that are switched on, by the config's fields."""
    return {LOSS_FIELDS[name]: alpha for name, alpha in config.loss_alphas.items()}


def _trained_gates(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".gate." in name and parameter.requires_grad]


__all__ = ["STEPS_UNTIL_WARNING", "Reminders", "fields_of_losses"]
