"""The callbacks in transformers' Trainer: updates, logs, resuming, other models, bad input."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, V3_LIKE
from native_models import biases, native_model, reference_counts
from safetensors.torch import load_file
from tolerances import assert_same
from torch import nn
from training import Recorder, Rows, StopAt, arguments, data, losses, rows, train
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import modeling_deepseekmoe
from modeling_deepseekmoe import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LoadBalancingCallback,
    RouterStatsCallback,
    bias_step,
    prepare_esft,
    update_router_bias,
)
from modeling_deepseekmoe.balancing.gates import find_biased_gates


@pytest.mark.parametrize("kind", ["ours", "native"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_one_update_per_step_from_the_whole_batch(
    tiny_model: Callable, tmp_path: Path, kind: str, accumulate: int
) -> None:
    """The first update is that of the untrained model on the eight sequences of the first step."""
    model = native_model() if kind == "native" else tiny_model(**V3_LIKE)
    same = native_model() if kind == "native" else tiny_model(**V3_LIKE)
    trainer, recorder = train(
        model, tmp_path, LoadBalancingCallback(0.01), max_steps=3, gradient_accumulation_steps=accumulate,
        per_device_train_batch_size=8 // accumulate, gradient_checkpointing=True,
    )  # fmt: skip
    batches = iter(trainer.get_train_dataloader())
    first = torch.cat([next(batches)["input_ids"] for _ in range(accumulate)])
    counts = reference_counts(same, first, torch.ones_like(first))
    for bias, step in zip(recorder.biases[0], bias_step(counts, 0.01), strict=True):
        assert torch.equal(bias, step)
    assert len(recorder.biases) == 3
    multiples = torch.stack([bias / 0.01 for bias in recorder.biases[2]])
    assert (multiples - multiples.round()).abs().max() < 1e-4 and multiples.abs().max() <= 3
    row = trainer.state.log_history[0]
    assert row["router/max_violation_global"] == row["router/max_violation_batch"] > 0


def test_logs_reach_history_console_and_reporters(tiny_model: Callable, tmp_path: Path) -> None:
    names = {"router/max_violation_global", "router/max_violation_batch", "router/dead_experts", "router/entropy",
             "router/drop_rate", "router/bias_norm", "aux_loss", "aux_loss/expert", "aux_loss/sequence"}  # fmt: skip

    def trainer_with(reporter: TrainerCallback) -> Trainer:
        model = tiny_model(**V3_LIKE, sequence_balance_alpha=0.1)
        # Trainer runs reporters before the callbacks of the user; this one stands for them.
        return Trainer(model, arguments(tmp_path, max_steps=4, logging_steps=2), train_dataset=data,
                       eval_dataset=data, callbacks=[reporter])  # fmt: skip

    reporter = Recorder()
    trainer = trainer_with(reporter)
    trainer.add_callback(LoadBalancingCallback())
    trainer.train()
    for row in trainer.state.log_history[:2]:
        assert row.keys() >= names | {"loss", "step"}
        assert row["aux_loss"] == pytest.approx(row["aux_loss/expert"] + row["aux_loss/sequence"])
    assert names.isdisjoint(trainer.state.log_history[2])  # the summary at the end of training
    assert names.isdisjoint(reporter.logs[0])

    reporter = Recorder()
    trainer = trainer_with(reporter)
    LoadBalancingCallback().add_to(trainer)
    trainer.train()
    assert reporter.logs[0].keys() >= names
    assert names.isdisjoint(trainer.evaluate())


def test_the_window_of_the_statistics(tiny_model: Callable, tmp_path: Path) -> None:
    """Between two logs: the mean of the steps' violations, and the violation of their sum."""
    every, _ = train(tiny_model(**V3_LIKE), tmp_path, LoadBalancingCallback(), max_steps=4)
    other, _ = train(tiny_model(**V3_LIKE), tmp_path, LoadBalancingCallback(), max_steps=4, logging_steps=4)
    steps = [row["router/max_violation_batch"] for row in every.state.log_history[:4]]
    row = other.state.log_history[0]
    assert row["router/max_violation_batch"] == pytest.approx(sum(steps) / 4)
    assert 0 < row["router/max_violation_global"] < row["router/max_violation_batch"]


