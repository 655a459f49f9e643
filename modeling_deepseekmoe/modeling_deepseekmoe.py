# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The DeepSeekMoE model family.

Attention, norm, rotary embedding, dense FFN, masks, cache and losses are those of transformers. What is ours is the
MoE: the gate, the stacked routed experts, the block that adds the shared experts, and the auxiliary loss on its way
from the block to `outputs.loss`.

Shape letters: B batch, S sequence, T = B * S tokens, D hidden, E routed experts, K chosen experts, I expert width.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, GradientCheckpointingLayer, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .checkpoint_layout import (
    Stored,
    check_checkpoint,
    check_number_of_layers,
    config_of_what_is_saved,
    mtp_layers,
    refuse_single_experts,
    register_checkpoint_layout,
    report_lost_adapters,
)
from .configuration_deepseekmoe import DeepseekMoeConfig
from .configuration_dialects import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from .experts import IMPLEMENTATION
from .moe import (
    DeepseekMoeBlock,
    DeepseekMoeExperts,
    DeepseekMoeGate,
    is_moe_block,
    moe_layers_of,
    tell_unquantised_experts,
    tell_widened_experts,
)
from .parallel_plans import expert_parallel_plan
from .remote_code import PublishedModel
from .router_load import (
    NO_RECORD,
    RouterLoadCounter,
    RoutingContext,
    RoutingRecord,
    counts_as_training,
    load_of_records,
    remind_while_training,
    sum_of_losses,
    token_mask_of,
)
from .transformers_support import (
    CACHE_NAMES,
    DeepseekV3Attention,
    DeepseekV3MLP,
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    OutputRecorder,
    TransformersKwargs,
    Unpack,
    cache_name,
    can_return_tuple,
    capture_outputs,
    create_causal_mask,
    merge_with_config_defaults,
    normal_,
    takes_cache,
    zeros_,
)
from .trl_forward import keep_auxiliary_loss
from .untested_versions import check_cached_generation, refuse_prompt_learning

ATTENTION_CLASSES: dict[str, type[nn.Module]] = {"mha": LlamaAttention, "mla": DeepseekV3Attention}
CACHE = cache_name()  # how transformers' layers, masks and outputs call it

register_checkpoint_layout()
DeepseekMoeConfig.base_model_ep_plan = expert_parallel_plan()  # here, because it takes a second to find out


@dataclass
class DeepseekMoeModelOutput(MoeModelOutputWithPast):
    """Output of the decoder.

    Attributes:
        aux_loss (`torch.FloatTensor` of shape ()): sum of the layers' auxiliary losses, coefficients included; in
            training, and in evaluation if `output_router_logits` is set.
    """

    aux_loss: torch.Tensor | None = None


class DeepseekMoeDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a MoE block or a dense FFN, each behind a norm and added to the residual stream."""

    def __init__(self, config: DeepseekMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = ATTENTION_CLASSES[config.attention_type](config=config, layer_idx=layer_idx)
        self.mlp = DeepseekMoeBlock(config) if config.is_moe_layer(layer_idx) else DeepseekV3MLP(config)
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
        """Apply the layer; returns the hidden states (B, S, D) and, where they were asked for, the fields of the
        block's [`RoutingRecord`]. They are outputs, one by one, and not something kept on the side, so that the
        losses have a gradient under both modes of gradient checkpointing."""
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
    """What all models of the family share: initialisation, checkpoints, parallel plans, recorded outputs."""

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
        super().__init__(config, *args, **kwargs)
        # Read from the checkpoint's names by transformers; what is left out is reported by `check_checkpoint`.
        self._keys_to_ignore_on_load_unexpected = [rf"(^|\.)layers\.{idx}\." for idx in mtp_layers(config)]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the decorator in the source of the class's own module; this family has two modules.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The experts implementation to use: this package's own unless another one is asked for.

        Raises:
            ValueError: for this package's own where the experts are quantised: those are modules of transformers, with
                implementations of their own.
        """
        quantised = getattr(self.config, "quantization_config", None) is not None
        if requested_experts == IMPLEMENTATION and quantised:
            raise ValueError(f"experts_implementation={IMPLEMENTATION!r} is not allowed for a quantised checkpoint.")
        if requested_experts is None and not quantised:
            requested_experts = IMPLEMENTATION
        return super().get_correct_experts_implementation(requested_experts)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as transformers does; see its `PeftAdapterMixin.add_adapter`.

        Raises:
            ValueError: among others where transformers wants another PEFT; the message says what works without it.
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

    @staticmethod
    def _load_pretrained_model(
        model: "DeepseekMoePreTrainedModel",
        state_dict: dict[str, torch.Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> Any:
        """Check names and shapes first: transformers would stack whatever experts it finds. Where it says itself what
        it expects, these are the tensors of an adapter alone."""
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
            expected = Stored.of_state_dict(model.state_dict()).shapes if as_stored else {}
            check_checkpoint(model.config, stored.shapes, expected)
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
        """Save the model as transformers does; see its `PreTrainedModel.save_pretrained`. The config in the folder
        says what the files hold: no multi-token-prediction layers.

        Raises:
            ValueError: among others where layers were taken out, put in or exchanged, and the config says otherwise.
        """
        with config_of_what_is_saved(self):
            super().save_pretrained(*args, **kwargs)

    def _loss_with_auxiliary(
        self, loss: torch.Tensor, aux_loss: torch.Tensor | None, items: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Add the auxiliary loss to the task loss, in training only.

        A trainer that passes `num_items_in_batch` does not divide by the number of accumulated micro-batches, so the
        auxiliary loss of each one counts by its share of the items: `items` of this micro-batch over
        `num_items_in_batch`. With micro-batches of equal item counts this is their plain mean.
        """
        if not self.training or aux_loss is None:
            return loss
        return loss + (aux_loss * share_of_items(items, aux_loss.device, **kwargs)).to(loss.device)


def share_of_items(items: torch.Tensor, device: torch.device, **kwargs: Any) -> torch.Tensor | float:
    """`items` of this micro-batch over a trainer's `num_items_in_batch`; 1 without it."""
    num_items = kwargs.get("num_items_in_batch")
    return 1.0 if num_items is None else items.to(device) / torch.as_tensor(num_items, device=device)


class DeepseekMoeModel(DeepseekMoePreTrainedModel):
    """The decoder: token embedding, decoder layers, final norm."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        padding_idx = None if (self.padding_idx or 0) < 0 else self.padding_idx  # torch would count from the end
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx)
        self.layers = nn.ModuleList(DeepseekMoeDecoderLayer(config, idx) for idx in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.router_load = RouterLoadCounter(config.moe_layers, config.n_routed_experts or 0)
        self.register_load_state_dict_pre_hook(report_lost_adapters)
        self._remind_while_training()
        self.post_init()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._remind_while_training()  # a copy is another model

    def _remind_while_training(self) -> None:
        if self.moe_layers:
            remind_while_training(self, balanced_by_bias=self.config.topk_method == "noaux_tc")

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DeepseekMoeModelOutput:
        """Run the decoder.

        Args:
            input_ids (`torch.LongTensor` of shape (B, S), *optional*): token ids; these or `inputs_embeds`.
            attention_mask (`torch.Tensor`, *optional*): (B, past + S), 0 for padding; or a prepared 4-D mask, which
                says nothing about padding, so that the auxiliary loss then counts every token.
            position_ids (`torch.LongTensor` of shape (B, S), *optional*).
            past_key_values (`Cache`, *optional*): keys and values of earlier tokens; `cache` is the same argument,
                under transformers' name for it since 5.24.
            inputs_embeds (`torch.FloatTensor` of shape (B, S, D), *optional*).
            use_cache (`bool`, *optional*).
            kwargs: among others `output_hidden_states`, `output_attentions`, `output_router_logits`.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given, or for a mask of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: exactly one of them must be given.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        token_mask = token_mask_of(attention_mask, inputs_embeds.shape[:2], cached=past_key_values is not None)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = positions.unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: past_key_values},
        )
        if self.training:
            check_number_of_layers(self)
        routing = self._routing_context(token_mask, inputs_embeds, kwargs.get("output_router_logits"))
        hidden_states, records = inputs_embeds, {}
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        # Not all of them while transformers lets the first layers draft for the whole model.
        for layer_idx, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            outputs = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                routing=routing,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **{CACHE: past_key_values, **kwargs},
            )
            # A layer that another pipeline stage holds hands on the hidden states alone.
            hidden_states, *record = outputs if isinstance(outputs, tuple) else (outputs,)
            if record:
                records[layer_idx] = RoutingRecord(*record)
        aux_loss = sum_of_losses(records, hidden_states.device) if routing.record else None
        if records and counts_as_training(self):
            layers = self.moe_layers
            load = load_of_records(records, layers, routing.token_mask, inputs_embeds.shape[:2].numel())
            self.router_load.add(load, layers)
            tell_widened_experts(self)
            if self.config.loss_alphas:
                self.router_load.watch(aux_loss)
        return DeepseekMoeModelOutput(
            last_hidden_state=self.norm(hidden_states), aux_loss=aux_loss, **{CACHE: past_key_values}
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Places of the layers with routed experts: those of the config, unless layers were taken out or put in."""
        return moe_layers_of(self.layers, self.config)

    def _routing_context(
        self, token_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, output_router_logits: bool | None
    ) -> RoutingContext:
        config, protected = self.config, None
        if self.training and config.moe_layers:
            config.check_device_groups()
        if self.training and config.token_drop_capacity_factor is not None:
            # Drawn once for all layers, so that a recomputed layer drops the same tokens.
            protected = torch.rand(len(inputs_embeds), device=inputs_embeds.device) < config.token_drop_protected_share
        wants_router_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        return RoutingContext(
            token_mask=token_mask,
            protected=protected,
            record=bool(self.training or wants_router_logits),
            measure_entropy=self.training and self.router_load.measure_entropy,
        )


class DeepseekMoeForCausalLM(DeepseekMoePreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head.

    In training `outputs.loss` is the cross entropy plus the auxiliary loss, and `outputs.aux_loss` the latter alone,
    coefficient included; in evaluation `outputs.loss` is the cross entropy alone. Under gradient accumulation with
    `num_items_in_batch` the auxiliary loss of a micro-batch counts by its share of the items.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__(config)
        self.model = DeepseekMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        # The head by tensor, by stage and by FSDP group, beside what the config has for the decoder.
        self.tp_plan["lm_head"] = "colwise_gather_output"
        self.pp_plan["lm_head"] = (["hidden_states"], ["logits"])
        self.fsdp_plan["lm_head"] = "keep_full_weight"

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, keep_auxiliary_loss(value, self) if name == "forward" else value)

    @partial(takes_cache, name=CACHE)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens; see transformers' `GenerationMixin.generate`. A cache may be given under both of its names.
        With a version of transformers that is not tested yet, the first call of a process checks the use of caches."""
        refuse_prompt_learning(self)
        check_cached_generation(self, *args, *kwargs.values())
        return super().generate(*args, **kwargs)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """Predict the next tokens; arguments as for [`DeepseekMoeModel`], and:

        Args:
            labels (`torch.LongTensor` of shape (B, S), *optional*): token ids, -100 where there is no loss; shifted
                inside.
            logits_to_keep (`int` or `torch.Tensor`): compute only the last logits (0: all), or those at these indices.
            kwargs: `num_items_in_batch` and `shift_labels` go to the loss.

        Returns:
            `MoeCausalLMOutputWithPast`; `router_logits` holds the raw gate logits (T, E) of every MoE layer.
        """
        outputs: DeepseekMoeModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            targets = kwargs.get("shift_labels")
            targets = labels[..., 1:] if targets is None else targets
            loss = self._loss_with_auxiliary(loss, outputs.aux_loss, (targets != -100).sum(), **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: getattr(outputs, CACHE)},
        )


