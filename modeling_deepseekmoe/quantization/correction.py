# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Give back what rounding took from quantised experts: a product of low rank beside each stack, frozen.

The error of a format, W - Q, has no low rank. What it does to the outputs has, because a few channels of an expert's
inputs are much larger than the others. The correction of a matrix is therefore the best approximation of rank r of
(W - Q) diag(s), without diag(s) again, where s are the root mean squares of its inputs' channels (QERA-approx, arXiv
2410.06040). It is a part of the base: adapters are trained beside it, and belong to no rounding.

Shape letters: E experts, D hidden, I expert width, R rank of the correction.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from modeling_deepseekmoe.conversion.adapters.quantised_bases import decoded, shape_of, stored_matrices
from modeling_deepseekmoe.conversion.checkpoint import Checkpoint
from modeling_deepseekmoe.conversion.description import fp8_block, read_config

from ..checkpoint_layout import STACKS
from ..experts import refuse_offloaded
from ..experts_quantized import CORRECTION, FORMAT_ATTRIBUTE, FORMATS, QuantizedStack, stack_of
from ..families.moe_layers import MoeLayer, find_moe_layers, stacked_modules
from ..support.folders import local_folder, opened, unfinished_file
from ..support.models import evaluating, is_sharded, run_decoder
from ..transformers_support import gating_of
from .experts import QuantizedExperts

_OVERSAMPLED, _ITERATIONS = 8, 4  # of the randomised decomposition, arXiv 0909.4061
_ROWS_OF_ALL = 32  # of all experts' inputs that count with those of each: few rows say little
_SMALLEST = 1e-3  # of the mean: a channel that was hardly used is not blown up
# Of a matrix, by the norm, the most that rounding may have changed. It changes about half as much.
_MOST = {"fp8": 0.1, "nf4": 0.2, "mxfp4": 0.3}
_SAME = 1e-2  # of sums over an expert's weights: another kernel rounds a few of them to the other side
_STORED = (*CORRECTION, "_sketch")
Factors = tuple[torch.Tensor, torch.Tensor]


class _Experts(NamedTuple):
    """A module of quantised experts: its layer, and its name in the model."""

    layer: MoeLayer
    name: str
    module: nn.Module

    def stack(self, name: str) -> QuantizedStack:
        found = stack_of(self.module, name)
        assert isinstance(found, QuantizedStack)
        return found


def correct_rounding(
    model: nn.Module,
    checkpoint: str | Path,
    batches: Iterable[torch.Tensor],
    *,
    r: int = 32,
    progress: Callable[[int], None] = lambda layer: None,
) -> None:
    """Give back, by a correction of low rank, what rounding took from quantised experts (QERA-approx, 2410.06040).

    The correction is a frozen part of the model: in use with and without adapters, and in what `dequantize()` makes.
    `save_pretrained` does not write it; [`save_correction`] does. One matrix of the checkpoint is in memory at a time.

    Args:
        model: a model whose experts are quantised, with or without adapters.
        checkpoint: folder or hub id of the weights before they were rounded, each matrix by its official name.
        batches: `torch.LongTensor`s of token ids (B, S) without padding. Some thousand tokens that are like those that
            the model will see.
        r: rank.
        progress: is called with the index of every layer when its correction is known.

    Raises:
        ValueError: if no experts are quantised, if they are corrected already, if the checkpoint has them in the same
            format, under other names or with other weights (not of a near relative, whose difference it would give
            back too), if there are no tokens, if ESFT is prepared, or if ranks share the model.
        OSError: if there is no such checkpoint.
    """
    if r < 1:
        raise ValueError(f"r={r} is not allowed: it must be at least 1.")
    found = _uncorrected(model)
    originals = _Originals(checkpoint)
    for one in found:
        originals.check(one.name, one.module, one.stack("down_proj").format)
    scales = _measure_inputs(model, found, batches)
    factors: dict[str, Factors] = {}
    with torch.no_grad():
        for one, of_inputs in zip(found, scales, strict=True):
            for name in STACKS:
                factors[f"{one.name}.{name}"] = _factors_of(one, name, originals, of_inputs[name], r)
            progress(one.layer.index)
    _install(found, factors)


