"""Measure line by line: keep what there is in the file of results, and stop before a budget of seconds is spent.

The figures of a GPU have a file of their own, so that those of the CPU stay.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# A line has a name, and a function that puts what it measures into the figures.
Job = tuple[str, Callable[[], None]]


def add_options(parser: argparse.ArgumentParser, quick: str) -> None:
    """Add `--quick`, with its help, and `--budget`."""
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS",
        help="measure the most valuable lines first, and begin none with less time left than the longest took",
    )  # fmt: skip


def results_path(benchmark: str, device: str) -> Path:
    """Return the file of results of a benchmark on a device, "cpu" or "cuda"."""
    return RESULTS / f"{benchmark}{'_gpu' if device == 'cuda' else ''}.json"


def write_results(path: Path, figures: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Replace a file of results in one step."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def measure_lines(
    jobs: Sequence[Job],
    figures: dict[str, Any],
    path: Path | None,
    budget: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Measure one line after the other, and write the results after each.

    No line is begun when less is left of the budget than the longest has taken so far.

    Args:
        jobs: the lines, the most valuable first.
        figures: what is written. "left_out" becomes the names of the lines that are not measured, or not yet.
        path: the file of results; `None`: nothing is written.
        budget: the seconds for all lines; `None`: all are measured.
        clock: tells the time in seconds.
    """
    begin, longest = clock(), 0.0
    figures["left_out"] = [name for name, _ in jobs]
    for name, measure in jobs:
        start = clock()
        if budget is not None and budget - (start - begin) < longest:
            print(f"Left out, for want of time: {'; '.join(figures['left_out'])}", flush=True)
            break
        measure()
        seconds = clock() - start
        longest = max(longest, seconds)
        figures["left_out"].remove(name)
        if path is not None:
            write_results(path, figures)
        print(f"{name}: {seconds:.1f} s", flush=True)
