"""Train multi-token prediction under torchrun, and save what the ranks find.

Arguments: the file to write and the cases, each a wrapper and options with colons between them. For each case the file
holds the losses of both ranks, the gradients (put together), the counts of the gates and what is logged.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from mtp_models import batch_of, model_of
from ranks import leave

from modeling_deepseekmoe import DeepseekMoeForCausalLM, take_router_load


def wrapped(model: DeepseekMoeForCausalLM, how: str, options: list[str]) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if "groups" in options:  # the decoder, and the head, by themselves
        fully_shard(model.model)
        fully_shard(model.lm_head)
    return fully_shard(model)


def run(case: str, rank: int) -> dict[str, Any]:
    how, *options = case.split(":")
    model = model_of(detach="detach" in options)
    if "checkpointing" in options:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [batch_of(one) for one in range(2)]
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    # As Trainer does: the sum over all items of the batch, and the mean over the ranks, which it undoes.
    wrapper = wrapped(model, how, options)  # DDP must live until the backward pass has ended
    loss = wrapper(**batches[rank], num_items_in_batch=items).loss
    (loss * 2).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    whole = {key: g.full_tensor() if isinstance(g, DTensor) else g for key, g in gradients.items()}
    losses: list[Any] = [None, None]
    dist.all_gather_object(losses, float(loss))
    return {
        "loss": sum(losses),
        "gradients": whole,
        "counts": take_router_load(model).tokens_per_expert,
        "logged": model.model.mtp_statistics.take(),
    }


def main() -> None:
    file, *cases = sys.argv[1:]
    dist.init_process_group("gloo")
    found = {case: run(case, dist.get_rank()) for case in cases}
    if dist.get_rank() == 0:
        torch.save(found, file)
    leave()


if __name__ == "__main__":
    main()
