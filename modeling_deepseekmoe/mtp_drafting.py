# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Drafts tokens with the layers of multi-token prediction while a model generates.

Rows of a batch accept different numbers of drafts. A row that accepts fewer leaves entries behind in the caches, which
are masked from then on. Entries that no row needs are cut off.

Shape letters: B rows, W new entries of a row, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from .mtp import mtp_layers_of
from .router_load import NO_RECORD
from .transformers_support import cache_name, create_causal_mask, remove_from_cache

# Makes the next draft of each row (B,) from logits (B, V), and returns it with the logits that it was chosen by.
Choose = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Entries(NamedTuple):
    """Positions of the rows that the model has computed and that are certain: those of a row end at `last`.

    Attributes:
        hidden_states (`torch.Tensor` of shape (B, W, D)): the decoder's output.
        next_ids (`torch.LongTensor` of shape (B, W)): the tokens behind the positions.
        position_ids (`torch.LongTensor` of shape (B, W)): the positions.
        real (`torch.BoolTensor` of shape (B, W)): whether the row has an entry there.
        last (`torch.LongTensor` of shape (B,)): index of the row's last entry.
    """

    hidden_states: torch.Tensor
    next_ids: torch.Tensor
    position_ids: torch.Tensor
    real: torch.Tensor
    last: torch.Tensor

    def tail(self, length: int) -> "Entries":
        """Return the last `length` entries of every row, which end at the last index."""
        indices = self.last[:, None] + torch.arange(1 - length, 1, device=self.last.device)
        there, indices = indices >= 0, indices.clamp(min=0)
        expanded = indices[..., None].expand(-1, -1, self.hidden_states.shape[-1])
        return Entries(
            self.hidden_states.gather(1, expanded),
            self.next_ids.gather(1, indices),
            self.position_ids.gather(1, indices),
            self.real.gather(1, indices) & there,
            torch.full_like(self.last, length - 1),
        )

    def behind(self, before: "Entries | None") -> "Entries":
        """Return these entries behind others."""
        if before is None:
            return self
        return Entries(
            torch.cat([before.hidden_states, self.hidden_states], dim=1),
            torch.cat([before.next_ids, self.next_ids], dim=1),
            torch.cat([before.position_ids, self.position_ids], dim=1),
            torch.cat([before.real, self.real], dim=1),
            self.last + before.real.shape[1],
        )


class Drafter:
    """Drafts tokens for the rows of one call of `generate`.

    With one layer, further drafts use it again on its own output, as SGLang and vLLM do. With several layers, each
    drafts one token. The layer of depth k reads tokens that are k further, and of the last k - 1 positions these are
    drafts: those entries are made anew, with the tokens that were accepted, before the next drafts.

    Args:
        model: a language model with such layers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.model
        self.layers = mtp_layers_of(self.decoder)
        self.cache = DynamicCache()
        self.real: torch.Tensor | None = None  # which entries of the cache are real, (B, entries)
        self.certain: Entries | None = None  # the last ones, which are to be made anew

    @property
    def _uncertain(self) -> int:
        """How many entries of a row depend on drafts."""
        return len(self.layers) - 1

    def draft(self, entries: Entries, choose: Choose, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft the tokens behind the next ones.

        Args:
            entries: what was computed since the last call, for every row at least one entry.
            choose: makes tokens from logits.
            number (`int`): how many tokens to draft.

        Returns:
            The drafts (B, number), and the logits (B, number, V) that they were chosen by.
        """
        self._forget_uncertain()
        entries = entries.behind(self.certain)
        self.certain = entries.tail(self._uncertain) if self._uncertain else None
        rows = torch.arange(len(entries.last), device=entries.last.device)
        following = F.pad(entries.next_ids, (0, len(self.layers)))
        width = entries.real.shape[1]
        real = entries.real if self.real is None else torch.cat([self.real, entries.real], dim=1)
        hidden_states, drafts, chosen_by = entries.hidden_states, [], []
        at = (entries.position_ids, self._mask(entries.hidden_states, real, entries.position_ids))
        for depth in range(len(self.layers)):
            hidden_states = self._run(depth, hidden_states, following[:, depth : depth + width], *at)
            if depth < number:
                token, logits = choose(self._logits(hidden_states[rows, entries.last]))
                following[rows, entries.last + depth + 1] = token
                drafts.append(token)
                chosen_by.append(logits)
        self.real = real
        self._draft_again(hidden_states[rows, entries.last, None], entries, choose, number, drafts, chosen_by)
        return torch.stack(drafts, dim=1), torch.stack(chosen_by, dim=1)

    def _draft_again(
        self,
        hidden_states: torch.Tensor,
        entries: Entries,
        choose: Choose,
        number: int,
        drafts: list[torch.Tensor],
        chosen_by: list[torch.Tensor],
    ) -> None:
        """Use the only layer on its own output (B, 1, D) until there are enough drafts."""
        assert self.real is not None
        position_ids = entries.position_ids.gather(1, entries.last[:, None])
        real, again = self.real, number - len(drafts)
        for _ in range(again):
            position_ids = position_ids + 1
            real = F.pad(real, (0, 1), value=True)
            mask = self._mask(hidden_states, real, position_ids)
            hidden_states = self._run(0, hidden_states, drafts[-1][:, None], position_ids, mask)
            token, logits = choose(self._logits(hidden_states[:, 0]))
            drafts.append(token)
            chosen_by.append(logits)
        if again > 0:
            remove_from_cache(self.cache, again)

    def _forget_uncertain(self) -> None:
        """Mask the entries that depend on drafts, and cut off what no row needs."""
        if self.real is None:
            return
        from_behind = self.real.flip(1).cumsum(dim=1).flip(1)
        self.real = self.real & (from_behind > self._uncertain)
        unused = self.real.flip(1).any(dim=0).long().cumsum(dim=0).eq(0).sum()
        if number := int(unused):
            self.real = self.real[:, :-number]
            remove_from_cache(self.cache, number)

    def _mask(self, inputs_embeds: torch.Tensor, real: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return create_causal_mask(
            config=self.model.config,
            inputs_embeds=inputs_embeds,
            attention_mask=real.long(),
            position_ids=position_ids,
            **{cache_name(): self.cache},
        )

    def _run(
        self, depth: int, hidden_states: torch.Tensor, ids: torch.Tensor, position_ids: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        embeds = self.decoder.embed_tokens(ids).to(hidden_states.device)
        outputs = self.layers[depth](
            hidden_states,
            embeds,
            attention_mask=mask,
            routing=NO_RECORD,
            position_ids=position_ids,
            position_embeddings=self.decoder.rotary_emb(embeds, position_ids),
            **{cache_name(): self.cache},
        )
        return outputs[0]

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden_states).float()


__all__ = ["Choose", "Drafter", "Entries"]
