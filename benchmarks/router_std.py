"""Measure how fast an upcycled model learns, by the standard deviation of its router's rows, beside the dense model.

SmolLM2-135M-Instruct gets 2 shared and 24 routed experts (top-6). FFNs, experts and gates are trained for 20 AdamW
steps of 4 x 128 tokens of Python's language reference. The perplexity is measured on held-out pages. Prints a table
and writes benchmarks/results/router_std.json. About six minutes on two cores.
"""

import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from modeling_deepseekmoe.analysis.evaluation import perplexity
from modeling_deepseekmoe.conversion import upcycle_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import DemoSettings
from demo_data import obtain_dense_model, reference_blocks, sample_blocks

ROOT = Path(__file__).parent.parent
SETTINGS = DemoSettings()
STEPS, LEARNING_RATE = 20, 1e-4


def train(model: transformers.PreTrainedModel, blocks: torch.Tensor, steps: int = STEPS) -> list[float]:
    """Train the FFNs of a model without a schedule, and return the losses. Every model gets the same batches."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    losses = []
    model.train()
    for _ in range(steps):
        batch = blocks[torch.randint(len(blocks), (SETTINGS.batch_size,), generator=generator)]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    """Measure, write JSON, print the table."""
    transformers.utils.logging.disable_progress_bar()
    cache = ROOT / "runs" / "demo"
    cache.mkdir(parents=True, exist_ok=True)
    dense, tokenizer, origin = obtain_dense_model(cache, print)
    blocks, held_out = reference_blocks(tokenizer, SETTINGS.block_size)
    batches = sample_blocks(held_out, 32).split(8)
    rows = [{"model": "before training", "perplexity": perplexity(dense, batches)}]
    for router_std in (0.02, 0.1, 0.3):
        model = upcycle_model(dense, replace(SETTINGS.plan, router_std=router_std))
        train(model, blocks)
        rows.append({"model": f"router_std {router_std}", "perplexity": perplexity(model, batches)})
        del model
    train(dense, blocks)
    rows.append({"model": "dense", "perplexity": perplexity(dense, batches)})
    figures = {"source": origin, "steps": STEPS, "python": platform.python_version(), "torch": torch.__version__,
               "transformers": transformers.__version__, "rows": rows}  # fmt: skip
    path = ROOT / "benchmarks" / "results" / "router_std.json"
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print("| after 20 steps | held-out perplexity |\n| --- | --- |")
    for row in rows:
        print(f"| {row['model']} | {row['perplexity']:.2f} |")


if __name__ == "__main__":
    main()
