# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""List which tensors a checkpoint holds: one declarative table per dialect, for reading and for writing.

A row names a tensor of the official per-expert layout, its shape in named dimensions, and what the config must say for
the tensor to exist. The stacked layout follows from the rows of the experts: a stack is the concatenation of its
experts' matrices, expert by expert. So a change of layout only changes where the same bytes lie.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from modeling_deepseekmoe.checkpoint_layout import STACKS, mtp_layers
from modeling_deepseekmoe.configuration_deepseekmoe import DeepseekMoeConfig


@dataclass(frozen=True)
class Row:
    """One kind of tensor.

    Attributes:
        name: official name, below its section (the model, a layer). `{expert}` stands for the experts' numbers.
        shape: names of its dimensions.
        needs: names of what the config must have. A `!` before a name: must not have.
        linear: whether it is a weight that FP8 checkpoints hold in FP8.
        optional: whether a checkpoint may lack it.
    """

    name: str
    shape: tuple[str, ...]
    needs: str = ""
    linear: bool = False
    optional: bool = False


def _linear(name: str, rows: str, columns: str, needs: str = "") -> Row:
    return Row(f"{name}.weight", (rows, columns), needs, linear=True)


def _bias(name: str, rows: str) -> Row:
    return Row(f"{name}.bias", (rows,), "attention_bias")


MODEL = (Row("embed_tokens.weight", ("vocabulary", "hidden")), Row("norm.weight", ("hidden",)))
HEADS = {
    "ForCausalLM": (Row("lm_head.weight", ("vocabulary", "hidden")),),
    "ForSequenceClassification": (Row("score.weight", ("labels", "hidden")),),
    "ForTokenClassification": (Row("score.weight", ("labels", "hidden")), Row("score.bias", ("labels",))),
    "Model": (),
}
NORMS = (Row("input_layernorm.weight", ("hidden",)), Row("post_attention_layernorm.weight", ("hidden",)))
MHA = (
    _linear("self_attn.q_proj", "queries", "hidden"),
    _bias("self_attn.q_proj", "queries"),
    _linear("self_attn.k_proj", "keys", "hidden"),
    _bias("self_attn.k_proj", "keys"),
    _linear("self_attn.v_proj", "keys", "hidden"),
    _bias("self_attn.v_proj", "keys"),
    _linear("self_attn.o_proj", "hidden", "queries"),
    _bias("self_attn.o_proj", "hidden"),
)
MLA = (
    _linear("self_attn.q_proj", "queries", "hidden", "!q_lora_rank"),
    _linear("self_attn.q_a_proj", "q_latent", "hidden", "q_lora_rank"),
    Row("self_attn.q_a_proj.bias", ("q_latent",), "q_lora_rank attention_bias"),
    Row("self_attn.q_a_layernorm.weight", ("q_latent",), "q_lora_rank"),
    _linear("self_attn.q_b_proj", "queries", "q_latent", "q_lora_rank"),
    _linear("self_attn.kv_a_proj_with_mqa", "kv_latent_and_rope", "hidden"),
    _bias("self_attn.kv_a_proj_with_mqa", "kv_latent_and_rope"),
    Row("self_attn.kv_a_layernorm.weight", ("kv_latent",)),
    _linear("self_attn.kv_b_proj", "keys_and_values", "kv_latent"),
    _linear("self_attn.o_proj", "hidden", "values"),
    _bias("self_attn.o_proj", "hidden"),
)
DENSE = (
    _linear("mlp.gate_proj", "ffn", "hidden"),
    _linear("mlp.up_proj", "ffn", "hidden"),
    _linear("mlp.down_proj", "hidden", "ffn"),
)
GATE = (Row("mlp.gate.weight", ("experts", "hidden")),)
BIAS = (Row("mlp.gate.e_score_correction_bias", ("experts",), "correction_bias"),)
EXPERTS = (
    _linear("mlp.experts.{expert}.gate_proj", "expert_ffn", "hidden"),
    _linear("mlp.experts.{expert}.up_proj", "expert_ffn", "hidden"),
    _linear("mlp.experts.{expert}.down_proj", "hidden", "expert_ffn"),
    _linear("mlp.shared_experts.gate_proj", "shared_ffn", "hidden", "shared_experts"),
    _linear("mlp.shared_experts.up_proj", "shared_ffn", "hidden", "shared_experts"),
    _linear("mlp.shared_experts.down_proj", "hidden", "shared_ffn", "shared_experts"),
)
MTP = (
    # The embedding and the head are the model's own: the released V3 repeats them, others leave them out.
    Row("embed_tokens.weight", ("vocabulary", "hidden"), optional=True),
    Row("enorm.weight", ("hidden",)),
    Row("hnorm.weight", ("hidden",)),
    Row("eh_proj.weight", ("hidden", "two_hidden")),
    Row("shared_head.norm.weight", ("hidden",)),
    Row("shared_head.head.weight", ("vocabulary", "hidden"), optional=True),
)


@dataclass(frozen=True)
class Table:
    """The tensors of a dialect.

    Attributes:
        attention: rows of an attention, by its type.
        moe: rows of a MoE block.
        mtp: rows that a multi-token-prediction layer adds to a decoder layer.
    """

    attention: Mapping[str, tuple[Row, ...]]
    moe: tuple[Row, ...]
    mtp: tuple[Row, ...] = ()


