# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Which experts the texts of a domain use, how far apart two domains are, and how many experts are in use at all.

Shape letters: C domains, L MoE layers, T tokens, E routed experts, K chosen experts of a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from ..auxiliary_losses import max_violation
from .evaluation import RoutingTrace
from .routing_report import count_loads, loads_of
from .sections import Section

BUSIEST = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


@dataclass(frozen=True)
class DomainUse:
    """How often the tokens of a domain choose every expert.

    Attributes:
        tokens, sequences: how many there are.
        counts (`torch.LongTensor` of shape (L, E)): choices of every expert.
        halves: the same of the first half of the sequences, and of the second.
    """

    tokens: int
    sequences: int
    counts: torch.Tensor
    halves: tuple[torch.Tensor, torch.Tensor]


def use_by_domain(trace: RoutingTrace, lengths: Mapping[str, Sequence[int]]) -> dict[str, DomainUse]:
    """Count the choices of every domain.

    Args:
        trace: all choices, sequence after sequence, domain after domain.
        lengths: for the name of every domain the tokens of its sequences.
    """
    found, begin = {}, 0
    for name, own in lengths.items():
        tokens = sum(own)
        ids = trace.expert_ids[:, begin : begin + tokens]
        is_second = torch.arange(len(own)).repeat_interleave(torch.tensor(own)) >= (len(own) + 1) // 2
        counts, *halves = (
            count_loads(part, trace.num_experts) for part in (ids, ids[:, ~is_second], ids[:, is_second])
        )
        found[name] = DomainUse(tokens, len(own), counts, (halves[0], halves[1]))
        begin += tokens
    return found


