"""Compare routing by this package (kernels and plain torch) with transformers' routers, from logits to weights.

It runs the gates of DeepSeekMoE 16B, V2, V3 and Kimi K2 on 1 to 65536 tokens. First it checks that all implementations
agree. Then it measures median microseconds: of the forward pass, of forward and backward, and of bringing the choices
into the order of the experts, which transformers does by sorting. On a GPU it also gives the bytes that must move at
least, and their share of the bandwidth of a copy in the same run. The kernels run only there.

All implementations are timed in turn within each round, so that a busy machine slows all of them. Prints tables. After
each line it writes benchmarks/results/routing.json, or routing_gpu.json. About ten minutes on two cores; `--budget`
makes it shorter.

    python benchmarks/routing.py [--quick] [--budget SECONDS]
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import transformers
from measuring import Job, add_options, measure_lines, results_path
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from modeling_deepseekmoe import group_by_expert, route, route_native_gates

TOKENS = (1, 16, 256, 4096, 8192, 65536)
Step = Callable[[], Any]


@dataclass(frozen=True)
class Gate:
    """A released gate."""

    model: str
    experts: int
    top_k: int
    groups: int
    kept: int
    sigmoid: bool
    scaling_factor: float
    hidden_size: int

    @property
    def options(self) -> dict[str, Any]:
        """Return the arguments of `route`, without the bias."""
        options: dict[str, Any] = {
            "num_groups": self.groups,
            "top_k_groups": self.kept,
            "scaling_factor": self.scaling_factor,
        }
        if self.sigmoid:
            options |= {"score_function": "sigmoid", "group_score": "top2_sum", "normalize": True}
        return options

    def native(self, bias: torch.Tensor | None, hidden_size: int = 1) -> torch.nn.Module:
        """Make transformers' router of this shape."""
        fields = {
            "hidden_size": hidden_size, "n_routed_experts": self.experts, "num_experts_per_tok": self.top_k,
            "n_group": self.groups, "topk_group": self.kept, "routed_scaling_factor": self.scaling_factor,
            "num_attention_heads": 1, "num_key_value_heads": 1,
        }  # fmt: skip
        if not self.sigmoid:
            method = "group_limited_greedy" if self.groups > 1 else "greedy"
            return DeepseekV2TopkRouter(DeepseekV2Config(**fields, topk_method=method))
        router = DeepseekV3TopkRouter(DeepseekV3Config(**fields, norm_topk_prob=True))
        router.e_score_correction_bias = bias
        return router


GATES = (
    Gate("DeepSeekMoE 16B", 64, 6, 1, 1, False, 1.0, 2048),
    Gate("DeepSeek-V2", 160, 6, 8, 3, False, 16.0, 5120),
    Gate("DeepSeek-V3", 256, 8, 8, 4, True, 2.5, 7168),
    Gate("Kimi K2", 384, 8, 1, 1, True, 2.827, 7168),
)
# The order in which they are measured.
BY_VALUE = (8192, 65536, 1, 4096, 256, 16)


class Experts(nn.Module):
    """Stands beside a router where `route_native_gates` looks for its experts."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> None:
        """Do nothing: this is never called."""


class Inputs:
    """Logits, bias and a gradient of the weights, the same for every implementation."""

    def __init__(self, gate: Gate, tokens: int, device: str) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self.logits = torch.randn(tokens, gate.experts, generator=generator).to(device)
        self.grad = torch.randn(tokens, gate.top_k, generator=generator).to(device)
        bias = torch.randn(gate.experts, generator=generator) * 0.01
        self.bias = bias.to(device) if gate.sigmoid else None


# What the product of hidden states and weights is replaced by: it is the same for all, and is left out.
given_logits: list[torch.Tensor] = [torch.empty(0)]


def ways(gate: Gate, inputs: Inputs, device: str, compiled: Callable) -> dict[str, Callable]:
    """Return functions from logits to weights and ids, by the name of their implementation."""
    router = gate.native(inputs.bias).to(device)
    nothing = torch.empty(len(inputs.logits), 1, device=device)

    def native(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given_logits[0] = logits
        return router(nothing)[1:]

    def ours(implementation: str, statistics: bool) -> Callable:
        def run(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            plan = route(logits, gate.top_k, correction_bias=inputs.bias, **gate.options, statistics=statistics,
                         implementation=implementation)  # fmt: skip
            return plan.weights, plan.expert_ids

        return run

    found = {"transformers": native, "eager": ours("eager", False), "eager with statistics": ours("eager", True)}
    found["eager compiled"] = lambda logits: compiled(logits, inputs.bias)
    if device == "cuda":
        found |= {"triton": ours("triton", False), "triton with statistics": ours("triton", True)}
    return found


def moe_ops_way(gate: Gate) -> Callable | None:
    """Return the gate of the package moe-ops, if there is one: a softmax over the chosen logits, without groups."""
    try:
        from moe_ops import fused_topk_softmax
    except ImportError:
        return None
    return None if gate.sigmoid or gate.groups > 1 else lambda logits: fused_topk_softmax(logits, gate.top_k)


def agree(gate: Gate, inputs: Inputs, found: dict[str, Callable]) -> float:
    """Check that all implementations agree with plain torch. Return the largest share of tokens routed otherwise.

    Rounding explains a small share, and so do transformers' ties. Raise if the share is larger than that, or if
    weights of the same choices differ.
    """
    weights, ids = (values.detach() for values in found["eager"](inputs.logits))
    largest = 0.0
    for name, way in found.items():
        other_weights, other_ids = (values.detach() for values in way(inputs.logits))
        order, other_order = ids.argsort(dim=1), other_ids.argsort(dim=1)
        same = (ids.gather(1, order) == other_ids.gather(1, other_order)).all(dim=1)
        pairs = (weights.gather(1, order)[same], other_weights.gather(1, other_order)[same])
        torch.testing.assert_close(*pairs, atol=1e-5 * gate.scaling_factor, rtol=1e-5)
        share = 1 - float(same.float().mean()) if len(same) else 0.0
        if share > 0.001 and int((~same).sum()) > 1:
            raise SystemExit(f"{gate.model}: {name} routes {share:.2%} of the tokens in another way than eager")
        largest = max(largest, share)
    return largest


def whole_gates(gate: Gate, inputs: Inputs, device: str) -> dict[str, Step]:
    """Return transformers' routers from hidden states on, product included: plain, and with `route_native_gates`."""
    hidden = torch.randn(len(inputs.logits), gate.hidden_size, device=device)
    weight = torch.randn(gate.experts, gate.hidden_size, device=device) / gate.hidden_size**0.5
    steps: dict[str, Step] = {}
    for name in ("transformers", "triton" if device == "cuda" else "eager"):
        router = gate.native(inputs.bias, gate.hidden_size).to(device).requires_grad_(False)
        router.weight.copy_(weight)
        if name != "transformers":
            block = nn.Module()
            block.gate, block.experts = router, Experts(gate.experts)
            route_native_gates(block, name)
        steps[name] = partial(router, hidden)
    return steps


