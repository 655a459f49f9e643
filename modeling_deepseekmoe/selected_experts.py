# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Training the full weights of some experts only (ESFT, arXiv 2407.01906).

The weights of the selected experts become parameters of their own beside the frozen stack, so that neither gradients
nor optimizer states exist for the others. A state dict looks as if nothing had happened: checkpoints are complete and
have the usual names. [`save_esft`] writes only what was trained.

Shape letters: T tokens, E routed experts, K choices, N selected experts, I expert width, D hidden.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import logging

from .bias_update import BIAS_NAME
from .checkpoint_layout import PROJECTIONS, STACKS
from .esft import ExpertSelection
from .experts import find_experts, refuse_offloaded, run_experts, why_unsupported
from .folders import check_destination, read_tensors, unfinished_folder
from .library_support import has_adapters
from .official_names import read_official_names
from .parallel_adapters import LocalPart
from .sharded_files import whole_tensor

logger = logging.get_logger(__name__)

WEIGHTS_NAME, SELECTION_NAME = "esft.safetensors", "esft.json"


class SelectedExperts(nn.Module):
    """Mixed into the class of an experts module: the selected experts compute with parameters of their own."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the chosen experts' outputs, weighted; (T, D), (T, K) and (T, K) become (T, D)."""
        refuse_offloaded(self)
        if self.training and torch.is_grad_enabled() and not self.selected_down_proj.requires_grad:
            logger.warning_once(
                "Experts that prepare_esft selected are frozen: something after it, perhaps get_peft_model, switched "
                "off their gradients, and they are NOT trained."
            )
        # Two passes, in each of which the experts of the other one are elsewhere.
        place = self.place_of_expert[top_k_index]
        frozen_ids = top_k_index.masked_fill(place < len(self.selected_ids), self.gate_up_proj.shape[0])
        trained_stacks = (self.selected_gate_up_proj, self.selected_down_proj)
        frozen = run_experts(self, hidden_states, frozen_ids, top_k_weights)
        trained = run_experts(self, hidden_states, place, top_k_weights, stacks=trained_stacks)
        return frozen + trained

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state of the whole stack under its usual names."""
        self.write_back()
        state, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        for name in STACKS:
            del state[f"{prefix}selected_{name}"]
        return state

    @torch.no_grad()
    def read_again(self) -> None:
        """Take the weights from the stack: the other way round."""
        for name in STACKS:
            getattr(self, f"selected_{name}").copy_(whole_tensor(getattr(self, name))[self.selected_ids])

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the trained weights to their places in the stack, which does not compute with them. Where the stack is
        sharded, all ranks must call this.

        Raises:
            ValueError: where FSDP2 has sharded the trained weights too.
        """
        for name in STACKS:
            stack, trained = getattr(self, name), getattr(self, f"selected_{name}")
            if isinstance(trained, DTensor):
                raise ValueError("A state dict is not allowed while FSDP shards selected experts: call save_esft.")
            if isinstance(stack, DTensor):
                whole = whole_tensor(stack)
                whole[self.selected_ids] = trained.to(whole)
                stack.copy_(distribute_tensor(whole, stack.device_mesh, stack.placements, src_data_rank=None))
            else:
                stack.data[self.selected_ids] = trained.to(stack)


def prepare_esft(model: nn.Module, experts: str | Path | Mapping[int, Sequence[int]] | ExpertSelection) -> None:
    """Freeze a model but for the selected experts, in place; optimizers then get only what requires a gradient.

    Args:
        model: a model of this family, or any other of transformers with stacked experts.
        experts: an `esft.json`, `{layer: [ids]}` or an [`ExpertSelection`], which can name more than experts.

    Raises:
        ValueError: for a layer or an expert that the model does not have, a model that is prepared already, or one
            with adapters.
    """
    selection = ExpertSelection.of(experts).checked(model)
    _refuse_adapters(model)
    if any(isinstance(module, SelectedExperts) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is prepared already, which is not allowed: call merge_esft first.")
    selection.check_others(model)
    blocks = {layer: block for layer, block in find_experts(model).items() if selection.experts.get(layer)}
    for name, module in blocks.values():
        reason = why_unsupported(module)
        if LocalPart.of(module) is not None:
            reason = "it is spread by expert or by tensor; FSDP is the sharding that ESFT takes"
        if reason is not None:
            raise ValueError(f"{name} ({type(module).__name__}) is not allowed for full-weight ESFT: {reason}.")
    read_official_names(model)
    for name, parameter in model.named_parameters():
        shared, routed = ".shared_expert" in name, ".experts." in name
        trained = selection.shared_experts if shared else selection.non_expert_modules and not routed
        parameter.requires_grad_(trained)
    for layer, (_, module) in blocks.items():
        _install(module, sorted(selection.experts[layer]))


def _refuse_adapters(model: nn.Module) -> None:
    if has_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has adapters of PEFT, which is not allowed for full-weight ESFT: one would "
            "freeze the other. Merge or unload them first, or use LoRA, expert_lora_config(model, experts=...)."
        )


