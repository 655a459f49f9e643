"""Measure what counting, statistics and the update of the bias cost, as a share of a training step.

A DeepSeekMoE of 64 routed experts (top-6) trains with AdamW, of this package and of transformers (DeepSeek-V3), in
three ways that take turns in blocks of steps:

- nothing: the records of the blocks, or the hooks, which count, are switched off,
- counting: as every model of this package trains, without a callback,
- balancing: what `LoadBalancingCallback` does after every step, entropy included, and a log every block.

Prints medians and the median of the ratios of neighbouring blocks. Writes benchmarks/results/balancing_overhead.json.
Runs on a GPU if there is one.
"""

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from modeling_deepseekmoe import (
    DeepseekMoeConfig,
    DeepseekMoeForCausalLM,
    RouterStats,
    track_router_load,
    untrack_router_load,
    update_router_bias,
)
from modeling_deepseekmoe.balancing.tracking import tracked_counter
from modeling_deepseekmoe.modeling_deepseekmoe import DeepseekMoeModel
from modeling_deepseekmoe.router_load import RoutingContext

WAYS = ("nothing", "counting", "balancing")
ROUNDS, STEPS = 12, 5
CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "moe_intermediate_size": 176,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "aux_loss_alpha": 0.0,
    "max_position_embeddings": 256,
}
BATCH, LENGTH = 4, 256


class Own:
    """A model of this package, whose blocks' records can be switched off."""

    def __init__(self, device: str) -> None:
        self.model = DeepseekMoeForCausalLM(DeepseekMoeConfig(**CONFIG)).to(device).train()
        self.context = DeepseekMoeModel.routing_context

    def prepare(self, way: str) -> None:
        """Switch records and entropy on or off."""
        context = self.context

        def without_records(decoder: DeepseekMoeModel, *args: Any) -> RoutingContext:
            return context(decoder, *args)._replace(record=False)

        method = without_records if way == "nothing" else context  # replaced on purpose, which types do not allow
        DeepseekMoeModel.routing_context = method  # type: ignore[method-assign, assignment]
        self.model.model.router_load.measure_entropy = way == "balancing"

    def finish(self) -> None:
        """Forget what was counted."""
        self.model.model.router_load.take()


class Native:
    """transformers' own DeepSeek-V3 of the same size, on which hooks count."""

    def __init__(self, device: str) -> None:
        fields = {name: value for name, value in CONFIG.items() if name not in ("topk_method", "aux_loss_alpha")}
        config = DeepseekV3Config(**fields, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=None,
                                  kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64,
                                  num_key_value_heads=8)  # fmt: skip
        self.model = DeepseekV3ForCausalLM(config).to(device).train()
        track_router_load(self.model)

    def prepare(self, way: str) -> None:
        """Count or not."""
        if way == "nothing":
            untrack_router_load(self.model)
        elif tracked_counter(self.model) is None:
            track_router_load(self.model)

    def finish(self) -> None:
        """Forget what was counted."""
        if (counter := tracked_counter(self.model)) is not None:
            counter.take()


def measure(subject: Own | Native, device: str) -> dict[str, Any]:
    """Measure the seconds of a step in every way, and the ratios of neighbouring blocks."""
    model = subject.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(3, CONFIG["vocab_size"], (BATCH, LENGTH), device=device)

    def block(way: str) -> float:
        """Time a step, in seconds, as the mean of a block of steps."""
        subject.prepare(way)
        stats = RouterStats(model) if way == "balancing" else None
        begin = time.perf_counter()
        for _ in range(STEPS):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if stats is not None:
                stats.add(update_router_bias(model))
        if stats is not None:
            stats.summary()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - begin) / STEPS
        subject.finish()
        return seconds

    for way in WAYS:
        block(way)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for round_number in range(ROUNDS):
        for way in WAYS if round_number % 2 else WAYS[::-1]:
            seconds[way].append(block(way))

    def ratio(way: str, base: str) -> float:
        return statistics.median(mine / other for mine, other in zip(seconds[way], seconds[base], strict=True))

    return {
        "seconds": {way: statistics.median(values) for way, values in seconds.items()},
        "ratio_to_nothing": {way: ratio(way, "nothing") for way in WAYS},
        "callback_on_over_off": ratio("balancing", "counting"),
    }


def main() -> None:
    """Measure, write JSON, print the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    figures = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "config": CONFIG,
        "batch": [BATCH, LENGTH],
        **measure(Own(device), device),
        "native": measure(Native(device), device),
    }
    path = Path(__file__).parent / "results" / "balancing_overhead.json"
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print_table("this package", figures)
    print_table("transformers' DeepSeek-V3", figures["native"])


def print_table(title: str, figures: dict[str, Any]) -> None:
    """Print a line for every way, and what the callback costs."""
    print(f"| {title} | a step, median | over nothing |\n| --- | --- | --- |")
    for way in WAYS:
        ratio = figures["ratio_to_nothing"][way]
        print(f"| {way} | {figures['seconds'][way] * 1e3:.0f} ms | {100 * (ratio - 1):+.1f}% |")
    print(f"callback on over off: {100 * (figures['callback_on_over_off'] - 1):+.1f}%")


if __name__ == "__main__":
    main()
