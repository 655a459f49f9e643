# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The decoding loop that verifies drafts: speculative sampling (arXiv 2211.17192, algorithm 1), for rows of a batch.

A step computes the pending token of every row and its drafts in one forward pass. Each row accepts its own number.

Shape letters: B rows, W entries of a step, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, StaticCache

from .mtp_drafting import Drafter, Entries
from .transformers_support import cache_name, remove_from_cache


@dataclass
class Drafting:
    """How drafts are made, and how many of them were accepted in the last call of `generate`.

    Attributes:
        num_drafts (`int`): how many tokens are drafted at once.
        streamer: transformers' streamer of the call, if there is one.
        together (`bool`): whether all rows accept the same number of drafts, so that the cache has no holes.
        accepted, drafted (`list[int]`): for every draft of a step, how often it was accepted and how often made.
        steps (`int`): number of forward passes of the whole model behind the prompt, summed over unfinished rows.
    """

    num_drafts: int
    streamer: Any = None
    together: bool = False
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    steps: int = 0
    _asked: set[int] | None = None

    @property
    def acceptance(self) -> list[float]:
        """Share of the steps with a draft k in which it was accepted, and all before it."""
        return [number / max(drafted, 1) for number, drafted in zip(self.accepted, self.drafted, strict=True)]

    def begin(self) -> None:
        """Forget the last call."""
        self.accepted, self.drafted, self.steps = [0] * self.num_drafts, [0] * self.num_drafts, 0

    def note(self, accepted: list[int], drafted: int) -> None:
        """Count the drafts that unfinished rows have accepted in a step."""
        self.steps += len(accepted)
        for idx in range(drafted):
            self.accepted[idx] += sum(number > idx for number in accepted)
            self.drafted[idx] += len(accepted)

    def process(self, processors: Any, text: torch.Tensor, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Apply logits processors to some rows of a batch, and return theirs (rows, V).

        Args:
            processors: transformers'.
            text (`torch.LongTensor` of shape (B, L)): the texts. Those of other rows are of another length, and the
                processors see that of a row in question in their place.
            logits (`torch.FloatTensor` of shape (B, V)).
            rows: indices of the rows in question.
        """
        text, others = text.clone(), sorted(set(range(len(text))) - set(rows))
        text[others] = text[rows[0]].clone()
        self._asked = set(rows)
        try:
            return processors(text, logits.clone())[rows]
        finally:
            self._asked = None

    def asked_alone(self, function: Any, vocabulary: int) -> Any:
        """Wrap a `prefix_allowed_tokens_fn`, which knows its rows: only those in question come to it."""

        def wrapped(row: int, ids: torch.Tensor) -> Any:
            return function(row, ids) if self._asked is None or row in self._asked else list(range(vocabulary))

        return wrapped


@dataclass
class Rows:
    """The texts of one call, and what of them the caches hold.

    Attributes:
        ids (`torch.LongTensor` of shape (B, L)): prompt and tokens of each row, and the padding token behind.
        lengths: length of every row, its pending token included, which no cache holds yet.
        unfinished: indices of the rows that go on.
        real (`torch.BoolTensor` of shape (B, entries)): which entries of the model's cache are real.
        position_ids (`torch.LongTensor` of shape (B, 1)): the position of the pending token.
        prompt_length: length of the prompts.
        padding: the padding token.
        scores, logits: for every new token, what it was chosen by (B, V) and the model's own logits, if wanted.
    """

    ids: torch.Tensor
    lengths: list[int]
    unfinished: list[int]
    real: torch.Tensor
    position_ids: torch.Tensor
    prompt_length: int
    padding: int
    scores: list[torch.Tensor] | None = None
    logits: list[torch.Tensor] | None = None

    @property
    def are_even(self) -> bool:
        """Whether every row has an entry in the cache for each of its tokens, and no other behind its prompt."""
        return bool(self.real[:, self.prompt_length :].all())

    def append(self, tokens: torch.Tensor, numbers: list[int], stopping_criteria: Any) -> list[int]:
        """Append tokens, until a criterion ends the row.

        Args:
            tokens (`torch.LongTensor` of shape (B, W)): new tokens.
            numbers: how many of them are a row's.
            stopping_criteria: transformers'.

        Returns:
            How many tokens each row has got; 0 for rows that were finished.
        """
        added = [0] * len(numbers)
        needed = max(self.lengths) + max(numbers)
        if needed > self.ids.shape[1]:
            self.ids = F.pad(self.ids, (0, needed), value=self.padding)  # twice as long: this happens seldom
        for idx in range(max(numbers)):
            rows = [row for row in self.unfinished if idx < numbers[row]]
            if not rows:
                break
            places = [self.lengths[row] for row in rows]
            self.ids[rows, places] = tokens[rows, idx]
            for row in rows:
                self.lengths[row] += 1
                added[row] += 1
            finished = set()
            for length in {self.lengths[row] for row in rows}:
                scores = tuple(self.scores) if self.scores is not None else None
                ended = stopping_criteria(self.ids[:, :length], scores).tolist()
                finished |= {row for row in rows if self.lengths[row] == length and ended[row]}
            self.unfinished = [row for row in self.unfinished if row not in finished]
        return added


class DecodingLoop:
    """The decoding loop of one call."""

    def __init__(
        self,
        drafting: Drafting,
        model: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        cache: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.drafting = drafting
        self.model = model
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.config = generation_config
        self.cache = cache
        # A static cache has no room for the entries that rows leave behind.
        self.together = drafting.together or isinstance(cache, StaticCache)
        self.drafter = Drafter(model)
        given = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "inputs_embeds", "cache_position"}
        self.others = {name: value for name, value in model_kwargs.items() if name not in given}
        self.attention_mask = model_kwargs.get("attention_mask")
        self.prompt_positions = model_kwargs.get("position_ids")

    def run(self, input_ids: torch.Tensor) -> Rows:
        """Generate until all rows are finished."""
        rows, entries = self._prefill(input_ids)
        while rows.unfinished:
            left = max(self.config.max_length - rows.lengths[row] for row in rows.unfinished)
            number = min(self.drafting.num_drafts, left - 1)
            if number > 0:
                drafts, chosen_by = self.drafter.draft(entries, self._chooser(rows), number)
            else:
                drafts, chosen_by = rows.ids.new_empty(len(rows.ids), 0), None
            entries = self._verify(rows, drafts, chosen_by)
        return rows

    def _prefill(self, input_ids: torch.Tensor) -> tuple[Rows, Entries]:
        """Compute the prompt, and make the first token of every row."""
        batch_size, length = input_ids.shape
        mask = self.attention_mask
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0
        positions = self.prompt_positions
        if positions is None:
            positions = (real.long().cumsum(dim=-1) - 1).clamp(min=0)
        positions = positions.expand(batch_size, -1)
        everyone = list(range(batch_size))
        rows = Rows(input_ids, [length] * batch_size, everyone, real, positions[:, -1:] + 1, length, self._padding())
        rows.scores = [] if self._wants("output_scores") else None
        rows.logits = [] if self._wants("output_logits") else None
        if self.drafting.streamer is not None:
            self.drafting.streamer.put(input_ids.cpu())
        outputs = self._forward(input_ids, real, positions, logits_to_keep=1)
        logits = outputs.logits.float()
        processed = self._process(rows, input_ids[:, :0], logits)
        tokens = self._pick(processed)
        self._append(rows, tokens, [1] * batch_size, processed, logits)
        next_ids = torch.cat([input_ids[:, 1:], tokens], dim=1)
        last = torch.full((batch_size,), length - 1, device=tokens.device)
        return rows, Entries(outputs.last_hidden_state, next_ids, positions, real, last)

    def _verify(self, rows: Rows, drafts: torch.Tensor, chosen_by: torch.Tensor | None) -> Entries:
        """Compute the pending tokens and the drafts, and append to every row what it accepts and one token more."""
        batch_size, number = drafts.shape
        device = drafts.device
        pending = rows.ids[torch.arange(batch_size, device=device), torch.tensor(rows.lengths, device=device) - 1]
        block = torch.cat([pending[:, None], drafts], dim=1)
        positions = rows.position_ids + torch.arange(number + 1, device=device)
        seen = torch.cat([rows.real, torch.ones_like(block, dtype=torch.bool)], dim=1)
        outputs = self._forward(block, seen, positions)
        logits = outputs.logits.float()
        processed = self._process(rows, drafts, logits)
        tokens, accepted = self._accept(processed, drafts, chosen_by)
        before, numbers = set(rows.unfinished), accepted.tolist()
        self.drafting.note([numbers[row] for row in before], number)
        if self.together:
            numbers = [min(numbers[row] for row in before)] * batch_size
        added = self._append(rows, tokens, [one + 1 for one in numbers], processed, logits)
        # A finished row keeps one entry, so that it goes on with the others.
        kept = torch.tensor([max(one, 1) for one in added], device=device)
        width = int(kept.max())
        remove_from_cache(self.cache, number + 1 - width)
        real = torch.arange(width, device=device) < kept[:, None]
        rows.real = torch.cat([rows.real, real], dim=1)
        rows.position_ids = rows.position_ids + kept[:, None]
        hidden_states = outputs.last_hidden_state[:, :width]
        return Entries(hidden_states, tokens[:, :width], positions[:, :width], real, kept - 1)

    def _forward(self, ids: torch.Tensor, real: torch.Tensor, positions: torch.Tensor, **kwargs: Any) -> Any:
        # Without padding no mask, as in transformers' own loop.
        mask = None if bool(real.all()) else real.long()
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            output_last_hidden_state=True,
            return_dict=True,
            **{cache_name(): self.cache, **self.others, **kwargs},
        )

    def _accept(
        self, processed: torch.Tensor, drafts: torch.Tensor, chosen_by: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare the drafts with what the model would have made.

        Args:
            processed (`torch.FloatTensor` of shape (B, W, V)): the model's logits for the drafts and one token more.
            drafts (`torch.LongTensor` of shape (B, W - 1)): the drafts.
            chosen_by (`torch.FloatTensor` of shape (B, W - 1, V), *optional*): the logits that they were chosen by.

        Returns:
            The rows' tokens (B, W), accepted drafts and then one of the model's own, and the numbers of accepted
            drafts (B,).
        """
        rows = torch.arange(len(drafts), device=drafts.device)
        if not self.config.do_sample:
            tokens = processed.argmax(dim=-1)
            fits = tokens[:, :-1] == drafts
            return tokens, fits.long().cumprod(dim=1).sum(dim=1)
        wanted = processed.softmax(dim=-1)
        if chosen_by is None:
            return torch.multinomial(wanted[:, 0], 1), torch.zeros_like(rows)
        drafted = chosen_by.softmax(dim=-1)
        p, q = (one[:, : drafts.shape[1]].gather(2, drafts[..., None])[..., 0] for one in (wanted, drafted))
        fits = torch.rand_like(p) * q < p
        accepted = fits.long().cumprod(dim=1).sum(dim=1)
        of_model = wanted[rows, accepted]
        rest = of_model - torch.cat([drafted, torch.zeros_like(drafted[:, :1])], dim=1)[rows, accepted]
        rest = rest.clamp(min=0)
        rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, of_model)  # equal but for rounding
        tokens = torch.cat([drafts, drafts[:, :1]], dim=1)
        tokens[rows, accepted] = torch.multinomial(rest, 1)[:, 0]
        return tokens, accepted

    def _chooser(self, rows: Rows) -> Any:
        """Return what makes drafts from logits: as the model's own tokens are made, from the rows' texts so far."""
        drafts = rows.ids[:, :0]

        def choose(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal drafts
            processed = self._process(rows, drafts, logits[:, None])
            tokens = self._pick(processed)
            drafts = torch.cat([drafts, tokens], dim=1)
            return tokens[:, 0], processed[:, 0]

        return choose

    def _process(self, rows: Rows, drafts: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Apply the logits processors as to single tokens, each row with its own text.

        Args:
            rows: the rows.
            drafts (`torch.LongTensor` of shape (B, N)): drafts behind their texts.
            logits (`torch.FloatTensor` of shape (B, W, V)): logits of the tokens behind the last W - 1 drafts and
                before.
        """
        if not len(self.logits_processor):
            return logits
        processed, first = logits.clone(), drafts.shape[1] + 1 - logits.shape[1]
        # Nobody asks what comes behind a draft that would end the text.
        ends = torch.isin(drafts, self._ends.to(drafts.device)).cumsum(dim=1).tolist()
        for length in {rows.lengths[row] for row in rows.unfinished}:
            same = [row for row in rows.unfinished if rows.lengths[row] == length]
            for idx in range(logits.shape[1]):
                number = first + idx  # of drafts before the token
                asked = [row for row in same if not number or not ends[row][number - 1]]
                if asked:
                    text = torch.cat([rows.ids[:, :length], drafts[:, :number]], dim=1)
                    result = self.drafting.process(self.logits_processor, text, logits[:, idx], asked)
                    processed[asked, idx] = result
        return processed

    def _pick(self, processed: torch.Tensor) -> torch.Tensor:
        """Make one token a row (B, 1) from logits (B, 1, V)."""
        if not self.config.do_sample:
            return processed.argmax(dim=-1)
        return torch.multinomial(processed[:, 0].softmax(dim=-1), 1)

    def _append(
        self, rows: Rows, tokens: torch.Tensor, numbers: list[int], processed: torch.Tensor, logits: torch.Tensor
    ) -> list[int]:
        """Append tokens to the rows, and keep and stream what is wanted of them."""
        before = list(rows.lengths)
        for kept, source in ((rows.scores, processed), (rows.logits, logits)):
            if kept is not None:
                self._keep(kept, source, rows, numbers)
        added = rows.append(tokens, numbers, self.stopping_criteria)
        if self.drafting.streamer is not None and added[0]:
            self.drafting.streamer.put(rows.ids[0, before[0] : rows.lengths[0]].cpu())
        return added

    def _keep(self, kept: list[torch.Tensor], source: torch.Tensor, rows: Rows, numbers: list[int]) -> None:
        for idx in range(max(numbers)):
            for row in [row for row in rows.unfinished if idx < numbers[row]]:
                place = rows.lengths[row] + idx - rows.prompt_length
                while len(kept) <= place:
                    kept.append(torch.zeros_like(source[:, 0]))
                kept[place][row] = source[row, idx]

    def _wants(self, name: str) -> bool:
        return bool(self.config.return_dict_in_generate and getattr(self.config, name, False))

    @property
    def _ends(self) -> torch.Tensor:
        """The tokens that end a text."""
        ends = self.config.eos_token_id
        return torch.as_tensor([] if ends is None else ends, dtype=torch.long).flatten()

    def _padding(self) -> int:
        if self.config.pad_token_id is not None:
            return int(self.config.pad_token_id)
        return int(self._ends[0]) if len(self._ends) else 0


__all__ = ["DecodingLoop", "Drafting", "Rows"]
