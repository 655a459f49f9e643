# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Generation that drafts with multi-token prediction: greedy the same tokens, sampling the same distribution.

A step computes the pending token of every row and its drafts in one forward pass, and accepts as many drafts as fit
(speculative sampling, arXiv 2211.17192, algorithm 1). Each row accepts its own number. The decoding loop is handed to
transformers' `generate` as its `custom_generate`, which prepares inputs, caches, processors and stopping criteria.

Shape letters: B rows, W entries of a step, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation import GenerateDecoderOnlyOutput, StoppingCriteriaList, StopStringCriteria
from transformers.utils import logging

from .mtp_drafting import Drafter, Entries
from .transformers_support import cache_name, remove_from_cache

if TYPE_CHECKING:
    from .modeling_deepseekmoe import DeepseekMoeForCausalLM

logger = logging.get_logger(__name__)


@dataclass
class MtpGenerateOutput(GenerateDecoderOnlyOutput):
    """Output of `generate(use_mtp=True, return_dict_in_generate=True)`.

    Attributes:
        mtp_acceptance (`list[float]`): share of the steps in which draft k was accepted, and all before it. A step
            makes one token more than it accepts drafts.
        mtp_steps (`int`): number of forward passes of the whole model behind the prompt, summed over the rows.
    """

    mtp_acceptance: list[float] | None = None
    mtp_steps: int | None = None


@dataclass
class _Rows:
    """The texts of one call, and what of them the caches hold.

    Attributes:
        ids (`torch.LongTensor` of shape (B, L)): prompt and tokens of each row, and the padding token behind.
        lengths: length of every row, its pending token included, which no cache holds yet.
        unfinished: indices of the rows that go on.
        real (`torch.BoolTensor` of shape (B, entries)): which entries of the model's cache are real.
        position_ids (`torch.LongTensor` of shape (B, 1)): the position of the pending token.
        prompt_length: length of the prompts.
        scores, logits: for every new token, what it was chosen by (B, V) and the model's own logits, if wanted.
    """

    ids: torch.Tensor
    lengths: list[int]
    unfinished: list[int]
    real: torch.Tensor
    position_ids: torch.Tensor
    prompt_length: int
    scores: list[torch.Tensor] | None = None
    logits: list[torch.Tensor] | None = None

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
        for idx in range(max(numbers)):
            rows = [row for row in self.unfinished if idx < numbers[row]]
            for row in rows:
                self.ids[row, self.lengths[row]] = tokens[row, idx]
                self.lengths[row] += 1
                added[row] += 1
            for length in {self.lengths[row] for row in rows}:
                scores = tuple(self.scores) if self.scores is not None else None
                ended = stopping_criteria(self.ids[:, :length], scores).tolist()
                same = [row for row in rows if self.lengths[row] == length]
                self.unfinished = [row for row in self.unfinished if row not in same or not ended[row]]
        return added


