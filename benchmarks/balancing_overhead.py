"""Measure what counting, statistics and the update of the bias cost, as a share of a training step.

A DeepSeekMoE of 64 routed experts (top-6) trains with AdamW, in three ways that take turns in blocks of steps:

- nothing: the records of the blocks, which hold the counts, are switched off,
- counting: as every model of this package trains, without a callback,
- balancing: what `LoadBalancingCallback` does after every step, entropy included, and a log every 10 steps.

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

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM, RouterStats, update_router_bias
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


def main() -> None:
    """Measure, write JSON, print the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = DeepseekMoeForCausalLM(DeepseekMoeConfig(**CONFIG)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(3, CONFIG["vocab_size"], (BATCH, LENGTH), device=device)
    stats = RouterStats(model)
    context = DeepseekMoeModel._routing_context

    def without_records(self: DeepseekMoeModel, *args: object) -> RoutingContext:
        return context(self, *args)._replace(record=False)

    def block(way: str) -> float:
        """Time a step, in seconds, as the mean of a block of steps."""
        DeepseekMoeModel._routing_context = without_records if way == "nothing" else context
        model.model.router_load.measure_entropy = way == "balancing"
        begin = time.perf_counter()
        for _ in range(STEPS):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if way == "balancing":
                stats.add(update_router_bias(model))
                if stats.steps == 10:
                    stats.summary()
                    stats.reset()
        if device == "cuda":
            torch.cuda.synchronize()
        model.model.router_load.take()
        return (time.perf_counter() - begin) / STEPS

    for way in WAYS:
        block(way)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for round_number in range(ROUNDS):
        order = WAYS if round_number % 2 else WAYS[::-1]
        for way in order:
            seconds[way].append(block(way))
    ratios = {
        way: statistics.median(mine / base for mine, base in zip(seconds[way], seconds["nothing"], strict=True))
        for way in WAYS
    }
    callback = statistics.median(
        mine / base for mine, base in zip(seconds["balancing"], seconds["counting"], strict=True)
    )
    figures = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "config": CONFIG,
        "batch": [BATCH, LENGTH],
        "seconds": {way: statistics.median(values) for way, values in seconds.items()},
        "ratio_to_nothing": ratios,
        "callback_on_over_off": callback,
    }
    path = Path(__file__).parent / "results" / "balancing_overhead.json"
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print_table(figures)


def print_table(figures: dict[str, Any]) -> None:
    """Print a line for every way, and what the callback costs."""
    print("| | a step, median | over nothing |\n| --- | --- | --- |")
    for way in WAYS:
        ratio = figures["ratio_to_nothing"][way]
        print(f"| {way} | {figures['seconds'][way] * 1e3:.0f} ms | {100 * (ratio - 1):+.1f}% |")
    print(f"callback on over off: {100 * (figures['callback_on_over_off'] - 1):+.1f}%")


if __name__ == "__main__":
    main()
