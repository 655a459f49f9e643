"""Predict what the kernels take on an H100, from their tiles and their machine code. It needs no GPU.

A kernel of the experts takes the longest of three: its operations on the matrix units, its bytes from L2, and its
bytes from memory. Where a multiprocessor has one program at a time, nothing else runs while it begins and ends, and
that comes on top. Routing takes its instructions and its atomics, grouping its steps. The rates are those of an H100
SXM: a product of 8,192 squared in bfloat16, a copy, and reads out of L2; what a program's beginning, an atomic and a
step of grouping take, and how often an instruction is issued, are estimates. So this ranks kernels and tiles. It is no
measurement.

    python benchmarks/predict_kernels.py [--save RELEASE]

`--save` keeps the figures in benchmarks/results/predict_kernels.json under a release's name, and the tables compare
the last two. The figures of 0.11.0 are those of its own code. Two minutes on two cores. Needs Triton, and
TRITON_INTERPRET not set.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from compile_kernels import SHAPES, Launch, compile_kernel, launches_of_layer, resources, variants
from measuring import write_results
from tune_kernels import LAYERS

from modeling_deepseekmoe import routing_triton

RESULTS = Path(__file__).parent / "results" / "predict_kernels.json"
TARGET = "sm_90"
MULTIPROCESSORS, CLOCK = 132, 1.755e9
MATRIX, L2, MEMORY = 798e12, 5.7e12, 3.0e12  # operations, bytes and bytes a second
STORE = 64 * CLOCK  # bytes a second that a multiprocessor writes or reads at a program's end
BEGIN = {"outer": 0.3e-6}  # seconds until the first product; the other kernels look for their expert first
BEGIN_OTHERS = 1.0e-6
START, ISSUED, ATOMICS, STEP = 2.5e-6, 0.57, 42e9, 1.2e-6  # a launch, the share of cycles, atomics a second, a step
TOKENS = 8192
ROUTER = "V3 router"
BYTES = 2  # of a number


def work_of(constants: dict[str, Any], kernel: str, tokens: int, choices: int, experts: int) -> dict[str, float]:
    """Count what one launch does.

    Returns:
        Operations, and those of all tiles, which are not all full; bytes that programs read while they multiply, and
        if all tiles were full; bytes at their ends; bytes that memory must give or take at least; and programs.
    """
    if kernel == "combine_kernel":
        moved = BYTES * constants["D"] * (choices + tokens)
        return {"flops": 0, "padded": 0, "read": 0, "full": 0, "end": moved, "memory": moved, "programs": 0}
    if kernel == "outer_kernel":
        m, n, block_m, block_n = (constants[name] for name in ("M", "N", "BLOCK_M", "BLOCK_N"))
        tiles = -(-m // block_m) * -(-n // block_n)
        rows = (tokens if constants["LEFT_BY_TOKEN"] else choices) * m
        rows += (tokens if constants["RIGHT_BY_TOKEN"] else choices) * n
        written = BYTES * experts * m * n
        steps = choices + experts * constants["BLOCK_ROWS"] / 2  # half of the last block of rows is empty
        return {"flops": 2.0 * choices * m * n, "padded": 2.0 * steps * tiles * block_m * block_n,
                "read": BYTES * choices * (m * -(-n // block_n) + n * -(-m // block_m)),
                "full": BYTES * choices * m * n * (1 / block_m + 1 / block_n), "end": written,
                "memory": BYTES * rows + written, "programs": experts * tiles}  # fmt: skip
    width = constants.get("OUT") or constants["WIDTH"]
    inside = constants.get("IN") or constants["D"]
    stacked = 2 if kernel == "first_product_kernel" else 1  # gates and ups
    # Numbers for each choice and column beside the products: what is kept, the activation, and the gradients.
    beside = {"first_product_kernel": 3, "product_kernel": 1, "activation_gradient_kernel": 5}[kernel]
    by_token = kernel != "product_kernel" or constants["BY_TOKEN"]
    block_rows, block_columns = constants["BLOCK_ROWS"], constants["BLOCK_COLUMNS"]
    row_tiles, column_tiles = choices / block_rows + experts / 2, -(-width // block_columns)  # half a tile is empty
    end = BYTES * beside * width * choices
    rows = BYTES * inside * (tokens if by_token else choices)
    return {"flops": 2.0 * choices * inside * width * stacked,
            "padded": 2.0 * row_tiles * block_rows * inside * column_tiles * block_columns * stacked,
            "read": BYTES * inside * (choices * column_tiles + row_tiles * width * stacked),
            "full": BYTES * choices * inside * width * (1 / block_columns + stacked / block_rows), "end": end,
            "memory": BYTES * experts * inside * width * stacked + rows + end,
            "programs": row_tiles * column_tiles}  # fmt: skip


def predict_launch(job: tuple[str, tuple[int, ...], Launch]) -> dict[str, Any]:
    """Compile a launch of the experts, and predict its seconds."""
    name, (experts, top_k, _, _, tokens), launch = job
    constants, kernel = dict(launch.constants), launch.kernel
    work = work_of(constants, kernel, tokens, tokens * top_k, experts)
    found = resources(TARGET, launch.compile(TARGET))
    kind, memory = kernel.removesuffix("_kernel"), work["memory"] / MEMORY
    floor = max(work["flops"] / MATRIX, memory)
    full = max(floor, (work["full"] + work["end"]) / L2)
    is_alone = work["programs"] > 0 and found["programs"] == 1
    # Where a program is alone, its end comes on top, and is no part of what is read meanwhile.
    seconds = max(work["padded"] / MATRIX, (work["read"] + (0 if is_alone else work["end"])) / L2, memory)
    alone = 0.0
    if is_alone:
        end = work["end"] / work["programs"] / STORE
        alone = work["programs"] / MULTIPROCESSORS * (BEGIN.get(kind, BEGIN_OTHERS) + end)
    sizes = {name: constants[name] for name in ("IN", "OUT", "M", "N") if name in constants}
    label = kind.replace("_", " ") + (f" {'x'.join(map(str, sizes.values()))}" if sizes else "")
    tile = [constants[key] for key in constants if key.startswith("BLOCK_") and key != "BLOCK_R"]
    times = 2 if kind == "combine" else 1
    row = {"layer": name, "kernel": label, "tile": [*tile, *dict(launch.options).values()], **found}
    if work["flops"]:
        row["bytes_a_flop"] = (work["read"] + work["end"]) / work["flops"]
    return row | {"seconds": times * (seconds + alone), "alone": times * alone, "full": times * full,
                  "floor": times * floor, "flops": work["flops"]}  # fmt: skip


def machine_code(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    """Disassemble a kernel: its instructions, and the index of the one behind each label."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([program, "-c", file.name], check=True, capture_output=True, text=True).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(r"\s*(\.L\w+):", line):
            labels[found.group(1)] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found.group(1))
    return instructions, labels