def check_originals(model: nn.Module, checkpoint: str | Path, kind: str) -> None:
    """Check, without reading weights, that [`correct_rounding`] can find a model's matrices before they were rounded.

    Args:
        model: the model, or its shapes on the meta device, quantised or not.
        checkpoint, kind: the weights, and the format that the experts are rounded to.

    Raises:
        ValueError, OSError: as [`correct_rounding`].
    """
    originals = _Originals(checkpoint)
    for layer in find_moe_layers(model):
        for module in stacked_modules(layer):
            originals.check(f"{layer.name}.experts", module, kind)


def save_correction(model: nn.Module, file: str | Path) -> None:
    """Write the correction of a model's quantised experts into a safetensors file, at once or not at all.

    Raises:
        ValueError: if there is none, or if ranks share the model.
    """
    found = _quantised(model)
    tensors: dict[str, torch.Tensor] = {}
    for one in found:
        for name in STACKS:
            if (correction := one.stack(name).correction) is None:
                raise ValueError("model is not allowed: its experts have no correction. Call correct_rounding first.")
            parts = (*correction, _sketch(one.stack(name)))
            tensors |= {
                f"{one.name}.{name}{end}": part.detach().contiguous().cpu()
                for end, part in zip(_STORED, parts, strict=True)
            }
    with unfinished_file(file) as unfinished:
        save_file(tensors, unfinished, metadata={"format": getattr(found[0].module, FORMAT_ATTRIBUTE)})


def correction_format(file: str | Path) -> str:
    """Read which format the experts have that a file of [`save_correction`] belongs to.

    Raises:
        ValueError: if it is no such file.
        OSError: if there is no such file.
    """
    with opened(file) as content:
        kind = (content.metadata() or {}).get("format")
    if kind not in FORMATS:
        raise ValueError(f"File {file} is not allowed as a correction: save_correction has not written it.")
    return kind


def load_correction(model: nn.Module, file: str | Path) -> None:
    """Give a model's quantised experts the correction that [`save_correction`] wrote.

    Raises:
        ValueError: if the file belongs to experts in another format, of other layers or with other weights, if the
            model's are corrected already, or if ranks share the model.
        OSError: if there is no such file.
    """
    found, kind = _uncorrected(model), correction_format(file)
    own = getattr(found[0].module, FORMAT_ATTRIBUTE)
    if own != kind:
        raise ValueError(
            f"File {file} is not allowed: it corrects experts in {kind!r}, and the model's are in {own!r}."
        )
    factors: dict[str, Factors] = {}
    with opened(file) as content:
        stored = {name.rpartition(".")[0] for name in list(content.keys())}
        if stored != {one.name for one in found}:
            differ = min(stored ^ {one.name for one in found})
            raise ValueError(
                f"File {file} is not allowed: it and the model do not correct the same layers ({differ})."
            )
        for one in found:
            for name in STACKS:
                first, second, sketch = (content.get_tensor(f"{one.name}.{name}{end}") for end in _STORED)
                own_sketch = _sketch(one.stack(name)).cpu()
                if not (own_sketch - sketch).norm() <= _SAME * sketch.norm():
                    raise ValueError(f"File {file} is not allowed: it corrects other weights than {one.name}.{name}.")
                factors[f"{one.name}.{name}"] = first, second
    _install(found, factors)


def _sketch(stack: QuantizedStack) -> torch.Tensor:
    """Compute a number (E,) of each expert's rounded weights: their sum with random signs of rows and columns."""
    _, rows, columns = stack.shape
    generator = torch.Generator().manual_seed(0)
    left, right = (
        (2.0 * torch.randint(2, (size,), generator=generator) - 1).to(stack.device) for size in (rows, columns)
    )
    plain = replace(stack, dtype=torch.float32, correction=None)
    return torch.stack([
        left @ (plain.decode(slice(expert, expert + 1))[0] @ right) for expert in range(len(stack))
    ])  # fmt: skip


