# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Multi-token prediction: layers behind the decoder that predict further tokens (arXiv 2412.19437, section 2.2).

At position i the layer of depth k reads the hidden state of depth k - 1 and the embedding of token i + k. It predicts
token i + k + 1 with the model's own head. The hidden state of depth 0 is the decoder's output behind its last norm,
and that of a depth is the layer's output behind `shared_head.norm`.

Shape letters: B batch, S sequence, D hidden, V vocabulary. A depth is counted from 1.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_deepseekmoe import DeepseekMoeConfig
from .modeling_pretrained import CACHE, DeepseekMoeDecoderLayer
from .router_load import NO_RECORD, RoutingContext, RoutingRecord, token_mask_of
from .transformers_support import LlamaRMSNorm, create_causal_mask

IGNORED = -100  # a label without a loss


class SharedHead(nn.Module):
    """The norm in front of the head. The head itself is the model's own."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the norm."""
        return self.norm(hidden_states)


class DeepseekMoeMTPLayer(DeepseekMoeDecoderLayer):
    """A multi-token-prediction layer: a projection of hidden state and embedding, and a decoder layer.

    In the decoder's `layers` it stands behind the decoder layers, under the names of the released checkpoints.

    Args:
        config: the model's config. The layer has experts if any layer of the model does.
        depth (`int`): k, from 1. Its keys and values lie in layer k - 1 of a cache of their own.
    """

    def __init__(self, config: DeepseekMoeConfig, depth: int) -> None:
        super().__init__(config, depth - 1, has_experts=bool(config.n_routed_experts))
        self.enorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        next_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        routing: RoutingContext = NO_RECORD,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """Apply the layer (eqs. 21 to 23).

        Args:
            hidden_states (`torch.Tensor` of shape (B, S, D)): hidden states of the depth before.
            next_embeds (`torch.Tensor` of shape (B, S, D)): embeddings of the tokens that are k further.
            attention_mask, routing, kwargs: as for a decoder layer.

        Returns:
            As a decoder layer: the hidden states (B, S, D) behind the norm of the head, and the fields of the record.
        """
        both = torch.cat([self.enorm(next_embeds), self.hnorm(hidden_states)], dim=-1)
        hidden_states, *record = super().forward(self.eh_proj(both), attention_mask, routing, **kwargs)
        return (self.shared_head(hidden_states), *record)


def is_mtp_layer(module: nn.Module) -> bool:
    """Tell whether a module of a decoder's `layers` is a multi-token-prediction layer, perhaps inside a wrapper."""
    return hasattr(module, "eh_proj")


def mtp_layers_of(decoder: nn.Module) -> list[nn.Module]:
    """Return the multi-token-prediction layers of a decoder, by depth."""
    return [layer for layer in decoder.layers if is_mtp_layer(layer)]


class Depth(NamedTuple):
    """What one depth computed.

    Attributes:
        hidden_states (`torch.Tensor` of shape (B, S, D)): input of the head.
        real (`torch.BoolTensor` of shape (B, S)): positions whose two inputs are tokens of one document.
        record ([`RoutingRecord`], *optional*): the record of the layer's gate.
    """

    hidden_states: torch.Tensor
    real: torch.Tensor
    record: RoutingRecord | None


def documents_of(position_ids: torch.Tensor | None, shape: tuple[int, int], device: Any) -> torch.Tensor:
    """Number the documents that are packed in rows: a new one begins where a position is not the next one.

    Args:
        position_ids (`torch.Tensor` of shape (B, S) or (1, S), *optional*): positions; without them a row is one.
        shape: (B, S).
        device: where the result lies without positions.

    Returns:
        `torch.LongTensor` of shape (B, S).
    """
    if position_ids is None:
        return torch.zeros(shape, dtype=torch.long, device=device)
    begins = F.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=False)
    return begins.cumsum(dim=-1).expand(shape)


def ahead(values: torch.Tensor, steps: int, filling: Any) -> torch.Tensor:
    """Return the values (B, S) that lie `steps` further, and `filling` behind the last."""
    return F.pad(values[:, steps:], (0, min(steps, values.shape[1])), value=filling)


