"""Describe the results of architecture.py and upcycling_study.py: tables of docs/why-deepseekmoe.md, and its plots.

python benchmarks/architecture_results.py   # print the tables, and draw the plots into docs/images
"""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from measuring import RESULTS
from page_sections_of_kernels import Figures, table

from modeling_deepseekmoe.analysis.plots import new_axes
from modeling_deepseekmoe.analysis.specialisation_plots import Curve, plot_measures

IMAGES = Path(__file__).parents[1] / "docs" / "images"
STEPS = (
    ("dense", "switch"), ("dense", "gshard"), ("gshard", "gshard-1.5"), ("gshard", "shared"), ("shared", "fine-2"),
    ("fine-2", "fine-4"), ("gshard", "fine-4"), ("gshard", "fine-4-alone"), ("fine-4-alone", "fine-4"),
)  # fmt: skip
# Losses on the Pile: arXiv 2401.06066, tables 1 and 2.
PAPER = {"dense": 2.060, "switch": 1.881, "gshard": 1.867, "fine-4": 1.808, "gshard-1.5": 1.808, "dense-all": 1.806}
DOMAIN_MEASURES = ("fine-4", "fine-4-bias", "gshard", "gshard-1.5")


def of_runs(figures: Figures, name: str, read: Callable[[Figures], Any]) -> dict[int, Any]:
    """Read something of the runs of an architecture, by seed. Runs that do not have it are left out."""
    runs = {run["seed"]: run for run in figures["runs"] if run["architecture"] == name}
    found = {seed: read(run) for seed, run in runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def spread(values: Iterable[float], digits: int = 3, sign: str = "") -> str:
    """Show the mean of some values, with the lowest and the highest."""
    values = list(values)
    if not values:
        return "not measured"
    shown = [f"{value:{sign}.{digits}f}" for value in (statistics.mean(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def gaps_by_seed(one: dict[int, float], base: dict[int, float]) -> list[float]:
    """Subtract what belongs to the same seed, in the order of the seeds that both have."""
    return [one[seed] - base[seed] for seed in sorted(one) if seed in base]


def in_a_row(gaps: Iterable[float]) -> str:
    """Show differences one behind the other."""
    return ", ".join(f"{gap:+.3f}" for gap in gaps)


def ladder_table(figures: Figures) -> str:
    """Compare the architectures: sizes, loss, imbalance, and the difference from GShard by seed."""
    base, rows = of_runs(figures, "gshard", lambda run: run["loss"]), []
    for name, size in figures["sizes"].items():
        losses = of_runs(figures, name, lambda run: run["loss"])
        if not losses:
            continue
        violations = of_runs(figures, name, lambda run: run["max_violation_global"])
        rows.append(
            (
                size["label"],
                f"{size['total_parameters'] / 1e6:.2f} M",
                f"{size['activated_parameters'] / 1e6:.2f} M",
                f"{size['forward_flops_per_token'] / 1e6:.2f} M",
                str(len(losses)),
                spread(losses.values()),
                in_a_row(gaps_by_seed(losses, base)) if name != "gshard" else "",
                spread(violations.values(), 2) if violations else "",
                f"{PAPER[name]:.3f}" if name in PAPER else "",
            )
        )
    header = ("architecture", "parameters", "activated", "FLOPs of a token, forward", "seeds",
              "validation loss (nats)", "minus GShard's, by seed", "MaxVio_global", "the paper's loss")  # fmt: skip
    training = figures["training"]
    tokens = training["steps"] * training["batch_size"] * training["block_size"]
    return (
        f"{tokens / 1e6:.2f} M training tokens in {training['steps']:,} steps, "
        f"{figures['passes_over_the_corpus']:.2f} of a pass over {figures['corpus_tokens'] / 1e6:.2f} M tokens; "
        f"learning rate {training['learning_rate']:g}.\n\n{table(header, rows)}"
    )


def order(figures: Figures) -> str:
    """Say which steps of the ladder lower the loss, seed by seed."""
    labels, said = {name: size["label"].lstrip("+ ") for name, size in figures["sizes"].items()}, []
    for before, after in STEPS:
        one, other = (of_runs(figures, name, lambda run: run["loss"]) for name in (before, after))
        gaps = gaps_by_seed(other, one)
        if gaps:
            lower = sum(gap < 0 for gap in gaps)
            said.append(
                (f"{labels[before]} → {labels[after]}", spread(gaps, sign="+"), f"{lower} of {len(gaps)} seeds")
            )
    return table(("step", "change of the loss (nats)", "lower in"), said)


def points_of(figures: Figures, name: str, section: str, x: str, y: str = "rise") -> dict[Any, dict[int, float]]:
    """Return the losses or rises of a section of an architecture, by what was changed and by seed."""
    found: dict[Any, dict[int, float]] = {}
    measured = of_runs(figures, name, lambda run: (run.get("measured") or {}).get(section))
    for seed, one in measured.items():
        for point in one["points"]:
            found.setdefault(point[x], {})[seed] = point[y]
    return found


def redundancy_table(figures: Figures) -> str:
    """Compare what masking the best experts of each token costs: as the gates weigh, and with equal sums.

    The last columns compare DeepSeekMoE with GShard, and with GShard x1.5 as the paper does.
    """
    rows = []
    for same_sum in (False, True):
        y = "rise_with_the_same_sum" if same_sum else "rise"
        points = {name: points_of(figures, name, "redundancy", "share", y) for name in DOMAIN_MEASURES}
        for place in range(1, max(map(len, points.values()), default=0)):
            rises = {name: list(own.values())[place] if place < len(own) else {} for name, own in points.items()}
            cells = [spread(own.values(), sign="+") for own in rises.values()]
            gaps = [in_a_row(gaps_by_seed(rises["fine-4"], rises[base])) for base in ("gshard", "gshard-1.5")]
            rows.append((f"{place}/16{', same sum of weights' if same_sum else ''}", *cells, *gaps))
    labels = (figures["sizes"][name]["label"] for name in DOMAIN_MEASURES)
    gaps_of = (f"DeepSeekMoE minus {name}, by seed" for name in ("GShard", "GShard x1.5"))
    return table(("masked", *labels, *gaps_of), rows)


def shared_table(figures: Figures) -> str:
    """Compare the shared experts with routed ones, by architecture and layer."""
    rows = []
    for name in DOMAIN_MEASURES:
        label = figures["sizes"][name]["label"]
        cases = points_of(figures, name, "shared", "shared experts")
        rows += [
            (label, "all layers", f"shared {case}", spread(rises.values(), sign="+"), "", "")
            for case, rises in cases.items()
            if case != "on"
        ]
        single = of_runs(figures, name, lambda run: (run.get("measured") or {}).get("single"))
        for place in range(figures["model"]["num_hidden_layers"]):
            layers = [one["layers"][place] for one in single.values()]
            best = [max(layer["experts"], key=lambda one: one["rise"]) for layer in layers]
            shared = [layer["shared_off"]["rise"] for layer in layers if layer["shared_off"] is not None]
            if layers:
                cell = spread(shared, sign="+") if shared else "none"
                rise = spread((one["rise"] for one in best), sign="+")
                top_k = figures["ladder"][name]["top_k"]  # a share is that of the choices
                used = [100 * top_k * one["share"] for one in best]
                by = f"{min(used):.0f}% to {max(used):.0f}%"
                rows.append((label, f"layer {place}", "one expert off", cell, rise, by))
    header = ("architecture", "where", "what", "rise: shared", "rise: the routed expert missed most",
              "which so many tokens use")  # fmt: skip
    return table(header, rows)


def activation_table(figures: Figures) -> str:
    """Compare the loss with fewer activated experts, of the ends of the ladder."""
    points = {name: points_of(figures, name, "activation", "activated", "loss") for name in DOMAIN_MEASURES}
    counts = sorted({count for one in points.values() for count in one}, reverse=True)
    names = [name for name in DOMAIN_MEASURES if points[name]]
    rows = [
        (
            str(count),
            *(spread(points[name][count].values()) if count in points[name] else "" for name in names),
        )
        for count in counts
    ]
    return table(("routed experts for each token", *(figures["sizes"][name]["label"] for name in names)), rows)


def domains_table(figures: Figures) -> str:
    """Compare how the domains use the experts, and how balanced they are."""
    rows = []
    for name in DOMAIN_MEASURES:
        domains = of_runs(figures, name, lambda run: (run.get("measured") or {}).get("domains"))
        if not domains:
            continue
        effective = of_runs(figures, name, lambda run: run["measured"]["effective"])
        shares = [
            spread(
                statistics.mean(layer[of] for layer in one["layers"]) / one["num_experts"]
                for one in effective.values()
            )
            for of in ("by_sequence", "by_text")
        ]
        outputs = of_runs(figures, name, lambda run: run["measured"]["outputs"])
        alike = [statistics.mean(layer["mean"] for layer in one["layers"]) for one in outputs.values()]
        violations = of_runs(figures, name, lambda run: run["max_violation_global"])
        rows.append(
            (
                figures["sizes"][name]["label"],
                spread(one["mean_distance"] for one in domains.values()),
                spread(one["mean_distance_of_halves"] for one in domains.values()),
                *shares,
                spread(alike),
                spread(violations.values(), 2),
            )
        )
    header = ("architecture", "distance of domains", "of the halves of one",
              "share of the experts that a sequence uses", "that the whole text uses",
              "cosine of two experts' outputs", "MaxVio_global")  # fmt: skip
    return table(header, rows)


def upcycling_table(figures: Figures) -> str:
    """Compare ways of upcycling, the one that learned fastest first."""
    rows = [
        (
            name,
            f"{row['parameters'] / 1e6:,.0f} M",
            f"{row['perplexity_before']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['training_loss_of_last_10_steps']:.3f}",
            "" if row["max_violation_global"] is None else f"{row['max_violation_global']:.2f}",
        )
        for name, row in sorted(figures["rows"].items(), key=lambda item: item[1]["perplexity"])
    ]
    header = ("shards x copies, width of the shared experts", "parameters", "perplexity before", "after",
              "training loss with balance loss, last 10 steps", "MaxVio_global")  # fmt: skip
    return table(header, rows)


TABLES: dict[str, tuple[str, Callable[[Figures], str]]] = {
    "ladder": ("architecture", ladder_table),
    "order": ("architecture", order),
    "redundancy": ("architecture", redundancy_table),
    "shared": ("architecture", shared_table),
    "activation": ("architecture", activation_table),
    "domains": ("architecture", domains_table),
    "upcycling": ("upcycling_study", upcycling_table),
}


def tables() -> dict[str, str]:
    """Make every table, by its name. One without results says so."""
    found = {}
    for name, (results, make) in TABLES.items():
        path = RESULTS / f"{results}.json"
        found[name] = f"{make(json.loads(path.read_text(encoding='utf-8'))) if path.exists() else 'Not measured.'}\n"
    return found


def plot_ladder(figures: Figures, target: Path) -> None:
    """Draw the loss of every architecture, a point for each seed."""
    names = [name for name in figures["sizes"] if of_runs(figures, name, lambda run: run["loss"])]
    figure, axes = new_axes(9, 4.5)
    for place, name in enumerate(names):
        losses = list(of_runs(figures, name, lambda run: run["loss"]).values())
        axes.plot([place] * len(losses), losses, "o", color="#1f4e79", markersize=5)
        axes.plot([place - 0.3, place + 0.3], [statistics.mean(losses)] * 2, color="#d9741a", linewidth=2)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set(title="Validation loss: a point for each seed, a line for their mean", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(target, format="png")


def curves_of(figures: Figures, section: str, x: str, names: Sequence[str]) -> dict[str, Curve]:
    """Return the mean rise of the seeds, with their standard deviation."""
    curves = {}
    for name in names:
        points = points_of(figures, name, section, x)
        rises = [list(by_seed.values()) for by_seed in points.values()]
        spreads = [statistics.stdev(own) if len(own) > 1 else 0.0 for own in rises]
        if points:
            means = [statistics.mean(own) for own in rises]
            curves[figures["sizes"][name]["label"]] = Curve(list(points), means, spreads)
    return curves


def draw(figures: Figures, folder: Path = IMAGES) -> None:
    """Draw all plots."""
    plot_ladder(figures, folder / "architecture_ladder.png")
    if curves := curves_of(figures, "redundancy", "share", DOMAIN_MEASURES):
        plot_measures(
            curves,
            folder / "architecture_redundancy.png",
            title="Masking the experts that each token ranks highest",
            xlabel="share of the routed experts that are masked",
            ylabel="rise of the loss (nats), seeds' standard deviation",
        )


def main() -> None:
    """Print the tables, and draw the plots."""
    for name, made in tables().items():
        print(f"{name}\n\n{made}")
    draw(json.loads((RESULTS / "architecture.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
