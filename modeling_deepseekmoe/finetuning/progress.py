# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Show the progress of a training in lines: the step, the loss, the time that is left."""

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressLines(TrainerCallback):
    """A callback that shows a line for every log of the trainer, and every evaluation.

    Args:
        echo: shows a line.
    """

    def __init__(self, echo: Callable[[str], None]) -> None:
        self.echo = echo
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the time, and say how many steps there are."""
        self.started, self.first_step = time.monotonic(), state.global_step
        begins = f", going on after step {state.global_step}" if state.global_step else ""
        self.echo(f"training: {state.max_steps} steps{begins}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show what was logged."""
        logs = kwargs.get("logs") or {}
        if "eval_loss" in logs:
            self.echo(f"  step {state.global_step}: evaluation loss {float(logs['eval_loss']):.4f}")
        elif "loss" in logs:
            done = state.global_step - self.first_step
            pace = (time.monotonic() - self.started) / max(done, 1)
            left = _duration(pace * (state.max_steps - state.global_step))
            figures = [f"loss {float(logs['loss']):.4f}"]
            if "router/max_violation_global" in logs:
                figures.append(f"MaxVio {logs['router/max_violation_global']:.2f}")
            step = f"step {state.global_step} of {state.max_steps}"
            self.echo(f"  {step}: {', '.join(figures)}; {pace:.2f} s a step, {left} left")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say that the run can go on from here."""
        self.echo(f"  step {state.global_step}: checkpoint")


def _duration(seconds: float) -> str:
    """Write a duration with the unit that fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


__all__ = ["ProgressLines"]
