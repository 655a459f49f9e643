# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""How transformers' loader makes quantised stacks of a checkpoint's matrices, and matrices of them again.

Most checkpoints hold the projections of every expert apart, in a floating dtype or quantised. Each of them becomes a
part of its stack by itself. So there is at most one for each thread beside what is quantised. A checkpoint of stacks,
and a layer that is skipped, is read a stack at a time.
"""

import re
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..checkpoint_layout import STACKS
from ..conversion.block_fp8 import FP8, SCALE_SUFFIX
from ..conversion.matrix_formats import SUFFIXES, Parts, decode, encode, kind_of, matrix_of, parts_of
from ..experts_quantized import CORRECTION, FORMAT_ATTRIBUTE, NESTED, SCALES, QuantizedStack, stack_of
from ..experts_workers import run_in_workers
from ..transformers_support import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dtype_when_loaded,
)
from .config import StackedExpertsConfig
from .stacking import NewStack, StackFormat

logger = logging.get_logger(__name__)

_BESIDE = "_beside_codes"  # in the name of a tensor that no file has
# Behind the name of a tensor whose name is the beginning of others'.
_END = r"(?![\w.])"


def _patterns(source: str) -> dict[str, str]:
    """Return the patterns of a matrix's tensors in a file, with what stands behind its name.

    The first must be that of the codes: transformers makes the names of what it saves from the first one.
    """
    return {source + (suffix or _END): suffix for suffix in sorted(SUFFIXES, key=len)}


def stack_of_converter(converter: Any) -> str | None:
    """Return which of `STACKS` a converter makes; `None` for one that makes something else."""
    targets = converter.target_patterns if isinstance(converter, WeightConverter) else []
    if len(targets) != 1 or ".experts." not in f".{targets[0]}":
        return None
    stack = targets[0].rpartition(".")[2]
    return stack if stack in STACKS else None


def is_by_expert(converter: Any) -> bool:
    """Tell whether a converter of a stack takes every projection of every expert apart, and does no more."""
    kinds = [type(operation) for operation in converter.operations]
    sources = converter.source_patterns
    plain = [MergeModulelist, Concatenate] if len(sources) > 1 else [MergeModulelist]
    return kinds == plain and all("*" in source for source in sources)


class _LazyConverter(WeightConverter):
    """A converter that reads no tensor before its operation asks for it."""

    def add_tensor(self, *args: Any, **kwargs: Any) -> None:
        """Note what reads a tensor. By now transformers has decided whether its threads read ahead."""
        self.operations[0].hf_quantizer.read_ahead_again()
        super().add_tensor(*args, **kwargs)

    def materialize_tensors(self) -> dict[str, list[Any]]:
        """Return what reads the tensors, once."""
        collected = dict(self.collected_tensors)
        self.collected_tensors.clear()
        return collected


def _read(value: Any) -> torch.Tensor:
    """Read a tensor: what transformers has collected is a function, a future, or the tensor itself."""
    if isinstance(value, torch.Tensor):
        return value
    return value.result() if isinstance(value, Future) else value()


class _Operation(ConversionOps):
    """An operation that takes tensors in any dtype: what has this attribute is not cast by transformers."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Operation":
        return self  # it has no state: transformers copies it for each layer

    @property
    def config(self) -> StackedExpertsConfig:
        """The quantiser's config."""
        return self.hf_quantizer.quantization_config


