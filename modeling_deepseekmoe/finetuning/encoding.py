# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Turn rows into token ids and labels. A label is -100 where nothing is learnt.

Which tokens of a chat are the assistant's is read from the `generation` markers of the chat template, or of the
version for training that TRL has of it. Where there is neither, it is found by the template alone: the tokens of an
assistant's message are those that come on top of the messages before it. That holds if a template writes the first
messages as it writes them alone, which is checked for every row.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .options import LOSSES
from .rows import Row, Rows

IGNORED = -100
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Example:
    """A sequence to train on.

    Attributes:
        row: number of its row.
        ids, labels: tokens, and what is learnt.
    """

    row: int
    ids: list[int]
    labels: list[int]

    @property
    def learnt(self) -> int:
        """Number of the tokens that are learnt; the first one has nothing before it to be told from."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Examples:
    """The sequences of all rows, and what became of these.

    Attributes:
        kind: of the rows.
        examples: the sequences.
        cut: rows that were longer than a sequence; those of texts are continued in another one, others are not.
        left_out: rows of which nothing would be learnt.
        notes: what else there is to say.
    """

    kind: str
    examples: tuple[Example, ...]
    cut: int
    left_out: int
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(example.ids) for example in self.examples)


def choose_loss(kind: str, loss_on: str | None) -> str:
    """Return on which tokens of such rows the loss is taken.

    Raises:
        ValueError: if rows of this kind have no such tokens.
    """
    if loss_on is None:
        return LOSSES[kind][0]
    if loss_on not in LOSSES[kind]:
        raise ValueError(
            f"loss_on={loss_on!r} is not allowed for rows of {kind}: it must be one of {', '.join(LOSSES[kind])}."
        )
    return loss_on


def encode_rows(rows: Rows, tokenizer: PreTrainedTokenizerBase, *, loss_on: str, max_length: int) -> Examples:
    """Turn all rows into sequences.

    Chats and completions that are too long are cut, texts are continued in a further sequence. Behind a text and a
    completion comes the token that ends a sequence.

    Args:
        rows: from [`load_rows`].
        tokenizer: the model's tokenizer.
        loss_on: from [`choose_loss`].
        max_length: most tokens of a sequence.

    Raises:
        ValueError: if the tokenizer has no chat template and needs one, if the template refuses a row, if it does not
            tell which tokens are the assistant's, or if there is nothing to learn in any row.
    """
    encode, notes = _encoder(rows, tokenizer, loss_on)
    special = set(tokenizer.all_special_ids)
    found: list[Example] = []
    cut = left_out = 0
    for number, row in enumerate(rows.rows):
        ids, labels = encode(row)
        cut += len(ids) > max_length
        ends = _ends(len(ids), max_length) if rows.kind == "text" else [min(len(ids), max_length)]
        parts = [
            Example(number, ids[start:end], labels[start:end])
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        learnt = [part for part in parts if part.learnt]
        left_out += not learnt
        found += learnt
    if not found:
        raise ValueError(
            f"{rows.name}: nothing would be learnt of any row, with max_length={max_length} and loss_on={loss_on!r}."
        )
    if not any(special.intersection(example.labels) for example in found):
        notes.append("No token that ends a turn or a text is learnt: the model may not learn to stop.")
    return Examples(rows.kind, tuple(found), cut, left_out, tuple(notes))


def _ends(length: int, most: int) -> list[int]:
    """Divide a text of so many tokens: the ends of its parts. None is a single token, of which nothing is learnt."""
    ends = [*range(most, length, most), length]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1:
        ends[-2] -= 1
    return ends


Encoder = Callable[[Row], tuple[list[int], list[int]]]


def _encoder(rows: Rows, tokenizer: PreTrainedTokenizerBase, loss_on: str) -> tuple[Encoder, list[str]]:
    """Choose how rows are encoded, and say what the tokenizer lacks."""
    if rows.rows[0].messages:
        chats = _ChatEncoder.of(tokenizer, rows, loss_on)
        return chats, chats.notes
    notes = []
    if tokenizer.eos_token_id is None:
        notes.append("The tokenizer has no token that ends a sequence: none is put behind the rows.")

    def encode(row: Row) -> tuple[list[int], list[int]]:
        ids = _plain_ids(tokenizer, row.prompt + row.text)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        before = _common(_plain_ids(tokenizer, row.prompt), ids) if loss_on == "completion" else 0
        return ids, [IGNORED] * before + ids[before:]

    return encode, notes


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def _common(first: list[int], second: list[int]) -> int:
    """Count the tokens that two sequences begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((number for number, (one, other) in pairs if one != other), min(len(first), len(second)))


