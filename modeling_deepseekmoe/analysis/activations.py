# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""How many numbers the backward pass keeps of a token, counted from widths.

Shape letters: D hidden, H heads, K chosen experts.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from .counted_model import CountedModel
from .meta_models import number_in


@dataclass(frozen=True)
class Activations:
    """What is kept of one token. All are numbers of elements.

    Attributes:
        hidden: D, what goes from layer to layer.
        layers: the number of layers.
        layer: the main tensors of the largest layer.
        rows: the rows that go to the chosen experts and come back.
        vocabulary: the logits.
    """

    hidden: int
    layers: int
    layer: int
    rows: int
    vocabulary: int

    @classmethod
    def of(cls, counted: CountedModel) -> "Activations":
        """Count them for a model. Towers of images and sounds are left out.

        Raises:
            UnknownExpertsError: if it cannot be told how many experts a token uses.
        """
        config = counted.text_config
        vocabulary, hidden = counted.embedding.shape
        vocabulary = number_in(config, "vocab_size") or vocabulary
        hidden = number_in(config, "hidden_size") or hidden
        layers = number_in(config, "num_hidden_layers") or len(counted.decoder_layers or ())
        choices = max((layer.choices for layer in counted.moe_layers), default=0)
        layer = 8 * hidden + attention_width(config, hidden) + _ffn_width(counted, hidden)
        return cls(hidden, layers, layer, 2 * choices * hidden, vocabulary)


def attention_width(config: PreTrainedConfig, hidden: int) -> int:
    """Add the widths of queries, keys, values and of what attention gives, of the widest layer.

    With latent attention keys have as many heads as queries, and the latent is kept too. Every other kind of layer
    (linear attention, state spaces, convolutions) is taken for plain attention with the heads of the config, and one
    without such fields for four tensors of the hidden size.
    """
    heads, latent = number_in(config, "num_attention_heads"), number_in(config, "kv_lora_rank")
    nope, rope, value = (number_in(config, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if not heads:
        return 4 * hidden
    if latent and value and (nope or rope):
        return heads * (2 * ((nope or 0) + (rope or 0)) + 2 * value) + latent
    width = number_in(config, "head_dim") or hidden // heads
    return (2 * heads + 2 * (number_in(config, "num_key_value_heads") or heads)) * width


def _ffn_width(counted: CountedModel, hidden: int) -> int:
    """Add the widths inside the FFNs that a token uses. An expert's product of gate and up is computed again.

    A dense FFN that is not found is taken for one of 8 * hidden_size**2 parameters.
    """
    if counted.moe_layers:
        return max(
            2 * layer.activated // (3 * hidden) + (layer.shared + layer.beside) // hidden
            for layer in counted.moe_layers
        )
    return round((counted.ffn_parameters() or 8 * hidden**2) / hidden)


__all__ = ["Activations", "attention_width"]