def test_statistics_of_a_model_without_a_bias(tiny_model: Callable, tmp_path: Path) -> None:
    trainer, recorder = train(tiny_model(), tmp_path, RouterStatsCallback(), max_steps=2)
    row = trainer.state.log_history[0]
    assert row["aux_loss"] == row["aux_loss/expert"] > 0 and row["router/entropy"] > 0
    assert "router/bias_norm" not in row and recorder.biases == [[], []]


def test_evaluation_in_between_changes_nothing(tiny_model: Callable, tmp_path: Path) -> None:
    plain, _ = train(tiny_model(**V3_LIKE), tmp_path, LoadBalancingCallback(), max_steps=4)
    model = tiny_model(**V3_LIKE)
    evaluated = Trainer(model, arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1),
                        train_dataset=data, eval_dataset=data, callbacks=[LoadBalancingCallback()])  # fmt: skip
    evaluated.train()
    for one, other in zip(biases(plain.model), biases(model), strict=True):
        assert torch.equal(one, other) and one.any()
    assert losses(plain) == losses(evaluated)


def test_freeze_after(tiny_model: Callable, tmp_path: Path) -> None:
    _, recorder = train(tiny_model(**V3_LIKE), tmp_path, LoadBalancingCallback(freeze_after=2), max_steps=4)
    second, third, fourth = recorder.biases[1:]
    assert not torch.equal(recorder.biases[0][0], second[0])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(second, third, fourth, strict=True))
    _, never = train(tiny_model(**V3_LIKE), tmp_path, LoadBalancingCallback(freeze_after=0), max_steps=2)
    assert not any(bias.any() for step in never.biases for bias in step)


def interrupted_run(
    model: Callable[[], nn.Module], folder: Path, settings: dict | None = None, dataset: Rows = data, **kwargs: object
) -> tuple[Trainer, Recorder]:
    """Four steps, then four more by another trainer with another model, which starts from the checkpoint."""
    part = arguments(folder, max_steps=8, save_steps=4, save_strategy="steps", **kwargs)
    callback = LoadBalancingCallback(**(settings or {"update_rate": 0.01}))
    Trainer(model(), part, train_dataset=dataset, callbacks=[callback, StopAt(4)]).train()
    fresh, recorder = model(), Recorder()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.normal_()
    callback = LoadBalancingCallback(**(settings or {"update_rate": 0.01}))
    resumed = Trainer(fresh, part, train_dataset=dataset, callbacks=[callback, recorder])
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    return resumed, recorder


RESUMED = {
    "sign": ({"update_rate": 0.01}, {}, torch.float32),
    "proportional": ({"update_rate": 0.01, "update": "proportional"}, {}, torch.float32),
    "freeze after the checkpoint": ({"update_rate": 0.01, "freeze_after": 6}, {}, torch.float32),
    "freeze before it": ({"update_rate": 0.01, "freeze_after": 2}, {}, torch.float32),
    "accumulated": ({"update": "centered_sign"}, {"gradient_accumulation_steps": 2}, torch.float32),
    "bfloat16": ({"update_rate": 1e-4, "update": "proportional"}, {"learning_rate": 0.1}, torch.bfloat16),
}


@pytest.mark.parametrize("name", RESUMED)
def test_interrupted_and_resumed_equals_uninterrupted(tiny_model: Callable, tmp_path: Path, name: str) -> None:
    settings, kwargs, dtype = RESUMED[name]
    lengths = torch.arange(32)[:, None] % 17 + 8
    mask = (torch.arange(24)[None] < lengths).long()
    padded = Rows(input_ids=rows * mask, labels=rows.masked_fill(mask == 0, -100), attention_mask=mask)

    def model() -> nn.Module:
        return tiny_model(**V3_LIKE, sequence_balance_alpha=0.1).to(dtype)

    whole = Trainer(model(), arguments(tmp_path / "a", max_steps=8, **kwargs), train_dataset=padded,
                    callbacks=[LoadBalancingCallback(**settings)])  # fmt: skip
    whole.train()
    resumed, _ = interrupted_run(model, tmp_path / "b", settings, padded, **kwargs)
    keys = ("loss", "aux_loss", "router/max_violation_global", "router/bias_norm")
    for mine, theirs in zip(resumed.state.log_history[-5:-1], whole.state.log_history[-5:-1], strict=True):
        assert [mine[key] for key in keys] == [theirs[key] for key in keys]
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[key]), key
    found = [whole.model.state_dict()[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] for layer in (1, 2)]
    assert all(bias.any() and bias.dtype == torch.float32 for bias in found)


