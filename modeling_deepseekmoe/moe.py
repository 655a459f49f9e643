# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The MoE layer: the gate, the stacked routed experts, and the block that adds the shared experts.

Shape letters: B batch, S sequence, T = B * S tokens, D hidden, E routed experts, K chosen experts, I expert width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .auxiliary_losses import auxiliary_losses
from .checkpoint_layout import stack_expert_tensors
from .configuration_deepseekmoe import DeepseekMoeConfig
from .router_load import NO_RECORD, RoutingContext, RoutingRecord, sum_of_entropies
from .routing import Routing, choose_experts
from .routing_eager import affinities
from .routing_options import RoutingOptions
from .token_dropping import drop_tokens
from .torch_support import Float32Buffers
from .transformers_support import ACT2FN, DeepseekV3MLP, maybe_autocast, use_experts_implementation

logger = logging.get_logger(__name__)


class DeepseekMoeGate(Float32Buffers):
    """The gate: one centroid per routed expert (the rows of `weight`), and for `noaux_tc` the balancing bias.

    The bias is a buffer that stays in float32: its updates are far below bfloat16's resolution.
    """

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        else:
            self.e_score_correction_bias = None

    def keep_precision(self, stored: torch.dtype | None) -> None:
        """Make the weight float32 before a checkpoint is read, if the model's dtype would round what is stored.

        This holds where products are in float32 (`router_dtype`): a checkpoint then chooses the same experts in every
        dtype. A weight that is sharded already is rounded, with a warning.

        Args:
            stored (`torch.dtype`, *optional*): dtype of the weight in the checkpoint; `None` if it is not there.
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
    ) -> tuple[torch.Tensor, Routing]:
        """Route tokens.

        Args:
            hidden_states (`torch.Tensor` of shape (T, D)).
            token_mask, num_sequences, statistics: as for [`choose_experts`]. The model wants statistics in training,
                and in evaluation if `output_router_logits` is set.

        Returns:
            The raw gate logits (T, E) and the [`Routing`].
        """
        config = self.config
        if config.router_dtype == "float32":
            with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
                router_logits = F.linear(hidden_states.float(), self.weight.float())
        else:
            router_logits = F.linear(hidden_states, self.weight)
        routing = choose_experts(
            router_logits,
            self.options,
            correction_bias=self.e_score_correction_bias,
            token_mask=token_mask,
            num_sequences=num_sequences,
            statistics=statistics,
        )
        return router_logits, routing

    @property
    def options(self) -> RoutingOptions:
        """The options by which this gate chooses, from the fields of the config as they are now."""
        config = self.config
        num_groups, top_k_groups = config.gate_groups
        return RoutingOptions(
            top_k=config.num_experts_per_tok,
            score_function=config.scoring_func,
            num_groups=num_groups,
            top_k_groups=top_k_groups,
            group_score="top2_sum" if config.topk_method == "noaux_tc" else "max",
            normalize=config.gate_normalizes,
            scaling_factor=config.gate_scaling_factor,
            implementation=config.router_implementation,
        )


@use_experts_implementation
class DeepseekMoeExperts(nn.Module):
    """The routed experts, stacked: `gate_up_proj` (E, 2I, D) and `down_proj` (E, D, I).

    The forward pass of this class is the `"eager"` implementation. The default is
    `experts_implementation="deepseekmoe"`, in `experts`.
    """

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]
        self.register_load_state_dict_pre_hook(stack_expert_tensors)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states (`torch.Tensor` of shape (T, D)).
            top_k_index (`torch.LongTensor` of shape (T, K)): expert ids. The id E stands for an expert that another
                rank of an expert-parallel group holds, and is passed over.
            top_k_weights (`torch.Tensor` of shape (T, K)).

        Returns:
            `torch.Tensor` of shape (T, D), in the dtype of `hidden_states`.

        Raises:
            ValueError: under `torch.jit.trace` and `torch.export`, which would keep the choices of the example for
                every input.
        """
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise ValueError(
                "experts_implementation='eager' is not allowed under torch.jit.trace, nor under torch.export, which "
                "would record the experts of the example alone: choose 'deepseekmoe', 'grouped_mm' or 'batched_mm'."
            )
        output = torch.zeros_like(hidden_states)
        expert_ids, weights = top_k_index.flatten(), top_k_weights.flatten().unsqueeze(-1)
        order = expert_ids.argsort(stable=True)
        counts = torch.bincount(expert_ids, minlength=self.num_experts + 1).tolist()
        # unbind() once, since indexing a stacked parameter E times makes E gradients of the whole stack.
        experts = zip(order.split(counts), self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=False)
        for slots, gate_up_proj, down_proj in experts:
            if len(slots) == 0:
                continue
            tokens = slots // top_k_index.shape[-1]
            gate, up = F.linear(hidden_states[tokens], gate_up_proj).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, down_proj) * weights[slots]
            output.index_add_(0, tokens, expert_output.to(output.dtype))
        return output


