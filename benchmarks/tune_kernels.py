"""Find the fastest tiles of the experts' kernels on this GPU.

Runs training steps of layers of experts in bfloat16, and gives one kernel after the other each of some tiles. Every
tile's results are compared with those of the usual tile. A tile is taken if its kernel is faster by more than 3
percent. Prints a row for each tile, and writes after each layer a file for the package, DEEPSEEKMOE_TILES:

    python benchmarks/tune_kernels.py --out tiles.json [--budget SECONDS] [--layer E128]
    DEEPSEEKMOE_TILES=tiles.json python train.py

A few minutes a layer, most of them for the compiler. With --dry and TRITON_INTERPRET=1 a tiny layer and few tiles run
in Triton's interpreter, on a CPU; nothing is written then.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import write_results

from modeling_deepseekmoe import experts_kernels, experts_triton
from modeling_deepseekmoe.experts_operands import ExpertGradients, ExpertOperands
from modeling_deepseekmoe.experts_tiles import DESCRIBING, FIELDS, Problem, Tile, choose_tile, gpu_of, use_tiles
from modeling_deepseekmoe.routing_triton import group_choices

# Experts, top-k, hidden, width, tokens.
LAYERS = {
    "E128": (128, 8, 2048, 768, 8192),
    "16B": (64, 6, 2048, 1408, 8192),
    "V3, one of 8 ranks": (32, 8, 7168, 2048, 8192),
}
DRY_LAYERS = {"dry": (4, 2, 48, 32, 24)}
_PRODUCTS = (
    (128, 128, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 3), (64, 256, 64, 4, 4), (64, 128, 64, 4, 4), (128, 128, 128, 8, 2), (128, 64, 64, 4, 4),
    (128, 256, 64, 8, 4, 0, 1), (128, 128, 64, 8, 3, 0, 1), (256, 128, 64, 8, 4, 0, 1),
)  # fmt: skip
CANDIDATES: dict[str, tuple[tuple[int, ...], ...]] = {
    "first": (
        (128, 64, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (128, 64, 64, 8, 4),
        (64, 128, 64, 8, 3), (64, 64, 64, 4, 4), (256, 64, 64, 8, 3), (128, 64, 128, 8, 2), (128, 128, 32, 8, 5),
        (128, 128, 64, 8, 4, 0, 1), (128, 64, 64, 8, 3, 0, 1), (128, 64, 64, 8, 4, 0, 1), (128, 64, 64, 4, 3, 0, 1),
    ),
    "product": _PRODUCTS,
    "activation_gradient": (
        (128, 128, 64, 8, 4), (128, 64, 64, 8, 3), (128, 64, 64, 8, 4), (128, 128, 64, 8, 3), (64, 64, 64, 8, 3),
        (64, 128, 64, 8, 3), (64, 64, 64, 4, 4), (128, 64, 128, 8, 2), (128, 128, 64, 8, 3, 128),
        (128, 128, 64, 8, 4, 0, 1), (128, 128, 64, 8, 3, 128, 1), (128, 64, 64, 8, 3, 0, 1),
    ),
    "outer": (
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 5), (128, 256, 64, 8, 5), (128, 256, 64, 8, 4), (256, 128, 64, 8, 5),
        (128, 128, 64, 8, 7), (128, 128, 128, 8, 3), (64, 256, 64, 4, 5), (128, 128, 64, 4, 5),
    ),
}  # fmt: skip
DRY_CANDIDATES = {kind: ((16, 16, 16, 4, 1), (32, 16, 16, 4, 1, 0, 1)) for kind in CANDIDATES}
LEAST_GAIN = 1.03
TOLERANCE = 2e-2  # two products in bfloat16


class Layer:
    """The operands of a layer of experts with random weights, and its training step."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device) -> None:
        experts, top_k, hidden, width, tokens = sizes
        generator = torch.Generator(device).manual_seed(0)

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(shape[-1] ** -0.5).bfloat16()

        ids = torch.rand(tokens, experts, generator=generator, device=device).topk(top_k).indices
        weights = torch.rand(tokens, top_k, generator=generator, device=device)
        stacks = numbers(experts, 2 * width, hidden), numbers(experts, hidden, width)
        self.operands = ExpertOperands(numbers(tokens, hidden) * hidden**0.5, ids, weights, *stacks)
        self.grad = numbers(tokens, hidden)
        self.permutation, _, self.offsets = group_choices(ids, experts, torch.int32, with_inverse=False)

    def step(self) -> list[torch.Tensor]:
        """Compute the output and all gradients."""
        order = self.permutation, self.offsets
        output, kept = experts_triton.experts_forward_triton(self.operands, *order, True)
        needs = ExpertGradients(True, True, True, True, *[False] * 4)
        gradients = experts_triton.experts_backward_triton(self.grad, self.operands, *order, kept, needs)
        return [output, *(gradient for gradient in gradients if gradient is not None)]