def test_the_bias_of_a_native_model_resumes(tmp_path: Path) -> None:
    """Its experts do not (transformers leaves them as they were), so that the rest of the run differs."""
    _, recorder = interrupted_run(native_model, tmp_path)
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    for layer, bias in zip((1, 2), recorder.biases[0], strict=True):
        before = saved[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        steps = (bias - before) / 0.01
        assert before.abs().max() > 0.02 and steps.abs().max() > 0.5
        assert (steps - steps.round()).abs().max() < 1e-3 and steps.abs().max() < 1.5


def test_a_step_that_the_gradient_scaler_skipped(tiny_model: Callable, tmp_path: Path) -> None:
    model = tiny_model(**V3_LIKE)

    class Skips(TrainerCallback):
        def on_pre_optimizer_step(self, *args: object, optimizer: object, **kwargs: object) -> None:
            optimizer._is_overflow = True  # what accelerate's wrapper sets when the scaler finds an overflow

        def on_optimizer_step(self, *args: object, optimizer: object, **kwargs: object) -> None:
            optimizer._is_overflow = True

    trainer = Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=data,
                      callbacks=[Skips(), LoadBalancingCallback()])  # fmt: skip
    trainer.train()
    assert not any(bias.any() for bias in biases(model))
    assert trainer.state.log_history[0]["router/max_violation_batch"] > 0


