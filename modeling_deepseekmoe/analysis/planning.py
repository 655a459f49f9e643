# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Plan on which layout of ranks a training fits: the memory of every rank by part, and what it sends in a step.

Sizes are counted from shapes on the meta device. They hold for training as the examples and the files in
`configuration/accelerate` do it, with AdamW. Full training holds weights in float32 and computes in bfloat16. LoRA is
in float32 on a frozen base in bfloat16. ESFT has everything in bfloat16. `benchmarks/sharded_training.py` compares
runs on the CPU with these sizes. What CUDA keeps for itself is an assumption.

Shape letters: D hidden, V vocabulary, E routed experts, K chosen experts, I expert width.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..checkpoint_layout import MODEL_TYPES
from ..experts import why_unsupported
from ..families.moe_layers import find_experts
from ..support.sizes import bytes_of
from .activations import Activations
from .counted_model import CountedModel
from .inspection import gigabytes
from .meta_models import config_named

METHODS = ("full", "lora", "esft")
CUDA_CONTEXT, CUDA_FRAGMENTATION = 1.5e9, 0.05  # assumed: bytes, and a share of the rest
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Layout:
    """How ranks share a model.

    Attributes:
        configuration: the file of `configuration/accelerate`, with options of the example.
        replicas: ranks, or groups of ranks, that hold the same parameters and get different batches.
        shards: ranks among which FSDP2 divides the model.
        ep_size: ranks that hold distinct experts, a divisor of `shards`.
        offload: whether the shards lie in the machine's memory.
    """

    configuration: str
    replicas: int = 1
    shards: int = 1
    ep_size: int = 1
    offload: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """What a rank needs in one layout.

    Attributes:
        layout: the layout.
        parameters: parameters of the whole model.
        trained: parameters that are trained, adapters among them.
        parts: bytes of a rank's device by part.
        host: bytes of the machine's memory that a rank needs with offloading.
        sent: bytes that a rank sends in one optimizer step of one micro-batch, by kind.
        fits: whether the parts fit the memory that was asked about.
    """

    layout: Layout
    parameters: int
    trained: int
    parts: dict[str, int]
    host: int
    sent: dict[str, int]
    fits: bool = True

    @property
    def total(self) -> int:
        """Bytes of a rank's device."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain numbers and strings."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class _Sizes:
    """Numbers of a model's parameters.

    Attributes:
        total, routed: all parameters, and those of routed experts.
        layers: routed and other parameters of every layer.
        embedding, tail: parameters of the largest embedding and of the head.
    """

    total: int
    routed: int
    layers: tuple[tuple[int, int], ...]
    embedding: int
    tail: int

    def largest_unit(self, ep_size: int) -> int:
        """Find the most that FSDP2 gathers at once: a layer with the experts of one rank, or the embedding."""
        return max(self.embedding, *(routed // ep_size + other for routed, other in self.layers))

    @classmethod
    def of(cls, counted: CountedModel) -> "_Sizes":
        layers = []
        for names in counted.units.values():
            of_experts = sum(counted.parameters[name].numel() for name in names if name in counted.routed)
            layers.append((of_experts, sum(counted.parameters[name].numel() for name in names) - of_experts))
        embedding = max(table.numel() for table in counted.tables.values())
        tail = sum(one.numel() for one in counted.head.values()) or counted.embedding.numel()
        routed = sum(one.numel() for one in counted.routed.values())
        total = sum(one.numel() for one in counted.parameters.values())
        return cls(total, routed, tuple(layers), embedding, tail)


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        method: `"full"`, `"lora"` (on all linear layers but the gate, and on every expert) or `"esft"`.
        weights: dtype in which the model is held. The default is float32 for full training, else bfloat16.
        compute: dtype of the products, `"bfloat16"` or `"float32"`.
        lora_rank: rank of every adapter.
        esft_share: share of the routed experts that ESFT trains.
        tokens: tokens of one micro-batch on one rank.
        checkpointing: whether layers are recomputed in the backward pass.
        cuda: whether to add what CUDA keeps for itself.
    """

    method: str = "full"
    weights: str | None = None
    compute: str = "bfloat16"
    lora_rank: int = 16
    esft_share: float = 0.1
    tokens: int = 4096
    checkpointing: bool = True
    cuda: bool = True

    @property
    def held_dtype(self) -> str:
        """The dtype in which the model is held."""
        return self.weights or ("float32" if self.method == "full" else "bfloat16")

    @property
    def held(self) -> int:
        """Bytes of a parameter."""
        return _BYTES[self.held_dtype]

    @property
    def used(self) -> int:
        """Bytes of a number in a product."""
        return _BYTES[self.compute]

    @property
    def trains_all(self) -> bool:
        """Whether every parameter is trained."""
        return self.method == "full"

    def check(self, counted: CountedModel, layout: Layout) -> None:
        """Raise ValueError if a field names what does not exist, or is not allowed for this model in this layout."""
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not allowed: it must be one of {', '.join(METHODS)}.")
        for name, dtype in (("weights", self.held_dtype), ("compute", self.compute)):
            if dtype not in _BYTES:
                raise ValueError(f"{name}={dtype!r} is not allowed: it must be one of {', '.join(_BYTES)}.")
        if not 0 < self.esft_share <= 1:
            raise ValueError(f"esft_share={self.esft_share} is not allowed: it must be above 0 and at most 1.")
        for name, number in (("lora_rank", self.lora_rank), ("tokens", self.tokens)):
            if number < 1:
                raise ValueError(f"{name}={number} is not allowed: it must be at least 1.")
        if self.method == "esft" and not counted.layers:
            raise ValueError("method='esft' is not allowed for a model without routed experts.")
        if self.method != "full" and (reason := _why_not_adapted(counted)):
            raise ValueError(f"method={self.method!r} is not allowed: {reason}. It must be 'full'.")
        if layout.offload and self.method != "full":
            raise ValueError(f"method={self.method!r} is not allowed with offloading: it must be 'full'.")
        experts, allowed = _experts_to_spread(counted), layout.ep_size == 1 or _spreads(counted, layout.ep_size)
        if layout.shards % layout.ep_size or not allowed:
            raise ValueError(
                f"ep_size={layout.ep_size} is not allowed: it must divide the {layout.shards} shards and the "
                f"{experts} routed experts, and the model must be of one of the types {', '.join(MODEL_TYPES)}."
            )


