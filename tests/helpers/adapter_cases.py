"""Adapters on disk, and what they add to their base."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from lora_cases import MODELS, direct
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

DEEPSEEK = [name for name in MODELS if "deepseek" in name.lower()]


def save_base(model: nn.Module, folder: Path, **kwargs: object) -> Path:
    model.save_pretrained(folder, **kwargs)
    return folder


def adapter(model: nn.Module, folder: Path, **kwargs: object) -> PeftModel:
    adapted = direct(model, **kwargs).eval()
    adapted.save_pretrained(folder)
    return adapted


@torch.no_grad()
def applied_by_loop(model: nn.Module, folder: Path) -> nn.Module:
    """The base with every pair of factors added to its own linear map, name by name."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    model = copy.deepcopy(model)
    for name, factor_a in tensors.items():
        if ".lora_A." not in name:
            continue
        factor_b = tensors[name.replace(".lora_A.", ".lora_B.")]
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha, rank = config["lora_alpha"], config["r"]
        for pattern, value in config["rank_pattern"].items():
            rank = value if re.fullmatch(rf"(.*\.)?({pattern})", module) else rank
        for pattern, value in config["alpha_pattern"].items():
            alpha = value if re.fullmatch(rf"(.*\.)?({pattern})", module) else alpha
        assert factor_a.shape[0] == rank
        delta = alpha / rank * factor_b @ factor_a
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj", module)
        if match is None:
            model.get_submodule(module).weight += delta
            continue
        experts = model.get_submodule(match[1])
        width = experts.down_proj.shape[-1]
        if match[3] == "down":
            experts.down_proj[int(match[2])] += delta
        else:
            experts.gate_up_proj[int(match[2])][slice(0, width) if match[3] == "gate" else slice(width, None)] += delta
    return model


def per_expert_adapter(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **fields: object) -> Path:
    """An adapter as other tools train it: every linear map has its own A."""
    torch.manual_seed(5)
    tensors = {}
    for layer in (1, 2):
        for expert in range(8):
            for projection, (rows, columns) in {"gate": (16, 32), "up": (16, 32), "down": (32, 16)}.items():
                name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"
                tensors[f"{name}.lora_A.weight"] = torch.randn(3, columns)
                tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(rows, 3)
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = ["gate_proj", "up_proj", "down_proj"]
    LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **fields).save_pretrained(folder)
    return folder


PREFIX = "base_model.model.model.layers.1.mlp.experts"
