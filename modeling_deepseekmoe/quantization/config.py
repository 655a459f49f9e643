# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The config of the quantiser of stacked experts."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from ..experts_quantized import FORMATS
from ..transformers_support import QuantizationConfigMixin

QUANT_METHOD = "stacked_experts"
_FP8_METHOD = "fp8"  # what DeepSeek-V3's own config says, and every reader of its files knows
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FIELDS = ("format", "double_quantisation", "skip_layers", "compute_dtype", "linears")


class StackedExpertsConfig(QuantizationConfigMixin):
    """Say how the routed experts of a model are stored, for `from_pretrained(..., quantization_config=...)`.

    The experts alone are quantised, and stay frozen; adapters and ESFT train beside them. All other parameters are
    loaded as without it. Files that are quantised keep their bytes, if they are in the same format.

    Args:
        format (`str`): `"nf4"` (0.516 bytes a weight; needs bitsandbytes), `"fp8"` (1.000, DeepSeek-V3's blocks) or
            `"mxfp4"` (0.531, as DeepSeek-V4's experts).
        double_quantisation (`bool`): quantise the scales of `"nf4"` too. Without it a weight takes 0.563 bytes.
        skip_layers (`Sequence[int]`): indices of decoder layers whose experts are left as they are.
        compute_dtype (`str` or `torch.dtype`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`, the dtype of the
            experts' products; by default that of the model.
        linears (`str`, *optional*): `"nf4"` hands all other linear maps but the head to bitsandbytes' `Linear4bit`.

    Raises:
        ValueError: for a field or a value that is not allowed.
    """

    def __init__(
        self,
        format: str = "nf4",
        double_quantisation: bool = True,
        skip_layers: Sequence[int] = (),
        compute_dtype: str | torch.dtype | None = None,
        linears: str | None = None,
        **others: Any,
    ) -> None:
        method = others.pop("quant_method", QUANT_METHOD)
        if others or method != QUANT_METHOD:
            unknown = ", ".join(others) or f"quant_method={method!r}"
            raise ValueError(
                f"{unknown} is not allowed in a StackedExpertsConfig: its fields are {', '.join(_FIELDS)}."
            )
        _check("format", format, FORMATS)
        _check("linears", linears, (None, "nf4"))
        _check("double_quantisation", double_quantisation, (True, False))
        if isinstance(compute_dtype, torch.dtype):
            compute_dtype = str(compute_dtype).removeprefix("torch.")
        _check("compute_dtype", compute_dtype, (None, *_DTYPES))
        layers = list(skip_layers) if not isinstance(skip_layers, str) else [skip_layers]
        if any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in layers):
            raise ValueError(f"skip_layers={skip_layers!r} is not allowed: indices of decoder layers, from 0 on.")
        self.quant_method = QUANT_METHOD
        self.format, self.double_quantisation, self.skip_layers = format, double_quantisation, sorted(set(layers))
        self.compute_dtype, self.linears = compute_dtype, linears
        self.not_quantised: list[str] = []  # names of other linear maps, once a model is known
        self.reads_others = False  # whether the files hold other matrices quantised too

    @property
    def products_in(self) -> torch.dtype | None:
        """The dtype of the products, or `None` for that of the model."""
        return None if self.compute_dtype is None else _DTYPES[self.compute_dtype]

    def to_dict(self) -> dict[str, Any]:
        """Return what stands in a `config.json`.

        FP8 files are described as DeepSeek-V3's own are, so that other readers know them too.
        """
        fields = {name: copy.copy(getattr(self, name)) for name in _FIELDS}
        if self.format != "fp8":
            return {"quant_method": QUANT_METHOD, **fields}
        return {
            "quant_method": _FP8_METHOD,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": list(self.not_quantised),
            QUANT_METHOD: fields,
        }

    @classmethod
    def of_file(cls, stored: dict[str, Any]) -> "StackedExpertsConfig | None":
        """Read what [`to_dict`] has written; `None` if another quantiser has written it."""
        if QUANT_METHOD in stored:
            return cls(**stored[QUANT_METHOD])
        return cls(**stored) if stored.get("quant_method") == QUANT_METHOD else None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read what [`to_dict`] has written; see `QuantizationConfigMixin.from_dict`."""
        made = cls.of_file(config_dict) or cls(**config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    def over(self, stored: Any) -> "StackedExpertsConfig":
        """Return the config for files that are quantised already.

        Args:
            stored: the `quantization_config` of their `config.json`.

        Raises:
            ValueError: if these files are not in the format that was asked for, or cannot be read.
        """
        if isinstance(stored, dict):
            stored = self.of_file(stored) or stored
        if isinstance(stored, StackedExpertsConfig):
            of_scales = ("double_quantisation",) if self.format == "nf4" else ()
            for name in ("format", *of_scales, "skip_layers", "linears"):
                if getattr(stored, name) != getattr(self, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is not allowed: the experts of these files are stored with "
                        f"{name}={getattr(stored, name)!r}. `deepseekmoe convert` writes another format."
                    )
            return self
        if self.linears is not None:
            raise ValueError(
                f"linears={self.linears!r} is not allowed with files that are quantised: their other matrices become "
                "those of the model's dtype."
            )
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        made = copy.deepcopy(self)
        made.reads_others = True
        method, block = stored.get("quant_method"), stored.get("weight_block_size")
        is_nf4 = stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_type") == "nf4"
        if not is_nf4 and (method != _FP8_METHOD or (block is not None and list(block) != [128, 128])):
            raise ValueError(
                f"quantization_config={stored!r} of these files is not allowed with a StackedExpertsConfig: it reads "
                "fp8 in blocks of 128 x 128 (with experts in mxfp4 or not) and bitsandbytes' nf4."
            )
        return made


def _check(field: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is not allowed: one of {', '.join(map(repr, allowed))}.")


__all__ = ["QUANT_METHOD", "StackedExpertsConfig"]
