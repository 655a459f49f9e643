# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Count what a model costs (parameters, FLOPs, cache, memory) on the meta device, without reading a weight."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from modeling_deepseekmoe.configuration import read_preset
from modeling_deepseekmoe.configuration_deepseekmoe import DeepseekMoeConfig
from modeling_deepseekmoe.conversion.matrix_formats import bytes_a_weight
from modeling_deepseekmoe.conversion.tensor_table import entries

from .cache_sizes import UnknownCacheError, kv_cache_elements_per_token
from .counted_model import CountedModel, UnknownExpertsError
from .meta_models import config_named, is_preset, number_in

Figure = TypeVar("Figure")
PAPER_SEQUENCE_LENGTH = 4096
BYTES_PER_ELEMENT = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8_e4m3 (128 x 128 blocks)": 1 + 4 / 128**2}
_FOUR_BITS = ("nf4", "mxfp4")
_ADAMW_BYTES = 16  # bf16 weight and gradient (2 + 2), float32 master weight and two AdamW moments (4 + 4 + 4)


@dataclass(frozen=True)
class ModelReport:
    """The figures of `deepseekmoe inspect`. Parameters are counts. Memory is in bytes and leaves activations out.

    A figure that cannot be told is `None`.

    Attributes:
        name: preset or folder.
        model_type: dialect, or the model type of another family.
        total_parameters: all parameters, with the balancing biases, without multi-token prediction. Tied ones count
            once.
        activated_parameters: all but the routed experts that a token does not choose. Where gates also choose among
            experts that do nothing, it is the most that a token uses.
        embedding_parameters: embeddings of tokens (and of layers and positions, where a family has them) and, if it is
            not tied, the output head.
        mtp_parameters: in layers of multi-token prediction, which are beside all other figures; 0 for another family.
            They share the embedding and the head with the model.
        tower_parameters: those of images, of sounds, and of what joins them to the language model.
        routed_parameters, shared_parameters: in routed and in shared experts.
        ffn_multiple: the activated experts, measured in standard FFNs of 8 * hidden_size**2 parameters. The paper's
            FLOPs count them so. Of a dense model it is the FFN.
        forward_flops_per_token: 2 * activated parameters without embeddings of which rows are read, and towers.
        training_flops_4k: forward and backward of one sequence of 4096 tokens, by the paper's formula.
        kv_cache_elements_per_token: elements that the cache keeps of one token, in all layers. Those with a sliding
            window count as long as it is not full.
        kv_cache_bytes_per_token: the same in bfloat16.
        load_bytes: memory of the weights by dtype. Formats of four bits are those of routed experts alone; the rest is
            in bfloat16 then.
        lora_rank, lora_parameters: LoRA of that rank on all linear layers but the gate, and on every expert.
        lora_bytes: bfloat16 base plus the adapter's AdamW training state.
        full_bytes: full fine-tuning with AdamW in mixed precision, 16 bytes a parameter.
        unknown: for the figures that are `None`, why.
    """

    name: str
    model_type: str
    total_parameters: int
    activated_parameters: int | None
    embedding_parameters: int
    mtp_parameters: int
    tower_parameters: int
    routed_parameters: int | None
    shared_parameters: int | None
    ffn_multiple: float | None
    forward_flops_per_token: int | None
    training_flops_4k: float | None
    kv_cache_elements_per_token: int | None
    kv_cache_bytes_per_token: int | None
    load_bytes: dict[str, int]
    lora_rank: int
    lora_parameters: int | None
    lora_bytes: int | None
    full_bytes: int
    unknown: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain numbers and strings."""
        return asdict(self)

    def to_text(self) -> str:
        """Return the figures as an aligned table."""
        total = self.total_parameters
        rows = [
            ("model type", self.model_type),
            ("parameters, total", f"{total:,} ({total / 1e9:.2f} B)"),
            ("parameters, activated", self._text("activated_parameters", lambda n: f"{n:,} ({n / 1e9:.3f} B)")),
            ("  in embeddings", f"{self.embedding_parameters:,}"),
        ]
        if self.mtp_parameters:
            rows.append(("  with multi-token prediction", f"{total + self.mtp_parameters:,} (mtp=True)"))
        if self.tower_parameters:
            rows.append(("  beside the language model", f"{self.tower_parameters:,}"))
        rows += [
            ("routed experts", self._text("routed_parameters", lambda n: f"{n:,} ({n / total:.1%} of all)")),
            ("shared experts", self._text("shared_parameters", lambda n: f"{n:,} ({n / total:.1%} of all)")),
            (
                "forward FLOPs per token",
                self._text("forward_flops_per_token", lambda n: f"{n / 1e9:.2f} G (2 x activated, no attention)"),
            ),
            (
                "training FLOPs per 4K tokens",
                self._text(
                    "training_flops_4k",
                    lambda n: f"{n / 1e12:.1f} T (paper's formula, experts = {self.ffn_multiple:g} FFNs)",
                ),
            ),
            (
                "KV cache per token",
                self._text("kv_cache_elements_per_token", lambda n: f"{n:,} elements, {2 * n:,} bytes in bfloat16"),
            ),
        ]
        rows += [(f"weights in {dtype}", gigabytes(size)) for dtype, size in self.load_bytes.items()]
        rows += [
            (
                f"LoRA fine-tuning, rank {self.lora_rank}",
                self._text(
                    "lora_bytes",
                    lambda n: f"{gigabytes(n)} without activations ({self.lora_parameters:,} trained)",
                ),
            ),
            ("full fine-tuning, AdamW", f"{gigabytes(self.full_bytes)} without activations"),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join([self.name, "-" * len(self.name), *(f"{label:<{width}}  {value}" for label, value in rows)])

    def _text(self, figure: str, show: Callable[[Any], str]) -> str:
        value = getattr(self, figure)
        return f"not known ({self.unknown[figure]})" if value is None else show(value)


def gigabytes(size: float) -> str:
    """Format bytes as GB of 10**9."""
    return f"{size / 1e9:,.2f} GB"


def inspect_model(name_or_folder: str | Path, lora_rank: int = 16) -> ModelReport:
    """Count the parameters and costs of a preset or a checkpoint folder. No weight is read, and no code of the folder.

    Args:
        name_or_folder: a preset's name, or a folder with the `config.json` of a language model, of any family that
            transformers has classes for.
        lora_rank: rank of the LoRA that the memory figure assumes.

    Raises:
        ValueError: if the name is neither, if the config is not allowed, if transformers has no classes for it or they
            have an encoder and a decoder, or if the rank is below 1.
    """
    if lora_rank < 1:
        raise ValueError(f"lora_rank={lora_rank} is not allowed: it must be at least 1.")
    multiple = read_preset(str(name_or_folder)).ffn_multiple if is_preset(name_or_folder) else None
    return report_on(config_named(name_or_folder), str(name_or_folder), ffn_multiple=multiple, lora_rank=lora_rank)


def report_on(
    config: PreTrainedConfig, name: str, ffn_multiple: float | None = None, lora_rank: int = 16
) -> ModelReport:
    """Compute the figures of a config. `ffn_multiple` replaces the value that follows from the model's widths.

    Raises:
        ValueError: if no language model of one sequence can be built of it.
    """
    counted = CountedModel.of(config)
    figures = _Figures()
    total, cache = (
        counted.total,
        figures.of(("kv_cache_elements_per_token",), lambda: kv_cache_elements_per_token(counted)),
    )
    activated = figures.of(("activated_parameters", "forward_flops_per_token"), lambda: counted.activated)
    lora = figures.of(("lora_parameters", "lora_bytes"), lambda: counted.lora_parameters(lora_rank))
    multiple = figures.of(("ffn_multiple", "training_flops_4k"), lambda: ffn_multiple or _ffn_multiple(counted))
    sizes = figures.of(("training_flops_4k",), lambda: _sizes_of_formula(counted))
    routed = figures.of(("routed_parameters",), lambda: _count(counted.routed))
    shared = figures.of(("shared_parameters",), lambda: _count(counted.shared))
    read = _count(counted.tables) - (counted.embedding.numel() if counted.has_tied_head else 0)
    return ModelReport(
        name=name,
        model_type=config.model_type,
        total_parameters=total,
        activated_parameters=activated,
        embedding_parameters=_count(counted.tables | counted.head),
        mtp_parameters=_mtp_parameters(config),
        tower_parameters=_count(counted.of_towers),
        routed_parameters=routed,
        shared_parameters=shared,
        ffn_multiple=multiple,
        forward_flops_per_token=activated and 2 * (activated - read - _count(counted.of_towers)),
        training_flops_4k=training_flops(*sizes, multiple, PAPER_SEQUENCE_LENGTH) if sizes and multiple else None,
        kv_cache_elements_per_token=cache,
        kv_cache_bytes_per_token=None if cache is None else 2 * cache,
        load_bytes=_load_bytes(total, routed or 0),
        lora_rank=lora_rank,
        lora_parameters=lora,
        lora_bytes=None if lora is None else round(total * BYTES_PER_ELEMENT["bfloat16"]) + _ADAMW_BYTES * lora,
        full_bytes=_ADAMW_BYTES * total,
        unknown=figures.unknown,
    )


def _mtp_parameters(config: PreTrainedConfig) -> int:
    """Count the parameters of the multi-token-prediction layers that a config of this family promises."""
    if not isinstance(config, DeepseekMoeConfig) or not config.allows_mtp:
        return 0
    return sum(
        math.prod(entry.shape)
        for entry in entries(config).values()
        if entry.mtp_layer is not None and not entry.optional
    )


def _load_bytes(total: int, routed: int) -> dict[str, int]:
    found = {dtype: round(total * size) for dtype, size in BYTES_PER_ELEMENT.items()}
    if routed:
        rest = (total - routed) * BYTES_PER_ELEMENT["bfloat16"]
        for kind in _FOUR_BITS:
            found[f"{kind} (routed experts; the rest in bfloat16)"] = round(routed * bytes_a_weight(kind) + rest)
    return found


def training_flops(layers: int, hidden: int, vocabulary: int, ffn_multiple: float, tokens: int) -> float:
    """Compute the FLOPs of forward and backward over one sequence of `tokens`, by the formula of arXiv 2401.06066.

    T (24 n d^2 + 48 a n d^2 + 12 n d T + 6 V d) is the count behind the paper's tables. Every layer counts as a MoE
    layer with plain attention, and the gate is ignored.
    """
    per_token = 24 * layers * hidden**2 + 48 * ffn_multiple * layers * hidden**2
    per_token += 12 * layers * hidden * tokens + 6 * vocabulary * hidden
    return tokens * per_token


class _UnknownFigureError(ValueError):
    """A figure does not follow from a config."""


@dataclass
class _Figures:
    """Computes figures, and keeps why some cannot be told."""

    unknown: dict[str, str] = field(default_factory=dict)

    def of(self, names: tuple[str, ...], compute: Callable[[], Figure]) -> Figure | None:
        """Return what is computed; `None` if it cannot be told, which is noted for these figures."""
        try:
            return compute()
        except (UnknownExpertsError, UnknownCacheError, _UnknownFigureError) as error:
            self.unknown |= dict.fromkeys(names, str(error).rstrip("."))
            return None


def _ffn_multiple(counted: CountedModel) -> float:
    hidden, parameters = number_in(counted.text_config, "hidden_size"), counted.ffn_parameters()
    if parameters is None or not hidden:
        raise _UnknownFigureError("its layers have no FFN each, or none that is found by its name")
    return parameters / (8 * hidden**2)


def _sizes_of_formula(counted: CountedModel) -> tuple[int, int, int]:
    config, built = counted.text_config, len(counted.decoder_layers or ())
    layers, hidden, vocabulary = (
        number_in(config, name) for name in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    if not layers or not hidden or not vocabulary:
        raise _UnknownFigureError("its config lacks num_hidden_layers, hidden_size or vocab_size")
    if layers != built:
        raise _UnknownFigureError(f"its config has num_hidden_layers={layers}, and the model {built} decoder layers")
    return layers, hidden, vocabulary


def _count(parameters: dict[str, Any]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


__all__ = ["ModelReport", "inspect_model", "report_on", "training_flops"]
