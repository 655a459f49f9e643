"""Measure LoRA over quantised experts: memory, and time against float32 and against what other tools do.

- `--memory`: 4 MoE layers of the 16B's shape (64 experts, 2048 x 1408, top-6) are loaded from a bfloat16 checkpoint,
  and take a LoRA step of 512 tokens with AdamW, in a process of its own for each format. Anonymous and resident memory
  are what the operating system counts; the pages of the files, which it can drop, are resident too.
- `--speed`: a LoRA step of 1,024 tokens and a decoded token, of one such layer. The formats, float32 and the peer take
  turns in one process. The peer decodes whole stacks by torch's parametrisation, with plain PEFT's adapters.

Prints tables and writes benchmarks/results/quantized_experts.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, DynamicCache

import modeling_deepseekmoe
from modeling_deepseekmoe import DeepseekMoeConfig, StackedExpertsConfig, expert_lora_config
from modeling_deepseekmoe.experts_quantized import stack_of

FORMATS = ("nf4", "fp8", "mxfp4")
RESULTS = Path(__file__).parent / "results" / "quantized_experts.json"
HIDDEN, WIDTH, EXPERTS, TOP_K, VOCABULARY = 2048, 1408, 64, 6, 512
RANK, MEMORY_LAYERS, MEMORY_TOKENS, SPEED_TOKENS = 8, 4, 512, 1024


def write_checkpoint(folder: Path, layers: int, dtype: torch.dtype) -> None:
    """Write a checkpoint of MoE layers with random weights, a file a layer."""
    config = DeepseekMoeConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDTH, moe_intermediate_size=WIDTH,
        num_hidden_layers=layers, num_attention_heads=16, n_routed_experts=EXPERTS, n_shared_experts=1,
        num_experts_per_tok=TOP_K, aux_loss_alpha=0.0, first_k_dense_replace=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    experts = {
        name: torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
        for name, shape in (
            ("gate_proj", (WIDTH, HIDDEN)), ("up_proj", (WIDTH, HIDDEN)), ("down_proj", (HIDDEN, WIDTH)),
        )
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        part = files.setdefault(layer, {})
        if ".experts." not in name:
            norm = name.endswith("norm.weight")
            part[name] = (
                torch.ones(tensor.shape, dtype=dtype) if norm else (0.02 * torch.randn(tensor.shape)).to(dtype)
            )
            continue
        for expert in range(EXPERTS):
            prefix = f"{name.rpartition('.')[0]}.{expert}"
            part |= {f"{prefix}.{key}.weight": weight.roll(expert, 0) for key, weight in experts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    index: dict[str, str] = {}
    for number, (_, tensors) in enumerate(sorted(files.items()), 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    total = sum(t.numel() for t in model.state_dict().values()) * dtype.itemsize
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def load(folder: Path, way: str, dtype: torch.dtype) -> nn.Module:
    """Load the checkpoint, with its experts in a format or as they are."""
    options = {"quantization_config": StackedExpertsConfig(way)} if way in FORMATS else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


# --------------------------------------------------------------------------------------------------------- memory
class Watch(threading.Thread):
    """Reads this process's anonymous memory all the time, and keeps the peak."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.running = 0, True

    def run(self) -> None:
        """Read until it is stopped."""
        while self.running:
            self.peak = max(self.peak, memory_now("RssAnon"))
            time.sleep(0.002)

    def take(self) -> int:
        """Return the peak, and begin anew."""
        peak, self.peak = self.peak, 0
        return peak


