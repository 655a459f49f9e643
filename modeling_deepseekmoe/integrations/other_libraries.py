# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Change other libraries when this package is imported: in four places, each as soon as its library is imported.

- transformers' Trainer gets one more default callback, which lets `push_to_hub=True` upload the code of the family.
- transformers' experts implementations get one more, `"deepseekmoe"`, for its own models.
- transformers' quantisers get one more, for stacked experts, which also takes files that are quantised already.
- TRL loads models of the family through AutoModel, if it is given their path.

An import changes nothing else of other libraries. docs/architecture.md says why each change is needed.
"""

import functools
import sys
from collections.abc import Callable
from importlib import util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import transformers
from transformers import AutoConfig

from ..configuration_deepseekmoe import DeepseekMoeConfig
from ..support.library_support import TRL_LOADER, TRL_MODULE
from ..transformers_support import (
    EXPERTS_MODULE,
    EXPERTS_TABLE,
    QUANTIZERS_CLASS,
    QUANTIZERS_MERGE,
    QUANTIZERS_MODULE,
    TRAINER_CALLBACKS,
    TRAINER_MODULE,
)

_EXPERTS = "modeling_deepseekmoe.experts"


class AfterImport(MetaPathFinder):
    """Run an action on a module of another library as soon as it is imported: now, or when somebody imports it.

    To import it here would cost every process one or two seconds, and most processes do not need it.

    Args:
        name: name of the module.
        attribute: an attribute that the module has when it is complete.
        action: the function to call with the module.
    """

    def __init__(self, name: str, attribute: str, action: Callable[[Any], None]) -> None:
        self.name, self.attribute, self.action = name, attribute, action
        self._searching = False

    def arrange(self) -> None:
        """Run the action now if the module is complete, else wait for its import."""
        module = sys.modules.get(self.name)
        if hasattr(module, self.attribute):
            self.action(module)
        elif self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find the module as Python does, and let its loader run the action when the module is complete."""
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


def _add_callbacks(trainer_module: Any) -> None:
    """Add to the callbacks of every Trainer those that publish the code and log multi-token prediction."""
    from ..drafting.callbacks import MtpLogCallback
    from ..hub.callbacks import RemoteCodeCallback

    callbacks = getattr(trainer_module, TRAINER_CALLBACKS)
    callbacks += [one for one in (RemoteCodeCallback, MtpLogCallback) if one not in callbacks]


def _offer_experts(moe_module: Any) -> None:
    """Register the experts implementation for transformers' own models. `experts` registers itself when it is used."""
    if _EXPERTS not in sys.modules:
        getattr(moe_module, EXPERTS_TABLE).register("deepseekmoe", _run_experts)


def _run_experts(*args: Any, **kwargs: Any) -> Any:
    from ..experts import experts_forward

    return experts_forward(*args, **kwargs)


def _load_through_auto(trl_module: Any) -> None:
    """Let TRL load models of the family through AutoModel.

    TRL would take transformers' class of the name in `architectures`. For V2 and V3 this is transformers' own class,
    whatever was registered.
    """
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


def _offer_quantizer(auto_module: Any) -> None:
    """Register the quantiser of stacked experts.

    transformers refuses a config for files that another quantiser has written. This one reads some of them.
    """
    from ..quantization.config import QUANT_METHOD, StackedExpertsConfig
    from ..quantization.quantizer import StackedExpertsQuantizer

    chooser = getattr(auto_module, QUANTIZERS_CLASS)
    original = getattr(chooser, QUANTIZERS_MERGE)
    if hasattr(original, "takes_stacked_experts"):
        return
    auto_module.register_quantization_config(QUANT_METHOD)(StackedExpertsConfig)
    auto_module.register_quantizer(QUANT_METHOD)(StackedExpertsQuantizer)

    @functools.wraps(original)
    def merge(quantization_config: Any, quantization_config_from_args: Any = None) -> Any:
        if isinstance(quantization_config_from_args, StackedExpertsConfig):
            return quantization_config_from_args.over(quantization_config)
        if isinstance(quantization_config, dict):
            quantization_config = StackedExpertsConfig.of_file(quantization_config) or quantization_config
        return original(quantization_config, quantization_config_from_args)

    vars(merge)["takes_stacked_experts"] = True
    setattr(chooser, QUANTIZERS_MERGE, staticmethod(merge))


TRL = AfterImport(TRL_MODULE, TRL_LOADER, _load_through_auto)
TRAINER = AfterImport(TRAINER_MODULE, TRAINER_CALLBACKS, _add_callbacks)
EXPERTS = AfterImport(EXPERTS_MODULE, EXPERTS_TABLE, _offer_experts)
QUANTIZERS = AfterImport(QUANTIZERS_MODULE, "get_hf_quantizer", _offer_quantizer)

__all__ = ["EXPERTS", "QUANTIZERS", "TRAINER", "TRL", "AfterImport"]
