# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Count what a model costs (parameters, FLOPs, cache, memory) on the meta device, without reading a weight."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from modeling_deepseekmoe.configuration import Preset, list_presets, load_config, read_preset

from ..configuration_deepseekmoe import DeepseekMoeConfig
from ..remote_code import auto_classes_of

PAPER_SEQUENCE_LENGTH = 4096
BYTES_PER_ELEMENT = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8_e4m3 (128 x 128 blocks)": 1 + 4 / 128**2}
_ADAMW_BYTES = 16  # bf16 weight and gradient (2 + 2), float32 master weight and two AdamW moments (4 + 4 + 4)


@dataclass(frozen=True)
class ModelReport:
    """The figures of `deepseekmoe inspect`. Parameters are counts. Memory is in bytes and leaves activations out.

    Attributes:
        name: preset or folder.
        model_type: dialect.
        total_parameters: all parameters, with the balancing biases, without multi-token prediction. Tied ones count
            once.
        activated_parameters: those that one token uses, embeddings included.
        embedding_parameters: token embedding and, if it is not tied, the output head.
        routed_parameters, shared_parameters: in routed and in shared experts.
        ffn_multiple: the activated experts, measured in standard FFNs of 8 * hidden_size**2 parameters. The paper's
            FLOPs count them so.
        forward_flops_per_token: 2 * activated parameters without the token embedding.
        training_flops_4k: forward and backward of one sequence of 4096 tokens, by the paper's formula.
        kv_cache_elements_per_token: elements that the cache keeps of one token, in all layers.
        kv_cache_bytes_per_token: the same in bfloat16.
        load_bytes: memory of the weights by dtype.
        lora_rank, lora_parameters: LoRA of that rank on all linear layers but the gate, and on every expert.
        lora_bytes: bfloat16 base plus the adapter's AdamW training state.
        full_bytes: full fine-tuning with AdamW in mixed precision, 16 bytes a parameter.
    """

    name: str
    model_type: str
    total_parameters: int
    activated_parameters: int
    embedding_parameters: int
    routed_parameters: int
    shared_parameters: int
    ffn_multiple: float
    forward_flops_per_token: int
    training_flops_4k: float
    kv_cache_elements_per_token: int
    kv_cache_bytes_per_token: int
    load_bytes: dict[str, int]
    lora_rank: int
    lora_parameters: int
    lora_bytes: int
    full_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain numbers and strings."""
        return asdict(self)

    def to_text(self) -> str:
        """Return the figures as an aligned table."""
        total = self.total_parameters
        rows = [
            ("model type", self.model_type),
            ("parameters, total", f"{total:,} ({total / 1e9:.2f} B)"),
            ("parameters, activated", f"{self.activated_parameters:,} ({self.activated_parameters / 1e9:.3f} B)"),
            ("  in embeddings", f"{self.embedding_parameters:,}"),
            ("routed experts", f"{self.routed_parameters:,} ({self.routed_parameters / total:.1%} of all)"),
            ("shared experts", f"{self.shared_parameters:,} ({self.shared_parameters / total:.1%} of all)"),
            ("forward FLOPs per token", f"{self.forward_flops_per_token / 1e9:.2f} G (2 x activated, no attention)"),
            (
                "training FLOPs per 4K tokens",
                f"{self.training_flops_4k / 1e12:.1f} T (paper's formula, experts = {self.ffn_multiple:g} FFNs)",
            ),
            (
                "KV cache per token",
                f"{self.kv_cache_elements_per_token:,} elements, {self.kv_cache_bytes_per_token:,} bytes in bfloat16",
            ),
        ]
        rows += [(f"weights in {dtype}", gigabytes(size)) for dtype, size in self.load_bytes.items()]
        rows += [
            (
                f"LoRA fine-tuning, rank {self.lora_rank}",
                f"{gigabytes(self.lora_bytes)} without activations ({self.lora_parameters:,} trained)",
            ),
            ("full fine-tuning, AdamW", f"{gigabytes(self.full_bytes)} without activations"),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join([self.name, "-" * len(self.name), *(f"{label:<{width}}  {value}" for label, value in rows)])


def gigabytes(size: float) -> str:
    """Format bytes as GB of 10**9."""
    return f"{size / 1e9:,.2f} GB"


def inspect_model(name_or_folder: str | Path, lora_rank: int = 16) -> ModelReport:
    """Count the parameters and costs of a preset or a checkpoint folder. No weight is read.

    Args:
        name_or_folder: a preset's name, or a folder with a `config.json` of the family.
        lora_rank: rank of the LoRA that the memory figure assumes.

    Raises:
        ValueError: if the name is neither, if the config is not allowed, or if the rank is below 1.
    """
    if lora_rank < 1:
        raise ValueError(f"lora_rank={lora_rank} is not allowed: it must be at least 1.")
    found = _named(name_or_folder)
    return report_on(found.config, found.name, ffn_multiple=found.ffn_multiple, lora_rank=lora_rank)


def config_named(name_or_folder: str | Path) -> DeepseekMoeConfig:
    """Return the config of a preset or of a folder. Raise ValueError if the name is neither."""
    return _named(name_or_folder).config


def _named(name_or_folder: str | Path) -> Preset:
    folder, is_preset = Path(name_or_folder), str(name_or_folder) in list_presets()
    if (folder / "config.json").is_file() or (folder.is_dir() and not is_preset):
        return Preset(str(folder), load_config(folder), "", None)
    if not is_preset:
        raise ValueError(
            f"{str(name_or_folder)!r} is not allowed: it must be a folder with a config.json, or one of the presets "
            f"{', '.join(list_presets())}."
        )
    return read_preset(str(name_or_folder))


def report_on(
    config: DeepseekMoeConfig, name: str, ffn_multiple: float | None = None, lora_rank: int = 16
) -> ModelReport:
    """Compute the figures of a config. `ffn_multiple` replaces the value that follows from the config's widths."""
    parameters = meta_parameters(config)
    biased = config.topk_method == "noaux_tc"
    biases = len(config.moe_layers) * config.n_routed_experts if biased and config.moe_layers else 0
    total = sum(parameter.numel() for parameter in parameters.values()) + biases
    routed = _count(parameters, ".mlp.experts.")
    embedding = _count(parameters, "embed_tokens", "lm_head")
    input_embedding = 0 if config.tie_word_embeddings else _count(parameters, "embed_tokens")
    inactive = routed * (1 - config.num_experts_per_tok / config.n_routed_experts) if routed else 0
    activated = total - round(inactive)
    lora = sum(lora_parameters(key, parameter, lora_rank) for key, parameter in parameters.items())
    multiple = ffn_multiple if ffn_multiple is not None else _ffn_multiple(config)
    cache = kv_cache_elements_per_token(config)
    return ModelReport(
        name=name,
        model_type=config.model_type,
        total_parameters=total,
        activated_parameters=activated,
        embedding_parameters=embedding,
        routed_parameters=routed,
        shared_parameters=_count(parameters, ".shared_experts."),
        ffn_multiple=multiple,
        forward_flops_per_token=2 * (activated - input_embedding),
        training_flops_4k=training_flops(
            config.num_hidden_layers, config.hidden_size, config.vocab_size, multiple, PAPER_SEQUENCE_LENGTH
        ),
        kv_cache_elements_per_token=cache,
        kv_cache_bytes_per_token=2 * cache,
        load_bytes={dtype: round(total * size) for dtype, size in BYTES_PER_ELEMENT.items()},
        lora_rank=lora_rank,
        lora_parameters=lora,
        lora_bytes=round(total * BYTES_PER_ELEMENT["bfloat16"]) + _ADAMW_BYTES * lora,
        full_bytes=_ADAMW_BYTES * total,
    )