def _quantised(model: nn.Module) -> list[_Experts]:
    """Find the modules of quantised experts."""
    base = getattr(model, "get_base_model", lambda: model)()
    if is_sharded(base):
        raise ValueError("model is not allowed: ranks share it. Correct it before it is sharded.")
    found = [
        _Experts(layer, f"{layer.name}.experts", module)
        for layer in find_moe_layers(base)
        for module in stacked_modules(layer)
        if isinstance(module, QuantizedExperts)
    ]
    if not found:
        raise ValueError(
            f"{type(base).__name__} has no quantised experts, so that nothing was rounded: load it with "
            "quantization_config=StackedExpertsConfig(...)."
        )
    for one in found:
        refuse_offloaded(one.module)
    return found


def _uncorrected(model: nn.Module) -> list[_Experts]:
    """Find the modules of quantised experts, which must have no correction."""
    found = _quantised(model)
    if any(hasattr(one.module, "selected_ids") for one in found):
        raise ValueError(
            "model is not allowed: some of its experts are trained apart. Correct it before prepare_esft."
        )
    if any(one.stack(stack).correction is not None for one in found for stack in STACKS):
        raise ValueError("model is not allowed: its experts are corrected already.")
    return found


def _install(found: list[_Experts], factors: Mapping[str, Factors]) -> None:
    """Put the factors beside the stacks, in the dtype of the products."""
    for one in found:
        for name in STACKS:
            stack = one.stack(name)
            for end, factor in zip(CORRECTION, factors[f"{one.name}.{name}"], strict=True):
                tensor = factor.to(stack.device, stack.dtype)
                one.module.register_parameter(name + end, nn.Parameter(tensor, requires_grad=False))


# ------------------------------------------------------------------------------------------------ the original weights
class _Originals:
    """The matrices of a checkpoint before they were rounded."""

    def __init__(self, checkpoint: str | Path) -> None:
        folder = local_folder(checkpoint)
        self.name = str(checkpoint)
        self.files = Checkpoint(folder)
        self.matrices = stored_matrices(self.files, fp8_block(read_config(folder)))

    def check(self, experts: str, module: nn.Module, kind: str) -> None:
        """Raise ValueError if the matrices of a module are not there, or are stored in the format `kind`."""
        for stack in STACKS:
            number, rows, columns = stack_of(module, stack).shape
            wanted = rows // len(STACKS[stack]), columns
            for name in (f"{experts}.{expert}.{part}.weight" for expert in range(number) for part in STACKS[stack]):
                matrix = self.matrices.get(name)
                if matrix is None:
                    raise ValueError(
                        f"checkpoint={self.name!r} is not allowed: it has no {name}. `deepseekmoe convert --layout "
                        "per-expert` writes DeepSeek's names; other families' are not read."
                    )
                if shape_of(matrix) != wanted:
                    raise ValueError(
                        f"checkpoint={self.name!r} is not allowed: its {name} has shape {shape_of(matrix)}, and the "
                        f"model's {wanted}."
                    )
                if matrix.format == kind:
                    raise ValueError(
                        f"checkpoint={self.name!r} is not allowed: it holds {name} in {kind!r}, as the model does. "
                        "Name the weights before they were rounded."
                    )

    def read(self, experts: str, expert: int, stack: str) -> torch.Tensor:
        """Read an expert's matrix of a stack in float32."""
        names = (f"{experts}.{expert}.{part}.weight" for part in STACKS[stack])
        return torch.cat([decoded(self.matrices[name], self.files) for name in names])


def _factors_of(one: _Experts, name: str, originals: _Originals, scales: torch.Tensor, r: int) -> Factors:
    """Compute A (E, R, in) and B (E, out, R) of a stack, in the dtype of the products."""
    stack = one.stack(name)
    number, rows, columns = stack.shape
    factor_a = torch.zeros(number, r, columns, dtype=stack.dtype, device=stack.device)
    factor_b = torch.zeros(number, rows, r, dtype=stack.dtype, device=stack.device)
    for expert in range(number):
        original = originals.read(one.name, expert, name).to(stack.device)
        error = original - stack.to(torch.float32).decode(slice(expert, expert + 1))[0]
        if not error.norm() <= _MOST[stack.format] * original.norm():
            raise ValueError(
                f"checkpoint={originals.name!r} is not allowed: {name} of {one.name}.{expert} is off by "
                f"{float(error.norm() / original.norm()):.0%}, so that the model's was made of other weights."
            )
        factor_b[expert], factor_a[expert] = low_rank(error, scales[expert], r)
    return factor_a, factor_b


