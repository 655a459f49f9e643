# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Generation that drafts with multi-token prediction: greedy the same tokens, sampling the same distribution.

The decoding loop is handed to transformers' `generate` as its `custom_generate`, which prepares inputs, caches,
processors and stopping criteria.
"""

import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    StaticCache,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkLogitsProcessor,
)
from transformers.utils import logging

from .mtp_decoding import DecodingLoop, Drafting
from .transformers_support import (
    CACHE_NAMES,
    GenerateDecoderOnlyOutput,
    cache_name,
    is_deepspeed_zero3_enabled,
    is_fsdp_managed_module,
)
from .untested_versions import learns_prompts

logger = logging.get_logger(__name__)

# Options of transformers for drafts that another model or the prompt makes.
_OF_OTHER_DRAFTS = (
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "max_matching_ngram_size",
    "speculation_type",
)


@dataclass
class MtpGenerateOutput(GenerateDecoderOnlyOutput):
    """Output of `generate(use_mtp=True, return_dict_in_generate=True)`.

    Attributes:
        mtp_acceptance (`list[float]`): share of the steps in which draft k was accepted, and all before it. A step
            makes one token more than it accepts drafts.
        mtp_steps (`int`): number of forward passes of the whole model behind the prompt, summed over unfinished rows.
        cache: the model's cache, or `None` if rows have accepted different numbers of drafts, which leaves holes.
    """

    mtp_acceptance: list[float] | None = None
    mtp_steps: int | None = None


@dataclass
class MtpAssistant(Drafting):
    """Generates with drafts of multi-token prediction; [`mtp_assistant`] makes it."""

    def __call__(
        self,
        model: Any,
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
        _check(generation_config, cache, input_ids, logits_processor, model_kwargs)
        self.begin()
        loop = DecodingLoop(self, model, logits_processor, stopping_criteria, generation_config, cache, model_kwargs)
        rows = loop.run(input_ids)
        if self.streamer is not None:
            self.streamer.end()
        sequences = rows.ids[:, : max(rows.lengths)]
        number = sequences.shape[1] - rows.prompt_length
        share = ", ".join(f"{one:.3f}" for one in self.acceptance)
        logger.info(
            f"Multi-token prediction: {self.steps} steps, share of draft 1, 2, ... that was accepted: {share}."
        )
        if not generation_config.return_dict_in_generate:
            return sequences
        return MtpGenerateOutput(
            sequences=sequences,
            scores=None if rows.scores is None else tuple(rows.scores[:number]),
            logits=None if rows.logits is None else tuple(rows.logits[:number]),
            mtp_acceptance=self.acceptance,
            mtp_steps=self.steps,
            **{cache_name(): cache if rows.are_even else None},
        )


def mtp_assistant(model: Any, num_drafts: int | None = None) -> MtpAssistant:
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


def generation_arguments(model: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Turn the arguments of `generate` into those of transformers' own, where `use_mtp` is set.

    Args:
        model: the model.
        args, kwargs: the arguments of `generate`.

    Returns:
        All arguments by name, with [`MtpAssistant`] as `custom_generate` if `use_mtp` is set.

    Raises:
        ValueError: for another way of drafting beside it.
    """
    names = [*inspect.signature(GenerationMixin.generate).parameters][1:]
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    given = kwargs.get("generation_config")

    def option(name: str, *others: Any) -> Any:
        found = [kwargs.get(name), *(getattr(config, name, None) for config in (given, *others))]
        return next((value for value in found if value is not None), None)

    use_mtp, assistant = option("use_mtp", model.generation_config), kwargs.get("custom_generate")
    known = hasattr(GenerationConfig(), "use_mtp")  # since 5.24
    if not known:
        kwargs.pop("use_mtp", None)
    if not isinstance(assistant, MtpAssistant):
        if not use_mtp:
            return kwargs
        assistant = mtp_assistant(model, option("num_assistant_tokens"))
    else:
        mtp_assistant(model, assistant.num_drafts)  # perhaps it was made for another model
    _refuse_other_drafts(lambda name: option(name, model.generation_config), assistant)
    _check_model(model, kwargs.get("synced_gpus"))
    kwargs["custom_generate"] = assistant
    # What transformers does not hand to a `custom_generate`.
    assistant.streamer = kwargs.pop("streamer", None)
    # A cache that somebody else goes on with must have no holes.
    assistant.together = any(kwargs.get(name) is not None for name in CACHE_NAMES)
    if kwargs.get("prefix_allowed_tokens_fn") is not None:
        kwargs["prefix_allowed_tokens_fn"] = assistant.asked_alone(
            kwargs["prefix_allowed_tokens_fn"], model.config.vocab_size
        )
    stop_strings = option("stop_strings")
    if stop_strings is not None and kwargs.get("tokenizer") is not None:
        criterion = StopStringCriteria(tokenizer=kwargs["tokenizer"], stop_strings=stop_strings)
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), criterion])
    settings: dict[str, Any] = {"use_mtp": False} if known else {}
    settings |= {"stop_strings": None} if stop_strings is not None and kwargs.get("tokenizer") is not None else {}
    if given is None:
        return kwargs | settings
    kwargs["generation_config"] = deepcopy(given)
    for name, value in settings.items():
        setattr(kwargs["generation_config"], name, value)
    return {name: value for name, value in kwargs.items() if name not in settings}


def _refuse_other_drafts(option: Callable[[str], Any], assistant: MtpAssistant) -> None:
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate"):
        if option(name) not in (None, assistant):
            raise ValueError(f"{name} is not allowed with use_mtp: both make drafts.")
    for name in _OF_OTHER_DRAFTS:
        value = option(name)
        if value is not None and (name, value) != ("num_assistant_tokens_schedule", "constant"):
            raise ValueError(
                f"{name}={value!r} is not allowed with use_mtp, where num_assistant_tokens drafts are made."
            )


def _check_model(model: Any, synced_gpus: bool | None) -> None:
    if learns_prompts(model):
        raise ValueError("Prompt learning (PEFT) is not allowed with use_mtp, whose steps do not have the prompt.")
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if synced_gpus or (ranks > 1 and (is_fsdp_managed_module(model) or is_deepspeed_zero3_enabled())):
        raise ValueError(
            f"synced_gpus={synced_gpus!r} is not allowed with use_mtp: ranks that share the weights (FSDP, ZeRO-3) "
            "would wait for each other's steps, whose number differs."
        )


def _check(
    config: GenerationConfig, cache: Any, input_ids: torch.Tensor, processors: Any, model_kwargs: dict[str, Any]
) -> None:
    for name, allowed in (("num_beams", 1), ("prefill_chunk_size", None), ("guidance_scale", 1.0),
                          ("dola_layers", None), ("penalty_alpha", 0.0)):  # fmt: skip
        value = getattr(config, name, None)
        if value not in (allowed, None):
            raise ValueError(f"{name}={value!r} is not allowed with use_mtp: it must be {allowed!r}.")
    if any(isinstance(processor, SynthIDTextWatermarkLogitsProcessor) for processor in processors):
        raise ValueError("SynthID watermarks are not allowed with use_mtp: they keep a state from token to token.")
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


__all__ = ["MtpAssistant", "MtpGenerateOutput", "generation_arguments", "mtp_assistant"]