def meta_parameters(config: DeepseekMoeConfig) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a model on the meta device. A tied one is there once.

    The class is the one that the config names, or else the language model.
    """
    import transformers

    named = next(iter(config.architectures or ()), "")
    auto_class = auto_classes_of(config.model_type).get(named, "AutoModelForCausalLM")
    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(config)
    model.tie_weights()
    return dict(model.named_parameters())


def training_flops(layers: int, hidden: int, vocabulary: int, ffn_multiple: float, tokens: int) -> float:
    """Compute the FLOPs of forward and backward over one sequence of `tokens`, by the formula of arXiv 2401.06066.

    T (24 n d^2 + 48 a n d^2 + 12 n d T + 6 V d) is the count behind the paper's tables. Every layer counts as a MoE
    layer with plain attention, and the gate is ignored.
    """
    per_token = 24 * layers * hidden**2 + 48 * ffn_multiple * layers * hidden**2
    per_token += 12 * layers * hidden * tokens + 6 * vocabulary * hidden
    return tokens * per_token


def kv_cache_elements_per_token(config: DeepseekMoeConfig) -> int:
    """Count the elements that the cache keeps of one token: keys and values, or MLA's latent and rotary key."""
    if config.attention_type == "mla":
        return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim


def _count(parameters: dict[str, torch.nn.Parameter], *parts: str) -> int:
    return sum(parameter.numel() for key, parameter in parameters.items() if any(part in key for part in parts))


def _ffn_multiple(config: DeepseekMoeConfig) -> float:
    if config.moe_layers:
        width = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_intermediate_size
    else:
        width = config.intermediate_size
    return 3 * width / (8 * config.hidden_size)


def lora_parameters(key: str, parameter: torch.nn.Parameter, rank: int) -> int:
    """Count the parameters of a LoRA on this parameter: 0 for embeddings, head, gate and vectors."""
    if parameter.ndim < 2 or key.endswith("mlp.gate.weight") or "embed_tokens" in key or "lm_head" in key:
        return 0
    stack = parameter.shape[0] if parameter.ndim == 3 else 1
    return stack * rank * (parameter.shape[-1] + parameter.shape[-2])


__all__ = [
    "ModelReport",
    "inspect_model",
    "kv_cache_elements_per_token",
    "report_on",
    "training_flops",
]
