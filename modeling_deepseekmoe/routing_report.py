# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What a model's gates do with a text: the numbers, and one self-contained HTML page."""

import base64
import html
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .balancing import max_violation
from .evaluation import RoutingTrace, moe_blocks, trace_routing
from .report import plot_co_activation, plot_expert_load, plot_gate_weights, plot_max_violation
from .router_load import count_tokens

_MAX_PANELS = 12
_LEAST_EXPECTED = 5
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1160px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; }
th { text-align: left; background: #f4f6f8; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { background: #f4f6f8; padding: 0 .25rem; border-radius: 3px; white-space: pre; }
summary { cursor: pointer; padding: .2rem 0; } .note { color: #555; }
"""


def read_texts(
    data: str, *, split: str = "train", column: str = "text", subset: str | None = None, max_characters: int = 2**24
) -> Iterator[str]:
    """The texts of a file or a dataset.

    Args:
        data: a file of plain text; a `.jsonl` file of rows; a `.json`, `.csv` or `.parquet` file, or the folder or hub
            id of a dataset, all of which are read by the `datasets` library.
        split, subset: split of a dataset, and its configuration where it has several.
        column: field of the rows that holds the text.
        max_characters: of a plain text, no more than these are read.

    Raises:
        ValueError: if the file is no text, or has no such column.
        OSError: if there is no such file or dataset.
        ImportError: if `datasets` is needed and missing.
    """
    path = Path(data)
    if path.is_file() and path.suffix not in (".json", ".csv", ".parquet"):
        try:
            with path.open(encoding="utf-8-sig") as file:
                if path.suffix == ".jsonl":
                    yield from _texts_of_lines(file, column, data)
                else:
                    yield file.read(max_characters)
        except UnicodeDecodeError as error:
            raise ValueError(f"{data} is not allowed as data: it is no text in UTF-8.") from error
    else:
        for row in _load_dataset(path, data, split, subset):
            yield _text_of(row, column, data)


def _texts_of_lines(lines: Iterable[str], column: str, name: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number} is no JSON: {error}.") from error
        yield _text_of(row, column, f"{name}, line {number}")


def _text_of(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        names = ", ".join(map(repr, row)) if isinstance(row, dict) else "no columns at all"
        raise ValueError(f"column={column!r} is not allowed: {where} holds no text under that name, but {names}.")
    return row[column]


def _load_dataset(path: Path, data: str, split: str, subset: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"Reading {data} needs the datasets library: pip install datasets") from error
    if path.is_file():
        builder = path.suffix.removeprefix(".")
        return datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True)
    return datasets.load_dataset(data, subset, split=split, streaming=True)


def token_batches(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, block_size: int, batch_size: int
) -> list[torch.Tensor]:
    """Cut texts into blocks of tokens, without padding.

    Args:
        texts: the texts; reading stops when there are enough tokens.
        tokenizer: of the model. An end-of-sequence token, if it has one, is put between the texts.
        max_tokens, block_size, batch_size: tokens in all and in a block, blocks in a batch.

    Returns:
        `torch.LongTensor`s (B, S), all of one shape; the tokens at the end that fill no batch are left out, and a
        short text is one batch.

    Raises:
        ValueError: for sizes that are too small, or if the texts hold fewer than two tokens.
    """
    for name, value, least in (
        ("max_tokens", max_tokens, 2),
        ("block_size", block_size, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} is not allowed: it must be at least {least}.")
    ids: list[int] = []
    for text in texts:
        # A token has far fewer characters than this: what is longer would only be thrown away.
        own = tokenizer(text[: 64 * max_tokens], add_special_tokens=False, verbose=False)["input_ids"]
        if own:
            ids += own if tokenizer.eos_token_id is None else [*own, tokenizer.eos_token_id]
        if len(ids) >= max_tokens:
            break
    ids = ids[:max_tokens]
    if len(ids) < 2:
        raise ValueError(f"The data holds {len(ids)} tokens: at least two are needed.")
    block_size = min(block_size, len(ids))
    batch_size = min(batch_size, len(ids) // block_size)
    batches = len(ids) // (block_size * batch_size)
    return list(torch.tensor(ids[: batches * batch_size * block_size]).view(batches, batch_size, block_size))


def loads_of(trace: RoutingTrace) -> torch.Tensor:
    """Tokens of every expert (L, E)."""
    return _loads(trace.expert_ids, trace.num_experts)


def _loads(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.stack([count_tokens(ids.long(), num_experts, None) for ids in expert_ids])


def batch_violations_of(trace: RoutingTrace) -> torch.Tensor:
    """MaxVio of every batch (batches, L)."""
    parts = trace.expert_ids.split(list(trace.batch_lengths), dim=1)
    return torch.stack([max_violation(_loads(part, trace.num_experts)) for part in parts])


def co_activation_of(trace: RoutingTrace, layer: int) -> torch.Tensor:
    """How often pairs of experts are chosen together, over what independent choices of the same loads would give.

    Args:
        trace: all choices.
        layer: index of a MoE layer.

    Returns:
        `torch.FloatTensor` of shape (E, E), symmetric; NaN on the diagonal and for pairs of which fewer than five
        tokens are expected, where the ratio would be chance.
    """
    ids = trace.expert_ids[trace.layers.index(layer)].long()
    chosen = torch.zeros(len(ids), trace.num_experts).scatter_(1, ids, 1.0)
    pairs, load = chosen.T @ chosen, chosen.sum(dim=0)
    # Choices of one token are distinct: without preference, a token that chose i chooses j with the chance
    # (K - 1) / K * load_j / T / (1 - load_i / (K T)), which is symmetrised here.
    top_k, total = ids.shape[1], float(len(ids))
    share = load / total
    expected = total * torch.outer(share, share) * (top_k - 1) / top_k
    expected = expected / (1 - (share[:, None] + share[None]) / (2 * top_k))
    return (pairs / expected).fill_diagonal_(float("nan")).masked_fill(expected < _LEAST_EXPECTED, float("nan"))


def top_tokens_of(trace: RoutingTrace, layer: int, count: int = 5) -> list[list[dict[str, Any]]]:
    """The tokens that characterise every expert: those with the highest n log(p / q), where n is how often the token
    chose the expert, p the share of the token's occurrences that did, and q the share of all tokens that did.

    Args:
        trace: all choices.
        layer: index of a MoE layer.
        count: tokens for each expert.

    Returns:
        For every expert a list of `token_id`, `count` (n) and `share` (p), best first; only tokens with p > q.
    """
    ids = trace.expert_ids[trace.layers.index(layer)].long()
    tokens, inverse, occurrences = trace.token_ids.unique(return_inverse=True, return_counts=True)
    table = torch.zeros(len(tokens) * trace.num_experts)
    cells = (inverse[:, None] * trace.num_experts + ids).flatten()
    table = table.scatter_add_(0, cells, torch.ones(cells.numel())).view(len(tokens), trace.num_experts)
    share, average = table / occurrences[:, None], table.sum(dim=0) / len(ids)
    scores = torch.where(share > average, table * (share / average).log(), 0.0)
    best = scores.topk(min(count, len(tokens)), dim=0)
    return [
        [
            {"token_id": int(tokens[row]), "count": int(table[row, expert]), "share": float(share[row, expert])}
            for row, score in zip(best.indices[:, expert].tolist(), best.values[:, expert].tolist(), strict=True)
            if score > 0
        ]
        for expert in range(trace.num_experts)
    ]


class RoutingReport:
    """The numbers of a trace, and the page made of them.

    Args:
        trace: all choices, see [`trace_routing`].
        tokenizer: shows the tokens.
        title: name of the model.
        facts: what stands at the top of the page, name and value.
    """

    def __init__(
        self, trace: RoutingTrace, tokenizer: PreTrainedTokenizerBase, title: str, facts: dict[str, str]
    ) -> None:
        self.trace = trace
        self.tokenizer = tokenizer
        self.title = title
        self.facts = facts
        self.loads = loads_of(trace)
        self.global_violation = max_violation(self.loads).tolist()
        self.batch_violation = batch_violations_of(trace).mean(dim=0).tolist()
        self.dead_experts = (self.loads == 0).sum(dim=1).tolist()

    def to_dict(self) -> dict[str, Any]:
        """All numbers: the facts, and for every layer its load, MaxVio, dead experts, entropy, quantiles of the gate
        weights by rank, the pairs of experts that are chosen together most, and the top tokens of every expert."""
        layers = []
        for idx, layer in enumerate(self.trace.layers):
            weights = self.trace.weights[idx].sort(dim=-1, descending=True).values
            quantiles = weights.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0).T
            layers.append(
                {
                    "layer": layer,
                    "tokens_per_expert": self.loads[idx].tolist(),
                    "max_violation_global": self.global_violation[idx],
                    "max_violation_batch": self.batch_violation[idx],
                    "dead_experts": self.dead_experts[idx],
                    "entropy": float(self.trace.entropy[idx]),
                    "gate_weight_quantiles": {"levels": [0.1, 0.5, 0.9], "by_rank": quantiles.tolist()},
                    "most_co_activated": self._most_co_activated(layer),
                    "top_tokens": [
                        [{"token": self._show(entry["token_id"]), **entry} for entry in entries]
                        for entries in top_tokens_of(self.trace, layer)
                    ],
                }
            )
        return {"title": self.title, "facts": self.facts, "tokens": len(self.trace.token_ids), "layers": layers}

    def _most_co_activated(self, layer: int, count: int = 5) -> list[dict[str, Any]]:
        table = co_activation_of(self.trace, layer).nan_to_num(0.0).triu(1)
        best = table.flatten().topk(min(count, table.numel()))
        return [
            {"experts": list(divmod(cell, self.trace.num_experts)), "observed_over_expected": value}
            for cell, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if value > 0
        ]

    def _show(self, token_id: int) -> str:
        token = self.tokenizer.decode([token_id])
        # A piece of a character has no text of its own.
        return str(self.tokenizer.convert_ids_to_tokens(token_id)) if "\ufffd" in token else token

    def to_html(self) -> str:
        """The page: no file beside it, nothing loaded from the network."""
        trace, layers = self.trace, self.trace.layers
        loads = dict(zip(layers, self.loads, strict=True))
        panels = layers if len(layers) <= _MAX_PANELS else _spread(layers, _MAX_PANELS)
        sections = [
            (
                "Load of every expert",
                "Each expert's tokens over the mean of its layer: 1 is balanced, 0 a dead expert.",
                _image(lambda file: plot_expert_load(loads, file), "load heatmap"),
            ),
            (
                "Imbalance",
                "MaxVio (arXiv 2408.15664): how much the busiest expert exceeds the mean; 0 is balanced.",
                _image(
                    lambda file: plot_max_violation(layers, self.global_violation, self.batch_violation, file),
                    "MaxVio by layer",
                )
                + self._table_of_layers(),
            ),
            (
                "Co-activation",
                "Pairs of experts that tokens choose together, over what independent choices with the same loads "
                "would give; white where fewer than five tokens are expected, and on the diagonal. "
                + ("" if len(panels) == len(layers) else f"{len(panels)} of {len(layers)} layers."),
                _image(
                    lambda file: plot_co_activation({idx: co_activation_of(trace, idx) for idx in panels}, file),
                    "co-activation",
                ),
            ),
            (
                "Gate weights",
                "The weights of a token's chosen experts, from the highest to the lowest.",
                _image(lambda file: plot_gate_weights(layers, trace.weights, file), "gate weights"),
            ),
            (
                "Top tokens of every expert",
                "Tokens that an expert gets more often than others do, with the share of their occurrences that chose "
                "it. Open a layer.",
                "".join(self._tokens_of_layer(layer) for layer in layers),
            ),
        ]
        facts = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self.facts.items()
        )
        body = "".join(
            f"<h2>{html.escape(heading)}</h2><p class='note'>{html.escape(note)}</p><div class='wide'>{content}</div>"
            for heading, note, content in sections
        )
        title = html.escape(f"Routing of {self.title}")
        return (
            f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<style>{_STYLE}</style></head><body><h1>{title}</h1><table>{facts}</table>{body}</body></html>\n"
        )

    def _table_of_layers(self) -> str:
        head = "".join(
            f"<th>{name}</th>"
            for name in ("layer", "MaxVio, all tokens", "MaxVio, mean of batches", "dead experts", "entropy (nats)")
        )
        rows = "".join(
            f"<tr><td class='number'>{layer}</td><td class='number'>{self.global_violation[idx]:.3f}</td>"
            f"<td class='number'>{self.batch_violation[idx]:.3f}</td><td class='number'>{self.dead_experts[idx]}</td>"
            f"<td class='number'>{float(self.trace.entropy[idx]):.3f}</td></tr>"
            for idx, layer in enumerate(self.trace.layers)
        )
        return f"<details><summary>As a table</summary><table><tr>{head}</tr>{rows}</table></details>"

    def _tokens_of_layer(self, layer: int) -> str:
        rows = []
        loads = self.loads[self.trace.layers.index(layer)]
        for expert, entries in enumerate(top_tokens_of(self.trace, layer)):
            shown = " ".join(
                f"<code>{html.escape(_visible(self._show(entry['token_id'])))}</code> {entry['share']:.0%}"
                for entry in entries
            )
            rows.append(
                f"<tr><td class='number'>{expert}</td><td class='number'>{int(loads[expert]):,}</td>"
                f"<td>{shown or 'none'}</td></tr>"
            )
        head = "<tr><th>expert</th><th>tokens</th><th>top tokens, share of their occurrences</th></tr>"
        return f"<details><summary>layer {layer}</summary><table>{head}{''.join(rows)}</table></details>"


def _spread(layers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """`count` layers from the first to the last, evenly spread."""
    return tuple(layers[round(place * (len(layers) - 1) / (count - 1))] for place in range(count))


def _image(plot: Callable[[io.BytesIO], None], description: str) -> str:
    file = io.BytesIO()
    plot(file)
    return f"<img alt='{description}' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"


def _visible(token: str) -> str:
    """A token with its spaces and line ends shown."""
    shown = "".join(
        "\u2423" if character == " " else character if character.isprintable() else repr(character)[1:-1]
        for character in token
    )
    return shown or "(empty)"


def make_report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterator[str],
    *,
    title: str,
    source: str,
    max_tokens: int = 32768,
    block_size: int = 512,
    batch_size: int = 4,
) -> RoutingReport:
    """Run a model on texts and report what its gates do.

    Args:
        model: a model of this family.
        tokenizer: its tokenizer.
        texts: for example from [`read_texts`].
        title: name of the model.
        source: name of the data.
        max_tokens, block_size, batch_size: see [`token_batches`]; blocks are no longer than the model allows.

    Raises:
        ValueError: if the model has no MoE layer, if the tokenizer is not the model's, or for sizes that are not
            allowed.
    """
    moe_blocks(model)
    config = model.config
    block_size = min(block_size, config.max_position_embeddings)
    batches = token_batches(texts, tokenizer, max_tokens=max_tokens, block_size=block_size, batch_size=batch_size)
    largest = max(int(batch.max()) for batch in batches)
    if largest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer gives token {largest}, and the model has vocab_size={config.vocab_size}: it is another "
            "model's tokenizer."
        )
    trace = trace_routing(model, batches)
    facts = {
        "model type": config.model_type,
        "MoE layers": f"{len(trace.layers)} of {config.num_hidden_layers}",
        "experts": f"{config.n_shared_experts or 0} shared, {config.n_routed_experts} routed, "
        f"{config.num_experts_per_tok} for each token",
        "gate": f"{config.scoring_func}, {config.topk_method}",
        "data": source,
        "tokens": f"{len(trace.token_ids):,} in batches of {batches[0].numel():,}",
    }
    return RoutingReport(trace, tokenizer, title, facts)


__all__ = ["RoutingReport", "make_report", "read_texts", "token_batches"]
