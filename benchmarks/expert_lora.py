"""Compare LoRA on stacked experts by plain PEFT, LoRA by this package, and the frozen base, in one run.

Small models of MoE layers are measured for several numbers of experts, ranks and tokens: a training step (forward and
backward, the base frozen, gradients down to the input embeddings), its forward pass, a decoded token, and the peak
memory of a training step, in a process of its own. On a CPU the first case is measured on one thread too. On a GPU,
other and larger shapes are measured.

Prints medians and the medians of ratios of neighbouring measurements. Writes benchmarks/results/expert_lora.json, or
expert_lora_gpu.json.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM, expert_lora_config

WAYS = ("base", "peft", "ours")
NAMES = {"base": "frozen base", "peft": "plain PEFT", "ours": "this package"}
PROMPT = 16


@dataclass(frozen=True)
class Shape:
    """One case: a model of MoE layers only, and what runs through it."""

    experts: int
    hidden: int
    width: int
    top_k: int
    layers: int
    tokens: int
    rank: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return (
            f"{self.experts} experts, hidden {self.hidden}, width {self.width}, top-{self.top_k}, "
            f"{self.layers} layers, {self.tokens} tokens, r {self.rank}, {self.dtype}"
        )


CPU_SHAPES = (
    Shape(64, 1024, 704, 6, 3, 256, 16),
    Shape(64, 1024, 704, 6, 3, 1024, 16),
    Shape(64, 1024, 704, 6, 3, 256, 64),
    Shape(16, 1024, 704, 4, 3, 256, 16),
    Shape(160, 1024, 352, 6, 3, 256, 16),
)
GPU_SHAPES = (
    Shape(128, 2048, 768, 8, 4, 4096, 16, "bfloat16"),
    Shape(64, 2048, 1408, 6, 4, 4096, 16, "bfloat16"),
)


def make_model(shape: Shape, way: str, device: str) -> nn.Module:
    """Make the model of a case. Its random weights are the same for plain PEFT, this package and the base."""
    torch.manual_seed(0)
    config = DeepseekMoeConfig(
        vocab_size=512, hidden_size=shape.hidden, intermediate_size=shape.width, moe_intermediate_size=shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=16, n_routed_experts=shape.experts, n_shared_experts=1,
        num_experts_per_tok=shape.top_k, aux_loss_alpha=0.0, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device(device):
        model = DeepseekMoeForCausalLM(config).to(getattr(torch, shape.dtype))
    model.requires_grad_(False)
    if way == "peft":
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = get_peft_model(
            model, LoraConfig(r=shape.rank, lora_alpha=32, target_modules=[], target_parameters=targets)
        )
    elif way == "ours":
        model = get_peft_model(model, expert_lora_config(model, r=shape.rank, lora_alpha=32))
    return model


def training_step(model: nn.Module, embeddings: torch.Tensor) -> tuple[float, float]:
    """Time the forward pass and the whole step, in seconds."""
    embeddings = embeddings.requires_grad_()
    _wait(embeddings)
    begin = time.perf_counter()
    loss = model(inputs_embeds=embeddings, use_cache=False).logits.float().square().mean()
    _wait(embeddings)
    middle = time.perf_counter()
    loss.backward()
    _wait(embeddings)
    end = time.perf_counter()
    model.zero_grad()
    embeddings.grad = None
    return middle - begin, end - begin


@torch.no_grad()
def decode(model: nn.Module, device: str, new_tokens: int) -> float:
    """Time one token, in seconds, in one sequence with a cache."""
    cache = DynamicCache()
    model(input_ids=torch.arange(PROMPT, device=device)[None], past_key_values=cache, use_cache=True)
    token = torch.tensor([[7]], device=device)
    _wait(token)
    begin = time.perf_counter()
    for _ in range(new_tokens):
        model(input_ids=token, past_key_values=cache, use_cache=True)
    _wait(token)
    return (time.perf_counter() - begin) / new_tokens


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def peak_memory(shape: Shape, way: str, device: str) -> int:
    """Measure the peak bytes of a training step, weights included.

    They are the resident memory of a fresh process, or the GPU's.
    """
    command = [sys.executable, __file__, "--memory", json.dumps(asdict(shape)), way, device]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(shape: Shape, way: str, device: str) -> int:
    """Measure the peak in the fresh process."""
    model = make_model(shape, way, device).train()
    embeddings = _embeddings(shape, device)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            training_step(model, embeddings)
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    for _ in range(2):
        training_step(model, embeddings)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def _embeddings(shape: Shape, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1, shape.tokens, shape.hidden, generator=generator)
    return values.to(device, getattr(torch, shape.dtype))


def measure(shape: Shape, device: str, rounds: int) -> dict:
    """Measure all figures of a case. PEFT, this package and the base take turns; every ratio is one of neighbours."""
    models = {way: make_model(shape, way, device) for way in WAYS}
    embeddings = _embeddings(shape, device)
    kinds = ("forward", "step", "decode")
    seconds: dict[str, dict[str, list[float]]] = {kind: {way: [] for way in WAYS} for kind in kinds}
    for number in range(rounds + 1):
        for way in WAYS if number % 2 else WAYS[::-1]:
            forward, step = training_step(models[way].train(), embeddings)
            token = decode(models[way].eval(), device, 2 if way == "peft" else 16)
            if number:  # the first round warms up
                for kind, value in (("forward", forward), ("step", step), ("decode", token)):
                    seconds[kind][way].append(value)
    del models
    memory = {way: peak_memory(shape, way, device) for way in WAYS}
    extra = {way: memory[way] - memory["base"] for way in WAYS}
    return {
        "shape": asdict(shape),
        "seconds": {kind: {way: statistics.median(seconds[kind][way]) for way in WAYS} for kind in kinds},
        "over_base": {
            kind: {way: _ratio(seconds[kind][way], seconds[kind]["base"]) for way in WAYS} for kind in kinds
        },
        "peft_over_ours": {kind: _ratio(seconds[kind]["peft"], seconds[kind]["ours"]) for kind in kinds},
        "peak_bytes": memory,
        "extra_memory_of_peft": extra["ours"] / extra["peft"],
    }


def _ratio(mine: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


def table(case: dict) -> str:
    """Format one case as Markdown."""
    rows = [
        f"{Shape(**case['shape'])}\n",
        "| | training step | over base | one-token decode | over base | peak memory |",
    ]
    rows.append("| --- | --- | --- | --- | --- | --- |")
    for way in WAYS:
        step, token = case["seconds"]["step"][way] * 1e3, case["seconds"]["decode"][way] * 1e3
        ratios = case["over_base"]
        rows.append(
            f"| {NAMES[way]} | {step:.0f} ms | {ratios['step'][way]:.2f} | {token:.1f} ms | "
            f"{ratios['decode'][way]:.2f} | {case['peak_bytes'][way] / 1e9:.2f} GB |"
        )
    faster = case["peft_over_ours"]
    rows.append(
        f"\nAgainst plain PEFT: step {faster['step']:.1f} times, decode {faster['decode']:.1f} times faster; extra "
        f"memory over the base {100 * case['extra_memory_of_peft']:.1f}% of PEFT's.\n"
    )
    return "\n".join(rows)


def main() -> None:
    """Measure, write JSON, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--first", action="store_true", help="only the first shape; nothing is written")
    parser.add_argument("--memory", nargs=3, metavar=("SHAPE", "WAY", "DEVICE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        shape, way, device = arguments.memory
        print(measure_memory(Shape(**json.loads(shape)), way, device))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    cases = []
    for shape in shapes[: 1 if arguments.first else None]:
        cases.append(measure(shape, device, arguments.rounds))
        print(table(cases[-1]), flush=True)
    if arguments.first:
        return
    threads = torch.get_num_threads()
    one_thread = None
    if device == "cpu":
        torch.set_num_threads(1)
        one_thread = measure(shapes[0], device, arguments.rounds)
        print(f"On one thread: {table(one_thread)}", flush=True)
    figures = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "cases": cases,
        "one_thread": one_thread,
    }
    name = "expert_lora_gpu.json" if device == "cuda" else "expert_lora.json"
    path = Path(__file__).parent / "results" / name
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
