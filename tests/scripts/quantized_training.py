"""Take the gradients of adapters over quantised experts on two ranks, under torchrun, and save them.

Arguments: the folder of the model, the file to write: the gradients under DDP and under FSDP2.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from packaging import version
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from peft import get_peft_model
from quantized_models import IDS, load
from ranks import leave

from modeling_deepseekmoe import expert_lora_config


def gradients(folder: str, how: str) -> dict[str, torch.Tensor]:
    """Those of this rank's row, averaged over the ranks."""
    torch.manual_seed(2)
    quantised = load(Path(folder), "mxfp4")
    model = get_peft_model(quantised, expert_lora_config(quantised, r=2, init_lora_weights=False))
    wrapped = model
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for layer in quantised.model.layers:
            fully_shard(layer)
        fully_shard(model)
    row = IDS[dist.get_rank()][None]
    wrapped(row, labels=row).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    folder, file = sys.argv[1:]
    dist.init_process_group("gloo")
    # FSDP2 of torch 2.11 takes no parameters that are integers.
    ways = ("ddp", "fsdp2") if version.parse(torch.__version__) >= version.parse("2.13") else ("ddp",)
    found = {how: gradients(folder, how) for how in ways}
    if dist.get_rank() == 0:
        torch.save(found, file)
    leave()


if __name__ == "__main__":
    main()
