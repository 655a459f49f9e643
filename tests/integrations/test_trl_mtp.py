"""Multi-token prediction in TRL's trainers, which make their losses themselves: off, and said, unless asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_trl_trainers import SIZES, TRAINERS, reward
from tokenizers_of_tests import tokenizer
from tolerances import assert_same

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM, reminders

LAYER = "model.layers.3."
ASKED = {"mtp_in_trl": True, "aux_loss_alpha": 0.01}


def trainer_of(name: str, folder: Path, *, settings: dict[str, Any] | None = None, **fields: Any) -> Any:
    trainer_class, config_class, data, own = TRAINERS[name]
    torch.manual_seed(0)
    config = DeepseekMoeConfig(**{**SIZES, **fields}, num_nextn_predict_layers=1, mtp=True)
    DeepseekMoeForCausalLM(config).save_pretrained(folder)  # TRL loads the reference model from there
    model = DeepseekMoeForCausalLM.from_pretrained(folder, mtp=True)
    arguments = config_class(
        str(folder / "out"), max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
        weight_decay=0.0, **own, **(settings or {}),
    )  # fmt: skip
    others = {"reward_funcs": reward} if name in ("RLOO", "GRPO") else {}
    return trainer_class(
        model, args=arguments, train_dataset=Dataset.from_dict(data), processing_class=tokenizer(), **others
    )


def changed_by(trainer: Any) -> set[str]:
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    trainer.train()
    return {key for key, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[key])}


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_nothing_trains_it_unless_asked(name: str, tmp_path: Path, warnings_of_package: list[str]) -> None:
    changed = changed_by(trainer_of(name, tmp_path))
    assert changed and not any(key.startswith(LAYER) for key in changed)
    assert sum("are loaded and NOT trained" in message for message in warnings_of_package) == 1


def gradients(trainer: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model = trainer.model.train()
    trainer.compute_loss(model, dict(batch)).backward()
    found = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_asked_for_its_gradients_are_those_of_the_model_s_own_loss(name: str, tmp_path: Path) -> None:
    """The balance loss of its gate included; the rest of the model is trained as without it."""
    trainer = trainer_of(name, tmp_path / "asked", **ASKED)
    model, batch = trainer.model, next(iter(trainer.get_train_dataloader()))
    found = gradients(trainer, batch)
    without = gradients(trainer_of(name, tmp_path / "without", **ASKED | {"mtp_in_trl": False}), batch)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels = batch["labels"] if name == "SFT" else ids.masked_fill(batch["completion_mask"] == 0, -100)
    DeepseekMoeForCausalLM.forward(model, ids, attention_mask=mask, labels=labels).loss.backward()
    wanted = without | {key: one.grad for key, one in model.named_parameters() if key.startswith(LAYER)}
    assert found.keys() == wanted.keys() > without.keys()
    for key, gradient in wanted.items():
        scale = gradient.abs().max().clamp(min=1e-8)
        assert_same(found[key] / scale, gradient / scale, key)


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "RLOO", "GRPO"])
def test_asked_for_every_trainer_trains_and_logs_it(name: str, tmp_path: Path, warnings_of_package: list[str]) -> None:
    trainer = trainer_of(name, tmp_path, **ASKED)
    changed = changed_by(trainer)
    assert {f"{LAYER}eh_proj.weight", f"{LAYER}mlp.gate.weight", f"{LAYER}mlp.experts.down_proj"} <= changed
    first, second = trainer.state.log_history[:2]
    assert 0 <= first["mtp/agreement_1"] <= 1 and second["mtp/loss_1"] > 0
    assert not any("NOT trained" in message for message in warnings_of_package)


def test_a_coefficient_that_the_model_does_not_know(tmp_path: Path) -> None:
    trainer = trainer_of("DPO", tmp_path, settings={"router_aux_loss_coef": 0.1}, mtp_in_trl=True)
    with pytest.raises(ValueError, match="mtp_in_trl=True is not allowed with router_aux_loss_coef=0 in the model's"):
        trainer.train()


def test_a_trainer_that_leaves_out_what_it_is_handed(
    tmp_path: Path, warnings_of_package: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reminders, "STEPS_UNTIL_WARNING", 2)
    fields = ASKED | {"output_router_logits": True}
    changed = changed_by(trainer_of("DPO", tmp_path, settings={"router_aux_loss_coef": 0.0}, **fields))
    assert not any(key.startswith(LAYER) for key in changed)
    assert sum("2 times, and is NOT trained: set the trainer's" in message for message in warnings_of_package) == 1
