# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The DeepSeekMoE decoder and language model, under the class names of every generation.

Attention, norm, rotary embedding, dense FFN, masks, cache and losses are those of transformers. This package adds the
MoE: the gate, the stacked routed experts, the block that adds the shared experts, and the auxiliary loss on its way
from the block to `outputs.loss`.

Shape letters: B batch, S sequence, T = B * S tokens, D hidden, E routed experts, K chosen experts, I expert width.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin

from .checkpoint_layout import (
    check_number_of_layers,
    report_lost_adapters,
)
from .configuration_deepseekmoe import DeepseekMoeConfig
from .configuration_dialects import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from .modeling_pretrained import (
    CACHE,
    DeepseekMoeDecoderLayer,
    DeepseekMoeHead,
    DeepseekMoeModelOutput,
    DeepseekMoePreTrainedModel,
    positions_behind,
)
from .moe import (
    moe_layers_of,
    tell_widened_experts,
)
from .mtp import DeepseekMoeMTPLayer, Depth, RowLayout, cut_off, is_mtp_layer, mtp_layers_of, run_depths
from .mtp_files import forget_copies
from .mtp_generation import generation_arguments
from .mtp_training import (
    DeepseekMoeCausalLMOutput,
    MtpStatistics,
    losses_ahead,
    shifted_labels,
    starts_a_sequence,
)
from .reminders import Reminders
from .router_load import (
    RouterLoadCounter,
    RoutingContext,
    RoutingRecord,
    counts_as_training,
    load_of_records,
    sum_of_losses,
    token_mask_of,
)
from .transformers_support import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    TransformersKwargs,
    Unpack,
    can_return_tuple,
    capture_outputs,
    create_causal_mask,
    merge_with_config_defaults,
    takes_cache,
)
from .trl_forward import keep_auxiliary_loss
from .untested_versions import check_cached_generation, refuse_prompt_learning


