"""Compare this package's implementation of the experts with transformers' own, on the same module and weights.

For several shapes and numbers of tokens it measures the forward pass, a training step with frozen experts (gradients
only of hidden states and gate weights) and a full training step. It measures the memory of a layer beside its
parameters, each in a process of its own. Then it measures whole models: tokens a second in training and in decoding.

All implementations take turns within each round, and so does a large matrix product, whose rate is the peak. So every
ratio is one of neighbouring measurements, except for whole models. Prints tables and writes
benchmarks/results/experts.json, or experts_gpu.json. Ten minutes on two cores.

    python benchmarks/experts.py [--quick]
"""

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM

OURS = "deepseekmoe"
KINDS = ("forward", "frozen", "full")
FLOPS = {"forward": 1, "frozen": 2, "full": 3}  # of a forward pass
BATCHED_SLOTS = 64  # with more, batched_mm needs more memory for its copies than machines have


@dataclass(frozen=True)
class Shape:
    """A layer, and the numbers of tokens that run through it."""

    name: str
    experts: int
    hidden: int
    width: int
    top_k: int
    tokens: tuple[int, ...]
    trained: bool = True
    rounds: int = 7

    def flops(self, tokens: int, kind: str) -> int:
        """Count the floating-point operations of the matrix products."""
        return FLOPS[kind] * 6 * tokens * self.top_k * self.hidden * self.width


CPU_SHAPES = (
    Shape("64 x 1024 x 704, top-6", 64, 1024, 704, 6, (1, 256, 1024, 2048)),
    Shape("the demo's", 24, 576, 192, 6, (1, 512)),
    Shape("16B and V2-Lite", 64, 2048, 1408, 6, (1, 1024), rounds=3),
    Shape("128 x 2048 x 768, top-8", 128, 2048, 768, 8, (1, 1024), rounds=3),
)
GPU_SHAPES = (
    Shape("16B and V2-Lite", 64, 2048, 1408, 6, (1, 8, 32, 1024, 8192)),
    Shape("128 x 2048 x 768, top-8", 128, 2048, 768, 8, (1, 8, 32, 1024, 8192)),
    Shape("V3", 256, 7168, 2048, 8, (1, 8, 32, 8192), trained=False),
)


