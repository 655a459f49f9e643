"""Train small models from scratch: the steps that the benchmarks share."""

import math
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedModel


def training_steps(
    model: PreTrainedModel, batches: Iterable[torch.Tensor], *, steps: int, learning_rate: float
) -> Iterator[None]:
    """Make an optimizer step with every batch (B, S) of token ids, and yield after it.

    AdamW, gradients of norm 1 at most. The learning rate rises for 5% of the steps and falls to 0 as a cosine.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))),
    )
    for batch in batches:
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield
