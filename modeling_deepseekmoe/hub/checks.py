# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Check a folder before it is published: it loads, its names and shapes are right, every value is finite."""

from collections.abc import Callable

import torch
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import logging

from modeling_deepseekmoe.conversion import VerificationError, verify
from modeling_deepseekmoe.conversion.adapters import files as adapter_files
from modeling_deepseekmoe.conversion.checkpoint import listed
from modeling_deepseekmoe.conversion.writing import say_nothing

from ..esft.files import read_esft
from ..support.models import model_class_named
from .candidate import Candidate, PreflightError, auto_class_of, parse_object


def check_candidate(candidate: Candidate, progress: Callable[[int], None] = say_nothing) -> tuple[str, ...]:
    """Read everything that would go up, and check it: it loads, its names and shapes are right, every value is finite.

    Args:
        candidate: from [`find_candidate`].
        progress: receives numbers of bytes of weights that were read.

    Returns:
        What was found in order, a line each.

    Raises:
        PreflightError: if something is not in order.
        ValueError: if a file cannot be read.
    """
    checks = []
    if candidate.kind == "model":
        try:
            report = verify(candidate.folder, progress=progress)
        except VerificationError as error:
            raise PreflightError(str(error)) from error
        checks += [str(report).splitlines()[0], *(f"note: {note}" for note in report.notes)]
        checks += [*_load_small_files(candidate), _load_model(candidate)]
    elif candidate.kind == "adapter":
        adapter = adapter_files.read_adapter(candidate.folder)
        factors = {f"lora_A of {name}": update.factor_a for name, update in adapter.updates.items()}
        factors |= {f"lora_B of {name}": update.factor_b for name, update in adapter.updates.items()}
        checks.append(_check_finite({**factors, **adapter.replacements}, "tensors of the adapter"))
        checks += _load_small_files(candidate)
    else:
        checks.append(_check_finite(read_esft(candidate.folder), "trained tensors"))
    return tuple(checks)


def _check_finite(tensors: dict[str, torch.Tensor], what: str) -> str:
    odd = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if odd:
        raise PreflightError(f"{listed(odd)}: values that are not finite.")
    return f"{len(tensors):,} {what}: names, shapes and values are in order"


def _load_model(candidate: Candidate) -> str:
    """Load the model as a user would, onto the meta device: no tensor stays in memory."""
    raw = candidate.raw
    if raw.get("quantization_config"):
        return "note: loading was not tried, because the weights are quantised; names, shapes and values are in order"
    _, name = auto_class_of(raw)
    model_class = model_class_named(name)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        _, info = model_class.from_pretrained(candidate.folder, device_map="meta", output_loading_info=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    problems = {kind: listed(sorted(map(str, keys))) for kind, keys in info.items() if keys}
    if problems:
        raise PreflightError("; ".join(f"loading found {kind}: {keys}" for kind, keys in problems.items()) + ".")
    return f"loads as {name}"


def _load_small_files(candidate: Candidate) -> list[str]:
    """Load tokenizer and generation config, if there are any. Return what was found, a line each."""
    checks = []
    if "generation_config.json" in candidate.files:
        try:
            GenerationConfig.from_pretrained(candidate.folder).validate(strict=True)
        except (ValueError, OSError, TypeError, AttributeError) as error:
            raise PreflightError(f"generation_config.json is not allowed: {error}") from error
        checks.append("generation config: in order")
    if not candidate.files.keys() & {"tokenizer_config.json", "tokenizer.json", "tokenizer.model"}:
        return [*checks, "note: there is no tokenizer"] if candidate.kind == "model" else checks
    settings = candidate.files.get("tokenizer_config.json")
    if settings is not None and "auto_map" in parse_object(settings):
        return [*checks, "note: the tokenizer has code of its own, which was not run"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(candidate.folder)
    except Exception as error:  # that is what the tokenizers library raises
        raise PreflightError(f"The tokenizer cannot be loaded: {error}") from error
    size = candidate.raw.get("vocab_size")
    if candidate.kind == "model" and isinstance(size, int) and len(tokenizer) > size:
        raise PreflightError(f"The tokenizer has {len(tokenizer):,} tokens, and the model vocab_size={size:,}.")
    return [*checks, f"tokenizer: {len(tokenizer):,} tokens"]


__all__ = ["check_candidate"]
