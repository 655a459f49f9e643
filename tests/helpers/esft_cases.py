"""A selection of experts, and a short training of them."""

import torch
from lora_cases import IDS
from torch import nn

SELECTION = {1: [6, 0], 2: [3]}


def train(model: nn.Module, steps: int = 3) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.randint(3, 96, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}
