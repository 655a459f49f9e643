# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""How balance losses get into the training of a model of another package: hooks on the model and its gates.

The losses of a layer are computed where its gate returns, from its logits and its choices. Their gradient goes into
the graph there, on the weights of the choices, so that it is right under both kinds of gradient checkpointing: what is
computed again carries it again. How large it is says the loss itself: its value is a node of the graph, added to
`outputs.loss`, and the gradient that reaches this node is the factor of all layers. So accumulation, loss scaling and
whatever else is done to the loss hold for the balance losses too.

A layer that is computed again belongs to the forward pass whose hidden states it is given: checkpointing keeps them.

Shape letters: B batch, S sequence, T = B * S tokens, E routed experts, K choices of a token.
"""

import functools
import weakref
from dataclasses import field, fields, make_dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from transformers import GradientCheckpointingLayer, PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..families.gate_rules import GateRule, rule_of
from ..families.moe_layers import require_moe_layers
from ..modeling_pretrained import share_of_items
from ..router_load import RouterLoad
from ..torch_support import after_backward_pass, in_backward_pass
from .loss_coefficients import LossCoefficients
from .tracking import given_mask, tracked_counter

logger = logging.get_logger(__name__)
_LEFT_OUT = (
    "The auxiliary losses are not trained: whoever made the loss left outputs.aux_loss out. TRL's trainers add it if "
    "router_aux_loss_coef is set in their config."
)
_PASSED_BY = (
    "The auxiliary losses are not trained: the decoder was called alone, or forward() itself and not the model, so "
    "that outputs.loss is without them."
)


class _Pass:
    """One forward pass: the losses of its layers, and the gradient that reaches their sum."""

    def __init__(self, shape: torch.Size, mask: torch.Tensor | None) -> None:
        self.shape, self.mask = shape, mask
        self.losses: list[torch.Tensor] = []
        self.hidden: torch.Tensor | None = None  # what the decoder returns
        self.gradient: torch.Tensor | None = None
        self.load: RouterLoad | None = None
        self.is_added = False  # to the outputs

    def receive(self, gradient: torch.Tensor) -> None:
        """Keep the gradient of the sum, for this backward pass."""
        self.gradient = gradient
        after_backward_pass(self.forget)
        if self.load is not None:
            self.load.loss_weight += gradient.detach().abs().to(self.load.loss_weight)

    def forget(self) -> None:
        """Forget the gradient, after the backward pass."""
        self.gradient = None


class _Total(torch.autograd.Function):
    """Return the sum of the losses. It hangs on the decoder's output, so that each backward pass to it comes by."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, hidden: torch.Tensor, of: _Pass) -> torch.Tensor:
        ctx.of = of
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ctx.of.receive(gradient)
        return None, None, None


