# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""All that the package takes from transformers beyond its documented interface, and the differences between versions.

All other files import only from transformers' top level and from a few documented modules. The names here are imported
when they are first asked for: some take a second, and reading a config can do without them. A name that a version no
longer has gives an error that says so. `tests/core/test_canaries.py` states what is relied on for each.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from typing import Any

import torch
import transformers
from torch import nn

_MODULE_OF = {
    # configs
    "ACT2CLS": "transformers.activations",
    "ROPE_INIT_FUNCTIONS": "transformers.modeling_rope_utils",
    # models
    "ACT2FN": "transformers.activations",
    "DeepseekV2TopkRouter": "transformers.models.deepseek_v2.modeling_deepseek_v2",
    "DeepseekV3Experts": "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "DeepseekV3Attention": "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "DeepseekV3MLP": "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "DeepseekV3TopkRouter": "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "GELUTanh": "transformers.activations",
    "GenerateDecoderOnlyOutput": "transformers.generation",
    "LlamaAttention": "transformers.models.llama.modeling_llama",
    "LlamaRMSNorm": "transformers.models.llama.modeling_llama",
    "LlamaRotaryEmbedding": "transformers.models.llama.modeling_llama",
    "OutputRecorder": "transformers.utils.output_capturing",
    "PagedAttentionCache": "transformers.generation.continuous_batching.cache",
    "SiLUActivation": "transformers.activations",
    "TransformersKwargs": "transformers.utils",
    "Unpack": "transformers.processing_utils",
    "can_return_tuple": "transformers.utils",
    "capture_outputs": "transformers.utils.output_capturing",
    "create_causal_mask": "transformers.masking_utils",
    "is_deepspeed_zero3_enabled": "transformers.integrations",
    "is_fsdp_managed_module": "transformers.integrations",
    "maybe_autocast": "transformers.utils.generic",
    "merge_with_config_defaults": "transformers.utils.generic",
    "normal_": "transformers.initialization",
    "zeros_": "transformers.initialization",
    # experts and parallel plans
    "HfQuantizer": "transformers.quantizers.base",
    "QuantizationConfigMixin": "transformers.utils.quantization_config",
    "ALL_EXPERTS_FUNCTIONS": "transformers.integrations.moe",
    "ALL_PARALLEL_STYLES": "transformers.integrations.tensor_parallel",
    "use_experts_implementation": "transformers.integrations",
    # checkpoints
    "Concatenate": "transformers.core_model_loading",
    "ConversionOps": "transformers.core_model_loading",
    "MergeModulelist": "transformers.core_model_loading",
    "WeightConverter": "transformers.core_model_loading",
    "WeightRenaming": "transformers.core_model_loading",
    "custom_object_save": "transformers.dynamic_module_utils",
    "get_relative_import_files": "transformers.dynamic_module_utils",
    "register_checkpoint_conversion_mapping": "transformers.conversion_mapping",
    "revert_weight_conversion": "transformers.core_model_loading",
    # the Auto classes' tables
    "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS": "transformers.models.auto.tokenization_auto",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "transformers.models.auto.modeling_auto",
    "TOKENIZER_MAPPING_NAMES": "transformers.models.auto.tokenization_auto",
    # Trainer
    "PREFIX_CHECKPOINT_DIR": "transformers.trainer_utils",
    "SCHEDULER_NAME": "transformers.trainer",
    "SaveStrategy": "transformers.trainer_utils",
    "TRAINER_STATE_NAME": "transformers.trainer",
    "TRAINING_ARGS_NAME": "transformers.trainer",
    "load_optimizer_distributed": "transformers.distributed",
    "save_optimizer_distributed": "transformers.distributed",
    "unwrap_model": "transformers.modeling_utils",
}
# Modules that something is done with as soon as somebody imports them, and what it is done with.
TRAINER_MODULE, TRAINER_CALLBACKS = "transformers.trainer", "DEFAULT_CALLBACKS"
EXPERTS_MODULE, EXPERTS_TABLE = "transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS"
QUANTIZERS_MODULE, QUANTIZERS_CLASS, QUANTIZERS_MERGE = (
    "transformers.quantizers.auto",
    "AutoHfQuantizer",
    "merge_quantization_configs",
)


def __getattr__(name: str) -> Any:
    """Import a name of the table.

    Raises:
        ImportError: if the installed transformers does not have it.
    """
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(_MODULE_OF[name]), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"transformers {transformers.__version__} has no {_MODULE_OF[name]}.{name}, which modeling-deepseekmoe "
            "needs: install a version of transformers that it names in its requirements, or a newer "
            "modeling-deepseekmoe."
        ) from error
    globals()[name] = value
    return value


# ---------------------------------------------------------------------------------------------- the cache's two names
# transformers 5.24 renamed `past_key_values` to `cache` everywhere. Parameters here keep the first name: before 5.24
# continuous batching hands a cache of its own, which no model must touch, through to the attention as `cache`.
CACHE_NAMES = ("cache", "past_key_values")


