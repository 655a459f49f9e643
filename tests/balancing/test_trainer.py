"""transformers' Trainer: the loss falls, interrupted equals uninterrupted, accumulated equals whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MLA, TINY, V3_LIKE
from tolerances import assert_same
from torch.utils.data import Dataset
from training import Rows, StopAt, arguments, losses, reference_text
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
)

from modeling_deepseekmoe import (
    DeepseekConfig,
    DeepseekMoeConfig,
    DeepseekMoeForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
)


@pytest.mark.parametrize("variant", [{}, V3_LIKE], ids=["v1", "v3"])
def test_the_loss_falls_on_real_text(tiny_model: Callable, tmp_path: Path, variant: dict) -> None:
    rows = reference_text(64, 48)
    trainer = Trainer(
        tiny_model(**variant, initializer_range=0.05),
        arguments(tmp_path, max_steps=40, per_device_train_batch_size=8),
        train_dataset=Rows(input_ids=rows, labels=rows),
        eval_dataset=Rows(input_ids=rows[:8], labels=rows[:8]),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    found = losses(trainer)
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    assert trainer.evaluate()["eval_loss"] < before


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "rope_theta": 5e5, "original_max_position_embeddings": 32,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
RESUMED = {
    "deepseekmoe": DeepseekMoeConfig(**TINY),
    "deepseekmoe-llama3-rope": DeepseekMoeConfig(**TINY, rope_parameters=LLAMA3),
    "deepseek": DeepseekConfig(**TINY),
    "deepseek_v2-yarn": DeepseekV2Config(**{**TINY, **MLA, "q_lora_rank": 12}, rope_parameters=YARN),
    "deepseek_v3-yarn": DeepseekV3Config(**{**TINY, **V3_LIKE, "q_lora_rank": None},
                                         rope_parameters=YARN),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_interrupted_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    def model(seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(RESUMED[name])

    rows = reference_text(32, 24)
    data = Rows(input_ids=rows, labels=rows)
    whole = Trainer(model(), arguments(tmp_path / "a", max_steps=12), train_dataset=data)
    whole.train()

    part = arguments(tmp_path / "b", max_steps=12, save_steps=6, save_strategy="steps")
    Trainer(model(), part, train_dataset=data, callbacks=[StopAt(6)]).train()
    assert (tmp_path / "b" / "checkpoint-6").is_dir()
    # A fresh, differently initialised model: everything must come from the checkpoint.
    resumed = Trainer(model(seed=1), part, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-6"))

    assert losses(resumed)[-6:] == losses(whole)[-6:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def one_step(
    model: DeepseekMoeForCausalLM, data: Dataset, folder: Path, accumulate: int, **kwargs: object
) -> dict[str, torch.Tensor]:
    """The parameters after one SGD step on eight sequences, in one batch or in several."""
    settings = arguments(folder, max_steps=1, per_device_train_batch_size=8 // accumulate, optim="sgd",
                         gradient_accumulation_steps=accumulate, learning_rate=1.0, max_grad_norm=0.0,
                         lr_scheduler_type="constant", **kwargs)  # fmt: skip
    Trainer(model, settings, train_dataset=data).train()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_four_times_two_sequences_equal_eight(
    tiny_model: Callable, tmp_path: Path, checkpointing: bool | None
) -> None:
    """Equal lengths: the task loss and the sequence-wise auxiliary loss (large here, so that it is not lost)."""
    rows = reference_text(8, 24)
    data = Rows(input_ids=rows, labels=rows)
    extra = {} if checkpointing is None else {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}
    }  # fmt: skip
    start = {name: parameter.detach().clone() for name, parameter in tiny_model().named_parameters()}
    once = one_step(tiny_model(aux_loss_alpha=1.0), data, tmp_path, 1)
    accumulated = one_step(tiny_model(aux_loss_alpha=1.0), data, tmp_path, 4, **extra)
    without = one_step(tiny_model(aux_loss_alpha=0.0), data, tmp_path, 1)
    plain = tiny_model(aux_loss_alpha=1.0)
    plain(rows, labels=rows).loss.backward()
    for name, parameter in plain.named_parameters():
        assert_same(start[name] - once[name], parameter.grad, name)
    gate = "model.layers.1.mlp.gate.weight"
    assert (once[gate] - without[gate]).abs().max() > 1e-3
    for name, parameter in once.items():
        assert not torch.equal(parameter, start[name])
        assert_same(accumulated[name], parameter, name)


def test_accumulation_with_padding_of_different_lengths(tiny_model: Callable, tmp_path: Path) -> None:
    rows = reference_text(8, 24)
    lengths = torch.tensor([24, 5, 17, 9, 24, 12, 3, 20])
    mask = (torch.arange(24)[None] < lengths[:, None]).long()
    data = Rows(input_ids=rows * mask, labels=rows.masked_fill(mask == 0, -100), attention_mask=mask)
    once = one_step(tiny_model(aux_loss_alpha=0.0), data, tmp_path, 1)
    accumulated = one_step(tiny_model(aux_loss_alpha=0.0), data, tmp_path, 4)
    for name, parameter in once.items():
        assert_same(accumulated[name], parameter, name)


def test_a_plain_loop_that_divides_by_the_number_of_micro_batches(tiny_model: Callable) -> None:
    """Without `num_items_in_batch` the loss is a mean, and so is the auxiliary loss."""
    rows = reference_text(8, 24)

    def gradients(parts: int) -> dict[str, torch.Tensor]:
        model = tiny_model(aux_loss_alpha=1.0)
        for part in rows.chunk(parts):
            (model(part, labels=part).loss / parts).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    accumulated = gradients(4)
    for name, gradient in gradients(1).items():
        assert_same(accumulated[name], gradient, name)


def test_shares_of_micro_batches_at_unequal_lengths(tiny_model: Callable) -> None:
    """A micro-batch's auxiliary loss counts by its share of the items that the trainer counted."""
    model, rows = tiny_model(), reference_text(2, 24)
    labels = rows.clone()
    labels[:, 12:] = -100  # 22 targets, after the shift
    outputs = model(rows, labels=labels, num_items_in_batch=torch.tensor(88))
    task = model.eval()(rows, labels=labels, num_items_in_batch=torch.tensor(88)).loss
    assert_same(outputs.loss, task + outputs.aux_loss * 22 / 88)


@pytest.mark.parametrize("config_class", [DeepseekMoeConfig, DeepseekConfig])
def test_label_smoothing_shifts_the_labels(config_class: type, tmp_path: Path) -> None:
    """A model that Trainer does not know by its class name would learn to copy its input."""
    rows = reference_text(8, 24)
    model = AutoModelForCausalLM.from_config(config_class(**TINY)).eval()
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=Rows(input_ids=rows))
    with torch.no_grad():
        loss = trainer.compute_loss(model, {"input_ids": rows, "labels": rows})
        logits = model(rows).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), label_smoothing=0.1)
    assert_same(loss, expected)


def test_evaluation_keeps_neither_router_logits_nor_aux_loss(tiny_model: Callable, tmp_path: Path) -> None:
    rows = reference_text(8, 24)
    model = tiny_model(output_router_logits=True)
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=Rows(input_ids=rows, labels=rows))
    assert trainer.predict(Rows(input_ids=rows, labels=rows)).predictions.shape == (8, 24, 96)
