# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Keeps the model's own auxiliary loss if a trainer of TRL replaces the `forward` of the language model.

TRL's trainers run the decoder themselves and score its output with a fused head. The auxiliary loss of their output is
Mixtral's: a softmax over the raw logits and their top K, whatever the gate does. Here it is replaced by what the
decoder returned.

Such trainers multiply it by their `router_aux_loss_coef`, by default the config's. The decoder's loss holds its
coefficients already, so it is divided by the config's. Then exactly the decoder's auxiliary loss is added to the task
loss. Except for SFTTrainer, a trainer does not write a coefficient of its own into the config. Such a coefficient
scales all losses by its ratio to the config's.

With `mtp_in_trl` the loss of multi-token prediction goes the same way. Its targets are the trainer's labels, and it is
a mean over those of the micro-batch. It trains the layers of multi-token prediction alone: these labels are rejected
and poorly rewarded texts too (DPO, KTO, GRPO), which the drafter should foresee, and the model should not imitate.
"""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import ModelOutput, logging

from .mtp import IGNORED
from .mtp_training import losses_ahead, shifted_labels, starts_a_sequence
from .router_load import counts_as_training
from .transformers_support import CACHE_NAMES

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
        calls: list[_DecoderCall] = []

        def keep(decoder: nn.Module, positional: Any, named: dict[str, Any], output: Any) -> None:
            calls.append(_DecoderCall(positional, named, output))
            if getattr(output, "router_logits", None) == ():  # no MoE layers: Mixtral's loss wants some or `None`
                output.router_logits = None

        handle = self.model.register_forward_hook(keep, with_kwargs=True)
        try:
            outputs = function(self, *args, **kwargs)
        finally:
            handle.remove()
        made_elsewhere = isinstance(outputs, ModelOutput) and not isinstance(outputs, MoeCausalLMOutputWithPast)
        if made_elsewhere and calls and getattr(calls[-1].output, "aux_loss", None) is not None:
            labels = {name: kwargs[name] for name in ("labels", "shift_labels") if kwargs.get(name) is not None}
            _replace_auxiliary_loss(self, outputs, calls[-1], labels)
        return outputs

    vars(wrapped)["keeps_auxiliary_loss"] = True
    return MethodType(wrapped, model)


class _DecoderCall(NamedTuple):
    """A call of the decoder: its arguments, by position and by name, and its output."""

    positional: tuple[Any, ...]
    named: dict[str, Any]
    output: Any

    def arguments(self, decoder: nn.Module) -> dict[str, Any]:
        """Return all arguments by name."""
        names = inspect.signature(decoder.forward).parameters
        return {**dict(zip(names, self.positional, strict=False)), **self.named}


def _replace_auxiliary_loss(
    model: Any, outputs: ModelOutput, call: _DecoderCall, labels: dict[str, torch.Tensor]
) -> None:
    """Put the model's own loss in the place of the trainer's.

    Args:
        model: the language model.
        outputs: the trainer's, changed in place.
        call: the decoder's, whose output has an auxiliary loss.
        labels: the trainer's `labels` or `shift_labels`, if there are any.
    """
    trainer_loss = getattr(outputs, "aux_loss", None)
    if trainer_loss is None:
        return  # the model's decoder says so itself
    config, model_loss = model.config, call.output.aux_loss
    coefficient, asked_for = config.router_aux_loss_coef, config.loss_alphas
    if not coefficient and asked_for and model.training and torch.is_grad_enabled():
        logger.warning_once(
            f"The trainer multiplies the auxiliary losses of {type(model).__name__}, {asked_for}, by a "
            "router_aux_loss_coef of its own, while the config's is 0: set the config's to the same value, so that "
            "each loss keeps its coefficient."
        )
    if labels and config.mtp and config.mtp_in_trl and config.mtp_loss_coef and counts_as_training(model.model):
        loss_ahead = _loss_ahead(model, call, labels)
        model_loss = model_loss if loss_ahead is None else model_loss + loss_ahead.to(model_loss.device)
    outputs.aux_loss = model_loss / (coefficient or 1.0)
    if getattr(outputs, "loss", None) is not None:
        outputs.loss = outputs.loss + (model_loss - coefficient * trainer_loss).to(outputs.loss.device)


def _loss_ahead(model: Any, call: _DecoderCall, labels: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Compute the loss of multi-token prediction, and of the balance of its gates, coefficients included.

    Returns:
        The loss; `None`, which is said once, behind a cache of earlier tokens.

    Raises:
        ValueError: if its size could not be told.
    """
    if not model.config.router_aux_loss_coef:
        raise ValueError(
            "mtp_in_trl=True is not allowed with router_aux_loss_coef=0 in the model's config: the trainer multiplies "
            "the loss by a coefficient that the model must know. Set it in model.config and in the trainer's config "
            "to the same value above 0; it is divided out. It is the coefficient of a balance loss too: 1e-6 leaves "
            "that without effect."
        )
    arguments, hidden_states = call.arguments(model.model), call.output.last_hidden_state
    caches = [arguments.pop(name) for name in CACHE_NAMES if name in arguments]
    if not starts_a_sequence(call.output, next((cache for cache in caches if cache is not None), None)):
        return None
    arguments.pop("use_cache", None)
    targets = shifted_labels(**{"labels": None, **labels})
    with torch.no_grad():
        chosen = model.lm_head(hidden_states).argmax(dim=-1)
    num_items = (targets != IGNORED).sum().clamp(min=1)
    losses, balance = losses_ahead(
        model, hidden_states, targets, chosen, num_items=num_items, detach=True, record=True,
        shift_labels=labels.get("shift_labels"), **arguments,
    )  # fmt: skip
    total = losses.total if balance is None else losses.total + balance.to(losses.total.device)
    model.model.reminders.watch_mtp(model.model, total)
    return total


__all__ = ["keep_auxiliary_loss"]
