# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The configs of the released generations: thin subclasses with each one's model type, defaults and rules."""

from typing import Any, ClassVar

from .configuration_deepseekmoe import DeepseekMoeConfig, OptionalInt

_OWN_FIELDS = (
    "device_balance_alpha",
    "communication_balance_alpha",
    "sequence_balance_alpha",
    "router_z_loss_alpha",
    "n_device_groups",
    "max_devices_per_token",
    "token_drop_capacity_factor",
    "token_drop_protected_share",
)


class OfficialConfig(DeepseekMoeConfig):
    """The base of the dialects, whose `config.json` keeps to the names that the official code reads."""

    def to_dict(self) -> dict[str, Any]:
        """Do as [`DeepseekMoeConfig.to_dict`] does, with `rope_theta` and `rope_scaling` for the rotary embedding.

        YaRN with the default theta has `rope_parameters` in place of `rope_theta`.
        """
        output = super().to_dict()
        _rename_rope_parameters(output, self.default_theta)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """Do as [`DeepseekMoeConfig.to_diff_dict`] does, with the dtype also under its older name, `torch_dtype`.

        The official code does not know some fields of this package. They are left out unless they are set.
        """
        output = super().to_diff_dict()
        if output.get("dtype") is not None:
            output["torch_dtype"] = output["dtype"]
        for field in _OWN_FIELDS:
            if output.get(field) == getattr(type(self), field):
                output.pop(field, None)
        return output


def _rename_rope_parameters(output: dict[str, Any], default_theta: float) -> None:
    """Replace transformers' `rope_parameters` by the official `rope_theta` and `rope_scaling`, in place."""
    given = output.pop("rope_parameters", None)
    rope_parameters = dict(given or {})
    rope_type = rope_parameters.pop("rope_type", "default")
    rope_theta = rope_parameters.pop("rope_theta", default_theta)
    rope_parameters.pop("type", None)
    output["rope_scaling"] = None if rope_type == "default" else {**rope_parameters, "type": rope_type}
    # Trainer reads the file as a bare PreTrainedConfig when it resumes, and fails on YaRN's rope_scaling beside a
    # rope_theta. The default, to which the official code falls back, stands in transformers' own field there.
    if rope_type == "yarn" and rope_theta == default_theta:
        output["rope_parameters"] = given
    else:
        output["rope_theta"] = rope_theta


class DeepseekConfig(OfficialConfig):
    """The config of the first generation, `model_type: deepseek` (DeepSeekMoE 16B; arXiv 2401.06066).

    It has plain multi-head attention, a softmax gate in the input's dtype, and no scaling factor. The defaults are
    those of the official configuration class.
    """

    model_type = "deepseek"
    allowed_attention_types = ("mha",)
    allowed_scoring_functions = ("softmax",)
    allowed_topk_methods = ("greedy",)
    allows_mtp = False

    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    n_routed_experts: OptionalInt = None
    n_shared_experts: OptionalInt = None
    num_experts_per_tok: OptionalInt = None
    first_k_dense_replace: int = 0
    router_dtype: str = "auto"
    max_position_embeddings: int = 2048

    @property
    def gate_scaling_factor(self) -> float:
        """1 always: the first generation has no scaling factor."""
        return 1.0

    def _check_routing(self) -> None:
        super()._check_routing()
        if self.routed_scaling_factor != 1.0:
            self._say("routed_scaling_factor", "the first generation has none; model_type 'deepseekmoe' has one")

    def _check_attention(self) -> None:
        super()._check_attention()
        if self.head_dim != self._default_head_dim():
            self._refuse("head_dim", f"model_type 'deepseek' has hidden_size / heads = {self._default_head_dim()}")


class DeepseekV2Config(OfficialConfig):
    """The config of the second generation, `model_type: deepseek_v2` (arXiv 2405.04434).

    It has MLA, a softmax gate and device-limited routing. The defaults are those of the official configuration class.
    """

    model_type = "deepseek_v2"
    allowed_attention_types = ("mla",)
    allowed_scoring_functions = ("softmax",)
    allowed_topk_methods = ("greedy", "group_limited_greedy")
    allows_mtp = False

    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    n_routed_experts: OptionalInt = None
    n_shared_experts: OptionalInt = None
    num_experts_per_tok: OptionalInt = None
    first_k_dense_replace: int = 0
    kv_lora_rank: OptionalInt = 512
    q_lora_rank: OptionalInt = 1536
    qk_nope_head_dim: OptionalInt = 128
    qk_rope_head_dim: OptionalInt = 64
    v_head_dim: OptionalInt = 128
    max_position_embeddings: int = 2048

    def _check_routing(self) -> None:
        super()._check_routing()
        if self.gate_normalizes and self.routed_scaling_factor != 1.0:
            self._say("routed_scaling_factor", "with norm_topk_prob=true the second generation does not scale")

    @property
    def gate_scaling_factor(self) -> float:
        """Factor on the chosen scores. The second generation scales only where it does not normalise."""
        return 1.0 if self.gate_normalizes else float(self.routed_scaling_factor)


class DeepseekV3Config(OfficialConfig):
    """The config of the third generation, `model_type: deepseek_v3` (arXiv 2412.19437; R1, Moonlight).

    It has MLA, a sigmoid gate, and auxiliary-loss-free balancing through a bias. The defaults are those of the
    official configuration class.

    Its `aux_loss_alpha` has no effect, as in the released code, which computes no auxiliary loss. The loss of this
    generation is the sequence-wise one: `router_aux_loss_coef` is an alias of `sequence_balance_alpha` here.
    """

    model_type = "deepseek_v3"
    allowed_attention_types = ("mla",)
    allowed_scoring_functions = ("sigmoid",)
    allowed_topk_methods = ("noaux_tc",)
    attribute_map: ClassVar[dict[str, str]] = {
        **DeepseekMoeConfig.attribute_map,
        "router_aux_loss_coef": "sequence_balance_alpha",
    }

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    n_routed_experts: OptionalInt = 256
    n_shared_experts: OptionalInt = 1
    num_experts_per_tok: OptionalInt = 8
    first_k_dense_replace: int = 3
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    n_group: OptionalInt = 8
    topk_group: OptionalInt = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    kv_lora_rank: OptionalInt = 512
    q_lora_rank: OptionalInt = 1536
    qk_nope_head_dim: OptionalInt = 128
    qk_rope_head_dim: OptionalInt = 64
    v_head_dim: OptionalInt = 128
    num_nextn_predict_layers: int = 1
    bos_token_id: OptionalInt = 0
    eos_token_id: int | list[int] | None = 1

    @property
    def loss_alphas(self) -> dict[str, float]:
        """[`DeepseekMoeConfig.loss_alphas`] without the expert-level loss: the released code does not compute it."""
        alphas = super().loss_alphas
        alphas.pop("expert", None)
        return alphas


CONFIG_CLASSES: tuple[type[DeepseekMoeConfig], ...] = (
    DeepseekMoeConfig,
    DeepseekConfig,
    DeepseekV2Config,
    DeepseekV3Config,
)

__all__ = ["CONFIG_CLASSES", "DeepseekConfig", "DeepseekV2Config", "DeepseekV3Config", "OfficialConfig"]
