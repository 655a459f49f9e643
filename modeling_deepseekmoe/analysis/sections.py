# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""A measure of a model, with what a reader needs to understand it."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Section:
    """One measure.

    Attributes:
        key: its name in JSON.
        heading: its name on the page.
        definition: what was measured, and how.
        source: the paper that it comes from, or "".
        reading: a sentence on how to read it.
        figures: plain numbers, strings, lists and dicts.
        summary: the main figures in a sentence; "" if there are none.
        empty: why there are no figures; "" if there are.
        notes: what the figures leave out.
    """

    key: str
    heading: str
    definition: str
    source: str
    reading: str
    figures: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    empty: str = ""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


__all__ = ["Section"]
