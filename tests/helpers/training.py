"""Real text and Trainer runs."""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from native_models import biases
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class Rows(Dataset):
    """Rows of a dictionary of tensors."""

    def __init__(self, **columns: torch.Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def reference_text(rows: int, length: int) -> torch.Tensor:
    """Pages of Python's language reference as characters (rows, length), ids 3 to 95."""
    text = "".join(topics[name] for name in sorted(topics))[: rows * length]
    ids = torch.tensor([min(max(ord(character) - 32, 0), 92) + 3 for character in text])
    return ids.view(rows, length)


def arguments(folder: Path, **kwargs: object) -> TrainingArguments:
    defaults = {"output_dir": str(folder), "report_to": "none", "save_strategy": "no", "logging_steps": 1,
                "per_device_train_batch_size": 4, "learning_rate": 3e-3, "use_cpu": True, "disable_tqdm": True,
                "seed": 7}  # fmt: skip
    return TrainingArguments(**{**defaults, **kwargs})


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


class StopAt(TrainerCallback):
    """Interrupts training after some steps, as a killed job whose last checkpoint is that step's."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


rows = reference_text(32, 24)
data = Rows(input_ids=rows, labels=rows)


class Recorder(TrainerCallback):
    """Keeps the biases after every step, and what reporters would see."""

    def __init__(self) -> None:
        self.biases: list[list[torch.Tensor]] = []
        self.logs: list[dict] = []

    def on_step_end(self, *args: object, model: nn.Module, **kwargs: object) -> None:
        self.biases.append(biases(model))

    def on_log(self, *args: object, logs: dict, **kwargs: object) -> None:
        self.logs.append(dict(logs))


def train(model: nn.Module, folder: Path, callback: TrainerCallback, **kwargs: object) -> tuple[Trainer, Recorder]:
    recorder = Recorder()
    trainer = Trainer(model, arguments(folder, **kwargs), train_dataset=data, callbacks=[callback, recorder])
    trainer.train()
    return trainer, recorder
