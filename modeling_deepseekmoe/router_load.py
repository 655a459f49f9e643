# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The counts of what the gates did in training since the last optimizer step: exact, and kept on the device.

A block's record leaves its layer as an output, and the model adds it up. A checkpointed layer that is computed again
makes a record that nobody reads, so nothing is counted twice. What is added up is no buffer, because DDP overwrites
buffers with those of rank 0 at every forward.

Shape letters: L MoE layers, E routed experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from .auxiliary_losses import LOSS_NAMES
from .routing_eager import shares_of
from .torch_support import in_backward_pass


class RoutingContext(NamedTuple):
    """The information about the batch that the layers are given.

    It is a named tuple, so that hooks which move tensors between devices look inside.

    Attributes:
        token_mask (`torch.Tensor` of shape (B, S), *optional*): nonzero for real tokens.
        protected (`torch.BoolTensor` of shape (B,), *optional*): sequences of which no token is dropped.
        record (`bool`): whether the block's record is wanted.
        measure_entropy (`bool`): whether the record holds the entropy.
    """

    token_mask: torch.Tensor | None = None
    protected: torch.Tensor | None = None
    record: bool = False
    measure_entropy: bool = False


NO_RECORD = RoutingContext()


class RoutingRecord(NamedTuple):
    """The record of what one MoE block did with one micro-batch.

    Attributes:
        losses (`torch.FloatTensor` of shape (5,), *optional*): auxiliary losses in the order of `LOSS_NAMES`,
            coefficients included, differentiable.
        tokens_per_expert (`torch.LongTensor` of shape (E,)): real tokens that chose each expert.
        dropped (`torch.LongTensor` of shape (), *optional*): choices that were dropped.
        entropy (`torch.FloatTensor` of shape (), *optional*): sum over the real tokens of the entropy, in nats, of
            their affinities (divided by their sum).
    """

    losses: torch.Tensor | None
    tokens_per_expert: torch.Tensor
    dropped: torch.Tensor | None
    entropy: torch.Tensor | None


