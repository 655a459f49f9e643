# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What computes routing and experts on this machine and why, whether the kernels pass their trials, and how fast."""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DeepseekV3Config

from ..experts import FUSED_BACKENDS, choose_backend, run_experts
from ..experts_gating import SILU
from ..experts_operands import Adapter
from ..experts_products import has_instructions
from ..experts_sources import IN_PRODUCTS
from ..experts_tiles import VARIABLE, own_tiles
from ..experts_trial import TRIAL as EXPERTS_TRIAL
from ..grouping import TRIAL as GROUPING_TRIAL
from ..kernel_trial import Case, forget_outcomes, identity, record_path, why_failed
from ..routing import TRIAL as ROUTING_TRIAL
from ..routing import route
from ..routing_triton import why_eager
from ..transformers_support import DeepseekV3Experts, DeepseekV3TopkRouter
from ..triton_support import triton

V3_GATE: dict[str, Any] = {
    "top_k": 8, "score_function": "sigmoid", "num_groups": 8, "top_k_groups": 4, "group_score": "top2_sum",
    "normalize": True, "scaling_factor": 2.5,
}  # fmt: skip
# The gates of V3, V2 and the 16B, as cases of the trial.
RELEASED_GATES: tuple[Case, ...] = (
    (256, 8, "sigmoid", 8, 4, "top2_sum", "scores"),
    (160, 6, "softmax", 8, 3, "max", "scores"),
    (64, 6, "softmax", 1, 1, "max", "scores"),
)


@dataclass(frozen=True)
class Size:
    """A layer of experts to time, and the tokens that run through it and through V3's gate."""

    experts: int
    top_k: int
    hidden: int
    width: int
    tokens: int
    routed_tokens: int
    rounds: int = 5
    rank: int = 16


CPU_SIZE = Size(64, 6, 1024, 704, 256, 1024)
GPU_SIZE = Size(128, 8, 2048, 768, 8192, 8192, rounds=10)


@dataclass(frozen=True)
class Use:
    """What computes a part, and why."""

    part: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class Timing:
    """Median seconds of transformers and of this package."""

    part: str
    peer: float
    ours: float