def medians(steps: dict[str, Step], device: str, seconds: float) -> dict[str, float]:
    """Measure the median microseconds of every step. On the CPU all take turns, for as long as `seconds` each."""
    if device == "cuda":
        from triton.testing import do_bench

        return {name: 1000 * do_bench(step, warmup=50, rep=int(1000 * seconds), return_mode="median")
                for name, step in steps.items()}  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds * len(steps)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def graph_medians(steps: dict[str, Step]) -> dict[str, float]:
    """Measure the median microseconds of every step in a CUDA graph: what the GPU takes, without the host.

    A step that waits for the host cannot be captured, and is left out.
    """
    from triton.testing import do_bench_cudagraph

    found = {}
    for name, step in steps.items():
        try:
            found[name] = 1000 * do_bench_cudagraph(step, rep=20, return_mode="median")
        except RuntimeError as error:
            print(f"{name} cannot be captured: {str(error).splitlines()[0]}", flush=True)
            torch.cuda.synchronize()
    return found


def native_groups(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what transformers' grouped experts do with the ids: sort them, count them, and invert the permutation."""
    ids, permutation = torch.sort(ids.reshape(-1))
    counts = torch.histc(ids.float() if ids.device.type == "cpu" else ids.int(), bins=experts, min=0, max=experts - 1)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=ids.device)
    return permutation, inverse, counts.cumsum(0, dtype=torch.int32)


def copy_bandwidth() -> float:
    """Measure the bytes that a large copy on the GPU reads and writes in a second."""
    from triton.testing import do_bench

    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (do_bench(lambda: target.copy_(source), return_mode="median") / 1000)


