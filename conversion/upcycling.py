# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Upcycling: a dense Llama-family model becomes a DeepSeekMoE that computes exactly what the dense model computed.

The neurons of every FFN are divided: the first ones become the shared experts, the rest is cut into G shards of equal
width. Every shard is copied C times, which makes E = G * C routed experts, and top-K is G. One router row is drawn for
each copy and repeated over its G shards (a virtual group, arXiv 2410.07524), so that the shards of one copy always
have equal logits and a token takes all G shards of its best copy. Their normalised weights are 1/G each; the scaling
factor G makes them 1, and shared plus routed experts add up to the dense FFN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from modeling_deepseekmoe import DeepseekConfig, DeepseekMoeConfig
from modeling_deepseekmoe.folders import check_destination, unfinished_folder
from modeling_deepseekmoe.modeling_deepseekmoe import DeepseekForCausalLM, DeepseekMoeForCausalLM

SOURCE_MODEL_TYPES = ("llama", "mistral", "qwen2")
STORED_DTYPES = ("keep", "float32", "bfloat16", "float16")
_DEEPSEEK_ROPE_TYPES = ("default", "linear", "dynamic")
_CHECK_TEXT = (
    "A function definition defines a user-defined function object. The definition does not execute the function body; "
    "this gets executed only when the function is called. What does a decorator do? It wraps the function, so that"
)


class UpcyclingError(RuntimeError):
    """The upcycled model does not compute what the dense model computes."""


@dataclass(frozen=True)
class UpcyclingPlan:
    """How an FFN is divided.

    Attributes:
        shared_width: neurons that become the shared experts; a multiple of the width of one shard, 0 for none.
        num_shards: G, the shards of the other neurons, and the number of experts that a token uses.
        num_copies: C, the copies of every shard.
        first_k_dense: the first layers that keep their dense FFN.
        router_std: standard deviation of the router's rows. A small one keeps the copies' logits close, so that the
            first updates break the virtual groups: tokens then take shards of several copies, some twice and some not
            at all. See benchmarks/router_std.py.
        noise: standard deviation of Gaussian noise on the routed experts, in units of each tensor's own standard
            deviation; 0 keeps all copies equal, and the model exact.
        dialect: `"deepseekmoe"`, or `"deepseek"`, which has no scaling factor and no tied embeddings: G is folded
            into the down projections there, and the head is written out.
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
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}={getattr(self, field)} is not allowed: it must be at least 0.")
        if self.dialect not in ("deepseekmoe", "deepseek"):
            raise ValueError(f"dialect={self.dialect!r} is not allowed: it must be 'deepseekmoe' or 'deepseek'.")

    def shard_width(self, intermediate_size: int) -> int:
        """Width of one shard, which is the width of one expert.

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


@dataclass(frozen=True)
class UpcyclingCheck:
    """What the comparison with the dense model found.

    Attributes:
        max_logit_difference: largest absolute difference of the logits.
        tolerance: what is allowed.
        same_text: whether the greedy continuations are equal.
        new_tokens: their length in tokens.
    """

    max_logit_difference: float
    tolerance: float
    same_text: bool
    new_tokens: int

    @property
    def passed(self) -> bool:
        """Whether the logits are within the tolerance and the continuations equal."""
        return self.max_logit_difference <= self.tolerance and self.same_text

    def __str__(self) -> str:
        text = "the same" if self.same_text else "NOT the same"
        return (
            f"max |logit difference| {self.max_logit_difference:.2e} (allowed {self.tolerance:g}), "
            f"greedy text of {self.new_tokens} tokens {text}"
        )


