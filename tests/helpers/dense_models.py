"""Tiny dense models to be upcycled, and damage to upcycled ones."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from modeling_deepseekmoe.conversion.streaming import Cast
from modeling_deepseekmoe.conversion.upcycling import upcycle as upcycling

COMMON = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
DENSE = {
    "llama": LlamaConfig(**COMMON),
    "llama-tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama-bias": LlamaConfig(**COMMON, attention_bias=True),
    "llama-linear-rope": LlamaConfig(
        **COMMON, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "mistral": MistralConfig(**COMMON, sliding_window=None),
    "qwen2": Qwen2Config(**COMMON),
}


def dense_model(name: str) -> PreTrainedModel:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(deepcopy(DENSE[name])).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def spoil_one_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the division wrong in one expert of one layer."""
    divide = upcycling.upcycled_tensors

    def spoiled(*args: object, **kwargs: object) -> dict:
        tensors, name = divide(*args, **kwargs), "model.layers.1.mlp.experts.3.down_proj.weight"
        (part,) = tensors[name][""].parts
        tensors[name] = {"": replace(tensors[name][""], parts=(Cast(part.matrix, torch.bfloat16, factor=1.5),))}
        return tensors

    monkeypatch.setattr(upcycling, "upcycled_tensors", spoiled)
