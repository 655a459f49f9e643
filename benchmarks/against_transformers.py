"""Compare this package with transformers' own classes on the tiny official checkpoints, in one run.

Prints a table and writes benchmarks/results/against_transformers.json:
- the largest difference of the logits from the figures of the official code;
- what a Trainer run that is interrupted and resumed does to the routed experts;
- the time of `import modeling_deepseekmoe` over that of `import transformers, torch`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

ROOT = Path(__file__).parent.parent
GOLDEN = sorted((ROOT / "tests" / "data" / "golden").iterdir())
IMPORT_RUNS = 11


class RandomRows(Dataset):
    """32 rows of 12 random tokens, the same in every run."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.randint(96, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


def logit_difference(folder: Path) -> float | str:
    """Compute the largest difference from the official logits, or return why there is none."""
    expected = load_file(folder / "expected.safetensors")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    except (ValueError, KeyError, OSError) as error:
        return f"does not load ({type(error).__name__})"
    with torch.no_grad():
        return float((model(expected["input_ids"]).logits - expected["logits"]).abs().max())


def resumed_difference(folder: Path) -> float | str:
    """Compute how far the experts' parameters differ at most after four steps, with and without a resume after two."""
    try:
        models = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(2)]
    except (ValueError, KeyError, OSError) as error:
        return f"does not load ({type(error).__name__})"
    with tempfile.TemporaryDirectory() as output:
        settings = TrainingArguments(output, max_steps=4, save_steps=2, report_to="none", use_cpu=True,
                                     disable_tqdm=True, logging_strategy="no", learning_rate=1e-3)  # fmt: skip
        Trainer(models[0], settings, train_dataset=RandomRows()).train()
        reinitialize(models[1])
        resumed = Trainer(models[1], settings, train_dataset=RandomRows())
        resumed.train(resume_from_checkpoint=f"{output}/checkpoint-2")
    pairs = zip(models[0].named_parameters(), models[1].parameters(), strict=True)
    return max(float((one - other).detach().abs().max()) for (name, one), other in pairs if ".mlp.experts." in name)


def reinitialize(model: PreTrainedModel) -> None:
    """Give the model other weights, as a new process would have before it resumes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)


def import_seconds(statement: str) -> float:
    """Time an import statement in a new process, in seconds."""
    script = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def measure_side(side: str) -> dict[str, dict[str, float | str]]:
    """Measure the figures of one side."""
    if side != "transformers":
        import modeling_deepseekmoe

        modeling_deepseekmoe.register(override_native=True)
    return {
        "logits": {folder.name: logit_difference(folder) for folder in GOLDEN},
        "resumed": {folder.name: resumed_difference(folder) for folder in GOLDEN},
    }


def measure() -> dict[str, Any]:
    """Measure all figures."""
    sides = {}
    for side in ("transformers", "modeling_deepseekmoe"):  # in a process each: nothing of the other's is registered
        output = subprocess.run(
            [sys.executable, __file__, "--side", side], capture_output=True, text=True, check=True
        ).stdout
        sides[side] = json.loads(output.splitlines()[-1])
    base, ours = [], []
    for _ in range(IMPORT_RUNS):
        base.append(import_seconds("import transformers, torch"))
        ours.append(import_seconds("import modeling_deepseekmoe"))
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__
        },
        "sides": sides,
        "import": {
            "runs": IMPORT_RUNS,
            "median_seconds_transformers_torch": statistics.median(base),
            "median_seconds_modeling_deepseekmoe": statistics.median(ours),
            "median_ratio": statistics.median(one / other for one, other in zip(ours, base, strict=True)),
        },
    }  # fmt: skip


def table(figures: dict[str, Any]) -> str:
    """Format the figures as Markdown."""
    lines = [
        "| tiny official checkpoint | figure | transformers | modeling-deepseekmoe |",
        "| --- | --- | --- | --- |",
    ]
    for key, title in (("logits", "max logit difference"), ("resumed", "experts after resuming, max difference")):
        for folder in GOLDEN:
            cells = [figures["sides"][side][key][folder.name] for side in ("transformers", "modeling_deepseekmoe")]
            shown = [cell if isinstance(cell, str) else f"{cell:.1e}" for cell in cells]
            lines.append(f"| {folder.name} | {title} | {shown[0]} | {shown[1]} |")
    lines.append(f"\nimport: {figures['import']['median_ratio']:.2f} times `import transformers, torch` "
                 f"(median of {figures['import']['runs']} pairs)")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Measure, write JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", help="print the figures of one side alone, as JSON")
    side = parser.parse_args().side
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if side:
        print(json.dumps(measure_side(side)))
        return
    started = time.monotonic()
    figures = measure()
    path = ROOT / "benchmarks" / "results" / "against_transformers.json"
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"{figures['machine']}, {figures['versions']}, {time.monotonic() - started:.0f} s\n\n{table(figures)}")


if __name__ == "__main__":
    main()