def jensen_shannon(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Compute the Jensen-Shannon distance of distributions: the root of their divergence in bits, from 0 to 1.

    Args:
        one, other: tensors (..., E) of counts. Each row is divided by its sum.

    Returns:
        `torch.DoubleTensor` of shape (...). It is NaN where a row has no counts.
    """
    p, q = (of.double() / of.double().sum(dim=-1, keepdim=True) for of in (one, other))
    middle = (p + q) / 2
    # x log x is 0 at 0
    divergence = (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).nan_to_num(0.0).sum(dim=-1) / 2
    distance = (divergence / torch.log(torch.tensor(2.0, dtype=torch.float64))).clamp(0, 1).sqrt()
    return distance.masked_fill((one.sum(dim=-1) == 0) | (other.sum(dim=-1) == 0), float("nan"))


def measure_domains(trace: RoutingTrace, lengths: Mapping[str, Sequence[int]]) -> Section:
    """Compare the use of experts by domain.

    Args:
        trace: all choices, sequence after sequence, domain after domain.
        lengths: for the name of every domain the tokens of its sequences.
    """
    section = Section(
        "domains",
        "Domains",
        "The use of experts by domain: an expert's share of the choices. The distance of two domains is the "
        "Jensen-Shannon distance of their shares (0: the same, 1: no expert in common), as a mean over the layers. "
        "Few tokens, and different texts of one kind, make distances too. So every domain is cut in two: the distance "
        "of the two halves of one domain, and that of halves of two domains, which have as few tokens. Then the share "
        "of a domain's choices that its busiest experts carry, and how many of its K busiest experts are also among "
        "those of another domain.",
        "arXiv 2407.01906, figures 2 and 3",
        "Halves of two domains far more distant than the halves of one, and few experts that carry most of a domain: "
        "specialised. If they are not, the domains have too little text, or the experts do not tell them apart.",
    )
    if len(lengths) < 2:
        name = next(iter(lengths))
        why = "The text has no domains: --domains COLUMN names the column of the rows that tells them."
        return replace(section, empty=f"There is one domain, {name}, and none to compare it with." if name else why)
    use = use_by_domain(trace, lengths)
    pairs = [_figures_of_pair(one, other, use, trace.expert_ids.shape[-1]) for one, other in combinations(use, 2)]
    domains = [_figures_of(name, own, trace) for name, own in use.items()]
    short = [name for name, own in use.items() if own.sequences < 2]
    notes = [f"{name} has one sequence: there are no halves to compare." for name in short]
    mean = sum(pair["distance"] for pair in pairs) / len(pairs)
    between = mean_of([pair["halves"] for pair in pairs])
    within = mean_of([of["halves"] for of in domains])
    figures: dict[str, Any] = {
        "layers": list(trace.layers),
        "mean_distance": mean,
        "mean_distance_between_halves": between,
        "mean_distance_of_halves": within,
        "even_share": 1 / trace.num_experts,
        "common_by_chance": trace.expert_ids.shape[-1] ** 2 / trace.num_experts,
        "pairs": pairs,
        "domains": domains,
    }
    summary = f"Mean distance of two domains {mean:.3f}"
    if between is not None and within is not None:
        summary += f"; of halves of two domains {between:.3f}, of the halves of one {within:.3f}"
    return replace(section, figures=figures, summary=f"{summary}.", notes=tuple(notes))


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that are known, or `None` if there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _figures_of_pair(one: str, other: str, use: Mapping[str, DomainUse], top_k: int) -> dict[str, Any]:
    of_one, of_other = use[one], use[other]
    by_layer = jensen_shannon(of_one.counts, of_other.counts)
    has_halves = min(of_one.sequences, of_other.sequences) > 1
    halves = [float(jensen_shannon(half, of).mean()) for half in of_one.halves for of in of_other.halves]
    return {
        "domains": [one, other],
        "distance": float(by_layer.mean()),
        "halves": mean_of(halves) if has_halves else None,
        "by_layer": by_layer.tolist(),
        "common_busiest": _common_busiest(of_one.counts, of_other.counts, top_k),
    }


def _figures_of(name: str, use: DomainUse, trace: RoutingTrace) -> dict[str, Any]:
    shares = use.counts.double() / use.counts.sum(dim=1, keepdim=True)
    ordered = shares.sort(dim=1, descending=True).values.cumsum(dim=1).mean(dim=0)
    counts = sorted({max(1, round(ratio * trace.num_experts)) for ratio in BUSIEST})
    return {
        "domain": name,
        "tokens": use.tokens,
        "sequences": use.sequences,
        "halves": None if use.sequences < 2 else float(jensen_shannon(*use.halves).mean()),
        "busiest": [{"experts": count, "share": float(ordered[count - 1])} for count in counts],
        "carried": ordered.tolist(),
        "shares": shares.tolist(),
    }


def _common_busiest(one: torch.Tensor, other: torch.Tensor, top_k: int) -> float:
    """Count the experts that are among the K busiest of both (L, E), as a mean over the layers."""
    best = [counts.argsort(dim=1, descending=True, stable=True)[:, :top_k].tolist() for counts in (one, other)]
    common = [len(set(own) & set(others)) for own, others in zip(*best, strict=True)]
    return sum(common) / len(common)


def measure_effective_experts(trace: RoutingTrace, lengths: Sequence[int]) -> Section:
    """Compute how many experts are in use: by a token, by a sequence, by the whole text.

    Args:
        trace: all choices, sequence after sequence.
        lengths: the tokens of every sequence.
    """
    section = Section(
        "effective",
        "Effective number of experts",
        "exp of the entropy: of a token's gate weights, as a mean over the tokens; of the choices of a sequence, as a "
        "mean over the sequences; of all choices. Equal shares of n experts give n. MaxVio is the largest load over "
        "the mean, minus 1 (arXiv 2408.15664).",
        "",
        "If a sequence uses far fewer experts than the whole text, its experts are specialists for such text; but a "
        "short sequence has few choices, and so uses fewer in any case. A token whose number is far below K could do "
        "with fewer experts.",
    )
    rows = []
    loads = loads_of(trace)
    for place, layer in enumerate(trace.layers):
        counts = count_loads(trace.expert_ids[place].split(list(lengths)), trace.num_experts)
        rows.append(
            {
                "layer": layer,
                "by_token": float(effective_number(trace.weights[place]).mean()),
                "by_sequence": float(effective_number(counts).mean()),
                "by_text": float(effective_number(loads[place])),
                "max_violation": float(max_violation(loads[place : place + 1])),
            }
        )
    figures = {"top_k": trace.expert_ids.shape[-1], "num_experts": trace.num_experts, "layers": rows}
    means = {key: sum(row[key] for row in rows) / len(rows) for key in ("by_token", "by_sequence", "by_text")}
    summary = (
        f"Of {trace.num_experts} routed experts a token uses {means['by_token']:.1f}, a sequence "
        f"{means['by_sequence']:.1f}, the text {means['by_text']:.1f}."
    )
    return replace(section, figures=figures, summary=summary)


def effective_number(shares: torch.Tensor) -> torch.Tensor:
    """Compute exp of the entropy of shares (..., N), each row divided by its sum. A row of zeros gives 1."""
    shares = shares.double().abs()
    shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=1e-300)
    return (-torch.xlogy(shares, shares).sum(dim=-1)).exp()


__all__ = [
    "DomainUse",
    "effective_number",
    "jensen_shannon",
    "measure_domains",
    "measure_effective_experts",
    "use_by_domain",
]
