# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Read the rows of a file or a dataset, and check every one: chats, prompts with completions, or texts."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..analysis.texts import read_rows, read_texts

KINDS = ("chat", "completion", "text")
_DESCRIPTIONS = {"chat": "messages", "completion": "prompt and completion", "text": "text"}


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        where: its place, for messages: the file and the line.
        messages: of a chat, or of a prompt that consists of messages: all of them, with the completion's.
        learnt: of messages, the first one that belongs to the completion; 0 in a chat.
        prompt, text: of other rows: the prompt, which is empty for a text, and the completion or the text.
        tools: what the chat template is told of tools.
    """

    where: str
    messages: tuple[dict[str, Any], ...] = ()
    learnt: int = 0
    prompt: str = ""
    text: str = ""
    tools: Any = None

    @property
    def content(self) -> str:
        """Everything but the place, as one text."""
        return json.dumps([self.messages, self.learnt, self.prompt, self.text, self.tools], sort_keys=True)


@dataclass(frozen=True)
class Rows:
    """All rows of a file or a dataset.

    Attributes:
        name: the file without its path, or the dataset.
        kind: `"chat"`, `"completion"` or `"text"`.
        rows: the rows.
        unused: columns that are not used.
    """

    name: str
    kind: str
    rows: tuple[Row, ...]
    unused: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the content of all rows."""
        digest = hashlib.sha256(self.kind.encode())
        for row in self.rows:
            digest.update(row.content.encode())
        return digest.hexdigest()

    @property
    def described(self) -> str:
        """What the rows hold, in a few words."""
        return f"{len(self.rows)} rows of {_DESCRIPTIONS[self.kind]}"


def load_rows(data: str, *, column: str | None = None, split: str = "train", subset: str | None = None) -> Rows:
    """Read all rows and check each. The first one decides of which kind they are.

    Args:
        data: see [`read_rows`]; also a file of plain text, which is one row.
        column: field of the text; then the rows are texts, whatever else they hold.
        split, subset: split of a dataset, and its configuration if it has several.

    Raises:
        ValueError: if there is no row, or if one does not hold what it must. The message names its line.
        OSError: if there is no such file or dataset.
        ImportError: if the library `datasets` is needed and missing.
    """
    path = Path(data)
    name = path.name if path.exists() else data
    if path.is_file() and path.suffix not in (".jsonl", ".json", ".csv", ".parquet"):
        if column is not None:
            raise ValueError(f"column={column!r} is not allowed for {data}: a plain text has no columns.")
        texts = [text for text in read_texts(data, split=split, subset=subset) if text.strip()]
        if not texts:
            raise ValueError(f"{data} is empty: there is nothing to train on.")
        return Rows(name, "text", tuple(Row(name, text=text) for text in texts), ())
    rows: list[Row] = []
    unused: dict[str, None] = {}
    kind = ""
    for where, content in _read(data, split, subset):
        if not isinstance(content, dict):
            raise ValueError(f"{where} is not allowed: it must be a row with names and values.")
        kind = kind or _kind_of(content, column, where)
        row, used = _READERS[kind](content, column or "text", where)
        rows.append(row)
        if bool(row.messages) != bool(rows[0].messages):
            raise ValueError(f"{where} is not allowed: prompts are texts in all rows, or messages in all.")
        unused |= dict.fromkeys(key for key in content if key not in used)
    if not rows:
        raise ValueError(f"{data} is empty: there is nothing to train on.")
    return Rows(name, kind, tuple(rows), tuple(unused))


def _read(data: str, split: str, subset: str | None) -> Iterator[tuple[str, Any]]:
    """Read rows. What `datasets` says of a file that it cannot read becomes a ValueError."""
    if Path(data).suffix == ".jsonl":
        yield from read_rows(data, split=split, subset=subset)
        return
    rows = read_rows(data, split=split, subset=subset)
    number = 0
    while True:
        try:
            number += 1
            row = next(rows)
        except StopIteration:
            return
        except (OSError, ImportError):
            raise
        except Exception as error:  # of pyarrow, pandas or datasets, each with classes of its own
            reason = str(error.__cause__ or error).strip().splitlines()
            raise ValueError(
                f"{data}, row {number} cannot be read: {reason[0] if reason else type(error).__name__}"
            ) from error
        yield row


