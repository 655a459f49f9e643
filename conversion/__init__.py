# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint conversion: from dense transformers to DeepSeekMoE."""

from .upcycling import UpcyclingCheck, UpcyclingError, UpcyclingPlan, upcycle, upcycle_model, verify_upcycling

__all__ = ["UpcyclingCheck", "UpcyclingError", "UpcyclingPlan", "upcycle", "upcycle_model", "verify_upcycling"]
