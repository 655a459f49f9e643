# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The names that the package takes from accelerate, the Hub's client and TRL beyond their documented interfaces.

`tests/core/test_canaries_of_others.py` states what is relied on for each.
"""

import sys
from collections.abc import Callable
from typing import Any

from huggingface_hub import CommitOperationAdd
from torch import nn

# Where TRL's trainers load a model, a reference or a teacher that is given by its path.
TRL_MODULE, TRL_LOADER = "trl.trainer.utils", "create_model_from_path"


def has_adapters(model: nn.Module) -> bool:
    """Tell whether a model has adapters of PEFT, whoever put them in. If it has, only these are saved of it.

    PEFT takes a second to import, and is not imported for this.
    """
    if "peft" not in sys.modules:
        return False
    from .peft_support import is_of_adapter

    return any(map(is_of_adapter, model.modules()))


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give a module another forward pass, inside accelerate's hooks if it has some.

    These hooks move tensors between devices, and keep what they call under another name.
    """
    setattr(module, "_old_forward" if hasattr(module, "_old_forward") else "forward", forward)


def is_left_out(addition: CommitOperationAdd) -> bool:
    """Tell whether the Hub, asked before a commit, would leave a file out of it without a word."""
    return bool(addition._should_ignore)


__all__ = ["TRL_LOADER", "TRL_MODULE", "has_adapters", "is_left_out", "replace_forward"]