def upcycle(
    source: str | Path,
    destination: str | Path,
    plan: UpcyclingPlan,
    *,
    dtype: str = "keep",
    gguf_file: str | None = None,
    tolerance: float = 1e-3,
    report: Callable[[str], None] = lambda line: None,
) -> UpcyclingCheck:
    """Upcycle a checkpoint folder and verify the result against the dense model before it is written.

    The weights are compared as they will be stored, computed with in float32. Tokenizer and generation config come
    along. `destination` appears only when it is complete.

    Args:
        source: folder or hub id of a dense checkpoint (Llama, Mistral, Qwen2, SmolLM2).
        destination: folder to write; it must not exist or be empty.
        plan: how the FFNs are divided.
        dtype: what to store: `"keep"` (the source's dtype), `"float32"`, `"bfloat16"` or `"float16"`.
        gguf_file: name of a GGUF file inside `source` (needs the `gguf` package).
        tolerance: largest allowed difference of the logits.
        report: receives a line of progress at every step.

    Returns:
        [`UpcyclingCheck`].

    Raises:
        ValueError: for a source or a plan that cannot be upcycled, or a destination in use.
        UpcyclingError: if the result does not equal the dense model. Nothing is written then.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype={dtype!r} is not allowed: it must be one of {', '.join(STORED_DTYPES)}.")
    destination = check_destination(destination)
    kwargs = {"gguf_file": gguf_file} if gguf_file is not None else {}
    report(f"Loading the dense model from {source}")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype="auto", **kwargs).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    stored = dense.dtype if dtype == "keep" else getattr(torch, dtype)
    _cast(dense, torch.float32)

    report(f"Dividing {dense.config.num_hidden_layers} FFNs of width {dense.config.intermediate_size}")
    model = upcycle_model(dense, plan)
    _cast(model, stored)
    _cast(model, torch.float32)
    check = verify_upcycling(dense, model, tokenizer(_CHECK_TEXT, return_tensors="pt").input_ids, tolerance=tolerance)
    report(f"Compared with the dense model: {check}")
    if not check.passed:
        hint = ""
        if plan.dialect == "deepseek" and stored != torch.float32:
            hint = (
                f" Dialect 'deepseek' folds the factor num_shards={plan.num_shards} into the down projections: exact "
                f"in {stored} only for a power of two. Choose one, or dtype='float32'."
            )
        raise UpcyclingError(f"The upcycled model differs from the dense model: {check}.{hint}")
    if plan.noise:
        add_noise(model, plan.noise, plan.seed)
    report(f"Saving to {destination}")
    _cast(model, stored)
    with unfinished_folder(destination) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return check


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters. Not `model.to`: it would round the rotary embedding's buffers, which are never stored, and
    transformers refuses it for a model that came from a GGUF file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def upcycle_model(dense: PreTrainedModel, plan: UpcyclingPlan) -> DeepseekMoeForCausalLM:
    """The DeepSeekMoE of a dense model, in its dtype and on its device. The plan's noise is not applied, so that the
    result can be compared; see [`add_noise`].

    Raises:
        ValueError: for an architecture or a plan that cannot be upcycled exactly.
    """
    config = upcycled_config(dense.config, plan)
    with torch.device("meta"):
        model = (DeepseekForCausalLM if plan.dialect == "deepseek" else DeepseekMoeForCausalLM)(config)
    tensors = _upcycled_tensors(dense, config, plan)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    unknown = set(tensors) - set(model.state_dict())
    if missing or unknown:
        raise ValueError(f"Cannot upcycle: no value for {missing}, no place for {sorted(unknown)}.")
    # The rotary embedding's buffers are in no checkpoint: take those of a model that was not built on meta.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(dense.device)
    model.generation_config = dense.generation_config
    return model.eval()


def upcycled_config(dense: Any, plan: UpcyclingPlan) -> DeepseekMoeConfig:
    """The config of the upcycled model; raises `ValueError`, naming the field, for what cannot be kept exactly."""
    _check_source(dense)
    rope_parameters = dict(dense.rope_parameters)
    if plan.dialect == "deepseek" and rope_parameters.get("rope_type", "default") not in _DEEPSEEK_ROPE_TYPES:
        raise ValueError(
            f"rope_type={rope_parameters['rope_type']!r} is not allowed for dialect 'deepseek': it must be one of "
            f"{', '.join(_DEEPSEEK_ROPE_TYPES)}."
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
    )


def add_noise(model: DeepseekMoeForCausalLM, noise: float, seed: int = 0) -> None:
    """Add Gaussian noise to the routed experts, `noise` times each stack's own standard deviation."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name:
                sample = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(sample, alpha=noise * float(parameter.float().std()))


