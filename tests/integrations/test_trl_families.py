"""TRL on transformers' own families: DeepSeek's balance losses and LoRA on the experts, and what is logged."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import other_families
import pytest
import torch
import trl
from datasets import Dataset
from peft import get_peft_model
from tokenizers_of_tests import tokenizer
from torch import nn
from transformers import TrainerCallback

from modeling_deepseekmoe import RouterStatsCallback, add_auxiliary_loss, expert_lora_config
from modeling_deepseekmoe.families.moe_layers import find_moe_layers

TEXTS = [topics[name][:60] for name in sorted(topics)[:8]]
PAIRS = {"prompt": [text[:10] for text in TEXTS], "chosen": [text[10:30] for text in TEXTS],
         "rejected": [text[30:45] for text in TEXTS]}  # fmt: skip


class GateGradients(TrainerCallback):
    """Keeps the gradients of the gates before the optimizer's step."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gates = [layer.gate for layer in find_moe_layers(kwargs["model"])]
        self.found = [p.grad.clone() for gate in gates for p in gate.parameters() if p.grad is not None]


def family(name: str) -> nn.Module:
    return other_families.family(name, vocab_size=256, pad_token_id=190, bos_token_id=188, eos_token_id=189)


def arguments(kind: type, folder: Path, **more: Any) -> Any:
    return kind(str(folder), max_steps=1, per_device_train_batch_size=4, logging_steps=1, report_to="none",
                save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, learning_rate=0.0, max_grad_norm=0.0,
                gradient_checkpointing=False, **more)  # fmt: skip


def train(kind: str, model: Any, folder: Path, reference: Any = None) -> tuple[Any, list[torch.Tensor]]:
    trainer_class, config, data = {"SFT": (trl.SFTTrainer, trl.SFTConfig, {"text": TEXTS}),
                                   "DPO": (trl.DPOTrainer, trl.DPOConfig, PAIRS)}[kind]  # fmt: skip
    text_tokenizer, gradients = tokenizer(), GateGradients()
    text_tokenizer.chat_template = None
    torch.manual_seed(2)
    reference = {"ref_model": reference} if kind == "DPO" else {}
    trainer = trainer_class(
        model, **reference, args=arguments(config, folder), train_dataset=Dataset.from_dict(data),
        processing_class=text_tokenizer, callbacks=[RouterStatsCallback(), gradients],
    )  # fmt: skip
    trainer.train()
    return trainer, gradients.found


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_moe", "deepseek_v4"])
def test_sft_with_losses_and_lora(name: str, tmp_path: Path) -> None:
    model = family(name)
    add_auxiliary_loss(model, expert=0.1, z=0.01)
    adapted = get_peft_model(model, expert_lora_config(model, r=4, train_router=True))
    trainer, gradients = train("SFT", adapted, tmp_path)
    logs = trainer.state.log_history[0]
    assert logs["aux_loss"] > 0.1 and logs["router/max_violation_global"] > 0
    assert gradients and any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_moe"])
def test_the_losses_are_trained_with_their_coefficients(kind: str, name: str, tmp_path: Path) -> None:
    """What they add to the gates' gradients grows as their coefficient does, and is nothing for 0."""
    found = []
    for number, alpha in enumerate((0.0, 1.0, 3.0)):
        model = family(name)
        add_auxiliary_loss(model, expert=alpha)
        if alpha == 0.0:
            model.config.router_aux_loss_coef = 0.0  # nor the family's own loss
        gradients = train(kind, model, tmp_path / str(number), reference=family(name))[1]
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    base, once, thrice = found
    added = once - base
    assert added.norm() > 1e-2 * base.norm()
    torch.testing.assert_close(thrice - base, 3 * added, atol=2e-3 * float(added.abs().max()), rtol=1e-2)