# ------------------------------------------------------------------------------------------------------------ dialects
# The official generations: the same modules under the official class names, so that a checkpoint is saved under the
# model type and architecture it was loaded from.
class DeepseekModel(DeepseekMoeModel):
    """The decoder of the first generation, `model_type: deepseek`."""

    config_class = DeepseekConfig
    config: DeepseekConfig


class DeepseekForCausalLM(DeepseekMoeForCausalLM):
    """The language model of the first generation, `model_type: deepseek`."""

    config_class = DeepseekConfig
    config: DeepseekConfig


class DeepseekV2Model(DeepseekMoeModel):
    """The decoder of the second generation, `model_type: deepseek_v2`."""

    config_class = DeepseekV2Config
    config: DeepseekV2Config


class DeepseekV2ForCausalLM(DeepseekMoeForCausalLM):
    """The language model of the second generation, `model_type: deepseek_v2`."""

    config_class = DeepseekV2Config
    config: DeepseekV2Config


class DeepseekV3Model(DeepseekMoeModel):
    """The decoder of the third generation, `model_type: deepseek_v3`."""

    config_class = DeepseekV3Config
    config: DeepseekV3Config


class DeepseekV3ForCausalLM(DeepseekMoeForCausalLM):
    """The language model of the third generation, `model_type: deepseek_v3`."""

    config_class = DeepseekV3Config
    config: DeepseekV3Config


__all__ = [
    "DeepseekForCausalLM",
    "DeepseekModel",
    "DeepseekMoeBlock",
    "DeepseekMoeExperts",
    "DeepseekMoeForCausalLM",
    "DeepseekMoeModel",
    "DeepseekMoeModelOutput",
    "DeepseekMoePreTrainedModel",
    "DeepseekV2ForCausalLM",
    "DeepseekV2Model",
    "DeepseekV3ForCausalLM",
    "DeepseekV3Model",
]
