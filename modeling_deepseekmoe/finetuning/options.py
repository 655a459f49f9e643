# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The options of a fine-tuning: one dataclass, which the command line, YAML files and written scripts share."""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

METHODS = ("lora", "qlora", "esft", "full")
ADAPTERS = ("lora", "qlora")
FORMATS = ("nf4", "fp8", "mxfp4")
SCHEDULES = ("linear", "cosine", "constant")
DTYPES = ("auto", "float32", "bfloat16")
# On which tokens the loss is taken, by the kind of the rows; the first is the default.
LOSSES = {"chat": ("assistant", "all"), "completion": ("completion", "all"), "text": ("all",)}
LEARNING_RATES = {"lora": 2e-4, "qlora": 2e-4, "esft": 1e-5, "full": 1e-5}
THRESHOLDS = {"gate": 0.1, "token": 0.2}
# Fields that are decided when a run begins, where they are `None` or "auto".
DECIDED = ("loss_on", "max_length", "learning_rate", "dtype", "recompute", "target_modules")


def _says(help: str, methods: tuple[str, ...] = METHODS) -> dict[str, Any]:
    """Return the metadata of a field: the help that the command line shows, and the methods that it belongs to."""
    return {"help": help, "methods": methods}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """What is trained, on what, and how. The help of every field is in its metadata.

    The fields that are named in `DECIDED` may be `None` or `"auto"`, and are decided when a run begins.
    """

    model: str = field(metadata=_says("Checkpoint folder or hub id, of any generation."))
    data: str = field(metadata=_says("File (.jsonl, .json, .csv, .parquet, .txt), or dataset's folder or id."))
    output: str = field(metadata=_says("Folder for everything that is written; goes on with what is in it."))
    method: str = field(default="lora", metadata=_says("lora, qlora, esft or full."))
    # The data.
    column: str | None = field(
        default=None, metadata=_says("Field of the rows that holds the text, where it is not `text`.")
    )
    split: str = field(default="train", metadata=_says("Split of a dataset."))
    subset: str | None = field(default=None, metadata=_says("Configuration of a dataset that has several."))
    eval_data: str | None = field(
        default=None, metadata=_says("Another file or dataset to evaluate on, of the same kind.")
    )
    eval_share: float = field(
        default=0.1, metadata=_says("Share of the rows to evaluate on instead of training; 0 for none.")
    )
    tokenizer: str | None = field(default=None, metadata=_says("Folder or hub id, if not the model's own."))
    trust_remote_code: bool = field(default=False, metadata=_says("Run code that the tokenizer's folder carries."))
    loss_on: str | None = field(
        default=None, metadata=_says("Tokens that are learnt: assistant, completion or all; by the kind of rows.")
    )
    max_length: int | None = field(
        default=None, metadata=_says("Longest sequence in tokens; 1024, or the model's context if that is less.")
    )
    packing: bool = field(
        default=False, metadata=_says("Put several rows into a sequence; they do not see each other.")
    )
    # Adapters.
    rank: int = field(default=16, metadata=_says("Rank of the adapters.", ADAPTERS))
    alpha: float | None = field(
        default=None, metadata=_says("An adapter counts alpha / rank; 2 * rank by default.", ADAPTERS)
    )
    dropout: float = field(default=0.0, metadata=_says("Dropout in front of the adapters.", ADAPTERS))
    target_modules: list[str] | None = field(
        default=None,
        metadata=_says("Linear maps to adapt beside the experts; attention and shared experts by default.", ADAPTERS),
    )
    train_router: bool = field(default=False, metadata=_says("Train the gates too, as whole copies.", ADAPTERS))
    format: str = field(default="nf4", metadata=_says("Of the frozen experts: nf4, fp8 or mxfp4.", ("qlora",)))
    correction_rank: int | None = field(
        default=None,
        metadata=_says("Rank of a frozen correction that gives back what rounding took; none by default.", ("qlora",)),
    )
    # Selected experts.
    score: str = field(default="gate", metadata=_says("How experts are scored: gate or token.", ("esft",)))
    p: float | None = field(
        default=None, metadata=_says("Score that the selected experts reach; 0.1 for gate, 0.2 for token.", ("esft",))
    )
    score_tokens: int = field(default=131072, metadata=_says("Most tokens to score the experts on.", ("esft",)))
    # The training.
    epochs: float = field(default=1.0, metadata=_says("Passes over the data."))
    max_steps: int | None = field(default=None, metadata=_says("Optimizer steps, instead of epochs."))
    batch_size: int = field(default=4, metadata=_says("Sequences in a micro-batch."))
    accumulation: int = field(default=1, metadata=_says("Micro-batches in an optimizer step."))
    learning_rate: float | None = field(
        default=None, metadata=_says("Of AdamW; 2e-4 for adapters, 1e-5 for esft and full.")
    )
    schedule: str = field(default="linear", metadata=_says("Of the learning rate: linear, cosine or constant."))
    warmup: float = field(default=0.03, metadata=_says("Share of the steps with a growing learning rate."))
    weight_decay: float = field(default=0.0, metadata=_says("Of AdamW."))
    max_grad_norm: float = field(default=1.0, metadata=_says("Longest gradient; longer ones are scaled."))
    seed: int = field(default=0, metadata=_says("Of the split, the order, the adapters and dropout."))
    dtype: str = field(
        default="auto", metadata=_says("Of the frozen weights, and of trained ones: auto, float32 or bfloat16.")
    )
    recompute: bool | None = field(
        default=None, metadata=_says("Recompute activations in the backward pass; where it fits only so.")
    )
    balance_rate: float = field(
        default=0.001, metadata=_says("Of the updates of the gates' bias, where gates are trained.")
    )
    router_aux_loss_coef: float | None = field(
        default=None, metadata=_says("Of the balance losses, as TRL's; the config's by default.")
    )
    # The run.
    save_steps: float = field(
        default=0.1, metadata=_says("Steps between two checkpoints; below 1, a share of all steps.")
    )
    eval_steps: float = field(
        default=0.5, metadata=_says("Steps between two evaluations; below 1, a share of all steps; 0 for none.")
    )
    logging_steps: int = field(default=5, metadata=_says("Steps between two lines of progress."))
    report_tokens: int = field(default=8192, metadata=_says("Tokens of the routing reports."))
    report_to: str = field(default="none", metadata=_says("Where Trainer reports to: none, tensorboard, wandb, ..."))
    keep_checkpoints: bool = field(default=False, metadata=_says("Keep the training's checkpoints when it has ended."))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "FinetuneOptions":
        """Make options of names and values, as a YAML file or a command line has them, and check them.

        Raises:
            ValueError: for a name that is no option, a value that is not allowed, or a missing one.
        """
        own, hints = {one.name for one in fields(cls)}, get_type_hints(cls)
        for name in values:
            if name not in own:
                near = difflib.get_close_matches(name, own, 1)
                raise ValueError(
                    f"{name!r} is not an option{f': is it {near[0]!r}?' if near else '.'} There are "
                    f"{', '.join(one.name for one in fields(cls))}."
                )
        for name in ("model", "data", "output"):
            if not values.get(name):
                raise ValueError(f"{name} is missing: give it on the command line or in the file of options.")
        options = cls(**{name: _typed(name, value, hints[name]) for name, value in values.items()})
        options.check()
        return options

    def check(self) -> None:
        """Raise ValueError for a value that is not allowed, or one that has no effect with the method."""
        allowed: dict[str, tuple[str, ...]] = {
            "method": METHODS,
            "format": FORMATS,
            "score": tuple(THRESHOLDS),
            "schedule": SCHEDULES,
            "dtype": DTYPES,
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not allowed: it must be one of {', '.join(choices)}."
                )
        losses = list(dict.fromkeys(loss for own in LOSSES.values() for loss in own))
        if self.loss_on is not None and self.loss_on not in losses:
            raise ValueError(f"loss_on={self.loss_on!r} is not allowed: it must be one of {', '.join(losses)}.")
        for name, (least, below) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not (least <= value and (below is None or value < below)):
                most = "" if below is None else f" and below {below}"
                raise ValueError(f"{name}={value!r} is not allowed: it must be at least {least}{most}.")
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} is not allowed: it must be above 0.")
        if self.p is not None and self.p > 1:
            raise ValueError(f"p={self.p!r} is not allowed: it must be above 0 and at most 1.")
        self._check_what_has_no_effect()

    def check_given(self, names: Iterable[str]) -> None:
        """Check that options belong to the method, also where their values are the defaults.

        Args:
            names: of the options that a user has given.

        Raises:
            ValueError: for one that has no effect with the method.
        """
        for one in fields(self):
            methods, value = one.metadata["methods"], getattr(self, one.name)
            if one.name in names and self.method in METHODS and self.method not in methods:
                raise ValueError(
                    f"{one.name}={value!r} is not allowed with method={self.method!r}: it belongs to "
                    f"{', '.join(methods)}."
                )

    def _check_what_has_no_effect(self) -> None:
        self.check_given({one.name for one in fields(self) if getattr(self, one.name) != one.default})
        default = {one.name: one.default for one in fields(self)}
        if self.eval_data is not None and self.eval_share not in (0, default["eval_share"]):
            raise ValueError(f"eval_share={self.eval_share!r} is not allowed with eval_data: that is evaluated on.")
        if self.eval_data is None and self.eval_share == 0 and self.eval_steps not in (0, default["eval_steps"]):
            raise ValueError(
                f"eval_steps={self.eval_steps!r} is not allowed with eval_share=0: nothing is left to evaluate on."
            )
        if self.correction_rank is not None and self.dropout:
            raise ValueError(
                f"dropout={self.dropout!r} is not allowed with correction_rank: without it the two are one product."
            )
        if self.max_steps is not None and self.epochs != default["epochs"]:
            raise ValueError(f"epochs={self.epochs!r} is not allowed with max_steps={self.max_steps}: give one.")
        if self.method in ADAPTERS and not self.train_router and self.balance_rate != default["balance_rate"]:
            raise ValueError(
                f"balance_rate={self.balance_rate!r} is not allowed with method={self.method!r}, whose gates are "
                "frozen: give train_router too."
            )
        if self.method == "esft" and self.balance_rate != default["balance_rate"]:
            raise ValueError(
                f"balance_rate={self.balance_rate!r} is not allowed with method='esft': gates are frozen."
            )

    @property
    def trains_gates(self) -> bool:
        """Whether the gates are trained, and their balancing bias updated."""
        return self.method == "full" or self.train_router

    @property
    def threshold(self) -> float:
        """The score that the selected experts of a layer reach."""
        return THRESHOLDS[self.score] if self.p is None else self.p

    def completed_by(self, stored: "FinetuneOptions") -> "FinetuneOptions":
        """Take from stored options what these leave to be decided."""
        undecided = [name for name in DECIDED if getattr(self, name) in (None, "auto")]
        return replace(self, **{name: getattr(stored, name) for name in undecided})

    def to_yaml(self) -> str:
        """Write the options as YAML. What belongs to other methods is left out."""
        own = {one.name for one in fields(self) if self.method in one.metadata["methods"]}
        values = {name: value for name, value in asdict(self).items() if name in own}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


