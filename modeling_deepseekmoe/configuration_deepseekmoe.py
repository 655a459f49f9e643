# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The config of the DeepSeekMoE family: one class, a superset of the official configs."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from transformers import PreTrainedConfig

from .configuration_checks import (
    ATTENTION_TYPES,
    LOSS_FIELDS,
    MLA_FIELDS,
    MTP_FIELDS,
    SCORING_FUNCTIONS,
    TOPK_METHODS,
    ChecksFields,
)
from .parallel_plans import PIPELINE_PLAN, expert_parallel_size, tensor_parallel_plan
from .remote_code import CarriesCode, NoCode, as_json, auto_map_among, without, without_local_code
from .untested_versions import warn_of_untested_version

# An integer or null. Which fields may be null depends on other fields, which a type cannot say: the checks below do.
OptionalInt: TypeAlias = Any

warn_of_untested_version()


def _prepare_first_config() -> None:
    """Run the package's hook before the first config, once. After a failure it runs again at the next config."""
    hook = DeepseekMoeConfig.before_first_config
    if hook is not None:
        hook()
        DeepseekMoeConfig.before_first_config = None


@contextmanager
def without_model_classes() -> Iterator[None]:
    """Make configs inside without importing the model classes, which takes seconds: for reading files alone.

    The first config afterwards registers the classes, as always.
    """
    hook, DeepseekMoeConfig.before_first_config = DeepseekMoeConfig.before_first_config, None
    try:
        yield
    finally:
        DeepseekMoeConfig.before_first_config = hook