@dataclass
class RouterLoad:
    """The counts of what a model's gates did with one or several micro-batches.

    The tensors can be added up and reduced.

    Attributes:
        tokens_per_expert (`torch.LongTensor` of shape (L, E)): real tokens that chose each expert.
        tokens (`torch.LongTensor` of shape ()): number of real tokens.
        micro_batches (`torch.LongTensor` of shape ()): number of micro-batches.
        dropped (`torch.LongTensor` of shape (L,)): choices that were dropped.
        entropy (`torch.FloatTensor` of shape (L,)): sum over the tokens of the entropy of their affinities, in nats; 0
            if it was not measured.
        losses (`torch.FloatTensor` of shape (5,)): sum over micro-batches and layers of the auxiliary losses in the
            order of `LOSS_NAMES`.
        losses_watched (`torch.LongTensor` of shape ()): number of micro-batches for which it is known whether
            something trained these losses.
        loss_weight (`torch.FloatTensor` of shape ()): sum over these micro-batches of the absolute gradient that
            reached the auxiliary loss; 0 if nothing trained it.
    """

    tokens_per_expert: torch.Tensor
    tokens: torch.Tensor
    micro_batches: torch.Tensor
    dropped: torch.Tensor
    entropy: torch.Tensor
    losses: torch.Tensor
    losses_watched: torch.Tensor
    loss_weight: torch.Tensor

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int, device: torch.device | str | None = None) -> "RouterLoad":
        """Make an empty load for L layers of E experts."""

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            tokens_per_expert=zeros(num_layers, num_experts),
            tokens=zeros(),
            micro_batches=zeros(),
            dropped=zeros(num_layers),
            entropy=zeros(num_layers, dtype=torch.float32),
            losses=zeros(len(LOSS_NAMES), dtype=torch.float32),
            losses_watched=zeros(),
            loss_weight=zeros(dtype=torch.float32),
        )

    def add_(self, other: "RouterLoad") -> None:
        """Add another load to this one, in place, on this one's device."""
        for field in fields(self):
            mine = getattr(self, field.name)
            mine.add_(getattr(other, field.name).to(mine.device))

    def all_reduce(self, process_group: Any = None, replicas: int = 1) -> "RouterLoad":
        """Sum the load over the ranks of a process group, in one collective. Without process groups return this load.

        Args:
            process_group: the group; `None` for all ranks.
            replicas: number of ranks in the group that hold the same tokens, and so count each of them (tensor
                parallelism).
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        values = [getattr(self, field.name) for field in fields(self)]
        flat = torch.cat([value.double().flatten() for value in values])  # whole numbers are exact up to 2^53
        dist.all_reduce(flat, group=process_group)
        parts = (flat / replicas).split([value.numel() for value in values])
        return RouterLoad(*(part.view_as(value).to(value.dtype) for part, value in zip(parts, values, strict=True)))


class RouterLoadCounter:
    """The counter that adds up the records of a model's blocks until somebody takes them.

    Attributes:
        layers (`tuple[int, ...]`): indices of the MoE layers, those of the latest training step.
        num_experts (`int`): E, of the latest training step.
        measure_entropy (`bool`): whether blocks are asked for the entropy too.
        load ([`RouterLoad`], *optional*): what was counted since the last `take`; `None` if nothing was.
        watched (`bool`): whether there were auxiliary losses that were watched for being trained.
        passed (`bool`): whether a backward pass has come to the decoder's output since.
        reached (`bool`): whether one has come to these losses, with a gradient of any size.
        is_balanced (`bool`): whether the bias was updated, or kept on purpose, since `reminders` looked last.
    """

    def __init__(self, layers: tuple[int, ...], num_experts: int) -> None:
        self.layers = layers
        self.num_experts = num_experts
        self.measure_entropy = False
        self.load: RouterLoad | None = None
        self.watched = False
        self.passed = False
        self.reached = False
        self.is_balanced = False

    def begin(self, device: torch.device | str | None = None) -> RouterLoad:
        """Return the load that was counted so far, to be added to. At first it is zero, on `device`."""
        if self.load is None:
            self.load = RouterLoad.zeros(len(self.layers), self.num_experts, device)
        return self.load

    def add(self, load: RouterLoad, layers: tuple[int, ...]) -> None:
        """Add the load of one micro-batch. Forget what was counted if it was for other layers or experts."""
        num_experts = load.tokens_per_expert.shape[1]
        if (layers, num_experts) != (self.layers, self.num_experts):
            self.layers, self.num_experts, self.load = layers, num_experts, None
        self.begin(load.tokens_per_expert.device).add_(load)

    def watch(self, aux_loss: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Note in the backward pass whether a gradient reaches the auxiliary loss of the latest micro-batch.

        This shows whether whoever made the loss put it in. It is not known inside `torch.compile`. There is nothing to
        know if the auxiliary loss depends on nothing that is trained.

        Args:
            aux_loss: the auxiliary loss of the micro-batch that was added last.
            hidden_states: the decoder's output, which a backward pass comes to in any case.
        """
        if self.load is None or torch.compiler.is_compiling() or not aux_loss.requires_grad:
            return
        self.load.losses_watched += 1
        self.watched = True
        aux_loss.register_hook(self._weigh)
        hidden_states.register_hook(self._pass)

    def _pass(self, gradient: torch.Tensor) -> None:
        self.passed = True

    def _weigh(self, gradient: torch.Tensor) -> None:
        self.reached = True
        if self.load is not None:
            self.load.loss_weight += gradient.detach().abs().to(self.load.loss_weight)

    def take(self, device: torch.device | str | None = None) -> RouterLoad:
        """Return what was counted, and begin again. If nothing was counted, return zeros on `device`."""
        load, self.load = self.begin(device), None
        return load


