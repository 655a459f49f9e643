"""Compile the kernels ahead of time, without a GPU, and report registers, spills and shared memory of each.

The kernels of routing are compiled for the released models' gates and the largest one. The kernels of the experts are
compiled for all that a layer launches in a training step and in decoding, in bfloat16. Targets are CUDA's sm_80, sm_90
and sm_100 and ROCm's gfx942. Prints a table, and with --save writes benchmarks/results/compile_kernels.json. Exit code
1 if a kernel of a released model spills registers, unless its tile caps them. Three minutes on two cores: with
--unless-saved nothing is compiled if the sources and Triton are those of the saved file. Needs Triton, and
TRITON_INTERPRET not set.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from modeling_deepseekmoe import experts_kernels, experts_tiles, experts_triton, routing_kernels
from modeling_deepseekmoe.experts_gating import SILU, Gating
from modeling_deepseekmoe.experts_operands import Adapter, ExpertGradients, ExpertOperands
from modeling_deepseekmoe.experts_quantized import FP8_BLOCK, MXFP4_BLOCK, QuantizedStack
from modeling_deepseekmoe.experts_sources import IN_PRODUCTS
from modeling_deepseekmoe.experts_tiles import Gpu
from modeling_deepseekmoe.routing_triton import WARPS, group_options, route_backward_options, route_options
from modeling_deepseekmoe.triton_support import INTERPRETED, TensorDescriptor

RESULTS = Path(__file__).parent / "results" / "compile_kernels.json"
PACKAGE = Path(experts_kernels.__file__).parent
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes that a program can have; compute capability 8.6 and 8.9 have 101,376.
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
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
# Routed experts, chosen experts, hidden, expert width, tokens, rank of adapters (0: without, all parameters trained).
Layer = tuple[int, int, int, int, int, int]
# The activation of most is SiLU; GATINGS has the others.
EXPERTS: dict[str, Layer] = {
    "DeepSeekMoE 16B": (64, 6, 2048, 1408, 8192, 0),
    "DeepSeek-V3": (256, 8, 7168, 2048, 8192, 0),
    "DeepSeek-V3, decoding": (256, 8, 7168, 2048, 1, 0),
    "128 x 2048 x 768, r 16": (128, 8, 2048, 768, 8192, 16),
    "DeepSeek-V4 Flash": (256, 6, 4096, 2048, 8192, 0),
    "MiniMax-M3's activation": (256, 6, 4096, 2048, 8192, 0),
    "GELU": (256, 6, 4096, 2048, 8192, 0),
}
GATINGS = {
    "DeepSeek-V4 Flash": Gating(limit=10.0),
    "MiniMax-M3's activation": Gating(limit=7.0, slope=1.702, offset=1.0),
    "GELU": Gating("gelu_tanh"),
}
# A layer of the same size whose stacks are decoded inside the products: the largest matrices, to keep this short.
QUANTISED = {f"{model}, {kind}": (model, kind) for model in list(EXPERTS)[1:2] for kind in IN_PRODUCTS}
OF_ACTIVATION = ("first_product_kernel", "activation_gradient_kernel")
TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip
POINTERS = {
    "logits": "*fp32", "bias": "*fp32", "token_mask": "*i1", "expert_ids": "*i64", "weights": "*fp32",
    "counts": "*i64", "fixed_sums": "*i64", "nan_rows": "*i64", "arrivals": "*i64", "score_sums": "*fp32",
    "grad_weights": "*fp32", "grad_sums": "*fp32", "grad_logits": "*fp32", "ids": "*i64", "histograms": "*i32",
    "permutation": "*i64", "inverse": "*i64", "offsets": "*i32", "scaling_factor": "fp32",
    "epsilon": "fp32",
}  # fmt: skip


def compile_kernel(kernel: Any, constants: dict[str, Any], target: str, num_warps: int) -> CompiledKernel:
    """Compile one variant for one target. What is neither a constant nor a pointer is an int32."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps})


