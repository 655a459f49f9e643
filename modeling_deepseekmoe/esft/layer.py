# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Training the full weights of some experts only (ESFT, arXiv 2407.01906).

The weights of the selected experts become parameters of their own beside the frozen stack. So neither gradients nor
optimizer states exist for the others. A state dict looks as if nothing had happened: checkpoints are complete and have
the usual names. [`save_esft`] writes only what was trained.

Shape letters: T tokens, E routed experts, K choices, N selected experts, I expert width, D hidden.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import logging

from ..checkpoint_layout import STACKS
from ..experts import refuse_offloaded, run_experts, why_unsupported
from ..experts_quantized import FORMAT_ATTRIBUTE, QuantizedStack, stack_of
from ..families.moe_layers import find_experts
from ..support.expert_parts import LocalPart
from ..support.library_support import has_adapters
from ..support.models import whole_tensor
from ..support.official_names import read_official_names
from .selection import ExpertSelection

logger = logging.get_logger(__name__)


class SelectedExperts(nn.Module):
    """A mixin for the class of an experts module: the selected experts compute with parameters of their own."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute the weighted sum of the chosen experts' outputs: (T, D), (T, K) and (T, K) become (T, D)."""
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
        """Return the state of the whole stack under its usual names; a quantised one has what is trained beside it."""
        if self.over_quantized:
            return super().state_dict(*args, **kwargs)
        self.write_back()
        state, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        for name in STACKS:
            del state[f"{prefix}selected_{name}"]
        return state

    @property
    def over_quantized(self) -> bool:
        """Whether the stack is quantised: then it stays as it is."""
        return hasattr(self, FORMAT_ATTRIBUTE)

    def trained_part(self, name: str, expert: int) -> torch.Tensor | None:
        """Return an expert's matrix (out, in) in what is trained beside a stack; `None` if it is not selected."""
        place = int(self.place_of_expert[expert])
        return getattr(self, f"selected_{name}")[place] if place < len(self.selected_ids) else None

    @torch.no_grad()
    def read_again(self) -> None:
        """Copy the weights of the selected experts from the stack into their own parameters."""
        for name in STACKS:
            getattr(self, f"selected_{name}").copy_(whole_tensor(getattr(self, name))[self.selected_ids])

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the trained weights to their experts in the stack, which itself does not compute with them.

        If the stack is sharded, all ranks must call this.

        Raises:
            ValueError: if FSDP2 has sharded the trained weights too.
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
    """Freeze a model except for the selected experts, in place. Optimizers then get only what requires a gradient.

    Args:
        model: a model of this family, or any other of transformers with stacked experts.
        experts: an `esft.json`, `{layer: [ids]}` or an [`ExpertSelection`]. A selection can name more than experts.

    Raises:
        ValueError: for a layer or an expert that the model does not have, a model that is prepared already, or one
            with adapters.
    """
    selection = ExpertSelection.of(experts).checked(model)
    refuse_adapters(model)
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
    if any(hasattr(module, FORMAT_ATTRIBUTE) for _, module in blocks.values()):
        model.hf_quantizer.trains_copies = True  # Trainer asks whether anything of a quantised model can be trained


def refuse_adapters(model: nn.Module) -> None:
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
        experts.register_parameter(f"selected_{name}", nn.Parameter(_copies(experts, name, selected)))
    # After the hook that stacks the official per-expert tensors, which is there from the beginning.
    experts.esft_hook = experts.register_load_state_dict_pre_hook(_select_from_state)
    plain = type(experts)
    experts.__class__ = type(f"Selected{plain.__name__}", (SelectedExperts, plain), {"plain_class": plain})


def _copies(experts: nn.Module, name: str, selected: torch.Tensor) -> torch.Tensor:
    """Copy the matrices of selected experts (N, out, in), in the dtype of the products if the stack is quantised."""
    stack = stack_of(experts, name)
    if isinstance(stack, QuantizedStack):
        return torch.cat([stack.decode(slice(expert, expert + 1)) for expert in selected.tolist()])
    return whole_tensor(stack)[selected]


def _select_from_state(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """Let `load_state_dict` fill the parameters of the selected experts from those of the whole stack."""
    if hasattr(module, FORMAT_ATTRIBUTE):
        return
    for name in STACKS:
        if f"{prefix}{name}" in state_dict:
            stack = state_dict[f"{prefix}{name}"]
            state_dict[f"{prefix}selected_{name}"] = stack[module.selected_ids.to(stack.device)]


def merge_esft(model: nn.Module) -> None:
    """Put the trained experts back into their stacks, in place.

    The model has its ordinary modules and parameters again, frozen as they are.

    Raises:
        ValueError: if nothing is prepared, or if the stacks are quantised.
    """
    prepared = [module for module in model.modules() if isinstance(module, SelectedExperts)]
    if not prepared:
        raise ValueError(f"{type(model).__name__} is not prepared for ESFT: there is nothing to merge.")
    if any(module.over_quantized for module in prepared):
        raise ValueError(
            "merge_esft is not allowed over quantised experts: call save_esft, and `deepseekmoe merge` it into a base."
        )
    for module in prepared:
        module.write_back()
        module.esft_hook.remove()
        for name in ("esft_hook", "selected_ids", "place_of_expert", *(f"selected_{key}" for key in STACKS)):
            delattr(module, name)
        module.__class__ = module.plain_class


__all__ = ["SelectedExperts", "merge_esft", "prepare_esft"]
