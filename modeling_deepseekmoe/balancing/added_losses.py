# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""DeepSeek's balance losses on the models of other packages.

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
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import GradientCheckpointingLayer, PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..auxiliary_losses import (
    LOSS_NAMES,
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
    router_z_loss,
    sequence_balance_loss,
)
from ..families.gate_rules import GateRule, rule_of
from ..families.moe_layers import require_moe_layers
from ..modeling_deepseekmoe import DeepseekMoeModel
from ..modeling_pretrained import share_of_items
from ..router_load import RouterLoad
from ..routing_eager import affinities
from ..torch_support import after_backward_pass, in_backward_pass
from .tracking import tracked_counter

logger = logging.get_logger(__name__)
_LOSSES, _NOTED = "added_auxiliary_losses", "notes_auxiliary_losses"  # attributes of a model

COEFFICIENTS = ("expert", "device", "communication", "sequence", "z")


@dataclass(frozen=True)
class LossCoefficients:
    """The coefficients of the losses, and what they are computed over.

    Attributes:
        expert, device, communication, sequence, z: coefficients; 0 leaves a loss out.
        num_devices: D of the losses over devices.
        max_devices_per_token: M of the communication loss.
        sequence_wise: whether the first three are computed for each sequence, or over the batch.
    """

    expert: float = 0.0
    device: float = 0.0
    communication: float = 0.0
    sequence: float = 0.0
    z: float = 0.0
    num_devices: int = 1
    max_devices_per_token: int = 1
    sequence_wise: bool = True

    @property
    def of_losses(self) -> dict[str, float]:
        """The coefficients of the losses that are wanted, by their names."""
        return {name: getattr(self, name) for name in COEFFICIENTS if getattr(self, name)}

    def losses(
        self, rule: GateRule, logits: torch.Tensor, expert_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the losses of one layer, (5,) in the order of `LOSS_NAMES`, coefficients included.

        Args:
            rule: how the gate scores.
            logits: its logits (B, S, E).
            expert_ids: its choices (B, S, K).
            mask: nonzero for real tokens (B, S).
        """
        scores, found = affinities(logits, rule.options.score_function), {}
        common: dict[str, Any] = {"token_mask": mask, "sequence_wise": self.sequence_wise}
        if self.expert:
            found["expert"] = expert_balance_loss(scores, expert_ids, self.expert, **common)
        if self.device:
            found["device"] = device_balance_loss(scores, expert_ids, self.device, self.num_devices, **common)
        if self.communication:
            found["communication"] = communication_balance_loss(
                scores, expert_ids, self.communication, self.num_devices, self.max_devices_per_token, **common
            )
        if self.sequence:
            found["sequence"] = sequence_balance_loss(scores, expert_ids.shape[-1], self.sequence, token_mask=mask)
        if self.z:
            found["router_z"] = router_z_loss(logits, self.z, token_mask=mask)
        zero = scores.new_zeros(())
        return torch.stack([found.get(name, zero) for name in LOSS_NAMES])


class _Pass:
    """One forward pass: the losses of its layers, and the gradient that reaches their sum."""

    def __init__(self, shape: torch.Size, mask: torch.Tensor | None) -> None:
        self.shape, self.mask = shape, mask
        self.losses: list[torch.Tensor] = []
        self.hidden: torch.Tensor | None = None  # what the decoder returns
        self.gradient: torch.Tensor | None = None
        self.load: RouterLoad | None = None

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
            logger.warning_once(
                "The auxiliary losses are not trained: whoever made the loss left outputs.aux_loss out. TRL's "
                "trainers add it if router_aux_loss_coef is set in their config."
            )
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
        # A layer's hidden states and their pass, by the address, which is theirs while they live. Then the pass of the
        # layer that is computed again now.
        self.known: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], weakref.ref[_Pass]]] = {}
        self.again: dict[int, _Pass | None] = {}
        self.handles: list[Any] = [
            model.register_forward_pre_hook(self._ask_for_nothing_else, with_kwargs=True),
            model.base_model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.base_model.register_forward_hook(self._end),
            model.register_forward_hook(self._add, with_kwargs=True),
        ]
        for place, (layer, rule) in enumerate(layers):
            assert layer.gate is not None
            attach = functools.partial(self._attach, place, f"{layer.name}.{layer.gate_name}", rule)
            self.handles.append(layer.gate.register_forward_hook(attach))
            # The innermost module around the block that transformers can checkpoint.
            around = [one for one, name in names.items() if f"{layer.name}.".startswith(f"{name}." if name else "")]
            checkpointed = [one for one in around if isinstance(one, GradientCheckpointingLayer)]
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
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
        inputs = next((tensor for tensor in given if isinstance(tensor, torch.Tensor)), None)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self.current = None
        wanted = bool(self.coefficients.of_losses)
        if wanted and decoder.training and torch.is_grad_enabled() and inputs is not None:
            shape = inputs.shape[:2]
            usual = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
            # Of a cached prefix there are no tokens.
            self.current = _Pass(shape, None if usual is None else usual[:, -shape[1] :])
            self.known = {key: found for key, found in self.known.items() if found[0]() is not None}

    @torch.compiler.disable
    def _end(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.current is not None and not in_backward_pass():
            self.current.hidden = output[0]  # of a tuple, or of an output of transformers

    @torch.compiler.disable
    def _note(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, torch.Tensor):
            return
        key = (place, hidden.data_ptr())
        if not in_backward_pass():
            if self.current is not None and isinstance(module, GradientCheckpointingLayer):
                self.known[key] = weakref.ref(hidden), weakref.ref(self.current)
        elif key in self.known and self.known[key][0]() is not None:
            self.again[place] = self.known[key][1]()

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
        if "aux_loss" in {field.name for field in fields(outputs)}:
            outputs["aux_loss"] = total
        else:  # an attribute alone: DDP makes the output anew from its fields
            object.__setattr__(outputs, "aux_loss", total)
        return outputs


def _items(labels: torch.Tensor, shape: torch.Size, kwargs: dict[str, Any]) -> torch.Tensor:
    """Count the labels that make the loss: those of tokens are shifted."""
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = labels[..., 1:] if labels.shape == shape else labels
    return (targets != -100).sum()


def _only(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: kwargs[name]} if name in kwargs else {}


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
        return whole
    if (coefficients.device or coefficients.communication) and coefficients.num_devices < 2:
        raise ValueError(
            f"num_devices={coefficients.num_devices} is not allowed with device or communication: these losses are "
            "over at least 2 devices, and constant over one."
        )
    if not hasattr(whole, "lm_head") and whole.base_model is whole:
        raise ValueError(
            f"{type(whole).__name__} is not allowed: it makes no loss. Give the language model that holds it."
        )
    _check_devices(whole, coefficients)
    return whole


def _check_devices(model: nn.Module, coefficients: LossCoefficients) -> None:
    """Try the losses on a few tokens, so that numbers that do not fit are refused before training."""
    layer = require_moe_layers(model)[0]
    logits, ids = torch.zeros(1, 1, layer.num_experts), torch.zeros(1, 1, 1, dtype=torch.long)
    coefficients.losses(rule_of(layer), logits, ids, None)


__all__ = ["AddedLosses", "LossCoefficients", "add_auxiliary_loss"]
