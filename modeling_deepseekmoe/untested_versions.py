# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The warning and the check for users whose transformers is newer than every version that the tests ran with.

A release of transformers once renamed an argument. Models that knew the old name alone generated wrong text without an
error. The next release cannot be tested before it is there, but it can be checked for that fault.
"""

import os
import re
from importlib.metadata import version
from typing import Any

import torch
import transformers
from transformers.utils import logging

from .transformers_support import cache_name

logger = logging.get_logger(__name__)

INSTALLED = transformers.__version__
OLDEST_TESTED, NEWEST_TESTED = (5, 17), (5, 24)
SWITCH = "DEEPSEEKMOE_CHECK_GENERATION"
# Differences of logits, in parts of the largest one. A cache that is not used makes them as large as the logits.
_TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-2}
_LOW_PRECISION = 0.25  # a token may be routed otherwise
_checked: list[str] = []


def newer_than_tested(installed: str) -> bool:
    """Tell whether a version of transformers is newer than those that the tests ran with. Patches do not count."""
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) > NEWEST_TESTED


def warn_of_untested_version() -> None:
    """Warn once if transformers is newer than the versions that the tests ran with."""
    if newer_than_tested(INSTALLED):
        newest = ".".join(map(str, NEWEST_TESTED))
        logger.warning_once(
            f"modeling-deepseekmoe was tested with transformers up to {newest}, and {INSTALLED} is "
            "installed. Look for a newer modeling-deepseekmoe, or install "
            f"'transformers<{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}'."
        )


def check_cached_generation(model: Any, *inputs: Any) -> None:
    """Check generation with a cache, and warn if it is wrong.

    The logits of the second step of a short `generate` are compared with those of a pass over the whole text. This
    happens once in a process, and only if transformers is newer than tested. The environment variable
    `DEEPSEEKMOE_CHECK_GENERATION=0` switches it off.

    Args:
        model: a language model. It generates two tokens and runs once more over ten, in evaluation mode and with
            transformers' default settings.
        inputs: what the user generates from. A tensor among it says on which device.
    """
    if _checked or not newer_than_tested(INSTALLED) or os.environ.get(SWITCH, "1") == "0":
        return
    _checked.append(INSTALLED)
    device = next((it.device for it in inputs if isinstance(it, torch.Tensor)), model.device)
    training, settings = model.training, model.generation_config
    try:
        model.eval()
        model.generation_config = transformers.GenerationConfig()
        difference = _difference_of_cached_logits(model, device)
    except Exception as error:  # the user's own call will show it, if it is of consequence
        logger.warning(
            f"How transformers {INSTALLED} uses caches could not be checked: {type(error).__name__}: {error}"
        )
        return
    finally:
        model.generation_config = settings
        model.train(training)
    if not difference <= _TOLERANCES.get(model.dtype, _LOW_PRECISION):
        logger.warning(
            f"GENERATION IS WRONG. With transformers {INSTALLED}, for which this model's code was not tested, logits "
            f"that are computed with a cache differ from those without one by {difference:.0%} of the largest. Do not "
            "use what it generates. Pass use_cache=False, which is slow, or install "
            f"'transformers<{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}' or a newer modeling-deepseekmoe."
        )


@torch.no_grad()
def _difference_of_cached_logits(model: Any, device: torch.device) -> float:
    """Compute the largest difference between logits with and without the cache, as a fraction of the largest logit."""
    prompt = torch.arange(1, 10, device=device)[None] % model.config.vocab_size
    settings = transformers.GenerationConfig(
        max_new_tokens=2, min_new_tokens=2, do_sample=False, use_cache=True, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    whole = model(generated.sequences[:, :-1], use_cache=False).logits[:, -1].float()
    return float((generated.logits[1].float() - whole).abs().max() / whole.abs().max())


def learns_prompts(model: Any) -> bool:
    """Tell whether PEFT puts prompts that it has learned in front of what a model generates from."""
    peft_model = getattr(model.prepare_inputs_for_generation, "__self__", model)
    return peft_model is not model and bool(
        getattr(getattr(peft_model, "active_peft_config", None), "is_prompt_learning", False)
    )


def refuse_prompt_learning(model: Any) -> None:
    """Raise a `ValueError` for prompt and prefix tuning, with transformers from 5.24 on and PEFT before 0.22.

    PEFT prepares the inputs of `generate` for prompts that it has learned, and there knows the cache under its first
    name alone.
    """
    if not learns_prompts(model) or cache_name() != "cache":
        return
    numbers = re.match(r"(\d+)\.(\d+)", version("peft"))
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 22):
        raise ValueError(
            f"generate is not allowed for prompt learning with transformers {INSTALLED} and peft {version('peft')}, "
            "which looks for the cache under another name and would generate wrong text: install 'transformers<5.24'."
        )


__all__ = [
    "INSTALLED",
    "NEWEST_TESTED",
    "OLDEST_TESTED",
    "SWITCH",
    "check_cached_generation",
    "learns_prompts",
    "newer_than_tested",
    "refuse_prompt_learning",
    "warn_of_untested_version",
]