class Stopwatch:
    """Times the launches of one problem: each kernel asks for its tile just before it is launched."""

    def __init__(self) -> None:
        self.problem: Problem | None = None
        self.tile: Tile | None = None
        self.asked: dict[Problem, None] = {}
        self.last: Problem | None = None
        self.marks: list[tuple[Any, Any]] = []
        for name in experts_kernels.__all__:
            setattr(experts_triton, name, _Timed(self, getattr(experts_kernels, name)))

    def choose(self, problem: Problem) -> Tile | None:
        """Choose the tile on trial for its problem, and the usual one for the others."""
        self.asked[problem] = None
        self.last = problem
        return self.tile if problem == self.problem else None

    def seconds(self, device: torch.device) -> float:
        """Return the median of the launches since the last call."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            times = [begin.elapsed_time(end) / 1e3 for begin, end in self.marks]
        else:
            times = [end - begin for begin, end in self.marks]
        self.marks.clear()
        return statistics.median(times)


class _Timed:
    """Stands for a kernel, and marks when it begins and ends if its problem is being timed."""

    def __init__(self, stopwatch: Stopwatch, kernel: Any) -> None:
        self.stopwatch, self.kernel = stopwatch, kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            watch = self.stopwatch
            timed, watch.last = watch.last is not None and watch.last == watch.problem, None
            begin = _mark() if timed else None
            self.kernel[grid](*args, **kwargs)
            if timed:
                watch.marks.append((begin, _mark()))

        return launch


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def differs(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference by norm; infinite where something is not a number."""
    errors = [
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(found, expected, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)


def tune(
    layer: Layer, stopwatch: Stopwatch, candidates: dict[str, Any], rounds: int, until: float
) -> list[dict[str, Any]]:
    """Time all tiles of all problems of a layer, while there is time."""
    device = layer.grad.device
    rows: list[dict[str, Any]] = []
    stopwatch.problem, stopwatch.asked = None, {}
    with use_tiles(stopwatch.choose):
        expected = layer.step()
        for problem in list(stopwatch.asked):
            stopwatch.problem = None
            usual = choose_tile(problem, device)
            on_trial = allowed(candidates[problem.kind], gpu_of(device).name)
            tiles = [usual, *(tile for tile in on_trial if tile != usual)]
            for tile in tiles:
                if time.monotonic() > until:
                    return rows
                rows.append(try_tile(layer, stopwatch, problem, tile, expected, rounds))
                rows[-1]["usual"] = tile == usual
                print(line(rows[-1]), flush=True)
    return rows


def allowed(candidates: tuple[tuple[int, ...], ...], gpu: str) -> list[Tile]:
    """Return the tiles that a GPU can have: not all GPUs have descriptors."""
    tiles = [Tile(*candidate) for candidate in candidates]
    described = re.fullmatch(DESCRIBING, gpu)
    return [tile for tile in tiles if described or not tile.descriptors]


def try_tile(
    layer: Layer, stopwatch: Stopwatch, problem: Problem, tile: Tile, expected: list[torch.Tensor], rounds: int
) -> dict[str, Any]:
    """Run steps with a tile. Return its median seconds, or what went wrong."""
    stopwatch.problem, stopwatch.tile = problem, tile
    row: dict[str, Any] = {"problem": problem, "tile": tile}
    try:
        error = differs(layer.step(), expected)
        stopwatch.marks.clear()
        for _ in range(rounds):
            layer.step()
        row |= {"seconds": stopwatch.seconds(layer.grad.device), "error": error}
        if not error <= TOLERANCE:
            row["wrong"] = f"differs by {error:.1e}"
    except Exception as error:  # a tile that needs too much of something: the next one may do
        row["wrong"] = f"{type(error).__name__}: {str(error)[:200]}"
        stopwatch.marks.clear()
    return row


def line(row: dict[str, Any]) -> str:
    """Format a row of the table."""
    problem = row["problem"]
    result = row.get("wrong") or f"{1e3 * row['seconds']:.3f} ms"
    return f"| {problem.kind} {problem.inside} -> {problem.columns} | {list(row['tile'])} | {result} |"


def best_tiles(rows: list[dict[str, Any]], gpu: str) -> list[dict[str, Any]]:
    """Return the entries for the file: the fastest tile of each problem, where it is clearly faster than the usual."""
    entries = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        right = [row for row in rows if row["problem"] == problem and "wrong" not in row]
        usual = [row for row in right if row["usual"]]
        if not right:
            continue
        best = min(right, key=lambda row: row["seconds"])
        if not usual or usual[0]["seconds"] > LEAST_GAIN * best["seconds"]:
            key = (gpu, problem.kind, str(problem.dtype).removeprefix("torch."), *problem[2:])
            entries.append({**dict(zip(FIELDS, key, strict=True)), "tile": list(best["tile"])})
    return entries


def main() -> None:
    """Tune all layers, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiles.json"), help="the file to write")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin no tile after it")
    parser.add_argument("--layer", choices=LAYERS, help="one layer alone")
    parser.add_argument("--dry", action="store_true", help="in the interpreter, on a CPU; nothing is written")
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        sys.exit("There is no GPU. --dry runs in the interpreter, with TRITON_INTERPRET=1.")
    until = time.monotonic() + arguments.budget
    device = torch.device("cpu" if arguments.dry else "cuda")
    layers = DRY_LAYERS if arguments.dry else {k: v for k, v in LAYERS.items() if arguments.layer in (None, k)}
    stopwatch, rows = Stopwatch(), []
    print("| kernel | tile | median |\n| --- | --- | --- |")
    for sizes in layers.values():
        candidates = DRY_CANDIDATES if arguments.dry else CANDIDATES
        rows += tune(Layer(sizes, device), stopwatch, candidates, 1 if arguments.dry else 8, until)
        if not arguments.dry:
            write_results(arguments.out, best_tiles(rows, gpu_of(device).name))
    print(json.dumps(best_tiles(rows, gpu_of(device).name)))


if __name__ == "__main__":
    main()
