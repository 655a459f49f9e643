"""Train adapters, or selected experts, for three steps, alone or under torchrun, and save losses and trained weights.

Arguments: what (lora, esft), how (plain, ddp, fsdp2), the folder to write."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from conftest import TINY
from peft import get_peft_model
from ranks import leave

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM, expert_lora_config, prepare_esft, save_esft

STEPS, GLOBAL_BATCH = 3, 4


def train(what: str, how: str, folder: str) -> None:
    """As this rank's part of all ranks."""
    rank, ranks = 0, 1
    if how != "plain":
        dist.init_process_group("gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model: nn.Module = DeepseekMoeForCausalLM(DeepseekMoeConfig(**{**TINY, "aux_loss_alpha": 0.0}))
    if what == "lora":
        model = get_peft_model(model, expert_lora_config(model, r=4, target_modules=("self_attn", "shared_experts")))
        layers = model.base_model.model.model.layers
    else:
        prepare_esft(model, {1: [0, 6], 2: [3]})
        layers = model.model.layers
    model.train()
    wrapped: nn.Module = model
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    elif how == "fsdp2":
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    rows = torch.randint(3, 96, (GLOBAL_BATCH, 16), generator=torch.Generator().manual_seed(3))
    mine, losses = rows.chunk(ranks)[rank], []
    for _ in range(STEPS):
        loss = wrapped(mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(total)
        losses.append(total)
    trained = {
        name: p.full_tensor() if how == "fsdp2" else p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    if what == "lora":
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) if ranks > 1 else None
        if rank == 0:
            model.save_pretrained(folder, state_dict=state)
    else:
        save_esft(model, Path(folder) / "esft", is_main_process=rank == 0)
    if rank == 0:
        torch.save({"losses": torch.stack(losses), "trained": trained}, Path(folder) / "found.pt")
    if ranks > 1:
        leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(*sys.argv[1:])
