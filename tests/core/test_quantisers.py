"""Quantisers that leave the routed experts as they are: it is said, with the sizes."""

from collections.abc import Callable

import pytest
import torch
from conftest import Golden
from peft import prepare_model_for_kbit_training
from transformers import QuantoConfig

from modeling_deepseekmoe.moe import tell_unquantised_experts

IDS = torch.arange(3, 12)[None]


def test_experts_that_a_quantiser_leaves_out(golden: Golden, warnings_of_package: list[str]) -> None:
    model = golden.model(quantization_config=QuantoConfig(weights="int8"), dtype=torch.bfloat16)
    assert type(model.model.layers[1].self_attn.o_proj).__name__ == "QLinear"
    blocks = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    left = sum(stack.nbytes for experts in blocks for stack in experts.parameters())
    sizes = f"{left / 1e6:,.2f} of the {model.get_memory_footprint() / 1e6:,.2f} MB"
    (said,) = (text for text in warnings_of_package if "NOT quantised" in text)
    assert sizes in said and "experts in torch.bfloat16" in said


def test_nothing_is_said_without_one(golden: Golden, warnings_of_package: list[str]) -> None:
    golden.model(dtype=torch.bfloat16)
    assert not any("quantised" in text for text in warnings_of_package)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_that_become_float32(tiny_model: Callable, warnings_of_package: list[str], dtype: torch.dtype) -> None:
    """PEFT's preparation widens what is not quantised, which doubles the experts."""
    model = tiny_model().to(dtype)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    model.is_loaded_in_4bit = True
    tell_unquantised_experts(model)
    model.train()(IDS, labels=IDS)
    assert not any("float32 now" in text for text in warnings_of_package)
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False).train()
    for _ in range(2):
        model(IDS, labels=IDS)
    said = [text for text in warnings_of_package if "float32 now" in text]
    assert len(said) == (dtype == torch.bfloat16)
    assert all("loaded in torch.bfloat16" in text and "enable_input_require_grads()" in text for text in said)
