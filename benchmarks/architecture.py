"""Train the architectures of DeepSeekMoE's ablation (arXiv 2401.06066, section 4) from scratch, and compare them.

For a seed every model has the same attention, the same initial weights outside of its FFNs, and the same data in the
same order. The experts of every MoE model, routed and shared, have as many parameters together, and a token uses as
many of them: GShard's 16 experts, of which a token uses two, are cut finer step by step, and one expert becomes a
shared one. Beside this ladder stand a dense model that computes as much, a dense one with all parameters active (the
upper bound), GShard with experts of 1.5 times the size, DeepSeekMoE without its shared expert, and balanced by a bias
instead of a loss, and two models with the weights of the paper.

The gates are the paper's (softmax, not normalised), and so is the balance loss (its factor 0.01). One thing differs:
the weights are multiplied by the number of routed experts, as DeepSeek-V2 multiplies its own by a factor. A chosen
expert has a weight of about 1 at first then, whatever their number, so that an expert and all the parts it is cut into
compute the same. Without this, finer experts begin with smaller outputs, and learn slowly in so short a training.

    python benchmarks/architecture.py                          # all that is missing, one on each core
    python benchmarks/architecture.py --only gshard --seeds 1  # a piece

Of the ends of the ladder everything is measured that `deepseekmoe analyze` measures. All of it is kept in
benchmarks/results/architecture.json, and a run that is there is not made again. The trained models are in
runs/architecture, with a file of the validation text, to look at:

    deepseekmoe analyze runs/architecture/fine-4-0 --against runs/architecture/gshard-1.5-0 \\
        --data runs/architecture/validation.jsonl --domains domain --block-size 128

Under five hours on two cores; `architecture_results.py` draws and prints the results.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import corpus
import torch
import transformers
from measuring import RESULTS, write_results
from small_training import training_steps
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM, max_violation
from modeling_deepseekmoe.analysis.ablations import Losses, measure_single_experts
from modeling_deepseekmoe.analysis.evaluation import expert_load, trace_routing, traced_layers
from modeling_deepseekmoe.analysis.inspection import report_on
from modeling_deepseekmoe.analysis.interventions import losses_of_blocks
from modeling_deepseekmoe.analysis.specialisation import measure_specialisation
from modeling_deepseekmoe.balancing.bias_update import update_router_bias

RUNS = Path(__file__).parent.parent / "runs" / "architecture"
VOCAB_SIZE = 4096
WIDTH = 192  # of an expert of GShard
MODEL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GATE: dict[str, Any] = {"scoring_func": "softmax", "norm_topk_prob": False, "seq_aux": False}
UNSCALED: dict[str, Any] = {"routed_scaling_factor": 1.0}


@dataclass(frozen=True)
class Training:
    """Settings of a run, see [`training_steps`]."""

    steps: int = 1500
    batch_size: int = 16
    block_size: int = 128
    learning_rate: float = 3e-3
    balance_factor: float = 0.01
    update_rate: float = 1e-3


@dataclass(frozen=True)
class Architecture:
    """A model of the ladder: its experts, and how they are balanced.

    Attributes:
        name, label: its name in the results, and in tables.
        routed, shared, top_k: numbers of experts; 0 routed experts make a dense model.
        width: of an expert, or of the dense FFN.
        bias: whether it is balanced by a bias, and not by a loss.
        gate: fields of its config that are not those of the paper's gate.
    """

    name: str
    label: str
    routed: int
    shared: int
    top_k: int
    width: int
    bias: bool = False
    gate: dict[str, Any] = field(default_factory=dict)

    def config(self, settings: Training) -> DeepseekMoeConfig:
        """Return the config of the model."""
        if not self.routed:
            return DeepseekMoeConfig(**MODEL, n_routed_experts=None, intermediate_size=self.width)
        return DeepseekMoeConfig(
            **MODEL,
            **GATE | {"routed_scaling_factor": float(self.routed)} | self.gate,
            intermediate_size=self.width,
            moe_intermediate_size=self.width,
            n_routed_experts=self.routed,
            n_shared_experts=self.shared or None,
            num_experts_per_tok=self.top_k,
            topk_method="noaux_tc" if self.bias else "greedy",
            aux_loss_alpha=0.0 if self.bias else settings.balance_factor,
        )


LADDER = (
    Architecture("dense", "dense, as much computation", 0, 0, 0, 2 * WIDTH),
    Architecture("switch", "Switch, 1 of 8 of twice the size", 8, 0, 1, 2 * WIDTH),
    Architecture("gshard", "GShard, 2 of 16", 16, 0, 2, WIDTH),
    Architecture("shared", "+ shared expert: 1 + 1 of 15", 15, 1, 1, WIDTH),
    Architecture("fine-2", "+ fine-grained x2: 1 + 3 of 31", 31, 1, 3, WIDTH // 2),
    Architecture("fine-4", "+ fine-grained x4: 1 + 7 of 63 (DeepSeekMoE)", 63, 1, 7, WIDTH // 4),
    Architecture("fine-4-bias", "DeepSeekMoE, balanced by a bias", 63, 1, 7, WIDTH // 4, bias=True),
    Architecture("fine-4-alone", "fine-grained x4, no shared expert: 8 of 64", 64, 0, 8, WIDTH // 4),
    Architecture("gshard-1.5", "GShard x1.5, 2 of 16", 16, 0, 2, 3 * WIDTH // 2),
    Architecture("dense-all", "dense, all parameters active", 0, 0, 0, 16 * WIDTH),
    Architecture("gshard-unscaled", "GShard, weights not multiplied", 16, 0, 2, WIDTH, gate=UNSCALED),
    Architecture("fine-4-unscaled", "DeepSeekMoE, weights not multiplied", 63, 1, 7, WIDTH // 4, gate=UNSCALED),
)
BY_NAME = {one.name: one for one in LADDER}
# Of these more is measured than the loss. The paper compares the redundancy of the second and the third.
ENDS = ("gshard", "gshard-1.5", "fine-4", "fine-4-bias")
MEASURED_BLOCKS, SINGLE_BLOCKS, BATCH = 100, 16, 25  # blocks of a domain, and of a batch


@dataclass(frozen=True)
class Corpus:
    """Blocks (N, S) to train on, and for every domain blocks to validate on, as many for each."""

    training: torch.Tensor
    validation: dict[str, torch.Tensor] = field(repr=False)
    tokenizer: str = field(repr=False)

    @property
    def digest(self) -> str:
        """Tell whether two machines have the same data."""
        blocks = [self.training, *self.validation.values()]
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in blocks)).hexdigest()


def read_corpus(block_size: int, folder: Path = RUNS) -> Corpus:
    """Read all texts, train a tokenizer on those to train on, and make blocks. The result is kept in a file."""
    file = folder / f"corpus-{block_size}.pt"
    if not file.exists():
        training, held_out = corpus.split(corpus.documents())
        tokenizer = corpus.train_tokenizer((document.text for document in training), VOCAB_SIZE)
        validation = {
            domain: corpus.blocks([one.text for one in held_out if one.domain == domain], tokenizer, block_size)
            for domain in corpus.DOMAINS
        }
        fewest = min(map(len, validation.values()))
        validation = {
            domain: blocks[
                torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))[:fewest].sort().values
            ]
            for domain, blocks in validation.items()
        }
        own = corpus.blocks([document.text for document in training], tokenizer, block_size)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        torch.save({"training": own, "validation": validation, "tokenizer": tokenizer.to_str()}, unfinished)
        unfinished.replace(file)
    return Corpus(**torch.load(file))


def train(job: tuple[Architecture, int, Training]) -> dict[str, Any]:
    """Train one model, save it, and measure it."""
    architecture, seed, settings = job
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    data, config = read_corpus(settings.block_size), architecture.config(settings)
    torch.manual_seed(seed)
    model = DeepseekMoeForCausalLM(config).train()
    same_weights(model, seed)
    begin, batches = time.perf_counter(), _training_batches(data.training, settings, seed)
    for _ in training_steps(model, batches, steps=settings.steps, learning_rate=settings.learning_rate):
        if architecture.bias:
            update_router_bias(model, settings.update_rate)
    seconds = time.perf_counter() - begin
    save(model, data, f"{architecture.name}-{seed}")
    by_domain = {
        domain: float(losses_of_blocks(model, blocks.split(BATCH)).mean())
        for domain, blocks in data.validation.items()
    }
    blocks = torch.cat(list(data.validation.values()))
    loads = list(expert_load(model, blocks.split(BATCH)).values()) if architecture.routed else []
    return {
        "architecture": architecture.name,
        "seed": seed,
        "loss": statistics.mean(by_domain.values()),
        "loss_by_domain": by_domain,
        "max_violation_global": max_violation(torch.stack(loads)).mean().item() if loads else None,
        "seconds": seconds,
        "measured": measure(model, data.validation) if architecture.name in ENDS else None,
    }


@torch.no_grad()
def same_weights(model: DeepseekMoeForCausalLM, seed: int) -> None:
    """Give every matrix outside of the FFNs the initial weights that it has in all models of this seed."""
    for name, parameter in model.named_parameters():
        if ".mlp." not in name and parameter.ndim == 2:
            digest = hashlib.sha256(f"{name}, seed {seed}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            parameter.normal_(0.0, model.config.initializer_range, generator=generator)


def save(model: DeepseekMoeForCausalLM, data: Corpus, name: str) -> None:
    """Save a model with its tokenizer, and the validation text beside it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(data.tokenizer), eos_token=corpus.END)
    for part in (model, tokenizer):
        part.save_pretrained(RUNS / name)
    rows = (
        json.dumps({"domain": domain, "text": tokenizer.decode(row)}) + "\n"
        for domain, blocks in data.validation.items()
        for row in blocks
    )
    (RUNS / "validation.jsonl").write_text("".join(rows), encoding="utf-8")


