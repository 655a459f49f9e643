# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Divide the FFNs of a dense Llama-family model into experts, so that the DeepSeekMoE computes exactly the same.

The first neurons of every FFN become the shared experts. The rest is cut into G shards of equal width. Every shard is
copied C times, which makes E = G * C routed experts. Top-K is G.

One router row is drawn for each copy, and repeated over the copy's G shards: a virtual group (arXiv 2410.07524). So
the shards of one copy always have equal logits, and a token takes all G shards of its best copy. Their normalised
weights are 1/G each. The scaling factor G makes them 1, so that shared plus routed experts add up to the dense FFN.
"""

import math
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from modeling_deepseekmoe.configuration_deepseekmoe import DeepseekMoeConfig
from modeling_deepseekmoe.configuration_dialects import DeepseekConfig
from modeling_deepseekmoe.conversion.checkpoint import TensorSource
from modeling_deepseekmoe.conversion.dialects import DEEPSEEK_ROPE_TYPES, architectures_of
from modeling_deepseekmoe.conversion.locating import Matrix, locate
from modeling_deepseekmoe.conversion.streaming import Cast, Constant, Copied, Part, row_blocks, values
from modeling_deepseekmoe.conversion.targets import Tensors, plain
from modeling_deepseekmoe.conversion.tensor_table import Entry, entries

SOURCE_MODEL_TYPES = ("llama", "mistral", "qwen2")
_MOE_TENSOR = re.compile(
    r"^(?P<block>model\.layers\.\d+\.mlp\.)(?P<kind>gate|shared_experts|experts)\."
    r"(?:(?P<expert>\d+)\.)?(?:(?P<projection>\w+_proj)\.)?weight$"
)


@dataclass(frozen=True)
class UpcyclingPlan:
    """How an FFN is divided.

    Attributes:
        shared_width: neurons that become the shared experts. It is a multiple of the width of one shard, 0 for none.
        num_shards: G, the shards of the other neurons, and the number of experts that a token uses.
        num_copies: C, the copies of every shard.
        first_k_dense: the first layers that keep their dense FFN.
        router_std: standard deviation of the router's rows. A small one keeps the copies' logits close, so that the
            first updates break the virtual groups: tokens then take shards of several copies, some twice and some not
            at all. See benchmarks/router_std.py.
        noise: standard deviation of Gaussian noise on the routed experts, in units of each tensor's own standard
            deviation. 0 keeps all copies equal, and the model exact.
        dialect: `"deepseekmoe"`, or `"deepseek"`, which has no scaling factor and no tied embeddings. There G is
            folded into the down projections, and the head is written out.
        seed: seed of the router and the noise.
    """

    shared_width: int
    num_shards: int
    num_copies: int
    first_k_dense: int = 0
    router_std: float = 0.3
    noise: float = 0.0
    dialect: str = "deepseekmoe"
    seed: int = 0

    def __post_init__(self) -> None:
        for field, minimum in (("shared_width", 0), ("num_shards", 1), ("num_copies", 1), ("first_k_dense", 0)):
            if getattr(self, field) < minimum:
                raise ValueError(f"{field}={getattr(self, field)} is not allowed: it must be at least {minimum}.")
        if self.num_shards == 1 < self.num_copies:
            raise ValueError(
                f"num_shards=1 is not allowed with num_copies={self.num_copies}: it must be at least 2, because "
                "the weight of a single chosen expert is not normalised and would not be 1."
            )
        for field in ("router_std", "noise"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field}={getattr(self, field)} is not allowed: it must be finite and at least 0.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} is not allowed: it must be at least 0 and below 2**31.")
        if self.dialect not in ("deepseekmoe", "deepseek"):
            raise ValueError(f"dialect={self.dialect!r} is not allowed: it must be 'deepseekmoe' or 'deepseek'.")

    def shard_width(self, intermediate_size: int) -> int:
        """Compute the width of one shard, which is the width of one expert.

        Raises:
            ValueError: if the neurons cannot be divided this way.
        """
        routed = intermediate_size - self.shared_width
        if routed <= 0 or routed % self.num_shards:
            raise ValueError(
                f"num_shards={self.num_shards} is not allowed: it must divide the {routed} neurons that the "
                f"shared_width={self.shared_width} leaves of intermediate_size={intermediate_size}."
            )
        width = routed // self.num_shards
        if self.shared_width % width:
            raise ValueError(
                f"shared_width={self.shared_width} is not allowed: it must be a multiple of the expert width {width}."
            )
        return width


def upcycled_config(dense: Any, plan: UpcyclingPlan) -> DeepseekMoeConfig:
    """Make the config of the upcycled model. Raise ValueError, naming the field, if it cannot be kept exactly."""
    _check_source(dense)
    rope_parameters = dict(dense.rope_parameters)
    if plan.dialect == "deepseek" and rope_parameters.get("rope_type", "default") not in DEEPSEEK_ROPE_TYPES:
        raise ValueError(
            f"rope_type={rope_parameters['rope_type']!r} is not allowed for dialect 'deepseek': it must be one of "
            f"{', '.join(DEEPSEEK_ROPE_TYPES)}."
        )
    if plan.first_k_dense >= dense.num_hidden_layers:
        raise ValueError(
            f"first_k_dense={plan.first_k_dense} is not allowed: it must be below num_hidden_layers="
            f"{dense.num_hidden_layers}."
        )
    width = plan.shard_width(dense.intermediate_size)
    shared: dict[str, Any] = {
        name: getattr(dense, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "hidden_act",
            "max_position_embeddings",
            "initializer_range",
            "rms_norm_eps",
            "attention_dropout",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
        )
    }
    return (DeepseekConfig if plan.dialect == "deepseek" else DeepseekMoeConfig)(
        **shared,
        head_dim=getattr(dense, "head_dim", None),
        rope_parameters=rope_parameters,
        attention_bias=_has_attention_bias(dense),
        tie_word_embeddings=bool(dense.tie_word_embeddings) and plan.dialect == "deepseekmoe",
        first_k_dense_replace=plan.first_k_dense,
        moe_intermediate_size=width,
        n_shared_experts=plan.shared_width // width,
        n_routed_experts=plan.num_shards * plan.num_copies,
        num_experts_per_tok=plan.num_shards,
        norm_topk_prob=True,
        routed_scaling_factor=float(plan.num_shards) if plan.dialect == "deepseekmoe" else 1.0,
        architectures=architectures_of(plan.dialect, None),
    )


# --------------------------------------------------------------------------------------------------------- the tensors
@dataclass(frozen=True)
class _Noisy(Cast):
    """Values with Gaussian noise, `noise` times their own standard deviation."""

    noise: float = 0.0
    seed: int = 0

    def blocks(self, source: TensorSource) -> Iterator[torch.Tensor]:
        """Yield the noisy values. They are read twice: once for the standard deviation."""
        total = square = 0.0
        for first, last in row_blocks(self.matrix):
            exact = values(self.matrix, source, first, last).double()
            total, square = total + float(exact.sum()), square + float((exact**2).sum())
        std = math.sqrt(max(0.0, square / self.numel - (total / self.numel) ** 2))
        generator = torch.Generator().manual_seed(self.seed)
        for first, last in row_blocks(self.matrix):
            exact = values(self.matrix, source, first, last)
            sample = torch.randn(exact.shape, generator=generator).to(exact)
            yield ((exact + self.noise * std * sample) * self.factor).to(self.dtype)


def upcycled_tensors(
    config: DeepseekMoeConfig,
    matrices: Mapping[str, Matrix],
    plan: UpcyclingPlan,
    stored: torch.dtype | None,
    *,
    noise: bool,
) -> dict[str, Tensors]:
    """Return what every tensor of the upcycled model is made of, by official name.

    Args:
        config: [`upcycled_config`].
        matrices: [`dense_matrices`].
        plan: how the FFNs are divided.
        stored: the dtype, or `None` for the source's.
        noise: whether to apply the plan's noise to the routed experts.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    embedding = matrices["model.embed_tokens.weight"]
    dtype = stored or embedding.tensor.dtype
    tensors: dict[str, Tensors] = {}
    for number, (name, entry) in enumerate(entries(config).items()):
        match = _MOE_TENSOR.match(name)
        part: Part
        if match and match["kind"] == "gate":
            rows = torch.randn(plan.num_copies, config.hidden_size, generator=generator) * plan.router_std
            part = Constant(rows.repeat_interleave(plan.num_shards, dim=0).to(dtype))
        elif match:
            projection = matrices[f"{match['block']}{match['projection']}.weight"]
            neurons = _neurons(plan, config, match["expert"])
            cut = projection.part(columns=neurons) if match["projection"] == "down_proj" else projection.part(neurons)
            folded = plan.dialect == "deepseek" and match["expert"] and match["projection"] == "down_proj"
            factor = float(plan.num_shards) if folded else 1.0
            part = _stored(cut, stored, factor)
            if noise and match["expert"]:
                part = _Noisy(cut, part.dtype, factor, plan.noise, (plan.seed + 1) * 1_000_003 + number)
        elif name in matrices:
            part = _stored(matrices[name], stored)
        elif name == "lm_head.weight" and not entry.optional:
            part = _stored(embedding, stored)
        elif name.endswith("o_proj.bias"):  # Qwen2
            part = Constant(torch.zeros(entry.shape, dtype=dtype))
        else:
            assert entry.optional, name  # a tied head
            continue
        tensors[name] = plain(entry, part)
    return tensors


