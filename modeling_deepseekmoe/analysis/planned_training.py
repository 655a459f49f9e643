# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""How a model is trained, and how ranks share it: what the planner is told, and which of it is allowed."""

from dataclasses import dataclass

from modeling_deepseekmoe.conversion.matrix_formats import bytes_a_weight, check_width

from ..checkpoint_layout import MODEL_TYPES
from ..experts import why_unsupported
from ..experts_quantized import FORMATS
from ..families.moe_layers import find_experts
from .counted_model import CountedModel

METHODS = ("full", "lora", "qlora", "esft")
WITH_ADAPTERS = ("lora", "qlora")
BYTES = {"float32": 4, "bfloat16": 2}


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
class Training:
    """How a model is trained.

    Attributes:
        method: `"full"`, `"lora"` (on all linear layers but the gate, and on every expert), `"qlora"` (the same on
            quantised routed experts) or `"esft"`.
        format: for `"qlora"`, how the routed experts are stored: `"nf4"`, `"fp8"` or `"mxfp4"`.
        correction_rank: for `"qlora"`, rank of the correction that gives back what rounding took, if there is one.
        weights: dtype in which the model is held. The default is float32 for full training, else bfloat16.
        compute: dtype of the products, `"bfloat16"` or `"float32"`.
        lora_rank: rank of every adapter.
        esft_share: share of the routed experts that ESFT trains.
        tokens: tokens of one micro-batch on one rank.
        checkpointing: whether layers are recomputed in the backward pass.
        cuda: whether to add what CUDA keeps for itself.
    """

    method: str = "full"
    format: str = "nf4"
    correction_rank: int | None = None
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
        return BYTES[self.held_dtype]

    @property
    def used(self) -> int:
        """Bytes of a number in a product."""
        return BYTES[self.compute]

    @property
    def stored(self) -> float | None:
        """Bytes of a quantised parameter of a routed expert, its share of the scales among them, or `None`."""
        return bytes_a_weight(self.format) if self.method == "qlora" else None

    @property
    def trains_all(self) -> bool:
        """Whether every parameter is trained."""
        return self.method == "full"

    def check(self, counted: CountedModel, layout: Layout) -> None:
        """Raise ValueError if a field names what does not exist, or is not allowed for this model in this layout."""
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not allowed: it must be one of {', '.join(METHODS)}.")
        for name, dtype in (("weights", self.held_dtype), ("compute", self.compute)):
            if dtype not in BYTES:
                raise ValueError(f"{name}={dtype!r} is not allowed: it must be one of {', '.join(BYTES)}.")
        if not 0 < self.esft_share <= 1:
            raise ValueError(f"esft_share={self.esft_share} is not allowed: it must be above 0 and at most 1.")
        for name, number in (("lora_rank", self.lora_rank), ("tokens", self.tokens)):
            if number < 1:
                raise ValueError(f"{name}={number} is not allowed: it must be at least 1.")
        if self.method in ("esft", "qlora") and not counted.layers:
            raise ValueError(f"method={self.method!r} is not allowed for a model without routed experts.")
        if self.method != "full" and (reason := _why_not_adapted(counted)):
            raise ValueError(f"method={self.method!r} is not allowed: {reason}. It must be 'full'.")
        if self.method == "qlora":
            self._check_quantised(counted, layout)
        elif self.correction_rank is not None:
            raise ValueError(f"correction_rank is not allowed with method={self.method!r}: it must be 'qlora'.")
        if layout.offload and self.method != "full":
            raise ValueError(f"method={self.method!r} is not allowed with offloading: it must be 'full'.")
        experts, allowed = _experts_to_spread(counted), layout.ep_size == 1 or spreads(counted, layout.ep_size)
        if layout.shards % layout.ep_size or not allowed:
            raise ValueError(
                f"ep_size={layout.ep_size} is not allowed: it must divide the {layout.shards} shards and the "
                f"{experts} routed experts, and the model must be of one of the types {', '.join(MODEL_TYPES)}."
            )

    def _check_quantised(self, counted: CountedModel, layout: Layout) -> None:
        if self.correction_rank is not None and self.correction_rank < 1:
            raise ValueError(f"correction_rank={self.correction_rank} is not allowed: it must be at least 1.")
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format!r} is not allowed: it must be one of {', '.join(FORMATS)}.")
        for name, one in counted.routed.items():
            check_width(self.format, name, tuple(one.shape))
        if layout.ep_size > 1:
            raise ValueError(f"ep_size={layout.ep_size} is not allowed with method='qlora': it must be 1.")


def _why_not_adapted(counted: CountedModel) -> str:
    """Return why neither LoRA nor ESFT takes the experts of a model; it is empty if they do."""
    stacked = find_experts(counted.model)
    if len(stacked) < len(counted.layers):
        return "the routed experts are not stacked as expert LoRA and ESFT need them"
    for name, experts in stacked.values():
        if reason := why_unsupported(experts):
            return f"{name} ({type(experts).__name__}): {reason}"
    return ""


def _experts_to_spread(counted: CountedModel) -> int:
    """Return how many routed experts a layer has, those of the layer with the fewest; 0 if there are none."""
    return min((layer.num_experts for layer in counted.layers), default=0)


def spreads(counted: CountedModel, ep_size: int) -> bool:
    """Tell whether the ranks of a group can hold distinct experts: the examples do that with this package's models."""
    experts = _experts_to_spread(counted)
    return counted.model.config.model_type in MODEL_TYPES and experts > 0 and experts % ep_size == 0


__all__ = ["BYTES", "METHODS", "WITH_ADAPTERS", "Layout", "Training", "spreads"]
