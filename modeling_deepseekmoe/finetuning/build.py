# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Build what trains: the model with its adapters or selected experts, and TRL's trainer.

The settings are plain dicts, so that a written script has the same ones.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed

from ..balancing.callbacks import LoadBalancingCallback, RouterStatsCallback
from ..balancing.gates import find_biased_gates
from ..esft.layer import prepare_esft
from ..esft.scoring import score_experts, select_experts
from ..esft.selection import ExpertSelection
from ..families.linear_maps import linear_names
from ..lora.config import expert_lora_config
from .data import TrainingData, as_dataset, order_examples, sequences_of
from .encoding import Example
from .fitting import Machine
from .options import ADAPTERS, FinetuneOptions

CORRECTION_TOKENS = 8192  # that the correction of quantised experts is made from
# Names of what is adapted beside the experts, where a model has it.
_TARGETS = ("self_attn", "shared_experts", "shared_expert")


def default_targets(model: nn.Module) -> list[str]:
    """Return what is adapted beside the experts unless the user names it: attention and shared experts."""
    names = [f".{name}." for name in linear_names(model)]
    return [target for target in _TARGETS if any(f".{target}." in name for name in names)]


def lora_settings(options: FinetuneOptions) -> dict[str, Any]:
    """Return the arguments of [`expert_lora_config`] that differ from its own defaults, of decided options."""
    settings: dict[str, Any] = {"r": options.rank, "target_modules": tuple(options.target_modules or ())}
    if options.alpha is not None:
        settings["lora_alpha"] = options.alpha
    if options.dropout:
        settings["lora_dropout"] = options.dropout
    if options.train_router:
        settings["train_router"] = True
    return settings


def trainer_settings(options: FinetuneOptions, machine: Machine, evaluates: bool) -> dict[str, Any]:
    """Return the arguments of TRL's `SFTConfig`, of decided options.

    Args:
        options: what is trained, and how.
        machine: where.
        evaluates: whether there is something to evaluate on.
    """
    schedules = {"constant": "constant_with_warmup"}
    order: dict[str, Any] = {"train_sampling_strategy": "sequential", "num_train_epochs": 1, "max_length": None}
    if options.packing:  # TRL packs what it gets
        order = {"num_train_epochs": options.epochs, "max_steps": options.max_steps or -1,
                 "max_length": options.max_length, "packing": True, "eval_packing": False}  # fmt: skip
    settings: dict[str, Any] = {
        "output_dir": str(Path(options.output) / "checkpoints"),
        **order,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": schedules.get(options.schedule, options.schedule),
        "warmup_steps": options.warmup,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "seed": options.seed,
        "bf16": machine.bfloat16,
        "gradient_checkpointing": bool(options.recompute),
        "use_cpu": machine.gpu is None,
        "dataloader_pin_memory": machine.gpu is not None,
        "logging_steps": options.logging_steps,
        "save_steps": _steps(options.save_steps),
        "save_total_limit": 2,
        "report_to": options.report_to,
        "disable_tqdm": True,
    }
    if options.router_aux_loss_coef is not None:
        settings["router_aux_loss_coef"] = options.router_aux_loss_coef
    if evaluates and options.eval_steps:
        settings |= {"eval_strategy": "steps", "eval_steps": _steps(options.eval_steps)}
    return settings


def _steps(number: float) -> float:
    """Return whole steps as a whole number: Trainer takes what is below 1 for a share."""
    return number if number < 1 else round(number)


def load_model(options: FinetuneOptions, machine: Machine) -> Any:
    """Load the model on its device, with this package's classes, and with quantised experts for `qlora`.

    Raises:
        ValueError, OSError: as `from_pretrained` does.
    """
    from transformers import AutoModelForCausalLM

    from ..integrations.native_gates import add_balancing_bias
    from ..integrations.registration import register
    from ..support.folders import local_folder

    register(override_native=True)
    settings: dict[str, Any] = {"dtype": getattr(torch, options.dtype), "device_map": machine.device}
    if options.method == "qlora":
        from ..quantization.config import StackedExpertsConfig

        settings["quantization_config"] = StackedExpertsConfig(format=options.format)
    model = AutoModelForCausalLM.from_pretrained(options.model, **settings)
    if getattr(model.config, "added_balancing_bias", False):
        add_balancing_bias(model, local_folder(options.model))
    return model


def select_by_data(model: nn.Module, examples: Iterable[Example], options: FinetuneOptions) -> ExpertSelection:
    """Score the experts on sequences, one after the other, and select the best of every layer."""
    scores = score_experts(model, _batches(examples), options.score, max_tokens=options.score_tokens)
    return ExpertSelection(select_experts(scores, options.threshold))


def _batches(examples: Iterable[Example]) -> Iterator[torch.Tensor]:
    for example in examples:
        yield torch.tensor([example.ids])


def calibration_batches(train: Sequence[Example], seed: int) -> Iterator[torch.Tensor]:
    """Draw sequences to make the correction of quantised experts from, and yield the token ids (1, S) of each."""
    tokens = 0
    for example in random.Random(seed).sample(train, len(train)):
        if tokens >= CORRECTION_TOKENS:
            return
        tokens += len(example.ids)
        yield torch.tensor([example.ids])


def make_callback(model: nn.Module, options: FinetuneOptions) -> RouterStatsCallback:
    """Make the callback that watches the gates, and updates their bias if they have one and are trained."""
    if options.trains_gates and find_biased_gates(model):
        return LoadBalancingCallback(update_rate=options.balance_rate)
    return RouterStatsCallback()


def make_trainer(
    model: Any,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    options: FinetuneOptions,
    machine: Machine,
    *,
    selection: ExpertSelection | None = None,
    callbacks: Iterable[TrainerCallback] = (),
) -> Any:
    """Make TRL's `SFTTrainer` for the method.

    Args:
        model: from [`load_model`]; it is changed.
        data: what to train and evaluate on.
        tokenizer: the model's tokenizer.
        options: decided options.
        machine: where.
        selection: the experts that `esft` trains.
        callbacks: callbacks beside that for the gates.

    Raises:
        ValueError: if the method cannot be used on the model.
    """
    from trl import SFTConfig, SFTTrainer

    if selection is not None:
        prepare_esft(model, selection)
    trained, balancing = model, make_callback(model, options)
    if options.method in ADAPTERS:
        set_seed(options.seed)  # factors begin with random numbers
        trained = get_peft_model(model, expert_lora_config(model, **lora_settings(options)))
    if options.method == "qlora":
        model.is_loaded_in_4bit = False  # or TRL would round the adapters to bfloat16
    trainer = SFTTrainer(
        trained,
        SFTConfig(**trainer_settings(options, machine, bool(data.evaluation))),
        train_dataset=as_dataset(_in_order(data.train, options)),
        eval_dataset=as_dataset(data.evaluation) if data.evaluation else None,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    balancing.add_to(trainer)  # ahead of the reporters
    return trainer


def _in_order(train: Sequence[Example], options: FinetuneOptions) -> Sequence[Example]:
    if options.packing:
        return train
    number = sequences_of(options, train)
    return order_examples(train, number=number, batch_size=options.batch_size, seed=options.seed)


__all__ = [
    "calibration_batches",
    "default_targets",
    "load_model",
    "lora_settings",
    "make_callback",
    "make_trainer",
    "select_by_data",
    "trainer_settings",
]
