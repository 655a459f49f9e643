# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What Trainer logs of multi-token prediction."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..mtp_training import MtpStatistics
from ..torch_support import decoder_of


class MtpLogCallback(TrainerCallback):
    """Logs `mtp/loss_K` and `mtp/agreement_K` of every depth K, for models with multi-token-prediction layers.

    The values cover the steps since the last log, all ranks together. Importing the package adds this callback to
    every Trainer. It does nothing for other models.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what was counted before."""
        if (statistics := _statistics_of(kwargs.get("model"))) is not None:
            statistics.reset()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the values to what is logged in training."""
        logs, statistics = kwargs.get("logs"), _statistics_of(kwargs.get("model"))
        if statistics is None or logs is None or "loss" not in logs:
            return
        values = statistics.take()
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)  # Trainer has put a copy of the logs there already


def _statistics_of(model: Any) -> MtpStatistics | None:
    decoder = None if model is None else decoder_of(model)
    return getattr(decoder, "mtp_statistics", None) if decoder is not None and decoder.config.mtp else None


__all__ = ["MtpLogCallback"]
