"""What a model notices of its training: the steps of every kind of optimizer, and nothing that is none."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from conftest import V3_LIKE
from native_models import batch
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_deepseekmoe.reminders import STEPS_UNTIL_WARNING, Reminders, watched_weight

ROWS = [{"input_ids": batch[0], "labels": batch[0]}] * (STEPS_UNTIL_WARNING + 2)


def write_past_autograd(model: nn.Module) -> Callable[[], None]:
    """Return a step that writes to `data`, as DeepSpeed's optimizers and gossip trainers do."""

    def step() -> None:
        for weight in model.parameters():
            weight.data -= 1e-3 * weight.grad

    return step


STEPS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-3).step,
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), foreach=False).step,
    "foreach": lambda model: torch.optim.AdamW(model.parameters(), foreach=True).step,
    "fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True).step,
    "data": write_past_autograd,
}


def train(model: nn.Module, step: Callable[[], object], forwards: int) -> None:
    for _ in range(forwards):
        model(batch[:1], labels=batch[:1]).loss.backward()
        step()
        model.zero_grad()


def of_updates(texts: list[str]) -> list[str]:
    return [text for text in texts if "nothing updates the bias" in text]


@pytest.mark.parametrize("kind", STEPS)
def test_steps_are_seen(tiny_model: Callable, warnings_of_package: list[str], kind: str) -> None:
    model = tiny_model(**V3_LIKE)
    step = STEPS[kind](model)
    train(model, step, STEPS_UNTIL_WARNING)
    assert not of_updates(warnings_of_package)
    train(model, step, 1)
    assert len(of_updates(warnings_of_package)) == 1


def test_forward_passes_without_steps_are_none(tiny_model: Callable, warnings_of_package: list[str]) -> None:
    model = tiny_model(**V3_LIKE, sequence_balance_alpha=0.1)
    for _ in range(2 * STEPS_UNTIL_WARNING + 2):  # a study of the gradients
        model(batch[:1]).logits.sum().backward()
    assert not warnings_of_package


def test_trainer_as_it_comes(tiny_model: Callable, warnings_of_package: list[str], tmp_path: object) -> None:
    model = tiny_model(**V3_LIKE)
    options = {"report_to": [], "save_strategy": "no", "per_device_train_batch_size": 1, "disable_tqdm": True}
    Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, **options), train_dataset=ROWS).train()
    assert len(of_updates(warnings_of_package)) == 1


def test_updates_that_end_are_missed(tiny_model: Callable, warnings_of_package: list[str]) -> None:
    from modeling_deepseekmoe import update_router_bias

    model = tiny_model(**V3_LIKE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.step()
        update_router_bias(model)

    train(model, step, 2 * STEPS_UNTIL_WARNING + 1)
    assert not of_updates(warnings_of_package)
    train(model, optimizer.step, 2 * STEPS_UNTIL_WARNING + 1)
    assert len(of_updates(warnings_of_package)) == 1


def test_what_is_watched(tiny_model: Callable) -> None:
    model = tiny_model(**V3_LIKE)
    gates = [name for name, _ in model.named_parameters() if ".gate." in name]
    assert watched_weight(model)[0] == gates[0]
    for name in gates:
        model.get_parameter(name).requires_grad_(False)
    name, copied = watched_weight(model)
    weight = model.get_parameter(name)
    assert weight.ndim > 1 and torch.equal(copied, weight) and copied.data_ptr() != weight.data_ptr()
    assert watched_weight(model.requires_grad_(False)) is None
    assert watched_weight(tiny_model(**V3_LIKE).to("meta")) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_begins_anew(tiny_model: Callable, copied: Callable) -> None:
    model = tiny_model(**V3_LIKE)
    train(model, torch.optim.SGD(model.parameters(), lr=1e-3).step, 2)
    assert vars(copied(model).model.reminders) == vars(Reminders())