class ReadExperts(_Operation):
    """Make a quantised stack of the projections of all experts.

    Args:
        hf_quantizer: the quantiser.
        plain: the converter that makes a stack that is not quantised.
    """

    def __init__(self, hf_quantizer: Any, plain: Any) -> None:
        super().__init__(hf_quantizer)
        self.plain, self.stack = plain, stack_of_converter(plain) or ""
        self.sources = list(plain.source_patterns)

    def converters(self) -> list[Any]:
        """Make the converter of transformers that reads all tensors of a quantised stack, and two for saving.

        Its target is the codes alone: older versions of transformers do not allow several.
        """
        by_source = [list(_patterns(source)) for source in self.sources]
        sources = [pattern for same_suffix in zip(*by_source, strict=True) for pattern in same_suffix]
        # When a model is saved this is what is looked for: `shared_experts.down_proj` must not be found.
        targets = [target.replace(".", r"\.") for target in self.plain.target_patterns]
        made = [_LazyConverter(source_patterns=sources, target_patterns=targets, operations=[self])]
        for suffix in (SCALES, NESTED):
            operation, never = _Nothing(self.hf_quantizer), f"{targets[0]}{suffix}{_BESIDE}"
            made.append(_WrittenWithCodes(never, targets[0] + suffix, operations=[operation], read_by=made[0]))
        for one in made:
            one.scope_prefix, one.base_model_prefix = self.plain.scope_prefix, self.plain.base_model_prefix
        return made

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], model: nn.Module | None = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """Quantise what is not, and put it into a stack."""
        assert model is not None
        target = self.plain.target_patterns[0]
        experts = model.get_submodule(full_layer_name.rpartition(".")[0])
        given = [self._projection(input_dict, source) for source in self.sources]
        if not hasattr(experts, FORMAT_ATTRIBUTE):
            dtype = getattr(experts, self.stack).dtype
            matrices = [
                [decode(_parts(values), full_layer_name, dtype) for values in by_expert] for by_expert in given
            ]
            return {target: torch.stack([torch.cat(of_expert) for of_expert in zip(*matrices, strict=True)])}
        # transformers has put the first tensor where the stack is to be.
        given[0][0] = _parts(given[0][0])
        new = NewStack(self._format(experts, given), given[0][0][""].device)

        def put(place: tuple[int, int]) -> None:
            projection, expert = place
            parts, name = _parts(given[projection][expert]), f"{full_layer_name}[{expert}]"
            new.put(expert, projection, matrix_of(self._in_format(parts, name), name))
            given[projection][expert].clear()  # what is read is let go of

        places = [(projection, expert) for projection, one in enumerate(given) for expert in range(len(one))]
        if new.on_cpu:
            run_in_workers(places, lambda: put)
        else:
            for place in places:
                put(place)
        return {target + suffix: tensor for suffix, tensor in new.tensors.items()}

    def _projection(self, input_dict: dict[str, Any], source: str) -> list[dict[str, Any]]:
        """Collect what reads the tensors of a projection, for each expert."""
        lists = {suffix: input_dict.pop(pattern, None) for pattern, suffix in _patterns(source).items()}
        found = {suffix: tensors for suffix, tensors in lists.items() if tensors is not None}
        numbers = {suffix: len(tensors) for suffix, tensors in found.items()}
        if "" not in numbers or len(set(numbers.values())) > 1:
            raise ValueError(f"{source} has tensors of different numbers of experts: {numbers}.")
        return [dict(zip(found, tensors, strict=True)) for tensors in zip(*found.values(), strict=True)]

    def _format(self, experts: nn.Module, given: list[list[dict[str, Any]]]) -> StackFormat:
        shape = getattr(experts, self.stack).shape
        if len(given[0]) != shape[0]:
            raise ValueError(f"{self.sources[0]} has {len(given[0])} experts, and the config asks for {shape[0]}.")
        return StackFormat(self.config.format, tuple(shape), len(given), self.config.double_quantisation)

    def _in_format(self, parts: Parts, name: str) -> Parts:
        if kind_of(parts, name) == self.config.format:
            return parts
        weight = parts[""] if kind_of(parts, name) is None else decode(parts, name)
        return encode(weight, self.config.format, name, self.config.double_quantisation)

    @property
    def reverse_op(self) -> "WriteExperts":
        """The operation that writes what this one reads."""
        return WriteExperts(self.hf_quantizer, self.plain)


def _parts(values: dict[str, Any]) -> Parts:
    return {suffix: _read(value) for suffix, value in values.items()}


class WriteExperts(ReadExperts):
    """Take a quantised stack apart into a file's tensors of every expert."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], model: nn.Module | None = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """Return the tensors of a file by their names. The scales are those of the model, beside the codes."""
        assert model is not None
        names = [re.sub(r"\\(?=\W)", "", source).lstrip("^") for source in self.sources]
        (codes,) = (value[0] if isinstance(value, list) else value for value in input_dict.values())
        tensors: dict[str, Any] = {}
        if codes.is_floating_point():  # of a layer that is skipped
            for name, projection in zip(names, codes.chunk(len(names), dim=1), strict=True):
                tensors |= {name.replace("*", str(i)): matrix.contiguous() for i, matrix in enumerate(projection)}
            return tensors
        stack = self._stack_with(codes, model)
        for expert, whole in enumerate(replace(stack, codes=codes).unbind()):
            for name, matrix in zip(names, whole.projections(len(names)), strict=True):
                parts = parts_of(matrix, stack.dtype)
                tensors |= {name.replace("*", str(expert)) + suffix: tensor for suffix, tensor in parts.items()}
        return tensors

    def _stack_with(self, codes: torch.Tensor, model: nn.Module) -> QuantizedStack:
        """Find a stack by its codes: some versions of transformers have renamed it by now."""
        for module in model.modules():
            if hasattr(module, FORMAT_ATTRIBUTE):
                stack = stack_of(module, self.stack)
                if isinstance(stack, QuantizedStack) and stack.codes.data_ptr() == codes.data_ptr():
                    return stack
        raise ValueError("A state dict of other tensors than the model's own is not allowed for quantised experts.")

    @property
    def reverse_op(self) -> ReadExperts:
        """The operation that reads what this one writes."""
        return ReadExperts(self.hf_quantizer, self.plain)


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the state of a model that transformers is to save, without a correction of its experts.

    Raises:
        ValueError: if a part of a quantised stack is elsewhere, offloaded.
    """
    for name, module in model.named_modules():
        if hasattr(module, FORMAT_ATTRIBUTE) and any(p.is_meta for p in module.parameters(recurse=False)):
            raise ValueError(f"Saving is not allowed while quantised experts are offloaded, as {name} is.")
    state = model.state_dict()
    plain = {name: tensor for name, tensor in state.items() if not name.endswith(CORRECTION)}
    if len(plain) < len(state):
        logger.warning("The correction of the experts is not in these files: save_correction(model, file) writes it.")
    return plain


