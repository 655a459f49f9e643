# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Lets `load_state_dict` of transformers' own models read the files that their `save_pretrained` writes.

`from_pretrained` translates the official names into a model's own, stacked experts among them. Trainer does not. It
resumes, and loads the best checkpoint, with a plain `load_state_dict(strict=False)` of the file. It finds no experts
there, and goes on with those that it has. This package's models read both names themselves.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..experts_quantized import FORMAT_ATTRIBUTE
from ..modeling_pretrained import DeepseekMoePreTrainedModel
from ..transformers_support import revert_weight_conversion

_READS = "reads_official_names"


def read_official_names(model: nn.Module) -> None:
    """Let a model's `load_state_dict` read official names too, from now on.

    Args:
        model: one of transformers' own. Any other module, and this package's models, stay as they are.
    """
    if not isinstance(model, PreTrainedModel) or isinstance(model, DeepseekMoePreTrainedModel):
        return
    if _READS not in vars(model):
        vars(model)[_READS] = model.register_load_state_dict_pre_hook(_translate)


def _translate(module: Any, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """Replace tensors that have official names by those that the model has names for, in place.

    A part of a stack may be in another file of a sharded checkpoint. It keeps its values.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    quantised = tuple(f"{name}." for name, part in module.named_modules() if hasattr(part, FORMAT_ATTRIBUTE))
    missing = {
        name: tensor
        for name, tensor in own.items()
        if prefix + name not in state_dict and not name.startswith(quantised)  # these have a hook of their own
    }
    for name, tensor in missing.items():
        # Rows, numbered: what becomes of the numbers says where every official tensor belongs.
        rows = torch.arange(tensor.shape[:-1].numel()).view(*tensor.shape[:-1], 1) if tensor.ndim > 1 else None
        numbers = torch.arange(tensor.numel()).view(tensor.shape) if rows is None else rows
        official = revert_weight_conversion(module, {name: numbers})
        found = {key: part for key, part in official.items() if prefix + key in state_dict}
        if not found:
            continue
        width = 1 if rows is None else tensor.shape[-1]
        values = tensor.detach().reshape(-1, width).clone()
        for key, part in found.items():
            values[part.flatten()] = state_dict.pop(prefix + key).reshape(-1, width).to(values)
        state_dict[prefix + name] = values.view(tensor.shape)


__all__ = ["read_official_names"]
