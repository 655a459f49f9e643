"""Describe the results of the benchmarks of routing and of the kernels for docs/benchmarks.md, as `page_sections`."""

from collections.abc import Iterable, Sequence
from typing import Any

Figures = dict[str, Any]

# Numbers of tokens that are shown of a gate; None: all of them.
ROUTING_ROWS: dict[str, tuple[int, ...] | None] = {"DeepSeekMoE 16B": (1, 4096), "DeepSeek-V3": None}
ROUTING_COLUMNS = ("forward_us", "forward_backward_us", "gate_us", "grouping_us")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# The kernels are made for gates of this size too, but no released model has one: it may spill.
NOT_RELEASED = "the largest"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)


def routing(figures: Figures) -> list[str]:
    """Describe the speed of routing in plain torch."""
    header = ("gate", "tokens", "transformers, us", "this package, us", "times as fast", "forward and backward",
              "with the product", "grouping, times as fast as sorting")  # fmt: skip

    def times(row: Figures, kind: str) -> str:
        return f"{row[kind]['transformers'] / row[kind]['eager']:.2f}" if kind in row else "-"

    def cells(row: Figures) -> list[str]:
        forward = row["forward_us"]
        return [row["model"], f"{row['tokens']:,}", f"{forward['transformers']:,.0f}", f"{forward['eager']:,.0f}",
                *(times(row, kind) for kind in ROUTING_COLUMNS)]  # fmt: skip

    shown = [row for row in figures["rows"] if row["model"] in ROUTING_ROWS
             and row["tokens"] in (ROUTING_ROWS[row["model"]] or (row["tokens"],))]  # fmt: skip
    return [
        """Routing in plain torch against transformers' own routers, from the same logits; medians. All ways take
        turns within each round. The figures of all gates are in `benchmarks/results/routing.json`.""",
        table(header, map(cells, shown)),
        """How to read it: above 1 this package is faster. "times as fast" is the forward pass, "with the product"
        the whole gate, with the product of hidden states and weights. "grouping" brings the choices into the order
        of the experts. With few tokens, and for a plain softmax gate, transformers is faster: giving ties to the
        lower id takes more calls. With many tokens the gate of V3 is faster here.""",
    ]


def routing_on_gpu(figures: Figures) -> list[str]:
    """Describe the speed of routing in kernels."""
    columns = ("transformers", "eager compiled", "triton", "triton with statistics")

    def cells(row: Figures, kind: str, name: str) -> list[str]:
        return [f"{row['model']}, {row['tokens']:,} tokens, {name}",
                *(f"{row[kind][way]:,.0f}" if way in row.get(kind, {}) else "-" for way in columns)]  # fmt: skip

    kinds = {
        "forward_in_graph_us": "on the GPU alone", "forward_us": "with the host",
        "forward_backward_us": "forward and backward, with the host", "gate_us": "with the product and the host",
        "grouping_in_graph_us": "grouping, on the GPU alone", "grouping_us": "grouping, with the host",
    }  # fmt: skip
    rows = [cells(row, kind, name) for row in figures["rows"] for kind, name in kinds.items() if kind in row]
    return [
        f"""Routing in kernels, in microseconds; medians. A large copy moves
        {figures["copy_bandwidth"] / 1e12:.2f} TB/s there. "On the GPU alone" is inside a CUDA graph. The run was cut
        short: most of its time went to compiling plain torch.""",
        table(("", *columns), rows),
        """How to read it: these are kernels of version 0.12.0. With Triton 3.6 they laid a row of logits across all
        warps of a program, with a barrier in every step, and chose wrong experts in rows of 64 lanes (33 to 64
        experts, or groups that fill as many). Since 0.13.0 a row lies in one warp, and every size has a trial of its
        own; that was not measured again. Forward and backward is slower than transformers': the host takes longer for
        the backward pass of an operator than the GPU does.""",
    ]


def compiled_kernels(figures: Figures) -> list[str]:
    """Describe what the assemblers report of the kernels."""
    rows = [row for row in figures["rows"] if row["model"] != NOT_RELEASED]
    choosing = [row for row in rows if row["kernel"].startswith("route")]
    experts = [row for row in rows if row["kernel"].startswith("experts")]
    gates = [row for row in rows if row not in experts]

    def largest(found: list[Figures], key: str) -> list[str]:
        return [str(max(row[target][key] for row in found)) for target in TARGETS]

    models = list(dict.fromkeys(row["model"] for row in gates))
    layers = list(dict.fromkeys(row["model"] for row in experts))
    return [
        f"""The kernels are compiled ahead of time, without a GPU: those of routing for the gates of
        {" and ".join((", ".join(models[:-1]), models[-1]))}, and all that a layer of experts launches in bfloat16
        ({"; ".join(layers)}).""",
        table(
            ("", *TARGETS),
            (
                ("most registers: choosing and its gradient", *largest(choosing, "registers")),
                ("most that a kernel of routing spills", *largest(gates, "spills")),
                ("most that a kernel of the experts spills", *largest(experts, "spills")),
            ),
        ),
        """How to read it: registers are those of one thread. A kernel that needs more than there are spills them to
        memory, which makes it slow; 0 means that none does.""",
    ]


def predicted_kernels(figures: Figures) -> list[str]:
    """Describe what the kernels are predicted to take on an H100, in the last two releases."""
    releases = list(figures["releases"].items())
    (before, former), (now, last) = releases[-2:] if len(releases) > 1 else releases * 2

    def both(rows: Sequence[Figures], field: str, shown: str, factor: float = 1) -> str:
        """Format what the releases have; once if it is the same."""
        values = [shown.format(row[field] * factor) for row in rows if field in row]
        return ", ".join(dict.fromkeys(values))

    def cells(layer: str, kernel: str, rows: Sequence[Figures]) -> list[str]:
        each = both(rows, "bytes_a_flop", "{:.4f}") or both(rows, "instructions_a_row", "{:.0f}")
        sizes = (both(rows, name, "{:,}") for name in ("registers", "shared", "programs"))
        return [layer, kernel, *sizes, each, both(rows, "seconds", "{:.3f}", 1e3), f"{1e3 * rows[-1]['floor']:.3f}"]

    lines = []
    for layer in dict.fromkeys(row["layer"] for row in last):
        tables = [{row["kernel"]: row for row in release if row["layer"] == layer} for release in (former, last)]
        lines += [cells(layer, kernel, [found[kernel] for found in tables if kernel in found]) for kernel in tables[1]]
        if any("instructions_a_row" in row for row in tables[1].values()):
            continue  # in training and not in inference, or the other way round: there is no sum
        sums = [{name: sum(row[name] for row in found.values()) for name in ("seconds", "floor")} for found in tables]
        lines.append(cells(layer, "together", sums))
    header = ("layer", "kernel", "registers", "shared memory", "programs", "bytes from L2 a FLOP", "ms", "floor, ms")
    return [
        f"""Not measured: predicted for an H100 from the machine code and the tiles, as the script says. All experts
        of a layer are trained, in bfloat16. Where a figure changed, that of {before}
        comes first, and that of {now} second. Of routing, the sixth column has instructions a row.""",
        table(header, lines),
        """How to read it: the floor is what the operations, or the bytes from memory, take at the rates of that GPU. A
        multiprocessor has so many programs of a kernel at a time.""",
    ]
