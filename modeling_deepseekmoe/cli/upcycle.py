# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command `deepseekmoe upcycle`: turn a dense model into a DeepSeekMoE."""

from dataclasses import dataclass
from typing import Annotated

import typer

from .options import Destination, FailedCheck, Resume, ShardSize, takes


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions:
    """Options of `deepseekmoe upcycle`: which dense model is divided, and how."""

    source: Annotated[str, typer.Argument(help="Folder or hub id of a dense Llama, Mistral, Qwen2 or SmolLM2 model.")]
    destination: Destination
    shared_width: Annotated[int, typer.Option(help="Neurons of each FFN that become the shared experts.")]
    shards: Annotated[int, typer.Option(help="G, shards of the other neurons; top-K is G.")]
    copies: Annotated[int, typer.Option(help="C, copies of every shard; there are G * C routed experts.")]
    first_k_dense: Annotated[int, typer.Option(help="First layers that stay dense.")] = 0
    router_std: Annotated[float, typer.Option(help="Standard deviation of the router's rows.")] = 0.3
    noise: Annotated[float, typer.Option(help="Noise on the routed experts, in their standard deviations.")] = 0.0
    dialect: Annotated[str, typer.Option(help="deepseekmoe or deepseek.")] = "deepseekmoe"
    dtype: Annotated[str, typer.Option(help="Dtype to save in: keep, float32, bfloat16 or float16.")] = "keep"
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file inside the source folder.")] = None
    tolerance: Annotated[float, typer.Option(help="Largest allowed logit difference.")] = 1e-3
    check_tokens: Annotated[int, typer.Option(help="Length of the greedy text that must be the same.")] = 32
    seed: Annotated[int, typer.Option(help="Seed of the router and the noise.")] = 0
    max_shard_size: ShardSize = "5GB"
    resume: Resume = False


@takes(UpcycleOptions)
def upcycle(options: UpcycleOptions) -> None:
    """Turn a dense model into a DeepSeekMoE that computes the same, and verify it before anything is written."""
    from modeling_deepseekmoe.conversion import UpcyclingError, UpcyclingPlan
    from modeling_deepseekmoe.conversion import upcycle as run

    plan = UpcyclingPlan(
        shared_width=options.shared_width,
        num_shards=options.shards,
        num_copies=options.copies,
        first_k_dense=options.first_k_dense,
        router_std=options.router_std,
        noise=options.noise,
        dialect=options.dialect,
        seed=options.seed,
    )
    try:
        check = run(
            options.source,
            options.destination,
            plan,
            dtype=options.dtype,
            gguf_file=options.gguf_file,
            tolerance=options.tolerance,
            check_tokens=options.check_tokens,
            max_shard_size=options.max_shard_size,
            resume=options.resume,
            report=typer.echo,
        )
    except UpcyclingError as error:
        raise FailedCheck(str(error)) from error
    typer.echo(f"{options.destination}: {check}")


__all__ = ["UpcycleOptions", "upcycle"]
