# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The tensors that the routed experts are computed from, and their gradients.

Shape letters: T tokens, D hidden, E experts, K chosen experts, I expert width, R rank of an adapter.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from .experts_gating import SILU, Gating


class Adapter(NamedTuple):
    """A product of low rank beside a projection. It adds `scale * dropout(rows) @ factor_a[i].T @ factor_b[i].T`.

    Attributes:
        factor_a (`torch.Tensor` of shape (E, R, in)): in the dtype of the stacks.
        factor_b (`torch.Tensor` of shape (E, out, R)): in the same dtype, with any strides.
        scale (`float`).
        dropout (`float`): the probability with which a number of the rows is left out.
        seed (`torch.LongTensor` of shape ()): the seed of the dropout.
    """

    factor_a: torch.Tensor
    factor_b: torch.Tensor
    scale: float = 1.0
    dropout: float = 0.0
    seed: torch.Tensor | None = None


class ExpertOperands(NamedTuple):
    """The tensors that the routed experts are computed from.

    Attributes:
        hidden (`torch.Tensor` of shape (T, D)): in the dtype of the stacks.
        expert_ids (`torch.LongTensor` of shape (T, K)): the id E stands for an expert that is elsewhere.
        weights (`torch.Tensor` of shape (T, K)): the gate's.
        gate_up, down (`torch.Tensor` or [`QuantizedStack`], of shapes (E, 2I, D) and (E, D, I)): the stacks.
        gating ([`Gating`]): what becomes of the first product.
        gate_up_adapter, down_adapter ([`Adapter`], *optional*): the adapters beside the stacks.
    """

    hidden: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    gate_up: Any
    down: Any
    gating: Gating = SILU
    gate_up_adapter: Adapter | None = None
    down_adapter: Adapter | None = None

    def apart(self) -> "ExpertOperands":
        """Take the corrections of quantised stacks out of them, and add them to the adapters beside them.

        An adapter beside a corrected stack must have no dropout.
        """
        gate_up, first = _apart(self.gate_up, self.gate_up_adapter)
        down, second = _apart(self.down, self.down_adapter)
        return self._replace(gate_up=gate_up, down=down, gate_up_adapter=first, down_adapter=second)

    def differentiable(self) -> "ExpertGradients":
        """Collect what can have a gradient. Quantised stacks and the factors of an absent adapter are `None`."""
        stacks = [stack if isinstance(stack, torch.Tensor) else None for stack in (self.gate_up, self.down)]
        factors = factors_of(self.gate_up_adapter, self.down_adapter)
        return ExpertGradients(self.hidden, self.weights, *stacks, *factors)


class ExpertGradients(NamedTuple):
    """One value for every tensor that can have a gradient: the gradient, whether it is wanted, or the tensor."""

    hidden: Any
    weights: Any
    gate_up: Any
    down: Any
    gate_up_a: Any
    gate_up_b: Any
    down_a: Any
    down_b: Any

    @property
    def of_first_product(self) -> tuple[Any, Any, Any]:
        """Values of the first product's parameters: the stack and both factors."""
        return self.gate_up, self.gate_up_a, self.gate_up_b

    @property
    def of_second_product(self) -> tuple[Any, Any, Any]:
        """Values of the second product's parameters: the stack and both factors."""
        return self.down, self.down_a, self.down_b


def factors_of(*adapters: Adapter | None) -> list[torch.Tensor | None]:
    """Return both factors of every adapter, and two `None` for an absent one."""
    return [factor for adapter in adapters for factor in ((None, None) if adapter is None else adapter[:2])]


def _apart(stack: Any, adapter: Adapter | None) -> tuple[Any, Adapter | None]:
    correction = getattr(stack, "correction", None)
    if correction is None:
        return stack, adapter
    factor_a, factor_b = (factor.to(stack.dtype) for factor in correction)
    if adapter is not None:
        assert not adapter.dropout  # the correction has none
        factor_a = torch.cat([factor_a, adapter.scale * adapter.factor_a], dim=1)
        factor_b = torch.cat([factor_b, adapter.factor_b], dim=2)
    return replace(stack, correction=None), Adapter(factor_a, factor_b)


__all__ = ["Adapter", "ExpertGradients", "ExpertOperands", "factors_of"]
