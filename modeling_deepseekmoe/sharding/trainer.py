# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Train models that are sharded over ranks: all ranks write a checkpoint, and any number of ranks resumes it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

from ..esft.layer import SelectedExperts
from ..support.library_support import has_adapters
from ..support.models import is_sharded
from ..torch_support import set_group_timeout
from ..transformers_support import (
    PREFIX_CHECKPOINT_DIR,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
    SaveStrategy,
    load_optimizer_distributed,
    save_optimizer_distributed,
)
from .files import save_sharded

OPTIMIZER_FOLDER = "optimizer"


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Find the last complete checkpoint in a Trainer's output folder; return `None` if there is none.

    A checkpoint is complete if its `trainer_state.json` is there and can be read: Trainer writes this file last.

    Args:
        folder: `TrainingArguments.output_dir`.
    """
    by_step = {}
    for checkpoint in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit():
            by_step[int(step)] = checkpoint
    newest_first = (by_step[step] for step in sorted(by_step, reverse=True))
    return next((str(checkpoint) for checkpoint in newest_first if _is_complete(checkpoint)), None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


class ShardedTrainer(Trainer):
    """transformers' Trainer, with checkpoints for models that are sharded over ranks.

    The model may be sharded while it is loaded (`from_pretrained(distributed_config=...)`), wrapped by DDP, or whole.
    A checkpoint holds the weights in the official layout, and every rank writes some of the files ([`save_sharded`]).
    The folder `optimizer` holds the optimizer's state by parameter. A checkpoint resumes on any number of ranks, in
    any layout of them; transformers has no support for this. `train(resume_from_checkpoint=True)` takes the last
    complete checkpoint. Gradients of accumulated micro-batches are reduced one by one, unless `accelerator_config`
    says otherwise. Under accelerate's own FSDP and under DeepSpeed, checkpoints stay as these write them. To use this
    with another trainer that is built on Trainer, write `class Mine(ShardedTrainer, SFTTrainer)`.

    Raises:
        ValueError: if the arguments know of fewer processes than were launched.
    """

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if args is not None and args.world_size < launched:
            raise ValueError(
                f"TrainingArguments.world_size={args.world_size} is not allowed where {launched} processes were "
                "launched: every one would train alone. Without a GPU, set TrainingArguments(use_cpu=True)."
            )
        refused = args is not None and getattr(model, "is_distributed_loading_by_transformers", False)
        strategy = getattr(args, "save_strategy", None)
        if refused:
            args.save_strategy = SaveStrategy.NO  # Trainer refuses to save the optimizer of such a model: here it can
            # Otherwise every rank keeps the whole model's gradients until the last micro-batch.
            if args.accelerator_config.gradient_accumulation_kwargs is None:
                args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}
        try:
            super().__init__(model, args, **kwargs)
        finally:
            if refused:
                args.save_strategy = strategy
        if refused:
            self.args.save_strategy = strategy  # TRL makes arguments of its own of other ones
            self._refuse_offloading()

    def _refuse_offloading(self) -> None:
        beside = [name for name, p in self.model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if beside and self.model.config.distributed_config.fsdp_cpu_offload:
            raise ValueError(
                f"fsdp_offload_params=true is not allowed with adapters or selected experts ({beside[0]}): they lie "
                "beside what is offloaded."
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as Trainer does. With `resume_from_checkpoint=True`, go on from the last complete checkpoint.

        Raises:
            ValueError: if there is no checkpoint to resume from.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint=True: {self.args.output_dir} has no complete checkpoint.")
        set_timeout(self.model, self.args.ddp_timeout)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except Exception as error:
            if self.args.world_size > 1:
                error.add_note(self._what_now())
            raise

    def _what_now(self) -> str:
        last = last_complete_checkpoint(self.args.output_dir)
        advice = "there is no complete checkpoint yet"
        if last is not None:
            advice = f"the last complete checkpoint is {last}: resume_from_checkpoint=True goes on from it"
        return (
            f"Rank {self.args.process_index} of {self.args.world_size} stopped after step {self.state.global_step}. "
            f"A broken connection or a timeout (ddp_timeout={self.args.ddp_timeout} s) means that another rank ended "
            f"or hangs: look for its message. In {self.args.output_dir} {advice}."
        )

    @property
    def _own_checkpoints(self) -> bool:
        return not (self.is_deepspeed_enabled or self.is_fsdp_enabled)

    @property
    def _sharded_at_loading(self) -> bool:
        """Whether no process holds the whole weights. Adapters are whole on every rank, so PEFT writes their files."""
        sharded = getattr(self.model, "is_distributed_loading_by_transformers", False)
        whole = isinstance(self.model, PreTrainedModel) and not has_adapters(self.model)
        return bool(self._own_checkpoints and sharded and whole)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the model as Trainer does, and a sharded one with [`save_sharded`]. Then all ranks must call this."""
        folder = Path(output_dir or self.args.output_dir)
        # Training begins every checkpoint with this. One of the same step that is there is incomplete from now on.
        if self.is_in_train and folder.name == f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}":
            if self.args.should_save:
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
        super().save_model(output_dir, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self._sharded_at_loading:
            return super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        save_sharded(self.model, folder)
        if self.args.should_save:
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
        return None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._own_checkpoints:
            return super()._save_optimizer_and_scheduler(output_dir)
        folder = Path(output_dir) / OPTIMIZER_FOLDER
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run may have left
        self.accelerator.wait_for_everyone()
        with _without_empty_groups(self._plain_optimizer) as optimizer:
            save_optimizer_distributed(self.model, optimizer, str(folder))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._own_checkpoints:
            return super()._load_optimizer_and_scheduler(checkpoint)
        folder = Path(checkpoint) / OPTIMIZER_FOLDER
        if not folder.is_dir():
            if is_sharded(self.model):
                raise ValueError(
                    f"{checkpoint} is not allowed: it has no folder {folder.name}. Another trainer wrote it, or "
                    "save_only_model=True left the optimizer's state out."
                )
            return super()._load_optimizer_and_scheduler(checkpoint)
        with _without_empty_groups(self._plain_optimizer) as optimizer:
            load_optimizer_distributed(self.model, optimizer, str(folder))
        state = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        # Another layout of the ranks divides the same parameters into other groups, of the same learning rates.
        groups = len(self._plain_optimizer.param_groups)
        earlier = len(state.get("base_lrs", range(groups)))
        if earlier != groups:
            of_groups = {name for name, value in state.items() if isinstance(value, list) and len(value) == earlier}
            state = {name: value for name, value in state.items() if name not in of_groups}
            if "lr_lambdas" in of_groups:
                state["lr_lambdas"] = [None] * groups
        self.lr_scheduler.load_state_dict(state)
        return None

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._sharded_at_loading:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_in_place(self.model, resume_from_checkpoint)
        return None

    def _load_best_model(self) -> None:
        if not self._sharded_at_loading:
            return super()._load_best_model()
        load_in_place(self.model, self.state.best_model_checkpoint)
        return None


def set_timeout(model: nn.Module, seconds: float) -> None:
    """Set how many seconds the ranks of a sharded model wait for each other.

    The model's own groups are made with torch's default (half an hour under gloo, ten minutes under NCCL), whatever
    the timeout of the first group is.
    """
    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    groups = {group for mesh in meshes for group in mesh.get_all_groups()}
    for group in {*groups, dist.group.WORLD} if groups else ():
        set_group_timeout(group, seconds)


@contextmanager
def _without_empty_groups(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """Take parameter groups without parameters out of an optimizer, and put them back at the end.

    Trainer may make such groups. torch's distributed state dicts cannot hold them.
    """
    empty = [(idx, group) for idx, group in enumerate(optimizer.param_groups) if not group["params"]]
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    try:
        yield optimizer
    finally:
        for idx, group in empty:
            optimizer.param_groups.insert(idx, group)


@torch.no_grad()
def load_in_place(model: PreTrainedModel, folder: str | Path) -> None:
    """Load another checkpoint into a model that was sharded while it was loaded. Every rank loads its own part.

    Meanwhile a second model, sharded in the same way, is in memory. Gradients and the optimizer's state need more
    memory, but do not exist before training begins.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if isinstance(parameter, DTensor)}
    other = type(model).from_pretrained(
        folder,
        distributed_config=model.config.distributed_config,
        dtype=torch.float32 if torch.float32 in dtypes else model.dtype,
    )
    source = other.state_dict()
    for name, target in model.state_dict().items():
        target.copy_(source.pop(name))
    for module in model.modules():
        if isinstance(module, SelectedExperts):
            module.read_again()


__all__ = ["ShardedTrainer", "last_complete_checkpoint", "load_in_place"]
