# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Give back what rounding took from quantised experts: a frozen adapter beside the one that is trained.

The error of a format, W - Q, has no low rank. What it does to the outputs has, because a few channels of an expert's
inputs are much larger than the others. The adapter of an expert is therefore the best approximation of rank r of
(W - Q) diag(s), without diag(s) again, where s are the root mean squares of its inputs' channels (QERA-approx, arXiv
2410.06040). It belongs to the base as it is rounded, and the adapter that is trained beside it to no rounding: that
one is merged into weights that are not rounded.

Shape letters: E experts, D hidden, I expert width, n choices of an expert.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from modeling_deepseekmoe.conversion.adapters.quantised_bases import decoded, stored_matrices
from modeling_deepseekmoe.conversion.checkpoint import Checkpoint
from modeling_deepseekmoe.conversion.description import fp8_block, read_config
from modeling_deepseekmoe.conversion.locating import Matrix

from ..checkpoint_layout import STACKS
from ..experts_quantized import QuantizedStack, stack_of
from ..families.moe_layers import MoeLayer, find_moe_layers, stacked_modules
from ..lora.config import expert_lora_config
from ..lora.layer import ExpertLora
from ..lora.model import optimize_expert_lora
from ..lora.options import ROUNDING
from ..support.folders import local_folder
from ..support.models import evaluating, is_sharded
from ..support.peft_support import ParamWrapper
from ..transformers_support import gating_of
from .experts import QuantizedExperts

_OVERSAMPLED, _ITERATIONS = 8, 4  # of the randomised decomposition, arXiv 0909.4061
_SMALLEST = 1e-3  # of the mean: a channel that calibration has hardly used is not blown up


