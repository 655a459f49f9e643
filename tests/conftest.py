"""Fixtures: the golden checkpoints, tiny configs of every generation, and a registration that leaves no trace."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "0")

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import modeling_deepseekmoe
from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM

GOLDEN_ROOT = Path(__file__).parent / "data" / "golden"
GOLDEN_NAMES = sorted(path.name for path in GOLDEN_ROOT.iterdir())
TRAINABLE_NAMES = [name for name in GOLDEN_NAMES if not name.startswith("v3")]
EXPERTS_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@dataclass(frozen=True)
class Golden:
    """A tiny official checkpoint and what the official code computes on it."""

    name: str

    @property
    def folder(self) -> Path:
        return GOLDEN_ROOT / self.name

    @property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")

    @property
    def expected(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "expected.safetensors")

    def model(self, **kwargs: object) -> torch.nn.Module:
        """The checkpoint through AutoModel, in evaluation mode."""
        return AutoModelForCausalLM.from_pretrained(self.folder, **kwargs).eval()


@pytest.fixture(autouse=True)
def override_native(request: pytest.FixtureRequest) -> Iterator[None]:
    """AutoModel loads every generation with this package's classes, unless a test is marked otherwise."""
    modeling_deepseekmoe.register(override_native=True)
    yield
    modeling_deepseekmoe.register()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=GOLDEN_NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture
def v1() -> Golden:
    return Golden("v1-mha")


@pytest.fixture
def v3() -> Golden:
    return Golden("v3-noaux")


TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "aux_loss_alpha": 0.01,
}


@pytest.fixture
def tiny_config() -> Callable[..., DeepseekMoeConfig]:
    """Makes a small config; keyword arguments override its fields."""
    return lambda **kwargs: DeepseekMoeConfig(**{**TINY, **kwargs})


@pytest.fixture
def tiny_model(tiny_config: Callable[..., DeepseekMoeConfig]) -> Callable[..., DeepseekMoeForCausalLM]:
    """Makes a small random model in training mode, the same for the same arguments."""

    def make(**kwargs: object) -> DeepseekMoeForCausalLM:
        torch.manual_seed(0)
        return DeepseekMoeForCausalLM(tiny_config(**kwargs)).train()

    return make
