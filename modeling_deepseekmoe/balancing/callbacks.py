# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Callbacks that balance gates and log what they do, for transformers' Trainer and every trainer built on it."""

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..router_load import RouterLoad
from ..support.official_names import read_official_names
from .bias_update import check_update, update_router_bias
from .gates import require_biased_gates, tell_kept
from .statistics import RouterStats
from .tracking import router_load_counter, take_router_load, track_router_load, untrack_router_load


class RouterStatsCallback(TrainerCallback):
    """A callback that logs what the gates do in training, for models without a balancing bias.

    It logs `router/max_violation_global`, `router/max_violation_batch`, `router/dead_experts`, `router/entropy`,
    `router/drop_rate`, `router/bias_norm`, `aux_loss` and `aux_loss/<name>`, see [`RouterStats`]. If no gradient
    reached the losses, their name is `aux_loss_not_trained`. [`LoadBalancingCallback`] logs the same.

    The values cover the optimizer steps since the last log, all ranks together. They are in `state.log_history` and on
    the console. Trainer runs its reporters (TensorBoard, W&B, ...) before the callbacks of the user. To have the
    values there too, use `callback.add_to(trainer)` instead of `Trainer(callbacks=[callback])`.

    Attributes:
        stats ([`RouterStats`], *optional*): the statistics since the last log, by layer and expert.
    """

    def __init__(self) -> None:
        self.stats: RouterStats | None = None

    def add_to(self, trainer: Trainer) -> None:
        """Add this callback to a trainer, ahead of its reporters."""
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())
        # The trainer is made already, and has called its first callbacks.
        self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let Trainer resume transformers' own models with their experts, which it would lose otherwise."""
        if kwargs.get("model") is not None:
            read_official_names(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count.

        Raises:
            ValueError: for a model whose tokens cannot be counted, or under `torch.nn.DataParallel`.
        """
        model = kwargs["model"]
        if args.n_gpu > 1:
            raise ValueError(
                f"n_gpu={args.n_gpu} is not allowed with {type(self).__name__}: torch.nn.DataParallel loses what its "
                "replicas count. Start the script with torchrun or accelerate launch, or show it one device."
            )
        track_router_load(model)
        self.stats = RouterStats(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the counts of the optimizer step."""
        if self.stats is not None:
            self.stats.add(self._take(state, kwargs["model"], kwargs.get("optimizer")))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the statistics to what is logged in training."""
        logs = kwargs.get("logs")
        if self.stats is None or not self.stats.steps or logs is None or "loss" not in logs:
            return
        # A trainer's own value stays as it is.
        summary = {name: value for name, value in self.stats.summary().items() if name not in logs}
        logs.update(summary)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(summary)  # Trainer has put a copy of the logs there already
        self.stats.reset()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop counting on models that do not count themselves."""
        if self.stats is not None:
            self.stats.counter.measure_entropy = False
        untrack_router_load(kwargs["model"])

    def _take(self, state: TrainerState, model: nn.Module, optimizer: Any) -> RouterLoad:
        return take_router_load(model)


class LoadBalancingCallback(RouterStatsCallback):
    """A callback for auxiliary-loss-free balancing: it updates the gates' bias once after every optimizer step.

    `Trainer(..., callbacks=[LoadBalancingCallback()])` is all there is to do. An update uses the tokens of the whole
    global batch. The callback also logs the statistics of [`RouterStatsCallback`]. It works on `noaux_tc` models of
    this package and on transformers' own with the gate of DeepSeek-V3. The bias is saved with the model and resumes
    with it.

    Gates of which nothing is trained keep their bias. So do gates that PEFT adapts without a copy: no file would hold
    their bias. The log says so once. All gates keep it in a step that the gradient scaler skipped.

    Args:
        update_rate (`float`): gamma (0.001 in arXiv 2408.15664 and V3).
        update (`str`): `"sign"`, `"centered_sign"` or `"proportional"`, see [`bias_step`].
        freeze_after (`int`, *optional*): optimizer steps after which the bias stays as it is, as in the last part of
            V3's training.

    Raises:
        ValueError: for arguments that are not allowed. When training begins, also for a model without a balancing
            bias.
    """

    def __init__(self, update_rate: float = 1e-3, update: str = "sign", freeze_after: int | None = None) -> None:
        super().__init__()
        check_update(update_rate, update)
        if freeze_after is not None and (type(freeze_after) is not int or freeze_after < 0):
            raise ValueError(
                f"freeze_after={freeze_after!r} is not allowed: it must be an integer of at least 0 or None."
            )
        self.update_rate = update_rate
        self.update = update
        self.freeze_after = freeze_after

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the model has gates with a balancing bias, as soon as there is a model."""
        super().on_init_end(args, state, control, **kwargs)
        if kwargs.get("model") is not None:
            require_biased_gates(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count, and say so if there is nothing to update."""
        gates = require_biased_gates(kwargs["model"])
        super().on_train_begin(args, state, control, **kwargs)
        tell_kept(gates)

    def _take(self, state: TrainerState, model: nn.Module, optimizer: Any) -> RouterLoad:
        over = self.freeze_after is not None and state.global_step > self.freeze_after
        if over or getattr(optimizer, "step_was_skipped", False):
            router_load_counter(model).is_balanced = True
            return take_router_load(model)
        return update_router_bias(model, self.update_rate, self.update)


__all__ = ["LoadBalancingCallback", "RouterStatsCallback"]
