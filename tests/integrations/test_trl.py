"""TRL's trainers: the auxiliary loss is the model's own, with its coefficient counted once."""

import copy
import types
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import trl
from conftest import MLA, V3_LIKE
from datasets import Dataset
from tokenizers_of_tests import tokenizer
from tolerances import assert_same
from torch import nn

from modeling_deepseekmoe import DeepseekV3Config, DeepseekV3ForCausalLM, LoadBalancingCallback
from modeling_deepseekmoe.balancing.gates import find_biased_gates

SIZES = {"vocab_size": 256, "max_position_embeddings": 256, "bos_token_id": 188, "eos_token_id": 189}
VARIANTS = {
    "noaux": {**V3_LIKE, "sequence_balance_alpha": 0.02},
    "softmax": {**MLA, "router_z_loss_alpha": 0.003},
}


def texts() -> Dataset:
    """Beginnings of different lengths of pages of the language reference."""
    return Dataset.from_dict({"text": [topics[name][: 60 + 5 * row] for row, name in enumerate(sorted(topics)[:16])]})


def sft(model: nn.Module, folder: Path, coefficient: float | None, **kwargs: object) -> trl.SFTTrainer:
    callbacks = kwargs.pop("callbacks", [])
    peft_config = kwargs.pop("peft_config", None)
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_length": 128,
                "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False,
                "disable_tqdm": True, "learning_rate": 1e-3, "gradient_checkpointing": False}  # fmt: skip
    config = trl.SFTConfig(str(folder), router_aux_loss_coef=coefficient, **{**settings, **kwargs})
    trainer = trl.SFTTrainer(model, config, train_dataset=texts(), eval_dataset=texts(),
                             processing_class=tokenizer(), callbacks=callbacks, peft_config=peft_config)  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_with_coefficient_and_callback(
    tiny_model: Callable, tmp_path: Path, packing: bool, checkpointing: bool
) -> None:
    model = tiny_model(**VARIANTS["noaux"], **SIZES)
    trainer = sft(model, tmp_path, 0.05, callbacks=[LoadBalancingCallback()], packing=packing,
                  gradient_checkpointing=checkpointing)  # fmt: skip
    assert model.config.aux_loss_alpha == 0.05
    for row in trainer.state.log_history[:2]:
        # TRL logs the loss before it multiplies it by the coefficient.
        assert row["aux_loss"] * 0.05 == pytest.approx(row["aux_loss/expert"] + row["aux_loss/sequence"], rel=1e-5)
        assert row["router/max_violation_batch"] > 0
    assert all(gate.bias.abs().max() > 1e-3 for gate in find_biased_gates(model))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("peft", [False, True])
def test_gradients_are_those_of_the_models_own_loss(
    tiny_model: Callable, tmp_path: Path, variant: str, peft: bool
) -> None:
    """TRL's loss of a micro-batch, through its replaced forward, against the model's own."""
    from peft import LoraConfig

    settings = {**VARIANTS[variant], **SIZES}
    lora = LoraConfig(target_modules=["o_proj"], modules_to_save=["gate"], task_type="CAUSAL_LM") if peft else None
    trainer = sft(tiny_model(**settings), tmp_path, 0.3, peft_config=lora, learning_rate=0.0, max_steps=1)
    own = tiny_model(**settings, aux_loss_alpha=0.3)
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model.train(), dict(inputs))
    loss.backward()
    expected = own(**{name: inputs[name] for name in ("input_ids", "attention_mask", "labels")})
    expected.loss.backward()
    assert_same(loss.detach(), expected.loss.detach())
    assert expected.aux_loss > 0.1
    for layer in own.config.moe_layers:
        gate = trainer.accelerator.unwrap_model(trainer.model)
        gate = (gate.get_base_model() if peft else gate).model.layers[layer].mlp.gate
        weight = gate.modules_to_save.default.weight if peft else gate.weight
        assert_same(weight.grad, own.model.layers[layer].mlp.gate.weight.grad)


def test_accumulated_micro_batches(tiny_model: Callable, tmp_path: Path) -> None:
    """TRL divides the task loss by the items of all micro-batches, and the auxiliary loss by their number."""
    settings = {**VARIANTS["noaux"], **SIZES}
    trainer = sft(tiny_model(**settings), tmp_path, 0.3, learning_rate=0.0, max_steps=1)
    own = tiny_model(**settings, aux_loss_alpha=0.3)
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps, items = 2, torch.tensor(1000)
    loss = trainer.compute_loss(trainer.model.train(), dict(inputs), num_items_in_batch=items)
    batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    expected = own.eval()(**batch, num_items_in_batch=items, output_router_logits=True)
    assert_same(loss.detach(), expected.loss.detach() + expected.aux_loss.detach() / 2)


