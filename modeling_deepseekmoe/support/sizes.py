# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Reads sizes that users give: bytes, or a text with a unit."""

import re

_SIZE = re.compile(r"^\s*(\d{1,18}(?:\.\d+)?)\s*(?:([KMGT])?(i)?B)?\s*$", re.IGNORECASE)


def bytes_of(field: str, size: str | int, *, least: int = 1, example: str = "'500MB'") -> int:
    """Read a size: bytes, or a text such as `"5GB"` or `"24GiB"`.

    Args:
        field: name of the field, for the error.
        size: the size.
        least: the smallest size that is allowed.
        example: an allowed size, for the error.

    Raises:
        ValueError: for a text that is no size, or one below `least`.
    """
    match = _SIZE.match(str(size))
    unit = "" if match is None else (match[2] or "").upper()
    number = 0 if match is None else int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(unit or " "))
    if number < least:
        raise ValueError(f"{field}={size!r} is not allowed: it must be bytes, or a text as {example}.")
    return number


__all__ = ["bytes_of"]
