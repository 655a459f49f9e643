# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Plan on which layout of ranks a training fits: the memory of every rank by part, and what it sends in a step.

Sizes are counted from shapes on the meta device. They hold for training as the examples and the files in
`configuration/accelerate` do it, with AdamW. Full training holds weights in float32 and computes in bfloat16. LoRA is
in float32 on a frozen base in bfloat16, QLoRA on one whose routed experts are quantised. ESFT has everything in
bfloat16. `benchmarks/sharded_training.py` compares runs on the CPU with these sizes. What CUDA keeps for itself is an
assumption.

Shape letters: D hidden, V vocabulary, E routed experts, K chosen experts, I expert width.
"""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..experts_grouped import WORKSPACE
from ..experts_products import PIECE
from ..support.sizes import bytes_of
from .activations import Activations
from .counted_model import CountedModel
from .inspection import gigabytes
from .meta_models import config_named
from .planned_training import BYTES, METHODS, WITH_ADAPTERS, Layout, Training, spreads

CUDA_CONTEXT, CUDA_FRAGMENTATION = 1.5e9, 0.05  # assumed: bytes, and a share of the rest
_LEAST = {"lora_rank": 4, "tokens": 512}  # of what is made smaller, by halves


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
        tokens: tokens of one micro-batch on one rank.
        lora_rank: rank of the adapters, if there are some.
        fits: whether the parts fit the memory that was asked about.
    """

    layout: Layout
    parameters: int
    trained: int
    parts: dict[str, int]
    host: int
    sent: dict[str, int]
    tokens: int
    lora_rank: int | None = None
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

    def largest_unit(self, of_routed: float, of_others: int, ep_size: int = 1) -> int:
        """Find the most that FSDP2 gathers at once: a layer with the experts of one rank, or the embedding.

        It is counted in bytes, of which a parameter of a routed expert and any other have so many.
        """
        layers = (round(of_routed * (routed // ep_size)) + of_others * other for routed, other in self.layers)
        return max(of_others * self.embedding, *layers)

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
    if how.method in WITH_ADAPTERS:
        trained = counted.lora_parameters(how.lora_rank)
        trained_bytes = 4 * BYTES["float32"]
    elif how.method == "esft":
        trained = round(how.esft_share * sizes.routed)
    copies = shards if how.trains_all else 1  # what is trained beside the base lies on every rank
    parts, quantised = _quantised_parts(sizes, counted, how, shards), sizes.routed if how.stored else 0
    parts |= {
        "weights": how.held * (sizes.total - quantised) // shards,
        "trained beside them": 0 if how.trains_all else trained_bytes // 4 * trained,
        "gradients": trained_bytes // 4 * trained // copies,
        "optimizer": trained_bytes // 2 * trained // copies,
    }
    if shards == 1 and layout.replicas > 1:
        parts["buckets of DDP"] = parts["gradients"]
    host = sum(parts.values()) if layout.offload else 0
    if layout.offload:
        parts = dict.fromkeys(parts, 0)
    parts["gathered layers"] = _gathered(sizes, layout, how)
    if how.stored:
        parts["decoded experts"] = WORKSPACE if how.cuda else PIECE
    parts["activations"] = _activations(Activations.of(counted), how) + _joined_factors(counted, how)
    if how.held_dtype != how.compute and shards == 1:  # autocast's copies, of one layer where layers are recomputed
        copied = how.used * (sizes.total - quantised)
        of_routed = 0 if how.stored else how.used
        parts["activations"] += sizes.largest_unit(of_routed, how.used) if how.checkpointing else copied
    if how.cuda:
        parts["CUDA (assumed)"] = round(CUDA_CONTEXT + CUDA_FRAGMENTATION * sum(parts.values()))
    reduced = trained_bytes // 4 * trained  # gradients of what every rank holds, in its own dtype
    sent = _sent(counted, sizes, layout, reduced, how)
    rank = how.lora_rank if how.method in WITH_ADAPTERS else None
    return MemoryPlan(layout, sizes.total, trained, parts, host, sent, how.tokens, rank)


def _quantised_parts(sizes: _Sizes, counted: CountedModel, how: Training, shards: int) -> dict[str, int]:
    """Count the bytes of quantised experts, and of their correction."""
    parts = {}
    if how.stored:
        parts[f"experts in {how.format}"] = round(how.stored * sizes.routed) // shards
    if how.correction_rank is not None:
        parts["correction of the experts"] = how.held * counted.lora_of_experts(how.correction_rank) // shards
    return parts


def _joined_factors(counted: CountedModel, how: Training) -> int:
    """Count the bytes of a correction's factors, put together with the adapters', for each layer that is kept."""
    if how.correction_rank is None:
        return 0
    joined = how.used * counted.lora_of_experts(how.lora_rank + how.correction_rank)
    return joined // len(counted.layers) if how.checkpointing else joined


def _gathered(sizes: _Sizes, layout: Layout, how: Training) -> int:
    """Count the bytes that FSDP2 puts together in a rank's memory.

    These are the layer that computes, received and copied out, and the layer before or after it. In a backward pass of
    full training they are two layers, the gradients of one, and their sum in float32 on the way to the shards. The
    head is always among them: it stays between the passes.
    """
    if layout.shards == 1:
        return 0
    forward = 3 * sizes.largest_unit(how.stored or how.used, how.used, layout.ep_size)
    backward = sizes.largest_unit(3 * how.used + 4, 3 * how.used + 4, layout.ep_size) if how.trains_all else 0
    return max(forward, backward) + how.used * sizes.tail


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
        gathered = how.used * (2 * others - sizes.tail) * (shards - 1) / shards
        of_experts = (how.stored or how.used) * sizes.routed / ep_size
        sent["weights gathered"] = gathered + 2 * of_experts * (expert_shards - 1) / expert_shards
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
    shrink: Collection[str] = (),
    **settings: Any,
) -> list[MemoryPlan]:
    """Plan a training for every layout that a number of GPUs allows, the simplest first.

    Args:
        name_or_folder: a preset, or a folder with a `config.json` of any family, as for [`inspect_model`].
        gpus: number of GPUs in all.
        gpu_memory: memory of one, in bytes or as `"80GB"`.
        gpus_per_machine: number of GPUs with fast links between them.
        method, settings: fields of [`Training`].
        shrink: of `"lora_rank"` and `"tokens"`, which are halved as long as nothing fits: the tokens down to 512
            first, then the rank, down to 4. If nothing helps they stay as they are.

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
    counted = CountedModel.of(config)
    first: list[MemoryPlan] = []
    layouts = list(_layouts(counted, gpus, min(gpus, gpus_per_machine), method))
    for sizes in _tried(Training(method=method, **settings), shrink):
        found = [
            plan_memory(config, layout, method=method, counted=counted, **{**settings, **sizes}) for layout in layouts
        ]
        plans = [replace(plan, fits=plan.total <= memory) for plan in found]
        if any(plan.fits for plan in plans):
            return plans
        first = first or plans
    return first


def _tried(how: Training, shrink: Collection[str]) -> Iterator[dict[str, int]]:
    """Yield the ranks and tokens to plan with, those that are asked for first."""
    if unknown := set(shrink) - _LEAST.keys():
        raise ValueError(f"shrink={sorted(unknown)} is not allowed: names among {', '.join(_LEAST)}.")
    shrunk = [name for name in shrink if name == "tokens" or how.method in WITH_ADAPTERS]
    sizes = {name: [getattr(how, name)] for name in _LEAST}
    for name in shrunk:
        while sizes[name][-1] // 2 >= _LEAST[name]:
            sizes[name].append(sizes[name][-1] // 2)
    for rank in sizes["lora_rank"]:
        for tokens in sizes["tokens"]:
            yield {"lora_rank": rank, "tokens": tokens}


def _layouts(counted: CountedModel, gpus: int, in_machine: int, method: str) -> Iterator[Layout]:
    sharded = "fsdp2_lora.yaml" if method in WITH_ADAPTERS else "fsdp2_full.yaml"
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
    if in_machine > 1 and method in ("full", "lora") and spreads(counted, in_machine):
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
