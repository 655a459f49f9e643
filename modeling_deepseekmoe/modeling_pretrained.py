# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The base of all models of the family: decoder layers, initialisation, checkpoints, parallel plans, recorded outputs.

Attention, norm and dense FFN are those of transformers.

Shape letters: B batch, S sequence, D hidden.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, GradientCheckpointingLayer, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from .checkpoint_layout import (
    Stored,
    check_checkpoint,
    config_of_what_is_saved,
    refuse_single_experts,
    register_checkpoint_layout,
)
from .configuration_deepseekmoe import DeepseekMoeConfig
from .experts import IMPLEMENTATION
from .moe import (
    DeepseekMoeBlock,
    DeepseekMoeExperts,
    DeepseekMoeGate,
    is_moe_block,
    tell_unquantised_experts,
)
from .mtp_files import check_mtp_tensors, copies_are_saved, patterns_to_ignore, tell_differing_copies
from .parallel_plans import expert_parallel_plan
from .remote_code import PublishedModel
from .router_load import (
    NO_RECORD,
    RoutingContext,
)
from .transformers_support import (
    CACHE_NAMES,
    DeepseekV3Attention,
    DeepseekV3MLP,
    LlamaAttention,
    LlamaRMSNorm,
    OutputRecorder,
    cache_name,
    normal_,
    takes_cache,
    zeros_,
)

ATTENTION_CLASSES: dict[str, type[nn.Module]] = {"mha": LlamaAttention, "mla": DeepseekV3Attention}
CACHE = cache_name()  # how transformers' layers, masks and outputs call it

register_checkpoint_layout()
DeepseekMoeConfig.base_model_ep_plan = expert_parallel_plan()  # here, because it takes a second to find out

# Up to so many rows, as when a batch is decoded or drafts are checked, heads of 49,152 x 576 to 129,280 x 1,024 in
# float32 were 1.4 to 4.6 times as fast on two cores with the weights on the left (torch 2.13 with MKL, AMD EPYC).
FEW_ROWS = 32


@dataclass
class DeepseekMoeModelOutput(MoeModelOutputWithPast):
    """Output of the decoder.

    Attributes:
        aux_loss (`torch.FloatTensor` of shape ()): sum of the layers' auxiliary losses, coefficients included. It is
            there in training, and in evaluation if `output_router_logits` is set.
    """

    aux_loss: torch.Tensor | None = None


class DeepseekMoeHead(nn.Linear):
    """The head, which multiplies few rows on CPUs the other way round."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute logits (..., V) of hidden states (..., D)."""
        rows = hidden_states.shape[:-1].numel()
        if not (1 < rows <= FEW_ROWS and self._multiplies_in_float32(hidden_states)):
            return super().forward(hidden_states)
        logits = (self.weight @ hidden_states.reshape(rows, -1).T).T.contiguous()
        return logits.view(*hidden_states.shape[:-1], -1)

    def _multiplies_in_float32(self, hidden_states: torch.Tensor) -> bool:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # any number of rows is to come
            return False
        tensors = (hidden_states, self.weight)
        plain = all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)
        return plain and all(one.device.type == "cpu" and one.dtype == torch.float32 for one in tensors)


class DeepseekMoeDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a MoE block or a dense FFN, each behind a norm and added to the residual stream."""

    def __init__(self, config: DeepseekMoeConfig, layer_idx: int, has_experts: bool | None = None) -> None:
        super().__init__()
        has_experts = config.is_moe_layer(layer_idx) if has_experts is None else has_experts
        self.self_attn = ATTENTION_CLASSES[config.attention_type](config=config, layer_idx=layer_idx)
        self.mlp = DeepseekMoeBlock(config) if has_experts else DeepseekV3MLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @partial(takes_cache, name=CACHE)
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        routing: RoutingContext = NO_RECORD,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """Apply the layer.

        Returns:
            The hidden states (B, S, D) and, if they were asked for, the fields of the block's [`RoutingRecord`]. The
            fields are outputs, one by one, and are not kept on the side. So the losses have a gradient under both
            modes of gradient checkpointing.
        """
        attention_output, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask, **kwargs
        )
        hidden_states = hidden_states + attention_output
        residual, hidden_states, record = hidden_states, self.post_attention_layernorm(hidden_states), None
        if is_moe_block(self.mlp):
            hidden_states, record = self.mlp(hidden_states, routing)
        else:
            hidden_states = self.mlp(hidden_states)
        return (residual + hidden_states, *(record or ()))


class DeepseekMoePreTrainedModel(PublishedModel, PreTrainedModel):
    """The base class of all models of the family: initialisation, checkpoints, parallel plans, recorded outputs."""

    config_class = DeepseekMoeConfig
    config: DeepseekMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekMoeDecoderLayer"]  # noqa: RUF012 - read, never changed; as transformers declares it
    _skip_keys_device_placement = CACHE_NAMES
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DeepseekMoeDecoderLayer,
        "attentions": [OutputRecorder(attention, index=1) for attention in ATTENTION_CLASSES.values()],
        "router_logits": OutputRecorder(DeepseekMoeGate, index=0),
    }

    def __init__(self, config: DeepseekMoeConfig, *args: Any, **kwargs: Any) -> None:
        config.check_fields()
        if config.mtp and type(self).__name__.endswith("Classification"):
            raise ValueError(f"mtp=True is not allowed for {type(self).__name__}, which predicts no tokens.")
        super().__init__(config, *args, **kwargs)
        self.look_for_mtp()

    def initialise(self, module: nn.Module) -> None:
        """Give a new module of this model its first weights, as a new model has them."""
        module.apply(self._init_weights)

    def look_for_mtp(self) -> None:
        """Tell transformers and accelerate of the multi-token-prediction layers that the config has now."""
        # Read from the checkpoint's names by transformers; what is left out is reported by `check_mtp_tensors`.
        self._keys_to_ignore_on_load_unexpected = patterns_to_ignore(self.config)
        if self.config.mtp:  # elsewhere there is no such module, which accelerate would miss
            self._no_split_modules = sorted({*self._no_split_modules, "DeepseekMoeMTPLayer"})

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the decorator in the source of the class's own module; this family has two modules.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Choose the experts implementation: this package's own unless another one is asked for.

        Raises:
            ValueError: for this package's own if another quantiser than its own has quantised the experts: those are
                modules of transformers, with implementations of their own; and for another one if its own has.
        """
        quantised = getattr(self.config, "quantization_config", None)
        own = quantised is None or getattr(quantised, "quant_method", None) == "stacked_experts"
        if requested_experts == IMPLEMENTATION and not own:
            raise ValueError(f"experts_implementation={IMPLEMENTATION!r} is not allowed for a quantised checkpoint.")
        if quantised is not None and own and requested_experts not in (None, IMPLEMENTATION):
            raise ValueError(
                f"experts_implementation={requested_experts!r} is not allowed for quantised experts: it must be "
                f"{IMPLEMENTATION!r}."
            )
        if requested_experts is None and own:
            requested_experts = IMPLEMENTATION
        return super().get_correct_experts_implementation(requested_experts)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Do as transformers does: add an adapter; see its `PeftAdapterMixin.add_adapter`.

        Raises:
            ValueError: among others if transformers wants another PEFT. The message says what works without it.
        """
        try:
            super().add_adapter(*args, **kwargs)
        except ValueError as error:
            if "version of PEFT" not in str(error):
                raise
            advice = "Call peft.get_peft_model(model, config) instead: with LoRA it works with the installed PEFT."
            raise ValueError(f"model.add_adapter is not allowed: {error}. {advice}") from error

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekMoeGate):
            normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.e_score_correction_bias is not None:
                zeros_(module.e_score_correction_bias)
        elif isinstance(module, DeepseekMoeExperts):
            normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Do as transformers does: load a model; see its `PreTrainedModel.from_pretrained`.

        Args:
            args, kwargs: transformers' own, and fields of the config, among them `mtp=True` for the
                multi-token-prediction layers of the checkpoint.

        Raises:
            ValueError: for these layers in a pipeline.
        """
        stages = getattr(kwargs.get("distributed_config"), "pp_size", None) or 1
        if stages > 1 and (kwargs.get("mtp") or getattr(kwargs.get("config"), "mtp", False)):
            raise ValueError(
                f"pp_size={stages} is not allowed with mtp=True: the multi-token-prediction layers need the embedding "
                "of the first stage and the output of the last one. Load the model without them, or spread it by "
                "tensor or by expert."
            )
        if hasattr(kwargs.get("config"), "mtp_loss_coef") and "mtp" in kwargs:  # perhaps of another copy of the code
            kwargs["config"] = deepcopy(kwargs["config"])
            kwargs["config"].mtp = kwargs.pop("mtp")
        return super().from_pretrained(*args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: "DeepseekMoePreTrainedModel",
        state_dict: dict[str, torch.Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> Any:
        """Check names and shapes before loading, because transformers would stack whatever experts it finds.

        If transformers passes `expected_keys`, the tensors are those of an adapter alone.
        """
        stored = None
        if expected_keys is not None:
            names = state_dict if state_dict is not None else Stored.of_files(checkpoint_files or ()).shapes
            refuse_single_experts(names, expected_keys)
        elif state_dict is not None:
            stored = Stored.of_state_dict(state_dict)
        elif checkpoint_files and not any(str(file).endswith(".gguf") for file in checkpoint_files):
            stored = Stored.of_files(checkpoint_files)
        if stored is not None:
            as_stored = load_config.hf_quantizer is None and not load_config.ignore_mismatched_sizes
            own = model.state_dict()
            expected = Stored.of_state_dict(own).shapes if as_stored else {}
            check_mtp_tensors(model.config, stored.shapes, own)
            check_checkpoint(model.config, stored.shapes, expected)
            if model.config.mtp and state_dict is None:
                tell_differing_copies(model.config, checkpoint_files or ())
            for name, module in model.named_modules():
                if isinstance(module, DeepseekMoeGate):
                    module.keep_precision(stored.gates.get(f"{name}.weight".removeprefix("model.")))
        result = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        quantizer = None if expected_keys is not None else load_config.hf_quantizer
        if quantizer is not None and not getattr(quantizer.quantization_config, "dequantize", False):
            tell_unquantised_experts(model)
        return result

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Do as transformers does: save the model; see its `PreTrainedModel.save_pretrained`.

        The config in the folder says what the files hold: only multi-token-prediction layers that the model has.

        Raises:
            ValueError: among others if layers were taken out, put in or exchanged, and the config says otherwise.
        """
        given = args[2] if len(args) > 2 else kwargs.get("state_dict")  # behind the folder and `is_main_process`
        with config_of_what_is_saved(self), copies_are_saved(self, given) as state_dict:
            if len(args) > 2:
                args = (*args[:2], state_dict, *args[3:])
            elif given is not None:
                kwargs["state_dict"] = state_dict
            super().save_pretrained(*args, **kwargs)

    def _loss_with_auxiliary(
        self, loss: torch.Tensor, aux_loss: torch.Tensor | None, items: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Add the auxiliary loss to the task loss, in training only.

        A trainer that passes `num_items_in_batch` does not divide by the number of accumulated micro-batches. So the
        auxiliary loss of each micro-batch is multiplied by its share of the items: its `items` over
        `num_items_in_batch`. With micro-batches of equal item counts this gives the plain mean of their auxiliary
        losses.
        """
        if not self.training or aux_loss is None:
            return loss
        return loss + (aux_loss * share_of_items(items, aux_loss.device, **kwargs)).to(loss.device)


def positions_behind(inputs_embeds: torch.Tensor, past_key_values: Cache | None) -> torch.Tensor:
    """Return the positions (1, S) of new tokens in their sequences, behind those that a cache holds."""
    past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
    return (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens).unsqueeze(0)


def share_of_items(items: torch.Tensor, device: torch.device, **kwargs: Any) -> torch.Tensor | float:
    """Return `items` of this micro-batch over a trainer's `num_items_in_batch`, or 1 without it."""
    num_items = kwargs.get("num_items_in_batch")
    return 1.0 if num_items is None else items.to(device) / torch.as_tensor(num_items, device=device)


__all__ = [
    "CACHE",
    "DeepseekMoeDecoderLayer",
    "DeepseekMoeHead",
    "DeepseekMoeModelOutput",
    "DeepseekMoePreTrainedModel",
    "positions_behind",
    "share_of_items",
]
