"""Measure which way of upcycling learns fastest: how many shards, how many copies, how wide the shared experts are.

SmolLM2-135M-Instruct is upcycled in several ways. All compute the same at first, and a token uses as many neurons as
in the dense model. FFNs, experts and gates are trained for 60 AdamW steps of 4 x 128 tokens of Python's language
reference, without a schedule, all on the same batches. The perplexity is measured on held-out pages.

Prints a table and writes benchmarks/results/upcycling_study.json, line by line. A line that is there is not measured
again: `--only` measures a piece. About an hour on two cores.

    python benchmarks/upcycling_study.py [--only dense "6 x 4, shared 384"]
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import RESULTS, write_results
from router_std import ROOT, SETTINGS, train

from modeling_deepseekmoe import max_violation
from modeling_deepseekmoe.analysis.evaluation import expert_load, perplexity
from modeling_deepseekmoe.conversion import UpcyclingPlan, upcycle_model

sys.path.insert(0, str(ROOT / "examples"))
from demo_data import obtain_dense_model, reference_blocks, sample_blocks

STEPS = 60
# Width of the shared experts, shards (G), copies (C). The first is the demo's and the documentation's.
PLANS = (
    (384, 6, 4),
    (384, 6, 2),
    (384, 6, 8),
    (384, 3, 4),
    (384, 12, 4),
    (0, 8, 4),
    (0, 2, 4),
    (768, 4, 4),
    (1152, 2, 4),
)
DENSE = "dense"


def name_of(shared: int, shards: int, copies: int) -> str:
    """Name a way of upcycling."""
    return f"{shards} x {copies}, shared {shared}"


WAYS: dict[str, UpcyclingPlan | None] = {
    DENSE: None,
    **{
        name_of(*plan): replace(SETTINGS.plan, shared_width=plan[0], num_shards=plan[1], num_copies=plan[2])
        for plan in PLANS
    },
}


def measure(plan: UpcyclingPlan | None, cache: Path, steps: int) -> dict[str, Any]:
    """Upcycle the dense model by a plan, or take it as it is, train it, and measure it."""
    model, tokenizer, origin = obtain_dense_model(cache, print)
    blocks, held_out = reference_blocks(tokenizer, SETTINGS.block_size)
    batches = sample_blocks(held_out, 32).split(8)
    if plan is not None:
        model = upcycle_model(model, plan)
    before, begin = perplexity(model, batches), time.perf_counter()
    losses = train(model, blocks, steps)
    seconds = time.perf_counter() - begin
    loads = list(expert_load(model, batches).values()) if plan is not None else []
    return {
        "source": origin,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "perplexity_before": before,
        "perplexity": perplexity(model, batches),
        "training_loss_of_last_10_steps": sum(losses[-10:]) / len(losses[-10:]),
        "max_violation_global": max_violation(torch.stack(loads)).mean().item() if loads else None,
        "seconds_per_step": seconds / steps,
    }


def main() -> None:
    """Measure what is missing, write JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS), help="measure only these")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=RESULTS / "upcycling_study.json", help="the file of results")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    cache = ROOT / "runs" / "demo"
    cache.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "threads": torch.get_num_threads(), "steps": options.steps, "rows": {},
    }  # fmt: skip
    if options.output.exists():
        figures = json.loads(options.output.read_text(encoding="utf-8"))
        if figures["steps"] != options.steps:
            raise ValueError(f"{options.output} has steps={figures['steps']}: choose another --output, or delete it.")
    for name in options.only:
        if name not in figures["rows"]:
            figures["rows"][name] = measure(WAYS[name], cache, options.steps)
            write_results(options.output, figures)
            print(f"{name}: {figures['rows'][name]}", flush=True)
    print("| way | parameters | held-out perplexity | MaxVio_global |\n| --- | --- | --- | --- |")
    for name, row in figures["rows"].items():
        violation = row["max_violation_global"]
        shown = "" if violation is None else f"{violation:.2f}"
        print(f"| {name} | {row['parameters'] / 1e6:,.0f} M | {row['perplexity']:.2f} | {shown} |")


if __name__ == "__main__":
    main()
