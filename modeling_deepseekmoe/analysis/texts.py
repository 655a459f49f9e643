# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Read texts from files and datasets, by domain or not, and make batches of tokens from them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

_ROWS = (".jsonl", ".json", ".csv", ".parquet")  # files that hold rows
# A dataset may have no end, and a column with more values is none of domains.
MOST_ROWS, MOST_DOMAINS = 100_000, 64


def read_texts(
    data: str, *, split: str = "train", column: str = "text", subset: str | None = None, max_characters: int = 2**24
) -> Iterator[str]:
    """Yield the texts of a file or a dataset.

    Args:
        data: a file of plain text; a `.jsonl` file of rows; a `.json`, `.csv` or `.parquet` file; or the folder or hub
            id of a dataset. The `datasets` library reads all but the first two.
        split, subset: split of a dataset, and its configuration if it has several.
        column: field of the rows that holds the text.
        max_characters: the most characters that are read of a plain text.

    Raises:
        ValueError: if the file is no text, or has no such column, split or subset.
        OSError: if there is no such file or dataset.
        ImportError: if `datasets` is needed and missing.
    """
    path = Path(data)
    if path.is_file() and path.suffix not in _ROWS:
        _refuse_unused(path, split, subset)
        if column != "text":
            raise ValueError(f"column={column!r} is not allowed for {data}: a plain text has no columns.")
        try:
            with path.open(encoding="utf-8-sig") as file:
                yield file.read(max_characters)
        except UnicodeDecodeError as error:
            raise ValueError(f"{data} is not allowed as data: it is no text in UTF-8.") from error
    else:
        for where, row in read_rows(data, split=split, subset=subset):
            yield _text_of(row, column, where)