def instructions_of(cubin: bytes, loops: float) -> float:
    """Count the instructions of a program that runs its longest loop some times."""
    instructions, labels = machine_code(cubin)
    lengths = [0]
    for number, instruction in enumerate(instructions):
        target = re.search(r"BRA.*?(\.L\w+)", instruction)
        if target and labels.get(target.group(1), len(instructions)) < number:
            lengths.append(number - labels[target.group(1)] + 1)
    return len(instructions) + (loops - 1) * max(lengths)


def predict_router() -> list[dict[str, Any]]:
    """Predict routing and grouping of DeepSeek-V3's gate for `TOKENS`."""
    shape, rows = SHAPES["DeepSeek-V3"], []
    for name, is_training in (("route, training", True), ("route, inference", False)):
        function, constants, num_warps = variants(shape, TARGET)[name]
        compiled = compile_kernel(function, constants, TARGET, num_warps)
        programs = routing_triton.MAX_PROGRAMS if is_training else TOKENS // constants["BLOCK"]
        of_program = instructions_of(compiled.asm["cubin"], TOKENS / programs / constants["BLOCK"])
        count = of_program * num_warps * programs / TOKENS
        seconds = START + TOKENS * count / (4 * MULTIPROCESSORS * CLOCK * ISSUED)
        # Of E experts so many are among a program's choices, and all have a score.
        chosen = shape["experts"] * (1 - (1 - shape["top_k"] / shape["experts"]) ** (TOKENS / programs))
        atomics = programs * (shape["experts"] + chosen) if is_training else 0
        rows.append({"layer": ROUTER, "kernel": name, "tile": [constants["BLOCK"], num_warps],
                     **resources(TARGET, compiled), "instructions_a_row": count, "atomics": atomics,
                     "seconds": seconds + atomics / ATOMICS,
                     "floor": 4 * TOKENS * shape["experts"] / MEMORY})  # fmt: skip
    function, constants, num_warps = variants(shape, TARGET)["group, place"]
    steps = TOKENS * shape["top_k"] / 128 / constants["BLOCK"]  # of each of 128 programs
    found = resources(TARGET, compile_kernel(function, constants, TARGET, num_warps))
    rows.append({"layer": ROUTER, "kernel": "group, both launches", "tile": [constants["BLOCK"], num_warps],
                 **found, "steps": steps, "seconds": 2 * START + steps * STEP,
                 "floor": 12 * TOKENS * shape["top_k"] / MEMORY})  # fmt: skip
    return rows