def compile_of(gate: Gate) -> Callable:
    """Compile plain torch with torch.compile, for one number of tokens."""

    def run(logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        plan = route(logits, gate.top_k, correction_bias=bias, **gate.options, statistics=False,
                     implementation="eager")  # fmt: skip
        return plan.weights, plan.expert_ids

    return torch.compile(run, dynamic=False)


def measure(gate: Gate, tokens: int, device: str, compiled: Callable, bandwidth: float | None, seconds: float) -> dict:
    """Measure all figures of one gate and one number of tokens."""
    inputs = Inputs(gate, tokens, device)
    found = ways(gate, inputs, device, compiled)
    patch = mock.patch.object(torch.nn.functional, "linear", lambda hidden, weight: given_logits[0])
    row: dict[str, Any] = {"model": gate.model, "tokens": tokens}
    with patch:
        row["routed_otherwise"] = agree(gate, inputs, found)
    other = moe_ops_way(gate) if device == "cuda" else None
    if other is not None:
        found["moe-ops"] = other  # normalised, and therefore not compared above

    def forward_of(way: Callable) -> Step:
        return lambda: way(inputs.logits)

    def both_of(way: Callable) -> Step:
        logits = inputs.logits.clone().requires_grad_()
        return lambda: torch.autograd.grad(way(logits)[0], logits, inputs.grad)

    with torch.no_grad(), patch:
        forwards = {name: forward_of(way) for name, way in found.items()}
        row["forward_us"] = medians(forwards, device, seconds)
        if device == "cuda":
            row["forward_in_graph_us"] = graph_medians(forwards)
    with patch:
        row["forward_backward_us"] = medians({name: both_of(way) for name, way in found.items()}, device, seconds)
    if tokens <= 8192:
        row["gate_us"] = medians(whole_gates(gate, inputs, device), device, seconds)
    ids = found["eager"](inputs.logits)[1]
    groupings: dict[str, Step] = {"transformers": lambda: native_groups(ids, gate.experts)}
    for implementation in ("eager", "triton") if device == "cuda" else ("eager",):
        groupings[implementation] = partial(group_by_expert, ids, gate.experts, implementation=implementation)
    row["grouping_us"] = medians(groupings, device, seconds)
    if device == "cuda":
        row["grouping_in_graph_us"] = graph_medians(groupings)
    row["least_bytes"] = inputs.logits.nbytes + tokens * gate.top_k * (8 + 4)
    if bandwidth:
        seconds_of_kernel = row["forward_in_graph_us"]["triton with statistics"] / 1e6
        row["share_of_copy_bandwidth"] = row["least_bytes"] / seconds_of_kernel / bandwidth
    return row


def table(rows: list[dict], device: str) -> str:
    """Format microseconds, and how many times as fast as transformers this is."""
    mine = "triton" if device == "cuda" else "eager"
    lines = [
        f"| gate | tokens | transformers, us | {mine}, us | with statistics | eager compiled | times as fast "
        f"| forward and backward | whole gate | grouping, sort, us | {mine}, us | times as fast |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        forward, both, grouping = row["forward_us"], row["forward_backward_us"], row["grouping_us"]
        whole = f"{row['gate_us']['transformers'] / row['gate_us'][mine]:.2f}" if "gate_us" in row else ""
        lines.append(
            f"| {row['model']} | {row['tokens']} | {forward['transformers']:.0f} | {forward[mine]:.0f} "
            f"| {forward[f'{mine} with statistics']:.0f} | {forward['eager compiled']:.0f} "
            f"| {forward['transformers'] / forward[mine]:.2f} | {both['transformers'] / both[mine]:.2f} "
            f"| {whole} | {grouping['transformers']:.0f} | {grouping[mine]:.0f} "
            f"| {grouping['transformers'] / grouping[mine]:.2f} |"
        )
    return "\n".join(lines)


def graph_table(rows: list[dict]) -> str:
    """Format the microseconds in a CUDA graph."""
    columns = ("transformers", "eager compiled", "triton", "triton with statistics")
    lines = [
        f"| gate | tokens | {', us | '.join(columns)}, us | of the copy bandwidth | grouping, sort, us | triton, us |",
        f"|{' --- |' * (len(columns) + 5)}",
    ]
    for row in rows:
        forward, grouping = (row[name] for name in ("forward_in_graph_us", "grouping_in_graph_us"))
        cells = [*(forward.get(name) for name in columns)]
        cells = [*cells, 100 * row["share_of_copy_bandwidth"], grouping.get("transformers"), grouping.get("triton")]
        numbers = " | ".join("" if cell is None else f"{cell:.1f}" for cell in cells)
        lines.append(f"| {row['model']} | {row['tokens']} | {numbers} |")
    return "\n".join(lines)


def jobs_of(device: str, bandwidth: float | None, quick: bool, rows: list[dict]) -> list[Job]:
    """List what is measured, the most valuable first. What is found goes into the rows, in the order of the table."""
    lines = [
        (gate, tokens) for gate in (GATES[2:3] if quick else GATES) for tokens in (TOKENS[:3] if quick else TOKENS)
    ]
    places = {(gate.model, tokens): place for place, (gate, tokens) in enumerate(lines)}

    def measure_row(gate: Gate, tokens: int) -> None:
        torch.compiler.reset()  # every number of tokens is compiled for itself
        rows.append(
            measure(gate, tokens, device, compile_of(gate), bandwidth, 0.05 if quick or device == "cuda" else 0.5)
        )
        rows.sort(key=lambda row: places[row["model"], row["tokens"]])

    def rank(line: tuple[Gate, int]) -> tuple[int, bool]:
        gate, tokens = line
        return BY_VALUE.index(tokens), not gate.sigmoid

    return [
        (f"{gate.model}, {tokens} tokens", partial(measure_row, gate, tokens))
        for gate, tokens in sorted(lines, key=rank)
    ]


def main() -> None:
    """Measure, write JSON, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, quick="one gate, up to 256 tokens, nothing written")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bandwidth = copy_bandwidth() if device == "cuda" else None
    rows: list[dict] = []
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    figures = {
        "device": name, "copy_bandwidth": bandwidth, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "rows": rows,
    }  # fmt: skip
    jobs = jobs_of(device, bandwidth, arguments.quick, rows)
    measure_lines(jobs, figures, None if arguments.quick else results_path("routing", device), arguments.budget)
    print(f"On {name}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(table(rows, device))
    if bandwidth:
        print(f"\nIn a CUDA graph; a copy moves {bandwidth / 1e12:.2f} TB/s:\n\n{graph_table(rows)}")
    else:
        print("The kernels: not measured on a GPU.")


if __name__ == "__main__":
    main()
