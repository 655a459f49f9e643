"""Train a model of another package with added balance losses under torchrun, and save what the ranks find.

Arguments: the file to write and the cases. A case is a wrapper (`ddp`, `fsdp2`), a family and options, with colons
between them. For each case the file holds the losses of every rank, the gradients (put together) and the counts. The
case `trainer` is a run of Trainer.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from family_models import tiny_model
from rank_batches import COEFFICIENTS, batch_of, train
from ranks import leave

from modeling_deepseekmoe import add_auxiliary_loss, take_router_load, track_router_load


def sharded(model: nn.Module, options: list[str]) -> nn.Module:
    # Computing in another dtype than what passes from layer to layer, without rounding anything.
    policy = MixedPrecisionPolicy(torch.float64, output_dtype=torch.float32)
    more: dict[str, Any] = {"mp_policy": policy} if "casts" in options else {}
    for index, layer in enumerate(model.model.layers):
        if "wrapper" in options:  # as accelerate does for `activation_checkpointing` of FSDP
            model.model.layers[index] = checkpoint_wrapper(layer, preserve_rng_state=False)
        fully_shard(layer, **more)
    return fully_shard(model, **more)


def run(case: str, rank: int) -> dict[str, Any]:
    how, name, *options = case.split(":")
    model = tiny_model(name).train()
    model.set_experts_implementation("eager")
    if "checkpointing" in options:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if "late" not in options:
        add_auxiliary_loss(model, **COEFFICIENTS, num_devices=2)
    if how == "ddp":
        wrapped = DistributedDataParallel(model, find_unused_parameters="unused" in options)
    else:
        wrapped = sharded(model, options)
    if "late" in options:
        add_auxiliary_loss(model, **COEFFICIENTS, num_devices=2)
    track_router_load(wrapped)
    outputs = wrapped(**batch_of(rank), use_cache=False)
    outputs.loss.backward()
    named = {key.replace("._checkpoint_wrapped_module", ""): p for key, p in model.named_parameters()}
    gradients = {key: p.grad for key, p in named.items() if p.grad is not None}
    gradients = {key: g.full_tensor() if isinstance(g, DTensor) else g for key, g in gradients.items()}
    of_ranks: list[Any] = [None, None]
    dist.all_gather_object(of_ranks, (outputs.loss.item(), outputs.aux_loss.item()))
    load = take_router_load(wrapped)
    return {"losses": of_ranks, "gradients": gradients, "counts": load.tokens_per_expert, "tokens": load.tokens,
            "logged": load.losses.sum()}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    file, *cases = sys.argv[1:]
    dist.init_process_group("gloo")
    folder = Path(file).parent
    found = {case: train(folder, 2, 2) if case == "trainer" else run(case, dist.get_rank()) for case in cases}
    if dist.get_rank() == 0:
        torch.save(found, file)
    leave()


if __name__ == "__main__":
    main()