def _kind_of(content: dict[str, Any], column: str | None, where: str) -> str:
    if column is not None:
        return "text"
    if "messages" in content:
        return "chat"
    if "prompt" in content and "completion" in content:
        return "completion"
    if "text" in content:
        return "text"
    raise ValueError(
        f"{where} is not allowed: it holds neither messages, nor prompt and completion, nor text, but "
        f"{', '.join(map(repr, content)) or 'nothing'}. Name the column of a text with column."
    )


def _chat(content: dict[str, Any], column: str, where: str) -> tuple[Row, tuple[str, ...]]:
    messages = _messages(content.get("messages"), "messages", where)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where} is not allowed: none of its messages is the assistant's.")
    return Row(where, messages, tools=_tools(content, where)), ("messages", "tools")


def _completion(content: dict[str, Any], column: str, where: str) -> tuple[Row, tuple[str, ...]]:
    prompt, completion = content.get("prompt"), content.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        before, after = _messages(prompt, "prompt", where), _messages(completion, "completion", where)
        row = Row(where, before + after, len(before), tools=_tools(content, where))
        return row, ("prompt", "completion", "tools")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        name, value = ("completion", completion) if isinstance(prompt, str) else ("prompt", prompt)
        raise ValueError(f"{where} is not allowed: its {name} is {_said(value)}, and must be a text.")
    if not completion:
        raise ValueError(f"{where} is not allowed: its completion is empty.")
    return Row(where, prompt=prompt, text=completion), ("prompt", "completion")


def _text(content: dict[str, Any], column: str, where: str) -> tuple[Row, tuple[str, ...]]:
    if column not in content:
        names = ", ".join(map(repr, content)) or "nothing"
        raise ValueError(f"column={column!r} is not allowed: {where} holds {names}.")
    value = content[column]
    if not isinstance(value, str) or not value.strip():
        what = "is empty" if isinstance(value, str) else f"is {_said(value)}, and must be a text"
        raise ValueError(f"{where} is not allowed: its {column} {what}.")
    return Row(where, text=value), (column,)


_READERS = {"chat": _chat, "completion": _completion, "text": _text}


def _messages(value: Any, name: str, where: str) -> tuple[dict[str, Any], ...]:
    """Check messages, and return them without the empty fields that a table adds."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} is not allowed: its {name} is {_said(value)}, and must be a list of messages.")
    found = []
    for number, message in enumerate(value, start=1):
        place = f"{where} is not allowed: message {number} of its {name}"
        if not isinstance(message, dict):
            raise ValueError(f"{place} is {_said(message)}, and must have a role and a content.")
        own = {key: item for key, item in message.items() if item is not None}
        if not isinstance(own.get("role"), str) or not own["role"]:
            raise ValueError(f"{place} has no role.")
        if not isinstance(own.get("content"), str) and not (own.get("tool_calls") and "content" not in own):
            raise ValueError(f"{place} has {_said(message.get('content'))} as content, and must have a text.")
        if own["role"] == "assistant" and not own.get("content") and not own.get("tool_calls"):
            raise ValueError(f"{place} is the assistant's, and empty.")
        found.append(own)
    return tuple(found)


def _tools(content: dict[str, Any], where: str) -> Any:
    tools = content.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not allowed: its tools are no JSON: {error}.") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{where} is not allowed: its tools are {_said(tools)}, and must be a list.")
    return tools or None


def _said(value: Any) -> str:
    """Describe a value that is not allowed in a few words."""
    names = {type(None): "missing", str: "a text", dict: "an object", bool: "true or false"}
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return names.get(type(value), repr(value))


__all__ = ["KINDS", "Row", "Rows", "load_rows"]