def add_rounding_adapter(
    model: nn.Module,
    checkpoint: str | Path,
    batches: Iterable[torch.Tensor],
    *,
    r: int = 32,
    progress: Callable[[int], None] = lambda layer: None,
) -> PeftModel:
    """Add a frozen adapter that gives back what rounding took from quantised experts (QERA-approx, arXiv 2410.06040).

    Its name is "rounding", and it counts as a part of the base: it is in use beside any other adapter, without one,
    and where adapters are disabled. Other adapters stay as they are. It is saved with them, in a folder of its name.

    Args:
        model: a model whose experts are quantised, or a `PeftModel` over one, made with an `expert_lora_config`.
        checkpoint: folder or hub id of the weights before they were rounded, each matrix by its official name. One
            matrix is in memory at a time.
        batches: `torch.LongTensor`s of token ids (B, S) without padding. Some thousand tokens that are like those that
            the model will see.
        r: rank.
        progress: is called with the index of every layer when it is done.

    Returns:
        The `PeftModel`.

    Raises:
        ValueError: if no experts are quantised, if the checkpoint has them in the same format or has other names, if
            there is such an adapter, if there are no tokens, or if ranks share the model.
        OSError: if there is no such checkpoint.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = _quantised_layers(base)
    if ROUNDING in getattr(model, "peft_config", ()):
        raise ValueError(f"model is not allowed: it has an adapter {ROUNDING!r}. Call delete_adapter({ROUNDING!r}).")
    files = _Originals(checkpoint, layers)
    scales = _measure_inputs(model, layers, batches)
    gpus = {parameter.device for parameter in base.parameters() if parameter.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices=sorted(gpus, key=str)):
        adapted = _with_adapter(model, base, r)
        for layer in find_moe_layers(base):
            if layer.index in scales:
                _set_factors(layer, files, scales[layer.index])
                progress(layer.index)
    return adapted


def _quantised_layers(base: nn.Module) -> dict[int, MoeLayer]:
    if is_sharded(base):
        raise ValueError("model is not allowed: ranks share it. Add the adapter in one process, and save it.")
    found = {layer.index: layer for layer in find_moe_layers(base) if _experts_of(layer) is not None}
    if not found:
        raise ValueError(
            f"{type(base).__name__} has no quantised experts, so that nothing was rounded: load it with "
            "quantization_config=StackedExpertsConfig(...)."
        )
    return found


def _experts_of(layer: MoeLayer) -> QuantizedExperts | None:
    found = [module for module in stacked_modules(layer) if isinstance(module, QuantizedExperts)]
    return found[0] if found else None


class _Originals:
    """The matrices of a checkpoint before they were rounded."""

    def __init__(self, checkpoint: str | Path, layers: dict[int, MoeLayer]) -> None:
        folder = local_folder(checkpoint)
        self.files = Checkpoint(folder)
        self.matrices = stored_matrices(self.files, fp8_block(read_config(folder)))
        for layer in layers.values():
            experts = _experts_of(layer)
            assert experts is not None
            for number in range(len(experts.gate_up_proj)):
                for name in (name for names in STACKS.values() for name in names):
                    self._check(self.named(layer, number, name), experts, str(checkpoint))

    @staticmethod
    def named(layer: MoeLayer, expert: int, name: str) -> str:
        return f"{layer.name}.experts.{expert}.{name}.weight"

    def _check(self, name: str, experts: QuantizedExperts, checkpoint: str) -> None:
        matrix: Matrix | None = self.matrices.get(name)
        if matrix is None:
            raise ValueError(
                f"checkpoint={checkpoint!r} is not allowed: it has no {name}. `deepseekmoe convert --layout "
                "per-expert` writes DeepSeek's names; other families' are not read."
            )
        kind = experts.storage_format
        if matrix.format == kind:
            raise ValueError(
                f"checkpoint={checkpoint!r} is not allowed: it holds {name} in {kind!r}, as the model does. Name the "
                "weights before they were rounded."
            )

    def read(self, layer: MoeLayer, expert: int, stack: str) -> torch.Tensor:
        """Read a matrix of a stack in float32."""
        names = (self.named(layer, expert, name) for name in STACKS[stack])
        return torch.cat([decoded(self.matrices[name], self.files) for name in names])


class _Inputs:
    """Sums of the squares of what an expert's two products are given, channel by channel, and the number of rows."""

    def __init__(self, layer: MoeLayer) -> None:
        self.layer = layer
        self.sums: dict[str, torch.Tensor] = {}
        self.rows = torch.zeros(0)

    @torch.no_grad()
    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add a call of the experts."""
        experts = _experts_of(self.layer)
        assert experts is not None
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        assert isinstance(hidden, torch.Tensor)
        ids, _ = self.layer.choices_of(args, kwargs)
        stacks = {name: stack_of(experts, name) for name in STACKS}
        if not self.sums:
            self.sums = {
                name: torch.zeros(len(stack), stack.shape[-1], device=hidden.device) for name, stack in stacks.items()
            }
            self.rows = torch.zeros(len(stacks["gate_up_proj"]), device=hidden.device)
        gate_up, gate = stacks["gate_up_proj"], gating_of(experts)
        assert isinstance(gate_up, QuantizedStack)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        for expert in ids.unique().tolist():
            if expert >= len(gate_up):
                continue
            rows = hidden[(ids == expert).any(dim=1)]
            first = rows.to(gate_up.dtype) @ gate_up.decode(slice(expert, expert + 1))[0].t()
            for name, given in (("gate_up_proj", rows), ("down_proj", gate(first))):
                self.sums[name][expert] += given.float().square().sum(dim=0)
            self.rows[expert] += len(rows)

    def scales(self) -> dict[str, torch.Tensor]:
        """Compute the root mean squares (E, in). An expert that no token has chosen gets those of all others."""
        found = {}
        for name, sums in self.sums.items():
            rows = self.rows.unsqueeze(1)
            mean = torch.where(rows > 0, sums / rows.clamp(min=1), sums.sum(dim=0) / rows.sum())
            found[name] = mean.sqrt().clamp(min=_SMALLEST * mean.sqrt().mean(dim=1, keepdim=True))
        return found


def _measure_inputs(
    model: nn.Module, layers: dict[int, MoeLayer], batches: Iterable[torch.Tensor]
) -> dict[int, dict[str, torch.Tensor]]:
    """Run the model as it is, and measure what the experts are given."""
    seen = {index: _Inputs(layer) for index, layer in layers.items()}
    handles = [
        layers[index].experts.register_forward_pre_hook(one.see, with_kwargs=True) for index, one in seen.items()
    ]
    tokens, decoder = 0, getattr(model, "get_base_model", lambda: model)().base_model  # no head: no logits
    try:
        with evaluating(model):
            for batch in batches:
                decoder(input_ids=batch.to(decoder.device), use_cache=False)
                tokens += batch.numel()
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise ValueError("batches is empty: at least one batch of tokens is needed.")
    return {index: one.scales() for index, one in seen.items()}


def _with_adapter(model: nn.Module, base: nn.Module, r: int) -> PeftModel:
    """Add an adapter of zeros to all quantised experts, frozen."""
    layers = find_moe_layers(base)
    quantised = [layer.index for layer in layers if _experts_of(layer) is not None]
    only = quantised if len(quantised) < len(layers) else None
    config = expert_lora_config(model, r=r, lora_alpha=r, layers_to_transform=only)
    if isinstance(model, PeftModel):
        adapted = model
        if any(isinstance(layer.experts, ParamWrapper) for layer in layers):
            optimize_expert_lora(adapted)  # PEFT itself allows no adapters of different parameters
        adapted.add_adapter(ROUNDING, config)
    else:
        adapted = get_peft_model(model, config, adapter_name=ROUNDING)
    dtype = next(stack.dtype for layer in layers if (stack := _stack_of(layer)) is not None)
    for name, parameter in adapted.named_parameters():
        if f".{ROUNDING}." in name:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)  # PEFT has made it float32, for training
    return adapted


def _stack_of(layer: MoeLayer) -> QuantizedStack | None:
    experts = _experts_of(layer)
    stack = None if experts is None else stack_of(experts, "gate_up_proj")
    return stack if isinstance(stack, QuantizedStack) else None


def _set_factors(layer: MoeLayer, files: _Originals, scales: dict[str, torch.Tensor]) -> None:
    assert isinstance(layer.experts, ExpertLora)
    for lora in layer.experts.chain():
        stack, (factor_a, factor_b) = lora.stack(), lora.factors(ROUNDING)
        assert isinstance(stack, QuantizedStack)
        torch.manual_seed(layer.index)
        for expert, of_channels in enumerate(scales[lora.parameter_name]):
            original = files.read(layer, expert, lora.parameter_name).to(stack.device)
            error = original - stack.to(torch.float32).decode(slice(expert, expert + 1))[0]
            left, right = low_rank(error, of_channels, factor_a.shape[1])
            factor_a[expert].copy_(right)
            factor_b[:, :, expert].copy_(left)


def low_rank(error: torch.Tensor, scales: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find B (out, r) and A (r, in) that make (error - B A) diag(scales) the smallest, by its norm.

    Args:
        error (`torch.FloatTensor` of shape (out, in)).
        scales (`torch.FloatTensor` of shape (in,)): root mean squares of the inputs.
        r: rank. Where a side is shorter, the other columns of B and rows of A are zero.
    """
    wanted = min(r, *error.shape)
    left, values, right = torch.svd_lowrank(
        error * scales, q=min(wanted + _OVERSAMPLED, *error.shape), niter=_ITERATIONS
    )
    roots = values[:wanted].sqrt()
    factor_b, factor_a = error.new_zeros(len(error), r), error.new_zeros(r, error.shape[1])
    factor_b[:, :wanted] = left[:, :wanted] * roots
    factor_a[:wanted] = (right[:, :wanted] * roots).t() / scales
    return factor_b, factor_a


__all__ = ["add_rounding_adapter", "low_rank"]