class DeepseekMoeConfig(ChecksFields, CarriesCode, PreTrainedConfig):
    r"""
    Configuration of a DeepSeekMoE model of any generation (arXiv 2401.06066, 2405.04434, 2412.19437).

    The fields carry the names of the official `config.json` files, so that a file of any generation can be read as it
    is. The defaults are those of DeepSeekMoE 16B.

    Args:
        vocab_size (`int`): number of tokens in the vocabulary.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`): width of the dense FFN of the layers that are not MoE layers.
        moe_intermediate_size (`int`): width of one routed expert, and of one shared expert.
        num_hidden_layers (`int`): number of decoder layers.
        num_attention_heads (`int`): number of query heads.
        num_key_value_heads (`int`, *optional*): number of key and value heads; `num_attention_heads` when absent.
        n_routed_experts (`int`, *optional*): number of routed experts in a MoE layer (aliases `num_experts`,
            `num_local_experts`). With `None` or 0 there is no MoE layer: the model is a dense transformer.
        n_shared_experts (`int`, *optional*): number of shared experts. They are held as one FFN of width
            `n_shared_experts * moe_intermediate_size`. `None` or 0: none.
        num_experts_per_tok (`int`, *optional*): K, the number of routed experts that a token is sent to.
        first_k_dense_replace (`int`): number of first layers that stay dense.
        moe_layer_freq (`int`): of the layers after these, those with `layer_index % moe_layer_freq == 0` are MoE
            layers. 1 gives every one; 2 with `first_k_dense_replace=0` gives every second one, as in GShard.
        scoring_func (`str`): `"softmax"`, `"sigmoid"` or `"sqrtsoftplus"`, the affinity of token and expert.
        topk_method (`str`): how experts are chosen. `"greedy"`: by their scores alone. `"group_limited_greedy"` (V2):
            inside the best groups, which are ranked by their best expert. `"noaux_tc"` (V3): by score plus
            `e_score_correction_bias`, inside groups that are ranked by the sum of their best two. The bias enters the
            choice alone, not the weights.
        n_group, topk_group (`int`, *optional*): number of expert groups and of groups that a token may use.
        norm_topk_prob (`bool`): divide the chosen scores by their sum (only if `num_experts_per_tok > 1`).
        routed_scaling_factor (`float`): factor on the chosen scores. Each dialect keeps its generation's rule.
        router_dtype (`str`): `"float32"`: gate logits come from float32 input and weight, under autocast too.
            `"auto"`: they are computed in the input's dtype (V1). Everything after the logits is float32 in both.
        router_implementation (`str`): `"triton"`: fused kernels. `"eager"`: plain torch. `"auto"`: the kernels on CUDA
            and ROCm devices, else plain torch. Not written to `config.json`.
        aux_loss_alpha (`float`): coefficient of the expert-level balance loss in training (alias
            `router_aux_loss_coef`). The loss counts the experts that were chosen, bias included. 0 turns it off.
        seq_aux (`bool`): compute this loss and the next two for each row of the batch, and average. If `False`,
            compute them over all tokens of the batch. Sequences packed into one row count as one.
        device_balance_alpha, communication_balance_alpha (`float`): coefficients of the losses that balance devices
            and what is sent to them (0.05 and 0.02 in V2).
        sequence_balance_alpha (`float`): coefficient of V3's sequence-wise balance loss, which ignores the bias (1e-4
            there).
        router_z_loss_alpha (`float`): coefficient of the router z-loss.
        n_device_groups (`int`, *optional*): D, the number of devices that the experts are thought to lie on, in equal
            groups of consecutive experts. When absent, it is the size of the expert-parallel group, else the number of
            the gate's groups. The device losses and token dropping need at least 2.
        max_devices_per_token (`int`, *optional*): M of the communication loss. When absent, it is `topk_group` if the
            groups of the gate are the devices, else at most K.
        token_drop_capacity_factor (`float`, *optional*): in training, drop the choices of lowest affinity beyond this
            multiple of a device's mean load (1.0 in V2). When absent, none is dropped. A dropped choice has the weight
            0.
        token_drop_protected_share (`float`): probability that a sequence has none of its tokens dropped.
        output_router_logits (`bool`): return the raw gate logits of every MoE layer.
        attention_type (`str`, *optional*): `"mha"` (also grouped-query) or `"mla"`; when absent, `"mla"` if
            `kv_lora_rank` is set.
        kv_lora_rank, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim (`int`, *optional*): sizes of MLA. It
            needs all but `q_lora_rank`.
        rope_interleave (`bool`): MLA's rotary dimensions are stored in pairs, as in every released checkpoint.
        num_nextn_predict_layers (`int`): D, the number of multi-token-prediction layers in the checkpoint (alias
            `num_mtp_layers`).
        mtp (`bool`): whether the model has these layers, `from_pretrained(..., mtp=True)`. Not written to
            `config.json`: a file is loaded without them unless they are asked for.
        mtp_loss_coef (`float`): lambda, the coefficient of the multi-token-prediction loss in training (0.3 in V3 at
            first, 0.1 later). 0 turns it off.
        mtp_loss_decay (`float`): the loss of depth k has the weight `mtp_loss_decay**(k - 1)`, divided by the sum of
            these weights: 1.0 is V3's mean, 0.6 FastMTP's (arXiv 2509.18362).
        mtp_detach (`bool`): the multi-token-prediction loss trains its layers alone, and has no gradient in the
            decoder, the embedding and the head. The other losses train these as always, unless they are frozen.
        mtp_in_trl (`bool`): train these layers also where a trainer of TRL makes the loss itself: their loss, always
            as with `mtp_detach`, is part of the auxiliary loss that the trainer adds.

    Raises:
        ValueError: for a value that is not allowed. The message names the field, the value and what is allowed.
    """

    model_type = "deepseekmoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "cache",
        "past_key_values",
        "aux_loss",
        "router_logits",
        "mtp_loss",
        "mtp_agreement",
    ]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "router_aux_loss_coef": "aux_loss_alpha",
        "num_mtp_layers": "num_nextn_predict_layers",
    }
    auto_map: ClassVar[Any] = NoCode()
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = PIPELINE_PLAN

    # What the official code of a generation can compute; a dialect narrows these.
    allowed_attention_types: ClassVar[tuple[str, ...]] = ATTENTION_TYPES
    allowed_scoring_functions: ClassVar[tuple[str, ...]] = SCORING_FUNCTIONS
    allowed_topk_methods: ClassVar[tuple[str, ...]] = TOPK_METHODS
    allows_mtp: ClassVar[bool] = True

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
    router_implementation: str = "auto"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    device_balance_alpha: float = 0.0
    communication_balance_alpha: float = 0.0
    sequence_balance_alpha: float = 0.0
    router_z_loss_alpha: float = 0.0
    n_device_groups: OptionalInt = None
    max_devices_per_token: OptionalInt = None
    token_drop_capacity_factor: float | None = None
    token_drop_protected_share: float = 0.1
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
    mtp: bool = False
    mtp_loss_coef: float = 0.3
    mtp_loss_decay: float = 1.0
    mtp_detach: bool = False
    mtp_in_trl: bool = False
    use_cache: bool = True
    pad_token_id: OptionalInt = None
    bos_token_id: OptionalInt = 100000
    eos_token_id: int | list[int] | None = 100001
    pretraining_tp: int = 1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        _prepare_first_config()
        # An alias among the arguments must be seen by the checks below, so it is set before anything is derived.
        given: dict[str, Any] = {}
        for alias in [name for name in kwargs if name in self.attribute_map]:
            field, value = self.attribute_map[alias], kwargs.pop(alias)
            own = getattr(self, field)
            if given.setdefault(field, value if own == getattr(type(self), field) else own) != value:
                raise ValueError(
                    f"{type(self).__name__}: {alias}={value!r} is not allowed: {field} has the value {given[field]!r} "
                    "under another name."
                )
            setattr(self, field, value)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if not self.attention_type:
            self.attention_type = "mla" if self.kv_lora_rank is not None else "mha"
        self.check_fields()
        self.base_model_tp_plan = tensor_parallel_plan(self)
        super().__post_init__(**kwargs)
        self._check_rope()

    def __setstate__(self, state: dict[str, Any]) -> None:
        _prepare_first_config()
        self.__dict__.update(state)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Do as transformers does, except that overrides of fields are applied before the checks, not after."""
        fields = {field.name for field in dataclasses.fields(cls)} - {"dtype"} | set(cls.attribute_map)
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
        overridden = {cls.attribute_map.get(name, name) for name in overrides}
        kept = {
            name: value for name, value in config_dict.items() if cls.attribute_map.get(name, name) not in overridden
        }
        return super().from_dict({**kept, **overrides}, **kwargs)

    # ------------------------------------------------------------------------------------------------ derived values
    def is_moe_layer(self, layer_idx: int) -> bool:
        """Tell whether decoder layer `layer_idx` (from 0) holds routed experts instead of a dense FFN."""
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
        """Whether the chosen scores are divided by their sum. The official code never divides for a single expert."""
        return bool(self.norm_topk_prob) and (self.num_experts_per_tok or 0) > 1

    @property
    def loss_alphas(self) -> dict[str, float]:
        """Coefficients of the auxiliary losses that are switched on, by name."""
        alphas = {name: getattr(self, field) for name, field in LOSS_FIELDS.items()}
        return {name: float(alpha) for name, alpha in alphas.items() if alpha}

    @property
    def mtp_loss_weights(self) -> tuple[float, ...]:
        """Factors on the losses of the multi-token-prediction depths, coefficient included."""
        weights = [self.mtp_loss_decay**depth for depth in range(self.num_nextn_predict_layers)]
        return tuple(self.mtp_loss_coef * weight / sum(weights) for weight in weights)

    @property
    def device_groups(self) -> tuple[int, int]:
        """D, the number of devices, and M, the most of them that a token is sent to."""
        groups, kept = self.gate_groups
        spread = expert_parallel_size(self)
        devices = self.n_device_groups or (spread if spread > 1 else groups)
        limit = kept if devices == groups and kept < groups else min(devices, self.num_experts_per_tok or 1)
        return devices, self.max_devices_per_token or limit

    @property
    def gate_scaling_factor(self) -> float:
        """Factor on the chosen scores, after a possible normalisation."""
        return float(self.routed_scaling_factor)

    @property
    def gate_groups(self) -> tuple[int, int]:
        """Number of expert groups, and of groups that a token may use; (1, 1) if the method ignores groups."""
        if self.topk_method == "greedy":
            return 1, 1
        return self.n_group or 1, self.topk_group or self.n_group or 1

    # -------------------------------------------------------------------------------------------------- serialization
    def to_dict(self) -> dict[str, Any]:
        """Return the config as a dictionary, without what can be derived from the other fields."""
        output = super().to_dict()
        output.pop("qk_head_dim", None)
        output.pop("router_implementation", None)  # the machine's matter, as the kind of attention is
        output.pop("mtp", None)  # the loader's
        if output.get("head_dim") in (None, self._default_head_dim()):
            output.pop("head_dim", None)
        if self.attention_type == "mha":
            for name in (*MLA_FIELDS, "q_lora_rank", "rope_interleave"):
                output.pop(name, None)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is written to `config.json`: [`to_dict`] without transformers' own defaults.

        An `auto_map` to files beside the original is left out too, because these are not saved with it.
        """
        output = super().to_diff_dict()
        for field in MTP_FIELDS:
            if output.get(field) == getattr(type(self), field):
                output.pop(field, None)
        output["auto_map"] = without_local_code(output.get("auto_map"))
        return output if output["auto_map"] else without(output, "auto_map")

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write `config.json`. It names the code of the models (`auto_map`) if that code lies in the same folder."""
        file, content = Path(json_file_path), json.loads(self.to_json_string(use_diff=use_diff))
        there = [path.name for path in file.parent.glob("*.py")]
        content["auto_map"] = auto_map_among(there, self.model_type, getattr(self, "auto_map", None))
        content = content if content["auto_map"] else without(content, "auto_map")
        file.write_bytes(as_json(content))


__all__ = ["DeepseekMoeConfig", "without_model_classes"]