class DeepseekMoeBlock(nn.Module):
    """Routed experts plus shared experts (arXiv 2401.06066, eq. 9, without the residual)."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = DeepseekMoeGate(config)
        self.experts = DeepseekMoeExperts(config)
        self.shared_experts = (
            DeepseekV3MLP(config, config.shared_intermediate_size) if config.shared_intermediate_size else None
        )

    def forward(
        self, hidden_states: torch.Tensor, context: RoutingContext = NO_RECORD
    ) -> tuple[torch.Tensor, RoutingRecord | None]:
        """Apply the block.

        Args:
            hidden_states (`torch.Tensor` of shape (B, S, D)).
            context ([`RoutingContext`]): padding, and what is wanted beside the output.

        Returns:
            The output (B, S, D), and the [`RoutingRecord`] if the context asks for it.
        """
        tokens, mask = hidden_states.flatten(0, 1), context.token_mask
        mask = None if mask is None else mask.flatten()
        router_logits, routing = self.gate(tokens, mask, len(hidden_states) or 1, context.record)
        weights, dropped, entropy = routing.weights, None, None
        capacity_factor = self.config.token_drop_capacity_factor
        if self.training and capacity_factor is not None:
            weights, dropped = self._drop_tokens(router_logits, routing, capacity_factor, mask, context.protected)
        output = self.experts(tokens, routing.expert_ids, weights).view_as(hidden_states)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)
        if not context.record:
            return output, None
        if context.measure_entropy:
            entropy = sum_of_entropies(affinities(router_logits.detach(), self.config.scoring_func), mask)
        logits = router_logits.view(*hidden_states.shape[:2], -1)
        losses = auxiliary_losses(self.config, logits, routing, context.token_mask)
        return output, RoutingRecord(losses, routing.tokens_per_expert, dropped, entropy)

    def _drop_tokens(
        self,
        router_logits: torch.Tensor,
        routing: Routing,
        capacity_factor: float,
        token_mask: torch.Tensor | None,
        protected: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if protected is not None:
            protected = protected.repeat_interleave(len(routing.expert_ids) // len(protected))
        scores, devices = affinities(router_logits.detach(), self.config.scoring_func), self.config.device_groups[0]
        return drop_tokens(routing, scores, devices, capacity_factor, token_mask=token_mask, protected=protected)


def is_moe_block(module: nn.Module) -> bool:
    """Tell whether a layer's `mlp` is a MoE block, perhaps inside a wrapper: PEFT's copies, FSDP, compiled modules."""
    return hasattr(module, "experts")


def moe_layers_of(layers: nn.ModuleList, config: DeepseekMoeConfig) -> tuple[int, ...]:
    """Return the indices (from 0) of the decoder layers with routed experts, whatever was done to the list.

    A module that is no decoder layer stands for one that another pipeline stage holds. It counts by the config.
    """
    return tuple(
        idx
        for idx, layer in enumerate(layers)
        if (is_moe_block(layer.mlp) if hasattr(layer, "mlp") else config.is_moe_layer(idx))
    )


def tell_unquantised_experts(model: PreTrainedModel) -> None:
    """Warn if a quantiser that was asked for has left out the routed experts.

    Most quantisers do: they look for modules of type `nn.Linear`.
    """
    blocks = [module for module in model.modules() if type(module) is DeepseekMoeExperts]
    stacks = [stack for experts in blocks for stack in experts.parameters()]
    left = [stack for stack in stacks if stack.is_floating_point() and stack.element_size() > 1]
    if left:
        for experts in blocks:
            experts.left_unquantised = left[0].dtype
        logger.warning(
            f"The routed experts are NOT quantised: {sum(stack.nbytes for stack in left) / 1e6:,.2f} of the "
            f"{model.get_memory_footprint() / 1e6:,.2f} MB of this model are experts in {left[0].dtype}. The "
            "quantiser takes modules of type nn.Linear, and the experts are stacked: "
            "quantization_config=StackedExpertsConfig(linears='nf4') quantises both."
        )


def tell_widened_experts(decoder: nn.Module) -> None:
    """Warn once if experts that a quantiser has left out have become float32.

    PEFT's `prepare_model_for_kbit_training` does that to everything that is not quantised.
    """
    if getattr(decoder.config, "quantization_config", None) is None or torch.compiler.is_compiling():
        return
    for module in decoder.modules():
        before = getattr(module, "left_unquantised", torch.float32)
        if before != torch.float32 and module.gate_up_proj.dtype == torch.float32:
            logger.warning_once(
                f"The routed experts were loaded in {before} and are float32 now, twice the memory: PEFT's "
                "prepare_model_for_kbit_training widens what is not quantised. Leave it out: get_peft_model freezes "
                "the base, and model.enable_input_require_grads() serves gradient checkpointing."
            )
            return


__all__ = [
    "DeepseekMoeBlock",
    "DeepseekMoeExperts",
    "DeepseekMoeGate",
    "is_moe_block",
    "moe_layers_of",
    "tell_unquantised_experts",
    "tell_widened_experts",
]
