# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The warnings that a model gives once while it trains, if something is missing that its config asks for.

There are three: nothing updates the balancing bias, or whoever made the loss left out the auxiliary losses, or
multi-token prediction, which a trainer of TRL is handed if it is asked for. They are found in a training forward, from
what happened before it. An optimizer step is seen by the weights that it changed.
"""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .configuration_checks import LOSS_FIELDS

logger = logging.get_logger(__name__)

STEPS_UNTIL_WARNING = 50
GATE = ".gate."  # in the names of its parameters


class Reminders:
    """The warnings that a decoder has given, and the optimizer steps that it has seen.

    A copy of the decoder begins anew, and so does one that was pickled.
    """

    def __init__(self) -> None:
        self.told_of_updates = False
        self.told_of_losses = False
        self.told_of_mtp = False
        self.forwards = 0  # of training
        self.predicted_ahead = False  # in training
        self.forwards_without_mtp = 0  # of training, before there was one with it
        self.losses_unreached = 0  # of multi-token prediction, handed to a trainer since a gradient came back
        self.steps: int | torch.Tensor = 0  # seen so far; read seldom, because reading waits for the device
        self.steps_when_balanced = 0
        self.seen: tuple[str, torch.Tensor] | None = None  # the watched weight of the last training forward

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def remind(self, model: Any) -> None:
        """Look at the steps since the last training forward, and warn if something is missing.

        Args:
            model: a decoder with a `RouterLoadCounter` as `router_load`.
        """
        if torch.compiler.is_compiling():
            return
        look_at_losses = not self.told_of_losses and bool(model.config.loss_alphas)
        look_at_updates = not self.told_of_updates and model.config.topk_method == "noaux_tc"
        if not (look_at_losses or look_at_updates):
            return
        read_now = self.forwards % STEPS_UNTIL_WARNING == 0
        self.forwards += 1
        if not (look_at_losses or read_now or self._sees_a_gate()):
            return  # nobody asks for the steps
        self._look_for_a_step(model)
        if look_at_losses:
            self._look_at_losses(model)
        if look_at_updates and read_now and self._sees_a_gate():
            self._look_at_updates(model)

    def remind_of_mtp(self, model: Any, layers: list[nn.Module]) -> None:
        """Warn in the second training forward if multi-token prediction had no part in the first.

        Args:
            model: a decoder.
            layers: its layers of multi-token prediction.
        """
        if self.told_of_mtp or torch.compiler.is_compiling() or not (model.config.mtp and model.config.mtp_loss_coef):
            return
        self.forwards_without_mtp += 1
        trained = any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
        self.told_of_mtp = self.predicted_ahead or not trained  # there is nothing to tell
        if not self.told_of_mtp and self.forwards_without_mtp > 1:
            self.told_of_mtp = True
            logger.warning(
                f"The multi-token-prediction layers of {type(model).__name__} are loaded and NOT trained: whoever "
                "makes the loss takes the logits alone, or gives the model no labels (TRL's DPO and its fused losses, "
                "label smoothing). The drafter will fit the model less and less. Train it with the model's own loss "
                "(labels given), in TRL with model.config.mtp_in_trl=True and a router_aux_loss_coef above 0 (the "
                "trainer's, and model.config's), or afterwards with the rest frozen; or freeze it "
                "(`layer.requires_grad_(False)` for the layers of model.model.layers behind num_hidden_layers)."
            )

    def watch_mtp(self, model: Any, loss: torch.Tensor) -> None:
        """Warn if no gradient comes back to the losses of multi-token prediction that a trainer is handed.

        Args:
            model: a decoder.
            loss: the loss of this forward pass.
        """
        if not loss.requires_grad or torch.compiler.is_compiling():
            return
        loss.register_hook(self._reach)
        self.losses_unreached += 1
        if self.losses_unreached == STEPS_UNTIL_WARNING:
            logger.warning(
                f"The loss of multi-token prediction of {type(model).__name__} was handed to the trainer in "
                f"outputs.aux_loss {STEPS_UNTIL_WARNING} times, and is NOT trained: set the trainer's "
                "router_aux_loss_coef to that of the model's config, above 0, or mtp_in_trl=False."
            )

    def _reach(self, gradient: torch.Tensor) -> None:
        self.losses_unreached = 0

    def _look_for_a_step(self, model: nn.Module) -> None:
        before, self.seen = self.seen, watched_weight(model)
        if before is None or self.seen is None:
            return
        (old_name, old), (name, new) = before, self.seen
        if (old_name, old.device, old.shape) == (name, new.device, new.shape):
            self.steps = self.steps + (old != new).any()
        else:
            self.steps = int(self.steps)

    def _sees_a_gate(self) -> bool:
        """Tell whether a gate is trained. The bias of a frozen gate is kept, and needs no updates."""
        return self.seen is not None and GATE in self.seen[0]

    def _look_at_losses(self, model: Any) -> None:
        counter = model.router_load
        if counter.reached:
            self.told_of_losses = True  # there is nothing to tell
        elif counter.watched and counter.passed and int(self.steps) > 0:
            self.told_of_losses = True
            logger.warning(
                f"The auxiliary losses of {type(model).__name__}, {_fields_of_losses(model.config)}, are computed and "
                "NOT trained: whoever made the loss of the first step left out outputs.aux_loss (no labels given to "
                "the model, label smoothing, a loss function of your own, a trainer that takes the logits alone, "
                "router_aux_loss_coef=0 in TRL). Where it can be told to, let it add outputs.aux_loss; else set these "
                "fields of model.config to 0."
            )

    def _look_at_updates(self, model: Any) -> None:
        steps = int(self.steps)
        if model.router_load.is_balanced:
            model.router_load.is_balanced, self.steps_when_balanced = False, steps
        elif steps - self.steps_when_balanced >= STEPS_UNTIL_WARNING:
            self.told_of_updates = True
            logger.warning(
                f"{type(model).__name__} has trained for {STEPS_UNTIL_WARNING} steps, and nothing updates the bias of "
                "its gates (topk_method='noaux_tc'): nothing balances its experts. Add "
                "callbacks=[LoadBalancingCallback()] to the Trainer, or call update_router_bias(model) after every "
                "optimizer.step(); both are in the package modeling_deepseekmoe."
            )


def watched_weight(model: nn.Module) -> tuple[str, torch.Tensor] | None:
    """Return the name and a copy of the weight that shows whether an optimizer has stepped.

    It is the first gate's that is trained, or else the smallest matrix that is trained. Of a sharded weight it is this
    rank's part. `None` if this rank holds none.
    """
    smallest: tuple[str, torch.Tensor] | None = None
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight = _own_part(parameter)
        if weight.is_meta or not weight.numel():
            continue
        if GATE in name:
            return name, weight.clone()
        if weight.ndim > 1 and (smallest is None or weight.numel() < smallest[1].numel()):
            smallest = name, weight
    return None if smallest is None else (smallest[0], smallest[1].clone())


def _own_part(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.detach()
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _fields_of_losses(config: Any) -> dict[str, float]:
    """Return the coefficients of the auxiliary losses that are switched on, by the config's fields."""
    return {LOSS_FIELDS[name]: alpha for name, alpha in config.loss_alphas.items()}


__all__ = ["STEPS_UNTIL_WARNING", "Reminders", "watched_weight"]
