# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Write the parts of a model card that hold figures, as Markdown: architecture, parameters, routing, training."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..analysis.inspection import gigabytes, report_on
from ..analysis.plots import plot_expert_load
from ..analysis.routing_report import RoutingReport
from ..configuration_deepseekmoe import DeepseekMoeConfig

logger = logging.get_logger(__name__)

HEATMAP_NAME = "expert_load.png"
_NO_HEAD = ("", "")
_TOO_LARGE = 1e300  # for a float, and NaN is not below it either
_FIGURES_OF_STATE = {
    "global_step": ("optimizer steps", ","),
    "epoch": ("epochs", ".2f"),
    "train_batch_size": ("batch on each device", ","),
    "total_flos": ("floating-point operations, as Trainer counts them", ".3g"),
}


def find_training_state(folder: str | Path) -> dict[str, Any] | None:
    """Read the `trainer_state.json` of a folder, or else of the latest `checkpoint-*` in it that has one.

    Return `None` if there is no such file, or if it cannot be read.
    """
    folder = Path(folder)
    steps = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit()
    ]
    for place in (folder, *(path for _, path in sorted(steps, reverse=True))):
        file = place / "trainer_state.json"
        if file.is_file():
            try:
                state = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                logger.warning(f"{file} cannot be read, so that the card has no figures of the training: {error}")
                return None
            return state if isinstance(state, dict) else None
    return None


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Format rows of cells as a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def architecture_section(config: DeepseekMoeConfig) -> str:
    """Describe what the model is made of."""
    attention = "multi-head latent attention" if config.attention_type == "mla" else "multi-head attention"
    if config.attention_type == "mha" and config.num_key_value_heads < config.num_attention_heads:
        attention = f"grouped-query attention, {config.num_key_value_heads} key-value heads"
    rows = [
        ("model type", f"`{config.model_type}`"),
        ("layers", f"{config.num_hidden_layers}, {len(config.moe_layers)} of them with experts"),
        ("hidden size", f"{config.hidden_size:,}"),
        ("attention", f"{attention}, {config.num_attention_heads} heads"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
    ]
    if not config.moe_layers:
        return table(_NO_HEAD, rows)
    groups, kept = config.gate_groups
    gate = f"{config.scoring_func}, `{config.topk_method}`"
    gate += f", {kept} of {groups} groups" if groups > 1 else ""
    gate += ", weights normalised" if config.gate_normalizes else ""
    gate += f", scaled by {config.gate_scaling_factor:g}" if config.gate_scaling_factor != 1 else ""
    losses = ", ".join(f"{name} {alpha:g}" for name, alpha in config.loss_alphas.items())
    balance = (["updates of the bias"] if config.topk_method == "noaux_tc" else []) + (
        [f"losses: {losses}"] if losses else []
    )
    rows += [
        ("routed experts", f"{config.n_routed_experts} of width {config.moe_intermediate_size:,}"),
        ("chosen for each token", f"{config.num_experts_per_tok}"),
        ("shared experts", f"{config.n_shared_experts or 0}"),
        ("gate", gate),
        ("balanced in training by", "; ".join(balance) or "nothing"),
    ]
    return table(_NO_HEAD, rows)


def parameters_section(config: DeepseekMoeConfig, tensors: int, nbytes: int) -> str:
    """Describe what the model costs, and what its weight files hold."""
    report = report_on(config, config.model_type)
    flops = report.forward_flops_per_token
    assert flops is not None  # every figure of the family is known
    rows = [
        ("total", f"{report.total_parameters:,}"),
        ("activated for a token", f"{report.activated_parameters:,}"),
        ("in routed experts", f"{report.routed_parameters:,}"),
        ("in shared experts", f"{report.shared_parameters:,}"),
        ("forward FLOPs for a token", f"{flops / 1e9:,.3g} G, attention left out"),
        ("KV cache for a token", f"{report.kv_cache_bytes_per_token:,} bytes in bfloat16"),
        ("weights in these files", f"{tensors:,} tensors, {gigabytes(nbytes)}"),
    ]
    return table(_NO_HEAD, rows)


def heatmap(routing: RoutingReport) -> bytes:
    """Draw the load of every expert, layer by layer, as a PNG."""
    image = io.BytesIO()
    plot_expert_load(dict(zip(routing.trace.layers, routing.loads, strict=True)), image)
    return image.getvalue()


def routing_section(routing: RoutingReport | None) -> dict[str, str] | None:
    """Describe what the gates did with a text. The picture is expected beside the card."""
    if routing is None:
        return None
    layers = len(routing.trace.layers)
    rows: list[tuple[str, ...]] = [
        (str(layer), f"{routing.global_violation[idx]:.3f}", f"{routing.batch_violation[idx]:.3f}",
         f"{routing.dead_experts[idx]}", f"{float(routing.trace.entropy[idx]):.3f}")
        for idx, layer in enumerate(routing.trace.layers)
    ]  # fmt: skip
    rows.append(
        ("mean", *(f"{sum(values) / layers:.3f}" for values in (routing.global_violation, routing.batch_violation)),
         f"{sum(routing.dead_experts) / layers:.1f}", f"{float(routing.trace.entropy.mean()):.3f}")
    )  # fmt: skip
    return {
        "text": f"Of {len(routing.trace.token_ids):,} tokens of {routing.facts['data']}. MaxVio is by how much the "
        "busiest expert exceeds the mean load; 0 is balanced. The picture shows the tokens of every expert over the "
        "mean of its layer.",
        "image": HEATMAP_NAME,
        "table": table(
            ("layer", "MaxVio, all tokens", "MaxVio, mean of the batches", "dead experts", "entropy (nats)"), rows
        ),
    }


def training_section(state: Mapping[str, Any] | None) -> str | None:
    """Describe a training by the figures of a Trainer's state, the content of its `trainer_state.json`."""
    history = (state or {}).get("log_history")
    log = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    if state is None or not log:
        return None
    figures = {name: sum(_series([state], name)) for name in _FIGURES_OF_STATE}
    rows = [(label, f"{figures[name]:{shape}}") for name, (label, shape) in _FIGURES_OF_STATE.items() if figures[name]]
    rates, losses, evaluations = (_series(log, name) for name in ("learning_rate", "loss", "eval_loss"))
    if rates:
        rows.append(("highest learning rate", f"{max(rates):.3g}"))
    if losses:
        rows.append(("training loss, first and last logged", f"{losses[0]:.4f} and {losses[-1]:.4f}"))
    if evaluations:
        perplexity = f" (perplexity {math.exp(evaluations[-1]):.3f})" if evaluations[-1] < 100 else ""
        rows.append(("evaluation loss, last", f"{evaluations[-1]:.4f}{perplexity}"))
    for name in sorted({key for entry in log for key in entry if key.startswith(("router/", "aux_loss"))}):
        values = _series(log, name)
        if values:
            rows.append((f"`{name}`, last logged", f"{values[-1]:.4g}"))
    return table(_NO_HEAD, rows)


def _series(log: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Collect the numbers that a log has under a name."""
    values: list[Any] = [entry.get(name) for entry in log]
    return [value for value in values if type(value) in (int, float) and abs(value) < _TOO_LARGE]


__all__ = [
    "HEATMAP_NAME",
    "architecture_section",
    "find_training_state",
    "heatmap",
    "parameters_section",
    "routing_section",
    "table",
    "training_section",
]
