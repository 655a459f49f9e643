"""Run under torchrun: one training step of a model that is sharded while it is loaded; save the bytes that it sends
by the kind of the collective, rings assumed. Arguments: checkpoint, file to write, sharding as JSON, full or lora."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from peft import get_peft_model
from ranks import leave

from modeling_deepseekmoe import expert_lora_config

# Of a collective of n ranks: which of its tensors is the whole, and how often (n - 1) / n of it is sent.
KINDS = {"all_?gather": (max, 1), "reduce_?scatter": (max, 1), "all_?reduce": (max, 2), "all_?to_?all": (min, 1)}


class Counting(TorchDispatchMode):
    """Adds up what the collectives move."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.replace("_", "")
            for kind, (whole, times) in KINDS.items():
                if kind.replace("_?", "") in name:
                    tensors = [leaf for leaf in tree_leaves((args, output)) if isinstance(leaf, torch.Tensor)]
                    size = whole(tensor.numel() * tensor.itemsize for tensor in tensors)
                    self.sent[kind.replace("_?", "_")] += (
                        times * size * (dist.get_world_size() - 1) / dist.get_world_size()
                    )
        return output


folder, output, sharding, method = sys.argv[1:]
torch.set_num_threads(1)
spread = DistributedConfig(**json.loads(sharding))
model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=spread).train()
if method == "lora":
    model = get_peft_model(model, expert_lora_config(model, r=4, target_modules=("self_attn", "shared_experts")))
rows = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
with Counting() as counting:
    loss = model(rows, labels=rows).loss
    loss.backward()
    for parameter in model.parameters():  # what Trainer does
        if method == "lora" and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
if dist.get_rank() == 0:
    torch.save(dict(counting.sent), output)
leave()
