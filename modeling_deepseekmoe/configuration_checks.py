# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The checks of all configs' fields. Each error names the field, its value and what is allowed."""

import math
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

ATTENTION_TYPES = ("mha", "mla")
SCORING_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
ROUTER_DTYPES = ("float32", "auto")
ROUTER_IMPLEMENTATIONS = ("auto", "eager", "triton")

# The auxiliary losses in training, and the fields with their coefficients.
LOSS_FIELDS = {
    "expert": "aux_loss_alpha",
    "device": "device_balance_alpha",
    "communication": "communication_balance_alpha",
    "sequence": "sequence_balance_alpha",
    "router_z": "router_z_loss_alpha",
}
MLA_FIELDS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# How multi-token prediction is trained.
MTP_FIELDS = ("mtp_loss_coef", "mtp_loss_decay", "mtp_detach", "mtp_in_trl")


class ChecksFields:
    """The checks as a mixin of the configs, which have the fields."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def check_fields(self) -> None:
        """Check all fields, and derive what depends on them.

        This runs when the config is made, and again when a model is made of it: fields can be set in between. A
        `ValueError` names the field, its value and what is allowed.
        """
        self._check_one_of("attention_type", self.allowed_attention_types)
        self._check_sizes()
        self._check_kinds()
        self._derive_head_dims()
        self._check_attention()
        self._check_mtp()
        if self.n_routed_experts and not self.moe_layers:
            self._say(
                "n_routed_experts",
                f"none of the {self.num_hidden_layers} layers has experts (first_k_dense_replace="
                f"{self.first_k_dense_replace}, moe_layer_freq={self.moe_layer_freq})",
            )
        if self.n_routed_experts:
            self._check_routing()
            self._check_balancing()

    def _refuse(self, field: str, allowed: str) -> None:
        raise ValueError(f"{type(self).__name__}: {field}={getattr(self, field)!r} is not allowed: {allowed}.")

    def _say(self, field: str, why: str) -> None:
        logger.warning_once(f"{type(self).__name__}: {field}={getattr(self, field)!r} has no effect: {why}.")

    def _check_one_of(self, field: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, field) not in allowed:
            self._refuse(field, f"it must be one of {', '.join(map(repr, allowed))}")

    def _check_integer(self, field: str, minimum: int, optional: bool = False) -> None:
        value = getattr(self, field)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not (value is None and optional) and (not is_integer or value < minimum):
            self._refuse(field, f"it must be an integer of at least {minimum}" + (" or null" if optional else ""))

    def _check_number(self, field: str, maximum: float = math.inf) -> None:
        value = getattr(self, field)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
            self._refuse(field, "it must be a finite number of at least 0")
        if value > maximum:
            self._refuse(field, f"it must be at most {maximum}")

    def _check_sizes(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            self._check_integer(field, 1)
        for field in ("num_key_value_heads", "moe_intermediate_size", "moe_layer_freq", "max_position_embeddings"):
            self._check_integer(field, 1)
        for field in ("first_k_dense_replace", "num_nextn_predict_layers"):
            self._check_integer(field, 0)
        for field in ("n_routed_experts", "n_shared_experts"):
            self._check_integer(field, 0, optional=True)
        for field in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim"):
            self._check_integer(field, 1, optional=True)
        for field in ("rms_norm_eps", "initializer_range", "attention_dropout", *LOSS_FIELDS.values()):
            self._check_number(field)
        if self.num_attention_heads % self.num_key_value_heads:
            self._refuse(
                "num_key_value_heads", f"it must divide num_attention_heads={self.num_attention_heads} evenly"
            )

    def _check_kinds(self) -> None:
        """Check the fields that are neither sizes nor part of the routing."""
        if self.hidden_act != "silu":  # the list of all others is slow to import
            from .transformers_support import ACT2CLS

            self._check_one_of("hidden_act", tuple(ACT2CLS))
        for field in ("norm_topk_prob", "seq_aux", "attention_bias", "tie_word_embeddings", "rope_interleave", "mtp",
                      "mtp_detach", "mtp_in_trl"):  # fmt: skip
            if not isinstance(getattr(self, field), bool | None):
                self._refuse(field, "it must be true or false")
        if not self.attention_dropout < 1:
            self._refuse("attention_dropout", "it must be below 1")
        if not isinstance(self.rope_parameters, dict | None):
            self._refuse("rope_parameters", "it must be a dictionary or null")
        if self.pad_token_id is not None and not -1 <= self.pad_token_id < self.vocab_size:
            self._refuse("pad_token_id", f"it must be null or a token below vocab_size={self.vocab_size}")

    def _check_rope(self) -> None:
        from .transformers_support import ROPE_INIT_FUNCTIONS

        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(map(repr, sorted({"default", *ROPE_INIT_FUNCTIONS})))
            self._refuse("rope_parameters", f"rope_type {rope_type!r} must be one of {known}")

    def _default_head_dim(self) -> int | None:
        """Return the width that the other fields give a head in the rotary embedding, or `None` if they give none."""
        if self.attention_type == "mla":
            return int(self.qk_rope_head_dim)
        width, rest = divmod(self.hidden_size, self.num_attention_heads)
        return None if rest else width

    def _derive_head_dims(self) -> None:
        if self.attention_type == "mla":
            missing = [field for field in MLA_FIELDS if getattr(self, field) is None]
            if missing:
                self._refuse(
                    missing[0],
                    f"attention_type='mla' needs {', '.join(MLA_FIELDS)}, and {', '.join(missing)} is absent",
                )
            # transformers reads both: the rotary embedding's width, and the width of a query or key head.
            self.head_dim = self.qk_rope_head_dim
            self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        elif self.head_dim is None:
            if self._default_head_dim() is None:
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
        sizes = [field for field in (*MLA_FIELDS, "q_lora_rank") if getattr(self, field) is not None]
        if self.attention_type == "mha" and sizes:
            self._refuse(sizes[0], "it belongs to attention_type='mla', which kv_lora_rank switches on")
        if self.head_dim % 2:
            field = "qk_rope_head_dim" if self.attention_type == "mla" else "head_dim"
            self._refuse(field, "the rotary embedding needs an even number")

    def _check_mtp(self) -> None:
        self._check_number("mtp_loss_coef")
        self._check_number("mtp_loss_decay", maximum=1.0)
        if self.mtp_loss_decay == 0:
            self._refuse("mtp_loss_decay", "it must be above 0")
        if self.mtp and not self.allows_mtp:
            self._refuse(
                "mtp",
                f"files of model_type {self.model_type!r} have no multi-token-prediction layers; convert the model "
                "first: `deepseekmoe convert MODEL OUT --to deepseekmoe`",
            )
        if self.mtp and not self.num_nextn_predict_layers:
            self._refuse(
                "mtp",
                "num_nextn_predict_layers=0, so there are no multi-token-prediction layers to load; "
                "add_mtp(model) of modeling_deepseekmoe gives a model new ones",
            )

    def _check_routing(self) -> None:
        experts, top_k = self.n_routed_experts, self.num_experts_per_tok
        self._check_integer("num_experts_per_tok", 1)
        if top_k > experts:
            self._refuse("num_experts_per_tok", f"it must lie between 1 and n_routed_experts={experts}")
        self._check_one_of("scoring_func", self.allowed_scoring_functions)
        self._check_one_of("topk_method", self.allowed_topk_methods)
        self._check_one_of("router_dtype", ROUTER_DTYPES)
        self._check_one_of("router_implementation", ROUTER_IMPLEMENTATIONS)
        if not isinstance(self.routed_scaling_factor, (int, float)) or not self.routed_scaling_factor > 0:
            self._refuse("routed_scaling_factor", "it must be a number above 0")
        optional = self.topk_method != "group_limited_greedy"
        self._check_integer("n_group", 1, optional=optional)
        self._check_integer("topk_group", 1, optional=optional)
        if self.topk_method == "greedy":
            if (self.topk_group or 1) < (self.n_group or 1):
                self._say("n_group", f"with topk_group={self.topk_group}, while topk_method='greedy' ignores groups")
            return
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

    def _check_balancing(self) -> None:
        self._check_integer("n_device_groups", 1, optional=True)
        self._check_integer("max_devices_per_token", 1, optional=True)
        self._check_number("token_drop_protected_share", maximum=1.0)
        if self.n_routed_experts % (self.n_device_groups or 1):
            self._refuse("n_device_groups", f"it must divide n_routed_experts={self.n_routed_experts} evenly")
        if self.token_drop_capacity_factor is not None:
            self._check_number("token_drop_capacity_factor")
            if self.token_drop_capacity_factor == 0:
                self._refuse("token_drop_capacity_factor", "it must be above 0, or null for no dropping")
        if self.n_device_groups:
            self.check_device_groups()

    def check_device_groups(self) -> None:
        """Raise a `ValueError` if a field balances devices, and there are too few of them.

        If `n_device_groups` is set, this runs with the other checks. Otherwise it runs when training begins, because
        the expert-parallel ranks are not known before.
        """
        devices, limit = self.device_groups
        if limit > devices:
            self._refuse("max_devices_per_token", f"it must lie between 1 and n_device_groups={devices}")
        for field in ("device_balance_alpha", "communication_balance_alpha", "token_drop_capacity_factor"):
            if getattr(self, field) and devices < 2:
                self._refuse(field, "it needs n_device_groups to be at least 2, or expert parallelism")


def check_implementation(implementation: str) -> None:
    """Raise a `ValueError` if there is no such implementation of routing."""
    if implementation not in ROUTER_IMPLEMENTATIONS:
        allowed = f"it must be one of {ROUTER_IMPLEMENTATIONS}"
        raise ValueError(f"implementation={implementation!r} is not allowed: {allowed}.")


__all__ = ["ATTENTION_TYPES", "LOSS_FIELDS", "MLA_FIELDS", "MTP_FIELDS", "ROUTER_DTYPES",
           "SCORING_FUNCTIONS", "TOPK_METHODS", "ChecksFields", "check_implementation"]  # fmt: skip
