# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Compare a merged model with what was trained, an adapter over its base, on text.

An adapter that was trained over quantised experts makes up for their rounding. Merged into other weights, or quantised
again, it is beside another base. This says what that costs.
"""

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_deepseekmoe.configuration import read_config_file

from ..esft.files import WEIGHTS_NAME as ESFT_WEIGHTS_NAME
from ..experts_quantized import FORMATS
from ..lora.model import optimize_expert_lora
from ..quantization.config import StackedExpertsConfig
from ..quantization.correction import correction_format, load_correction
from ..support.folders import local_folder
from ..support.models import evaluating


@dataclass(frozen=True)
class MergeComparison:
    """How a merged model differs from the adapter over its base.

    Attributes:
        tokens: number of tokens that were predicted.
        base, merged: the formats of the experts in the two models.
        adapted_perplexity, merged_perplexity: of the adapter over its base, and of the merged model.
        agreement: the share of positions at which both have the same most probable token.
    """

    tokens: int
    base: str
    merged: str
    adapted_perplexity: float
    merged_perplexity: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"on {self.tokens:,} tokens: the adapter over experts in {self.base} has a perplexity of "
            f"{self.adapted_perplexity:.4f}, merged into {self.merged} {self.merged_perplexity:.4f}; their most "
            f"probable token is the same at {self.agreement:.2%} of the positions"
        )


def compare_merged(
    base: str | Path,
    adapter: str | Path,
    merged: str | Path,
    batches: Sequence[torch.Tensor],
    *,
    format: str | None = None,
    correction: str | Path | None = None,
    **loading: Any,
) -> MergeComparison:
    """Run an adapter over its base, and then the merged model, on the same tokens. One of them is loaded at a time.

    Args:
        base: folder or hub id of the base that the adapter was trained over.
        adapter: folder or hub id of the LoRA adapter, as PEFT loads it.
        merged: folder or hub id of the merged model.
        batches: `torch.LongTensor`s of token ids (B, S), S at least 2, without padding.
        format: how the base's experts are stored while the adapter is over them: `"nf4"`, `"fp8"` or `"mxfp4"`. By
            default as in its files.
        correction: file of `save_correction`, if the base's experts are corrected while the adapter is over them.
        loading: options of `from_pretrained` for both models; by default `dtype="auto"`.

    Raises:
        ValueError: if there is no batch, if the base is stored in another format already, or if the correction is not
            that of its experts.
        OSError: if a folder is missing.
    """
    if not batches:
        raise ValueError("batches is empty: at least one batch of tokens is needed.")
    own, settings = _storage(base, format)
    model: Any = AutoModelForCausalLM.from_pretrained(base, **{"dtype": "auto", **loading}, **settings)
    if correction is not None:
        load_correction(model, correction)
    adapted = optimize_expert_lora(PeftModel.from_pretrained(model, adapter))
    adapted_loss, chosen = _predictions(adapted, batches)
    del model, adapted
    gc.collect()
    kind, settings = _storage(merged, None)
    model = AutoModelForCausalLM.from_pretrained(merged, **{"dtype": "auto", **loading}, **settings)
    merged_loss, others = _predictions(model, batches)
    same = sum(int((one == other).sum()) for one, other in zip(chosen, others, strict=True))
    tokens = sum(one.numel() for one in chosen)
    return MergeComparison(tokens, own, kind, math.exp(adapted_loss), math.exp(merged_loss), same / tokens)


def check_comparable(
    base: str | Path, adapter: str | Path, format: str | None = None, correction: str | Path | None = None
) -> None:
    """Check what [`compare_merged`] is to compare, before anything is merged.

    Args:
        base, adapter, format, correction: as for it.

    Raises:
        ValueError: if the format is none or not that of the base's files, if the correction is of another one, or if
            the adapter is a folder of ESFT.
        OSError: if a folder or file is missing.
    """
    kind, _ = _storage(base, format)
    if correction is not None and (corrected := correction_format(correction)) != kind:
        raise ValueError(
            f"correction: {correction} corrects experts in {corrected!r}, and those of the base are in {kind!r}."
        )
    if (local_folder(adapter) / ESFT_WEIGHTS_NAME).is_file():
        raise ValueError(f"{adapter} is not allowed in a comparison on text: it holds experts, and no LoRA adapter.")


def _storage(folder: str | Path, wanted: str | None) -> tuple[str, dict[str, Any]]:
    """Return how the experts of a model are stored while it runs, and the options that load it so."""
    if wanted is not None and wanted not in FORMATS:
        raise ValueError(f"format={wanted!r} is not allowed: it must be one of {', '.join(FORMATS)}.")
    content = read_config_file(local_folder(folder, weights=False))
    stored = content.get("quantization_config")
    if stored is None:
        plain = str(content.get("dtype") or content.get("torch_dtype") or "float32")
        return (wanted, {"quantization_config": StackedExpertsConfig(wanted)}) if wanted else (plain, {})
    own = StackedExpertsConfig.of_file(stored)
    kind = own.format if own is not None else str(stored.get("quant_method"))
    if wanted not in (None, kind):
        raise ValueError(f"format={wanted!r} is not allowed: the experts of {folder} are stored in {kind!r}.")
    # transformers' own quantiser of FP8 does not take blocks that are cut off at an edge.
    return kind, {} if own is not None else {"quantization_config": StackedExpertsConfig(kind)}


def _predictions(model: PreTrainedModel, batches: Sequence[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    """Return the mean cross entropy over all next tokens, and the most probable ones (B, S - 1) of every batch."""
    loss, tokens, chosen = 0.0, 0, []
    with evaluating(model):
        for input_ids in batches:
            outputs = model(input_ids=input_ids.to(model.device), use_cache=False)
            logits, targets = outputs.logits[:, :-1].float(), input_ids[:, 1:].to(outputs.logits.device)
            loss += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            tokens += targets.numel()
            chosen.append(logits.argmax(-1).cpu())
    return loss / tokens, chosen


__all__ = ["MergeComparison", "check_comparable", "compare_merged"]