def measure(model: DeepseekMoeForCausalLM, validation: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Measure how specialised the experts are, without the tables of all pairs of experts.

    Every routed expert is masked one by one, on fewer tokens.
    """
    domains = {name: evenly(blocks, MEASURED_BLOCKS).split(BATCH) for name, blocks in validation.items()}
    found = measure_specialisation(model, domains, title="", source="")
    few = torch.cat([evenly(blocks, SINGLE_BLOCKS) for blocks in validation.values()]).split(BATCH)
    losses = Losses(model, traced_layers(model), few)
    single = measure_single_experts(losses, trace_routing(model, few), found.trace.num_experts)
    figures = {key: section.figures for key, section in found.sections.items() if not section.empty}
    return {"loss": found.loss, **_without_tables(figures | {"single": single.figures})}


def evenly(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Choose so many blocks, evenly spread over the documents."""
    count = min(count, len(blocks))
    return blocks[torch.arange(count) * len(blocks) // count]


def _without_tables(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tables(one) for key, one in value.items() if key not in ("table", "carried", "shares")}
    return [_without_tables(one) for one in value] if isinstance(value, list) else value


def _training_batches(blocks: torch.Tensor, settings: Training, seed: int) -> Iterator[torch.Tensor]:
    """Yield the batches of a seed: all blocks in random order, again and again."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for _ in range(settings.steps):
        if len(order) < settings.batch_size:
            order = torch.cat([order, torch.randperm(len(blocks), generator=generator)])
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        yield blocks[chosen]


def sizes(settings: Training) -> dict[str, dict[str, Any]]:
    """Count the parameters of every architecture, and its FLOPs for a token, as `deepseekmoe inspect` does."""
    found = {}
    for one in LADDER:
        report = report_on(one.config(settings), one.name)
        experts = (report.routed_parameters or 0) + (report.shared_parameters or 0)
        found[one.name] = {
            "label": one.label,
            "total_parameters": report.total_parameters,
            "activated_parameters": report.activated_parameters,
            "expert_parameters": experts,
            "forward_flops_per_token": report.forward_flops_per_token,
        }
    return found


def load_results(path: Path, settings: Training, data: Corpus) -> dict[str, Any]:
    """Read what was measured before, or begin.

    Raises:
        ValueError: if it was measured with other settings, another text, or other models of the same names.
    """
    now: dict[str, Any] = {
        "training": asdict(settings),
        "model": MODEL,
        "ladder": {one.name: asdict(one) for one in LADDER},
        "gate": GATE,
        "corpus_sha256": data.digest,
    }
    if path.exists():
        figures = json.loads(path.read_text(encoding="utf-8"))
        measured = {run["architecture"] for run in figures["runs"]}
        # Others may come and go.
        figures["ladder"] = now["ladder"] | {name: figures["ladder"][name] for name in measured}
        if changed := [name for name, value in now.items() if figures[name] != value]:
            raise ValueError(
                f"{path} was measured with other {', '.join(changed)}: choose another --output, or delete the file."
            )
        return figures
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cores": len(os.sched_getaffinity(0)),
        **now,
        "training_tokens": settings.steps * settings.batch_size * settings.block_size,
        "corpus_tokens": data.training.numel(),
        "passes_over_the_corpus": settings.steps * settings.batch_size / len(data.training),
        "validation_tokens": sum(blocks.numel() for blocks in data.validation.values()),
        "text_of": corpus.package_versions(),
        "runs": [],
    }


def main() -> None:
    """Train what is missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BY_NAME), default=list(BY_NAME), help="train only these")
    parser.add_argument("--steps", type=int, default=Training.steps, help="optimizer steps of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "architecture.json", help="the file of results")
    options = parser.parse_args()
    settings = Training(steps=options.steps)
    data = read_corpus(settings.block_size)
    figures = load_results(options.output, settings, data)
    figures["sizes"] = sizes(settings)
    done = {(run["architecture"], run["seed"]) for run in figures["runs"]}
    jobs = [
        (BY_NAME[name], seed, settings) for seed in options.seeds for name in options.only if (name, seed) not in done
    ]
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), len(os.sched_getaffinity(0))) or 1) as pool:
        for result in pool.imap_unordered(train, jobs):
            figures["runs"].append(result)
            figures["runs"].sort(key=lambda run: (list(BY_NAME).index(run["architecture"]), run["seed"]))
            write_results(options.output, figures)
            print(
                f"{len(figures['runs'])}: {result['architecture']}, seed {result['seed']}: loss {result['loss']:.4f}, "
                f"{result['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
