# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Helpers for a model: evaluate it, put its sharded tensors together, find its class."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate a model inside, without gradients. Afterwards it is in its previous mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def run_decoder(decoder: Any, input_ids: torch.Tensor, **kwargs: Any) -> list[Any]:
    """Run a decoder without a cache, and its layers of multi-token prediction, which do not run with the others.

    Returns:
        What each depth computed (`mtp.Depth`); nothing for a decoder without such layers.
    """
    outputs = decoder(input_ids=input_ids, use_cache=False, **kwargs)
    if not getattr(decoder.config, "mtp", False):
        return []
    return decoder.predict_ahead(outputs.last_hidden_state, input_ids, **kwargs)[0]


def is_sharded(model: nn.Module) -> bool:
    """Tell whether ranks hold parts of the model's parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without gradients, put together if it is sharded.

    If it is, all ranks that hold a part must call this.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    kind = tensor.device_mesh.device_type
    tensor = tensor if tensor.device.type == kind else tensor.to(kind)  # what FSDP2 has offloaded
    return tensor.full_tensor()


def model_class_named(name: str) -> Any:
    """Find the model class of the family with this name, as a checkpoint's `architectures` has it."""
    from .. import modeling_classification, modeling_deepseekmoe  # seconds to import, and seldom needed

    return getattr(modeling_deepseekmoe if hasattr(modeling_deepseekmoe, name) else modeling_classification, name)


__all__ = ["evaluating", "is_sharded", "model_class_named", "run_decoder", "whole_tensor"]
