"""Run under torchrun: spread a checkpoint over the ranks, and save what one of them computes.

That is logits, generated tokens, the losses of multi-token prediction if there are any, the number of layers here, the
shape of a shard of the experts and, under expert parallelism alone, its gradient.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from ranks import leave

import modeling_deepseekmoe
from modeling_deepseekmoe import experts
from modeling_deepseekmoe.modeling_pretrained import DeepseekMoeDecoderLayer

folder, output, options, settings, loop_from, fields = sys.argv[1:]
experts.LOOP_FROM = int(loop_from)
modeling_deepseekmoe.register(override_native=True)
distributed_config = DistributedConfig(**json.loads(options))
model = AutoModelForCausalLM.from_pretrained(
    folder, distributed_config=distributed_config, **json.loads(fields)
).eval()
input_ids = torch.arange(24).view(2, 12) * 3
with torch.no_grad():
    logits = model(input_ids).logits
    generated = model.generate(input_ids[:1], attention_mask=torch.ones_like(input_ids[:1]), **json.loads(settings))
logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
layers = sum(isinstance(layer, DeepseekMoeDecoderLayer) for layer in model.model.layers)  # of this pipeline stage
shard = gradient = mtp_loss = None
if model.config.mtp:
    with torch.no_grad():
        mtp_loss = model(input_ids, labels=input_ids).mtp_loss
    mtp_loss = mtp_loss.full_tensor() if hasattr(mtp_loss, "full_tensor") else mtp_loss
if "pp_size" not in options:
    stack = model.model.layers[-1].mlp.experts.gate_up_proj
    shard = tuple((stack.to_local() if hasattr(stack, "to_local") else stack).shape)
if "ep_size" in options and "fsdp_size" not in options:
    outputs = model(input_ids, labels=input_ids)
    loss = outputs.loss if outputs.mtp_loss is None else outputs.mtp_loss.sum()
    (loss.full_tensor() if hasattr(loss, "full_tensor") else loss).backward()
    gradient = stack.grad.to_local() if hasattr(stack.grad, "to_local") else stack.grad
if dist.get_rank() == 0:
    found = {"logits": logits, "generated": generated, "shard": shard, "gradient": gradient, "layers": layers}
    torch.save({**found, "mtp_loss": mtp_loss}, output)
leave()
