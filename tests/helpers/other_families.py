"""Tiny models of transformers' own MoE families."""

from typing import Any

import pytest
from family_models import tiny_model
from torch import nn


def family(name: str, **fields: Any) -> nn.Module:
    """A tiny model of a family, in training mode; the test is skipped if this version has no such family."""
    pytest.importorskip(f"transformers.models.{name}")
    return tiny_model(name, **fields).train()
