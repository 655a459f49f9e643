# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint conversion: from dense transformers to DeepSeekMoE, and adapters into checkpoints and other layouts."""

from .adapter_layouts import export_adapter
from .merging import MergeReport, MergingError, merge_adapter
from .upcycling import UpcyclingCheck, UpcyclingError, UpcyclingPlan, upcycle, upcycle_model, verify_upcycling

__all__ = [
    "MergeReport",
    "MergingError",
    "UpcyclingCheck",
    "UpcyclingError",
    "UpcyclingPlan",
    "export_adapter",
    "merge_adapter",
    "upcycle",
    "upcycle_model",
    "verify_upcycling",
]
