"""Compile the routing kernels ahead of time, without a GPU: registers, spills and shared memory of every kernel.

For the shapes of the released models, and the largest one, and for CUDA's sm_80, sm_90 and sm_100 and ROCm's gfx942.
Prints a table, and with --save writes benchmarks/results/compile_kernels.json. Exit code 1 if a kernel of
a released model spills registers. Half a minute on two cores. Needs Triton, and TRITON_INTERPRET not set.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from modeling_deepseekmoe import routing_kernels
from modeling_deepseekmoe.routing_triton import group_options, route_backward_options, route_options
from modeling_deepseekmoe.triton_support import INTERPRETED

RESULTS = Path(__file__).parent / "results" / "compile_kernels.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIGMOID = {"score_function": "sigmoid", "normalize": True, "biased": True, "group_score": "top2_sum"}
SOFTMAX = {"score_function": "softmax", "normalize": False, "biased": False, "group_score": "max"}
LARGEST = "the largest"  # no released gate: it may spill
# Routed experts, chosen experts, groups and chosen groups of the released gates.
SHAPES: dict[str, dict[str, Any]] = {
    "DeepSeekMoE 16B": {"experts": 64, "top_k": 6, "groups": 1, "kept": 1, **SOFTMAX},
    "DeepSeek-V2": {"experts": 160, "top_k": 6, "groups": 8, "kept": 3, **SOFTMAX},
    "DeepSeek-V3": {"experts": 256, "top_k": 8, "groups": 8, "kept": 4, **SIGMOID},
    LARGEST: {"experts": 1024, "top_k": 32, "groups": 1, "kept": 1, **SIGMOID},
    "Kimi K2": {"experts": 384, "top_k": 8, "groups": 1, "kept": 1, **SIGMOID},
}
POINTERS = {
    "logits": "*fp32", "bias": "*fp32", "token_mask": "*i1", "expert_ids": "*i64", "weights": "*fp32",
    "counts": "*i64", "fixed_sums": "*i64", "nan_rows": "*i64", "arrivals": "*i64", "score_sums": "*fp32",
    "grad_weights": "*fp32", "grad_sums": "*fp32", "grad_logits": "*fp32", "ids": "*i64", "histograms": "*i32",
    "permutation": "*i64", "inverse": "*i64", "offsets": "*i32", "scaling_factor": "fp32",
}  # fmt: skip


def compile_kernel(kernel: Any, constants: dict[str, Any], target: str, num_warps: int) -> CompiledKernel:
    """One variant for one target; what is neither a constant nor a pointer is an int32."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps})


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """Registers of a thread, what it spills (CUDA: bytes, ROCm: registers), and bytes of shared memory: what the
    assembler reports."""
    if "amdgcn" in kernel.asm:
        numbers = dict(re.findall(r"\.([sv]gpr_(?:spill_)?count):\s+(\d+)", kernel.asm["amdgcn"]))
        spills = int(numbers["sgpr_spill_count"]) + int(numbers["vgpr_spill_count"])
        return {"registers": int(numbers["vgpr_count"]), "spills": spills, "shared": kernel.metadata.shared}
    ptx = kernel.asm["ptx"]
    architecture = re.search(r"\.target (\w+)", ptx).group(1)
    programs = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = programs / ("ptxas-blackwell" if architecture.startswith("sm_10") else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx, encoding="utf-8")
        command = [assembler, "-v", f"--gpu-name={architecture}", file, "-o", file.with_suffix(".cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", report).group(1))
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()
    spills = int(stores) + int(loads)
    return {"registers": registers, "spills": spills, "shared": kernel.metadata.shared}


def variants(shape: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any], int]]:
    """The kernels that a gate of this shape runs, with their constants and warps."""
    sizes = route_options(shape["experts"], shape["top_k"], shape["groups"], shape["kept"])
    gate = {"SCORE_FUNCTION": shape["score_function"], "NORMALIZE": shape["normalize"]}
    absent = {} if shape["biased"] else {"bias": None}
    forward = {**sizes, **gate, **absent, "TOP2_SUM": shape["group_score"] == "top2_sum"}
    backward = {**route_backward_options(shape["experts"], shape["top_k"]), **gate}
    grouping = group_options(shape["experts"])
    counting = {name: grouping[name] for name in ("WIDTH", "BLOCK")}
    return {
        "route, training": (routing_kernels.route_kernel, {**forward, "STATISTICS": True}, 1),
        "route, inference": (
            routing_kernels.route_kernel,
            {**forward, "STATISTICS": False, "token_mask": None},
            1,
        ),
        "route, backward": (routing_kernels.route_backward_kernel, backward, 1),
        "group, count": (routing_kernels.count_kernel, counting, 4),
        "group, place": (routing_kernels.group_kernel, grouping, 4),
    }


def main() -> int:
    """Compile everything, print the table, write JSON if it is asked for."""
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: the kernels are interpreted, and nothing can be compiled.")
    rows = []
    for model, shape in SHAPES.items():
        for name, (kernel, constants, num_warps) in variants(shape).items():
            compiled = {target: compile_kernel(kernel, constants, target, num_warps) for target in TARGETS}
            rows.append(
                {"model": model, "kernel": name, **{target: resources(compiled[target]) for target in TARGETS}}
            )
    if "--save" in sys.argv:
        RESULTS.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(f"Registers of a thread (Triton {triton.__version__}); in parentheses what it spills, where it does")
    print(f"| model | kernel | {' | '.join(TARGETS)} |")
    print(f"| --- | --- |{' --- |' * len(TARGETS)}")
    spilling = 0
    for row in rows:
        cells = []
        for target in TARGETS:
            spills = row[target]["spills"]
            spilling += spills > 0 and row["model"] != LARGEST
            cells.append(f"{row[target]['registers']}" + (f" ({spills})" if spills else ""))
        print(f"| {row['model']} | {row['kernel']} | {' | '.join(cells)} |")
    print(f"{len(rows) * len(TARGETS)} kernels, of the released models {spilling} spill registers")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
