# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The router of a MoE layer: the weights and the bias, and how the config's fields become the arguments of `route`.

Shape letters: T tokens, D hidden, E routed experts.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from .configuration_deepseekmoe import DeepseekMoeConfig
from .routing import RoutingPlan, route
from .torch_support import Float32Buffers
from .transformers_support import maybe_autocast

logger = logging.get_logger(__name__)


class DeepseekMoeGate(Float32Buffers):
    """The router: one centroid per routed expert (the rows of `weight`), and for `noaux_tc` the balancing bias, a
    buffer that stays in float32: its updates are far below bfloat16's resolution."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        else:
            self.e_score_correction_bias = None

    def keep_precision(self, stored: torch.dtype | None) -> None:
        """Before a checkpoint is read: let the weight become float32 where the dtype of the model would round what is
        stored, and products are in float32 (`router_dtype`), so that a checkpoint chooses the same experts in every
        dtype. A weight that is sharded already is rounded, with a warning.

        Args:
            stored (`torch.dtype`, *optional*): of the weight in the checkpoint; `None` where it is not there.
        """
        dtype = self.weight.dtype
        if self.config.router_dtype != "float32" or stored is None or torch.promote_types(stored, dtype) == dtype:
            return
        if hasattr(self.weight, "device_mesh"):  # a DTensor
            logger.warning_once(
                f"The gates' weights are stored as {stored} and are rounded to {dtype}, because the model is sharded "
                "while it is loaded: some tokens may choose other experts. Load it with dtype=torch.float32, and "
                "train with bf16=True."
            )
            return
        self.weight = nn.Parameter(self.weight.float(), self.weight.requires_grad)

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        num_sequences: int = 1,
        statistics: bool = False,
    ) -> tuple[torch.Tensor, RoutingPlan]:
        """Route tokens.

        Args:
            hidden_states (`torch.Tensor` of shape (T, D)).
            token_mask, num_sequences, statistics: as for [`route`]; the model wants statistics in training, and in
                evaluation if `output_router_logits` is set.

        Returns:
            The raw gate logits (T, E) and the [`RoutingPlan`].
        """
        config = self.config
        if config.router_dtype == "float32":
            with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
                router_logits = F.linear(hidden_states.float(), self.weight.float())
        else:
            router_logits = F.linear(hidden_states, self.weight)
        num_groups, top_k_groups = config.gate_groups
        plan = route(
            router_logits,
            config.num_experts_per_tok,
            score_function=config.scoring_func,
            correction_bias=self.e_score_correction_bias,
            num_groups=num_groups,
            top_k_groups=top_k_groups,
            group_score="top2_sum" if config.topk_method == "noaux_tc" else "max",
            normalize=config.gate_normalizes,
            scaling_factor=config.gate_scaling_factor,
            token_mask=token_mask,
            num_sequences=num_sequences,
            statistics=statistics,
            implementation=config.router_implementation,
        )
        return router_logits, plan


__all__ = ["DeepseekMoeGate"]