class _WithLoss(torch.autograd.Function):
    """Pass the weights of the choices on, and put the gradient of a loss beside theirs."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, loss: torch.Tensor, of: _Pass) -> torch.Tensor:
        ctx.of, ctx.like = of, loss.detach()
        return weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        reached = ctx.of.gradient
        if reached is None:
            logger.warning_once(_LEFT_OUT if ctx.of.is_added else _PASSED_BY)
            return gradient, None, None
        return gradient, reached.to(ctx.like), None


class AddedLosses:
    """The hooks on one model. Copies of the model, and of its gates (PEFT's), share them.

    Args:
        model: the model, of another package.
        coefficients: of the losses.
    """

    def __init__(self, model: PreTrainedModel, coefficients: LossCoefficients) -> None:
        self.coefficients, self.owner, self.asked = coefficients, weakref.ref(model), False
        layers = [(layer, rule_of(layer)) for layer in require_moe_layers(model)]
        names = {module: name for name, module in model.named_modules()}
        self.current: _Pass | None = None
        # A layer's hidden states and their pass, by the address, which is theirs while one of them lives. Then the
        # pass of the layer that is computed again now.
        self.known: dict[tuple[int, int], tuple[weakref.ref[_Pass], list[weakref.ref[torch.Tensor]]]] = {}
        self.again: dict[int, _Pass | None] = {}
        self.noted: dict[int, nn.Module] = {}  # by the places of layers, those that can be computed again
        self.sharded: set[int] = set()
        self.handles: list[Any] = [
            model.register_forward_pre_hook(self._ask_for_nothing_else, with_kwargs=True),
            model.base_model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.base_model.register_forward_hook(self._end),
            model.register_forward_hook(self._add, with_kwargs=True),
        ]
        for place, (layer, rule) in enumerate(layers):
            assert layer.gate is not None
            attach = functools.partial(self._attach, place, layer.gate_path, rule)
            self.handles.append(layer.gate.register_forward_hook(attach))
            # The innermost module around the block that transformers can checkpoint.
            around = [one for one, name in names.items() if f"{layer.name}.".startswith(f"{name}." if name else "")]
            checkpointed = [one for one in around if isinstance(one, GradientCheckpointingLayer)]
            if checkpointed:
                self.noted[place] = checkpointed[-1]
            # Its own call, or only what is in it, is computed again, from the same hidden states.
            for module in (checkpointed[-1], *checkpointed[-1].children()) if checkpointed else ():
                note = functools.partial(self._note, place)
                self.handles.append(module.register_forward_pre_hook(note, with_kwargs=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> "AddedLosses":
        return self

    def remove(self) -> None:
        """Remove the hooks."""
        self.coefficients = LossCoefficients()  # copies that hold these hooks
        for handle in self.handles:
            handle.remove()

    @torch.compiler.disable
    def _ask_for_nothing_else(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Keep the model from computing the loss of its own family, which would be counted too."""
        self.asked = bool(kwargs.get("output_router_logits"))
        return args, {**kwargs, "output_router_logits": False}

    @torch.compiler.disable
    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward_pass():
            return
        self._note_before_sharding()
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
        inputs = next((tensor for tensor in given if isinstance(tensor, torch.Tensor)), None)
        self.current = None
        wanted = bool(self.coefficients.of_losses)
        if wanted and decoder.training and torch.is_grad_enabled() and inputs is not None:
            shape = inputs.shape[:2]
            mask = given_mask(args, kwargs)
            # Of a cached prefix there are no tokens.
            self.current = _Pass(shape, None if mask is None else mask[:, -shape[1] :])
            self.known = {key: found for key, found in self.known.items() if _any_lives(found[1])}

    @torch.compiler.disable
    def _end(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.current is not None and not in_backward_pass():
            self.current.hidden = output[0]  # of a tuple, or of an output of transformers

    def _note_before_sharding(self) -> None:
        """Note what a layer is given before FSDP2 makes another tensor of it, in a hook that comes before FSDP2's."""
        for place, layer in self.noted.items():
            if isinstance(layer, FSDPModule) and place not in self.sharded:
                note = functools.partial(self._note, place)
                self.handles.append(layer.register_forward_pre_hook(note, with_kwargs=True, prepend=True))
                self.sharded.add(place)

    @torch.compiler.disable
    def _note(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, torch.Tensor):
            return
        key = (place, hidden.data_ptr())
        if not in_backward_pass():
            if self.current is not None:  # its parts are noted too: accelerate's hooks move what the layer is given
                of, tensors = self.known.get(key, (None, []))
                same = tensors if of is not None and of() is self.current else []
                self.known[key] = weakref.ref(self.current), [*same, weakref.ref(hidden)]
        elif key in self.known and _any_lives(self.known[key][1]):
            self.again[place] = self.known[key][0]()

    @torch.compiler.disable
    def _attach(
        self, place: int, name: str, rule: GateRule, gate: nn.Module, args: tuple[Any, ...], output: Any
    ) -> tuple[torch.Tensor, ...] | None:
        if in_backward_pass() and place not in self.again:
            raise RuntimeError(
                f"{name} is computed again, and it cannot be told for which forward pass: the layer around it gets "
                "other hidden states than before. Switch gradient checkpointing off, or remove the losses."
            )
        of = self.again.pop(place) if in_backward_pass() else self.current
        if of is None:
            return None
        logits, weights, expert_ids = output
        if len(expert_ids) != of.shape.numel():
            raise ValueError(
                f"{name} routes {len(expert_ids)} tokens of a batch of {tuple(of.shape)}, which is not allowed with "
                "add_auxiliary_loss."
            )
        by_token = (logits.view(*of.shape, -1), expert_ids.view(*of.shape, -1))
        mask = None if of.mask is None else of.mask.to(logits.device)
        losses = self.coefficients.losses(rule, *by_token, mask)
        if not in_backward_pass():
            of.losses.append(losses.detach())
        total = losses.sum()
        return (logits, _WithLoss.apply(weights, total, of), expert_ids) if total.requires_grad else None

    @torch.compiler.disable
    def _add(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        of, self.current = self.current, None
        if of is None:
            return outputs
        of.is_added = True
        if not of.losses:
            raise ValueError(
                f"{type(model).__name__}: no gate was called, so that there are no auxiliary losses. Was another "
                "module put in place of the gates after add_auxiliary_loss?"
            )
        device = of.losses[0].device
        by_name = torch.stack([losses.to(device) for losses in of.losses]).sum(dim=0)
        hidden, of.hidden = of.hidden, None
        total = by_name.sum() if hidden is None else _Total.apply(by_name.sum(), hidden, of)
        if (counter := tracked_counter(model)) is not None:
            of.load = counter.begin(device)
            of.load.losses += by_name
            of.load.losses_watched += 1
        labels, share = kwargs.get("labels"), 1.0
        if labels is not None:
            share = share_of_items(_items(labels, of.shape, kwargs), device, **_only(kwargs, "num_items_in_batch"))
        if not isinstance(outputs, ModelOutput):  # return_dict=False
            return (outputs[0] + (total * share).to(outputs[0]), *outputs[1:]) if labels is not None else outputs
        if outputs.get("loss") is not None:
            outputs["loss"] = outputs["loss"] + (total * share).to(outputs["loss"])
        # Who asks for router logits, as TRL's trainers do, multiplies the loss by the coefficient of the config.
        coefficient = getattr(model.config.get_text_config(), "router_aux_loss_coef", None) if self.asked else None
        total = total / coefficient if coefficient else total
        outputs = _with_aux_loss(outputs)
        outputs["aux_loss"] = total
        return outputs


def _any_lives(tensors: list[weakref.ref[torch.Tensor]]) -> bool:
    return any(tensor() is not None for tensor in tensors)


def _with_aux_loss(outputs: Any) -> Any:
    """Return the outputs with the field `aux_loss`: what is no field gets lost where DDP or FSDP2 make them anew."""
    has_field = "aux_loss" in {one.name for one in fields(outputs)}
    return outputs if has_field else _made(type(outputs), dict(outputs))


def _made(kind: type, values: dict[str, Any]) -> Any:
    """Make outputs of a class, with the field besides, from their values. Other hooks may have added some."""
    names = {one.name for one in fields(kind)}
    made = _extended(kind)(**{name: value for name, value in values.items() if name in names})
    for name, value in values.items():
        if name not in names:
            made[name] = value
    return made


@functools.cache
def _extended(kind: type) -> Any:
    """Return a class of outputs with the field `aux_loss`. It has no name that pickle could look for."""
    added = [("aux_loss", Any, field(default=None))]
    reduced = {"__reduce__": lambda self: (_made, (kind, dict(self)))}
    return make_dataclass(kind.__name__, added, bases=(kind,), namespace=reduced)


def _items(labels: torch.Tensor, shape: torch.Size, kwargs: dict[str, Any]) -> torch.Tensor:
    """Count the labels that make the loss: those of tokens are shifted."""
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = labels[..., 1:] if labels.shape == shape else labels
    return (targets != -100).sum()


def _only(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: kwargs[name]} if name in kwargs else {}


__all__ = ["AddedLosses"]