TABLES = {
    "deepseek": Table({"mha": MHA}, GATE + EXPERTS),
    "deepseek_v2": Table({"mla": MLA}, GATE + EXPERTS),
    "deepseek_v3": Table({"mla": MLA}, GATE + BIAS + EXPERTS, MTP),
    "deepseekmoe": Table({"mha": MHA, "mla": MLA}, GATE + BIAS + EXPERTS, MTP),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor that a config asks for.

    Attributes:
        name, shape: in the official per-expert layout.
        linear: whether FP8 checkpoints hold it in FP8.
        optional: whether a checkpoint may lack it.
        stack: for an expert's matrix, the name of its stack.
        mtp_layer: number of its multi-token-prediction layer. Such a layer may be missing as a whole.
    """

    name: str
    shape: tuple[int, ...]
    linear: bool = False
    optional: bool = False
    stack: str | None = None
    mtp_layer: int | None = None


def entries(config: DeepseekMoeConfig, *, mtp: bool = True) -> dict[str, Entry]:
    """List all tensors that a config asks for, by official name: embedding, layers, norm, head, MTP layers.

    Args:
        config: config of any dialect.
        mtp: whether to include the multi-token-prediction layers that the config promises.
    """
    table, dimensions, has = TABLES[config.model_type], _dimensions(config), _properties(config)
    head = head_of(next(iter(config.architectures or ()), "ForCausalLM"))
    root = "" if head == "Model" else "model."
    decoder = NORMS + table.attention[config.attention_type]
    found: dict[str, Entry] = {}

    def add(prefix: str, rows: tuple[Row, ...], **marks: int) -> None:
        rows = tuple(row for row in rows if _wanted(row, has))
        shapes = {row.name: tuple(dimensions[name] for name in row.shape) for row in rows}
        for row, name, stack in _expanded(rows, config.n_routed_experts or 0):
            found[prefix + name] = Entry(
                prefix + name, shapes[row.name], row.linear, row.optional, stack and prefix + stack, **marks
            )

    add(root, MODEL[:1])
    for layer in range(config.num_hidden_layers):
        add(f"{root}layers.{layer}.", decoder + (table.moe if config.is_moe_layer(layer) else DENSE))
    add(root, MODEL[1:])
    tied = config.tie_word_embeddings and head == "ForCausalLM"
    add("", tuple(replace(row, optional=tied) for row in HEADS[head]))
    for layer in mtp_layers(config) if table.mtp and mtp else ():
        block = table.moe if config.n_routed_experts else DENSE
        add(f"{root}layers.{layer}.", table.mtp + decoder + block, mtp_layer=layer)
    return found


def head_of(architecture: str) -> str:
    """Return the ending of a class name that says what head the model has.

    Raises:
        ValueError: if there is no table for the class.
    """
    for head in HEADS:
        if architecture.endswith(head):
            return head
    raise ValueError(f"architectures={architecture!r} is not allowed: it must end in one of {', '.join(HEADS)}.")


def stacks(wanted: Mapping[str, Entry]) -> dict[str, list[Entry]]:
    """Collect the matrices of every stack, in their order: expert by expert, gate before up."""
    members: dict[str, list[Entry]] = {}
    for entry in wanted.values():
        if entry.stack is not None:
            members.setdefault(entry.stack, []).append(entry)
    return members


def stack_shape(members: list[Entry], number: int) -> tuple[int, int, int]:
    """Return the shape (E, rows, columns) of a stack of `number` experts."""
    rows, columns = members[0].shape
    return number, len(members) // number * rows, columns


# ----------------------------------------------------------------------------------------------------- what a row says
def _dimensions(config: DeepseekMoeConfig) -> dict[str, int]:
    heads = config.num_attention_heads
    dimensions = {
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "two_hidden": 2 * config.hidden_size,
        "labels": config.num_labels,
        "ffn": config.intermediate_size,
        "expert_ffn": config.moe_intermediate_size,
        "shared_ffn": config.shared_intermediate_size,
        "experts": config.n_routed_experts or 0,
    }
    if config.attention_type == "mla":
        return dimensions | {
            "queries": heads * (config.qk_nope_head_dim + config.qk_rope_head_dim),
            "q_latent": config.q_lora_rank or 0,
            "kv_latent": config.kv_lora_rank,
            "kv_latent_and_rope": config.kv_lora_rank + config.qk_rope_head_dim,
            "keys_and_values": heads * (config.qk_nope_head_dim + config.v_head_dim),
            "values": heads * config.v_head_dim,
        }
    return dimensions | {"queries": heads * config.head_dim, "keys": config.num_key_value_heads * config.head_dim}


def _properties(config: DeepseekMoeConfig) -> dict[str, bool]:
    return {
        "attention_bias": config.attention_bias,
        "q_lora_rank": config.q_lora_rank is not None,
        "correction_bias": config.topk_method == "noaux_tc",
        "shared_experts": bool(config.n_shared_experts),
    }


def _wanted(row: Row, has: dict[str, bool]) -> bool:
    return all(has[name.removeprefix("!")] != name.startswith("!") for name in row.needs.split())


def _expanded(rows: tuple[Row, ...], experts: int) -> Iterator[tuple[Row, str, str | None]]:
    """Yield every row with the names of its tensors and of their stack. All matrices of an expert come together."""
    per_expert = []
    for row in rows:
        if "{expert}" not in row.name:
            yield row, row.name, None
            continue
        block, projection = row.name.split("{expert}")
        own = next(stack for stack, parts in STACKS.items() if projection.split(".")[1] in parts)
        per_expert.append((row, block, projection, block + own))
    for expert in range(experts):
        for row, block, projection, stack in per_expert:
            yield row, f"{block}{expert}{projection}", stack


__all__ = [
    "TABLES",
    "Entry",
    "Row",
    "Table",
    "entries",
    "head_of",
    "stack_shape",
    "stacks",
]
