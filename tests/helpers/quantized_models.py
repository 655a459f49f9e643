"""Models with quantised experts, and the same models with what these decode to."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from family_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM, StackedExpertsConfig
from modeling_deepseekmoe.experts_quantized import FORMATS

# Environments with older libraries go without bitsandbytes, whose import takes as long as all others.
KINDS = FORMATS if find_spec("bitsandbytes") else FORMATS[1:]
FOUR_BITS = KINDS[0] if KINDS == FORMATS else "mxfp4"
# Widths that have more than one block, and a last one of fp8 that is smaller; several groups of nested scales.
WIDE = {"hidden_size": 192, "moe_intermediate_size": 128, "intermediate_size": 64}
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
OWN = {
    **WIDE, "vocab_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "max_position_embeddings": 128,
    "first_k_dense_replace": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip


def base(name: str = "deepseekmoe", **fields: Any) -> nn.Module:
    """A model of this family, or of another one, in float32."""
    torch.manual_seed(0)
    if name == "deepseekmoe":
        return DeepseekMoeForCausalLM(DeepseekMoeConfig(**{**OWN, **fields})).eval()
    return tiny_model(name, **{**WIDE, **fields}).eval()


def write(folder: Path, name: str = "deepseekmoe", **fields: Any) -> Path:
    """Save a model, and return the folder."""
    base(name, **fields).save_pretrained(folder)
    return folder


def load(folder: Path, kind: str | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """Load a model quantised, or as its files say."""
    more = {} if kind is None else {"quantization_config": StackedExpertsConfig(kind, **options)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more).eval()


def decoded(folder: Path, kind: str, **options: Any) -> nn.Module:
    """The same model, whose experts are what the quantised ones decode to, in float32."""
    return load(folder, kind, **options).dequantize(torch.float32)


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "storage_format")}
