"""List the lines that benchmarks/experts.py measures, the conditions they are measured under, and their tables."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

OURS = "deepseekmoe"
KINDS = ("forward", "frozen", "full")
FLOPS = {"forward": 1, "frozen": 2, "full": 3}  # of a forward pass
FEW_TOKENS = 32  # that one step of decoding has
NAMES: dict[str, Callable[[int], str]] = {
    "forward": lambda tokens: "decode" if tokens == 1 else "forward",
    "frozen": lambda tokens: "frozen step",
    "full": lambda tokens: "full step",
}
MEMORY = {"frozen": "frozen step, at its peak", "full": "full step, between its passes"}
COLUMNS = ("experts", "tokens", "", "eager", "batched_mm", "grouped_mm", "deepseekmoe", "over the best",
           "of the matrix peak")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A layer, and the numbers of tokens that run through it."""

    name: str
    experts: int
    hidden: int
    width: int
    top_k: int
    tokens: tuple[int, ...]
    trained: bool = True
    rounds: int = 7

    def flops(self, tokens: int, kind: str) -> int:
        """Count the floating-point operations of the matrix products."""
        return FLOPS[kind] * 6 * tokens * self.top_k * self.hidden * self.width


CPU_SHAPES = (
    Shape("64 x 1024 x 704, top-6", 64, 1024, 704, 6, (1, 256, 1024, 2048)),
    Shape("the demo's", 24, 576, 192, 6, (1, 512)),
    Shape("16B and V2-Lite", 64, 2048, 1408, 6, (1, 1024), rounds=3),
    Shape("128 x 2048 x 768, top-8", 128, 2048, 768, 8, (1, 1024), rounds=3),
)
CPU_BFLOAT16 = (
    replace(CPU_SHAPES[0], tokens=(1, 256, 1024), trained=False),
    replace(CPU_SHAPES[2], tokens=(1, 256), trained=False),
)
CPU_ONE_THREAD = (replace(CPU_SHAPES[0], tokens=(256, 1024, 2048)),)
GPU_SHAPES = (
    Shape("16B and V2-Lite", 64, 2048, 1408, 6, (1, 8, 32, 1024, 8192)),
    Shape("128 x 2048 x 768, top-8", 128, 2048, 768, 8, (1, 8, 32, 1024, 8192)),
    Shape("V3", 256, 7168, 2048, 8, (1, 8, 32, 8192), trained=False),
)
QUICK = (Shape("small", 8, 64, 32, 2, (1, 64), rounds=2),)


@dataclass(frozen=True)
class Line:
    """A line of a table."""

    shape: Shape
    tokens: int
    kind: str
    condition: str
    dtype: str

    def __str__(self) -> str:
        name = NAMES[self.kind](self.tokens)
        return f"{self.shape.name}, {self.tokens} tokens, {name}, {self.dtype}{CONDITIONS[self.condition][0]}"


def lines_of(shapes: tuple[Shape, ...], condition: str, dtype: str) -> list[Line]:
    """List the lines of a table."""
    return [
        Line(shape, tokens, kind, condition, dtype)
        for shape in shapes
        for tokens in shape.tokens
        for kind in (KINDS if shape.trained and tokens > 1 else KINDS[:1])
    ]


def lines_on(device: str, quick: bool) -> list[Line]:
    """List all lines, in the order of the tables."""
    if device == "cuda":
        return lines_of(QUICK if quick else GPU_SHAPES, "quiet", "bfloat16")
    shapes, of_bfloat16, of_one_thread = (QUICK,) * 3 if quick else (CPU_SHAPES, CPU_BFLOAT16, CPU_ONE_THREAD)
    return [
        *lines_of(shapes, "quiet", "float32"),
        *lines_of(of_bfloat16, "quiet", "bfloat16"),
        *lines_of(shapes, "busy", "float32"),
        *lines_of(of_one_thread, "one thread", "float32"),
    ]


def by_value(lines: list[Line]) -> list[Line]:
    """Sort lines, the most valuable first: in every table those of many tokens, shape by shape, then decoding."""
    tables = list(dict.fromkeys((line.condition, line.dtype) for line in lines))
    names = list(dict.fromkeys(line.shape.name for line in lines))
    return sorted(lines, key=lambda line: (tables.index((line.condition, line.dtype)), line.tokens <= FEW_TOKENS,
                                           names.index(line.shape.name), -line.tokens))  # fmt: skip


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy by another process. It ends with this one, however this one ends."""
    program = f"import os\nwhile os.getppid() == {os.getpid()}:\n  for _ in range(10**6): pass"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# What is said of a condition, and what brings it about.
CONDITIONS: dict[str, tuple[str, Callable[[], AbstractContextManager[None]]]] = {
    "quiet": ("", nullcontext),
    "busy": (", while another process keeps a core busy", busy_core),
    "one thread": (", on one thread", one_thread),
}


def tables(cases: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group cases by dtype and condition: the cases of every table, by its title."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in cases:  # of earlier versions: without these fields
        title = case.get("dtype", "float32") + CONDITIONS[case.get("condition", "quiet")][0]
        found.setdefault(title, []).append(case)
    return found


def row(case: dict[str, Any]) -> str:
    """Format a case as a row of Markdown."""
    times = case["seconds"]
    cells = [
        f"{1e3 * times[way]:.1f} ms" if way in times else "" for way in ("eager", "batched_mm", "grouped_mm", OURS)
    ]
    if case["weights_a_second"] is None:
        share = f"{case['flops_a_second'] / 1e9:.0f} GFLOP/s, {100 * case['share_of_peak']:.0f}%"
    else:
        share = f"{case['weights_a_second'] / 1e9:.1f} G weights/s"
    name = NAMES[case["kind"]](case["tokens"])
    cells += [f"{case['times_as_fast']:.2f} ({case['best']})", share]
    return f"| {case['shape']['name']} | {case['tokens']} | {name} | {' | '.join(cells)} |"
