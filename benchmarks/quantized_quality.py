"""Measure what quantised experts cost in quality, on the demo's model and text.

The model that `make demo` leaves (SmolLM2-135M as a mixture) is loaded with its experts in float32, FP8, MXFP4 and
NF4. Each is measured on held-out pages of Python's language reference, takes the demo's LoRA steps with the same data
in the same order, and is measured again. "corrected" experts have a correction of low rank (`correct_rounding`), from
some of the pages that are trained on.

Prints a table, and writes benchmarks/results/quantized_quality.json. Four minutes a way on two cores; `--only`
measures some ways, and keeps the figures of the others.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from modeling_deepseekmoe import StackedExpertsConfig, correct_rounding, load_tokenizer
from modeling_deepseekmoe.analysis.evaluation import perplexity

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import DemoSettings, adapt, fine_tune
from demo_data import reference_blocks

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "quantized_quality.json"
WAYS = ("float32", "fp8", "mxfp4", "nf4", "mxfp4, corrected", "nf4, corrected")
CALIBRATION_BLOCKS = 64


@torch.no_grad()
def agreement(model: torch.nn.Module, of_base: list[torch.Tensor], batches: Sequence[torch.Tensor]) -> float:
    """Share of positions at which the most probable token is that of the base."""
    same = [(model(rows).logits.argmax(-1) == wanted) for rows, wanted in zip(batches, of_base, strict=True)]
    return float(torch.cat(same).float().mean())


def measure(folder: Path, steps: int, held_out_blocks: int, ways: Sequence[str]) -> dict[str, Any]:
    """Measure some ways before and after training."""
    settings = replace(DemoSettings(), steps=steps)
    train, held_out = reference_blocks(load_tokenizer(folder), settings.block_size)
    held_out = held_out[:held_out_blocks].split(8)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        chosen = [base(rows).logits.argmax(-1) for rows in held_out]
    del base
    found = {}
    for way in ways:
        kind, _, corrected = way.partition(", ")
        options = {} if kind == "float32" else {"quantization_config": StackedExpertsConfig(kind)}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        if corrected:
            of_train = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:CALIBRATION_BLOCKS]
            correct_rounding(model, folder, train[of_train].split(8))
        adapted = adapt(model, settings)
        before, same = perplexity(adapted, held_out), agreement(adapted, chosen, held_out)
        with tempfile.TemporaryDirectory() as output:
            fine_tune(adapted, train, settings, Path(output))
        found[way] = {"before": before, "same_first_token": same, "after": perplexity(adapted, held_out)}
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
    parser.add_argument("--only", default="", metavar="WAYS", help=f"with semicolons, of: {'; '.join(WAYS)}")
    arguments = parser.parse_args()
    ways = arguments.only.split(";") if arguments.only else WAYS
    found = measure(arguments.model, arguments.steps, arguments.held_out, ways)
    if arguments.only:
        found = json.loads(RESULTS.read_text(encoding="utf-8"))["ways"] | found
    figures = {"torch": torch.__version__, "steps": arguments.steps, "ways": found}
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
