"""Compare ways to balance experts: none, the auxiliary loss, loss-free balancing, loss-free plus sequence loss.

A small DeepSeekMoE is trained from scratch with every method and several seeds, on the docstrings of Python's standard
library and the pages of its language reference. The methods are compared as in arXiv 2408.15664: by validation
perplexity, by MaxVio of the whole validation set (MaxVio_global) and by MaxVio of every training batch (MaxVio_batch).
All methods have the same sigmoid gate, data order and schedule and, for a seed, the same initial weights. The bias
moves by the paper's constant 0.001. The auxiliary loss is taken over the whole batch, as the bias is. Its best
coefficient is chosen by the validation perplexity itself, which favours it.

Prints a table, and writes benchmarks/results/balancing.json and balancing.png. The runs share the cores: each process
has one thread and one core. Under an hour on two cores; `--steps 20 --seeds 1` to try it.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import corpus
import torch
import transformers
from small_training import training_steps

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM, max_violation, take_router_load
from modeling_deepseekmoe.analysis.evaluation import expert_load, perplexity
from modeling_deepseekmoe.analysis.plots import plot_curves
from modeling_deepseekmoe.balancing.bias_update import update_router_bias

RESULTS = Path(__file__).parent / "results"
VOCAB_SIZE = 2048
MEASURES = {"perplexity": 2, "max_violation_global": 3, "max_violation_batch": 3, "max_violation_batch_end": 3}
AUXILIARY_ALPHAS = (1e-1, 1e-2, 1e-3)
MODEL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "n_routed_experts": 32,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class Training:
    """Settings of a run, see [`training_steps`]."""

    steps: int = 1200
    batch_size: int = 8
    block_size: int = 128
    learning_rate: float = 3e-3
    update_rate: float = 1e-3


@dataclass(frozen=True)
class Method:
    """A way to balance: with a balancing bias or not, and the coefficients of the losses."""

    name: str
    bias: bool = False
    alpha: float = 0.0
    sequence_alpha: float = 0.0


METHODS = (
    Method("no balancing"),
    *(Method(f"auxiliary loss, {alpha:g}", alpha=alpha) for alpha in AUXILIARY_ALPHAS),
    Method("loss-free", bias=True),
    Method("loss-free + sequence loss, 0.0001", bias=True, sequence_alpha=1e-4),
)


def documents() -> list[str]:
    """Collect docstrings of the standard library without its tests, and pages of the language reference, each once."""
    found = dict.fromkeys(topics[name] for name in sorted(topics))
    for _, texts in corpus.docstrings(Path(sysconfig.get_paths()["stdlib"])):
        found.update(dict.fromkeys(texts))
    return [text for text in found if len(text) >= corpus.LEAST_CHARACTERS]


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Divide texts into training and validation texts. A tenth, chosen by a hash, is for validation.

    Validation texts are left out if more than half of their runs of twelve words are also in a training text.
    """
    held_out = [text for text in texts if hashlib.sha256(text.encode()).digest()[0] < 26]
    training = [text for text in texts if hashlib.sha256(text.encode()).digest()[0] >= 26]
    return training, corpus.without_copies(held_out, training)