def read_rows(data: str, *, split: str = "train", subset: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file or a dataset, each with its place, for messages: the file and the line or the row.

    Args:
        data: a `.jsonl`, `.json`, `.csv` or `.parquet` file, or the folder or hub id of a dataset. The `datasets`
            library reads all but the first. Empty lines are skipped.
        split, subset: split of a dataset, and its configuration if it has several.

    Raises:
        ValueError: if a line is no JSON, the file no text, or has no such split or subset.
        OSError: if there is no such file or dataset.
        ImportError: if `datasets` is needed and missing.
    """
    path = Path(data)
    _refuse_unused(path, split, subset)
    if path.suffix in (".txt", *_ROWS) and not path.is_file():
        raise FileNotFoundError(f"{data} is no file, and a name that ends in {path.suffix} is no dataset's.")
    if path.suffix == ".jsonl":
        try:
            with path.open(encoding="utf-8-sig") as file:
                yield from _rows_of_lines(file, data)
        except UnicodeDecodeError as error:
            raise ValueError(f"{data} is not allowed as data: it is no text in UTF-8.") from error
    else:
        for number, row in enumerate(_load_dataset(path, data, split, subset), start=1):
            yield f"{data}, row {number}", row


def _refuse_unused(path: Path, split: str, subset: str | None) -> None:
    """Refuse what would be ignored: a file has neither splits nor subsets."""
    for name, value, default in (("split", split, "train"), ("subset", subset, None)):
        if value != default and path.is_file():
            raise ValueError(
                f"{name}={value!r} is not allowed for {path}: it belongs to a dataset, and this is a file."
            )


def _rows_of_lines(lines: Iterable[str], name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number} is no JSON: {error}.") from error
        yield f"{name}, line {number}", row


def _text_of(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        names = ", ".join(map(repr, row)) if isinstance(row, dict) else "no columns at all"
        raise ValueError(f"column={column!r} is not allowed: {where} holds no text under that name, but {names}.")
    return row[column]


def _load_dataset(path: Path, data: str, split: str, subset: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"Reading {data} needs the datasets library: pip install datasets") from error
    if path.is_file():
        builder = path.suffix.removeprefix(".")
        return datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True)
    return datasets.load_dataset(data, subset, split=split, streaming=True)


def read_domains(
    data: str,
    domains: str,
    *,
    split: str = "train",
    column: str = "text",
    subset: str | None = None,
    max_characters: int = 2**24,
) -> dict[str, list[str]]:
    """Read the texts of a file of rows or a dataset by domain. At most 100,000 rows are read.

    Args:
        data, split, column, subset: as for [`read_texts`], but no plain text.
        domains: field of the rows that names the domain of the text: a string or a whole number.
        max_characters: the most characters that are kept of a domain.

    Raises:
        ValueError: if the file holds no rows, if a row has no such columns, or if there are more than 64 domains.
        OSError: if there is no such file or dataset.
        ImportError: if `datasets` is needed and missing.
    """
    path = Path(data)
    if path.is_file() and path.suffix not in _ROWS:
        raise ValueError(f"domains={domains!r} is not allowed: {data} holds no rows, and so no columns.")
    found: dict[str, list[str]] = {}
    characters: dict[str, int] = {}
    for number, (where, row) in enumerate(read_rows(data, split=split, subset=subset)):
        if number == MOST_ROWS:
            logger.warning(f"{data}: only the first {MOST_ROWS:,} rows are read, and the domains in them.")
            break
        text = _text_of(row, column, where)
        if domains not in row:
            raise ValueError(
                f"domains={domains!r} is not allowed: {where} has no such field, but {', '.join(map(repr, row))}."
            )
        domain = row[domains]
        if isinstance(domain, bool | float) or not isinstance(domain, str | int):
            raise ValueError(
                f"domains={domains!r} is not allowed: {where} has {domain!r} there, and it must be a string or a "
                "whole number."
            )
        own = found.setdefault(str(domain), [])
        if len(found) > MOST_DOMAINS:
            raise ValueError(
                f"domains={domains!r} is not allowed: the first {number + 1} rows have more than {MOST_DOMAINS} "
                "values there."
            )
        if characters.get(str(domain), 0) < max_characters:
            own.append(text)
            characters[str(domain)] = characters.get(str(domain), 0) + len(text)
    return found


def domain_batches(
    texts: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    block_size: int,
    batch_size: int,
) -> tuple[dict[str, list[torch.Tensor]], list[str]]:
    """Cut the texts of every domain into blocks of tokens of one size.

    Args:
        texts: the texts of every domain.
        tokenizer, block_size, batch_size: as for [`token_batches`].
        max_tokens: tokens of all domains together. Each has the same share, or fewer if it has no more.

    Returns:
        For every domain its batches, and the domains that are left out, with the reason: two blocks are needed.

    Raises:
        ValueError: if a size is too small, or if no domain is left.
    """
    if not texts:
        raise ValueError("The data holds no rows: at least one text is needed.")
    share = max_tokens // len(texts)
    if share < 2 * block_size:
        raise ValueError(
            f"max_tokens={max_tokens} is not allowed: {len(texts)} domains with two blocks of block_size={block_size} "
            f"tokens each need at least {2 * len(texts) * block_size}."
        )
    found, left_out = {}, []
    for name, own in texts.items():
        try:
            rows = token_batches(iter(own), tokenizer, max_tokens=share, block_size=block_size, batch_size=1)
        except ValueError as error:
            left_out.append(f"{name}: {error}")
            continue
        if len(rows) < 2 or rows[0].shape[1] < block_size:
            left_out.append(f"{name}: it holds fewer than two blocks of {block_size} tokens.")
        else:
            found[name] = list(torch.cat(rows).split(batch_size))
    if not found:
        raise ValueError(f"No domain has two blocks of block_size={block_size} tokens. {' '.join(left_out)}")
    if left_out:  # the others share its tokens
        rest = {name: texts[name] for name in found}
        found, _ = domain_batches(rest, tokenizer, max_tokens=max_tokens, block_size=block_size, batch_size=batch_size)
    return found, left_out


def check_vocabulary(config: PreTrainedConfig, batches: Iterable[torch.Tensor]) -> None:
    """Raise ValueError if a token is none of the model's: the tokenizer is another model's then."""
    ends = [int(end) for batch in batches for end in batch.aminmax()]
    if odd := [token for token in (max(ends), min(ends)) if not 0 <= token < config.vocab_size]:
        raise ValueError(
            f"The tokenizer gives token {odd[0]}, and the model has vocab_size={config.vocab_size}: it is another "
            "model's tokenizer."
        )


def token_batches(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, block_size: int, batch_size: int
) -> list[torch.Tensor]:
    """Cut texts into blocks of tokens, without padding.

    Args:
        texts: the texts. Reading stops when there are enough tokens.
        tokenizer: the model's tokenizer. If it has an end-of-sequence token, this is put between the texts.
        max_tokens, block_size, batch_size: tokens in all, tokens in a block, and blocks in a batch.

    Returns:
        `torch.LongTensor`s (B, S), all of one shape. Tokens at the end that fill no batch are left out. A short text
        is one batch.

    Raises:
        ValueError: if a size is too small, or if the texts hold fewer than two tokens.
    """
    for name, value, least in (
        ("max_tokens", max_tokens, 2),
        ("block_size", block_size, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} is not allowed: it must be at least {least}.")
    ids: list[int] = []
    for text in texts:
        # A token has far fewer characters than this: what is longer would only be thrown away.
        own = tokenizer(text[: 64 * max_tokens], add_special_tokens=False, verbose=False)["input_ids"]
        if own:
            ids += own if tokenizer.eos_token_id is None else [*own, tokenizer.eos_token_id]
        if len(ids) >= max_tokens:
            break
    ids = ids[:max_tokens]
    if len(ids) < 2:
        raise ValueError(f"The data holds {len(ids)} tokens: at least two are needed.")
    block_size = min(block_size, len(ids))
    batch_size = min(batch_size, len(ids) // block_size)
    batches = len(ids) // (block_size * batch_size)
    return list(torch.tensor(ids[: batches * batch_size * block_size]).view(batches, batch_size, block_size))


__all__ = ["check_vocabulary", "domain_batches", "read_domains", "read_rows", "read_texts", "token_batches"]
