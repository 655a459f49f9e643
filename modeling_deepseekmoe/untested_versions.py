# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What is said, and checked once, where transformers is newer than every version that the tests ran with.

A release of transformers once renamed an argument, and models that knew the old name alone generated wrong text
without an error. The next release cannot be tested before it is there, but it can be asked for that fault.
"""

import os
import re
from typing import Any

import torch
import transformers
from transformers.utils import logging

logger = logging.get_logger(__name__)

INSTALLED = transformers.__version__
OLDEST_TESTED, NEWEST_TESTED = (5, 17), (5, 24)
SWITCH = "DEEPSEEKMOE_CHECK_GENERATION"
# Differences of logits, in parts of the largest one. A cache that is not used makes them as large as the logits.
_TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-2}
_LOW_PRECISION = 0.25  # a token may be routed otherwise
_checked: list[str] = []


def newer_than_tested(version: str) -> bool:
    """Whether a version of transformers is newer than those that the tests ran with; patches do not count."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) > NEWEST_TESTED


def warn_of_untested_version() -> None:
    """Say once that transformers is newer than those that the tests ran with, where it is."""
    if newer_than_tested(INSTALLED):
        newest = ".".join(map(str, NEWEST_TESTED))
        logger.warning_once(
            f"modeling-deepseekmoe was tested with transformers up to {newest}, and {INSTALLED} is "
            "installed. Look for a newer modeling-deepseekmoe, or install "
            f"'transformers<{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}'."
        )


@torch.no_grad()
def check_cached_generation(model: Any) -> None:
    """Compare the second step of `generate`, with its cache, with a pass over the whole text, and warn if they differ:
    once in a process, and only where transformers is newer than tested.

    The environment variable `DEEPSEEKMOE_CHECK_GENERATION=0` switches it off.

    Args:
        model: a language model. It generates two tokens and runs once more over ten.
    """
    if _checked or not newer_than_tested(INSTALLED) or os.environ.get(SWITCH, "1") == "0":
        return
    _checked.append(INSTALLED)
    prompt = torch.arange(1, 10, device=model.device)[None] % model.config.vocab_size
    settings = transformers.GenerationConfig(
        max_new_tokens=2, min_new_tokens=2, num_beams=1, do_sample=False, use_cache=True,
        output_logits=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    whole = model(generated.sequences[:, :-1], use_cache=False).logits[:, -1].float()
    difference = (generated.logits[1].float() - whole).abs().max() / whole.abs().max()
    if not difference <= _TOLERANCES.get(model.dtype, _LOW_PRECISION):
        logger.warning(
            f"GENERATION IS WRONG. With transformers {INSTALLED}, for which this model's code was not "
            f"tested, logits that are computed with a cache differ from those without one by {difference:.0%} of the "
            "largest. Do not use what it generates. Pass use_cache=False, which is slow, or install "
            f"'transformers<{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}' or a newer modeling-deepseekmoe."
        )


__all__ = [
    "INSTALLED",
    "NEWEST_TESTED",
    "OLDEST_TESTED",
    "SWITCH",
    "check_cached_generation",
    "newer_than_tested",
    "warn_of_untested_version",
]
