"""Measure what quantised experts cost in quality, on the demo's model and text.

The model that `make demo` leaves (SmolLM2-135M as a mixture) is loaded with its experts in float32, FP8, MXFP4 and
NF4. Each is measured on held-out pages of Python's language reference, takes the demo's LoRA steps with the same data
in the same order, and is measured again. Prints a table, and writes benchmarks/results/quantized_quality.json.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from modeling_deepseekmoe import StackedExpertsConfig, load_tokenizer
from modeling_deepseekmoe.analysis.evaluation import perplexity

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import DemoSettings, fine_tune
from demo_data import reference_blocks

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "quantized_quality.json"
WAYS = ("float32", "fp8", "mxfp4", "nf4")


@torch.no_grad()
def agreement(model: torch.nn.Module, of_base: list[torch.Tensor], blocks: torch.Tensor) -> float:
    """Share of positions at which the most probable token is that of the base."""
    same = [(model(rows).logits.argmax(-1) == wanted) for rows, wanted in zip(blocks.split(8), of_base, strict=True)]
    return float(torch.cat(same).float().mean())


def measure(folder: Path, steps: int, held_out_blocks: int) -> dict[str, Any]:
    """Measure every way before and after training."""
    settings = replace(DemoSettings(), steps=steps)
    train, held_out = reference_blocks(load_tokenizer(folder), settings.block_size)
    held_out = held_out[:held_out_blocks]
    chosen, found = [], {}
    for way in WAYS:
        options = {} if way == "float32" else {"quantization_config": StackedExpertsConfig(way)}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        if way == "float32":
            with torch.no_grad():
                chosen = [model(rows).logits.argmax(-1) for rows in held_out.split(8)]
        before, same = perplexity(model, held_out.split(8)), agreement(model, chosen, held_out)
        with tempfile.TemporaryDirectory() as output:
            adapted, _ = fine_tune(model, train, settings, Path(output))
        after = perplexity(adapted.eval(), held_out.split(8))
        found[way] = {"before": before, "same_first_token": same, "after": after}
        print(way, found[way], flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """Format the figures as Markdown."""
    lines = [
        "| experts | perplexity | against float32 | same first token | after the LoRA steps | against float32 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    base = found["float32"]
    for way, row in found.items():
        worse = [f"{row[key] / base[key] - 1:+.2%}" for key in ("before", "after")]
        lines.append(
            f"| {way} | {row['before']:.3f} | {worse[0]} | {row['same_first_token']:.1%} | {row['after']:.3f} "
            f"| {worse[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "demo" / "model")
    parser.add_argument("--steps", type=int, default=DemoSettings().steps)
    parser.add_argument("--held-out", type=int, default=48, help="blocks of 128 tokens")
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.steps, arguments.held_out)
    figures = {"torch": torch.__version__, "steps": arguments.steps, "ways": found}
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
