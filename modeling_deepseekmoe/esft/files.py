# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Files of experts that ESFT has trained: they hold only what was trained, and the selection.

The experts have the official per-expert names.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from ..checkpoint_layout import BIAS_NAME, PROJECTIONS, STACKS
from ..experts_quantized import FORMAT_ATTRIBUTE
from ..families.moe_layers import find_experts
from ..support.folders import check_destination, read_tensors, unfinished_folder
from ..support.models import whole_tensor
from .layer import SelectedExperts, refuse_adapters
from .selection import ExpertSelection

WEIGHTS_NAME, SELECTION_NAME = "esft.safetensors", "esft.json"


def save_esft(model: nn.Module, folder: str | Path, is_main_process: bool = True) -> int:
    """Write what was trained, and the selection. Experts have the official per-expert names.

    Args:
        model: a model that [`prepare_esft`] has prepared. If FSDP2 has sharded it, all ranks must call this.
        folder: the folder to write. It must not exist, or must be empty.
        is_main_process: whether this process writes.

    Returns:
        The number of bytes of the weights.

    Raises:
        ValueError: if the model is not prepared, or if the folder is in use.
    """
    if is_main_process:
        check_destination(folder)
    blocks = {layer: block for layer, block in find_experts(model).items() if isinstance(block[1], SelectedExperts)}
    if not blocks:
        raise ValueError(f"{type(model).__name__} is not prepared for ESFT: call prepare_esft first.")
    refuse_adapters(model)
    others = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".selected_" not in name
    }
    selection = ExpertSelection(
        {layer: module.selected_ids.tolist() for layer, (_, module) in blocks.items()},
        shared_experts=any(".shared_expert" in name for name in others),
        non_expert_modules=any(".shared_expert" not in name for name in others),
    )
    if selection.non_expert_modules:  # with the gates their balancing bias has been trained
        others |= {name: buffer for name, buffer in model.named_buffers() if name.endswith(BIAS_NAME)}
    tensors = {name: _on_cpu(tensor) for name, tensor in others.items()}
    for name, module in blocks.values():
        gate_up_proj, down_proj = _on_cpu(module.selected_gate_up_proj), _on_cpu(module.selected_down_proj)
        for place, expert in enumerate(module.selected_ids.tolist()):
            gate, up = gate_up_proj[place].chunk(2)
            for projection, tensor in (("gate_proj", gate), ("up_proj", up), ("down_proj", down_proj[place])):
                tensors[f"{name}.{expert}.{projection}.weight"] = tensor.clone()
    if is_main_process:
        with unfinished_folder(folder) as unfinished:
            save_file(tensors, unfinished / WEIGHTS_NAME, metadata={"format": "pt"})
            selection.save(unfinished / SELECTION_NAME)
    return sum(tensor.nbytes for tensor in tensors.values())


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return whole_tensor(tensor).cpu().contiguous()


@torch.no_grad()
def load_esft(model: nn.Module, folder: str | Path) -> None:
    """Apply what [`save_esft`] wrote to a base model, in place; or to a prepared model, to continue its training.

    Raises:
        ValueError: for a tensor that the model does not have, or not in this shape. Nothing is changed then.
        OSError: if the folder does not hold the files.
    """
    targets: list[tuple[torch.Tensor, torch.Tensor]] = []
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if any(isinstance(tensor, DTensor) for tensor in own.values()):
        raise ValueError("load_esft is not allowed for a sharded model: apply it with `deepseekmoe merge` before.")
    experts = {name: module for name, module in find_experts(model).values()}
    for name, tensor in read_esft(folder).items():
        target = own.get(name)
        if target is None:
            target = _place_of_expert(name, experts)
        if target is None or target.shape != tensor.shape:
            found = "the model has no such tensor" if target is None else f"the model's is {tuple(target.shape)}"
            raise ValueError(f"{WEIGHTS_NAME}: {name} of shape {tuple(tensor.shape)} is not allowed: {found}.")
        targets.append((target, tensor))
    prepared = [m for m in experts.values() if isinstance(m, SelectedExperts) and not m.over_quantized]
    for module in prepared:
        module.write_back()
    for target, tensor in targets:
        target.copy_(tensor)
    for module in prepared:
        module.read_again()


def read_esft(folder: str | Path) -> dict[str, torch.Tensor]:
    """Read the tensors that [`save_esft`] wrote.

    Raises:
        ValueError: if a projection of a selected expert is missing.
        OSError: if a file is missing.
    """
    selection = ExpertSelection.of(Path(folder) / SELECTION_NAME)
    tensors = read_tensors(Path(folder) / WEIGHTS_NAME)
    # The block is called `mlp`, or otherwise in other families; it may be the decoder layer.
    pattern = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:\w+\.)?experts\.(\d+)\.(\w+)\.weight$")
    matches = (pattern.search(name) for name in tensors)
    there = {match.groups() for match in matches if match is not None}
    for layer, ids in selection.experts.items():
        for expert, part in ((expert, part) for expert in ids for part in PROJECTIONS):
            if (str(layer), str(expert), part) not in there:
                name = f"layers.{layer}.mlp.experts.{expert}.{part}.weight"
                raise ValueError(f"{WEIGHTS_NAME} is not allowed: {name} is missing, which {SELECTION_NAME} selects.")
    return tensors


def _place_of_expert(name: str, experts: Mapping[str, nn.Module]) -> torch.Tensor | None:
    """Find the part of a stack that an official per-expert name stands for."""
    prefix, _, rest = name.rpartition(".experts.")
    module, (expert, _, projection) = experts.get(f"{prefix}.experts"), rest.partition(".")
    if module is None or not expert.isdigit() or int(expert) >= module.gate_up_proj.shape[0]:
        return None
    matrices = [_matrix(module, stack, int(expert)) for stack in STACKS]
    if matrices[0] is None:
        raise ValueError(
            f"{name} is not allowed for a model with quantised experts on which it is not selected: call prepare_esft "
            "with the selection beside it first."
        )
    gate, up = matrices[0].chunk(2)
    places = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": matrices[1]}
    return places.get(projection)


def _matrix(module: nn.Module, stack: str, expert: int) -> torch.Tensor | None:
    """Return an expert's matrix where it is to be changed; `None` if it is quantised."""
    if not hasattr(module, FORMAT_ATTRIBUTE):
        return getattr(module, stack)[expert]
    return module.trained_part(stack, expert) if isinstance(module, SelectedExperts) else None


__all__ = ["load_esft", "read_esft", "save_esft"]