def _stored(matrix: Matrix, dtype: torch.dtype | None, factor: float = 1.0) -> Part:
    dtype = dtype or matrix.tensor.dtype
    return Copied(matrix) if dtype == matrix.tensor.dtype and factor == 1 else Cast(matrix, dtype, factor)


def _neurons(plan: UpcyclingPlan, config: DeepseekMoeConfig, expert: str | None) -> range:
    """Return the neurons of the shared experts, or of a routed expert: number c * G + g is copy c of shard g."""
    if expert is None:
        return range(plan.shared_width)
    first = plan.shared_width + int(expert) % plan.num_shards * config.moe_intermediate_size
    return range(first, first + config.moe_intermediate_size)


# ---------------------------------------------------------------------------------------------------------- the source
def _check_source(dense: Any) -> None:
    if dense.model_type == "qwen3":
        raise ValueError(
            "model_type='qwen3' is not allowed as a source: it normalises queries and keys (QK-norm: q_norm and "
            "k_norm, a weight for every dimension of a head), which the attention of DeepSeekMoE does not."
        )
    if dense.model_type not in SOURCE_MODEL_TYPES:
        raise ValueError(
            f"model_type={dense.model_type!r} is not allowed as a source: it must be one of "
            f"{', '.join(SOURCE_MODEL_TYPES)}."
        )
    if getattr(dense, "mlp_bias", False):
        raise ValueError("mlp_bias=True is not allowed as a source: experts have no bias.")
    window = getattr(dense, "sliding_window", None)
    if window is not None and getattr(dense, "use_sliding_window", True) and window < dense.max_position_embeddings:
        raise ValueError(
            f"sliding_window={window} is not allowed as a source: DeepSeekMoE attends to all positions; it must be "
            f"null or at least max_position_embeddings={dense.max_position_embeddings}."
        )


def _has_attention_bias(dense: Any) -> bool:
    # Qwen2 has biases on queries, keys and values, always, and says so in no field.
    return dense.model_type == "qwen2" or bool(getattr(dense, "attention_bias", False))


def dense_matrices(dense: Any, config: DeepseekMoeConfig, source: TensorSource) -> dict[str, Matrix]:
    """Find where the tensors of the dense model lie. They are those of a model of the family without MoE layers.

    Raises:
        ValueError: listing tensors that are missing, that have no place, or that have another shape.
    """
    without_experts = deepcopy(config)
    without_experts.n_routed_experts, without_experts.architectures = None, None
    without_experts.tie_word_embeddings = bool(dense.tie_word_embeddings)
    wanted: dict[str, Entry] = entries(without_experts)
    if dense.model_type == "qwen2":
        wanted = {name: entry for name, entry in wanted.items() if not name.endswith("o_proj.bias")}
    return locate(wanted, source.tensors).matrices


__all__ = ["UpcyclingPlan", "dense_matrices", "upcycled_config", "upcycled_tensors"]
