# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The tiles of the experts' kernels: how much one program computes, and with how many warps and pipeline stages.

A tile is looked up by GPU, kernel, dtype, sizes and tokens of an expert. It comes, in this order, from

1. `use_tiles`, which a sweep sets,
2. the user's own file, whose path is in the environment variable DEEPSEEKMOE_TILES,
3. `MEASURED`, what was the fastest on a GPU,
4. a rule that follows from registers, shared memory and bytes for each operation (`make kernels` prints them).

`benchmarks/tune_kernels.py` measures tiles, and writes such a file.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .triton_support import power_of_two

KINDS = ("first", "product", "activation_gradient", "outer")
FIELDS = ("gpu", "kind", "dtype", "rows", "columns", "inside")
DTYPES = ("bfloat16", "float16", "float32")
VARIABLE = "DEEPSEEKMOE_TILES"
DESCRIBING = r"cpu|sm_(9|1[0-9])\d"  # Triton's interpreter, and compute capability 9.0 and newer
LARGE = 200_000  # bytes of shared memory for the large tiles: compute capability 9.0 and 10.0 have them


class Problem(NamedTuple):
    """What a kernel is to compute, as far as its tile depends on it.

    Attributes:
        kind: one of `KINDS`.
        dtype (`torch.dtype`): that of the products.
        rows: choices of an expert on average, as a power of two. For `"outer"`, which sums over them, 0.
        columns: of the result. `"first"` and `"activation_gradient"` count the gates only.
        inside: what a product sums over; for `"outer"` the rows of the result.
    """

    kind: str
    dtype: torch.dtype
    rows: int
    columns: int
    inside: int


class Gpu(NamedTuple):
    """A GPU's architecture, such as "sm_90" or "gfx942", and the bytes of shared memory that a program can have."""

    name: str
    shared: int


class Tile(NamedTuple):
    """A tile.

    Attributes:
        rows, columns, inside: of a block. For `"outer"` rows and columns are those of the result.
        warps, stages: of a program, and of its pipeline.
        registers: the most that a thread may have; 0 leaves it to the compiler.
        descriptors: 1 reads the weights through descriptors (TMA), which `DESCRIBING` GPUs have. Weights whose rows do
            not begin at multiples of 16 bytes are read through pointers all the same, and a warning says so. `"outer"`
            reads none.
    """

    rows: int
    columns: int
    inside: int
    warps: int
    stages: int
    registers: int = 0
    descriptors: int = 0

    def options(self, kind: str) -> dict[str, Any]:
        """Return the arguments of the launch, and whether it is to read weights through descriptors."""
        names = (
            ("BLOCK_M", "BLOCK_N", "BLOCK_ROWS") if kind == "outer" else ("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_IN")
        )
        options = dict(zip(names, self[:3], strict=True)) | {"num_warps": self.warps, "num_stages": self.stages}
        if kind != "outer":
            options["descriptors"] = self.descriptors
        return options | ({"maxnreg": self.registers} if self.registers else {})


MEASURED_GPUS = ("sm_90",)
_OVERRIDES: list[Callable[[Problem], Tile | None]] = []


def choose_tile(problem: Problem, device: torch.device) -> Tile:
    """Choose the tile of a launch.

    Raises:
        ValueError: if the file that DEEPSEEKMOE_TILES names is not one of tiles.
    """
    for override in reversed(_OVERRIDES):
        if (tile := override(problem)) is not None:
            return tile
    gpu = gpu_of(device)
    key = (gpu.name, problem.kind, str(problem.dtype).removeprefix("torch."), *problem[2:])
    return own_tiles().get(key) or measured_rule(problem, gpu)


def own_tiles() -> dict[tuple[Any, ...], Tile]:
    """Return the tiles of the user's own file; none if there is no file.

    Raises:
        ValueError: if the file that DEEPSEEKMOE_TILES names is not one of tiles.
    """
    path = os.environ.get(VARIABLE)
    return read_tiles(path) if path else {}