@dataclass(frozen=True)
class Launch:
    """How a kernel was launched, as far as it decides what is compiled."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    def compile(self, target: str) -> CompiledKernel:
        kernel = getattr(experts_kernels, self.kernel)
        places = {name: place for place, name in enumerate(kernel.arg_names)}
        constants = {(places[name],): value for name, value in self.constants}
        attributes = {(places[name],): [["tt.divisibility", 16]] for name in self.aligned}
        source = ASTSource(kernel, dict(self.signature), constants, attributes)
        return triton.compile(source, target=TARGETS[target], options=dict(self.options))


class Recorder:
    """Stands in for a kernel, and records how it is launched."""

    def __init__(self, name: str, launches: dict[Launch, None]) -> None:
        self.kernel, self.name, self.launches = getattr(experts_kernels, name), name, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.record

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Specialise as Triton does: on numbers that are 1, and on numbers and pointers that are multiples of 16."""
        names = self.kernel.arg_names
        values = {**dict(zip(names, args, strict=False)), **{key: kwargs[key] for key in names if key in kwargs}}
        signature, constants, aligned = {}, {}, []
        for name, parameter in zip(names, self.kernel.params, strict=True):
            value, free = values[name], not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (free and isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                aligned.append(name)
            elif isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                if free and isinstance(value, int) and value % 16 == 0:
                    aligned.append(name)
        options = {key: value for key, value in kwargs.items() if key in ("num_warps", "num_stages", "maxnreg")}
        launch = Launch(
            self.name, tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(options.items())
        )
        self.launches[launch] = None


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Make a tensor that is nowhere."""
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_stack(kind: str, projections: int, dtype: torch.dtype, *shape: int) -> torch.Tensor | QuantizedStack:
    """Make a stack (E, out, in) that is nowhere: in a dtype, or quantised in a format that products decode."""
    experts, rows, columns = shape
    if not kind:
        return meta(*shape, dtype=dtype)
    codes = meta(experts, rows, columns if kind == "fp8" else columns // 2, dtype=torch.uint8)
    if kind == "fp8":
        blocks = (-(-size // FP8_BLOCK) for size in (rows // projections, columns))
        scales = meta(experts, projections, *blocks, dtype=torch.float32)
    else:
        scales = meta(experts, rows, columns // MXFP4_BLOCK, dtype=torch.uint8)
    return QuantizedStack(kind, codes, scales, None, dtype)


def operands_of(
    layer: tuple[int, ...], dtype: torch.dtype, rank: int, dropout: float, gating: Gating = SILU, kind: str = ""
) -> tuple[ExpertOperands, tuple[torch.Tensor, torch.Tensor]]:
    """Make the operands of a layer (experts, top-k, hidden, width, tokens), and the order of its choices, nowhere.

    Its stacks are in the dtype, or in the format `kind`.
    """
    experts, top_k, hidden, width, tokens = layer
    adapters = [
        Adapter(meta(experts, rank, inside, dtype=dtype), meta(outside, rank, experts, dtype=dtype).permute(2, 0, 1),
                0.5, dropout, meta(dtype=torch.int64)) if rank else None
        for outside, inside in ((2 * width, hidden), (hidden, width))
    ]  # fmt: skip
    stacks = (
        meta_stack(kind, 2, dtype, experts, 2 * width, hidden),
        meta_stack(kind, 1, dtype, experts, hidden, width),
    )
    ids, weights = meta(tokens, top_k, dtype=torch.int64), meta(tokens, top_k, dtype=torch.float32)
    operands = ExpertOperands(meta(tokens, hidden, dtype=dtype), ids, weights, *stacks, gating, *adapters)
    return operands, (meta(tokens * top_k, dtype=torch.int32), meta(experts + 1, dtype=torch.int32))


def launches_of_layer(target: str, layer: Layer, gating: Gating = SILU, kind: str = "") -> list[Launch]:
    """Record all that a layer launches on a target: a training step or, for one token, its forward pass.

    Args:
        target: of `TARGETS`.
        layer: routed experts, chosen experts, hidden, expert width, tokens, rank of adapters.
        gating: its activation.
        kind: the format of its stacks; they are frozen then.
    """
    *_, tokens, rank = layer
    launches: dict[Launch, None] = {}
    operands, order = operands_of(layer[:5], torch.bfloat16, rank, 0.1, gating, kind)
    stand_ins: dict[str, Any] = {name: Recorder(name, launches) for name in experts_kernels.__all__}
    gpu = Gpu(target, SHARED[target])  # of tensors that are nowhere
    with mock.patch.multiple(experts_triton, **stand_ins), mock.patch.object(experts_tiles, "gpu_of", lambda _: gpu):
        _, kept = experts_triton.experts_forward_triton(operands, *order, tokens > 1)
        if tokens > 1:
            trained = not rank and not kind
            needs = ExpertGradients(True, True, trained, trained, *[bool(rank)] * 4)
            experts_triton.experts_backward_triton(operands.hidden, operands, *order, kept, needs)
    return list(launches)


def launches_of_experts(target: str, model: str) -> list[Launch]:
    """Record what a layer of `EXPERTS` or `QUANTISED` launches that no other one does.

    Of layers with another activation these are the two kernels that know of it, and of quantised ones those that
    decode.
    """
    like, kind = QUANTISED.get(model, (model, ""))
    launches = launches_of_layer(target, EXPERTS[like], GATINGS.get(model, SILU), kind)
    if kind:
        return [launch for launch in launches if dict(launch.constants).get("FORMAT")]
    return [launch for launch in launches if model not in GATINGS or launch.kernel in OF_ACTIVATION]


# What a multiprocessor has: bytes of shared memory, of which CUDA takes 1 KB for each program, warps, and registers of
# a quarter of it, which has a quarter of a program's warps.
MULTIPROCESSORS = {"sm_80": (167_936, 64, 16_384), "sm_90": (233_472, 64, 16_384), "sm_100": (233_472, 64, 16_384)}


def programs_at_once(target: str, registers: int, shared: int, num_warps: int) -> int:
    """Compute how many programs (CTAs) a multiprocessor, or a compute unit of ROCm, has at a time."""
    if target == "gfx942":  # 4 SIMDs of 512 registers
        waves = 4 * min(512 // max(-(-registers // 8) * 8, 1), 8)
        return min(waves // num_warps, 65_536 // shared if shared else waves)
    memory, warps, of_quarter = MULTIPROCESSORS[target]
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = (
        4 * (of_quarter // of_warp) // num_warps if num_warps >= 4 else of_quarter * 4 // of_warp // num_warps
    )
    return min(by_registers, memory // (shared + 1024), warps // num_warps, 32)


def resources(target: str, kernel: CompiledKernel) -> dict[str, int]:
    """Read from the assembler's report: registers of a thread, spills, and bytes of shared memory.

    CUDA counts spills in bytes, ROCm in registers. `programs` are those that a multiprocessor has at a time.
    """
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    if "amdgcn" in kernel.asm:
        numbers = dict(re.findall(r"\.([sv]gpr_(?:spill_)?count):\s+(\d+)", kernel.asm["amdgcn"]))
        registers, spills = (
            int(numbers["vgpr_count"]),
            int(numbers["sgpr_spill_count"]) + int(numbers["vgpr_spill_count"]),
        )
    else:
        registers, spills = report_of_ptxas(kernel.asm["ptx"])
    programs, capped = (
        programs_at_once(target, registers, shared, warps),
        bool(getattr(kernel.metadata, "maxnreg", None)),
    )
    found = {"registers": registers, "spills": spills, "shared": shared, "warps": warps, "programs": programs}
    return {
        **found,
        "capped": capped,
    }  # a tile that was measured with fewer registers, where spills are the lesser evil


def report_of_ptxas(ptx: str) -> tuple[int, int]:
    """Assemble a kernel. Return the registers of a thread, and the bytes that it spills."""
    architecture = re.findall(r"\.target (\w+)", ptx)[0]
    programs = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx, encoding="utf-8")
        command = ["-v", f"--gpu-name={architecture}", str(file), "-o", str(file.with_suffix(".cubin"))]
        # Which of the two knows the architecture and the version of the language depends on the version of Triton.
        for assembler in (programs / "ptxas", programs / "ptxas-blackwell"):
            result = subprocess.run([assembler, *command], capture_output=True, text=True)
            if result.returncode == 0:
                break
        result.check_returncode()
        report = result.stderr
    stores, loads = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)[0]
    return int(re.findall(r"Used (\d+) registers", report)[0]), int(stores) + int(loads)


def variants(shape: dict[str, Any], target: str) -> dict[str, tuple[Any, dict[str, Any], int]]:
    """Return the kernels that a gate of this shape runs on a target, with their constants and warps."""
    sizes = route_options(shape["experts"], shape["top_k"], shape["groups"], shape["kept"], TARGETS[target].warp_size)
    gate = {"SCORE_FUNCTION": shape["score_function"], "NORMALIZE": shape["normalize"]}
    absent = {} if shape["biased"] else {"bias": None}
    forward = {**sizes, **gate, **absent, "TOP2_SUM": shape["group_score"] == "top2_sum",
               "BIAS_ON_LOGITS": False,
               "ORDER": "acq_rel" if TARGETS[target].backend == "hip" else "relaxed"}  # fmt: skip
    backward = {**route_backward_options(shape["experts"], shape["top_k"]), **gate}
    grouping = group_options(shape["experts"])
    counting = {name: grouping[name] for name in ("WIDTH", "BLOCK")}
    return {
        "route, training": (routing_kernels.route_kernel, {**forward, "STATISTICS": True}, WARPS),
        "route, inference": (
            routing_kernels.route_kernel,
            {**forward, "STATISTICS": False, "token_mask": None},
            WARPS,
        ),
        "route, backward": (routing_kernels.route_backward_kernel, backward, 1),
        "group, count": (routing_kernels.count_kernel, counting, 4),
        "group, place": (routing_kernels.group_kernel, grouping, 4),
    }


def compile_row(job: tuple[str, str | tuple[Launch, ...]]) -> dict[str, Any]:
    """Compile a kernel for all targets. It is one of routing, by its name, or one of the experts, by its launches."""
    model, kernel = job
    if isinstance(kernel, str):
        name, compiled = kernel, {}
        for target in TARGETS:
            function, constants, num_warps = variants(SHAPES[model], target)[kernel]
            compiled[target] = compile_kernel(function, constants, target, num_warps)
    else:
        name = f"experts, {kernel[0].kernel.removesuffix('_kernel').replace('_', ' ')}"
        compiled = {target: launch.compile(target) for target, launch in zip(TARGETS, kernel, strict=True)}
    return {"model": model, "kernel": name, **{target: resources(target, one) for target, one in compiled.items()}}


def digest_of_sources() -> str:
    """Return a digest of what decides what is compiled: the kernels and who launches them, this file, and Triton."""
    found = hashlib.sha256(triton.__version__.encode())
    sources = [path for part in ("experts*.py", "routing*.py", "triton_support.py") for path in PACKAGE.glob(part)]
    for path in (Path(__file__), *sorted(sources)):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def main() -> int:
    """Compile everything, print the table, and write JSON if it is asked for."""
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: the kernels are interpreted, and nothing can be compiled.")
    digest = digest_of_sources()
    if "--unless-saved" in sys.argv and json.loads(RESULTS.read_text(encoding="utf-8")).get("digest") == digest:
        print(f"Kernels and Triton are those of {RESULTS.name}: nothing is compiled again")
        return 0
    jobs: list[tuple[str, Any]] = [
        (model, name) for model, shape in SHAPES.items() for name in variants(shape, "sm_90")
    ]
    for model in [*EXPERTS, *QUANTISED]:
        of_targets = [launches_of_experts(target, model) for target in TARGETS]
        jobs += [(model, launches) for launches in zip(*of_targets, strict=True)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(compile_row, jobs))
    print(f"Registers of a thread, and programs that a multiprocessor has at a time (Triton {triton.__version__})")
    print(f"| model | kernel | {' | '.join(TARGETS)} |")
    print(f"| --- | --- |{' --- |' * len(TARGETS)}")
    spilling = single = 0
    for row in rows:
        cells = []
        for target in TARGETS:
            spills = row[target]["spills"]
            spilling += spills > 0 and row["model"] != LARGEST and not row[target]["capped"]
            cell = f"{row[target]['registers']}, {row[target]['programs']}"
            cells.append(cell + (f" (spills {spills})" if spills else ""))
            single += row[target]["programs"] == 1
        print(f"| {row['model']} | {row['kernel']} | {' | '.join(cells)} |")
    too_large = sum(row[target]["shared"] > SHARED[target] for row in rows for target in TARGETS)
    print(f"{len(rows) * len(TARGETS)} kernels, of the released models {spilling} spill registers unasked; "
          f"{too_large} need more shared memory than there is; {single} run alone on a multiprocessor")  # fmt: skip
    failed = bool(spilling or too_large)
    if "--save" in sys.argv:
        saved = {"triton": triton.__version__, "digest": None if failed else digest, "rows": rows}
        RESULTS.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
