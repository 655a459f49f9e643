"""Compare this package's implementation of the experts with transformers' own, on the same module and weights.

For several shapes and numbers of tokens it measures the forward pass, a training step with frozen experts (gradients
only of hidden states and gate weights) and a full training step. On a CPU it does so in float32: on a quiet machine,
while another process keeps a core busy, and for one shape on one thread. In bfloat16 it measures some forward passes;
on a GPU, everything. It measures the memory of a layer beside its parameters, each in a process of its own. Last come
whole models: tokens a second in training and in decoding.

All implementations take turns within each round, and so does a large matrix product, whose rate is the peak. So every
ratio is one of neighbouring measurements, except for whole models. Prints tables. After each line it writes
benchmarks/results/experts.json, or experts_gpu.json. About half an hour on two cores; `--budget` makes it shorter.

    python benchmarks/experts.py [--quick] [--budget SECONDS]
"""

import argparse
import copy
import gc
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from experts_lines import COLUMNS, CONDITIONS, MEMORY, OURS, Line, Shape, by_value, lines_on, row, tables
from measuring import Job, add_options, measure_lines, results_path
from torch import nn
from transformers import DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseekmoe.experts_products import has_instructions

BATCHED_SLOTS = 64  # with more, batched_mm needs more memory for its copies than machines have
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}  # of what is measured in full


class Layer:
    """transformers' DeepSeek-V3 experts with random weights, computed by any implementation."""

    def __init__(self, shape: Shape, device: str, dtype: str) -> None:
        self.config_of = lambda way: DeepseekV3Config(
            hidden_size=shape.hidden, moe_intermediate_size=shape.width, n_routed_experts=shape.experts,
            num_local_experts=shape.experts, num_experts_per_tok=shape.top_k, experts_implementation=way,
        )  # fmt: skip
        self.shape, self.device, self.dtype = shape, device, getattr(torch, dtype)
        with torch.device(device):
            self.module = DeepseekV3Experts(self.config_of(None)).to(self.dtype)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.normal_(std=0.02)

    def widened(self) -> "Layer":
        """Copy the layer to float32."""
        other = copy.copy(self)
        other.module, other.dtype = copy.deepcopy(self.module).float(), torch.float32
        return other

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
        self.module.requires_grad_(kind == "full").train(kind != "forward")
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
    """The rate of a large matrix product, measured again in every round.

    Its dtype is the layer's, or float32 on a CPU without instructions for the layer's: that is faster there.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        size = 8192 if device == "cuda" else 2048
        dtype = dtype if device == "cuda" or has_instructions(dtype) else torch.float32
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


def measure(line: Line, layer: Layer) -> dict[str, Any]:
    """Measure the seconds of all implementations."""
    tokens, kind, ways = line.tokens, line.kind, layer.ways(line.tokens, line.kind)
    inputs, peak, peaks = layer.inputs(tokens), Peak(layer.device, layer.dtype), []
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with CONDITIONS[line.condition][1]():
        check_equal(layer, kind, inputs, ways)
        gc.collect()
        # One token reads other experts each time, or they would still lie in the cache.
        inputs_of_repeats = [layer.inputs(tokens, seed) for seed in range(20)] if tokens == 1 else [inputs]
        for number in range(line.shape.rounds):
            peaks.append(peak.flops_a_second())
            for way in ways if number % 2 else ways[::-1]:
                times = [layer.run(way, kind, other)[0] for other in inputs_of_repeats]
                seconds[way].append(statistics.median(times))
    return summary(line, seconds, peaks)


def expected(layer: Layer, kind: str, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Compute by grouped_mm what all must give; on a CPU in float32."""
    if layer.device == "cpu" and layer.dtype != torch.float32:
        hidden, *rest = inputs
        layer, inputs = layer.widened(), (hidden.detach().float().requires_grad_(), *rest)
    return layer.run("grouped_mm", kind, inputs)[1]


def check_equal(layer: Layer, kind: str, inputs: tuple[torch.Tensor, ...], ways: list[str]) -> None:
    """Check that all implementations give the same. This is also the warm-up."""
    wanted = expected(layer, kind, inputs)
    for way in ways:
        _, found = layer.run(way, kind, inputs)
        for one, other in zip(found, wanted, strict=True):
            error = float((one - other).float().norm() / other.float().norm())
            if not error <= (2e-2 if layer.dtype == torch.bfloat16 else 1e-5):
                raise ValueError(f"{way} differs from what is expected by {error:.1e} in a {kind} pass")


