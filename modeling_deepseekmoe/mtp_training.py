# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The loss of multi-token prediction (arXiv 2412.19437, eqs. 24 and 25), and how often the depths foresee the model.

Shape letters: B batch, S sequence, D hidden, V vocabulary. A depth is counted from 1.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import logging

from .mtp import IGNORED, Depth, RowLayout, ahead
from .router_load import counts_as_training, sum_of_losses
from .torch_support import run_as_forward

logger = logging.get_logger(__name__)


@dataclass
class DeepseekMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """Output of the language model.

    Attributes:
        mtp_loss (`torch.FloatTensor` of shape (depths,), *optional*): cross entropy of every depth of multi-token
            prediction, in nats, without coefficient: the sum over its targets, divided by the number of targets of
            the model itself. Such a model returns it if labels are given.
        mtp_agreement (`torch.FloatTensor` of shape (depths,), *optional*): share of each depth's targets for which it
            and the model choose the same token. Greedy drafts are accepted this often.
        last_hidden_state (`torch.FloatTensor` of shape (B, S, D), *optional*): the decoder's output, if it was asked
            for.
    """

    mtp_loss: torch.Tensor | None = None
    mtp_agreement: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


class MtpLosses(NamedTuple):
    """The losses of all depths.

    Attributes:
        losses (`torch.FloatTensor` of shape (depths,)): as `mtp_loss` of [`DeepseekMoeCausalLMOutput`].
        total (`torch.FloatTensor` of shape ()): their weighted sum, coefficient included.
        targets (`torch.LongTensor` of shape (depths,)): numbers of targets.
        agreed (`torch.LongTensor` of shape (depths,)): numbers of targets for which depth and model choose the same.
        sums (`torch.FloatTensor` of shape (depths,)): sums of the cross entropies.
    """

    losses: torch.Tensor
    total: torch.Tensor
    targets: torch.Tensor
    agreed: torch.Tensor
    sums: torch.Tensor

    def outputs(self) -> dict[str, torch.Tensor]:
        """Return the fields of the model's output."""
        return {"mtp_loss": self.losses, "mtp_agreement": self.agreed / self.targets}


def mtp_losses(
    head: nn.Module,
    depths: list[Depth],
    layout: RowLayout,
    shift_labels: torch.Tensor,
    chosen: torch.Tensor,
    *,
    weights: tuple[float, ...],
    num_items: torch.Tensor | int,
    detach: bool,
) -> MtpLosses:
    """Compute the loss of every depth.

    As in the paper, the sum over a depth's targets is divided by the number of targets of the model, not by its own
    slightly smaller one. So it is exact under gradient accumulation, where only the former is known for the whole
    batch.

    Args:
        head: the model's head.
        depths: what the depths computed.
        layout: which tokens belong together.
        shift_labels (`torch.LongTensor` of shape (B, S)): labels of the tokens behind each position, -100 for none.
        chosen (`torch.LongTensor` of shape (B, S)): the tokens that the model itself finds most probable.
        weights: factor of every depth.
        num_items: number of targets to divide by.
        detach (`bool`): no gradient in the head's weights.
    """
    sums, targets, agreed = [], [], []
    for number, depth in enumerate(depths, start=1):
        wanted = layout.targets(shift_labels, number)
        ahead_logits = apply_head(head, depth.hidden_states, detach)
        sums.append(sum_of_cross_entropies(ahead_logits, wanted.to(ahead_logits.device)))
        counted = wanted != IGNORED
        same = ahead_logits.detach().argmax(dim=-1).to(chosen.device) == ahead(chosen, number, IGNORED)
        targets.append(counted.sum())
        agreed.append((same & counted.to(same.device)).sum())
    total = torch.stack([one.to(sums[0].device) for one in sums])
    losses = total / torch.as_tensor(num_items, device=total.device)
    return MtpLosses(
        losses=losses,
        total=(losses * losses.new_tensor(weights)).sum(),
        targets=torch.stack(targets),
        agreed=torch.stack(agreed),
        sums=total,
    )


def losses_ahead(
    model: Any,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    chosen: torch.Tensor,
    *,
    num_items: torch.Tensor | int,
    detach: bool,
    **kwargs: Any,
) -> tuple[MtpLosses, torch.Tensor | None]:
    """Run all depths of a language model, compute their losses, and count what they foresaw.

    Args:
        model: a language model with multi-token-prediction layers.
        hidden_states (`torch.FloatTensor` of shape (B, S, D)): the decoder's output.
        targets (`torch.LongTensor` of shape (B, S)): labels of the tokens behind each position, -100 for none.
        chosen (`torch.LongTensor` of shape (B, S)): the tokens that the model itself finds most probable.
        num_items: number of targets to divide by.
        detach (`bool`): no gradient but in the depths' own layers.
        kwargs: what the decoder was given, and `record`: whether the balance losses of the depths' gates are wanted.

    Returns:
        The losses, and the sum of the balance losses, coefficients included.

    Raises:
        ValueError: if a trainer has shifted the labels, which it does where a sequence is split over ranks.
    """
    if kwargs.get("shift_labels") is not None:
        raise ValueError(
            "shift_labels is not allowed with multi-token prediction: trainers give them where a sequence is split "
            "over ranks (context or sequence parallelism), and a depth would need the tokens of the next rank. Set "
            "mtp_loss_coef=0 in the config, or load the model without mtp=True."
        )
    decoder = model.model
    run_as_forward(decoder, "predict_ahead")
    depths, layout = decoder.predict_ahead(hidden_states, detach=detach, **kwargs)
    losses = mtp_losses(
        model.lm_head, depths, layout, targets, chosen,
        weights=model.config.mtp_loss_weights, num_items=num_items, detach=detach,
    )  # fmt: skip
    if counts_as_training(decoder):
        decoder.mtp_statistics.add(losses)
    return losses, sum_of_losses(decoder.records_of(depths), hidden_states.device) if kwargs.get("record") else None