@dataclass(frozen=True)
class KernelReport:
    """What is used on a machine.

    Attributes:
        machine: its name, versions included.
        uses: what computes each part.
        trials: for each trial "passed", or why it failed; empty where no kernels are used.
        timings: against transformers; empty if nothing was timed.
        timed: what was timed.
    """

    machine: str
    uses: list[Use]
    trials: dict[str, str]
    timings: list[Timing]
    timed: str

    @property
    def failed(self) -> bool:
        """Whether a trial has failed."""
        return any(outcome != "passed" for outcome in self.trials.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """Return the report as lines of text."""
        lines = [self.machine, ""]
        lines += [f"{use.part}: {use.implementation}{use.reason and f', because {use.reason}'}" for use in self.uses]
        lines += [f"trial of the {name} kernels: {outcome}" for name, outcome in self.trials.items()]
        if self.timings:
            lines += ["", self.timed, f"{'':38}{'transformers':>14}{'this package':>14}{'times as fast':>15}"]
        for row in self.timings:
            times = (f"{1e3 * seconds:.2f} ms" for seconds in (row.peer, row.ours))
            lines.append(f"{row.part:38}{''.join(f'{cell:>14}' for cell in times)}{row.peer / row.ours:>15.2f}")
        return "\n".join(lines)


def report_kernels(device: torch.device | None = None, *, timed: bool = True, again: bool = False) -> KernelReport:
    """Find out what is used on a device. Takes under half a minute on a CPU, under two minutes on a GPU.

    Args:
        device: by default the first GPU or, without one, the CPU.
        timed: whether routing, experts and adapters are timed beside transformers.
        again: whether trials are held again that have passed here before.

    Raises:
        ValueError: if the file that DEEPSEEKMOE_TILES names is not one of tiles.
    """
    if device is None:
        device = torch.device(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
    uses = [_use_of_routing(device)]
    trials = {}
    if device.type == "cuda" and triton is not None:
        trials = _trials(device, again)
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    uses += [_use_of_experts(device, dtype, size) for dtype in (torch.bfloat16, torch.float32)]
    if tiles := own_tiles():  # read here, since nothing else reads them where no kernels run
        uses.append(Use("tiles of the experts' kernels", f"{len(tiles)} of {os.environ[VARIABLE]}", ""))
    return KernelReport(_machine(device), uses, trials, _timings(device, size) if timed else [], _timed(device, size))


def _machine(device: torch.device) -> str:
    on_gpu = device.type == "cuda"
    name = identity(device)["gpu"] if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    found = [f"{device}: {name}", f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    return ", ".join(found if triton is None else [*found, f"triton {triton.__version__}"])


def _trials(device: torch.device, again: bool) -> dict[str, str]:
    cases: dict[str, tuple[Case, ...]] = {
        ROUTING_TRIAL: ((), *RELEASED_GATES),
        GROUPING_TRIAL: ((),),
        EXPERTS_TRIAL: ((), *((SILU.function, kind) for kind in IN_PRODUCTS)),
    }
    if again:
        forget_outcomes()
        for name, of_trial in cases.items():
            for case in of_trial:
                record_path(name, device, case).unlink(missing_ok=True)
    reasons = {name: [why_failed(name, device, case) for case in of_trial] for name, of_trial in cases.items()}
    return {name: next(filter(None, found), "passed") for name, found in reasons.items()}


def _use_of_routing(device: torch.device) -> Use:
    case = RELEASED_GATES[0]
    reason = why_eager(ROUTING_TRIAL, torch.empty(0, 256, device=device), 256, 8, 8, case=case)
    return Use("routing", "eager" if reason else "triton", reason)


def _use_of_experts(device: torch.device, dtype: torch.dtype, size: Size) -> Use:
    module = _experts(size, "meta", dtype)
    hidden = torch.empty(size.tokens, size.hidden, device=device, dtype=dtype)
    backend, reason = choose_backend(module, hidden, top_k=size.top_k)
    if backend == "loop" and not has_instructions(dtype):
        name = str(dtype).removeprefix("torch.")
        reason = f"the tensors are on the CPU, and in float32, because it has no matrix instructions for {name}"
    elif backend == "loop":
        reason = "the tensors are on the CPU"
    return Use(f"experts in {str(dtype).removeprefix('torch.')}", backend, reason)


def _experts(size: Size, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Make transformers' own experts of DeepSeek-V3, computed by its grouped products."""
    config = DeepseekV3Config(
        hidden_size=size.hidden, moe_intermediate_size=size.width, n_routed_experts=size.experts,
        num_local_experts=size.experts, num_experts_per_tok=size.top_k, experts_implementation="grouped_mm",
    )  # fmt: skip
    with torch.device(device):
        module = DeepseekV3Experts(config).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return module


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _timed(device: torch.device, size: Size) -> str:
    layer = f"{size.experts} experts of {size.hidden} x {size.width}, top-{size.top_k}, {size.tokens} tokens"
    return f"Medians in {str(_dtype(device)).removeprefix('torch.')}: V3's gate, {size.routed_tokens} tokens; {layer}"


def _timings(device: torch.device, size: Size) -> list[Timing]:
    return [_time_routing(device, size), *_time_experts(device, size)]


def _time_routing(device: torch.device, size: Size) -> Timing:
    router = DeepseekV3TopkRouter(DeepseekV3Config(hidden_size=64)).to(device)
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.normal_(std=0.01)
    hidden = torch.randn(size.routed_tokens, 64, device=device)

    def ours() -> None:
        logits = torch.nn.functional.linear(hidden, router.weight)
        route(logits, correction_bias=router.e_score_correction_bias, statistics=False, **V3_GATE)

    with torch.no_grad():
        return Timing("routing", *_medians(device, (lambda: router(hidden), ours), size.rounds))


def _time_experts(device: torch.device, size: Size) -> list[Timing]:
    dtype = _dtype(device)
    module = _experts(size, device, dtype)
    hidden = torch.randn(size.tokens, size.hidden, device=device, dtype=dtype, requires_grad=True)
    ids = torch.rand(size.tokens, size.experts, device=device).topk(size.top_k).indices
    weights = torch.rand(size.tokens, size.top_k, device=device)
    adapters = [
        Adapter(
            torch.randn(size.experts, size.rank, inside, device=device, dtype=dtype, requires_grad=True),
            torch.zeros(size.experts, outside, size.rank, device=device, dtype=dtype, requires_grad=True),
        )
        for outside, inside in ((2 * size.width, size.hidden), (size.hidden, size.width))
    ]

    backend, _ = choose_backend(module, hidden, top_k=size.top_k)

    def peer() -> torch.Tensor:
        return module(hidden, ids, weights)

    def ours() -> torch.Tensor:
        return run_experts(module, hidden, ids, weights)

    def adapted() -> torch.Tensor:
        return run_experts(module, hidden, ids, weights, adapters=adapters)

    def step(forward: Callable[[], torch.Tensor], trained: bool) -> Callable[[], None]:
        def run() -> None:
            module.requires_grad_(trained)
            module.zero_grad()
            forward().backward(hidden.detach())

        return run

    with torch.no_grad():
        rows = [Timing("experts, forward", *_medians(device, (peer, ours), size.rounds))]
    ways = step(peer, True), step(ours, True)
    rows.append(Timing("experts, training step", *_medians(device, ways, size.rounds)))
    if backend in FUSED_BACKENDS:  # the others compute adapters apart
        ways = step(peer, False), step(adapted, False)
        rows.append(Timing(f"frozen experts, here with LoRA r {size.rank}", *_medians(device, ways, size.rounds)))
    return rows


def _medians(device: torch.device, ways: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Time ways, which take turns. The first round, which compiles, does not count."""
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for way, times in zip(ways, seconds, strict=True):
            _wait(device)
            begin = time.perf_counter()
            way()
            _wait(device)
            if number:
                times.append(time.perf_counter() - begin)
    return [statistics.median(times) for times in seconds]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = ["KernelReport", "Timing", "Use", "report_kernels"]
