# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Read what `accelerate launch` was told about sharding, to load a model straight into its shards."""

import dataclasses
import os
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

logger = logging.get_logger(__name__)

_SWITCHES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG")
_SIZES = ("dp_replicate", "dp_shard", "tp", "cp", "sp")
_TAKEN = "DEEPSEEKMOE_TAKEN_"  # under this prefix the switches stay, where accelerate does not look


def sharding_of_launch(*, tp_size: int | None = None, ep_size: int = 1) -> Any:
    """Return how the launched processes shard a model, for `from_pretrained(..., distributed_config=...)`.

    With it, a rank reads only its own part. Accelerate would load the whole model first. The settings come from the
    environment. `accelerate launch --config_file` writes its YAML there: FSDP2 (with `fsdp_offload_params`), its
    replicas, tensor parallelism (`parallelism_config`), bfloat16. `torchrun` works without a YAML. FSDP2 shards over
    what replicas and `tp_size` leave of the processes. Call this before `TrainingArguments` or anything of accelerate
    exists: it takes accelerate's switches away, so that nothing is sharded twice.

    Args:
        tp_size: ranks that share a batch and every layer. The default is that of the `parallelism_config`, or 1.
        ep_size: ranks that hold distinct experts, a multiple of `tp_size`.

    Returns:
        A `transformers.distributed.DistributedConfig`. `None` for one process, and for a launch that shards nothing
        (DDP, DeepSpeed).

    Raises:
        ValueError: if the FSDP is no FSDP2 or an option of it belongs elsewhere, or if sizes are not allowed or do not
            fit the number of processes.
        ImportError: if the Trainer of this transformers cannot train models that are sharded at loading.
    """
    launch = _Launch.read()
    tp_size = launch.sizes["tp"] if tp_size is None else tp_size
    launch.check(tp_size, ep_size)
    processes = launch.processes
    if processes == 1 or not (launch.fsdp or launch.parallel or tp_size > 1 or ep_size > 1):
        return None
    replicas, told = launch.sizes["dp_replicate"], launch.sizes["dp_shard"]
    shards = max(1, processes // tp_size // replicas)
    if replicas * shards * tp_size != processes or told not in (1, shards):
        raise ValueError(
            f"tp_size={tp_size}, dp_replicate_size={replicas} and dp_shard_size={told} are not allowed for "
            f"{processes} processes: their product must be the number of processes."
        )
    from transformers.distributed import DistributedConfig

    if "dp_replicate_size" not in {field.name for field in dataclasses.fields(DistributedConfig)}:
        raise ImportError("Loading straight into shards needs transformers 5.23 or newer.")
    if launch.offload and torch.cuda.is_available() and not dist.is_initialized():
        # Norms of what lies on the CPU are reduced there. accelerate would look at the switch, which is taken.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    sharding = DistributedConfig(
        tp_size=tp_size,
        fsdp_size=shards,
        dp_replicate_size=replicas,
        ep_size=ep_size,
        fsdp_cpu_offload=launch.offload,
        fsdp_mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "bf16",
    )
    logger.info(f"transformers shards the model while it loads, and accelerate does not: {sharding}")
    return sharding


@dataclasses.dataclass(frozen=True)
class _Launch:
    """The settings that the launcher gave to the processes.

    Attributes:
        processes: their number.
        fsdp, parallel: whether FSDP, and a `parallelism_config`, were asked for.
        offload: whether the shards lie in the machine's memory.
        sizes: sizes of the `parallelism_config`, by the names in `_SIZES`. All are 1 if it was not asked for.
    """

    processes: int
    fsdp: bool
    parallel: bool
    offload: bool
    sizes: dict[str, int]

    @classmethod
    def read(cls) -> "_Launch":
        """Read the environment, and move accelerate's switches to names that accelerate does not read."""
        for switch in _SWITCHES:  # a second model is to be sharded in the same way
            if switch in os.environ:
                os.environ[_TAKEN + switch] = os.environ.pop(switch)
        fsdp, parallel = (os.environ.get(_TAKEN + switch, "false").lower() == "true" for switch in _SWITCHES)
        return cls(
            processes=int(os.environ.get("WORLD_SIZE", "1")),
            fsdp=fsdp,
            parallel=parallel,
            offload=fsdp and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true",
            sizes={name: _size(f"PARALLELISM_CONFIG_{name.upper()}_SIZE") if parallel else 1 for name in _SIZES},
        )

    def check(self, tp_size: int, ep_size: int) -> None:
        """Raise ValueError if a setting is not allowed, whatever the number of processes is."""
        for name, size in (("tp_size", tp_size), ("ep_size", ep_size)):
            if size < 1:
                raise ValueError(f"{name}={size} is not allowed: it must be at least 1.")
        for name in ("cp", "sp"):
            if self.sizes[name] > 1:
                raise ValueError(
                    f"parallelism_config_{name}_size={self.sizes[name]} is not allowed: sequences are not divided."
                )
        if self.fsdp:
            _check_fsdp()
        if self.offload and self.processes == 1:
            raise ValueError("fsdp_offload_params=true is not allowed for one process: it takes at least two.")
        if self.processes == 1 and max(tp_size, ep_size) > 1:
            raise ValueError(
                f"tp_size={tp_size}, ep_size={ep_size} is not allowed for one process: start several with accelerate "
                "launch or torchrun."
            )


def _size(variable: str) -> int:
    return max(1, int(os.environ.get(variable, "1")))


def _check_fsdp() -> None:
    for variable, default, allowed, instead in (
        ("FSDP_VERSION", "1", "2", "set fsdp_version: 2"),
        ("FSDP_RESHARD_AFTER_FORWARD", "true", "true", "leave fsdp_reshard_after_forward: true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "false", "false", "use TrainingArguments(gradient_checkpointing=True)"),
    ):
        value = os.environ.get(variable, default).lower()
        if value != allowed:
            raise ValueError(f"{variable.lower()}={value} is not allowed with loading into shards: {instead}.")


__all__ = ["sharding_of_launch"]