@dataclass(frozen=True)
class _ChatEncoder:
    """Encodes rows of messages.

    Attributes:
        tokenizer: a tokenizer with a chat template.
        loss_on: `"assistant"`, `"completion"` or `"all"`.
        template: a template with markers, instead of the tokenizer's own; `None` for that.
        marked: whether the template has markers.
        notes: what there is to say of the template.
    """

    tokenizer: PreTrainedTokenizerBase
    loss_on: str
    template: str | None
    marked: bool
    notes: list[str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, rows: Rows, loss_on: str) -> "_ChatEncoder":
        if not tokenizer.chat_template:
            raise ValueError(
                f"{rows.name} holds messages, and the tokenizer has no chat template: name a tokenizer that has one "
                "(tokenizer), or give rows of prompt and completion, or of text."
            )
        if loss_on != "assistant":
            return cls(tokenizer, loss_on, None, False, [])
        if _MARKER.search(tokenizer.get_chat_template()):
            return cls(tokenizer, loss_on, None, True, [])
        from trl import get_training_chat_template

        try:
            return cls(tokenizer, loss_on, get_training_chat_template(tokenizer), True, [])
        except (ValueError, TemplateError):  # none that TRL knows
            note = (
                "The chat template does not mark the assistant's tokens: they are those that its messages add to the "
                "messages before them."
            )
            return cls(tokenizer, loss_on, None, False, [note])

    def __call__(self, row: Row) -> tuple[list[int], list[int]]:
        messages = list(row.messages)
        if self.marked:
            encoded = self._tokens(row, messages, return_assistant_tokens_mask=True)
            ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
            if not any(mask):
                raise ValueError(f"{row.where}: the chat template marks no token as the assistant's.")
            return ids, [token if own else IGNORED for token, own in zip(ids, mask, strict=True)]
        ids = list(self._tokens(row, messages)["input_ids"])
        if self.loss_on == "all":
            return ids, list(ids)
        labels = [IGNORED] * len(ids)
        spans = [(row.learnt, len(messages))] if self.loss_on == "completion" else [
            (number, number + 1) for number, message in enumerate(messages) if message["role"] == "assistant"
        ]  # fmt: skip
        for first, last in spans:
            start, end = self._span(row, ids, first, last)
            labels[start:end] = ids[start:end]
        return ids, labels

    def _span(self, row: Row, ids: list[int], first: int, last: int) -> tuple[int, int]:
        """Find the tokens of some messages, up to the token that ends a turn."""
        messages = list(row.messages)
        if not first:
            raise ValueError(
                f"{row.where}: it begins with the assistant, and the chat template does not mark its tokens. Put a "
                "message before it, or set loss_on='all'."
            )
        before = list(self._tokens(row, messages[:first], add_generation_prompt=True)["input_ids"])
        after = list(self._tokens(row, messages[:last])["input_ids"])
        if ids[: len(before)] != before or ids[: len(after)] != after or len(after) <= len(before):
            raise ValueError(
                f"{row.where}: the chat template does not mark the assistant's tokens, and writes message {last} "
                "otherwise when messages follow it, so that they cannot be told. Set loss_on='all'."
            )
        return len(before), self._end_of_turn(after, len(before))

    def _end_of_turn(self, ids: list[int], start: int) -> int:
        """Leave out white space behind the token that ends a turn: the model does not write it."""
        end = len(ids)
        while end > start and self.tokenizer.decode([ids[end - 1]]).isspace():
            end -= 1
        return end if end > start and ids[end - 1] in self.tokenizer.all_special_ids else len(ids)

    def _tokens(self, row: Row, messages: list[dict[str, Any]], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=row.tools,
                chat_template=self.template,
                tokenize=True,
                return_dict=True,
                **options,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"{row.where}: the chat template refuses it: {error}") from error


__all__ = ["IGNORED", "Example", "Examples", "choose_loss", "encode_rows"]
