"""Train for five steps, alone or under torchrun, and save the counts and biases of every step, which all ranks must
share. Arguments: how (plain, ddp, fsdp2, trainer), the file to write, and `ragged` for rows of different lengths (then
the weights stay as they are, since means of micro-batches are no means of tokens)."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from conftest import TINY, V3_LIKE
from ranks import leave

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM, LoadBalancingCallback, update_router_bias
from modeling_deepseekmoe.balancing.gates import find_biased_gates

STEPS, GLOBAL_BATCH, ACCUMULATE, RATE = 5, 8, 2, 0.01


class StepRecorder(TrainerCallback):
    """Keeps the biases after every step."""

    def __init__(self) -> None:
        self.biases: list[torch.Tensor] = []

    def on_step_end(self, *args: object, model: nn.Module, **kwargs: object) -> None:
        self.biases.append(torch.stack([gate.bias.clone() for gate in find_biased_gates(model)]))


def train_plainly(how: str, model: nn.Module, rows: torch.Tensor, rank: int, ranks: int, rate: float) -> dict:
    """A loop: every rank takes its share of each micro-batch."""
    wrapped: nn.Module = model
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    elif how == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    counts, biases = [], []
    for step in rows.view(STEPS, GLOBAL_BATCH, -1):
        for part in step.chunk(ACCUMULATE):
            mine = part.chunk(ranks)[rank]
            mask = (mine != 0).long()
            (wrapped(mine, attention_mask=mask, labels=mine).loss / ACCUMULATE).backward()
        optimizer.step()
        optimizer.zero_grad()
        load = update_router_bias(wrapped, RATE)
        assert load.micro_batches == ACCUMULATE * ranks and load.tokens == (step != 0).sum()
        counts.append(load.tokens_per_expert)
        biases.append(torch.stack([gate.bias.clone() for gate in find_biased_gates(wrapped)]))
    return {"counts": torch.stack(counts), "biases": torch.stack(biases)}


def train_with_trainer(model: nn.Module, rows: torch.Tensor, ranks: int) -> dict:
    """transformers' Trainer, which wraps the model in DDP where there are several ranks."""
    from training import Rows

    recorder, balancing = StepRecorder(), LoadBalancingCallback(RATE)
    arguments = TrainingArguments(
        "unused", max_steps=STEPS, per_device_train_batch_size=GLOBAL_BATCH // ranks // ACCUMULATE, report_to="none",
        gradient_accumulation_steps=ACCUMULATE, save_strategy="no", use_cpu=True, learning_rate=1e-2, logging_steps=1,
        disable_tqdm=True, seed=7, ddp_find_unused_parameters=True,
    )  # fmt: skip
    data = Rows(input_ids=rows, labels=rows, attention_mask=(rows != 0).long())
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[balancing, recorder])
    trainer.train()
    violations = [row["router/max_violation_batch"] for row in trainer.state.log_history[:STEPS]]
    return {"biases": torch.stack(recorder.biases), "violations": violations}


def main() -> None:
    how, output, *options = sys.argv[1:]
    ragged = "ragged" in options
    torch.set_num_threads(1)
    if how in ("ddp", "fsdp2"):
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DeepseekMoeForCausalLM(DeepseekMoeConfig(**{**TINY, **V3_LIKE, "sequence_balance_alpha": 0.01})).train()
    rows = torch.randint(3, 96, (STEPS * GLOBAL_BATCH, 16), generator=torch.Generator().manual_seed(3))
    if ragged:
        lengths = torch.randint(2, 17, (len(rows), 1), generator=torch.Generator().manual_seed(4))
        rows *= torch.arange(16)[None] < lengths
    else:
        rows[:, 12:] = 0  # the same padding everywhere, so that means of micro-batches are means of tokens
    if how == "trainer":
        found = train_with_trainer(model, rows, int(os.environ.get("WORLD_SIZE", "1")))
    else:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        found = train_plainly(how, model, rows, dist.get_rank() if ranks > 1 else 0, ranks, 0.0 if ragged else 1e-2)
    if dist.is_initialized():
        others: list[dict] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(others, found)
        for other in others:
            assert all(torch.equal(other[key], found[key]) for key in found if isinstance(found[key], torch.Tensor))
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(found, output)
    if dist.is_initialized():
        leave()


if __name__ == "__main__":
    main()
