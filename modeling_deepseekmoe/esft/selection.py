# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The selection of experts to train, in the format of DeepSeek's ESFT release (arXiv 2407.01906)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..families.moe_layers import find_experts


@dataclass(frozen=True)
class ExpertSelection:
    """The experts that are trained, in the format of DeepSeek's ESFT release.

    Attributes:
        experts: for every layer the ids of its selected experts, best first.
        shared_experts: whether the shared experts are trained too.
        non_expert_modules: whether everything that is no expert is trained too.
    """

    experts: dict[int, list[int]]
    shared_experts: bool = False
    non_expert_modules: bool = False

    @classmethod
    def of(cls, selection: "str | Path | Mapping[int, Sequence[int]] | ExpertSelection") -> "ExpertSelection":
        """Make a selection from an `esft.json` or from `{layer: [ids]}`, or return one as it is.

        Raises:
            ValueError: if a file or mapping holds something else.
            OSError: if there is no such file.
        """
        if isinstance(selection, ExpertSelection):
            return selection
        if not isinstance(selection, (str, Path)):
            return cls(_layers_of(selection, "experts"))
        name = f"File {selection}"
        try:
            content = json.loads(Path(selection).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{name} is not allowed as a selection of experts: it is no JSON: {error}.") from error
        if not isinstance(content, dict) or "experts" not in content:
            raise ValueError(f"{name} is not allowed as a selection of experts: it must have an object 'experts'.")
        flags = {field: content.get(field, False) for field in ("shared_experts", "non_expert_modules")}
        for field, value in content.items():
            if field not in (*flags, "experts"):
                raise ValueError(f"{name}: the field {field!r} is not allowed: there are experts, {', '.join(flags)}.")
            if field in flags and not isinstance(value, bool):
                raise ValueError(f"{name}: {field}={value!r} is not allowed: it must be true or false.")
        return cls(_layers_of(content["experts"], name), **flags)

    def save(self, path: str | Path) -> None:
        """Write an `esft.json`."""
        content = {
            "experts": {str(layer): ids for layer, ids in self.experts.items()},
            "shared_experts": self.shared_experts,
            "non_expert_modules": self.non_expert_modules,
        }
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")

    def checked(self, model: nn.Module) -> "ExpertSelection":
        """Return the selection itself, if a model has all its experts.

        Raises:
            ValueError: for a layer or expert that the model does not have, or an expert that is named twice. The
                message names the first one. Also for an empty selection.
        """
        blocks = find_experts(model)
        for layer, ids in self.experts.items():
            if layer not in blocks:
                raise ValueError(
                    f"experts: layer {layer} is not allowed: the layers with routed experts are {sorted(blocks)}."
                )
            number = blocks[layer][1].gate_up_proj.shape[0]
            for expert in ids:
                if not 0 <= expert < number:
                    raise ValueError(
                        f"experts: expert {expert} of layer {layer} is not allowed: it must be from 0 to {number - 1}."
                    )
            if len(set(ids)) < len(ids):
                raise ValueError(f"experts: {ids} of layer {layer} is not allowed: an expert is named twice.")
        if not any(self.experts.values()):
            raise ValueError("experts: an empty selection is not allowed: at least one expert is needed.")
        return self

    def check_others(self, model: nn.Module) -> None:
        """Raise a `ValueError` if the selection names shared experts and a model has none."""
        if self.shared_experts and not any(".shared_expert" in name for name, _ in model.named_parameters()):
            raise ValueError(f"experts: shared_experts=True is not allowed: {type(model).__name__} has none.")


def _layers_of(selection: Any, name: str) -> dict[int, list[int]]:
    """Return `{layer: [ids]}` with whole numbers. JSON writes numbers as strings if they are keys."""
    if isinstance(selection, Mapping) and all(isinstance(ids, (list, tuple)) for ids in selection.values()):
        numbers = [*selection, *(expert for ids in selection.values() for expert in ids)]
        if all(isinstance(number, int) or (isinstance(number, str) and number.isdigit()) for number in numbers):
            return {int(layer): [int(expert) for expert in ids] for layer, ids in selection.items()}
    raise ValueError(
        f"{name}: {selection!r} is not allowed: it must map layers to lists of expert ids, {{1: [0, 5]}}."
    )


__all__ = ["ExpertSelection"]
