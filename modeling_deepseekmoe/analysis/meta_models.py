# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Configs and models of any family that transformers knows, on the meta device. No weight is read, and no code of a
folder is run."""

import json
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from modeling_deepseekmoe.configuration import config_from_dict, list_presets, load_preset, read_config_file

from ..checkpoint_layout import MODEL_TYPES
from ..remote_code import auto_classes_of

# What a config may hold that says nothing of shapes: code of the folder, and how its weights are stored.
_LEFT_OUT = ("auto_map", "quantization_config", "compression_config")
# The Auto classes for a config whose own class is not named, by what transformers calls their mappings.
_AUTO_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "AutoModel": "MODEL_MAPPING",
}


def is_preset(name_or_folder: str | Path) -> bool:
    """Tell whether this is the name of a preset, and not a folder with a `config.json`."""
    return str(name_or_folder) in list_presets() and not (Path(name_or_folder) / "config.json").is_file()


def config_named(name_or_folder: str | Path) -> PreTrainedConfig:
    """Return the config of a preset, or of a folder of any family.

    Raises:
        ValueError: if the name is neither, or if the config cannot be used.
    """
    if is_preset(name_or_folder):
        return load_preset(str(name_or_folder))
    if not Path(name_or_folder).is_dir():
        raise ValueError(
            f"{str(name_or_folder)!r} is not allowed: it must be a folder with a config.json, or one of the presets "
            f"{', '.join(list_presets())}."
        )
    return read_config(name_or_folder)


def read_config(folder: str | Path) -> PreTrainedConfig:
    """Read the `config.json` of a folder: as this package's class, or as the one that transformers has for its type.

    How weights are quantised is left out, and so is code that the folder names.

    Raises:
        ValueError: if there is no such file, if transformers does not know its model type, or if a field is not
            allowed.
    """
    content, path = read_config_file(folder), Path(folder) / "config.json"
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        what = "it has no model_type" if model_type is None else f"model_type={model_type!r} is no name of a type"
        raise ValueError(f"{path} is not allowed: {what}.")
    if model_type in MODEL_TYPES:
        return config_from_dict(content)
    if model_type not in transformers.CONFIG_MAPPING:
        code = " Its auto_map names code of the folder, which is not run." if "auto_map" in content else ""
        raise ValueError(
            f"{path}: model_type={model_type!r} is not allowed: it must be a type that transformers "
            f"{transformers.__version__} has classes for.{code}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(_shapes_only(content)), encoding="utf-8")
        try:
            return AutoConfig.from_pretrained(scratch)
        except Exception as error:  # whatever the config class of a family raises
            raise ValueError(f"{path} is not allowed for {model_type}: {reason_of(error)}.") from error


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a config on the meta device: of the class that the config names, or else its language model.

    Raises:
        ValueError: if there is no such class, if it cannot be built there, or if it is no language model that reads
            and writes one sequence.
    """
    build = _builder(config)
    try:
        with torch.device("meta"):
            model = build(config)
        model.tie_weights()
    except Exception as error:  # whatever the model class of a family raises
        raise ValueError(
            f"model_type={config.model_type!r} cannot be built on the meta device: {reason_of(error)}."
        ) from error
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"model_type={config.model_type!r} is not allowed: {type(model).__name__} has an encoder and a decoder, "
            "and only models of one sequence are counted."
        )
    if token_embedding(model) is None:
        raise ValueError(
            f"model_type={config.model_type!r} is not allowed: {type(model).__name__} is no language model, it has no "
            "token embedding."
        )
    return model.eval()


def token_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """Return the embedding of token ids, or `None` if there is none."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embedding if isinstance(embedding, nn.Embedding) else None


def reason_of(error: Exception) -> str:
    """Say in one line what an error of another library says, the beginning of a long one."""
    text = textwrap.shorten(str(error).strip().rstrip("."), 200, placeholder=" ...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def number_in(config: PreTrainedConfig, name: str) -> int | None:
    """Return a number of a config, the largest one where layers differ; `None` if it has no such field."""
    values = [getattr(one, name, None) for one in configs_of_layers(config) or [config]]
    return max((value for value in values if isinstance(value, int)), default=None)


def configs_of_layers(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the config of every decoder layer where they differ. Of other models it is empty."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else []


def _builder(config: PreTrainedConfig) -> Callable[[PreTrainedConfig], PreTrainedModel]:
    """Return the class that the config names, or what makes a model of its type."""
    for name in config.architectures or ():
        named: Any = getattr(transformers, name, None)
        if getattr(named, "config_class", None) is type(config):
            return named
    return getattr(transformers, next(_auto_classes(config))).from_config


def _auto_classes(config: PreTrainedConfig) -> Iterator[str]:
    if config.model_type in MODEL_TYPES:
        own = auto_classes_of(config.model_type)
        yield own.get(next(iter(config.architectures or ()), ""), "AutoModelForCausalLM")
    for name, mapping in _AUTO_CLASSES.items():
        if type(config) in getattr(transformers, mapping, {}):
            yield name
    raise ValueError(
        f"model_type={config.model_type!r} is not allowed: transformers {transformers.__version__} has no language "
        "model of this type."
    )


def _shapes_only(content: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is no shape, in the configs of towers too."""
    kept = {key: value for key, value in content.items() if key not in _LEFT_OUT}
    return {key: _shapes_only(value) if isinstance(value, dict) else value for key, value in kept.items()}


__all__ = [
    "config_named",
    "configs_of_layers",
    "is_preset",
    "meta_model",
    "number_in",
    "read_config",
    "reason_of",
    "token_embedding",
]