def low_rank(error: torch.Tensor, scales: torch.Tensor, r: int) -> Factors:
    """Find B (out, R) and A (R, in) that make (error - B A) diag(scales) the smallest, by its norm.

    They come from a randomised decomposition (arXiv 0909.4061, algorithms 4.4 and 5.1) with numbers of its own.

    Args:
        error (`torch.FloatTensor` of shape (out, in)).
        scales (`torch.FloatTensor` of shape (in,)): root mean squares of the inputs, above 0.
        r: R. Where a side is shorter, the other columns of B and rows of A are zero.
    """
    wanted, weighted = min(r, *error.shape), error * scales
    generator = torch.Generator(error.device).manual_seed(0)
    width = min(wanted + _OVERSAMPLED, *error.shape)
    start = torch.randn(error.shape[1], width, generator=generator, device=error.device)
    basis = torch.linalg.qr(weighted @ start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(weighted @ torch.linalg.qr(weighted.t() @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.t() @ weighted, full_matrices=False)
    roots = values[:wanted].sqrt()
    factor_b, factor_a = error.new_zeros(len(error), r), error.new_zeros(r, error.shape[1])
    factor_b[:, :wanted] = (basis @ left[:, :wanted]) * roots
    factor_a[:wanted] = roots.unsqueeze(1) * right[:wanted] / scales
    return factor_b, factor_a


# ---------------------------------------------------------------------------------------------------------- the inputs
class _Inputs:
    """Sums of the squares of what each expert's two products are given, channel by channel, and the number of rows."""

    def __init__(self, one: _Experts) -> None:
        self.one = one
        stacks = {name: one.stack(name) for name in STACKS}
        device = stacks["down_proj"].device
        self.sums = {name: torch.zeros(len(stack), stack.shape[-1], device=device) for name, stack in stacks.items()}
        self.rows = torch.zeros(len(stacks["down_proj"]), device=device)

    @torch.no_grad()
    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add a call of the experts."""
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        assert isinstance(hidden, torch.Tensor)
        ids, _ = self.one.layer.choices_of(args, kwargs)
        gate_up, gate = self.one.stack("gate_up_proj"), gating_of(self.one.module)
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
        """Compute the root mean squares (E, in): of an expert's own rows, and of some of all experts' with them."""
        found = {}
        for name, sums in self.sums.items():
            of_all = _ROWS_OF_ALL * sums.sum(dim=0) / self.rows.sum().clamp(min=1)
            roots = ((sums + of_all) / (self.rows.unsqueeze(1) + _ROWS_OF_ALL)).sqrt()
            mean = roots.mean(dim=1, keepdim=True)
            found[name] = torch.where(mean > 0, roots.clamp(min=_SMALLEST * mean), 1.0)
        return found


def _measure_inputs(
    model: nn.Module, found: list[_Experts], batches: Iterable[torch.Tensor]
) -> list[dict[str, torch.Tensor]]:
    """Run the model without adapters, and measure what the experts are given."""
    seen = [_Inputs(one) for one in found]
    handles = [one.one.layer.experts.register_forward_pre_hook(one.see, with_kwargs=True) for one in seen]
    tokens, decoder = 0, getattr(model, "get_base_model", lambda: model)().base_model  # no head: no logits
    try:
        without = getattr(model, "disable_adapter", contextlib.nullcontext)
        with evaluating(model), without():
            for batch in batches:
                run_decoder(decoder, batch.to(decoder.device))
                tokens += batch.numel()
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise ValueError("batches is empty: at least one batch of tokens is needed.")
    return [one.scales() for one in seen]


__all__ = [
    "check_originals",
    "correct_rounding",
    "correction_format",
    "load_correction",
    "low_rank",
    "save_correction",
]
