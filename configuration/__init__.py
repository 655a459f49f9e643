# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Load configs: presets with the shapes of released and published models, and configs of checkpoint folders."""

import copy
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from modeling_deepseekmoe.configuration_deepseekmoe import DeepseekMoeConfig
from modeling_deepseekmoe.configuration_dialects import CONFIG_CLASSES

_PRESETS = resources.files(__name__) / "presets"


@dataclass(frozen=True)
class Preset:
    """The shape of a published model.

    Attributes:
        name: the preset's name.
        config: its config, of the model's own dialect.
        source: where the shape was published, and what of it is inferred.
        ffn_multiple: the size of a token's activated experts in standard FFNs (8 * hidden_size**2 parameters), if the
            paper counts FLOPs with a rounded value. `None` if the real widths give it.
    """

    name: str
    config: DeepseekMoeConfig
    source: str
    ffn_multiple: float | None


def list_presets() -> list[str]:
    """List the names of all presets, sorted."""
    return sorted(entry.name.removesuffix(".json") for entry in _PRESETS.iterdir() if entry.name.endswith(".json"))


def read_preset(name: str) -> Preset:
    """Read the preset `name`.

    Raises:
        ValueError: if the name is unknown. The message lists the known ones.
    """
    if name not in list_presets():
        raise ValueError(f"preset={name!r} is not allowed: it must be one of {', '.join(list_presets())}.")
    content = json.loads((_PRESETS / f"{name}.json").read_text(encoding="utf-8"))
    return Preset(name, config_from_dict(content["config"]), content["source"], content.get("ffn_multiple"))


def load_preset(name: str) -> DeepseekMoeConfig:
    """Load the config of the preset `name`. Raise ValueError if the name is unknown."""
    return read_preset(name).config


def config_from_dict(content: dict[str, Any]) -> DeepseekMoeConfig:
    """Make a config of this package from the content of an official `config.json`.

    It does not matter which classes are registered with AutoConfig.

    Raises:
        ValueError: if the model type is not of the family, or if a field is not allowed.
    """
    if not isinstance(content, dict):
        raise ValueError(f"A config of type {type(content).__name__} is not allowed: it must be a dictionary.")
    classes = {config_class.model_type: config_class for config_class in CONFIG_CLASSES}
    model_type = content.get("model_type")
    if model_type not in classes:
        raise ValueError(f"model_type={model_type!r} is not allowed: it must be one of {', '.join(classes)}.")
    return classes[model_type].from_dict(copy.deepcopy(content))  # transformers writes into what is nested


def load_config(folder: str | Path) -> DeepseekMoeConfig:
    """Load the config of a checkpoint folder, as this package's class.

    Raises:
        ValueError: if the folder has no `config.json`, or one that is not of the family.
    """
    return config_from_dict(read_config_file(folder))


def read_config_file(folder: str | Path) -> dict[str, Any]:
    """Read the content of a folder's `config.json`, of any family.

    Raises:
        ValueError: if there is no such file, or if it holds no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"folder={str(folder)!r} is not allowed: it must hold a config.json.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not allowed: it must hold a JSON object, and holds a {type(content).__name__}.")
    return content


__all__ = [
    "Preset",
    "config_from_dict",
    "list_presets",
    "load_config",
    "load_preset",
    "read_config_file",
    "read_preset",
]
