"""Measure the experts' kernels over quantised stacks beside those over bfloat16, on a GPU.

A layer's forward pass, a step with adapters of rank 16 over frozen experts, and a decoded token; its stacks in
bfloat16, and in each format. The peer does what other tools do: it decodes whole stacks and multiplies them by torch's
grouped products, without adapters. All take turns in each round, and each result is compared with that of the kernels
over what the same stacks decode to. After each line it writes benchmarks/results/quantized_kernels_gpu.json.

    python benchmarks/quantized_kernels.py [--quick] [--budget SECONDS]

On a CPU `--quick` alone: a small layer in plain torch, to try the script.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from experts_lines import NAMES, Shape
from measuring import Job, add_options, measure_lines, results_path
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from modeling_deepseekmoe.experts import run_experts
from modeling_deepseekmoe.experts_operands import Adapter
from modeling_deepseekmoe.experts_quantized import (
    FORMATS,
    FP8_BLOCK,
    MXFP4_BLOCK,
    NESTED_BLOCK,
    NF4_BLOCK,
    QuantizedStack,
)

SHAPES = (
    Shape("16B and V2-Lite", 64, 2048, 1408, 6, (8192, 1)),
    Shape("V3, one of 8 ranks", 32, 7168, 2048, 8, (8192, 1), rounds=5),
)
QUICK = (Shape("small", 4, 128, 64, 2, (24, 1), rounds=2),)
RANK, DENSE, PEER = 16, "bfloat16", "fp8, decoded as a whole"
KINDS = {"forward": "forward", "frozen": "LoRA step"}
TOLERANCE = 2e-2  # of bfloat16, by the norm
Stacks = tuple[QuantizedStack, QuantizedStack]


def formats() -> tuple[str, ...]:
    """List the formats whose libraries are installed."""
    return FORMATS if find_spec("bitsandbytes") else tuple(kind for kind in FORMATS if kind != "nf4")


def random_stack(kind: str, projections: int, experts: int, rows: int, columns: int, device: str) -> QuantizedStack:
    """Make a stack of random codes, whose values are about as large as those of a trained layer."""
    row_bytes = columns if kind == "fp8" else columns // 2
    codes = torch.randint(0, 256, (experts, rows, row_bytes), dtype=torch.uint8, device=device)
    nested = None
    if kind == "fp8":
        codes[codes & 127 == 127] = 1  # NaN
        blocks = (-(-size // FP8_BLOCK) for size in (rows // projections, columns))
        scales = 2e-4 + 1e-4 * torch.rand(experts, projections, *blocks, device=device)
    elif kind == "mxfp4":
        sizes = experts, rows, columns // MXFP4_BLOCK
        scales = torch.randint(119, 122, sizes, dtype=torch.uint8, device=device)
    else:
        number = rows * columns // NF4_BLOCK
        scales = torch.randint(0, 256, (experts, number), dtype=torch.uint8, device=device)
        sizes = experts, projections, -(-number // projections // NESTED_BLOCK) + 1
        nested = torch.full(sizes, 0.02, device=device)
    return QuantizedStack(kind, codes, scales, nested, torch.bfloat16)


class Layer:
    """Experts of DeepSeek-V3's kind, whose stacks are in bfloat16 and in every format."""

    def __init__(self, shape: Shape, device: str) -> None:
        torch.manual_seed(0)
        self.shape, self.device = shape, device
        experts, hidden, width = shape.experts, shape.hidden, shape.width
        config = DeepseekV3Config(hidden_size=hidden, moe_intermediate_size=width, n_routed_experts=experts,
                                  num_local_experts=experts, num_experts_per_tok=shape.top_k)  # fmt: skip
        with torch.device("meta"):
            self.module = DeepseekV3Experts(config)  # its activation alone is used
        self.stacks: dict[str, Stacks] = {
            kind: (
                random_stack(kind, 2, experts, 2 * width, hidden, device),
                random_stack(kind, 1, experts, hidden, width, device),
            )
            for kind in formats()
        }
        self.dense = tuple(stack.decode(slice(None)) for stack in self.stacks["fp8"])
        self.adapters = [
            Adapter(
                0.02 * torch.randn(of_a, device=device, dtype=torch.bfloat16),
                0.02 * torch.randn(of_b, device=device, dtype=torch.bfloat16),
                1.0,
            )
            for of_a, of_b in (
                ((experts, RANK, hidden), (experts, 2 * width, RANK)),
                ((experts, RANK, width), (experts, hidden, RANK)),
            )
        ]
        for adapter in self.adapters:
            for factor in (adapter.factor_a, adapter.factor_b):
                factor.requires_grad_()

    def inputs(self, tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Make hidden states, ids and weights."""
        generator, shape = torch.Generator().manual_seed(tokens + seed), self.shape
        hidden = torch.randn(tokens, shape.hidden, generator=generator).to(self.device, torch.bfloat16)
        ids = torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k).indices
        weights = torch.rand(tokens, shape.top_k, generator=generator)
        return hidden.requires_grad_(), ids.to(self.device), weights.to(self.device).requires_grad_()

    def forward(self, way: str, adapted: bool, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Compute the layer with the kernels over stacks of a kind, or as the peer does."""
        if way == PEER:
            stacks = tuple(stack.decode(slice(None)) for stack in self.stacks["fp8"])
            return run_experts(self.module, *inputs, stacks=stacks, backend="grouped")
        backend = "triton" if self.device == "cuda" else "loop"
        stacks = self.dense if way == DENSE else self.stacks[way]
        adapters = self.adapters if adapted else (None, None)
        return run_experts(self.module, *inputs, stacks=stacks, adapters=adapters, backend=backend)

    def run(self, way: str, kind: str, inputs: tuple[torch.Tensor, ...]) -> tuple[float, list[torch.Tensor]]:
        """Run the layer once. Return the seconds, and the output or the gradients."""
        hidden, _, weights = inputs
        leaves = [hidden, weights, *(factor for one in self.adapters for factor in (one.factor_a, one.factor_b))]
        wait(self.device)
        begin = time.perf_counter()
        if kind == "forward":
            with torch.no_grad():
                results = [self.forward(way, False, inputs)]
        else:
            self.forward(way, True, inputs).backward(hidden.detach())
            results = [leaf.grad for leaf in leaves if leaf.grad is not None]
        wait(self.device)
        seconds = time.perf_counter() - begin
        for leaf in leaves:
            leaf.grad = None
        return seconds, results

    def check(self, way: str, kind: str, inputs: tuple[torch.Tensor, ...]) -> None:
        """Check the output, and the gradients with adapters, against the kernels over decoded stacks.

        Raises:
            ValueError: if one differs by more than `TOLERANCE` times its norm.
        """
        _, found = self.run(way, kind, inputs)
        before, self.dense = self.dense, tuple(stack.decode(slice(None)) for stack in self.stacks[way])
        try:
            _, wanted = self.run(DENSE, kind, inputs)
        finally:
            self.dense = before
        for one, other in zip(found, wanted, strict=True):
            error = float((one - other).float().norm() / other.float().norm())
            if not error <= TOLERANCE:
                raise ValueError(f"{way} differs from bfloat16 by {error:.1e} in a {KINDS[kind]}")


def wait(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(layer: Layer, tokens: int, kind: str) -> dict[str, Any]:
    """Measure the seconds of all ways, and the medians of the ratios to bfloat16."""
    inputs = layer.inputs(tokens)
    ways = (DENSE, *formats(), PEER)
    for way in formats():
        layer.check(way, kind, inputs)
    for way in (DENSE, PEER):
        layer.run(way, kind, inputs)
    of_repeats = [layer.inputs(tokens, seed) for seed in range(20)] if tokens == 1 else [inputs]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(layer.shape.rounds):
        for way in ways if number % 2 else ways[::-1]:
            seconds[way].append(statistics.median(layer.run(way, kind, one)[0] for one in of_repeats))
    ratios = {
        way: statistics.median(a / b for a, b in zip(times, seconds[DENSE], strict=True))
        for way, times in seconds.items()
    }
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    return {"shape": layer.shape.name, "tokens": tokens, "kind": kind, "seconds": medians, "over_bfloat16": ratios}


def jobs_of(shapes: tuple[Shape, ...], device: str, figures: dict[str, Any]) -> list[Job]:
    """List what is measured, the most valuable first."""
    held: dict[str, Layer] = {}

    def of_line(shape: Shape, tokens: int, kind: str) -> None:
        if shape.name not in held:
            held.clear()
            held[shape.name] = Layer(shape, device)
        figures["cases"].append(measure(held[shape.name], tokens, kind))

    jobs: list[Job] = []
    for shape in shapes:
        for tokens in shape.tokens:
            for kind in KINDS if tokens > 1 else ("forward",):
                name: Callable[[int], str] = NAMES[kind]
                jobs.append((f"{shape.name}, {tokens} tokens, {name(tokens)}", partial(of_line, shape, tokens, kind)))
    return jobs


def print_table(figures: dict[str, Any]) -> None:
    """Print the milliseconds, with the ratio to bfloat16."""
    ways = (DENSE, *formats(), PEER)
    print(f"\n| layer | tokens | | {' | '.join(ways)} |\n|{' --- |' * (3 + len(ways))}")
    for case in figures["cases"]:
        cells = (f"{1e3 * case['seconds'][way]:.3f} ms ({case['over_bfloat16'][way]:.2f})" for way in ways)
        print(f"| {case['shape']} | {case['tokens']} | {KINDS[case['kind']]} | {' | '.join(cells)} |")


def main() -> None:
    """Measure, write JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, quick="a small layer, two rounds; nothing is written")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.quick:
        sys.exit("There is no GPU. benchmarks/quantized_experts.py measures on the CPU.")
    if "nf4" not in formats():
        print("nf4 is left out: bitsandbytes is not installed")
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cases": [],
    }
    jobs = jobs_of(QUICK if arguments.quick else SHAPES, device, figures)
    path = None if arguments.quick else results_path("quantized_kernels", device)
    measure_lines(jobs, figures, path, arguments.budget)
    print_table(figures)


if __name__ == "__main__":
    main()