class DeepseekMoeModel(DeepseekMoePreTrainedModel):
    """The decoder: token embedding, decoder layers, final norm."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        padding_idx = None if (self.padding_idx or 0) < 0 else self.padding_idx  # torch would count from the end
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx)
        self.layers = nn.ModuleList(DeepseekMoeDecoderLayer(config, idx) for idx in range(config.num_hidden_layers))
        # Those of multi-token prediction stand behind them, as in the released checkpoints, and do not run with them.
        depths = config.num_nextn_predict_layers if config.mtp else 0
        self.layers.extend(DeepseekMoeMTPLayer(config, depth) for depth in range(1, depths + 1))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.router_load = RouterLoadCounter(self.moe_layers, config.n_routed_experts or 0)
        self.reminders = Reminders()
        self.mtp_statistics = MtpStatistics()
        self.register_load_state_dict_pre_hook(report_lost_adapters)
        self.post_init()

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
            attention_mask (`torch.Tensor`, *optional*): (B, past + S), 0 for padding; or a prepared 4-D mask. That
                says nothing about padding: the auxiliary loss then counts every token.
            position_ids (`torch.LongTensor` of shape (B, S), *optional*): positions in the sequence.
            past_key_values (`Cache`, *optional*): cache of earlier tokens, named `cache` since transformers 5.24.
            inputs_embeds (`torch.FloatTensor` of shape (B, S, D), *optional*): embeddings in place of ids.
            use_cache (`bool`, *optional*): whether to return keys and values.
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
            position_ids = positions_behind(inputs_embeds, past_key_values)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: past_key_values},
        )
        routing = self.routing_context(token_mask, inputs_embeds, kwargs.get("output_router_logits"))
        hidden_states, records = self._run_layers(
            inputs_embeds,
            attention_mask=causal_mask,
            routing=routing,
            position_ids=position_ids,
            use_cache=use_cache,
            position_embeddings=self.rotary_emb(inputs_embeds, position_ids),
            **{CACHE: past_key_values, **kwargs},
        )
        aux_loss = sum_of_losses(records, hidden_states.device) if routing.record else None
        if counts_as_training(self):
            self._note_training(records, routing, aux_loss, hidden_states)
        return DeepseekMoeModelOutput(
            last_hidden_state=self.norm(hidden_states), aux_loss=aux_loss, **{CACHE: past_key_values}
        )

    def _run_layers(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, dict[int, RoutingRecord]]:
        """Run all decoder layers, one after the other, and collect the records of the MoE layers by their indices."""
        records = {}
        # Not all of them while transformers lets the first layers draft for the whole model.
        for layer_idx, decoder_layer in enumerate(self.decoder_layers[: self.config.num_hidden_layers]):
            outputs = decoder_layer(hidden_states, **kwargs)
            # A layer that another pipeline stage holds hands on the hidden states alone.
            hidden_states, *record = outputs if isinstance(outputs, tuple) else (outputs,)
            if record:
                records[layer_idx] = RoutingRecord(*record)
        return hidden_states, records

    def _note_training(
        self,
        records: dict[int, RoutingRecord],
        routing: RoutingContext,
        aux_loss: torch.Tensor | None,
        hidden_states: torch.Tensor,
    ) -> None:
        """Count what the gates did, and say what is missing in training."""
        self.reminders.remind_of_mtp(self, mtp_layers_of(self))
        if not records:
            return
        self.reminders.remind(self)
        self._count(records, routing.token_mask, hidden_states.shape[:2].numel())
        if self.config.loss_alphas and aux_loss is not None:
            self.router_load.watch(aux_loss, hidden_states)

    def _count(self, records: dict[int, RoutingRecord], token_mask: torch.Tensor | None, num_tokens: int) -> None:
        """Count what the gates did with a micro-batch of training."""
        layers = self.moe_layers
        self.router_load.add(load_of_records(records, layers, token_mask, num_tokens), layers)
        tell_widened_experts(self)

    def predict_ahead(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        detach: bool | None = None,
        **kwargs: Any,
    ) -> tuple[list[Depth], RowLayout]:
        """Run the layers of multi-token prediction over whole sequences, as in training.

        Args:
            hidden_states (`torch.Tensor` of shape (B, S, D)): the decoder's output.
            input_ids, attention_mask, position_ids, inputs_embeds, kwargs: as the decoder was given them.
            detach (`bool`, *optional*): no gradient in what the decoder computed; when absent, the config's
                `mtp_detach`.

        Returns:
            What every depth computed, and which tokens belong together.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.config.mtp_detach if detach is None else detach:
            hidden_states, inputs_embeds = cut_off(self, hidden_states, inputs_embeds)
        layout = RowLayout.of_batch(attention_mask, position_ids, inputs_embeds)
        depths = run_depths(
            self,
            hidden_states,
            inputs_embeds,
            layout,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )
        records = self.records_of(depths)
        if counts_as_training(self):
            self.reminders.predicted_ahead = True
            for idx, record in records.items():
                load = load_of_records({idx: record}, self.moe_layers, None, 0)
                load.micro_batches.zero_()  # the decoder has counted it, and its tokens
                self.router_load.add(load, self.moe_layers)
        return depths, layout

    def records_of(self, depths: list[Depth]) -> dict[int, RoutingRecord]:
        """Return the records of the depths' gates by the indices of their layers."""
        first = len(self.decoder_layers)
        return {idx: depth.record for idx, depth in enumerate(depths, start=first) if depth.record is not None}

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """The layers but those of multi-token prediction."""
        return [layer for layer in self.layers if not is_mtp_layer(layer)]

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts: those of the config, unless layers were taken out or put in.

        The layers of multi-token prediction are among them if the model has some.
        """
        return moe_layers_of(self.layers, self.config)

    def routing_context(
        self, token_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, output_router_logits: bool | None
    ) -> RoutingContext:
        """Return what the layers are told of a batch."""
        config, protected = self.config, None
        if self.training:
            check_number_of_layers(self)
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

    In training `outputs.loss` is the cross entropy plus the auxiliary loss. `outputs.aux_loss` is the auxiliary loss
    alone, coefficient included. In evaluation `outputs.loss` is the cross entropy alone. Under gradient accumulation
    with `num_items_in_batch` the auxiliary loss of a micro-batch counts by its share of the items.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__(config)
        self.model = DeepseekMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = DeepseekMoeHead(config.hidden_size, config.vocab_size, bias=False)
        self.register_load_state_dict_pre_hook(forget_copies)
        self.post_init()
        # The head by tensor, by stage and by FSDP group, beside what the config has for the decoder.
        self.tp_plan["lm_head"] = "colwise_gather_output"
        self.pp_plan["lm_head"] = (["hidden_states"], ["logits"])
        self.fsdp_plan["lm_head"] = "keep_full_weight"

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, keep_auxiliary_loss(value, self) if name == "forward" else value)

    @partial(takes_cache, name=CACHE)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens; see transformers' `GenerationMixin.generate`.

        `use_mtp=True` drafts with the multi-token-prediction layers that are loaded, in every version of transformers
        and for batches too: `num_assistant_tokens` at once, or else as many as there are layers (`mtp_assistant`).

        A cache may be given under either of its names. With a version of transformers that is not tested yet, the
        first call of a process checks the use of caches.
        """
        refuse_prompt_learning(self)
        kwargs = generation_arguments(self, args, kwargs)
        check_cached_generation(self, *kwargs.values())
        return super().generate(**kwargs)

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
        output_last_hidden_state: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DeepseekMoeCausalLMOutput:
        """Predict the next tokens. The arguments are those of [`DeepseekMoeModel`], and:

        Args:
            labels (`torch.LongTensor` of shape (B, S), *optional*): token ids, -100 where there is no loss. They are
                shifted inside.
            logits_to_keep (`int` or `torch.Tensor`): compute only the last logits (0: all), or those at these indices.
            output_last_hidden_state (`bool`): return the decoder's output too.
            kwargs: `num_items_in_batch` and `shift_labels` go to the loss.

        Returns:
            [`DeepseekMoeCausalLMOutput`]; `router_logits` holds the raw gate logits (T, E) of every MoE layer.
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

        loss, aux_loss = None, outputs.aux_loss
        ahead: dict[str, torch.Tensor] = {}
        if labels is not None:
            batch = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
                     "inputs_embeds": inputs_embeds}  # fmt: skip
            loss, aux_loss, ahead = self._losses(outputs, logits, labels, batch, **kwargs)
        return DeepseekMoeCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            last_hidden_state=outputs.last_hidden_state if output_last_hidden_state else None,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: getattr(outputs, CACHE), **ahead},
        )

    def _losses(
        self,
        outputs: DeepseekMoeModelOutput,
        logits: torch.Tensor,
        labels: torch.Tensor,
        batch: dict[str, Any],
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
        """Compute the loss, the auxiliary loss that is in it, and what the output tells of multi-token prediction."""
        config, aux_loss = self.config, outputs.aux_loss
        ahead: dict[str, torch.Tensor] = {}
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
        targets = shifted_labels(labels, **kwargs)
        items, num_items = (targets != -100).sum(), kwargs.get("num_items_in_batch")
        if config.mtp and config.mtp_loss_coef and starts_a_sequence(outputs, getattr(outputs, CACHE)):
            losses, balance = losses_ahead(
                self, outputs.last_hidden_state, targets, logits.detach().argmax(dim=-1),
                num_items=items if num_items is None else num_items, record=aux_loss is not None,
                detach=config.mtp_detach, **batch, **kwargs,
            )  # fmt: skip
            if aux_loss is not None and balance is not None:
                aux_loss = aux_loss + balance.to(aux_loss.device)
            ahead = losses.outputs()
            loss = loss + losses.total.to(loss.device) if self.training else loss
        return self._loss_with_auxiliary(loss, aux_loss, items, **kwargs), aux_loss, ahead


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
    "DeepseekMoeForCausalLM",
    "DeepseekMoeModel",
    "DeepseekV2ForCausalLM",
    "DeepseekV2Model",
    "DeepseekV3ForCausalLM",
    "DeepseekV3Model",
]
