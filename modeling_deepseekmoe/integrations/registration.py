# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Register the family with transformers' Auto classes."""

from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig

from ..configuration_deepseekmoe import DeepseekMoeConfig
from ..configuration_dialects import CONFIG_CLASSES
from ..remote_code import NATIVE_TYPES
from ..transformers_support import read_tokenizers_as_they_are
from .other_libraries import EXPERTS, QUANTIZERS, TRAINER, TRL

_TAKEN: set[type[DeepseekMoeConfig]] = set()  # of the types that transformers has classes of its own for


def register(override_native: bool = False) -> None:
    """Register the family with AutoConfig and the AutoModel classes. Importing the package calls this once.

    The model types `deepseekmoe` and `deepseek` always load with this package's classes. `deepseek_v2` and
    `deepseek_v3` load with transformers' own classes, unless `override_native` is true. Call it again with another
    value to switch. The model classes of this package can be used directly in either case.

    Args:
        override_native (`bool`): make AutoConfig and AutoModel load `deepseek_v2` and `deepseek_v3` with this
            package's classes.
    """
    for config_class in CONFIG_CLASSES:
        if config_class.model_type not in NATIVE_TYPES or override_native:
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
            if config_class.model_type in NATIVE_TYPES:
                _TAKEN.add(config_class)
    if not override_native:
        _restore_native()
    EXPERTS.arrange()
    QUANTIZERS.arrange()
    TRL.arrange()
    # The model classes take seconds to import, and no Auto class needs them before a config of theirs exists.
    DeepseekMoeConfig.before_first_config = _register_models


def _restore_native() -> None:
    """Give `deepseek_v2` and `deepseek_v3` back to transformers' own classes, if this package took them."""
    for config_class in _TAKEN:
        if CONFIG_MAPPING[config_class.model_type] is config_class:
            AutoConfig.register(config_class.model_type, getattr(transformers, config_class.__name__), exist_ok=True)
    _TAKEN.clear()


def _register_models() -> None:
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    from .. import modeling_classification as classifiers
    from .. import modeling_deepseekmoe as models
    from ..transformers_support import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    models.DeepseekMoePreTrainedModel.publisher = _publish
    models.DeepseekMoePreTrainedModel.preflight = _check_before_upload
    TRAINER.arrange()
    for config_class in CONFIG_CLASSES:
        prefix = config_class.__name__.removesuffix("Config")
        for auto_class, module, head in (
            (AutoModel, models, "Model"),
            (AutoModelForCausalLM, models, "ForCausalLM"),
            (AutoModelForSequenceClassification, classifiers, "ForSequenceClassification"),
            (AutoModelForTokenClassification, classifiers, "ForTokenClassification"),
        ):
            auto_class.register(config_class, getattr(module, prefix + head), exist_ok=True)
        # Trainer's label smoothing shifts the labels only of models whose class name it finds here.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(config_class.model_type, f"{prefix}ForCausalLM")
        if config_class.model_type not in NATIVE_TYPES:
            read_tokenizers_as_they_are(config_class.model_type)


def _publish(model: Any, repo_id: str, **kwargs: Any) -> str:
    from ..hub.push import push_model  # the client of the Hub and the conversion, which few models need

    return push_model(model, repo_id, **kwargs)


def _check_before_upload(folder: str | Path) -> None:
    from ..hub.candidate import find_candidate
    from ..hub.checks import check_candidate

    # Adapters, variants and distributed checkpoints have other names.
    if any(Path(folder, name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        check_candidate(find_candidate(folder))


__all__ = ["register"]