def test_the_coefficient_of_the_config_is_the_default(tiny_model: Callable, tmp_path: Path) -> None:
    model = tiny_model(**VARIANTS["noaux"], **SIZES, aux_loss_alpha=0.07)
    trainer = sft(model, tmp_path, None, callbacks=[LoadBalancingCallback()], eval_strategy="steps", eval_steps=1)
    assert trainer.router_aux_loss_coef == model.config.aux_loss_alpha == 0.07
    row, evaluation = trainer.state.log_history[0], trainer.state.log_history[1]
    assert row["aux_loss"] * 0.07 == pytest.approx(row["aux_loss/expert"] + row["aux_loss/sequence"], rel=1e-5)
    assert 0.5 * row["aux_loss"] < evaluation["eval_aux_loss"] < 2 * row["aux_loss"]


@pytest.mark.parametrize(("config_coefficient", "factor"), [(0.01, 5.0), (0.0, 0.05)])
def test_dpo_with_a_coefficient_that_the_config_does_not_know(
    tiny_model: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, config_coefficient: float, factor: float
) -> None:
    """It scales all losses by the ratio; by itself, and with a warning, where the config's is 0."""
    model = tiny_model(**VARIANTS["noaux"], **SIZES, aux_loss_alpha=config_coefficient)
    pairs = [{"prompt": text[:20], "chosen": text[20:40], "rejected": text[40:55]} for text in texts()["text"]]
    config = trl.DPOConfig(str(tmp_path), router_aux_loss_coef=0.05, max_steps=1, per_device_train_batch_size=2,
                           logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
                           disable_tqdm=True, gradient_checkpointing=False)  # fmt: skip
    trainer = trl.DPOTrainer(
        model, ref_model=copy.deepcopy(model), args=config, train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(),
        callbacks=[LoadBalancingCallback()],
    )  # fmt: skip
    trainer.train()
    row = trainer.state.log_history[0]
    own = sum(value for name, value in row.items() if name.startswith("aux_loss/"))
    assert row["aux_loss"] * 0.05 == pytest.approx(own * factor, rel=1e-4)
    assert ("set the config's to the same value" in caplog.text) == (config_coefficient == 0)
    assert all(gate.bias.any() for gate in find_biased_gates(model))


def test_forward_is_wrapped_once_and_only_where_it_replaces(tiny_model: Callable) -> None:
    model, other = tiny_model(), tiny_model()
    model.forward = model.forward
    assert not hasattr(model.forward, "keeps_auxiliary_loss")
    model.forward = other.forward
    assert model.forward.__self__ is other
    model.forward = types.MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), model)
    once = model.forward
    assert once.keeps_auxiliary_loss
    for _ in range(2000):  # TRL's forward redirection puts it aside and back in every step
        model.forward = model.forward
    assert model.forward.__func__ is once.__func__

    def around(self: nn.Module, *args: object, **kwargs: object) -> object:
        return once.__func__(self, *args, **kwargs)

    around.__wrapped__ = once.__func__
    model.forward = types.MethodType(around, model)
    assert model.forward.__func__ is around


def test_the_third_generation_has_its_own_loss(tiny_config: Callable, tmp_path: Path) -> None:
    """There the coefficient is that of the sequence-wise loss."""
    fields = tiny_config(**V3_LIKE, **SIZES).to_dict()
    config = DeepseekV3Config(**{name: value for name, value in fields.items() if name != "model_type"})
    model = DeepseekV3ForCausalLM(config)
    trainer = sft(model, tmp_path, 0.02, callbacks=[LoadBalancingCallback()])
    assert config.sequence_balance_alpha == 0.02 and config.loss_alphas == {"sequence": 0.02}
    row = trainer.state.log_history[0]
    assert row["aux_loss"] * 0.02 == pytest.approx(row["aux_loss/sequence"]) and row["aux_loss"] > 1


def test_losses_that_a_trainer_leaves_out_are_reported(
    tiny_model: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sft(tiny_model(**VARIANTS["noaux"], **SIZES), tmp_path, 0.0, max_steps=2)
    assert caplog.text.count("NOT trained") == 1 and "'sequence_balance_alpha': 0.02" in caplog.text


def test_the_models_own_forward_is_untouched(tiny_model: Callable, tmp_path: Path) -> None:
    trainer = sft(tiny_model(**VARIANTS["noaux"], **SIZES), tmp_path, 0.3, max_steps=1, learning_rate=0.0)
    model, own = trainer.model.train(), tiny_model(**VARIANTS["noaux"], **SIZES, aux_loss_alpha=0.3)
    batch = torch.randint(3, 96, (2, 9))
    assert torch.equal(model(batch, labels=batch).loss, own(batch, labels=batch).loss)
    generated = model.eval().generate(batch[:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, own.eval().generate(batch[:1], max_new_tokens=3, do_sample=False))