@dataclass
class MtpAssistant:
    """Generates with drafts of multi-token prediction; [`mtp_assistant`] makes it.

    Attributes:
        num_drafts (`int`): how many tokens are drafted at once.
        accepted (`list[int]`): for every draft of a step, how often it was accepted, in the last call.
        steps (`int`): how often drafts were verified in the last call, summed over the rows.
    """

    num_drafts: int
    streamer: Any = None
    accepted: list[int] = field(default_factory=list)
    steps: int = 0

    @property
    def acceptance(self) -> list[float]:
        """Share of the last call's steps in which draft k was accepted, and all before it."""
        return [number / max(self.steps, 1) for number in self.accepted]

    def __call__(
        self,
        model: "DeepseekMoeForCausalLM",
        input_ids: torch.LongTensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """Decode. transformers' `generate` calls this with what it has prepared.

        Raises:
            ValueError: for options that multi-token prediction does not go with. The message names them.
        """
        cache = model_kwargs.pop(cache_name(), None)
        _check(generation_config, cache, input_ids, model_kwargs)
        self.accepted, self.steps = [0] * self.num_drafts, 0
        loop = _Loop(self, model, logits_processor, stopping_criteria, generation_config, cache, model_kwargs)
        rows = loop.run(input_ids)
        if self.streamer is not None:
            self.streamer.end()
        sequences = rows.ids[:, : max(rows.lengths)]
        number = sequences.shape[1] - rows.prompt_length
        share = ", ".join(f"{one:.3f}" for one in self.acceptance)
        logger.info(f"Multi-token prediction: of {self.steps} steps draft 1, 2, ... was accepted in {share}.")
        if not generation_config.return_dict_in_generate:
            return sequences
        return MtpGenerateOutput(
            sequences=sequences,
            scores=None if rows.scores is None else tuple(rows.scores[:number]),
            logits=None if rows.logits is None else tuple(rows.logits[:number]),
            mtp_acceptance=self.acceptance,
            mtp_steps=self.steps,
            **{cache_name(): cache},
        )


def mtp_assistant(model: "DeepseekMoeForCausalLM", num_drafts: int | None = None) -> MtpAssistant:
    """Make what `generate(custom_generate=...)` drafts with; `generate(use_mtp=True)` is short for it.

    Args:
        model: a language model of this package with multi-token-prediction layers.
        num_drafts (`int`, *optional*): how many tokens to draft at once; as many as there are layers when absent. One
            layer may draft more than one, by using it on its own output. Several layers draft one token each.

    Returns:
        [`MtpAssistant`], whose `acceptance` tells after a call how often each draft was accepted.

    Raises:
        ValueError: for a model without such layers, or a number that they cannot draft.
    """
    depths = model.config.num_nextn_predict_layers if getattr(model.config, "mtp", False) else 0
    if not depths:
        raise ValueError(
            f"use_mtp is not allowed: this {type(model).__name__} has no multi-token-prediction layers. Load those of "
            "the checkpoint with from_pretrained(..., mtp=True), or give the model new ones with add_mtp(model), and "
            "train them."
        )
    wanted = depths if num_drafts is None else num_drafts
    if type(wanted) is not int or wanted < 1 or (wanted > depths > 1):
        most = "an integer of at least 1" if depths == 1 else f"an integer from 1 to {depths}, the number of layers"
        raise ValueError(f"num_assistant_tokens={wanted!r} is not allowed with use_mtp: it must be {most}.")
    return MtpAssistant(wanted)


def generation_arguments(model: "DeepseekMoeForCausalLM", args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Turn the arguments of `generate(use_mtp=True)` into those of transformers' own `generate`.

    Args:
        model: the model.
        args, kwargs: the arguments of `generate`.

    Returns:
        The keyword arguments, with [`MtpAssistant`] as `custom_generate`; the same as `kwargs` where `use_mtp` is not
        set.

    Raises:
        ValueError: for another way of drafting beside it.
    """
    configs = [*(one for one in args if isinstance(one, GenerationConfig)), kwargs.get("generation_config"),
               model.generation_config]  # fmt: skip

    def option(name: str) -> Any:
        found = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in found if value is not None), None)

    kwargs = dict(kwargs)
    assistant = kwargs.get("custom_generate")
    if not isinstance(assistant, MtpAssistant):
        if not option("use_mtp"):
            if "use_mtp" in kwargs and not hasattr(GenerationConfig(), "use_mtp"):
                del kwargs["use_mtp"]  # False, which older versions do not know
            return kwargs
        assistant = mtp_assistant(model, option("num_assistant_tokens"))
    for name in ("assistant_model", "prompt_lookup_num_tokens", "custom_generate"):
        given = kwargs.get(name) if name != "prompt_lookup_num_tokens" else option(name)
        if given is not None and given is not assistant:
            raise ValueError(f"{name} is not allowed with use_mtp: both make drafts.")
    kwargs.pop("use_mtp", None)
    if hasattr(GenerationConfig(), "use_mtp"):
        kwargs["use_mtp"] = False
    # transformers hands neither to a `custom_generate`.
    assistant.streamer = kwargs.pop("streamer", None)
    if option("stop_strings") is not None and kwargs.get("tokenizer") is not None:
        criterion = StopStringCriteria(tokenizer=kwargs["tokenizer"], stop_strings=option("stop_strings"))
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), criterion])
        kwargs["stop_strings"] = []
    return {**kwargs, "custom_generate": assistant}


def _check(config: GenerationConfig, cache: Any, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
    for name, allowed in (("num_beams", 1), ("prefill_chunk_size", None), ("guidance_scale", 1.0)):
        value = getattr(config, name, None)
        if value not in (allowed, None):
            raise ValueError(f"{name}={value!r} is not allowed with use_mtp: it must be {allowed!r}.")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            raise ValueError(f"{name}=True is not allowed with use_mtp, whose steps do not belong to single tokens.")
    if type(cache) not in (DynamicCache, StaticCache):
        found = "use_cache=False" if cache is None else f"a cache of type {type(cache).__name__}"
        raise ValueError(f"{found} is not allowed with use_mtp: it needs a dynamic or a static cache.")
    if cache.get_seq_length():
        raise ValueError(
            f"a cache with {int(cache.get_seq_length())} tokens is not allowed with use_mtp: the multi-token-"
            "prediction layers have not seen them. Generate from the whole text."
        )
    if model_kwargs.get("inputs_embeds") is not None or not input_ids.shape[1]:
        raise ValueError("inputs_embeds is not allowed with use_mtp: give input_ids.")


class _Loop:
    """The decoding loop of one call."""

    def __init__(
        self,
        assistant: MtpAssistant,
        model: "DeepseekMoeForCausalLM",
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        cache: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.assistant = assistant
        self.model = model
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.config = generation_config
        self.cache = cache
        # A static cache has no room for the entries that rows leave behind: there all accept the same number.
        self.together = isinstance(cache, StaticCache)
        self.drafter = Drafter(model, assistant.num_drafts)
        given = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "inputs_embeds", "cache_position"}
        self.others = {name: value for name, value in model_kwargs.items() if name not in given}
        self.attention_mask = model_kwargs.get("attention_mask")
        self.prompt_positions = model_kwargs.get("position_ids")

    def run(self, input_ids: torch.Tensor) -> _Rows:
        """Generate until all rows are finished."""
        rows, entries = self._prefill(input_ids)
        while rows.unfinished:
            left = max(self.config.max_length - rows.lengths[row] for row in rows.unfinished)
            number = min(self.assistant.num_drafts, left - 1)
            if number > 0:
                drafts, chosen_by = self.drafter.draft(entries, self._chooser(rows), number)
            else:
                drafts, chosen_by = rows.ids.new_empty(len(rows.ids), 0), None
            entries = self._verify(rows, drafts, chosen_by)
        return rows

    def _prefill(self, input_ids: torch.Tensor) -> tuple[_Rows, Entries]:
        """Compute the prompt, and make the first token of every row."""
        batch_size, length = input_ids.shape
        mask = self.attention_mask
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0
        positions = self.prompt_positions
        if positions is None:
            positions = (real.long().cumsum(dim=-1) - 1).clamp(min=0)
        positions = positions.expand(batch_size, -1)
        ids = input_ids.new_full((batch_size, max(self.config.max_length, length + 1)), self._padding())
        ids[:, :length] = input_ids
        everyone = list(range(batch_size))
        rows = _Rows(ids, [length] * batch_size, everyone, real, positions[:, -1:] + 1, length)
        rows.scores = [] if self._wants("output_scores") else None
        rows.logits = [] if self._wants("output_logits") else None
        if self.assistant.streamer is not None:
            self.assistant.streamer.put(input_ids.cpu())
        outputs = self._forward(input_ids, real, positions, logits_to_keep=1)
        logits = outputs.logits.float()
        processed = self._process(rows, ids, logits)
        tokens = self._pick(processed)
        self._append(rows, tokens, [1] * batch_size, processed, logits)
        next_ids = torch.cat([input_ids[:, 1:], tokens], dim=1)
        last = torch.full((batch_size,), length - 1, device=ids.device)
        return rows, Entries(outputs.last_hidden_state, next_ids, positions, real, last)

    def _verify(self, rows: _Rows, drafts: torch.Tensor, chosen_by: torch.Tensor | None) -> Entries:
        """Compute the pending tokens and the drafts, and append to every row what it accepts and one token more."""
        batch_size, number = drafts.shape
        device = drafts.device
        pending = rows.ids[torch.arange(batch_size, device=device), torch.tensor(rows.lengths, device=device) - 1]
        block = torch.cat([pending[:, None], drafts], dim=1)
        positions = rows.position_ids + torch.arange(number + 1, device=device)
        seen = torch.cat([rows.real, torch.ones_like(block, dtype=torch.bool)], dim=1)
        outputs = self._forward(block, seen, positions)
        logits = outputs.logits.float()
        candidates = rows.ids.clone()
        for row, length in enumerate(rows.lengths):
            room = min(number, candidates.shape[1] - length)
            candidates[row, length : length + room] = drafts[row, :room]
        processed = self._process(rows, candidates, logits)
        tokens, accepted = self._accept(processed, drafts, chosen_by)
        before, numbers = set(rows.unfinished), accepted.tolist()
        self._note(numbers, number, before)
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

    def _chooser(self, rows: _Rows) -> Any:
        """Return what makes drafts from logits: as the model's own tokens are made, from the rows' texts so far."""
        candidates = rows.ids.clone()

        def choose(logits: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
            processed = self._process(rows, candidates, logits[:, None], ahead=number)
            tokens = self._pick(processed)[:, 0]
            for row, length in enumerate(rows.lengths):
                if length + number < candidates.shape[1]:
                    candidates[row, length + number] = tokens[row]
            return tokens, processed[:, 0]

        return choose

    def _process(self, rows: _Rows, candidates: torch.Tensor, logits: torch.Tensor, ahead: int = 0) -> torch.Tensor:
        """Apply the logits processors as to single tokens, each row with its own text.

        Args:
            rows: the rows.
            candidates (`torch.LongTensor` of shape (B, L)): their texts, with drafts behind.
            logits (`torch.FloatTensor` of shape (B, W, V)): logits of the tokens behind texts that are `ahead`,
                `ahead + 1`, ... longer than the rows.
            ahead (`int`): how many drafts there are before the first.
        """
        if not len(self.logits_processor):
            return logits
        processed = logits.clone()
        for length in set(rows.lengths):
            same = [row for row, own in enumerate(rows.lengths) if own == length]
            for idx in range(logits.shape[1]):
                if length + ahead + idx <= candidates.shape[1]:
                    text = candidates[:, : length + ahead + idx]
                    processed[same, idx] = self.logits_processor(text, logits[:, idx].clone())[same]
        return processed

    def _pick(self, processed: torch.Tensor) -> torch.Tensor:
        """Make one token a row (B, 1) from logits (B, 1, V)."""
        if not self.config.do_sample:
            return processed.argmax(dim=-1)
        return torch.multinomial(processed[:, 0].softmax(dim=-1), 1)

    def _append(
        self, rows: _Rows, tokens: torch.Tensor, numbers: list[int], processed: torch.Tensor, logits: torch.Tensor
    ) -> list[int]:
        """Append tokens to the rows, and keep and stream what is wanted of them."""
        before = list(rows.lengths)
        for kept, source in ((rows.scores, processed), (rows.logits, logits)):
            if kept is not None:
                self._keep(kept, source, rows, numbers)
        added = rows.append(tokens, numbers, self.stopping_criteria)
        if self.assistant.streamer is not None and added[0]:
            self.assistant.streamer.put(rows.ids[0, before[0] : rows.lengths[0]].cpu())
        return added

    def _keep(self, kept: list[torch.Tensor], source: torch.Tensor, rows: _Rows, numbers: list[int]) -> None:
        for row in rows.unfinished:
            for idx in range(numbers[row]):
                place = rows.lengths[row] + idx - rows.prompt_length
                while len(kept) <= place:
                    kept.append(torch.zeros_like(source[:, 0]))
                kept[place][row] = source[row, idx]

    def _note(self, numbers: list[int], drafted: int, rows: set[int]) -> None:
        """Count what the unfinished rows have accepted of full sets of drafts."""
        if drafted < self.assistant.num_drafts:
            return
        self.assistant.steps += len(rows)
        for row in rows:
            for idx in range(numbers[row]):
                self.assistant.accepted[idx] += 1

    def _wants(self, name: str) -> bool:
        return bool(self.config.return_dict_in_generate and getattr(self.config, name, False))

    def _padding(self) -> int:
        for tokens in (self.config.pad_token_id, self.config.eos_token_id):
            if tokens is not None:
                return int(torch.as_tensor(tokens).flatten()[0])
        return 0


__all__ = ["MtpAssistant", "MtpGenerateOutput", "generation_arguments", "mtp_assistant"]