def token_blocks(block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make training and validation blocks (N, block_size) with a byte-level BPE, trained on the training texts."""
    training, validation = split(documents())
    tokenizer = corpus.train_tokenizer(training, VOCAB_SIZE)
    return corpus.blocks(training, tokenizer, block_size), corpus.blocks(validation, tokenizer, block_size)


def run(job: tuple[Method, int, Training, torch.Tensor, torch.Tensor]) -> dict:
    """Train and measure one model."""
    method, seed, settings, training, validation = job
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    config = DeepseekMoeConfig(
        **MODEL,
        topk_method="noaux_tc" if method.bias else "greedy",
        aux_loss_alpha=method.alpha,
        seq_aux=False,
        sequence_balance_alpha=method.sequence_alpha,
    )
    model = DeepseekMoeForCausalLM(config).train()
    order = torch.Generator().manual_seed(seed)
    batches = (
        training[torch.randint(len(training), (settings.batch_size,), generator=order)] for _ in range(settings.steps)
    )
    batch_violations, begin = [], time.perf_counter()
    for _ in training_steps(model, batches, steps=settings.steps, learning_rate=settings.learning_rate):
        load = update_router_bias(model, settings.update_rate) if method.bias else take_router_load(model)
        batch_violations.append(max_violation(load.tokens_per_expert).mean().item())
    loads = expert_load(model, validation.split(32))
    return {
        "method": method.name,
        "seed": seed,
        "perplexity": perplexity(model, validation.split(32)),
        "max_violation_global": max_violation(torch.stack(list(loads.values()))).mean().item(),
        "max_violation_batch": statistics.mean(batch_violations),
        "max_violation_batch_end": statistics.mean(batch_violations[-settings.steps // 5 :]),
        "seconds": time.perf_counter() - begin,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch_violations": batch_violations,
    }


def summarize(runs: list[dict]) -> list[dict]:
    """Compute mean, lowest and highest value over the seeds, for every method."""
    rows = []
    for method in METHODS:
        mine = [run for run in runs if run["method"] == method.name]
        row: dict = {"method": method.name}
        for measure in MEASURES:
            values = [run[measure] for run in mine]
            row[measure] = {"mean": statistics.mean(values), "min": min(values), "max": max(values)}
        rows.append(row)
    return rows


def verdict(runs: list[dict]) -> str:
    """Compare loss-free balancing with the auxiliary loss at its best coefficient, seed by seed."""
    perplexities: dict[str, dict[int, float]] = {}
    for run in runs:
        perplexities.setdefault(run["method"], {})[run["seed"]] = run["perplexity"]
    names = [method.name for method in METHODS if method.alpha]
    best = min(names, key=lambda name: statistics.mean(perplexities[name].values()))
    gaps = [perplexities["loss-free"][seed] - value for seed, value in sorted(perplexities[best].items())]
    spread = statistics.stdev(perplexities[best].values()) if len(gaps) > 1 else 0.0
    violations = [run["max_violation_global"] for run in runs if run["method"] == "loss-free"]
    return (
        f"Loss-free balancing: MaxVio_global at most {max(violations):.3f}, "
        f"{'within' if max(violations) <= 0.1 else 'above'} 0.10. Perplexity minus that of the best auxiliary loss "
        f"({best}), by seed: {', '.join(f'{gap:+.2f}' for gap in gaps)}, mean {statistics.mean(gaps):+.2f}; standard "
        f"deviation of the latter's seeds {spread:.2f}: "
        f"{'no worse within' if statistics.mean(gaps) <= spread else 'worse than'} the spread."
    )


def smooth(values: list[float], width: int = 20) -> list[float]:
    """Compute means of neighbouring steps, `width` at a time."""
    return [statistics.mean(values[start : start + width]) for start in range(0, len(values), width)]


def curves_of(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Compute the MaxVio of the training batches of every method: the mean over the seeds, smoothed."""
    by_method = {
        method.name: [run["batch_violations"] for run in runs if run["method"] == method.name] for method in METHODS
    }
    return {
        name: smooth([statistics.mean(values) for values in zip(*violations, strict=True)])
        for name, violations in by_method.items()
    }


def print_table(figures: dict[str, Any]) -> None:
    """Print what README shows."""
    print(f"\n{figures['parameters']:,} parameters, {figures['training_tokens']:,} training tokens,", end=" ")
    print(f"{figures['seeds']} seeds, {figures['minutes']:.0f} minutes")
    print(
        "| | validation perplexity | MaxVio_global | MaxVio_batch | its last fifth |\n| --- | --- | --- | --- | --- |"
    )
    for row in figures["rows"]:
        cells = [
            f"{row[measure]['mean']:.{digits}f} ({row[measure]['min']:.{digits}f} to {row[measure]['max']:.{digits}f})"
            for measure, digits in MEASURES.items()
        ]
        print(f"| {row['method']} | {' | '.join(cells)} |")
    print(figures["verdict"])


def main() -> None:
    """Run everything, write the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = Training(steps=options.steps)
    begin = time.perf_counter()
    training, validation = token_blocks(settings.block_size)
    jobs = [(method, seed, settings, training, validation) for seed in range(options.seeds) for method in METHODS]
    runs = []
    torch.multiprocessing.set_sharing_strategy("file_system")
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        for result in pool.imap_unordered(run, jobs):
            runs.append(result)
            print(
                f"{len(runs)}/{len(jobs)} {result['method']}, seed {result['seed']}: perplexity "
                f"{result['perplexity']:.2f}, MaxVio_global {result['max_violation_global']:.3f}, "
                f"{result['seconds']:.0f} s",
                flush=True,
            )
    rows, curves = summarize(runs), curves_of(runs)
    figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "minutes": (time.perf_counter() - begin) / 60,
        "model": MODEL,
        "parameters": runs[0]["parameters"],
        "training": asdict(settings),
        "training_tokens": settings.steps * settings.batch_size * settings.block_size,
        "corpus_tokens": training.numel(),
        "validation_tokens": validation.numel(),
        "corpus_sha256": hashlib.sha256(training.numpy().tobytes() + validation.numpy().tobytes()).hexdigest(),
        "seeds": options.seeds,
        "rows": rows,
        "batch_violation_by_20_steps": curves,
        "verdict": verdict(runs),
        "runs": [{key: run[key] for key in run if key != "batch_violations"} for run in runs],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "balancing.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    plot_curves(
        curves,
        options.output / "balancing.png",
        title=f"Imbalance of the training batches, mean of {options.seeds} seeds",
        xlabel="optimizer step",
        ylabel="MaxVio_batch, mean over the layers and 20 steps",
        step=20,
        log_scale=True,
    )
    print_table(figures)


if __name__ == "__main__":
    main()
