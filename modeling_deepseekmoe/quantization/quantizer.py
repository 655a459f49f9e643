# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The quantiser that transformers loads and saves models with.

Nothing heavy is imported before a model is loaded: every process has the class.
"""

import os
import weakref
from typing import Any

import torch
from torch import nn

from ..checkpoint_layout import STACKS
from ..transformers_support import HfQuantizer
from .config import StackedExpertsConfig

_NO_READING_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"  # a variable of transformers


def _set_variable(value: str | None) -> None:
    if value is None:
        os.environ.pop(_NO_READING_AHEAD, None)
    else:
        os.environ[_NO_READING_AHEAD] = value


class StackedExpertsQuantizer(HfQuantizer):
    """Quantise the routed experts of a model while it is loaded; see [`StackedExpertsConfig`]."""

    requires_calibration = False
    quantization_config: StackedExpertsConfig
    names_scales_shortly = False  # whether files call scales `.scale`, as DeepSeek-V4's do

    def __init__(self, quantization_config: StackedExpertsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.dtype = torch.bfloat16
        self.modules: set[str] = set()
        self.trains_copies = False  # of experts, which ESFT makes
        self.linears = self._quantizer_of_linears()

    def _quantizer_of_linears(self) -> Any:
        """Make bitsandbytes' own quantiser for the other linear maps, if that is asked for."""
        if self.quantization_config.linears is None:
            return None
        from transformers import BitsAndBytesConfig
        from transformers.quantizers import AutoHfQuantizer

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.quantization_config.double_quantisation,
            bnb_4bit_compute_dtype=self.quantization_config.products_in or torch.bfloat16,
        )
        return AutoHfQuantizer.from_config(config, pre_quantized=self.pre_quantized)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check that the libraries are there.

        Raises:
            ImportError: if bitsandbytes is not, and `"nf4"` is asked for.
            ValueError: if a part of the model is to stay on the disk.
        """
        from ..experts_quantized import bitsandbytes_functional

        device_map = kwargs.get("device_map")
        if "disk" in (device_map.values() if isinstance(device_map, dict) else [device_map]):
            raise ValueError(
                f"device_map={device_map!r} is not allowed with quantised experts: what is on the disk is cast when "
                "it is read. The CPU's memory is allowed."
            )
        if "nf4" in (self.quantization_config.format, self.quantization_config.linears):
            bitsandbytes_functional()
        if self.linears is not None:
            self.linears.validate_environment(*args, **kwargs)

    def _read_when_needed(self) -> None:
        """Keep transformers from reading tensors ahead: it asks a variable when it begins.

        Its threads would have read all of a file before a part of it is in its stack.
        """
        self.read_ahead_again = weakref.finalize(self, _set_variable, os.environ.get(_NO_READING_AHEAD))
        os.environ[_NO_READING_AHEAD] = "1"

    def update_device_map(self, device_map: Any) -> Any:
        """Leave the device map as it is, unless bitsandbytes asks for one."""
        return device_map if self.linears is None else self.linears.update_device_map(device_map)

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a quantised weight, its share of the scales among them."""
        from ..conversion.matrix_formats import bytes_a_weight

        config = self.quantization_config
        return bytes_a_weight(config.format, config.double_quantisation)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Tell whether a parameter is quantised while it is loaded."""
        module, _, name = param_name.rpartition(".")
        if module in self.modules:
            return name in STACKS
        return self.linears is not None and self.linears.param_needs_quantization(model, param_name, **kwargs)

    def preprocess_model(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Make a model on the meta device ready to be loaded."""
        from ..experts import IMPLEMENTATION
        from .experts import prepare_experts

        sharded = getattr(model.config, "distributed_config", None)
        if sharded is not None:
            raise ValueError(
                f"distributed_config={sharded!r} is not allowed with quantised experts: it would divide stored "
                "blocks. DDP takes them."
            )
        self.dtype = dtype or model.dtype
        if self.linears is not None:
            config = self.linears.quantization_config
            config.bnb_4bit_compute_dtype = self.quantization_config.products_in or self.dtype
            self.linears.preprocess_model(model, dtype=dtype, **{"device_map": None, **kwargs})
        self.modules = set(prepare_experts(model, self.quantization_config, self.dtype))
        super().preprocess_model(model, dtype=dtype, **kwargs)
        model.set_experts_implementation(IMPLEMENTATION)
        self.names_scales_shortly = self.pre_quantized and model.config.model_type == "deepseek_v4"

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Note what other libraries ask of a loaded model."""
        from .experts import QuantizedExperts, note_shapes

        self.read_ahead_again()
        for module in model.modules():
            if isinstance(module, QuantizedExperts):
                note_shapes(module)
        self.quantization_config.not_quantised = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)
        ]
        if self.quantization_config.format == "nf4" or self.linears is not None:
            model.is_loaded_in_4bit = True  # what PEFT and Accelerate ask; num_parameters then needs bitsandbytes
        super().postprocess_model(model, **kwargs)
        return model

    def get_quantize_ops(self) -> Any:
        """Return the operation for parameters that are quantised as a whole."""
        from .loading import QuantizeStack

        return QuantizeStack(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Let the model's converters make quantised stacks."""
        from .loading import conversions

        self._read_when_needed()
        return conversions(self, weight_conversions)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the state of a model that is to be saved, and nothing beside it."""
        from .loading import state_of

        return state_of(model), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Tell that models are saved as they are stored."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether parameters of the model itself can be trained, without adapters: the copies of experts of ESFT."""
        return self.trains_copies

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model into a graph of the GPU: for `"nf4"` the host decides on groups."""
        return self.quantization_config.format != "nf4" or not torch.cuda.is_available()

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Make the quantised parameters of a model ordinary ones again, in place."""
        from ..esft.layer import SelectedExperts
        from .experts import QuantizedExperts, dequantize_experts

        if any(isinstance(module, SelectedExperts) for module in model.modules()):
            raise ValueError("dequantize() is not allowed while ESFT trains copies of experts: call save_esft first.")
        if self.linears is not None:
            model = self.linears.dequantize(model, dtype=dtype)
        for module in model.modules():
            if isinstance(module, QuantizedExperts):
                dequantize_experts(module, dtype or self.dtype)
        vars(model).pop("is_loaded_in_4bit", None)
        self.remove_quantization_config(model)
        return model


__all__ = ["StackedExpertsQuantizer"]