def summary(line: Line, seconds: dict[str, list[float]], peaks: list[float]) -> dict[str, Any]:
    """Compute medians, the ratio to the best of transformers round by round, and the share of the peak."""
    shape, tokens = line.shape, line.tokens
    peers = {way: statistics.median(times) for way, times in seconds.items() if way != OURS}
    best = min(peers, key=peers.__getitem__)
    flops, weights = shape.flops(tokens, line.kind), 3 * tokens * shape.top_k * shape.hidden * shape.width
    shares = [flops / time / peak for time, peak in zip(seconds[OURS], peaks, strict=True)]
    return {
        **asdict(line),
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
    layer = Layer(shape, device, DTYPES[device])
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
        model = DeepseekMoeForCausalLM(config).to(getattr(torch, DTYPES[device]))
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


def jobs_of(lines: list[Line], device: str, quick: bool, figures: dict[str, Any]) -> list[Job]:
    """List what is measured, the most valuable first: lines, then memory, then whole models."""
    found: dict[Line, dict[str, Any]] = {}
    held: dict[tuple[str, str], Layer] = {}  # the last layer, or none

    def of_line(line: Line) -> None:
        key = (line.shape.name, line.dtype)
        if key not in held:
            held.clear()
            held[key] = Layer(line.shape, device, line.dtype)
        found[line] = measure(line, held[key])
        figures["cases"] = [found[other] for other in lines if other in found]

    def of_memory(shape: Shape, tokens: int, kind: str) -> None:
        held.clear()
        found_bytes = memory(shape, tokens, kind, device)
        figures["memory"].append({"shape": shape.name, "tokens": tokens, "kind": kind, "bytes": found_bytes})

    def of_model() -> None:
        held.clear()
        figures["model"] = whole_model(device)

    jobs: list[Job] = [(str(line), partial(of_line, line)) for line in by_value(lines)]
    shapes = [shape for shape in dict.fromkeys(line.shape for line in lines) if shape.trained]
    for shape in shapes[: 1 if device == "cpu" else None]:
        for kind, name in MEMORY.items():
            tokens = max(shape.tokens)
            jobs.append((f"memory of {shape.name}, {tokens} tokens, {name}", partial(of_memory, shape, tokens, kind)))
    return jobs if quick else [*jobs, ("whole model", of_model)]


def print_tables(figures: dict[str, Any]) -> None:
    """Print all tables that there are figures of."""
    for title, cases in tables(figures["cases"]).items():
        print(f"\n{title}\n\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
        print("\n".join(map(row, cases)))
    if figures["memory"]:
        print("\n| memory of a layer | grouped_mm | deepseekmoe | of grouped_mm's |")
        print("| --- | --- | --- | --- |")
    for found in figures["memory"]:
        theirs, ours = found["bytes"]["grouped_mm"], found["bytes"][OURS]
        name = f"{found['shape']}, {found['tokens']} tokens, {MEMORY[found['kind']]}"
        print(f"| {name} | {theirs / 1e6:.0f} MB | {ours / 1e6:.0f} MB | {100 * ours / theirs:.0f}% |")
    if figures["model"]:
        print("\n| whole model, tokens a second | grouped_mm | deepseekmoe |")
        print("| --- | --- | --- |")
    for kind, rates in figures["model"].items():
        print(f"| {kind} | {' | '.join(f'{value:.0f}' for value in rates.values())} |")


def main() -> None:
    """Measure, write JSON, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, quick="a small layer, two rounds; nothing is written")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        shape, *rest = json.loads(arguments.memory)
        print(measure_memory(Shape(**shape), *rest))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cases": [],
        "memory": [],
        "model": {},
    }
    jobs = jobs_of(lines_on(device, arguments.quick), device, arguments.quick, figures)
    measure_lines(jobs, figures, None if arguments.quick else results_path("experts", device), arguments.budget)
    print_tables(figures)


if __name__ == "__main__":
    main()