@contextlib.contextmanager
def use_tiles(choose: Callable[[Problem], Tile | None]) -> Iterator[None]:
    """Let a function choose the tiles in here. Where it returns `None` they are the usual ones."""
    _OVERRIDES.append(choose)
    try:
        yield
    finally:
        _OVERRIDES.remove(choose)


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Describe a device. One that is no GPU, on which kernels are interpreted, counts as one with little memory."""
    if device.type != "cuda":
        return Gpu(device.type, 0)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Gpu(properties.gcnArchName.split(":")[0], 65_536)
    return Gpu(f"sm_{properties.major}{properties.minor}", properties.shared_memory_per_block_optin)


def has_large_tiles(device: torch.device) -> bool:
    """Tell whether a GPU has the shared memory for large tiles."""
    return gpu_of(device).shared >= LARGE


def rule(problem: Problem, gpu: Gpu) -> Tile:
    """Choose a tile by rule.

    An expert's choices should fill it. A large one moves fewer bytes for each operation, and is for a GPU with much
    shared memory; a program with less leaves room for a second one, which computes while the first begins or ends.
    float32 has small ones, because the matrix units do not multiply it. In bfloat16 nothing spills.
    """
    narrow, large = problem.dtype == torch.float32, gpu.shared >= LARGE
    columns, inside = (max(power_of_two(size), 16) for size in (problem.columns, problem.inside))
    if problem.kind == "outer":
        if narrow:
            return Tile(min(inside, 64), min(columns, 64), 32, 4, 3)
        blocks = min(inside, 128), min(columns, 256 if large else 128)
        # The permutation's loads take two of the stages.
        return Tile(*blocks, 64, 8 if max(blocks) >= 128 else 4, 5 if large else 3)
    rows = min(max(problem.rows, 16), 64 if narrow else 128)
    inside = min(inside, 32 if narrow else 64)
    warps = 8 if rows == 128 else 4
    if problem.kind == "product":
        wide = large and rows == 128 and columns >= 256
        return Tile(rows, min(columns, 64 if narrow else 256 if wide else 128), inside, warps, 4 if wide else 3)
    # These two keep more than one number for each element of the tile.
    wide = large and rows == 128 and columns >= 128
    return Tile(rows, min(columns, 128 if wide else 64), inside, warps, 4 if wide else 3)


@functools.cache
def measured_rule(problem: Problem, gpu: Gpu) -> Tile:
    """Choose a tile as [`rule`] does, with what an H200 has shown to be faster, for three layers (docs/benchmarks.md).

    Descriptors are 4 to 10 percent faster with many rows; with few the host takes longer to make them. The gradient of
    the activation is a fifth faster if two programs share a multiprocessor, although some registers spill.
    """
    tile = rule(problem, gpu)
    many = gpu.name in MEASURED_GPUS and problem.dtype != torch.float32 and problem.rows >= 256
    if not many or problem.kind == "outer":
        return tile
    if problem.kind == "activation_gradient" and tile.columns == 128:
        tile = tile._replace(stages=3, registers=128)
    return tile._replace(descriptors=1)


@functools.cache
def read_tiles(path: str) -> dict[tuple[Any, ...], Tile]:
    """Read a file of tiles: a JSON list of objects with `FIELDS` and "tile", the numbers of a `Tile`.

    Raises:
        ValueError: naming the file, the entry and what is wrong with it.
    """
    tiles = {}
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{VARIABLE}={path!r} is not allowed: it must be a JSON file of tiles ({error}).") from None
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        if problem := _wrong_with(entry):
            raise ValueError(f"{VARIABLE}={path!r} is not allowed: {problem} in entry {number}, {entry!r}.")
        tiles[tuple(entry[name] for name in FIELDS)] = Tile(*entry["tile"])
    return tiles


def _wrong_with(entry: Any) -> str:
    """Return what is wrong with an entry of a file of tiles; it is empty if nothing is."""
    if not isinstance(entry, dict) or set(entry) != {*FIELDS, "tile"}:
        return f"the fields are not {', '.join(FIELDS)} and tile"
    rows, *others = (entry[name] for name in FIELDS[3:])
    if not all(type(size) is int and size >= 0 for size in (rows, *others)):
        return "rows, columns and inside are not whole numbers"
    tile = entry["tile"]
    if not isinstance(tile, list) or len(tile) not in (5, 6, 7) or not all(type(size) is int for size in tile):
        return "the tile is not rows, columns, inside, warps, stages and, if wanted, registers and descriptors"
    *blocks, warps, stages = tile[:5]
    checks = (
        (re.fullmatch(r"sm_\d+|gfx\w+|cpu", str(entry["gpu"])), "the gpu is not as sm_90 or gfx942"),
        (entry["kind"] in KINDS, f"the kind is not one of {', '.join(KINDS)}"),
        (entry["dtype"] in DTYPES, f"the dtype is not one of {', '.join(DTYPES)}"),
        (rows == (0 if entry["kind"] == "outer" else power_of_two(max(rows, 1))),
         "the rows are not a power of two or, for outer, 0"),
        (all(16 <= size <= 512 and size == power_of_two(size) for size in blocks),
         "a block's size is not a power of two from 16 to 512"),
        (warps in (1, 2, 4, 8, 16), "the warps are not 1, 2, 4, 8 or 16"),
        (1 <= stages <= 10, "the stages are not 1 to 10"),
        (all(0 <= number <= 255 for number in tile[5:6]), "the registers are not 0 to 255"),
        (all(number in (0, 1) for number in tile[6:]), "the descriptors are not 0 or 1"),
        (tile[6:] != [1] or re.fullmatch(DESCRIBING, entry["gpu"]), "this gpu has no descriptors"),
        (tile[6:] != [1] or entry["kind"] != "outer", "outer reads no weights, and has no descriptors"),
        (tile[6:] != [1] or max(blocks[1:]) <= 256, "a block of a descriptor has more than 256 rows or columns"),
    )  # fmt: skip
    return next((problem for right, problem in checks if not right), "")


__all__ = [
    "DESCRIBING",
    "FIELDS",
    "VARIABLE",
    "Gpu",
    "Problem",
    "Tile",
    "choose_tile",
    "gpu_of",
    "has_large_tiles",
    "measured_rule",
    "own_tiles",
    "read_tiles",
    "rule",
    "use_tiles",
]