@torch.no_grad()
def verify_upcycling(
    dense: PreTrainedModel,
    model: DeepseekMoeForCausalLM,
    input_ids: torch.Tensor,
    *,
    tolerance: float = 1e-3,
    new_tokens: int = 32,
) -> UpcyclingCheck:
    """Compare the upcycled model with the dense model, both in evaluation mode.

    Args:
        dense, model: the two models, in the same dtype and on the same device.
        input_ids (`torch.LongTensor` of shape (B, S)): tokens to compare the logits on; the first sequence is also
            continued greedily by `new_tokens`.
        tolerance: largest allowed absolute difference of the logits.
    """
    input_ids = input_ids.to(dense.device)
    difference = (dense(input_ids).logits.float() - model(input_ids).logits.float()).abs().max()
    prompt = input_ids[:1, : min(16, input_ids.shape[1])]
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    texts = [candidate.generate(prompt, attention_mask=mask, **settings) for candidate in (dense, model)]
    return UpcyclingCheck(float(difference), tolerance, torch.equal(*texts), texts[1].shape[1] - prompt.shape[1])


# --------------------------------------------------------------------------------------------------------- the tensors
def _upcycled_tensors(
    dense: PreTrainedModel, config: DeepseekMoeConfig, plan: UpcyclingPlan
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(plan.seed)
    divided = tuple(f"model.layers.{layer_idx}.mlp." for layer_idx in config.moe_layers)
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if not name.startswith(divided)}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    elif dense.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if config.attention_bias:
        for layer_idx in range(config.num_hidden_layers):
            output = f"model.layers.{layer_idx}.self_attn.o_proj"
            if f"{output}.bias" not in tensors:  # Qwen2
                tensors[f"{output}.bias"] = torch.zeros_like(tensors[f"{output}.weight"][:, 0])
    for prefix in divided:
        block = _divide_ffn(dense.get_submodule(prefix.removesuffix(".")), config, plan, generator)
        tensors |= {prefix + name: tensor for name, tensor in block.items()}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _divide_ffn(
    ffn: nn.Module, config: DeepseekMoeConfig, plan: UpcyclingPlan, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Tensors of the MoE block that equals a dense FFN. Expert c * G + g is copy c of shard g."""
    gate, up, down = ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight
    cut, shards, copies = plan.shared_width, plan.num_shards, plan.num_copies
    gate_up = torch.cat([gate[cut:].unflatten(0, (shards, -1)), up[cut:].unflatten(0, (shards, -1))], dim=1)
    downs = down[:, cut:].unflatten(1, (shards, -1)).transpose(0, 1)
    if plan.dialect == "deepseek":
        downs = downs * shards
    rows = torch.randn(copies, config.hidden_size, generator=generator) * plan.router_std
    tensors = {
        "gate.weight": rows.repeat_interleave(shards, dim=0).to(gate),
        "experts.gate_up_proj": gate_up.repeat(copies, 1, 1),
        "experts.down_proj": downs.repeat(copies, 1, 1),
    }
    if cut:
        tensors |= {
            "shared_experts.gate_proj.weight": gate[:cut].clone(),
            "shared_experts.up_proj.weight": up[:cut].clone(),
            "shared_experts.down_proj.weight": down[:, :cut].clone(),
        }
    return tensors


# ---------------------------------------------------------------------------------------------------------- the source
def _check_source(dense: Any) -> None:
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


__all__ = [
    "UpcyclingCheck",
    "UpcyclingError",
    "UpcyclingPlan",
    "add_noise",
    "upcycle",
    "upcycle_model",
    "upcycled_config",
    "verify_upcycling",
]
