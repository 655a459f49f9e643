"""Train with ShardedTrainer, alone or under torchrun, and save what happened. The one argument is JSON:

checkpoint    folder to load from
output        the trainer's folder; `<output>.pt` gets losses, gradient norms, metrics, biases and counts of every
              step
sharding      arguments of a DistributedConfig; {} for DDP, or for one process
what          "full", "lora" (experts, shared experts and attention), "esft" (three experts), or "gathered": full,
              saved by save_pretrained
steps, save   how many steps, and after which number of steps a checkpoint is written; 0: none
resume        go on from the last complete checkpoint
hurt          [rank, step, how]: what happens to that rank when the step begins: "kill", "hang"; or when a checkpoint
              is written after it: "kill-writing" the weights, "kill-saving" the optimizer
timeout       seconds after which a rank gives up waiting for the others
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from peft import get_peft_model
from ranks import leave
from training import Rows

from modeling_deepseekmoe import (
    LoadBalancingCallback,
    RouterStatsCallback,
    ShardedTrainer,
    expert_lora_config,
    prepare_esft,
)
from modeling_deepseekmoe.balancing.gates import find_biased_gates
from modeling_deepseekmoe.router_load import RouterLoad
from modeling_deepseekmoe.sharding import files as sharded_files
from modeling_deepseekmoe.sharding import trainer as sharded_training

STEPS, GLOBAL_BATCH, ACCUMULATE = 5, 8, 2


class Steps(TrainerCallback):
    """Keeps counts and biases of every step."""

    def __init__(self, balancing: RouterStatsCallback) -> None:
        self.counts: list[torch.Tensor] = []
        self.biases: list[torch.Tensor] = []
        take = balancing._take

        def keep(state: Any, model: nn.Module, optimizer: Any) -> RouterLoad:
            load = take(state, model, optimizer)
            self.counts.append(load.tokens_per_expert.clone())
            gates = [gate.whole_bias().clone() for gate in find_biased_gates(model)]
            self.biases.append(torch.stack(gates) if gates else torch.zeros(0))
            return load

        balancing._take = keep


class Hurt(TrainerCallback):
    """Ends or stops this rank when a step begins."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.step:
            return
        if self.how == "kill-writing":
            sharded_files.whole_tensor = lambda tensor: os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "kill-saving":
            sharded_training.save_optimizer_distributed = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.SIGSTOP if self.how == "hang" else signal.SIGKILL)


def main(settings: dict[str, Any]) -> None:
    """Train as this rank's part of all ranks."""
    torch.set_num_threads(1)
    sharding, ranks = settings["sharding"], int(os.environ.get("WORLD_SIZE", "1"))
    batches = ranks // sharding.get("tp_size", 1)
    output = Path(settings["output"])
    arguments = TrainingArguments(
        str(output), max_steps=settings.get("steps", STEPS), gradient_accumulation_steps=ACCUMULATE,
        per_device_train_batch_size=GLOBAL_BATCH // batches // ACCUMULATE,
        save_strategy="steps" if settings.get("save") else "no",
        save_steps=settings.get("save") or 500, use_cpu=True, learning_rate=1e-3, lr_scheduler_type="constant",
        logging_steps=1, disable_tqdm=True, seed=7, report_to="none", ddp_timeout=settings.get("timeout", 120),
    )  # fmt: skip
    if sharding.get("tp_size", 1) > 1:  # what accelerate refuses on the CPU alone, and on no GPU
        ParallelismConfig._validate_accelerator = lambda *arguments: None
    spread = {"distributed_config": DistributedConfig(**sharding)} if sharding and ranks > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(settings["checkpoint"], **spread)
    if settings.get("what") == "lora":
        torch.manual_seed(0)
        model = get_peft_model(
            model,
            expert_lora_config(model, r=4, target_modules=("self_attn", "shared_experts"), init_lora_weights=False),
        )
    elif settings.get("what") == "esft":
        prepare_esft(model, {1: [0, 6], 2: [3]})
    rows = torch.randint(3, 96, (STEPS * GLOBAL_BATCH, 16), generator=torch.Generator().manual_seed(3))
    rows[:, 12:] = 0
    data = Rows(input_ids=rows, labels=rows.masked_fill(rows == 0, -100), attention_mask=(rows != 0).long())
    biased = model.config.topk_method == "noaux_tc"
    balancing = LoadBalancingCallback(update_rate=0.01) if biased else RouterStatsCallback()
    kept = Steps(balancing)
    trainer = ShardedTrainer(model, arguments, train_dataset=data, callbacks=[balancing])
    if "hurt" in settings and settings["hurt"][0] == arguments.process_index:
        trainer.add_callback(Hurt(*settings["hurt"][1:]))
    trainer.train(resume_from_checkpoint=settings.get("resume", False))
    if settings.get("save"):
        if settings.get("what") == "gathered":
            model.save_pretrained(output / "final", is_main_process=arguments.process_index == 0)
        else:
            trainer.save_model(str(output / "final"))
    steps = [row for row in trainer.state.log_history if "loss" in row]
    names = ("loss", "grad_norm", "aux_loss", "router/max_violation_batch")
    found = {name: torch.tensor([row[name] for row in steps]) for name in names}
    found |= {"counts": torch.stack(kept.counts), "biases": torch.stack(kept.biases)}
    if arguments.process_index == 0:
        torch.save(found, f"{output}.pt")
    if dist.is_initialized():
        leave()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
