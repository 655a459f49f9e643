# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Change what the MoE layers of a model do, and measure what that costs: experts masked, fewer or more of them, none
shared.

Shape letters: B batch, S sequence, T tokens, E routed experts, K chosen experts of a token.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..families.gate_rules import UnknownGateError, rule_of
from ..families.moe_layers import MoeLayer, unwrapped
from ..moe import DeepseekMoeGate
from ..routing import TooFewExpertsError, choose_experts
from ..routing_options import RoutingOptions
from ..support.models import evaluating


@dataclass(frozen=True)
class Intervention:
    """A change of what MoE layers do. The default changes nothing.

    Attributes:
        masked: number of experts that no token may choose: of each token those that its gate ranks highest, by what
            the gate compares (scores plus bias), whatever groups there are.
        expert: an expert that no token may choose.
        more: how many more experts each token uses.
        at_most: the most experts that a token uses.
        same_sum: whether the weights of each token are multiplied so that they add up to what they did.
        shared_off: whether the shared experts give zero.
    """

    masked: int = 0
    expert: int | None = None
    more: int = 0
    at_most: int | None = None
    same_sum: bool = False
    shared_off: bool = False

    def __post_init__(self) -> None:
        for name, least in (("masked", 0), ("expert", 0), ("more", 0), ("at_most", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r} is not allowed: it must be an integer of at least {least}.")

    @property
    def excludes(self) -> bool:
        """Whether there are experts that tokens may not choose."""
        return self.masked > 0 or self.expert is not None

    @property
    def reroutes(self) -> bool:
        """Whether tokens may get other routed experts."""
        return self.excludes or self.more > 0 or self.at_most is not None or self.same_sum


@dataclass(frozen=True)
class Rerouter:
    """Chooses again for a gate, from the logits that it returned.

    Attributes:
        layer: the MoE layer.
        options: how its gate chooses.
    """

    layer: MoeLayer
    options: RoutingOptions

    @classmethod
    def of(cls, layer: MoeLayer) -> "Rerouter":
        """Find out how the gate of a layer chooses.

        Raises:
            UnknownGateError: if it does not choose by its logits, or by a rule that is not understood.
        """
        if layer.has_skip_class:
            raise UnknownGateError(f"{layer.gate_path} is not allowed: one of its classes is computed by no expert.")
        gate = unwrapped(layer).gate
        if isinstance(gate, DeepseekMoeGate):
            return cls(layer, replace(gate.options, implementation="auto"))
        rule = rule_of(layer)
        if rule.table:
            raise UnknownGateError(
                f"{layer.gate_path} is not allowed: it takes the experts from a table of token ids."
            )
        return cls(layer, replace(rule.options, implementation="auto"))

    def choose(self, logits: torch.Tensor, change: Intervention) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the experts under a change.

        Args:
            logits (`torch.Tensor` of shape (..., E)): what the gate returned first.
            change: what is changed.

        Returns:
            Expert ids and weights, (T, K) both. The weights are the scores as they were, normalised and scaled as the
            gate does: what masked experts had is not shared out, unless the gate normalises.

        Raises:
            TooFewExpertsError: if a token has too few experts left.
            ValueError: if there is no such expert.
        """
        logits, options = logits.reshape(-1, logits.shape[-1]), self.options
        bias = None if self.layer.bias is None else self.layer.bias.tensor.detach().reshape(-1).float()
        top_k = options.top_k + change.more
        options = replace(options, top_k=top_k if change.at_most is None else min(top_k, change.at_most))
        excluded = self._excluded(logits, bias, change) if change.excludes else None
        try:
            options.check(logits.shape[1])
        except ValueError as error:
            raise TooFewExpertsError(str(error)) from error
        routing = choose_experts(logits, options, correction_bias=bias, excluded_experts=excluded, statistics=False)
        return routing.expert_ids, routing.weights

    def _excluded(self, logits: torch.Tensor, bias: torch.Tensor | None, change: Intervention) -> torch.Tensor:
        """Mark the experts (T, E) that tokens may not choose."""
        excluded = torch.zeros_like(logits, dtype=torch.bool)
        if change.masked > logits.shape[1]:
            raise TooFewExpertsError(f"masked={change.masked} is not allowed: there are {logits.shape[1]} experts.")
        if change.masked:
            ranking = replace(self.options, top_k=change.masked, num_groups=1, top_k_groups=1)
            best = choose_experts(logits, ranking, correction_bias=bias, statistics=False).expert_ids
            excluded.scatter_(1, best, True)
        if change.expert is not None and change.expert >= logits.shape[1]:
            raise ValueError(f"expert={change.expert} is not allowed: {self.layer.name} has {logits.shape[1]}.")
        if change.expert is not None:
            excluded[:, change.expert] = True
        return excluded


@contextmanager
def intervening(layers: Sequence[MoeLayer], rerouters: Mapping[int, Rerouter], change: Intervention) -> Iterator[None]:
    """Change what some layers do inside.

    Args:
        layers: the MoE layers that are changed.
        rerouters: by the index of a layer what chooses there. Layers without one keep their experts.
        change: what is changed.

    Raises:
        ValueError: at the end, if a layer was not run as modules are: nothing was changed in it.
    """
    silent: dict[str, None] = {}  # the modules that have not been called
    with ExitStack() as stack:
        for layer in layers:
            handles = []
            if change.reroutes and layer.index in rerouters:
                handles += _rerouting_hooks(rerouters[layer.index], change, silent)
            if change.shared_off and layer.shared_experts is not None:
                handles.append(_silencing_hook(layer, silent))
            for handle in handles:
                stack.callback(handle.remove)
        yield
    if silent:
        raise ValueError(
            f"{next(iter(silent))} is not called as a module, so that nothing can be changed there. A compiled model "
            "does that: measure it before torch.compile."
        )


def _silencing_hook(layer: MoeLayer, silent: dict[str, None]) -> Any:
    assert layer.shared_experts is not None
    name = f"the shared experts of {layer.name}"
    silent[name] = None

    def silence(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        silent.pop(name, None)
        return torch.zeros_like(output)

    return layer.shared_experts.register_forward_hook(silence)


def _rerouting_hooks(rerouter: Rerouter, change: Intervention, silent: dict[str, None]) -> list[Any]:
    layer, latest = rerouter.layer, {}
    assert layer.gate is not None
    silent[layer.gate_path] = None

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        latest["logits"] = output[0]

    def reroute(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        silent.pop(layer.gate_path, None)
        ids, weights = layer.choices_of(args, kwargs)
        new_ids, new_weights = rerouter.choose(latest.pop("logits"), change)
        if change.same_sum:
            new_weights = new_weights * (weights.sum(dim=1, keepdim=True) / new_weights.sum(dim=1, keepdim=True))
        if new_ids.shape[1] == 1 < ids.shape[1]:
            new_ids, new_weights = as_two_choices(new_ids, new_weights)
        given = {"top_k_index": new_ids.to(ids.device), "top_k_weights": new_weights.to(weights)}
        by_place = [given.pop(name) for name in list(given)[: max(len(args) - 1, 0)]]
        return (*args[:1], *by_place, *args[3:]), kwargs | given

    return [
        layer.gate.register_forward_hook(keep),
        layer.experts.register_forward_pre_hook(reroute, with_kwargs=True),
    ]


def as_two_choices(expert_ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give tokens with one choice, (T, 1), the same expert a second time, without weight.

    The experts of some families cannot compute a single choice (LongCat-Flash).
    """
    return expert_ids.expand(-1, 2), torch.cat([weights, torch.zeros_like(weights)], dim=1)


def losses_of_blocks(
    model: PreTrainedModel, batches: Iterable[torch.Tensor], progress: Callable[[int], None] = lambda tokens: None
) -> torch.Tensor:
    """Compute the cross entropy of every block of tokens.

    Args:
        model: a causal language model.
        batches: `torch.LongTensor`s of token ids (B, S), S at least 2, without padding.
        progress: is called with the number of new tokens after every batch.

    Returns:
        `torch.DoubleTensor` of shape (N,): the mean over the next tokens of each block, in nats. Logits below float32
        are taken to float32 first.
    """
    losses = []
    with evaluating(model):
        for input_ids in batches:
            input_ids = input_ids.to(model.device)
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            targets = input_ids[:, 1:].to(logits.device)
            entropies = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            losses.append(entropies.view(targets.shape).double().mean(dim=1).cpu())
            progress(input_ids.numel())
    return torch.cat(losses)


__all__ = ["Intervention", "Rerouter", "as_two_choices", "intervening", "losses_of_blocks"]
