# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Registration with transformers' Auto classes."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig

from .configuration_deepseekmoe import DeepseekMoeConfig
from .configuration_dialects import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from .library_support import TRL_LOADER, TRL_MODULE
from .remote_code import NATIVE_TYPES
from .transformers_support import (
    EXPERTS_MODULE,
    EXPERTS_TABLE,
    TRAINER_CALLBACKS,
    TRAINER_MODULE,
    read_tokenizers_as_they_are,
)

CONFIG_CLASSES: tuple[type[DeepseekMoeConfig], ...] = (
    DeepseekMoeConfig,
    DeepseekConfig,
    DeepseekV2Config,
    DeepseekV3Config,
)
_TAKEN: set[type[DeepseekMoeConfig]] = set()  # of the types that transformers has classes of its own for


def register(override_native: bool = False) -> None:
    """Register the family with AutoConfig and the AutoModel classes. Importing the package calls it once.

    The model types `deepseekmoe` and `deepseek` are always ours. `deepseek_v2` and `deepseek_v3` checkpoints keep
    loading with transformers' own classes unless `override_native` is true. Calling it again with another value
    switches over; the model classes of this package can be used directly in either case.

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
    _WITH_EXPERTS.arrange()
    _WITH_TRL.arrange()
    # The model classes take seconds to import, and no Auto class needs them before a config of theirs exists.
    DeepseekMoeConfig.before_first_config = _register_models


@contextmanager
def without_model_classes() -> Iterator[None]:
    """Inside, configs are made without importing the model classes, which takes seconds: for reading files alone. The
    first config afterwards registers the classes, as always."""
    hook, DeepseekMoeConfig.before_first_config = DeepseekMoeConfig.before_first_config, None
    try:
        yield
    finally:
        DeepseekMoeConfig.before_first_config = hook


def _restore_native() -> None:
    """Give the types that transformers has classes for back to them, where this package took them."""
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

    from . import modeling_classification as classifiers
    from . import modeling_deepseekmoe as models
    from .transformers_support import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    models.DeepseekMoePreTrainedModel.publisher = _publish
    models.DeepseekMoePreTrainedModel.preflight = _check_before_upload
    _WITH_TRAINER.arrange()
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


class _AfterImport(MetaPathFinder):
    """Does something with a module of another library as soon as it is there: now, or when somebody imports it, which
    takes a second that most processes can do without."""

    def __init__(self, name: str, attribute: str, action: Callable[[Any], None]) -> None:
        self.name, self.attribute, self.action = name, attribute, action
        self._searching = False

    def arrange(self) -> None:
        """Do it, or make sure that it will be done."""
        module = sys.modules.get(self.name)
        if hasattr(module, self.attribute):
            self.action(module)
        elif self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name or self._searching:
            return None
        self._searching = True
        try:
            spec = util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                self.action(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _carry_code(trainer_module: Any) -> None:
    """Add the callback that publishes the code to those that every Trainer has."""
    from .upload_callbacks import RemoteCodeCallback

    callbacks = getattr(trainer_module, TRAINER_CALLBACKS)
    if RemoteCodeCallback not in callbacks:
        callbacks.append(RemoteCodeCallback)


def _offer_experts(moe_module: Any) -> None:
    """Register the experts implementation for transformers' own models; `experts` registers itself when it is used."""
    if f"{__package__}.experts" not in sys.modules:
        getattr(moe_module, EXPERTS_TABLE).register("deepseekmoe", _run_experts)


def _run_experts(*args: Any, **kwargs: Any) -> Any:
    from .experts import experts_forward

    return experts_forward(*args, **kwargs)


def _load_through_auto(trl_module: Any) -> None:
    """Let TRL load models of the family by AutoModel. It would take the class of transformers that has the name in
    `architectures`, which for V2 and V3 is transformers' own, whatever was registered."""
    original = getattr(trl_module, TRL_LOADER)
    if hasattr(original, "through_auto"):
        return

    @functools.wraps(original)
    def load(model_id: str, architecture: Any = None, **kwargs: Any) -> Any:
        if architecture is None:
            config = AutoConfig.from_pretrained(model_id, trust_remote_code=kwargs.get("trust_remote_code", False))
            architecture = transformers.AutoModelForCausalLM if isinstance(config, DeepseekMoeConfig) else None
        return original(model_id, architecture, **kwargs)

    vars(load)["through_auto"] = True
    for name, module in list(sys.modules.items()):  # its trainers import the function by name
        if name.startswith("trl.") and vars(module).get(TRL_LOADER) is original:
            setattr(module, TRL_LOADER, load)


_WITH_TRL = _AfterImport(TRL_MODULE, TRL_LOADER, _load_through_auto)
_WITH_TRAINER = _AfterImport(TRAINER_MODULE, TRAINER_CALLBACKS, _carry_code)
_WITH_EXPERTS = _AfterImport(EXPERTS_MODULE, EXPERTS_TABLE, _offer_experts)


def _publish(model: Any, repo_id: str, **kwargs: Any) -> str:
    from .hub import push_model  # the client of the Hub and the conversion, which few models need

    return push_model(model, repo_id, **kwargs)


def _check_before_upload(folder: str | Path) -> None:
    from .preflight import check_candidate, find_candidate

    # Adapters, variants and distributed checkpoints have other names.
    if any(Path(folder, name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        check_candidate(find_candidate(folder))


__all__ = ["register", "without_model_classes"]
