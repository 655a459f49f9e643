# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Classification heads of the DeepSeekMoE family: of sequences and of tokens, with the auxiliary loss in training."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput

from .configuration_deepseekmoe import DeepseekMoeConfig
from .configuration_dialects import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from .modeling_deepseekmoe import DeepseekMoeModel
from .modeling_pretrained import CACHE, DeepseekMoeModelOutput, DeepseekMoePreTrainedModel, share_of_items
from .transformers_support import TransformersKwargs, Unpack, can_return_tuple, takes_cache


@dataclass
class DeepseekMoeSequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """Output of the sequence classifier, with the decoder's `aux_loss` and, where asked for, `router_logits`."""

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class DeepseekMoeTokenClassifierOutput(TokenClassifierOutput):
    """Output of the token classifier, with the decoder's `aux_loss` and, where asked for, `router_logits`."""

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


class DeepseekMoeForSequenceClassification(DeepseekMoePreTrainedModel):
    """The decoder with a classification head on the last real token of every sequence."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DeepseekMoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> DeepseekMoeSequenceClassifierOutput:
        """Classify sequences. `logits` have the shape (B, num_labels).

        The arguments are those of [`DeepseekMoeModel`], and `labels` (B,): classes, or targets of a regression.

        Raises:
            ValueError: for several sequences without `attention_mask` and `config.pad_token_id`.
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
        logits = self.score(outputs.last_hidden_state)
        last_token = self._last_real_token(input_ids, attention_mask, logits)
        logits = logits[torch.arange(logits.shape[0], device=logits.device), last_token]

        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            items = (labels != -100).sum()
            if self.config.problem_type in ("regression", "multi_label_classification"):
                # The losses of these problems are means that know nothing of the other micro-batches.
                loss = loss * share_of_items(items, loss.device, **kwargs)
            loss = self._loss_with_auxiliary(loss, outputs.aux_loss, items, **kwargs)
        return DeepseekMoeSequenceClassifierOutput(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _last_real_token(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, logits: torch.Tensor
    ) -> torch.Tensor:
        """Find the index (B,) of the rightmost token that is not padding, whichever side the padding is on."""
        batch_size, length = logits.shape[:2]
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        elif batch_size == 1:
            real = torch.ones(1, length, dtype=torch.bool)
        else:
            raise ValueError(
                "attention_mask=None is not allowed for several sequences while config.pad_token_id is null: "
                "give the mask, or set the padding token."
            )
        positions = torch.arange(length, device=logits.device)
        return (positions * real.to(logits.device)).argmax(dim=-1)


class DeepseekMoeForTokenClassification(DeepseekMoePreTrainedModel):
    """The decoder with a classification head on every token, behind a dropout of `config.classifier_dropout`.

    The default of the dropout is 0.
    """

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DeepseekMoeModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> DeepseekMoeTokenClassifierOutput:
        """Classify tokens. `logits` have the shape (B, S, num_labels).

        The arguments are those of [`DeepseekMoeModel`], and `labels` (B, S): classes, -100 where there is no loss.
        """
        outputs: DeepseekMoeModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
            loss = self._loss_with_auxiliary(loss, outputs.aux_loss, (labels != -100).sum(), **kwargs)
        return DeepseekMoeTokenClassifierOutput(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


# ------------------------------------------------------------------------------------------------------------ dialects
class DeepseekForSequenceClassification(DeepseekMoeForSequenceClassification):
    """The sequence classifier of the first generation, `model_type: deepseek`."""

    config_class = DeepseekConfig
    config: DeepseekConfig


class DeepseekForTokenClassification(DeepseekMoeForTokenClassification):
    """The token classifier of the first generation, `model_type: deepseek`."""

    config_class = DeepseekConfig
    config: DeepseekConfig


class DeepseekV2ForSequenceClassification(DeepseekMoeForSequenceClassification):
    """The sequence classifier of the second generation, `model_type: deepseek_v2`."""

    config_class = DeepseekV2Config
    config: DeepseekV2Config


class DeepseekV2ForTokenClassification(DeepseekMoeForTokenClassification):
    """The token classifier of the second generation, `model_type: deepseek_v2`."""

    config_class = DeepseekV2Config
    config: DeepseekV2Config


class DeepseekV3ForSequenceClassification(DeepseekMoeForSequenceClassification):
    """The sequence classifier of the third generation, `model_type: deepseek_v3`."""

    config_class = DeepseekV3Config
    config: DeepseekV3Config


class DeepseekV3ForTokenClassification(DeepseekMoeForTokenClassification):
    """The token classifier of the third generation, `model_type: deepseek_v3`."""

    config_class = DeepseekV3Config
    config: DeepseekV3Config


__all__ = [
    "DeepseekForSequenceClassification",
    "DeepseekForTokenClassification",
    "DeepseekMoeForSequenceClassification",
    "DeepseekMoeForTokenClassification",
    "DeepseekMoeSequenceClassifierOutput",
    "DeepseekMoeTokenClassifierOutput",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV2ForTokenClassification",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
]