def memory_now(field: str) -> int:
    """Return a figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def memory_of(folder: Path, way: str) -> dict[str, Any]:
    """Load and take a LoRA step, and return what the operating system counted."""
    torch.mm(torch.randn(8, 8), torch.randn(8, 8))
    watch = Watch()
    watch.start()
    before = memory_now("RssAnon")
    model = load(folder, way, torch.bfloat16)
    loaded, peak_of_loading = memory_now("RssAnon"), watch.take()
    stacks = {
        name: sum(p.nbytes for n, p in module.named_parameters(recurse=False))
        for name, module in model.named_modules()
        if hasattr(module, "gate_up_proj")
    }
    weights = 3 * HIDDEN * WIDTH * EXPERTS * len(stacks)
    model = get_peft_model(model, expert_lora_config(model, r=RANK)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(3, VOCABULARY, (1, MEMORY_TOKENS), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    watch.running = False
    watch.join()
    return {
        "bytes_a_weight": sum(stacks.values()) / weights,
        "before": before,
        "loaded": loaded,
        "peak_of_loading": peak_of_loading,
        "peak": max(peak_of_loading, watch.peak),
        "peak_resident": memory_now("VmHWM"),
    }


def measure_memory() -> dict[str, Any]:
    """Measure every format in a process of its own."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "bfloat16")
        write_checkpoint(folder, MEMORY_LAYERS, torch.bfloat16)
        for way in ("bfloat16", *FORMATS):
            command = [sys.executable, __file__, "--memory-of", way, "--folder", str(folder)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[way] = json.loads(output.splitlines()[-1])
    for figures in found.values():
        figures["over_bfloat16"] = figures["peak"] / found["bfloat16"]["peak"]
    return found


# ---------------------------------------------------------------------------------------------------------- speed
class Decoded(nn.Module):
    """A parametrisation that decodes a whole stack whenever it is asked for."""

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        self.stack = stack_of(experts, name)

    def forward(self, placeholder: torch.Tensor) -> torch.Tensor:
        """Return the stack (E, out, in)."""
        return self.stack.decode(slice(None)) + 0 * placeholder.sum()


def peer(folder: Path) -> nn.Module:
    """Make what other tools do: stacks that are decoded as a whole, transformers' experts, plain PEFT."""
    model, quantised = load(folder, "float32", torch.float32), load(folder, "nf4", torch.float32)
    model.set_experts_implementation("grouped_mm")
    for path, source in quantised.named_modules():
        if not hasattr(source, "storage_format"):
            continue
        module = model.get_submodule(path)
        for name in ("gate_up_proj", "down_proj"):
            decoded = Decoded(source, name)
            setattr(module, name, nn.Parameter(torch.zeros(1).expand(decoded.stack.shape), requires_grad=False))
            parametrize.register_parametrization(module, name, decoded, unsafe=True)
    return model


def adapted(model: nn.Module, way: str) -> nn.Module:
    """Add adapters of rank 16 to the experts."""
    if way == "peer":  # plain PEFT takes no parametrised parameters: an adapter beside each decoded stack
        for module in model.modules():
            if hasattr(module, "parametrizations"):
                for name in ("gate_up_proj", "down_proj"):
                    parametrize.register_parametrization(module, name, Merged(getattr(module, name)), unsafe=True)
        return model
    return get_peft_model(model, expert_lora_config(model, r=16))


class Merged(nn.Module):
    """Adds the product of an adapter's factors to a whole stack, as plain PEFT does."""

    def __init__(self, stack: torch.Tensor) -> None:
        super().__init__()
        number, rows, columns = stack.shape
        self.lora_a = nn.Parameter(0.02 * torch.randn(number, 16, columns))
        self.lora_b = nn.Parameter(torch.zeros(number, rows, 16))

    def forward(self, stack: torch.Tensor) -> torch.Tensor:
        """Return the merged stack."""
        return torch.baddbmm(stack, self.lora_b, self.lora_a)


def step(model: nn.Module) -> float:
    """Time a forward and backward pass, in seconds."""
    ids = torch.randint(3, VOCABULARY, (1, SPEED_TOKENS), generator=torch.Generator().manual_seed(1))
    begin = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    seconds = time.perf_counter() - begin
    model.zero_grad()
    return seconds


@torch.no_grad()
def decode(model: nn.Module, tokens: int) -> float:
    """Time a token, in seconds, with a cache."""
    cache = DynamicCache()
    model(input_ids=torch.arange(3, 19)[None], past_key_values=cache, use_cache=True)
    begin = time.perf_counter()
    for number in range(tokens):
        model(input_ids=torch.tensor([[5 + number]]), past_key_values=cache, use_cache=True)
    return (time.perf_counter() - begin) / tokens


def measure_speed(rounds: int) -> dict[str, Any]:
    """Measure all ways in turn; every ratio is one of neighbours."""
    ways = ("float32", *FORMATS, "peer")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(folder, 1, torch.float32)
        models = {
            way: adapted(peer(folder) if way == "peer" else load(folder, way, torch.float32), way) for way in ways
        }
        with_base = models
        seconds: dict[str, dict[str, list[float]]] = {kind: {way: [] for way in ways} for kind in ("step", "decode")}
        for number in range(rounds + 1):
            for way in ways if number % 2 else ways[::-1]:
                model = with_base[way]
                times = {"step": step(model.train()), "decode": decode(model.eval(), 1 if way == "peer" else 24)}
                if number:  # the first round warms up
                    for kind, value in times.items():
                        seconds[kind][way].append(value)
    return {
        kind: {
            way: {
                "seconds": statistics.median(seconds[kind][way]),
                "over_float32": statistics.median(
                    a / b for a, b in zip(seconds[kind][way], seconds[kind]["float32"], strict=True)
                ),
            }
            for way in ways
        }
        for kind in seconds
    }


def tables(figures: dict[str, Any]) -> str:
    """Format the figures as Markdown."""
    lines = []
    if "memory" in figures:
        lines += [
            "| experts | bytes a weight | loaded | peak of loading | peak with a LoRA step | over bfloat16 |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for way, row in figures["memory"].items():
            sizes = " | ".join(f"{row[key] / 1e9:.2f} GB" for key in ("loaded", "peak_of_loading", "peak"))
            lines.append(f"| {way} | {row['bytes_a_weight']:.3f} | {sizes} | {row['over_bfloat16']:.2f} |")
    if "speed" in figures:
        lines += [
            "",
            "| experts | LoRA step | over float32 | token | over float32 |",
            "| --- | --- | --- | --- | --- |",
        ]
        for way, row in figures["speed"]["step"].items():
            token = figures["speed"]["decode"][way]
            times = f"{1e3 * row['seconds']:.0f} ms | {row['over_float32']:.2f} | {1e3 * token['seconds']:.1f} ms"
            lines.append(f"| {way} | {times} | {token['over_float32']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(memory_of(arguments.folder, arguments.memory_of)))
        return
    both = not arguments.memory and not arguments.speed
    figures = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    figures |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "version": modeling_deepseekmoe.__version__,
    }
    if arguments.memory or both:
        figures["memory"] = measure_memory()
    if arguments.speed or both:
        figures["speed"] = measure_speed(arguments.rounds)
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    print(tables(figures))


if __name__ == "__main__":
    main()
