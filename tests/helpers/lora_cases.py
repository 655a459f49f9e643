"""Models with LoRA on their experts, made by PEFT and by this package."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import MLA, TINY, V3_LIKE
from peft import LoraConfig, PeftModel, get_peft_model
from tolerances import assert_same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_deepseekmoe import (
    DeepseekMoeConfig,
    DeepseekMoeForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    expert_lora_config,
    optimize_expert_lora,
)
from modeling_deepseekmoe.lora.layer import DirectLora

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))


V3 = {**TINY, **V3_LIKE, "q_lora_rank": None, "first_k_dense_replace": 1}


def native_v3() -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(DeepseekV3Config(**V3, head_dim=4))


def native_v2() -> nn.Module:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    sizes = {**TINY, **MLA, "q_lora_rank": None, "first_k_dense_replace": 1, "head_dim": 4}
    return DeepseekV2ForCausalLM(DeepseekV2Config(**sizes, topk_method="greedy"))


def qwen3() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY, num_experts=8, head_dim=8))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=8))


MODELS = {
    "deepseekmoe": lambda: DeepseekMoeForCausalLM(DeepseekMoeConfig(**TINY)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**V3)),
    "transformers' DeepSeek-V2": native_v2,
    "transformers' DeepSeek-V3": native_v3,
    "transformers' Qwen3-MoE": qwen3,
    "transformers' Mixtral": mixtral,
}


def make(name: str = "deepseekmoe") -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def plain(model: nn.Module, parameters: list[str] | None = None, **kwargs: object) -> PeftModel:
    """An adapter of plain PEFT with random factors, also where PEFT would begin with zeros."""
    torch.manual_seed(2)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": [], "init_lora_weights": False, **kwargs}
    config = LoraConfig(target_parameters=parameters or STACKS, task_type="CAUSAL_LM", **fields)
    return get_peft_model(copy.deepcopy(model), config)


def direct(model: nn.Module, **kwargs: object) -> PeftModel:
    torch.manual_seed(2)
    fields = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **kwargs}
    return get_peft_model(copy.deepcopy(model), expert_lora_config(model, **fields))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS, **kwargs: object) -> torch.Tensor:
    return model(ids, **kwargs).logits


def direct_layers(model: nn.Module) -> list[DirectLora]:
    return [module for module in model.modules() if isinstance(module, DirectLora)]


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.elements = max(self.elements, tensor.numel())
        return result


def several(tmp_path: Path) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """Adapters of other ranks, projections and experts in one model, and the logits of each alone."""
    model = make()
    adapted = optimize_expert_lora(direct(model))
    fields = {"init_lora_weights": False}
    adapted.add_adapter("down", expert_lora_config(model, r=2, projections=("down",), use_rslora=True, **fields))
    adapted.add_adapter("gate_up", LoraConfig(r=3, target_modules=[], target_parameters=STACKS[:1], **fields))
    adapted.add_adapter("chosen", expert_lora_config(model, r=5, experts={2: [1, 4]}, lora_dropout=0.2, **fields))
    adapted.eval()
    outputs = {}
    for name in ("default", "down", "gate_up", "chosen"):
        adapted.set_adapter(name)
        outputs[name] = logits(adapted)
        adapted.save_pretrained(tmp_path, selected_adapters=[name])
        folder = tmp_path if name == "default" else tmp_path / name
        assert_same(outputs[name], logits(PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()), name)
    with adapted.disable_adapter():
        outputs["__base__"] = logits(adapted)
    assert torch.equal(outputs["__base__"], logits(model))
    return adapted, outputs