@functools.cache
def cache_name() -> str:
    """Return the name under which the installed transformers passes a cache to layers and masks, and returns it.

    It is `"cache"` since 5.24, and `"past_key_values"` before.
    """
    from transformers.modeling_outputs import MoeModelOutputWithPast

    return "cache" if "cache" in {field.name for field in fields(MoeModelOutputWithPast)} else "past_key_values"


def takes_cache(forward: Callable[..., Any], name: str = "past_key_values") -> Callable[..., Any]:
    """Let a method take the cache under either of its names.

    Args:
        forward: a method with `name` among its parameters, or with `**kwargs` for it.
        name: the name under which `forward` wants the cache.

    Returns:
        The method. Its signature names the parameter as the installed transformers does, because `generate` looks
        there. It raises a `ValueError` if two caches are given.
    """
    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    place = [*signature.parameters].index(name) if name in signature.parameters else sys.maxsize
    of_others = None if cache_name() == "cache" else __getattr__("PagedAttentionCache")

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        passed_through = of_others is not None and isinstance(kwargs.get("cache"), of_others)
        if not passed_through and ("cache" in kwargs or "past_key_values" in kwargs):
            before, after = args[: place - 1], args[place:]  # without self, which is the first parameter
            given = [kwargs.pop("cache", None), kwargs.pop("past_key_values", None), *args[place - 1 : place]]
            caches = [cache for cache in given if cache is not None]
            if len(caches) > 1:
                raise ValueError(
                    "cache, past_key_values: only one of them is allowed. They are two names of one argument, the "
                    "second one that of transformers before 5.24."
                )
            if len(args) >= place:
                args = (*before, *(caches or [None]), *after)
            elif caches:
                kwargs[name] = caches[0]
        return forward(self, *args, **kwargs)

    if name in signature.parameters:
        parameters[place] = parameters[place].replace(name=cache_name())

        @functools.wraps(forward)
        def described() -> None:
            """Carry the signature, and never run. On the wrapper, accelerate's hooks would copy it with its self."""

        vars(described)["__signature__"] = signature.replace(parameters=parameters)
        vars(wrapper)["__wrapped__"] = described
        wrapper.__annotations__ = {
            cache_name() if key == name else key: kind for key, kind in forward.__annotations__.items()
        }
    return wrapper


def remove_from_cache(cache: Any, number: int) -> None:
    """Remove the last `number` entries of every layer of a dynamic or static cache."""
    for layer in cache.layers:
        if not number or not layer.is_initialized:
            continue
        if hasattr(layer, "crop"):
            layer.crop(-number)
        else:  # a static layer before 5.23: what lies behind its length is written over
            layer.cumulative_length.sub_(number)


# --------------------------------------------------------------------------------------------------------- tokenizers
def read_tokenizers_as_they_are(model_type: str) -> None:
    """Let AutoTokenizer read the `tokenizer.json` of this model type as it stands.

    Otherwise AutoTokenizer goes by the class that `tokenizer_config.json` names. DeepSeek's tokenizers are byte-level
    under the name of Llama's, and would lose their spaces.

    Since 5.22 transformers looks into the file itself, and there is nothing to do. Before, it goes by a table of model
    types. A tokenizer with code of its own in the folder keeps that in every version.
    """
    if "deepseek_v3" in __getattr__("MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS"):
        __getattr__("TOKENIZER_MAPPING_NAMES").setdefault(model_type, "TokenizersBackend")


# ------------------------------------------------------------------------------------------------------------- experts
def gating_of(experts: nn.Module | type[nn.Module]) -> Any:
    """Return the gating of a module of experts or of its class, or `None` if transformers does not exchange them.

    The gating makes the second product's input (S, I) from the first product (S, 2I).
    """
    return getattr(experts, "_apply_gate", None)


def experts_implementation_of(config: Any) -> str | None:
    """Return the experts implementation that a model with this config computes with."""
    return config._experts_implementation


# --------------------------------------------------------------------------------------------------------- quantisers
def dtype_when_loaded(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that transformers loads a parameter in, if the model is loaded in `dtype`.

    Some models keep some parameters in float32.
    """
    for pattern, kept in model._get_dtype_plan(dtype).items():
        if re.search(re.escape(pattern).replace(r"\*", ".*"), name):
            return kept
    return model.get_parameter_or_buffer(name).dtype


__all__ = [
    "CACHE_NAMES",
    "EXPERTS_MODULE",
    "EXPERTS_TABLE",
    "QUANTIZERS_CLASS",
    "QUANTIZERS_MERGE",
    "QUANTIZERS_MODULE",
    "TRAINER_CALLBACKS",
    "TRAINER_MODULE",
    "cache_name",
    "dtype_when_loaded",
    "experts_implementation_of",
    "gating_of",
    "read_tokenizers_as_they_are",
    "remove_from_cache",
    "takes_cache",
]