def _install(experts: nn.Module, ids: list[int]) -> None:
    device = experts.gate_up_proj.device
    selected = torch.tensor(ids, device=device)
    places = torch.full((experts.gate_up_proj.shape[0],), len(ids), device=device)
    places[selected] = torch.arange(len(ids), device=device)
    experts.register_buffer("selected_ids", selected, persistent=False)
    experts.register_buffer("place_of_expert", places, persistent=False)  # N for those that are not selected
    for name in STACKS:
        experts.register_parameter(f"selected_{name}", nn.Parameter(whole_tensor(getattr(experts, name))[selected]))
    # After the hook that stacks the official per-expert tensors, which is there from the beginning.
    experts.esft_hook = experts.register_load_state_dict_pre_hook(_select_from_state)
    plain = type(experts)
    experts.__class__ = type(f"Selected{plain.__name__}", (SelectedExperts, plain), {"plain_class": plain})


def _select_from_state(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """Let `load_state_dict` fill the parameters of the selected experts from those of the whole stack."""
    for name in STACKS:
        if f"{prefix}{name}" in state_dict:
            stack = state_dict[f"{prefix}{name}"]
            state_dict[f"{prefix}selected_{name}"] = stack[module.selected_ids.to(stack.device)]


def merge_esft(model: nn.Module) -> None:
    """Put the trained experts back into their stacks, in place: the model has its ordinary modules and parameters
    again, frozen as they are.

    Raises:
        ValueError: if nothing is prepared.
    """
    prepared = [module for module in model.modules() if isinstance(module, SelectedExperts)]
    if not prepared:
        raise ValueError(f"{type(model).__name__} is not prepared for ESFT: there is nothing to merge.")
    for module in prepared:
        module.write_back()
        module.esft_hook.remove()
        for name in ("esft_hook", "selected_ids", "place_of_expert", *(f"selected_{key}" for key in STACKS)):
            delattr(module, name)
        module.__class__ = module.plain_class


def save_esft(model: nn.Module, folder: str | Path, is_main_process: bool = True) -> int:
    """Write what was trained, the experts under the official per-expert names, and the selection.

    Args:
        model: one that [`prepare_esft`] has prepared. Where FSDP2 has sharded it, all ranks must call this.
        folder: to write; must not exist or be empty.
        is_main_process: whether this process writes.

    Returns:
        The number of bytes of the weights.

    Raises:
        ValueError: if the model is not prepared, or for a folder in use.
    """
    if is_main_process:
        check_destination(folder)
    blocks = {layer: block for layer, block in find_experts(model).items() if isinstance(block[1], SelectedExperts)}
    if not blocks:
        raise ValueError(f"{type(model).__name__} is not prepared for ESFT: call prepare_esft first.")
    _refuse_adapters(model)
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
    """Apply what [`save_esft`] wrote to a base model, in place; to a prepared one too, to continue its training.

    Raises:
        ValueError: for a tensor that the model does not have, or not in this shape; nothing is changed then.
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
    prepared = [module for module in experts.values() if isinstance(module, SelectedExperts)]
    for module in prepared:
        module.write_back()
    for target, tensor in targets:
        target.copy_(tensor)
    for module in prepared:
        module.read_again()


def read_esft(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors that [`save_esft`] wrote.

    Raises:
        ValueError: if they do not hold all projections of every selected expert.
        OSError: if a file is missing.
    """
    selection = ExpertSelection.of(Path(folder) / SELECTION_NAME)
    tensors = read_tensors(Path(folder) / WEIGHTS_NAME)
    for layer, ids in selection.experts.items():
        for name in (f"layers.{layer}.mlp.experts.{expert}.{part}.weight" for expert in ids for part in PROJECTIONS):
            if not any(f".{found}".endswith(f".{name}") for found in tensors):
                raise ValueError(f"{WEIGHTS_NAME} is not allowed: {name} is missing, which {SELECTION_NAME} selects.")
    return tensors


def _place_of_expert(name: str, experts: Mapping[str, nn.Module]) -> torch.Tensor | None:
    """The part of a stack that an official per-expert name stands for."""
    prefix, _, rest = name.rpartition(".experts.")
    module, (expert, _, projection) = experts.get(f"{prefix}.experts"), rest.partition(".")
    if module is None or not expert.isdigit() or int(expert) >= module.gate_up_proj.shape[0]:
        return None
    gate, up = module.gate_up_proj[int(expert)].chunk(2)
    places = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": module.down_proj[int(expert)]}
    return places.get(projection)


__all__ = ["SelectedExperts", "load_esft", "merge_esft", "prepare_esft", "read_esft", "save_esft"]