def token_mask_of(attention_mask: Any, batch_shape: torch.Size, *, cached: bool) -> torch.Tensor | None:
    """Return which tokens of a forward pass are real (B, S), from its attention mask.

    Args:
        attention_mask: (B, S), or (B, past + S) with a cache. A 4-D mask, or one of another kind, says nothing about
            padding: then `None` is returned, and every token counts.
        batch_shape: (B, S) of the input.
        cached (`bool`): whether there is a cache with tokens before these.

    Raises:
        ValueError: for a 2-D mask of another shape.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim == 4:
        return None
    batch_size, length = batch_shape
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch_size or shape[1] < length or (shape[1] > length and not cached):
        allowed = "(batch, past + sequence)" if cached else "(batch, sequence)"
        raise ValueError(
            f"attention_mask of shape {shape} is not allowed: it must be {allowed}, and the input is "
            f"{(batch_size, length)}."
        )
    return attention_mask[:, -length:]


def counts_as_training(model: nn.Module) -> bool:
    """Tell whether a forward pass that begins now belongs to a training step.

    It does in training mode with gradients, unless it recomputes a model that is checkpointed as a whole (then a graph
    task is running).
    """
    if not (model.training and torch.is_grad_enabled()):
        return False
    return torch.compiler.is_compiling() or not in_backward_pass()


def count_tokens(expert_ids: torch.Tensor, num_experts: int, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Count the real tokens that chose each expert, without synchronising with the host.

    Args:
        expert_ids (`torch.LongTensor` of shape (T, K)): the choices.
        num_experts (`int`): E.
        token_mask (`torch.Tensor` of T elements, *optional*): nonzero for real tokens.

    Returns:
        `torch.LongTensor` of shape (E,).
    """
    ones = torch.ones_like(expert_ids)
    if token_mask is not None:
        ones = (token_mask.reshape(-1, 1) != 0).to(expert_ids).expand_as(expert_ids)
    counts = torch.zeros(num_experts, dtype=torch.long, device=expert_ids.device)
    return counts.scatter_add_(0, expert_ids.flatten(), ones.flatten())


def sum_of_entropies(scores: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Sum the entropies of the real tokens, in nats.

    A token's entropy is that of its affinities, divided by their sum.

    Args:
        scores (`torch.FloatTensor` of shape (T, E)): affinities.
        token_mask (`torch.Tensor` of T elements, *optional*): nonzero for real tokens.
    """
    entropies = torch.special.entr(shares_of(scores.detach())).sum(dim=-1)
    return entropies.sum() if token_mask is None else (entropies * (token_mask.flatten() != 0)).sum()


def sum_of_losses(records: Mapping[int, RoutingRecord], device: torch.device) -> torch.Tensor:
    """Sum all losses of all layers, which may lie on several devices. Without any loss return a float32 zero."""
    total = torch.zeros((), dtype=torch.float32, device=device)
    for record in records.values():
        if record.losses is not None:
            total = total + record.losses.sum().to(device)
    return total


def load_of_records(
    records: Mapping[int, RoutingRecord], layers: tuple[int, ...], token_mask: torch.Tensor | None, num_tokens: int
) -> RouterLoad:
    """Make the load of one micro-batch from its records.

    Args:
        records: records of one or more layers, by the layer's index. They may lie on several devices.
        layers: indices of all MoE layers; those without a record count nothing.
        token_mask (`torch.Tensor`, *optional*): nonzero for real tokens.
        num_tokens (`int`): number of all tokens.
    """
    counts = next(iter(records.values())).tokens_per_expert
    nothing = RouterLoad.zeros(1, len(counts), counts.device)

    def stacked(name: str, missing: torch.Tensor) -> torch.Tensor:
        values = [getattr(records.get(layer), name, None) for layer in layers]
        return torch.stack([missing if value is None else value.detach().to(missing) for value in values])

    return RouterLoad(
        tokens_per_expert=stacked("tokens_per_expert", nothing.tokens_per_expert[0]),
        tokens=nothing.tokens + (num_tokens if token_mask is None else (token_mask != 0).sum().to(counts.device)),
        micro_batches=nothing.micro_batches + 1,
        dropped=stacked("dropped", nothing.dropped[0]),
        entropy=stacked("entropy", nothing.entropy[0]),
        losses=stacked("losses", nothing.losses).sum(dim=0),
        losses_watched=nothing.losses_watched,
        loss_weight=nothing.loss_weight,
    )


__all__ = [
    "NO_RECORD",
    "RouterLoad",
    "RouterLoadCounter",
    "RoutingContext",
    "RoutingRecord",
    "count_tokens",
    "counts_as_training",
    "load_of_records",
    "sum_of_entropies",
    "sum_of_losses",
    "token_mask_of",
]