def predict() -> list[dict[str, Any]]:
    """Predict a training step of all layers, and the router."""
    jobs = [
        (name, layer, launch) for name, layer in LAYERS.items() for launch in launches_of_layer(TARGET, (*layer, 0))
    ]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return [*pool.map(predict_launch, jobs), *predict_router()]


def print_tables(releases: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table for each layer, with the release before beside the last one."""
    names = list(releases)[-2:]
    for layer in dict.fromkeys(row["layer"] for row in releases[names[-1]]):
        each = "instructions a row" if layer == ROUTER else "bytes from L2 a FLOP"
        columns = ("registers", "shared", "programs", each, "predicted")
        print(f"\n| {layer} | {' | '.join(f'{column}, {name}' for name in names for column in columns)} | floor |")
        print(f"| --- |{' --- |' * (len(columns) * len(names) + 1)}")
        tables = [{row["kernel"]: row for row in releases[name] if row["layer"] == layer} for name in names]
        for kernel, last in tables[-1].items():
            cells = [cell for table in tables for cell in cells_of(table.get(kernel))]
            print(f"| {kernel} | {' | '.join(cells)} | {1e3 * last['floor']:.3f} ms |")
        if layer == ROUTER:  # in training and not in inference, or the other way round: there is no sum
            continue
        for name, table in zip(names, tables, strict=True):
            print(f"{name}: {sum_of(table, 'seconds')}; if all tiles were full and began and ended beside others "
                  f"{sum_of(table, 'full')}; floor {sum_of(table, 'floor')}")  # fmt: skip


def cells_of(row: dict[str, Any] | None) -> list[str]:
    """Format what a release has of a kernel."""
    if row is None:
        return ["-"] * 5
    each = f"{row['bytes_a_flop']:.4f}" if "bytes_a_flop" in row else ""
    if "instructions_a_row" in row:
        each = f"{row['instructions_a_row']:.0f}, and {row['atomics']:,.0f} atomics"
    alone = f", of which {1e3 * row['alone']:.2f} alone" if row.get("alone") else ""
    spills = f" (spills {row['spills']})" if row["spills"] else ""
    seconds = f"{1e3 * row['seconds']:.3f} ms{alone}"
    return [f"{row['registers']}{spills}", f"{row['shared']:,}", str(row["programs"]), each, seconds]


def sum_of(table: dict[str, dict[str, Any]], field: str) -> str:
    """Format the sum of seconds, and the rate of all products."""
    seconds = sum(row.get(field, row["seconds"]) for row in table.values())
    flops = sum(row.get("flops", 0) for row in table.values())
    return f"{1e3 * seconds:.2f} ms" + (f" ({flops / seconds / 1e12:.0f} TFLOP/s)" if flops else "")


def main() -> None:
    """Predict, print the tables, and keep the figures if it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", metavar="RELEASE", help="keep the figures under this name")
    arguments = parser.parse_args()
    if routing_triton.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: the kernels are interpreted, and nothing can be compiled.")
    releases = json.loads(RESULTS.read_text(encoding="utf-8"))["releases"] if RESULTS.exists() else {}
    releases.pop(arguments.save or "now", None)
    releases[arguments.save or "now"] = predict()
    if arguments.save:
        write_results(RESULTS, {"triton": triton.__version__, "releases": releases})
    print_tables(releases)


if __name__ == "__main__":
    main()
