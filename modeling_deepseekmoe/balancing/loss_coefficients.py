# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What balance losses a model of another package is trained with, and their sum for one layer.

Shape letters: B batch, S sequence, E routed experts, K choices of a token.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..auxiliary_losses import (
    LOSS_NAMES,
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
    router_z_loss,
    sequence_balance_loss,
)
from ..families.gate_rules import GateRule
from ..routing_eager import affinities

COEFFICIENTS = ("expert", "device", "communication", "sequence", "z")


@dataclass(frozen=True)
class LossCoefficients:
    """The coefficients of the losses, and what they are computed over.

    Attributes:
        expert, device, communication, sequence, z: coefficients; 0 leaves a loss out.
        num_devices: D of the losses over devices.
        max_devices_per_token: M of the communication loss.
        sequence_wise: whether the first three are computed for each sequence, or over the batch.
    """

    expert: float = 0.0
    device: float = 0.0
    communication: float = 0.0
    sequence: float = 0.0
    z: float = 0.0
    num_devices: int = 1
    max_devices_per_token: int = 1
    sequence_wise: bool = True

    @property
    def of_losses(self) -> dict[str, float]:
        """The coefficients of the losses that are wanted, by their names."""
        return {name: getattr(self, name) for name in COEFFICIENTS if getattr(self, name)}

    def losses(
        self, rule: GateRule, logits: torch.Tensor, expert_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the losses of one layer, (5,) in the order of `LOSS_NAMES`, coefficients included.

        Args:
            rule: how the gate scores.
            logits: its logits (B, S, E).
            expert_ids: its choices (B, S, K).
            mask: nonzero for real tokens (B, S).
        """
        scores, found = affinities(logits, rule.options.score_function), {}
        common: dict[str, Any] = {"token_mask": mask, "sequence_wise": self.sequence_wise}
        if self.expert:
            found["expert"] = expert_balance_loss(scores, expert_ids, self.expert, **common)
        if self.device:
            found["device"] = device_balance_loss(scores, expert_ids, self.device, self.num_devices, **common)
        if self.communication:
            found["communication"] = communication_balance_loss(
                scores, expert_ids, self.communication, self.num_devices, self.max_devices_per_token, **common
            )
        if self.sequence:
            found["sequence"] = sequence_balance_loss(scores, expert_ids.shape[-1], self.sequence, token_mask=mask)
        if self.z:
            found["router_z"] = router_z_loss(logits, self.z, token_mask=mask)
        zero = scores.new_zeros(())
        return torch.stack([found.get(name, zero) for name in LOSS_NAMES])


__all__ = ["COEFFICIENTS", "LossCoefficients"]
