# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Give a model new layers of multi-token prediction."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..modeling_deepseekmoe import DeepseekMoeForCausalLM
from ..moe import is_moe_block
from ..mtp import DeepseekMoeMTPLayer

logger = logging.get_logger(__name__)

CHECKPOINTING = "gradient_checkpointing"
INITIALISATIONS = ("random", "last_layer")


def add_mtp(model: nn.Module, depth: int = 1, initialisation: str = "random") -> None:
    """Give a model new layers of multi-token prediction, to be trained (arXiv 2412.19437, section 2.2).

    From then on the model's loss has their part (`config.mtp_loss_coef`), and files that are saved hold them. Before
    they are trained, they draft in vain. To train them alone, freeze the model first: `model.requires_grad_(False)`.
    The new layers are trainable in any case (quantised experts are not).

    Args:
        model: a language model of the family, `deepseekmoe` or `deepseek_v3`, without such layers.
        depth (`int`): how many layers.
        initialisation (`str`): `"random"`: new weights. `"last_layer"`: attention and FFN are copies of the last
            decoder layer of the same kind, experts and bias included, and the last norm is a copy of the decoder's.
            The projection is new in both. A last layer expects a residual stream that has grown through all others:
            on the demo's model a copy of it learned more slowly than new weights.

    Raises:
        ValueError: for another model, one that has such layers already, is wrapped or sharded, or an unknown value.
    """
    config = _checked_config(model, depth, initialisation)
    assert isinstance(model, DeepseekMoeForCausalLM)
    if config.num_nextn_predict_layers and config.name_or_path:
        logger.warning(
            f"{config.name_or_path}: its config tells of {config.num_nextn_predict_layers} multi-token-prediction "
            "layers. Those of add_mtp are new, and take their place in files that are saved. To keep the layers of "
            "the checkpoint, load it with mtp=True."
        )
    like = model.lm_head.weight
    source = _last_layer(model) if initialisation == "last_layer" else None
    for number in range(1, depth + 1):
        with torch.device(like.device):
            layer = DeepseekMoeMTPLayer(config, number)
        layer.to(model.dtype)
        model.initialise(layer)
        if source is not None:
            _copy_parts(source, layer, model.model.norm)
        # As the others: whether it is checkpointed, and how.
        for key, value in vars(model.model.layers[0]).items():
            if CHECKPOINTING in key:
                setattr(layer, key, value)
        model.model.layers.append(layer.train(model.training))
    config.num_nextn_predict_layers, config.mtp = depth, True
    for module in (model, model.model):
        module.look_for_mtp()


def _checked_config(model: nn.Module, depth: int, initialisation: str) -> Any:
    """Check all arguments, and return the model's config."""
    if not isinstance(model, DeepseekMoeForCausalLM):
        raise ValueError(
            f"{type(model).__name__} is not allowed: add_mtp takes a language model of this package, without "
            "wrappers. Call it before get_peft_model or a trainer."
        )
    config = model.config
    if not config.allows_mtp:
        raise ValueError(
            f"model_type {config.model_type!r} is not allowed: its files have no place for multi-token-prediction "
            "layers. Convert the model first: `deepseekmoe convert MODEL OUT --to deepseekmoe`."
        )
    if config.mtp:
        raise ValueError(f"This model has {config.num_nextn_predict_layers} multi-token-prediction layers already.")
    if type(depth) is not int or depth < 1:
        raise ValueError(f"depth={depth!r} is not allowed: it must be an integer of at least 1.")
    if initialisation not in INITIALISATIONS:
        raise ValueError(
            f"initialisation={initialisation!r} is not allowed: it must be one of {', '.join(INITIALISATIONS)}."
        )
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError("A sharded model is not allowed: call add_mtp before the model is spread.")
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("A model with adapters is not allowed: call add_mtp before get_peft_model.")
    return config


def _last_layer(model: DeepseekMoeForCausalLM) -> nn.Module:
    """Return the last decoder layer of the kind that multi-token prediction has: with experts if the config has some.

    Raises:
        ValueError: if there is none.
    """
    wanted = bool(model.config.n_routed_experts)
    for layer in reversed(model.model.decoder_layers):
        if is_moe_block(layer.mlp) == wanted:
            return layer
    raise ValueError(
        "initialisation='last_layer' is not allowed: no layer of this model has experts, and those of multi-token "
        "prediction have. Choose 'random'."
    )


def _copy_parts(source: nn.Module, layer: nn.Module, norm: nn.Module) -> None:
    """Take attention, FFN and norms from a decoder layer, as modules: quantised experts stay what they are."""
    own_index = layer.self_attn.layer_idx
    for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
        setattr(layer, name, deepcopy(getattr(source, name)))
    for parameter in layer.parameters():  # the model may be frozen
        parameter.requires_grad_(parameter.is_floating_point())
    layer.self_attn.layer_idx = own_index
    layer.shared_head.norm.load_state_dict(norm.state_dict())


__all__ = ["INITIALISATIONS", "add_mtp"]