_LIMITS: dict[str, tuple[float, float | None]] = {
    "rank": (1, None),
    "correction_rank": (1, None),
    "dropout": (0, 1),
    "eval_share": (0, 1),
    "max_length": (8, None),
    "score_tokens": (1, None),
    "max_steps": (1, None),
    "batch_size": (1, None),
    "accumulation": (1, None),
    "warmup": (0, 1),
    "weight_decay": (0, None),
    "seed": (0, 2**32),
    "balance_rate": (0, None),
    "router_aux_loss_coef": (0, None),
    "eval_steps": (0, None),
    "logging_steps": (1, None),
    "report_tokens": (2, None),
}
_ABOVE_ZERO = ("alpha", "p", "epochs", "learning_rate", "max_grad_norm", "save_steps")


def read_options(file: str | Path) -> dict[str, Any]:
    """Read names and values of options from a YAML file. Names may be written with dashes, as on the command line.

    Raises:
        ValueError: if the file is no YAML, or holds something else than names and values.
        OSError: if there is no such file.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"File {file} is not allowed as options: it is no YAML: {error}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"File {file} is not allowed as options: it must hold names and values.")
    return {name.replace("-", "_"): value for name, value in content.items()}


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Return a value in the type of its field. YAML reads 1e-4, without a point, as a text."""
    kinds = get_args(hint) if get_origin(hint) is not list and get_args(hint) else (hint,)
    if value is None and NoneType in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not NoneType)
    if get_origin(kind) is list:
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
            return list(value)
        raise ValueError(f"{name}={value!r} is not allowed: it must be a list of names.")
    number = float(value) if kind is float and _is_number(value) else value
    fits = isinstance(number, kind) and not (isinstance(number, bool) and kind is not bool)
    if fits and (kind is not float or math.isfinite(number)):
        return number
    said = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
    raise ValueError(f"{name}={value!r} is not allowed: it must be {said}.")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


__all__ = [
    "ADAPTERS",
    "DECIDED",
    "FORMATS",
    "LEARNING_RATES",
    "LOSSES",
    "METHODS",
    "FinetuneOptions",
    "read_options",
]
