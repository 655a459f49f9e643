# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Divide sequences into those to train and those to evaluate on, and hand them to `datasets`."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .encoding import Example, Examples, choose_loss, encode_rows
from .options import FinetuneOptions
from .rows import Rows, load_rows

_STRETCH = 16  # micro-batches among which sequences are sorted by their length


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and evaluates on.

    Attributes:
        rows: all rows that were read, those to evaluate on last, if they are of a file of their own.
        loss_on: the tokens that are learnt.
        max_length: most tokens of a sequence.
        train, evaluation: the sequences.
        lines: what a user is told.
    """

    rows: tuple[Rows, ...]
    loss_on: str
    max_length: int
    train: tuple[Example, ...]
    evaluation: tuple[Example, ...]
    lines: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the rows, of all files."""
        return "-".join(rows.digest for rows in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(example.ids) for example in (*self.train, *self.evaluation))

    @property
    def measured(self) -> tuple[Example, ...]:
        """The sequences that perplexity and routing are measured on."""
        return self.evaluation or self.train


def load_data(options: FinetuneOptions) -> tuple[Rows, ...]:
    """Read the rows of a run, and check every one.

    Raises:
        ValueError, OSError, ImportError: those of [`load_rows`]; also a ValueError if the two files hold rows of
            different kinds.
    """
    where: dict[str, Any] = {"column": options.column, "split": options.split, "subset": options.subset}
    found = [load_rows(options.data, **where)]
    choose_loss(found[0].kind, options.loss_on)
    if options.eval_data is not None:
        found.append(load_rows(options.eval_data, **where))
        if found[1].kind != found[0].kind:
            raise ValueError(
                f"eval_data={options.eval_data!r} is not allowed: it holds rows of {found[1].kind}, and "
                f"{options.data} rows of {found[0].kind}."
            )
    return tuple(found)


def make_data(
    rows: Sequence[Rows], options: FinetuneOptions, tokenizer: PreTrainedTokenizerBase, context: int
) -> TrainingData:
    """Encode the rows of a run, and divide them.

    Args:
        rows: from [`load_data`].
        options: `loss_on` and `max_length` may be undecided.
        tokenizer: the model's tokenizer.
        context: tokens that the model allows.

    Raises:
        ValueError: those of [`encode_rows`]; also if `max_length` is more than the context, or there are too few rows.
    """
    if options.max_length is not None and options.max_length > context:
        raise ValueError(f"max_length={options.max_length} is not allowed: the model's context is {context} tokens.")
    max_length = options.max_length or min(1024, context)
    loss_on = choose_loss(rows[0].kind, options.loss_on)
    encoded = [encode_rows(one, tokenizer, loss_on=loss_on, max_length=max_length) for one in rows]
    if len(encoded) > 1:
        train, evaluation = encoded[0].examples, encoded[1].examples
    else:
        train, evaluation = split_examples(encoded[0].examples, options.eval_share, options.seed)
    lines = [line for one, own in zip(rows, encoded, strict=True) for line in _said(one, own, loss_on, max_length)]
    counted = [f"{len(part)} sequences, {sum(len(one.ids) for one in part):,} tokens, "
               f"{sum(one.learnt for one in part):,} of them learnt" for part in (train, evaluation)]  # fmt: skip
    lines.append(f"to train on: {counted[0]}")
    lines.append(f"to evaluate on: {counted[1]}" if evaluation else "nothing to evaluate on: eval_share is 0")
    return TrainingData(tuple(rows), loss_on, max_length, train, evaluation, tuple(dict.fromkeys(lines)))


def _said(rows: Rows, encoded: Examples, loss_on: str, max_length: int) -> list[str]:
    """Say what the rows are, and what of them is not used."""
    lines = [f"{rows.name}: {rows.described}; loss on {'all tokens' if loss_on == 'all' else f'the {loss_on}'}"]
    if rows.unused:
        lines.append(f"not used: {', '.join(rows.unused)}")
    if encoded.cut:
        what = "is continued in a further sequence" if rows.kind == "text" else "is cut off"
        lines.append(f"{encoded.cut} rows are longer than max_length={max_length}: what lies behind {what}")
    if encoded.left_out:
        lines.append(f"{encoded.left_out} rows are left out: within max_length={max_length} there is nothing to learn")
    return [*lines, *encoded.notes]


def split_examples(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Draw the rows to evaluate on, the same ones every time. If there is one row, its sequences are divided.

    Args:
        examples: all sequences.
        share: share of the rows to evaluate on; at least one, unless it is 0.
        seed: another seed gives other rows.

    Returns:
        The sequences to train on, and those to evaluate on, in their order.

    Raises:
        ValueError: if nothing would be left.
    """
    if not share:
        return tuple(examples), ()
    units = [example.row for example in examples]
    if len(set(units)) == 1:
        units = list(range(len(examples)))
    names = sorted(set(units))
    number = max(1, round(share * len(names)))
    if number >= len(names):
        raise ValueError(
            f"eval_share={share} is not allowed for {len(names)} row{'s' * (len(names) > 1)}: nothing would be left "
            "to train on. Set it to 0, or give more rows."
        )
    drawn = set(random.Random(seed).sample(names, number))
    parts = tuple(
        tuple(example for unit, example in zip(units, examples, strict=True) if (unit in drawn) == wanted)
        for wanted in (False, True)
    )
    return parts[0], parts[1]


def order_examples(examples: Sequence[Example], *, number: int, batch_size: int, seed: int) -> list[Example]:
    """Put sequences in the order in which they are trained, as often as they are needed.

    Every pass is shuffled. Then, among those of some batches, sequences of similar length come together, so that
    batches are padded little, and the batches are shuffled. The order depends on nothing but the arguments: a run that
    is interrupted goes on with it, in any pass.

    Args:
        examples: the sequences of one pass.
        number: sequences in all.
        batch_size: sequences in a micro-batch.
        seed: another seed gives another order.
    """
    draw = random.Random(seed)
    stream: list[Example] = []
    while len(stream) < number:
        stream += draw.sample(examples, len(examples))
    ordered: list[Example] = []
    for start in range(0, number, _STRETCH * batch_size):
        stretch = stream[start : min(start + _STRETCH * batch_size, number)]
        stretch.sort(key=lambda example: len(example.ids), reverse=True)
        batches = [stretch[first : first + batch_size] for first in range(0, len(stretch), batch_size)]
        whole = [batch for batch in batches if len(batch) == batch_size]
        draw.shuffle(whole)
        ordered += [example for batch in [*whole, *batches[len(whole) :]] for example in batch]
    return ordered


def sequences_of(options: FinetuneOptions, train: Sequence[Example]) -> int:
    """Count the sequences that a run trains on, in all passes."""
    if options.max_steps is not None:
        return options.max_steps * options.batch_size * options.accumulation
    return math.ceil(options.epochs * len(train))


def as_dataset(examples: Iterable[Example]) -> Any:
    """Make a `datasets.Dataset` with the columns `input_ids` and `labels`, which TRL takes as it is."""
    from datasets import Dataset

    examples = list(examples)
    return Dataset.from_dict(
        {"input_ids": [example.ids for example in examples], "labels": [example.labels for example in examples]}
    )


__all__ = ["TrainingData", "as_dataset", "load_data", "make_data", "order_examples", "sequences_of", "split_examples"]
