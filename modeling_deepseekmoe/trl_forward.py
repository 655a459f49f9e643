# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Keeps the model's own auxiliary loss if a trainer of TRL replaces the `forward` of the language model.

TRL's trainers run the decoder themselves and score its output with a fused head. The auxiliary loss of their output is
Mixtral's: a softmax over the raw logits and their top K, whatever the gate does. Here it is replaced by what the
decoder returned.

Such trainers multiply it by their `router_aux_loss_coef`, by default the config's. The decoder's loss holds its
coefficients already, so it is divided by the config's. Then exactly the decoder's auxiliary loss is added to the task
loss. Except for SFTTrainer, a trainer does not write a coefficient of its own into the config. Such a coefficient
scales all losses by its ratio to the config's.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import ModelOutput, logging

logger = logging.get_logger(__name__)


def keep_auxiliary_loss(forward: Any, model: nn.Module) -> Any:
    """Wrap a method that replaces the `forward` of `model`.

    Args:
        forward: what is assigned to `model.forward`.
        model: a language model whose decoder, `model.model`, returns its auxiliary loss.

    Returns:
        A method with the same signature. It is `forward` itself if that is no method of this model, is the model's
        own, or was wrapped before. Outputs that the model made itself pass through it unchanged.
    """
    function: Callable[..., Any] | None = getattr(forward, "__func__", None)
    if function is None or forward.__self__ is not model or function is type(model).forward:
        return forward
    inner: Any = function
    while inner is not None:  # accelerate puts wrappers around
        if getattr(inner, "keeps_auxiliary_loss", False):
            return forward
        inner = getattr(inner, "__wrapped__", None)

    @functools.wraps(function)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        model_losses: list[torch.Tensor | None] = []

        def keep(decoder: nn.Module, inputs: Any, output: Any) -> None:
            model_losses.append(getattr(output, "aux_loss", None))
            if getattr(output, "router_logits", None) == ():  # no MoE layers: Mixtral's loss wants some or `None`
                output.router_logits = None

        handle = self.model.register_forward_hook(keep)
        try:
            outputs = function(self, *args, **kwargs)
        finally:
            handle.remove()
        made_elsewhere = isinstance(outputs, ModelOutput) and not isinstance(outputs, MoeCausalLMOutputWithPast)
        if made_elsewhere and model_losses and model_losses[-1] is not None:
            _replace_auxiliary_loss(self, outputs, model_losses[-1])
        return outputs

    vars(wrapped)["keeps_auxiliary_loss"] = True
    return MethodType(wrapped, model)


def _replace_auxiliary_loss(model: nn.Module, outputs: ModelOutput, model_loss: torch.Tensor) -> None:
    trainer_loss = getattr(outputs, "aux_loss", None)
    if trainer_loss is None:
        return  # the model's decoder says so itself
    coefficient, asked_for = model.config.router_aux_loss_coef, model.config.loss_alphas
    if not coefficient and asked_for and model.training and torch.is_grad_enabled():
        logger.warning_once(
            f"The trainer multiplies the auxiliary losses of {type(model).__name__}, {asked_for}, by a "
            "router_aux_loss_coef of its own, while the config's is 0: set the config's to the same value, so that "
            "each loss keeps its coefficient."
        )
    outputs.aux_loss = model_loss / (coefficient or 1.0)
    if getattr(outputs, "loss", None) is not None:
        outputs.loss = outputs.loss + (model_loss - coefficient * trainer_loss).to(outputs.loss.device)


__all__ = ["keep_auxiliary_loss"]
