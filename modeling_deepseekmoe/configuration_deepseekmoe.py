# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the DeepSeekMoE family: one superset config and one thin dialect per released generation."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

from transformers.configuration_utils import PreTrainedConfig

from .parallel_plans import EXPERT_PARALLEL_PLAN, PIPELINE_PLAN, tensor_parallel_plan

ATTENTION_TYPES = ("mha", "mla")
SCORING_FUNCTIONS = ("softmax", "sigmoid")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
ROUTER_DTYPES = ("float32", "auto")

_MLA_FIELDS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


# An integer or null. Which fields may be null depends on other fields, which a type cannot say: the checks below do.
OptionalInt: TypeAlias = Any


class DeepseekMoeConfig(PreTrainedConfig):
    r"""
    Configuration of a DeepSeekMoE model of any generation (arXiv 2401.06066, 2405.04434, 2412.19437).

    The fields carry the names of the official `config.json` files, so that one of any generation can be read as it
    is. The defaults are those of DeepSeekMoE 16B.

    Args:
        vocab_size (`int`): number of tokens in the vocabulary.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`): width of the dense FFN of the layers that are not MoE layers.
        moe_intermediate_size (`int`): width of one routed expert, and of one shared expert.
        num_hidden_layers (`int`): number of decoder layers.
        num_attention_heads (`int`): number of query heads.
        num_key_value_heads (`int`, *optional*): number of key and value heads; `num_attention_heads` when absent.
        n_routed_experts (`int`, *optional*): routed experts in a MoE layer (aliases `num_experts`,
            `num_local_experts`). `None` or 0: no MoE layer at all, a dense transformer.
        n_shared_experts (`int`, *optional*): shared experts, held as one FFN of `n_shared_experts *
            moe_intermediate_size`. `None` or 0: none.
        num_experts_per_tok (`int`, *optional*): K, the routed experts that a token is sent to.
        first_k_dense_replace (`int`): the first layers that stay dense.
        moe_layer_freq (`int`): of the layers after these, those with `layer_index % moe_layer_freq == 0` are MoE
            layers (1: every one; 2 with `first_k_dense_replace=0`: every second one, as GShard).
        scoring_func (`str`): `"softmax"` or `"sigmoid"`, the affinity of token and expert.
        topk_method (`str`): `"greedy"`; `"group_limited_greedy"` (V2: groups ranked by their best expert);
            `"noaux_tc"` (V3: the choice, and only the choice, uses scores plus `e_score_correction_bias`; groups
            ranked by the sum of their best two).
        n_group, topk_group (`int`, *optional*): number of expert groups and of groups that a token may use.
        norm_topk_prob (`bool`): divide the chosen scores by their sum (only if `num_experts_per_tok > 1`).
        routed_scaling_factor (`float`): factor on the chosen scores. Each dialect keeps its generation's rule.
        router_dtype (`str`): `"float32"`: gate logits from float32 input and weight, under autocast too; `"auto"`:
            from the input's dtype (V1). Everything after the logits is float32 in both.
        aux_loss_alpha (`float`): coefficient of the expert-level balance loss in training (alias
            `router_aux_loss_coef`); 0 turns it off.
        seq_aux (`bool`): compute that loss for each sequence and average, else over all tokens of the batch.
        output_router_logits (`bool`): return the raw gate logits of every MoE layer.
        attention_type (`str`, *optional*): `"mha"` (also grouped-query) or `"mla"`; when absent, `"mla"` if
            `kv_lora_rank` is set.
        kv_lora_rank, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim (`int`, *optional*): MLA. All but
            `q_lora_rank` are required by it.
        rope_interleave (`bool`): MLA's rotary dimensions are stored in pairs, as in every released checkpoint.
        num_nextn_predict_layers (`int`): multi-token-prediction layers in the checkpoint. They are not loaded.

    Raises:
        ValueError: for a value that is not allowed; the message names the field, the value and what is allowed.
    """

    model_type = "deepseekmoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "router_aux_loss_coef": "aux_loss_alpha",
    }
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = PIPELINE_PLAN
    base_model_ep_plan: ClassVar[dict[str, Any] | None] = EXPERT_PARALLEL_PLAN

    # What the official code of a generation can compute; a dialect narrows these.
    allowed_attention_types: ClassVar[tuple[str, ...]] = ATTENTION_TYPES
    allowed_scoring_functions: ClassVar[tuple[str, ...]] = SCORING_FUNCTIONS
    allowed_topk_methods: ClassVar[tuple[str, ...]] = TOPK_METHODS

    # Whether the dialect's config.json keeps to the names of the official code where transformers has newer ones.
    official_names: ClassVar[bool] = False

    # Called before the first config is made: the package registers the model classes here, because importing them
    # takes seconds and nothing needs them before a config exists. Unused in a copy of this file on the Hub.
    before_first_config: ClassVar[Callable[[], None] | None] = None

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: OptionalInt = None
    head_dim: OptionalInt = None
    n_routed_experts: OptionalInt = 64
    n_shared_experts: OptionalInt = 2
    num_experts_per_tok: OptionalInt = 6
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    n_group: OptionalInt = None
    topk_group: OptionalInt = None
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    router_dtype: str = "float32"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    output_router_logits: bool = False
    attention_type: str = ""
    kv_lora_rank: OptionalInt = None
    q_lora_rank: OptionalInt = None
    qk_nope_head_dim: OptionalInt = None
    qk_rope_head_dim: OptionalInt = None
    v_head_dim: OptionalInt = None
    rope_interleave: bool = True
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    num_nextn_predict_layers: int = 0
    use_cache: bool = True
    pad_token_id: OptionalInt = None
    bos_token_id: OptionalInt = 100000
    eos_token_id: int | list[int] | None = 100001
    pretraining_tp: int = 1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        register_models, DeepseekMoeConfig.before_first_config = DeepseekMoeConfig.before_first_config, None
        if register_models is not None:
            register_models()

        # An alias among the arguments must be seen by the checks below, so it is set before anything is derived.
        for alias in [name for name in kwargs if name in self.attribute_map]:
            setattr(self, alias, kwargs.pop(alias))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if not self.attention_type:
            self.attention_type = "mla" if self.kv_lora_rank is not None else "mha"
        self._check_one_of("attention_type", self.allowed_attention_types)
        self._check_sizes()
        self._derive_head_dims()
        self._check_attention()
        if self.n_routed_experts:
            self._check_routing()
        self.base_model_tp_plan = tensor_parallel_plan(self)
        super().__post_init__(**kwargs)

    # ------------------------------------------------------------------------------------------------ derived values
    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether decoder layer `layer_idx` (from 0) holds routed experts instead of a dense FFN."""
        return (
            bool(self.n_routed_experts)
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers."""
        return tuple(idx for idx in range(self.num_hidden_layers) if self.is_moe_layer(idx))

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts taken as one FFN; 0 without shared experts."""
        return (self.n_shared_experts or 0) * self.moe_intermediate_size

    @property
    def gate_normalizes(self) -> bool:
        """Whether the chosen scores are divided by their sum: the official code never does for a single expert."""
        return bool(self.norm_topk_prob) and (self.num_experts_per_tok or 0) > 1

    @property
    def gate_scaling_factor(self) -> float:
        """Factor on the chosen scores, after a possible normalisation."""
        return float(self.routed_scaling_factor)

    @property
    def gate_groups(self) -> tuple[int, int]:
        """Number of expert groups and of groups that a token may use; (1, 1) where the method ignores groups."""
        if self.topk_method == "greedy":
            return 1, 1
        return self.n_group or 1, self.topk_group or self.n_group or 1

    # -------------------------------------------------------------------------------------------------- serialization
    def to_dict(self) -> dict[str, Any]:
        """The config as a dictionary, without what can be derived from the other fields. An official dialect keeps
        to the official names: `rope_theta` and `rope_scaling` for the rotary embedding."""
        output = super().to_dict()
        if self.official_names:
            _rename_rope_parameters(output, self.default_theta)
        output.pop("qk_head_dim", None)
        if output.get("head_dim") == self._default_head_dim():
            del output["head_dim"]
        if self.attention_type == "mha":
            for name in (*_MLA_FIELDS, "q_lora_rank", "rope_interleave"):
                output.pop(name, None)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to `config.json`: [`to_dict`] without transformers' own defaults; for an official dialect
        the dtype also under the name by which the official code and older releases know it, `torch_dtype`."""
        output = super().to_diff_dict()
        if self.official_names and output.get("dtype") is not None:
            output["torch_dtype"] = output["dtype"]
        return output

    # ------------------------------------------------------------------------------------------------------ the checks
    def _refuse(self, field: str, allowed: str) -> None:
        raise ValueError(f"{type(self).__name__}: {field}={getattr(self, field)!r} is not allowed: {allowed}.")

    def _check_one_of(self, field: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, field) not in allowed:
            self._refuse(field, f"it must be one of {', '.join(map(repr, allowed))}")

    def _check_integer(self, field: str, minimum: int, optional: bool = False) -> None:
        value = getattr(self, field)
        if value is None and optional:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            self._refuse(field, f"it must be an integer of at least {minimum}" + (" or null" if optional else ""))

    def _check_sizes(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            self._check_integer(field, 1)
        for field in ("num_key_value_heads", "moe_intermediate_size", "moe_layer_freq", "max_position_embeddings"):
            self._check_integer(field, 1)
        for field in ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
            self._check_integer(field, 0, optional=True)
        for field in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim"):
            self._check_integer(field, 1, optional=True)
        for field in ("rms_norm_eps", "initializer_range", "aux_loss_alpha", "attention_dropout"):
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or not value >= 0:
                self._refuse(field, "it must be a number of at least 0")
        if self.num_attention_heads % self.num_key_value_heads:
            self._refuse(
                "num_key_value_heads", f"it must divide num_attention_heads={self.num_attention_heads} evenly"
            )

    def _default_head_dim(self) -> int:
        if self.attention_type == "mla":
            return int(self.qk_rope_head_dim)
        return self.hidden_size // self.num_attention_heads

    def _derive_head_dims(self) -> None:
        if self.attention_type == "mla":
            missing = [field for field in _MLA_FIELDS if getattr(self, field) is None]
            if missing:
                self._refuse(
                    missing[0],
                    f"attention_type='mla' needs {', '.join(_MLA_FIELDS)}, and {', '.join(missing)} is absent",
                )
            # transformers reads both: the rotary embedding's width, and the width of a query or key head.
            self.head_dim = self.qk_rope_head_dim
            self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        elif self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                self._refuse(
                    "hidden_size",
                    f"it must be a multiple of num_attention_heads={self.num_attention_heads} unless head_dim is set",
                )
            self.head_dim = self._default_head_dim()

    def _check_attention(self) -> None:
        if self.attention_type == "mla" and self.num_key_value_heads != self.num_attention_heads:
            self._refuse(
                "num_key_value_heads", f"with MLA it must equal num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            field = "qk_rope_head_dim" if self.attention_type == "mla" else "head_dim"
            self._refuse(field, "the rotary embedding needs an even number")

    def _check_routing(self) -> None:
        experts, top_k = self.n_routed_experts, self.num_experts_per_tok
        self._check_integer("num_experts_per_tok", 1)
        if top_k > experts:
            self._refuse("num_experts_per_tok", f"it must lie between 1 and n_routed_experts={experts}")
        self._check_one_of("scoring_func", self.allowed_scoring_functions)
        self._check_one_of("topk_method", self.allowed_topk_methods)
        self._check_one_of("router_dtype", ROUTER_DTYPES)
        if not isinstance(self.routed_scaling_factor, (int, float)) or not self.routed_scaling_factor > 0:
            self._refuse("routed_scaling_factor", "it must be a number above 0")
        if self.topk_method == "greedy":
            return
        optional = self.topk_method == "noaux_tc"
        self._check_integer("n_group", 1, optional=optional)
        self._check_integer("topk_group", 1, optional=optional)
        groups, kept = self.gate_groups
        if experts % groups:
            self._refuse("n_group", f"it must divide n_routed_experts={experts} evenly")
        if kept > groups:
            self._refuse("topk_group", f"it must lie between 1 and n_group={groups}")
        if kept * (experts // groups) < top_k:
            self._refuse(
                "num_experts_per_tok",
                f"the topk_group={kept} chosen groups of {experts // groups} experts hold only "
                f"{kept * (experts // groups)}",
            )
        if self.topk_method == "noaux_tc" and groups > 1 and experts // groups < 2:
            self._refuse("n_group", f"noaux_tc ranks groups by their best two experts: at most {experts // 2}")


def _rename_rope_parameters(output: dict[str, Any], default_theta: float) -> None:
    """Replace transformers' `rope_parameters` by the official `rope_theta` and `rope_scaling`, in place."""
    rope_parameters = dict(output.pop("rope_parameters", None) or {})
    rope_type = rope_parameters.pop("rope_type", "default")
    rope_theta = rope_parameters.pop("rope_theta", default_theta)
    rope_parameters.pop("type", None)
    output["rope_scaling"] = None if rope_type == "default" else {**rope_parameters, "type": rope_type}
    # Trainer reads the file as a bare PreTrainedConfig when it resumes, and fails on YaRN's rope_scaling beside a
    # rope_theta. The default of the official classes is therefore left out there: every reader falls back to it.
    if rope_type != "yarn" or rope_theta != default_theta:
        output["rope_theta"] = rope_theta


class DeepseekConfig(DeepseekMoeConfig):
    """The first generation, `model_type: deepseek` (DeepSeekMoE 16B; arXiv 2401.06066): plain multi-head attention,
    softmax gate in the input's dtype, no scaling factor. Defaults are those of the official configuration class."""

    model_type = "deepseek"
    official_names = True
    allowed_attention_types = ("mha",)
    allowed_scoring_functions = ("softmax",)
    allowed_topk_methods = ("greedy",)

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
        """Always 1: the first generation has no scaling factor."""
        return 1.0

    def _check_attention(self) -> None:
        super()._check_attention()
        if self.head_dim != self._default_head_dim():
            self._refuse("head_dim", f"model_type 'deepseek' has hidden_size / heads = {self._default_head_dim()}")


class DeepseekV2Config(DeepseekMoeConfig):
    """The second generation, `model_type: deepseek_v2` (arXiv 2405.04434): MLA, softmax gate, device-limited routing.
    Defaults are those of the official configuration class."""

    model_type = "deepseek_v2"
    official_names = True
    allowed_attention_types = ("mla",)
    allowed_scoring_functions = ("softmax",)
    allowed_topk_methods = ("greedy", "group_limited_greedy")

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

    @property
    def gate_scaling_factor(self) -> float:
        """The second generation scales only where it does not normalise."""
        return 1.0 if self.gate_normalizes else float(self.routed_scaling_factor)


class DeepseekV3Config(DeepseekMoeConfig):
    """The third generation, `model_type: deepseek_v3` (arXiv 2412.19437; R1, Moonlight): MLA, sigmoid gate,
    auxiliary-loss-free balancing through a bias. Defaults are those of the official configuration class, except that
    `aux_loss_alpha` is 0: the released code computes no auxiliary loss. A value above 0 is honoured."""

    model_type = "deepseek_v3"
    official_names = True
    allowed_attention_types = ("mla",)
    allowed_scoring_functions = ("sigmoid",)
    allowed_topk_methods = ("noaux_tc",)

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
    aux_loss_alpha: float = 0.0
    kv_lora_rank: OptionalInt = 512
    q_lora_rank: OptionalInt = 1536
    qk_nope_head_dim: OptionalInt = 128
    qk_rope_head_dim: OptionalInt = 64
    v_head_dim: OptionalInt = 128
    num_nextn_predict_layers: int = 1
    bos_token_id: OptionalInt = 0
    eos_token_id: int | list[int] | None = 1


__all__ = ["DeepseekConfig", "DeepseekMoeConfig", "DeepseekV2Config", "DeepseekV3Config"]