def _why_not_adapted(counted: CountedModel) -> str:
    """Return why neither LoRA nor ESFT takes the experts of a model; it is empty if they do."""
    stacked = find_experts(counted.model)
    if len(stacked) < len(counted.layers):
        return "the routed experts are not stacked as expert LoRA and ESFT need them"
    for name, experts in stacked.values():
        if reason := why_unsupported(experts):
            return f"{name} ({type(experts).__name__}): {reason}"
    return ""


def plan_memory(
    config: PreTrainedConfig,
    layout: Layout,
    *,
    counted: CountedModel | None = None,
    **training: Any,
) -> MemoryPlan:
    """Work out what a rank needs to train a model in a layout.

    Args:
        config: config of the model, of any family.
        layout: how the ranks share it.
        counted: `CountedModel.of(config)`, if it is at hand.
        training: fields of [`Training`].

    Raises:
        ValueError: if a method or a dtype does not exist, if a number is not allowed, or if it cannot be told how many
            experts a token uses.
    """
    how = Training(**training)
    counted = CountedModel.of(config) if counted is None else counted
    how.check(counted, layout)
    sizes, shards = _Sizes.of(counted), layout.shards
    trained, trained_bytes = sizes.total, 4 * how.held  # weight, gradient and two moments, in the same dtype
    if how.method == "lora":
        trained = counted.lora_parameters(how.lora_rank)
        trained_bytes = 4 * _BYTES["float32"]
    elif how.method == "esft":
        trained = round(how.esft_share * sizes.routed)
    copies = shards if how.trains_all else 1  # what is trained beside the base lies on every rank
    parts = {
        "weights": how.held * sizes.total // shards,
        "trained beside them": 0 if how.trains_all else trained_bytes // 4 * trained,
        "gradients": trained_bytes // 4 * trained // copies,
        "optimizer": trained_bytes // 2 * trained // copies,
    }
    if shards == 1 and layout.replicas > 1:
        parts["buckets of DDP"] = parts["gradients"]
    host = sum(parts.values()) if layout.offload else 0
    if layout.offload:
        parts = dict.fromkeys(parts, 0)
    parts["gathered layers"] = _gathered(sizes, layout, how.used, how.trains_all)
    parts["activations"] = _activations(Activations.of(counted), how)
    if how.held_dtype != how.compute and shards == 1:  # autocast's copies, of one layer where layers are recomputed
        parts["activations"] += how.used * (sizes.largest_unit(1) if how.checkpointing else sizes.total)
    if how.cuda:
        parts["CUDA (assumed)"] = round(CUDA_CONTEXT + CUDA_FRAGMENTATION * sum(parts.values()))
    reduced = trained_bytes // 4 * trained  # gradients of what every rank holds, in its own dtype
    return MemoryPlan(layout, sizes.total, trained, parts, host, _sent(counted, sizes, layout, reduced, how))