def apply_head(head: nn.Module, hidden_states: torch.Tensor, detach: bool) -> torch.Tensor:
    """Compute logits (B, S, V), without a gradient in the head's weights if `detach`."""
    if not detach:
        return head(hidden_states)
    if torch.compiler.is_compiling():
        weights = {name: weight.detach() for name, weight in head.named_parameters()}
        return torch.func.functional_call(head, weights, (hidden_states,))
    with _without_weight_gradients(head):
        return head(hidden_states)


@contextmanager
def _without_weight_gradients(module: nn.Module) -> Iterator[None]:
    """Let a module compute with detached weights inside.

    They are exchanged between its hooks: those of FSDP and ZeRO-3 put the whole weights in place just before.
    """
    kept: dict[nn.Module, dict[str, nn.Parameter]] = {}

    def exchange(part: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            delattr(part, name)
            setattr(part, name, tensor)

    def detach(part: nn.Module, args: Any) -> None:
        kept[part] = {name: p for name, p in part.named_parameters(recurse=False) if p.requires_grad}
        exchange(part, {name: parameter.detach() for name, parameter in kept[part].items()})

    def restore(part: nn.Module, args: Any, output: Any) -> None:
        exchange(part, kept.pop(part, {}))

    handles = []
    for part in module.modules():
        handles.append(part.register_forward_pre_hook(detach))
        handles.append(part.register_forward_hook(restore, prepend=True, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sum_of_cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum the cross entropies, in nats, over the targets (B, S) that are not -100; in float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


class MtpStatistics:
    """What the depths predicted in training since somebody asked: kept on the device, and summed over ranks there.

    A copy of the decoder begins anew, and so does one that was pickled.

    Attributes:
        losses (`torch.FloatTensor` of shape (depths,), *optional*): sums of the cross entropies.
        counts (`torch.LongTensor` of shape (2, depths), *optional*): numbers of targets, and of those for which depth
            and model chose the same token.
    """

    def __init__(self) -> None:
        self.losses: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def reset(self) -> None:
        """Forget what was added."""
        self.losses = self.counts = None

    def add(self, losses: MtpLosses) -> None:
        """Add one micro-batch."""
        device, sums = losses.sums.device, losses.sums.detach()
        counts = torch.stack([losses.targets.to(device), losses.agreed.to(device)])
        if self.losses is not None and self.counts is not None and self.losses.shape == sums.shape:
            sums, counts = sums + self.losses.to(device), counts + self.counts.to(device)
        self.losses, self.counts = sums, counts

    def take(self) -> dict[str, float]:
        """Return the mean cross entropy and the agreement of every depth, all ranks together, and begin again.

        Returns:
            `mtp/loss_K` (nats, a target) and `mtp/agreement_K` (share of the targets) for every depth K; nothing for a
            depth without targets.
        """
        losses, counts = self.losses, self.counts
        self.reset()
        if losses is None or counts is None:
            return {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(losses)
            torch.distributed.all_reduce(counts)
        found: dict[str, float] = {}
        for depth, (loss, targets, agreed) in enumerate(zip(losses.tolist(), *counts.tolist(), strict=True), start=1):
            if targets:
                found |= {f"mtp/loss_{depth}": loss / targets, f"mtp/agreement_{depth}": agreed / targets}
        return found


def shifted_labels(labels: torch.Tensor, shift_labels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    """Return the labels of the tokens behind each position: a trainer's own `shift_labels`, or the labels shifted."""
    return ahead(labels, 1, IGNORED) if shift_labels is None else shift_labels


def starts_a_sequence(outputs: Any, cache: Any) -> bool:
    """Tell whether a forward pass began at the beginning of its sequences, and say once if not.

    Args:
        outputs: the decoder's.
        cache: the cache behind it, if there is one.
    """
    if cache is None or int(cache.get_seq_length()) <= outputs.last_hidden_state.shape[1]:
        return True
    logger.warning_once(
        "Labels are given together with a cache of earlier tokens: multi-token prediction has no part in this loss, "
        "and mtp_loss is None."
    )
    return False


__all__ = [
    "DeepseekMoeCausalLMOutput",
    "MtpLosses",
    "MtpStatistics",
    "apply_head",
    "losses_ahead",
    "mtp_losses",
    "shifted_labels",
    "starts_a_sequence",
    "sum_of_cross_entropies",
]