@dataclass(frozen=True)
class RowLayout:
    """Which tokens of a batch belong together.

    Attributes:
        real (`torch.BoolTensor` of shape (B, S)): whether there is a token.
        documents (`torch.LongTensor` of shape (B, S)): the numbers of the tokens' documents.
    """

    real: torch.Tensor
    documents: torch.Tensor

    @classmethod
    def of_batch(cls, attention_mask: Any, position_ids: torch.Tensor | None, like: torch.Tensor) -> "RowLayout":
        """Read it from a model's arguments.

        Args:
            attention_mask: (B, S), 0 for padding; of any other mask nothing is known, and every token counts.
            position_ids: (B, S), or (1, S) for all rows.
            like (`torch.Tensor` of shape (B, S, ...)).
        """
        shape = (like.shape[0], like.shape[1])
        mask = token_mask_of(attention_mask, torch.Size(shape), cached=False)
        real = torch.ones(shape, dtype=torch.bool, device=like.device) if mask is None else mask != 0
        return cls(real, documents_of(position_ids, shape, like.device))

    def reaches(self, steps: int) -> torch.Tensor:
        """Return which positions (B, S) have a token `steps` further in their document."""
        same = ahead(self.documents, steps, -1) == self.documents
        return self.real & ahead(self.real, steps, False) & same

    def targets(self, shift_labels: torch.Tensor, depth: int) -> torch.Tensor:
        """Return the labels (B, S) of a depth: those of tokens i + depth + 1, where all lies in one document.

        Args:
            shift_labels (`torch.Tensor` of shape (B, S)): labels of the tokens behind each position.
            depth (`int`): k.
        """
        targets = ahead(shift_labels, depth, IGNORED)
        inside = torch.arange(targets.shape[1], device=targets.device) + depth + 1 < targets.shape[1]
        allowed = self.reaches(depth) & (self.reaches(depth + 1) | ~inside)
        return targets.masked_fill(~allowed.to(targets.device), IGNORED)


def cut_off(decoder: Any, hidden_states: torch.Tensor, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the depths of a decoder begin with, without a gradient in the decoder."""
    hidden_states, embeds = hidden_states.detach(), embeds.detach()
    if torch.is_grad_enabled() and decoder.gradient_checkpointing and not torch.compiler.is_compiling():
        # A gradient that nobody reads: without one the reentrant mode of checkpointing has no others.
        hidden_states.requires_grad_()
    return hidden_states, embeds


def run_depths(
    decoder: Any,
    hidden_states: torch.Tensor,
    inputs_embeds: torch.Tensor,
    layout: RowLayout,
    *,
    attention_mask: Any = None,
    position_ids: torch.Tensor | None = None,
    record: bool = False,
    **kwargs: Any,
) -> list[Depth]:
    """Run all depths over whole sequences whose tokens are known, as in training.

    Every depth has the length of the batch, so that it shares the decoder's mask and positions. The last k positions
    have no token that is k further. Whatever stands there is seen by no position before, and is not counted.

    Args:
        decoder: a decoder with such layers.
        hidden_states (`torch.Tensor` of shape (B, S, D)): the decoder's output.
        inputs_embeds (`torch.Tensor` of shape (B, S, D)): embeddings of the tokens.
        layout: which tokens belong together.
        attention_mask, position_ids, kwargs: as the decoder was given them.
        record (`bool`): whether the records of the gates are wanted.
    """
    config = decoder.config
    if position_ids is None:
        position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
    causal_mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **{CACHE: None},
    )
    position_embeddings = decoder.rotary_emb(inputs_embeds, position_ids)
    context = decoder.routing_context(layout.real, inputs_embeds, record)
    depths = []
    for depth, layer in enumerate(mtp_layers_of(decoder), start=1):
        real = layout.reaches(depth)
        hidden_states, *fields = layer(
            hidden_states,
            inputs_embeds.roll(-depth, dims=1),
            attention_mask=causal_mask,
            routing=context._replace(token_mask=real),
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            **{CACHE: None, **kwargs},
        )
        depths.append(Depth(hidden_states, real, RoutingRecord(*fields) if fields else None))
    return depths


__all__ = [
    "IGNORED",
    "DeepseekMoeMTPLayer",
    "Depth",
    "RowLayout",
    "ahead",
    "cut_off",
    "documents_of",
    "is_mtp_layer",
    "mtp_layers_of",
    "run_depths",
]
