# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Keeps the model's own auxiliary loss where a trainer replaces the `forward` of the language model.

TRL's trainers run the decoder themselves and score its output with a fused head. The auxiliary loss of their output
is Mixtral's: a softmax over the raw logits and their top K, whatever the gate does. It is replaced here by what the
decoder returned. Such trainers multiply it by `config.router_aux_loss_coef`, which the decoder's loss holds already,
so that it is divided by it first: what they add to the task loss is then exactly the decoder's auxiliary loss.
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


def keep_auxiliary_loss(forward: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    """Wrap a method that replaces the `forward` of `model`.

    Args:
        forward: what is assigned to `model.forward`.
        model: a language model whose decoder, `model.model`, returns its auxiliary loss.

    Returns:
        A method with the same signature. Outputs that the model made itself pass unchanged.
    """
    function = getattr(forward, "__func__", None)
    if function is None:
        return forward  # no method of the model: a wrapper around one

    @functools.wraps(function)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own: list[torch.Tensor | None] = []
        handle = self.model.register_forward_hook(lambda module, inputs, output: own.append(output.aux_loss))
        try:
            outputs = function(self, *args, **kwargs)
        finally:
            handle.remove()
        if isinstance(outputs, ModelOutput) and not isinstance(outputs, MoeCausalLMOutputWithPast) and own:
            _replace_auxiliary_loss(self, outputs, own[-1])
        return outputs

    return MethodType(wrapped, model)


def _replace_auxiliary_loss(model: nn.Module, outputs: ModelOutput, own: torch.Tensor | None) -> None:
    coefficient = model.config.router_aux_loss_coef
    theirs = getattr(outputs, "aux_loss", None)
    if theirs is None or not coefficient:
        if model.training and model.config.loss_alphas:
            logger.warning_once(
                f"The trainer has replaced the forward of {type(model).__name__} and leaves out the auxiliary losses "
                f"that the config asks for, {model.config.loss_alphas}: give it a router_aux_loss_coef above 0."
            )
        return
    if own is None:
        return
    outputs.aux_loss = own / coefficient
    if getattr(outputs, "loss", None) is not None:
        outputs.loss = outputs.loss + (own - coefficient * theirs).to(outputs.loss.device)


__all__ = ["keep_auxiliary_loss"]