def _gathered(sizes: _Sizes, layout: Layout, used: int, trains_all: bool) -> int:
    """Count the bytes that FSDP2 puts together in a rank's memory.

    These are the layer that computes, received and copied out, and the layer before or after it. In a backward pass of
    full training they are two layers, the gradients of one, and their sum in float32 on the way to the shards. The
    head is always among them: it stays between the passes.
    """
    if layout.shards == 1:
        return 0
    unit = sizes.largest_unit(layout.ep_size)
    backward = (2 * used + used + 4) * unit if trains_all else 0
    return max(3 * used * unit, backward) + used * sizes.tail


def _activations(kept: Activations, how: Training) -> int:
    """Count the bytes that the backward pass needs: the main tensors of layers, and the logits.

    The tensors are those of all layers or, if layers are recomputed, those of one.
    """
    elements = kept.layers * kept.hidden + kept.layer if how.checkpointing else kept.layers * kept.layer
    elements += kept.rows  # of the experts, once
    logits = (how.used + 3 * 4) * kept.vocabulary  # and their copy, softmax and gradient in float32
    return how.tokens * (how.used * elements + logits)


def _sent(counted: CountedModel, sizes: _Sizes, layout: Layout, reduced: int, how: Training) -> dict[str, int]:
    """Count the bytes that a rank sends, by kind.

    Transfers go round rings. An all-gather or a reduce-scatter of n ranks sends (n - 1) / n of the whole, an
    all-reduce twice that.
    """
    shards, replicas, ep_size = layout.shards, layout.replicas, layout.ep_size
    ranks = shards * replicas
    expert_shards = shards // ep_size
    others = sizes.total - sizes.routed
    sent: dict[str, float] = {}
    if shards > 1:
        gathered = (2 * others - sizes.tail) * (shards - 1) / shards
        gathered += 2 * sizes.routed / ep_size * (expert_shards - 1) / expert_shards
        sent["weights gathered"] = how.used * gathered
        if how.trains_all:
            scattered = others * (shards - 1) / shards
            scattered += sizes.routed / ep_size * (expert_shards - 1) / expert_shards
            sent["gradients"] = 4 * scattered
    if how.trains_all and replicas > 1:
        sent["gradients"] = sent.get("gradients", 0) + 2 * (replicas - 1) / replicas * reduced / shards
    if not how.trains_all and ranks > 1:
        sent["gradients"] = 2 * (ranks - 1) / ranks * reduced
    if ep_size > 1:
        passes = 6 if how.checkpointing else 4  # there and back, forward, recomputed and backward
        rows = sum(layer.choices for layer in counted.moe_layers) * counted.text_config.hidden_size
        sent["tokens to experts"] = passes * how.tokens * rows * how.used * (ep_size - 1) / ep_size
    return {kind: round(size) for kind, size in sent.items()}


