"""Multi-token prediction in TRL's trainers: they make their losses themselves, without it, and that is said."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_trl_trainers import SIZES, TRAINERS
from tokenizers_of_tests import tokenizer

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_nothing_trains_it_unless_asked(name: str, tmp_path: Path, warnings_of_package: list[str]) -> None:
    trainer_class, config_class, data, settings = TRAINERS[name]
    torch.manual_seed(0)
    DeepseekMoeForCausalLM(DeepseekMoeConfig(**SIZES, num_nextn_predict_layers=1, mtp=True)).save_pretrained(tmp_path)
    model = DeepseekMoeForCausalLM.from_pretrained(tmp_path, mtp=True)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    arguments = config_class(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
        weight_decay=0.0, **settings,
    )  # fmt: skip
    trainer = trainer_class(model, args=arguments, train_dataset=Dataset.from_dict(data), processing_class=tokenizer())
    trainer.train()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed and not any(key.startswith("model.layers.3.") for key in changed)
    assert sum("are loaded and NOT trained" in message for message in warnings_of_package) == 1
