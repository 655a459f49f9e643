"""Compile what a GPU run launches, without a GPU, into Triton's cache.

Triton's own JIT compiles, with a driver that only says what the target is, so that a process on the GPU finds all it
asks for. The cache must then lie at the same path (TRITON_CACHE_DIR). It is for one version of Triton and of the
kernels' source.

    TRITON_CACHE_DIR=/tmp/triton python benchmarks/prewarm_kernels.py --capability 90 [--processes N]

Prints how many kernels there are, and how many of them were new. Some minutes on two cores. Exit code 1 if one does
not compile.
"""

import argparse
import contextlib
import itertools
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from compile_kernels import EXPERTS, SHAPES, SHARED, meta, operands_of
from quantized_kernels import SHAPES as QUANTISED_SHAPES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from tune_kernels import CANDIDATES, LAYERS, allowed

from modeling_deepseekmoe import (
    experts_kernels,
    experts_tiles,
    experts_trial,
    experts_triton,
    routing_kernels,
    routing_triton,
)
from modeling_deepseekmoe.experts_gating import SILU
from modeling_deepseekmoe.experts_operands import ExpertGradients
from modeling_deepseekmoe.experts_sources import IN_PRODUCTS
from modeling_deepseekmoe.experts_tiles import DESCRIBING, Gpu, Tile, rule, use_tiles
from modeling_deepseekmoe.experts_trial import try_experts
from modeling_deepseekmoe.grouping import try_grouping
from modeling_deepseekmoe.kernel_trial import WrongKernelError
from modeling_deepseekmoe.routing import try_routing

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
Layer = tuple[int, int, int, int, int]  # experts, top-k, hidden, width, tokens


class NoDevice:
    """Stands in for Triton's driver, and says what the target is."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return a stream that nothing is launched on."""
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        """Return the compute capability."""
        return divmod(self.capability, 10)

    def get_current_target(self) -> GPUTarget:
        """Return the target of the compiler."""
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        """Return a device that has no memory."""
        return torch.device("meta")

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Translate a type of an argument."""
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(kind)


class Compiler:
    """Stands in for the kernels, and compiles those of its share instead of launching them."""

    def __init__(self, share: int, shares: int) -> None:
        self.share, self.shares = share, shares
        self.compiled = 0
        self.failed: list[str] = []
        self.known: set[str] = set()
        for caller, kernels in ((experts_triton, experts_kernels), (routing_triton, routing_kernels)):
            for name in kernels.__all__:
                setattr(caller, name, _Compiled(self, getattr(kernels, name)))

    def compile(self, kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compile one launch, if it is new and of this share."""
        constants = {name: value for name, value in kwargs.items() if not isinstance(value, torch.Tensor)}
        values = [(a.dtype, None) if isinstance(a, torch.Tensor) else (type(a), _specialised(a)) for a in args]
        key = f"{kernel.fn.__name__} {values} {constants}"
        if key in self.known:
            return
        self.known.add(key)
        if zlib.crc32(key.encode()) % self.shares != self.share:
            return
        try:
            kernel.warmup(*args, grid=grid, **kwargs)
            self.compiled += 1
        except Exception as error:  # one that needs too much; the others are compiled
            self.failed.append(f"{kernel.fn.__name__} {constants}: {type(error).__name__}: {str(error)[:200]}")


class _Compiled:
    def __init__(self, compiler: Compiler, kernel: Any) -> None:
        self.compiler, self.kernel = compiler, kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.compiler.compile(self.kernel, grid, args, kwargs)


def _specialised(value: Any) -> Any:
    """Return what a kernel is compiled for, of a number."""
    return (value == 1, value % 16 == 0) if isinstance(value, int) else value is None


def launch_layer(
    layer: Layer, dtype: torch.dtype = torch.bfloat16, rank: int = 0, dropout: float = 0.0, kind: str = ""
) -> None:
    """Launch what a layer of experts launches: a forward pass, and steps with trained and with frozen experts.

    Those with stacks in a format are always frozen.
    """
    operands, order = operands_of(layer, dtype, rank, dropout, kind=kind)
    experts_triton.experts_forward_triton(operands, *order, False)
    _, kept = experts_triton.experts_forward_triton(operands, *order, True)
    for trained in (False,) if kind else (True, False):
        needs = ExpertGradients(True, True, trained, trained, *[rank > 0] * 4)
        experts_triton.experts_backward_triton(operands.hidden, operands, *order, kept, needs)
    routing_triton.group_choices(operands.expert_ids, layer[0], torch.int32, with_inverse=False)