# ------------------------------------------------------------------------------------------------ the possible layouts
def plan_training(
    name_or_folder: str | Path,
    *,
    gpus: int,
    gpu_memory: str | int,
    gpus_per_machine: int = 8,
    method: str = "full",
    **settings: Any,
) -> list[MemoryPlan]:
    """Plan a training for every layout that a number of GPUs allows, the simplest first.

    Args:
        name_or_folder: a preset, or a folder with a `config.json` of any family, as for [`inspect_model`].
        gpus: number of GPUs in all.
        gpu_memory: memory of one, in bytes or as `"80GB"`.
        gpus_per_machine: number of GPUs with fast links between them.
        method, settings: fields of [`Training`].

    Returns:
        One [`MemoryPlan`] for each layout. The first that fits is the one to use. Layouts that spread the experts
        (`--ep-size`) are there for the four types of this package: the examples can do that with them alone.

    Raises:
        ValueError: if a number is not allowed, if the model is none that [`inspect_model`] takes, or if it cannot be
            told how many experts a token uses.
    """
    memory = bytes_of("gpu_memory", gpu_memory, least=10**6, example="'80GB' or '24GiB'")
    for name, number in (("gpus", gpus), ("gpus_per_machine", gpus_per_machine)):
        if number < 1:
            raise ValueError(f"{name}={number} is not allowed: it must be at least 1.")
    if gpus > gpus_per_machine and gpus % gpus_per_machine:
        raise ValueError(f"gpus={gpus} is not allowed: it must be a multiple of gpus_per_machine={gpus_per_machine}.")
    config = config_named(name_or_folder)
    counted, plans = CountedModel.of(config), []
    for layout in _layouts(counted, gpus, min(gpus, gpus_per_machine), method):
        plan = plan_memory(config, layout, method=method, counted=counted, **settings)
        plans.append(MemoryPlan(**{**vars(plan), "fits": plan.total <= memory}))
    return plans


def _experts_to_spread(counted: CountedModel) -> int:
    """Return how many routed experts a layer has, those of the layer with the fewest; 0 if there are none."""
    return min((layer.num_experts for layer in counted.layers), default=0)


def _spreads(counted: CountedModel, ep_size: int) -> bool:
    """Tell whether the ranks of a group can hold distinct experts: the examples do that with this package's models."""
    experts = _experts_to_spread(counted)
    return counted.model.config.model_type in MODEL_TYPES and experts > 0 and experts % ep_size == 0


def _layouts(counted: CountedModel, gpus: int, in_machine: int, method: str) -> Iterator[Layout]:
    sharded = "fsdp2_lora.yaml" if method == "lora" else "fsdp2_full.yaml"
    if gpus == 1:
        yield Layout("single_gpu.yaml")
        return
    yield Layout("ddp.yaml", replicas=gpus)
    machines = gpus // in_machine
    if machines > 1 and in_machine > 1:
        own = (machines, in_machine) != (2, 8)  # those of the file
        sizes = f" (dp_replicate_size {machines}, dp_shard_size {in_machine})" if own else ""
        yield Layout(f"hsdp.yaml{sizes}", replicas=machines, shards=in_machine)
    yield Layout(sharded, shards=gpus)
    if in_machine > 1 and method != "esft" and _spreads(counted, in_machine):
        yield Layout(f"{sharded} --ep-size {in_machine}", shards=gpus, ep_size=in_machine)
    if method == "full":  # adapters and selected experts are made where the base lies, which would be the CPU
        yield Layout("fsdp2_cpu_offload.yaml", shards=gpus, offload=True)


def plan_table(plans: list[MemoryPlan]) -> str:
    """Format plans as an aligned table. The first that fits is marked, unless it takes the machine's memory too."""
    kinds = list(dict.fromkeys(part for plan in plans for part in plan.parts))
    header = ["configuration", "fits", "a GPU needs", *kinds, "a GPU sends in a step", "and of the machine's memory"]
    rows = [header]
    first = next((plan for plan in plans if plan.fits and not plan.host), None)
    for plan in plans:
        fits = "use this" if plan is first else "yes" if plan.fits else "no"
        rows.append(
            [plan.layout.configuration, fits, gigabytes(plan.total)]
            + [gigabytes(plan.parts[kind]) if plan.parts.get(kind) else "-" for kind in kinds]
            + [gigabytes(sum(plan.sent.values())) if plan.sent else "-"]
            + [f"{gigabytes(plan.host)} for each GPU" if plan.host else "-"]
        )
    widths = [max(len(row[idx]) for row in rows) for idx in range(len(header))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if first is None:
        lines.append("Nothing fits without the machine's memory: more GPUs, fewer tokens, or another method.")
    return "\n".join(lines)


__all__ = ["METHODS", "Layout", "MemoryPlan", "Training", "plan_memory", "plan_table", "plan_training"]