class _WrittenWithCodes(WeightConverter):
    """Leaves what stands beside the codes out of a file that has the matrices of the experts one by one.

    [`WriteExperts`] has written it. When a model is loaded this converter matches nothing.
    """

    def __init__(self, *args: Any, read_by: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.read_by = read_by

    def was_used(self) -> bool:
        """Tell whether the model was loaded from such files."""
        return self.read_by is not None and self.read_by.was_used()


class _Nothing(_Operation):
    """Gives no tensor."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {}

    @property
    def reverse_op(self) -> "_Nothing":
        return self


class QuantizeStack(_Operation):
    """Quantise a whole stack, for checkpoints that hold stacks."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], model: nn.Module | None = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """Return the tensors of the quantised stack by their names; what is quantised already stays."""
        assert model is not None
        linears = self.hf_quantizer.linears
        if linears is not None and linears.param_needs_quantization(model, full_layer_name):
            return linears.get_quantize_ops().convert(
                input_dict, model=model, full_layer_name=full_layer_name, **kwargs
            )
        name, values = next(iter(input_dict.items()))
        stack = values[0] if isinstance(values, list) else values
        if not stack.is_floating_point():
            return input_dict
        kind_of({"": stack[0]}, name)  # refuses codes without scales
        projections = STACKS[name.rpartition(".")[2]]
        stored = StackFormat(self.config.format, tuple(stack.shape), len(projections), self.config.double_quantisation)
        new = NewStack(stored, stack.device)
        for expert, whole in enumerate(stack):
            for projection, weight in enumerate(whole.chunk(len(projections))):
                parts = encode(weight, self.config.format, f"{name}[{expert}]", self.config.double_quantisation)
                new.put(expert, projection, matrix_of(parts, name))
        return {name + suffix: tensor for suffix, tensor in new.tensors.items()}


class ReadMatrix(_Operation):
    """Read a matrix that is not of experts, and is quantised in the file, in the model's dtype."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], model: nn.Module | None = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """Return the weight in the dtype of its parameter."""
        assert model is not None
        given = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        parts = {suffix: given[pattern] for pattern, suffix in _patterns("weight").items() if pattern in given}
        dtype = dtype_when_loaded(model, full_layer_name, self.hf_quantizer.dtype)
        if SCALE_SUFFIX in parts and parts[""].is_floating_point():
            parts[""] = parts[""].to(FP8)  # transformers before 5.23 has cast the values, which loses nothing
        if parts.keys() == {""} and parts[""].ndim != 2:
            return {"weight": parts[""].to(dtype)}
        return {"weight": decode(parts, full_layer_name, dtype)}

    @property
    def reverse_op(self) -> "_WriteMatrix":
        """The operation for saving: nothing is quantised again."""
        return _WriteMatrix(self.hf_quantizer)


class _WriteMatrix(_Operation):
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ReadMatrix:
        return ReadMatrix(self.hf_quantizer)


def conversions(hf_quantizer: Any, given: list[Any]) -> list[Any]:
    """Let transformers' converters of a model make quantised stacks.

    Args:
        hf_quantizer: the quantiser.
        given: the model's own converters and renamings.

    Returns:
        The same, in which those of stacks are others; and for files that are quantised those of other matrices.
    """
    made: list[Any] = []
    for converter in given:
        by_expert = stack_of_converter(converter) and is_by_expert(converter)
        made += ReadExperts(hf_quantizer, converter).converters() if by_expert else [converter]
    if hf_quantizer.names_scales_shortly:
        scales = WeightRenaming(source_patterns=rf"^(.+)\.scale{_END}", target_patterns=r"\1.weight_scale_inv")
        made = [scales, *made]
    if hf_quantizer.linears is not None:
        made += hf_quantizer.linears.get_weight_conversions()
    if hf_quantizer.quantization_config.reads_others:
        patterns = list(_patterns("weight"))
        made.append(WeightConverter(patterns, "weight", operations=[ReadMatrix(hf_quantizer)]))
    return made


__all__ = ["QuantizeStack", "conversions", "is_by_expert", "stack_of_converter", "state_of"]