def launch_gate(shape: dict[str, Any], tokens: int) -> None:
    """Launch what a gate launches, in every dtype, with and without bias, mask and statistics."""
    experts, top_k, score = shape["experts"], shape["top_k"], shape["score_function"]
    for dtype, biased, masked in itertools.product(DTYPES, {shape["biased"], False}, (False, True)):
        logits, mask = meta(tokens, experts, dtype=dtype), meta(tokens, dtype=torch.bool) if masked else None
        bias = meta(experts, dtype=torch.float32) if biased else None
        gate = (shape["groups"], shape["kept"], shape["group_score"], shape["normalize"], 2.5)
        for statistics in (False, True):
            routing_triton._route(logits, bias, mask, top_k, score, *gate, False, 1, statistics)
        ids, grad = meta(tokens, top_k, dtype=torch.int64), meta(tokens, top_k, dtype=torch.float32)
        for sums in (None, meta(1, experts, dtype=torch.float32)):
            routing_triton._route_backward(grad, sums, logits, ids, mask, score, shape["normalize"], 2.5)
    routing_triton._group_by_expert(meta(tokens, top_k, dtype=torch.int64), experts)


def launches(gpu: str) -> Iterator[Callable[[], None]]:
    """Give all that is launched on a GPU: what is measured, decoded and tested, and every tile that tuning tries."""
    for layer in [*LAYERS.values(), *(size[:5] for size in EXPERTS.values())]:
        for tokens in {layer[4], 1, 64, 1024}:
            yield partial(launch_layer, (*layer[:4], tokens))
        yield partial(launch_layer, layer, rank=16, dropout=0.1)
    for shape, tokens in itertools.product(SHAPES.values(), (1, 8192)):
        yield partial(launch_gate, shape, tokens)
    for dtype, rank, tokens in itertools.product(DTYPES, (0, 16), (1, 512, 1024, 3000)):  # of the tests
        yield partial(launch_layer, (16, 4, 512, 320, tokens), dtype, rank, 0.1 if rank else 0.0)
    for descriptors in (0, 1) if re.fullmatch(DESCRIBING, gpu) else ():  # of a test
        yield partial(_with_descriptors, (16, 4, 504, 328, 3000), descriptors)
    for trial in (try_routing, try_grouping, try_experts):
        yield partial(_hold, trial)
    for kind in IN_PRODUCTS:
        yield partial(_hold, try_experts, SILU.function, kind)
        for shape in QUANTISED_SHAPES:  # of benchmarks/quantized_kernels.py
            for tokens, rank in itertools.product(shape.tokens, (0, 16)):
                layer = (shape.experts, shape.top_k, shape.hidden, shape.width, tokens)
                yield partial(launch_layer, layer, rank=rank, kind=kind)
    for layer in LAYERS.values():
        for kind, tiles in CANDIDATES.items():
            for tile in allowed(tiles, gpu):
                yield partial(_with_tile, layer, kind, tile)


def _with_tile(layer: Layer, kind: str, tile: Tile) -> None:
    with use_tiles(lambda problem: tile if problem.kind == kind else None):
        launch_layer(layer)


def _with_descriptors(layer: Layer, flag: int) -> None:
    gpu = experts_tiles.gpu_of(torch.device("meta"))
    with use_tiles(lambda problem: rule(problem, gpu)._replace(descriptors=flag)):
        launch_layer(layer)


def _hold(trial: Callable[..., None], *case: str) -> None:
    """Hold a trial, which must find kernels wrong that are only compiled."""
    with contextlib.suppress(WrongKernelError):
        trial(torch.device("cpu"), *case)


def compile_share(share: int, shares: int, capability: int) -> tuple[int, list[str]]:
    """Compile one share of all kernels. Return their number, and what does not compile."""
    driver.set_active(NoDevice(capability))
    name = f"sm_{capability}"
    for module in (experts_tiles, experts_trial):
        mock.patch.object(module, "gpu_of", lambda device: Gpu(name, SHARED.get(name, 101_376))).start()
    compiler = Compiler(share, shares)
    for launch in launches(name):
        launch()
    return compiler.compiled, compiler.failed


def main() -> int:
    """Compile in several processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--present", action="store_true", help="for the GPU that is there")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.present:
        major, minor = torch.cuda.get_device_capability()
        arguments.capability = 10 * major + minor
    cache = Path(triton.knobs.cache.dir)
    before = len(list(cache.glob("*"))) if cache.exists() else 0
    shares = range(arguments.processes)
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        given = zip(*[(share, len(shares), arguments.capability) for share in shares], strict=True)
        results = list(pool.map(compile_share, *given))
    failed = [line for _, lines in results for line in lines]
    print("\n".join(failed))
    print(f"{sum(count for count, _ in results)} kernels for sm_{arguments.capability}, {len(failed)} do not compile; "
          f"{len(list(cache.glob('*'))) - before} folders are new in {cache}")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
