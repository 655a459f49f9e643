"""Multi-token prediction in TRL's trainers, which make their losses themselves: off, and said, unless asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_trl_trainers import SIZES, TRAINERS
from tokenizers_of_tests import tokenizer
from tolerances import assert_same

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM

LAYER = "model.layers.3."


def trainer_of(name: str, folder: Path, **fields: Any) -> Any:
    trainer_class, config_class, data, settings = TRAINERS[name]
    torch.manual_seed(0)
    config = DeepseekMoeConfig(**{**SIZES, **fields}, num_nextn_predict_layers=1, mtp=True)
    DeepseekMoeForCausalLM(config).save_pretrained(folder)  # TRL loads the reference model from there
    model = DeepseekMoeForCausalLM.from_pretrained(folder, mtp=True)
    arguments = config_class(
        str(folder / "out"), max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
        weight_decay=0.0, **settings,
    )  # fmt: skip
    return trainer_class(model, args=arguments, train_dataset=Dataset.from_dict(data), processing_class=tokenizer())


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_nothing_trains_it_unless_asked(name: str, tmp_path: Path, warnings_of_package: list[str]) -> None:
    trainer = trainer_of(name, tmp_path)
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    trainer.train()
    state = trainer.model.state_dict()
    changed = {key for key, tensor in state.items() if not torch.equal(tensor, before[key])}
    assert changed and not any(key.startswith(LAYER) for key in changed)
    assert sum("are loaded and NOT trained" in message for message in warnings_of_package) == 1


@pytest.mark.parametrize("detach", [False, True], ids=["joint", "detached"])
@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_asked_for_its_gradients_are_those_of_the_model_s_own_loss(
    name: str, detach: bool, tmp_path: Path, warnings_of_package: list[str]
) -> None:
    fields = {"mtp_in_trl": True, "mtp_detach": detach, "aux_loss_alpha": 0.01}
    trainer = trainer_of(name, tmp_path, **fields)
    model = trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels = batch["labels"] if name == "SFT" else ids.masked_fill(batch["completion_mask"] == 0, -100)
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    found = {key: weight.grad.clone() for key, weight in model.named_parameters() if key.startswith(LAYER)}
    model.zero_grad()
    outputs = DeepseekMoeForCausalLM.forward(model, ids, attention_mask=mask, labels=labels)
    if name == "SFT":
        assert_same(loss, outputs.loss)
    outputs.loss.backward()
    # The balance loss of its own gate included.
    assert len(found) > 10
    for key, weight in model.named_parameters():
        if key.startswith(LAYER):
            assert_same(found[key] / weight.grad.abs().max(), weight.grad / weight.grad.abs().max(), key)
    trainer.train()
    assert 0 <= trainer.state.log_history[0]["mtp/agreement_1"] <= 1 and trainer.state.log_history[1]["mtp/loss_1"] > 0
    assert not any("NOT trained" in message for message in warnings_of_package)
