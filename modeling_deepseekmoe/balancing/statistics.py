# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Statistics of routing in training: added up over optimizer steps on the device, and read when it is time to log.

Shape letters: L MoE layers, E routed experts.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..auxiliary_losses import LOSS_NAMES, max_violation
from ..router_load import RouterLoad
from .gates import find_biased_gates
from .tracking import router_load_counter

_MEASURES = ("max_violation_global", "max_violation_batch", "dead_experts", "entropy", "drop_rate", "bias_norm")


class RouterStats:
    """Routing statistics of a model over the steps that were added.

    In a plain loop make `stats = RouterStats(model)`. After every `optimizer.step()` call
    `stats.add(update_router_bias(model))`, or `stats.add(take_router_load(model))` for a gate without a bias. When it
    is time to log, call `stats.summary()`. Nothing but `summary` and `to_dict` waits for the device.

    Args:
        model: a model of this package, or another one after `track_router_load`; wrapped or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.counter = router_load_counter(model)
        self.counter.measure_entropy = True
        self.reset()

    def reset(self) -> None:
        """Forget the steps that were added, and begin again."""
        self.load: RouterLoad | None = None
        self.steps = 0
        self._batch_violation = torch.zeros(len(self.counter.layers))

    def add(self, load: RouterLoad) -> None:
        """Add the [`RouterLoad`] of one optimizer step, summed over the ranks."""
        violation = max_violation(load.tokens_per_expert)
        if self.load is None:
            self.load = RouterLoad.zeros(len(violation), load.tokens_per_expert.shape[1], violation.device)
            self._batch_violation = torch.zeros_like(violation)
        self.load.add_(load)
        self._batch_violation.add_(violation.to(self._batch_violation.device))
        self.steps += 1

    def to_dict(self) -> dict[str, Any]:
        """Return all statistics by layer, as numbers.

        Returns:
            A dictionary. `steps` and `tokens` are how many there were, and `layers` are the layers' indices. For every
            layer there are `tokens_per_expert` (L, E), `max_violation_global` (of the load of all steps),
            `max_violation_batch` (mean over the steps), `dead_experts` (share of experts without a token), `entropy`
            (nats, mean over the tokens; absent for models of other packages), `drop_rate` (share of choices that were
            dropped) and `bias_norm` (L2; absent without a bias). `losses` are the auxiliary losses that are switched
            on, by name, as means over the micro-batches. `losses_trained` is false if it is known that no gradient
            reached them, because whoever made the loss left them out.

        Raises:
            ValueError: if no step was added.
        """
        if self.load is None:
            raise ValueError(
                "RouterStats has no step to report: call add() after an optimizer step. In a "
                "Trainer the statistics begin anew with every log."
            )
        load = RouterLoad(*(value.cpu() for value in vars(self.load).values()))
        if not load.tokens:
            raise ValueError(f"{type(self.model).__name__}: no token was routed in training in {self.steps} steps.")
        choices = load.tokens_per_expert.sum(dim=1).clamp(min=1)
        output: dict[str, Any] = {
            "steps": self.steps,
            "tokens": int(load.tokens),
            "layers": list(self.counter.layers),
            "tokens_per_expert": load.tokens_per_expert.tolist(),
            "max_violation_global": max_violation(load.tokens_per_expert).tolist(),
            "max_violation_batch": (self._batch_violation.cpu() / self.steps).tolist(),
            "dead_experts": (load.tokens_per_expert == 0).float().mean(dim=1).tolist(),
            "drop_rate": (load.dropped / choices).tolist(),
        }
        if load.entropy.any():
            # A layer of multi-token prediction routes fewer tokens than the others.
            tokens = load.tokens * choices / choices.max()
            output["entropy"] = (load.entropy / tokens).tolist()
        gates = find_biased_gates(self.model)
        if gates:
            norms = [gate.whole_bias().norm() for gate in gates]
            output["bias_norm"] = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()
        losses = (load.losses / load.micro_batches.clamp(min=1)).tolist()
        output["losses"] = {name: loss for name, loss in zip(LOSS_NAMES, losses, strict=True) if loss}
        output["losses_trained"] = not load.losses_watched or bool(load.loss_weight)
        return output

    def summary(self) -> dict[str, float]:
        """Compute what a trainer logs: means over the layers, and the auxiliary losses if there are any.

        A layer that routed no token is left out. The means are under `router/...`. The losses are under `aux_loss` for
        their sum and `aux_loss/...` for each one. If none of them is trained, their name is `aux_loss_not_trained`.

        Raises:
            ValueError: if no step was added.
        """
        values = self.to_dict()
        output = {}
        # A layer of multi-token prediction routes nothing where its loss is not trained.
        routed = [bool(sum(counts)) for counts in values["tokens_per_expert"]]
        for name in _MEASURES:
            if name not in values:
                continue
            places: Iterable[int] = range(len(routed))
            if name == "bias_norm":  # not every layer's gate has one
                places = [gate.place for gate in find_biased_gates(self.model)]
            known = [value for value, place in zip(values[name], places, strict=True) if routed[place]]
            if known:
                output[f"router/{name}"] = sum(known) / len(known)
        if values["losses"]:
            title = "aux_loss" if values["losses_trained"] else "aux_loss_not_trained"
            output[title] = sum(values["losses"].values())
            output |= {f"{title}/{name}": loss for name, loss in values["losses"].items()}
        return output


__all__ = ["RouterStats"]
