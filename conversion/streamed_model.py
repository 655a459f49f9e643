# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Run a model that does not fit into memory: weights are read when needed, one layer at a time, in float32."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modeling_deepseekmoe.conversion.description import Description
from modeling_deepseekmoe.conversion.targets import Target, outputs, outputs_of
from modeling_deepseekmoe.conversion.tensor_table import head_of
from modeling_deepseekmoe.support.models import model_class_named

Reader = Callable[[str], torch.Tensor]


def streamed_model(config: PreTrainedConfig, architecture: str | None, read: Reader) -> PreTrainedModel:
    """Make a model in evaluation mode that reads its weights in every forward pass.

    Args:
        config: config of this family or of transformers'.
        architecture: class of this package. `None` for the language model of transformers that the config names.
        read: returns a weight (float32) by its name in the model's state dict, where experts are stacked.
    """
    with torch.device("meta"):
        if architecture is None:
            model = AutoModelForCausalLM.from_config(deepcopy(config))
        else:
            model = model_class_named(architecture)(deepcopy(config))
            model.set_experts_implementation("eager")  # takes experts of every width
    decoder = getattr(model, model.base_model_prefix, model)
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config)  # its buffers are in no checkpoint
    prefix = "" if decoder is model else f"{model.base_model_prefix}."
    units = {f"{prefix}layers.{number}.": layer for number, layer in enumerate(decoder.layers)}
    units |= {f"{prefix}{name}.": getattr(decoder, name) for name in ("embed_tokens", "norm")}
    units |= {f"{name}.": child for name, child in model.named_children() if child is not decoder and prefix}
    for name, unit in units.items():
        _stream(unit, name, read)
    return model.eval()


def _stream(unit: nn.Module, prefix: str, read: Reader) -> None:
    def load(module: nn.Module, *_: object) -> None:
        module.load_state_dict({name: read(prefix + name) for name in module.state_dict()}, assign=True)

    def unload(module: nn.Module, *_: object) -> None:
        module.to_empty(device="meta")

    unit.register_forward_pre_hook(load)
    unit.register_forward_hook(unload)


def checkpoint_model(found: Description) -> PreTrainedModel:
    """Make the streamed model of a checkpoint of the family."""
    made, target = {}, Target("float32")
    for name, entry in found.wanted.items():
        matrix = found.matrix(name)
        if matrix is not None:
            made[name] = outputs_of(entry, matrix, target)
    tensors = {output.name: output for output in outputs(found.wanted, made, "stacked", found.experts)}
    head = head_of(next(iter(found.config.architectures or ()), "ForCausalLM"))
    architecture = type(found.config).__name__.removesuffix("Config") + head
    return streamed_model(found.config, architecture, lambda name: tensors[name].read(found.source))


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Compute the output of the model's head for tokens (B, S): logits, or hidden states if there is no head."""
    output = model(input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
    return output.logits if "logits" in output else output.last_hidden_state


@torch.no_grad()
def greedy_text(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Continue a prompt (1, S) greedily, and return both (1, S + new_tokens). Every token reads all weights once."""
    tokens = prompt
    for _ in range(new_tokens):
        tokens = torch.cat([tokens, logits_of(model, tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


__all__ = ["checkpoint_model", "greedy_text", "logits_of", "streamed_model"]
