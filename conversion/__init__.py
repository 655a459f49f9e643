# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Convert, upcycle, merge and verify checkpoints and adapters as files: dialects, layouts, dtypes, dense models."""

from importlib import import_module
from typing import Any

# Imported when first used, as in the package itself: a plan of a conversion needs no model class and no PEFT.
_LAZY = {
    "adapters.layouts": ("export_adapter",),
    "converting": ("ConversionPlan", "convert", "plan_conversion"),
    "adapters.merging": ("MergeReport", "MergingError", "merge_adapter"),
    "upcycling.upcycle": (
        "UpcyclingCheck",
        "UpcyclingError",
        "UpcyclingPlan",
        "upcycle",
        "upcycle_model",
        "verify_upcycling",
    ),
    "verifying": ("VerificationError", "VerificationReport", "verify"),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "ConversionPlan",
    "MergeReport",
    "MergingError",
    "UpcyclingCheck",
    "UpcyclingError",
    "UpcyclingPlan",
    "VerificationError",
    "VerificationReport",
    "convert",
    "export_adapter",
    "merge_adapter",
    "plan_conversion",
    "upcycle",
    "upcycle_model",
    "verify",
    "verify_upcycling",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
