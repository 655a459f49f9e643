# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Measure a model before and after its training, save what was trained, and say what can be done with it."""

import importlib.util
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..analysis.inspection import gigabytes
from ..analysis.routing_report import RoutingReport, make_report
from ..checkpoint_layout import MODEL_TYPES
from ..esft.files import save_esft
from ..hub.candidate import is_hub_id
from ..support.folders import unfinished_folder
from ..support.models import evaluating
from .data import as_dataset
from .encoding import IGNORED, Example
from .options import FinetuneOptions
from .state import TRAINED, RunFolder

MEASURES, REPORT, PAGE = "measures.json", "routing.json", "routing.html"


def measure_perplexity(trainer: Any, examples: Sequence[Example]) -> float:
    """Compute exp of the mean cross entropy over the tokens that are learnt.

    Args:
        trainer: a trainer of the model, which makes the batches and knows in which precision they are computed.
        examples: the sequences.
    """
    loss, tokens = 0.0, 0
    batches = trainer.get_eval_dataloader(as_dataset(examples))
    with evaluating(trainer.model), trainer.compute_loss_context_manager():
        for batch in batches:
            inputs = {name: value.to(trainer.args.device) for name, value in batch.items() if _is_input(name, value)}
            logits = trainer.model(**inputs, use_cache=False).logits[:, :-1]
            labels = batch["labels"][:, 1:].to(logits.device)
            loss += float(
                F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
            )
            tokens += int((labels != IGNORED).sum())
    return math.exp(loss / tokens)


def _is_input(name: str, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and name in ("input_ids", "attention_mask", "position_ids")


def report_routing(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], title: str, tokens: int
) -> RoutingReport:
    """Report what the gates do with sequences."""
    texts = (str(tokenizer.decode(example.ids)) for example in examples)
    return make_report(
        model, tokenizer, texts, title=title, source="the rows to evaluate on", max_tokens=tokens, batch_size=1
    )


def has_plots() -> bool:
    """Tell whether the page of a report can be made."""
    return importlib.util.find_spec("matplotlib") is not None


def write_measures(folder: Path, perplexity: float, report: RoutingReport) -> None:
    """Write the perplexity and the routing report into a new folder, with its page if it can be made."""
    with unfinished_folder(folder) as unfinished:
        (unfinished / MEASURES).write_text(
            json.dumps(_measures(perplexity, report), indent=2) + "\n", encoding="utf-8"
        )
        (unfinished / REPORT).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        if has_plots():
            from ..analysis.routing_page import make_page

            (unfinished / PAGE).write_text(make_page(report), encoding="utf-8")


def _measures(perplexity: float, report: RoutingReport) -> dict[str, Any]:
    layers = len(report.global_violation)
    return {
        "perplexity": perplexity,
        "max_violation_global": sum(report.global_violation) / layers,
        "dead_experts": sum(report.dead_experts),
        "routed_experts": layers * report.trace.num_experts,
    }


def read_measures(folder: Path) -> dict[str, Any]:
    """Read what [`write_measures`] wrote, but for the report."""
    content: dict[str, Any] = json.loads((folder / MEASURES).read_text(encoding="utf-8"))
    return content


def save_trained(
    trainer: Any, tokenizer: PreTrainedTokenizerBase, options: FinetuneOptions, folder: RunFolder
) -> tuple[Path, int]:
    """Write what was trained: an adapter, trained experts, or the whole model.

    Returns:
        The folder, and the bytes in it.
    """
    path = folder / TRAINED[options.method]
    if options.method == "esft":
        save_esft(trainer.model, path)
    else:
        with unfinished_folder(path) as unfinished:
            trainer.model.save_pretrained(unfinished)
            if options.method == "full":
                tokenizer.save_pretrained(unfinished)
    if options.tokenizer is not None and options.method != "full":
        tokenizer.save_pretrained(path)  # it is not the base's, which `merge` takes; that names what differs
    return path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def trained_parameters(model: nn.Module) -> int:
    """Count the parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def next_commands(options: FinetuneOptions, folder: RunFolder, model_type: str, license: str | None) -> list[str]:
    """Return the commands that merge what was trained into its base, and publish the result, as a dry run.

    Args:
        options: what was trained.
        folder: the run.
        model_type: of the base.
        license: of the base, if its card names one.
    """
    trained, commands = folder / TRAINED[options.method], []
    model = trained
    if options.method != "full":
        model = folder.free_name("merged")
        commands.append(["deepseekmoe", "merge", options.model, str(trained), str(model)])
    repository = f"you/{_repository_name(folder.path.absolute().name)}"
    if model_type in MODEL_TYPES:
        base = ["--base-model", options.model] if is_hub_id(options.model) else []
        commands.append(
            ["deepseekmoe", "push", str(model), repository, "--license", license or "unknown", *base, "--dry-run"]
        )
    else:
        commands.append(["hf", "upload", repository, str(model)])
    return [shlex.join(command) for command in commands]


def _repository_name(name: str) -> str:
    kept = "".join(letter if (letter.isalnum() and letter.isascii()) or letter in "-_" else "-" for letter in name)
    return kept.strip("-_") or "finetuned"


def summary(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Compare the measures in a few lines."""
    return [
        f"perplexity: {before['perplexity']:.3f} before, {after['perplexity']:.3f} after",
        f"imbalance of the experts (MaxVio): {before['max_violation_global']:.3f} before, "
        f"{after['max_violation_global']:.3f} after",
        f"experts without a token: {before['dead_experts']} before, {after['dead_experts']} after, of "
        f"{after['routed_experts']}",
    ]


def size_of(number: int) -> str:
    """Format bytes as MB, or as GB."""
    return f"{number / 1e6:.1f} MB" if number < 1e9 else gigabytes(number)


__all__ = [
    "has_plots",
    "measure_perplexity",
    "next_commands",
    "read_measures",
    "report_routing",
    "save_trained",
    "size_of",
    "summary",
    "trained_parameters",
    "write_measures",
]