def test_frozen_gates_are_reported(tiny_model: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(**V3_LIKE)
    for gate in find_biased_gates(model):
        gate.layer.gate.requires_grad_(False)
    train(model, tmp_path, LoadBalancingCallback(), max_steps=1)
    assert "2 of 2 gates are frozen" in caplog.text
    assert not any(bias.any() for bias in biases(model))


@pytest.mark.parametrize("kind", ["ours", "native"])
def test_lora_leaves_the_bias_of_a_frozen_gate(
    tiny_model: Callable, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import LoraConfig, get_peft_model

    model = native_model() if kind == "native" else tiny_model(**V3_LIKE)
    model = get_peft_model(model, LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM"))
    trainer, _ = train(model, tmp_path, LoadBalancingCallback(), max_steps=2, gradient_checkpointing=True)
    assert "2 of 2 gates are frozen" in caplog.text
    assert not any(bias.any() for bias in biases(model))
    assert trainer.state.log_history[0]["router/max_violation_batch"] > 0


@pytest.mark.parametrize("kind", ["ours", "native"])
@pytest.mark.parametrize("how", ["all-linear", "parameter", "by hand", "copy"])
def test_no_bias_moves_that_an_adapter_does_not_hold(
    tiny_model: Callable, tmp_path: Path, kind: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is trained, saved and loaded again is what was trained."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def make() -> nn.Module:
        return (
            native_model()
            if kind == "native"
            else DeepseekV3ForCausalLM(DeepseekV3Config(**{**TINY, **V3_LIKE}, first_k_dense_replace=1))
        )

    targets = {
        "all-linear": {"target_modules": "all-linear"},
        "parameter": {"target_modules": ["o_proj"], "target_parameters": ["mlp.gate.weight"]},
        "by hand": {"target_modules": ["o_proj"]},
        "copy": {"target_modules": ["o_proj"], "modules_to_save": ["gate"]},
    }[how]
    torch.manual_seed(0)
    model = get_peft_model(make(), LoraConfig(r=2, task_type="CAUSAL_LM", **targets))
    if how == "by hand":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name.endswith("gate.weight"))
    train(model, tmp_path / "out", LoadBalancingCallback(update_rate=0.05), max_steps=3, learning_rate=0.0)
    moved = any(bias.abs().max() > 0.04 for bias in biases(model))
    assert moved is (how == "copy")
    assert ("2 of 2 gates are adapted by PEFT, whose files do not hold the bias" in caplog.text) is not moved
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(make(), tmp_path / "adapter")
    if how != "by hand":  # PEFT does not save what it does not know
        assert_same(again.eval()(data[0]["input_ids"][None]).logits, model.eval()(data[0]["input_ids"][None]).logits)
    assert all(map(torch.equal, biases(again), biases(model)))


def test_gates_of_a_merged_model_move_again(tiny_model: Callable) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(**V3_LIKE), LoraConfig(r=2, target_modules=["o_proj"])).merge_and_unload()
    model.train().requires_grad_(True)
    model(data[0]["input_ids"][None], labels=data[0]["labels"][None]).loss.backward()
    update_router_bias(model)
    assert any(bias.any() for bias in biases(model))


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize(
    ("name", "added"),
    [("deepseek_v2", False), ("deepseek_v3", False), ("deepseek_v3", True), ("qwen3_moe", False), ("mixtral", False)],
)
def test_native_models_resume_with_their_experts(name: str, added: bool, best: bool, tmp_path: Path) -> None:
    """A plain `load_state_dict` of what `save_pretrained` writes, which is what Trainer does, finds no experts.

    The callback is there from the beginning, or added to a trainer that is made already.
    """
    modeling_deepseekmoe.register()
    sizes = {key: TINY[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "intermediate_size", "initializer_range")}  # fmt: skip
    latent = {key: V3_LIKE[key] for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
    extra = {
        "deepseek_v2": {**latent, "n_routed_experts": 8, "moe_intermediate_size": 16, "q_lora_rank": None,
                        "num_experts_per_tok": 3, "n_shared_experts": 1, "first_k_dense_replace": 1},
        "deepseek_v3": {**latent, "n_routed_experts": 8, "moe_intermediate_size": 16, "q_lora_rank": None,
                        "num_experts_per_tok": 3, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 4,
                        "topk_group": 2},
        "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 8},
        "mixtral": {"num_local_experts": 8, "num_key_value_heads": 2},
    }[name]  # fmt: skip

    def make() -> nn.Module:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**sizes, **extra}))

    callback = LoadBalancingCallback if name == "deepseek_v3" else None

    def run(model: nn.Module, resume: bool) -> dict[str, torch.Tensor]:
        if callback is None:
            prepare_esft(model, {1: [0, 5], 2: [1, 2, 3]})
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01,
                    "lr_scheduler_type": "constant"}  # fmt: skip
        if best:  # of the first step, which the second one then makes worse
            settings |= {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2,
                         "metric_for_best_model": "eval_loss", "greater_is_better": True}  # fmt: skip
        trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=data, eval_dataset=data,
                          callbacks=[callback()] if callback and not added else [])  # fmt: skip
        if added:
            callback().add_to(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return {key: value.clone() for key, value in model.state_dict().items()}

    whole = run(make(), resume=False)
    if best:
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
        assert all(torch.equal(saved[key], value) for key, value in whole.items())
        return
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = run(make(), resume=True)
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_two_callbacks_that_count(tiny_model: Callable, tmp_path: Path) -> None:
    both = [LoadBalancingCallback(), RouterStatsCallback()]
    trainer = Trainer(tiny_model(**V3_LIKE), arguments(tmp_path, max_steps=1), train_dataset=data, callbacks=both)
    with pytest.raises(ValueError, match="only one may take the counts"):
        trainer.train()


def test_native_models_keep_no_hook(tmp_path: Path) -> None:
    model = native_model()
    train(model, tmp_path, LoadBalancingCallback(), max_steps=1)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_bad_input(tiny_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no gate with a balancing bias.* aux_loss_alpha of this package"):
        Trainer(tiny_model(), arguments(tmp_path), train_dataset=data, callbacks=[LoadBalancingCallback()])
    late = Trainer(tiny_model(), arguments(tmp_path, max_steps=1), train_dataset=data)
    late.add_callback(LoadBalancingCallback())
    with pytest.raises(ValueError, match="no gate with a balancing bias"):
        late.train()
    with pytest.raises(ValueError, match=r"update='median' .* 'sign'"):
        LoadBalancingCallback(update="median")
    with pytest.raises(ValueError, match=r"update_rate=-1 .* above 0"):
        LoadBalancingCallback(update_rate=-1)
    for freeze_after in (-1, 0.5, True):
        with pytest.raises(ValueError, match=rf"freeze_after={freeze_after} .* at least 0"):
            LoadBalancingCallback(freeze_after=freeze_after)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"n_gpu=2 .*DataParallel"):
        train(tiny_model(**V3_LIKE), tmp_path, LoadBalancingCallback(), max_steps=1)