class Layer:
    """transformers' DeepSeek-V3 experts with random weights, computed by any implementation."""

    def __init__(self, shape: Shape, device: str) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.config_of = lambda way: DeepseekV3Config(
            hidden_size=shape.hidden, moe_intermediate_size=shape.width, n_routed_experts=shape.experts,
            num_local_experts=shape.experts, num_experts_per_tok=shape.top_k, experts_implementation=way,
        )  # fmt: skip
        with torch.device(device):
            self.module = DeepseekV3Experts(self.config_of(None)).to(dtype)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.normal_(std=0.02)
        self.shape, self.device, self.dtype = shape, device, dtype

    def inputs(self, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Make hidden states, ids and weights."""
        generator = torch.Generator().manual_seed(tokens + seed)
        hidden = torch.randn(tokens, self.shape.hidden, generator=generator).to(self.device, self.dtype)
        ids = torch.rand(tokens, self.shape.experts, generator=generator).topk(self.shape.top_k).indices
        weights = torch.rand(tokens, self.shape.top_k, generator=generator)
        return hidden.requires_grad_(), ids.to(self.device), weights.to(self.device).requires_grad_()

    def run(self, way: str, kind: str, inputs: tuple[torch.Tensor, ...]) -> tuple[float, list[torch.Tensor]]:
        """Run the experts once. Return the seconds, and the results: the output, or the gradients."""
        self.module.config = self.config_of(way)
        self.module.requires_grad_(kind == "full")
        hidden, _, weights = inputs
        grad = hidden.detach()
        _wait(self.device)
        begin = time.perf_counter()
        if kind == "forward":
            with torch.no_grad():
                results = [self.module(*inputs)]
        else:
            self.module(*inputs).backward(grad)
            results = [leaf.grad for leaf in (hidden, weights, *self.module.parameters()) if leaf.grad is not None]
        _wait(self.device)
        seconds = time.perf_counter() - begin
        for leaf in (hidden, weights, *self.module.parameters()):
            leaf.grad = None
        return seconds, results

    def ways(self, tokens: int, kind: str) -> list[str]:
        """List the implementations that are installed and can compute this."""
        # eager takes a part of the stack for every expert, and each part has a gradient as large as the stack: a full
        # step of the first shape takes 15 seconds, where grouped_mm needs 0.4.
        found = ["grouped_mm"] if kind == "full" else ["grouped_mm", "eager"]
        if tokens * self.shape.top_k <= BATCHED_SLOTS:
            found.append("batched_mm")
        if self.device == "cuda":
            found += ["sonicmoe"] if importlib.util.find_spec("kernels") else []
            found += ["deepgemm"] if importlib.util.find_spec("deep_gemm") and kind == "forward" else []
        return [*found, OURS]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Peak:
    """The rate of a large matrix product, measured again in every round."""

    def __init__(self, device: str) -> None:
        size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
        self.matrices = [torch.randn(size, size, device=device).to(dtype) for _ in range(3)]
        self.device, self.size = device, size

    def flops_a_second(self) -> float:
        """Measure floating-point operations a second."""
        left, right, out = self.matrices
        _wait(self.device)
        begin = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait(self.device)
        return 2 * self.size**3 / (time.perf_counter() - begin)


def measure(shape: Shape, device: str) -> list[dict[str, Any]]:
    """Measure the seconds of all implementations, kinds and numbers of tokens."""
    layer, peak, cases = Layer(shape, device), Peak(device), []
    for tokens in shape.tokens:
        inputs = layer.inputs(tokens)
        for kind in KINDS if shape.trained and tokens > 1 else KINDS[:1]:
            ways = layer.ways(tokens, kind)
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            peaks = []
            check_equal(layer, kind, inputs, ways)
            gc.collect()
            # One token reads other experts each time, or they would still lie in the cache.
            inputs_of_repeats = [layer.inputs(tokens, seed) for seed in range(20)] if tokens == 1 else [inputs]
            for number in range(shape.rounds):
                peaks.append(peak.flops_a_second())
                for way in ways if number % 2 else ways[::-1]:
                    times = [layer.run(way, kind, other)[0] for other in inputs_of_repeats]
                    seconds[way].append(statistics.median(times))
            cases.append(summary(shape, tokens, kind, seconds, peaks))
            print(line(cases[-1]), flush=True)
    return cases


def check_equal(layer: Layer, kind: str, inputs: tuple[torch.Tensor, ...], ways: list[str]) -> None:
    """Check that all implementations give the same. This is also the warm-up."""
    _, expected = layer.run("grouped_mm", kind, inputs)
    for way in ways:
        _, found = layer.run(way, kind, inputs)
        for one, other in zip(found, expected, strict=True):
            error = float((one - other).float().norm() / other.float().norm())
            if not error <= (2e-2 if layer.dtype == torch.bfloat16 else 1e-5):
                raise ValueError(f"{way} differs from grouped_mm by {error:.1e} in a {kind} pass")


def summary(
    shape: Shape, tokens: int, kind: str, seconds: dict[str, list[float]], peaks: list[float]
) -> dict[str, Any]:
    """Compute medians, the ratio to the best of transformers round by round, and the share of the peak."""
    peers = {way: statistics.median(times) for way, times in seconds.items() if way != OURS}
    best = min(peers, key=peers.__getitem__)
    flops, weights = shape.flops(tokens, kind), 3 * tokens * shape.top_k * shape.hidden * shape.width
    shares = [flops / time / peak for time, peak in zip(seconds[OURS], peaks, strict=True)]
    return {
        "shape": asdict(shape),
        "tokens": tokens,
        "kind": kind,
        "seconds": {way: statistics.median(times) for way, times in seconds.items()},
        "best": best,
        "times_as_fast": _ratio(seconds[best], seconds[OURS]),
        "over_grouped_mm": _ratio(seconds["grouped_mm"], seconds[OURS]),
        "flops_a_second": flops / statistics.median(seconds[OURS]),
        "weights_a_second": weights / statistics.median(seconds[OURS]) if tokens == 1 else None,
        "share_of_peak": statistics.median(shares),
    }


def _ratio(mine: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


def memory(shape: Shape, tokens: int, kind: str, device: str) -> dict[str, float]:
    """Measure the bytes beside parameters, for each implementation in a process of its own.

    For a step with frozen experts this is the peak. For a full step it is measured between the two passes, where there
    are no gradients yet.
    """
    found = {}
    for way in ("grouped_mm", OURS):
        arguments = json.dumps([asdict(shape), tokens, kind, way, device])
        command = [sys.executable, __file__, "--memory", arguments]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = float(ran.stdout.split()[-1])
    return found


def measure_memory(shape: Shape, tokens: int, kind: str, way: str, device: str) -> float:
    """Measure, in the fresh process, what is allocated, or by how much the resident memory grows."""
    layer = Layer(shape, device)
    layer.run(way, kind, layer.inputs(2))  # libraries load, and keep some memory
    inputs = layer.inputs(tokens)
    gc.collect()
    on_gpu = device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else _status("VmRSS")
    if kind == "full":
        layer.module.requires_grad_()
        output = layer.module(*inputs)
        after = torch.cuda.memory_allocated() if on_gpu else _status("VmRSS")
        return after - before if output.requires_grad else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        layer.run(way, kind, inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    layer.run(way, kind, inputs)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def whole_model(device: str, rounds: int = 4, tokens: int = 1024) -> dict[str, Any]:
    """Measure the tokens a second of a small model: in training (all parameters), and in decoding one sequence."""
    config = DeepseekMoeConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=2816, moe_intermediate_size=704, num_hidden_layers=4,
        num_attention_heads=16, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        first_k_dense_replace=1,
    )  # fmt: skip
    with torch.device(device):
        model = DeepseekMoeForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32)
    ids = torch.randint(8192, (1, tokens), device=device)
    ways = ("grouped_mm", OURS)
    figures: dict[str, dict[str, list[float]]] = {kind: {way: [] for way in ways} for kind in ("training", "decoding")}
    for number in range(rounds + 1):
        for way in ways if number % 2 else ways[::-1]:
            model.set_experts_implementation(way)
            trained, decoded = training(model, ids, device), decoding(model, ids[:, :16], device)
            if number:
                figures["training"][way].append(tokens / trained)
                figures["decoding"][way].append(32 / decoded)
    return {
        kind: {way: statistics.median(values) for way, values in by_way.items()} for kind, by_way in figures.items()
    }


def training(model: nn.Module, ids: torch.Tensor, device: str) -> float:
    """Time a forward and a backward pass, in seconds."""
    model.train()
    _wait(device)
    begin = time.perf_counter()
    model(ids, labels=ids, use_cache=False).loss.backward()
    _wait(device)
    seconds = time.perf_counter() - begin
    model.zero_grad()
    return seconds


@torch.no_grad()
def decoding(model: nn.Module, prompt: torch.Tensor, device: str) -> float:
    """Time 32 tokens, one after the other, in seconds."""
    model.eval()
    cache = DynamicCache()
    model(prompt, past_key_values=cache, use_cache=True)
    token = prompt[:, :1]
    _wait(device)
    begin = time.perf_counter()
    for _ in range(32):
        model(token, past_key_values=cache, use_cache=True)
    _wait(device)
    return time.perf_counter() - begin


NAMES: dict[str, Callable[[int], str]] = {
    "forward": lambda tokens: "decode" if tokens == 1 else "forward",
    "frozen": lambda tokens: "frozen step",
    "full": lambda tokens: "full step",
}


def line(case: dict[str, Any]) -> str:
    """Format a case as a row of Markdown."""
    times = case["seconds"]
    cells = [
        f"{1e3 * times[way]:.1f} ms" if way in times else "" for way in ("eager", "batched_mm", "grouped_mm", OURS)
    ]
    if case["weights_a_second"] is None:
        share = f"{case['flops_a_second'] / 1e9:.0f} GFLOP/s, {100 * case['share_of_peak']:.0f}%"
    else:
        share = f"{case['weights_a_second'] / 1e9:.1f} G weights/s"
    name = NAMES[case["kind"]](case["tokens"])
    cells += [f"{case['times_as_fast']:.2f} ({case['best']})", share]
    return f"| {case['shape']['name']} | {case['tokens']} | {name} | {' | '.join(cells)} |"


COLUMNS = ("experts", "tokens", "", "eager", "batched_mm", "grouped_mm", "deepseekmoe", "over the best",
           "of the matrix peak")  # fmt: skip


MEMORY = {"frozen": "frozen step, at its peak", "full": "full step, between its passes"}


def main() -> None:
    """Measure, write JSON, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small layer, two rounds; nothing is written")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        shape, *rest = json.loads(arguments.memory)
        print(measure_memory(Shape(**shape), *rest))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    if arguments.quick:
        shapes = (Shape("small", 8, 64, 32, 2, (1, 64), rounds=2),)
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    cases = [case for shape in shapes for case in measure(shape, device)]
    largest = [(shape, max(shape.tokens)) for shape in shapes if shape.trained]
    peaks = [
        {"shape": shape.name, "tokens": tokens, "kind": kind, "bytes": memory(shape, tokens, kind, device)}
        for shape, tokens in largest[: 1 if device == "cpu" else None]
        for kind in ("frozen", "full")
    ]
    print("\n| memory of a layer | grouped_mm | deepseekmoe | of grouped_mm's |")
    print("| --- | --- | --- | --- |")
    for row in peaks:
        cells = " | ".join(f"{row['bytes'][way] / 1e6:.0f} MB" for way in ("grouped_mm", OURS))
        share = row["bytes"][OURS] / row["bytes"]["grouped_mm"]
        print(f"| {row['shape']}, {row['tokens']} tokens, {MEMORY[row['kind']]} | {cells} | {100 * share:.0f}% |")
    if arguments.quick:
        return
    model = whole_model(device)
    print("\n| whole model, tokens a second | grouped_mm | deepseekmoe |")
    print("| --- | --- | --- |")
    for kind, figures in model.items():
        print(f"| {kind} | {' | '.join(f'{value:.0f}' for value in figures.values())} |")
    figures = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cases": cases,
        "memory": peaks,
        "model": model,
    }
    name = "experts_gpu.json" if device == "cuda" else "experts.json"
    path = Path(__file__).parent / "results" / name
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
