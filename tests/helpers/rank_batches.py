"""What one of two ranks trains on, and a run of Trainer, for the tests of added balance losses."""

from pathlib import Path
from typing import Any

import torch
from family_models import tiny_model
from transformers import Trainer, TrainingArguments

from modeling_deepseekmoe import RouterStatsCallback, add_auxiliary_loss

COEFFICIENTS = {"expert": 0.5, "device": 0.3, "sequence": 0.2, "z": 0.01}
SHAPES = ((3, 8), (2, 11))  # of the ranks' batches


def batch_of(rank: int, number: int = 0) -> dict[str, torch.Tensor]:
    """A rank's own batch: other rows, other lengths, other padding."""
    generator = torch.Generator().manual_seed(10 * number + rank)
    rows, length = SHAPES[rank]
    ids = torch.randint(3, 100, (rows, length), generator=generator)
    lengths = torch.randint(3, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length)[None] < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(folder: Path, rank_batch: int, accumulate: int) -> dict[str, Any]:
    """transformers' Trainer, two steps, on rows of several lengths."""
    model = tiny_model("glm4_moe")
    add_auxiliary_loss(model, **COEFFICIENTS, num_devices=2)
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=rank_batch, gradient_accumulation_steps=accumulate,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1, optim="sgd",
        learning_rate=0.05, max_grad_norm=0.0, lr_scheduler_type="constant", seed=7,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, 100, (16, 8), generator=generator)
    masks = (torch.arange(8)[None] < torch.randint(3, 9, (16, 1), generator=generator)).long()
    data = [
        {"input_ids": row, "attention_mask": mask, "labels": row.masked_fill(mask == 0, -100)}
        for row, mask in zip(rows, masks, strict=True)
    ]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[RouterStatsCallback()])
    trainer.train()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"parameters": parameters, "logs": trainer.state.log_history[:2]}
