# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Callbacks that add to what `Trainer(push_to_hub=True)` uploads: the family's code, and this package's model card."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..remote_code import PublishedModel, attach_code, carries_code, check_place_for_code
from ..transformers_support import unwrap_model

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(__name__)


class RemoteCodeCallback(TrainerCallback):
    """Puts the family's code into what `Trainer(push_to_hub=True)` uploads, if transformers does not know the model.

    It also keeps the token out of the uploaded `training_args.bin`. Importing the package adds it to every Trainer. It
    does nothing for other models or without uploads.
    """

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hide the token before the arguments are saved for the first time.

        Raises:
            ValueError: if the code would take the place of somebody's files in the output folder.
        """
        model = _published_model(kwargs.get("model"))
        if model is None:
            return
        if isinstance(args.hub_token, str):
            args.hub_token = _HiddenToken(args.hub_token)
        if args.push_to_hub and carries_code(model.config.model_type):
            check_place_for_code(args.output_dir)

    on_train_begin = on_init_end  # it may have been set in between

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the code into the output folder, and into the checkpoint that its files are taken from.

        A config that is saved into a folder with the code names the code.
        """
        self.on_init_end(args, state, control, **kwargs)
        model = _published_model(kwargs.get("model"))
        is_adapted = hasattr(unwrap_model(kwargs["model"], recursive=True), "get_base_model")
        if model is None or is_adapted or not carries_code(model.config.model_type) or not state.is_world_process_zero:
            return  # an adapter's code is its base's
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for folder in (Path(args.output_dir), checkpoint):
            if folder.is_dir():
                attach_code(folder)


class ModelCardCallback(TrainerCallback):
    """Makes `Trainer(push_to_hub=True)` write this package's model card instead of Trainer's. Call `add_to(trainer)`.

    A card that somebody wrote stays: that of the repository, or else that of the output folder. A card is written when
    a model has been saved into the output folder, which is so from the second checkpoint on, and by
    `trainer.push_to_hub()`. If no card can be made, there is a warning, and training goes on.

    Args:
        license, license_name, license_link, base_model, datasets, tags: see [`CardFacts`].

    Raises:
        ValueError: if a license or a base model is not allowed.
    """

    def __init__(self, license: str, **facts: Any) -> None:
        from .candidate import check_hub_id
        from .card import CardFacts

        self.facts = CardFacts(license=license, **facts)
        self.facts.check_license(required=True)
        if self.facts.base_model is not None:
            check_hub_id("base_model", self.facts.base_model)
        self._trainer: Trainer | None = None

    def add_to(self, trainer: "Trainer") -> None:
        """Let a trainer write these cards.

        Raises:
            ValueError: if the model is an adapter whose base has no id on the Hub, and none is given.
        """
        from .card import check_base_of_adapter

        adapters = getattr(trainer.model, "peft_config", {})
        for config in adapters.values():
            check_base_of_adapter(self.facts.base_model, config.base_model_name_or_path)
        self._trainer = trainer
        trainer.add_callback(self)

        def create_model_card(*args: Any, tags: str | list[str] | None = None, **kwargs: Any) -> None:
            # Trainers give the model's and the dataset's name by themselves.
            left_out = sorted(key for key in kwargs if not key.endswith("_name") and kwargs[key])
            if left_out:
                logger.warning(f"{', '.join(left_out)} is left out of the card: give it to {type(self).__name__}.")
            tags = [tags] if isinstance(tags, str) else list(tags or ())
            self._write_card([*(getattr(trainer.model, "model_tags", None) or ()), *tags])

        trainer.create_model_card = create_model_card

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to be one of the trainer's first callbacks: then it would not know the trainer.

        Raises:
            ValueError: always.
        """
        raise ValueError("callbacks: ModelCardCallback is not allowed there; call add_to(trainer) instead.")

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the card up to date, or make way for a card that somebody has written meanwhile."""
        self._write_card()

    def _write_card(self, tags: Sequence[str] = ()) -> None:
        trainer = self._trainer
        if trainer is None or not trainer.is_world_process_zero():
            return
        from .push import write_card

        args = trainer.args
        write_card(
            args.output_dir,
            getattr(trainer, "hub_model_id", None),
            replace(self.facts, tags=tuple(dict.fromkeys([*self.facts.tags, *tags]))),
            asdict(trainer.state),
            revision=getattr(args, "hub_revision", None) or "main",
            token=args.hub_token,
        )


class _HiddenToken(str):
    """A token that works as always, but is not pickled. Read again, it is `None`, so that the stored token is used."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    def __copy__(self) -> "_HiddenToken":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "_HiddenToken":
        return self

    def __repr__(self) -> str:
        return "'<HUB_TOKEN>'"


def _published_model(model: Any) -> Any:
    """Find the model of this family in a trainer's model, wrapped or adapted or not; return `None` for others."""
    if model is None:
        return None
    model = unwrap_model(model, recursive=True)
    base = getattr(model, "get_base_model", lambda: model)()
    return base if isinstance(base, PublishedModel) else None


__all__ = ["ModelCardCallback", "RemoteCodeCallback"]
