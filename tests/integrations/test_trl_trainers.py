"""One step of every trainer of TRL: whose class is trained, and whether the balance losses are."""

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import fresh_process
import pytest
import torch
import trl
from conftest import TINY, V3_LIKE
from datasets import Dataset
from tokenizers_of_tests import tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import modeling_deepseekmoe
from modeling_deepseekmoe import DeepseekConfig, DeepseekMoeConfig, DeepseekV3Config, RouterStatsCallback

SIZES = {**TINY, "vocab_size": 256, "max_position_embeddings": 256, "bos_token_id": 188, "eos_token_id": 189,
         "pad_token_id": 190, "aux_loss_alpha": 0.0, "first_k_dense_replace": 1}  # fmt: skip
# Of every type: the class, its fields, and that of the coefficient of its loss.
KINDS = {
    "deepseek": (DeepseekConfig, SIZES, "aux_loss_alpha"),
    "deepseekmoe": (DeepseekMoeConfig, {**SIZES, **V3_LIKE}, "aux_loss_alpha"),
    "deepseek_v3": (DeepseekV3Config, {**SIZES, **V3_LIKE}, "sequence_balance_alpha"),
}
TEXTS = [topics[name][:60] for name in sorted(topics)[:8]]
PAIRS = {"prompt": [text[:10] for text in TEXTS], "chosen": [text[10:30] for text in TEXTS],
         "rejected": [text[30:45] for text in TEXTS]}  # fmt: skip
ONLY_PROMPTS = {"prompt": PAIRS["prompt"]}
LABELLED = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [row % 2 == 0 for row in range(8)]}
COMPLETIONS = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"]}
TALKS = {
    "messages": [
        [{"role": "user", "content": text[:10]}, {"role": "assistant", "content": text[10:]}] for text in TEXTS
    ]
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def reward(completions: list[str], **kwargs: object) -> list[float]:
    return [float(len(set(text))) + row for row, text in enumerate(completions)]


GENERATES = {"num_generations": 4, "max_completion_length": 6}
TRAINERS: dict[str, tuple[Any, Any, dict, dict]] = {
    "SFT": (trl.SFTTrainer, trl.SFTConfig, {"text": TEXTS}, {}),
    "DPO": (trl.DPOTrainer, trl.DPOConfig, PAIRS, {}),
    "KTO": (trl.KTOTrainer, trl.KTOConfig, LABELLED, {}),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig, ONLY_PROMPTS, GENERATES),
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, ONLY_PROMPTS, {**GENERATES, "beta": 0.0}),
    "GRPO with a reference": (trl.GRPOTrainer, trl.GRPOConfig, ONLY_PROMPTS, {**GENERATES, "beta": 0.05}),
    "Reward": (trl.RewardTrainer, trl.RewardConfig, PAIRS, {}),
    "Distillation": (trl.DistillationTrainer, trl.DistillationConfig, COMPLETIONS, {"max_completion_length": 6}),
    "GKD": (GKDTrainer, GKDConfig, TALKS, {"lmbda": 0.0, "seq_kd": False}),
    "ORPO": (ORPOTrainer, ORPOConfig, PAIRS, {}),
}
# What trains the balance losses of the config.
TRAINS = {"SFT", "DPO", "KTO", "RLOO", "GRPO", "GRPO with a reference"}


class Gradients(TrainerCallback):
    """Keeps the gradients of the gates before the optimizer's step."""

    def __init__(self) -> None:
        self.gates: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gates = {name: weight.grad.clone() for name, weight in named if name.endswith("mlp.gate.weight")}


def saved(kind: str, folder: Path, alpha: float) -> Path:
    config_class, fields, coefficient = KINDS[kind]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_class(**{**fields, coefficient: alpha})).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def step(name: str, folder: Path, by_path: bool, out: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """One optimizer step."""
    trainer_class, config_class, data, settings = TRAINERS[name]
    arguments = config_class(str(out), max_steps=1, per_device_train_batch_size=4, logging_steps=1, report_to="none",
                             save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, learning_rate=0.0,
                             gradient_checkpointing=False, max_grad_norm=0.0, **settings)  # fmt: skip
    auto = AutoModelForSequenceClassification if name == "Reward" else AutoModelForCausalLM
    labels = {"num_labels": 1} if name == "Reward" else {}
    torch.manual_seed(1)
    model = str(folder) if by_path else auto.from_pretrained(folder, **labels)
    text_tokenizer, others = tokenizer(), {}
    text_tokenizer.chat_template = TEMPLATE if name == "GKD" else None
    if name in ("Distillation", "GKD"):
        others["teacher_model"] = str(folder)
    if name in ("RLOO", "GRPO", "GRPO with a reference"):
        others["reward_funcs"] = reward
    kept = Gradients()
    torch.manual_seed(2)
    trainer = trainer_class(
        model, args=arguments, train_dataset=Dataset.from_dict(data), processing_class=text_tokenizer,
        callbacks=[RouterStatsCallback(), kept], **others,
    )  # fmt: skip
    torch.manual_seed(3)
    trainer.train()
    return trainer, kept.gates


def models_of(trainer: Any) -> list[nn.Module]:
    found = [getattr(trainer, name, None) for name in ("model", "ref_model", "teacher_model")]
    return [trainer.accelerator.unwrap_model(model) for model in found if isinstance(model, nn.Module)]


def check(name: str, kind: str, by_path: bool, tmp_path: Path) -> None:
    trainer, with_loss = step(name, saved(kind, tmp_path / "with", 0.5), by_path, tmp_path / "out")
    _, without = step(name, saved(kind, tmp_path / "without", 0.0), by_path, tmp_path / "out")
    models = models_of(trainer)
    assert len(models) == 1 + (name in ("DPO", "KTO", "RLOO", "GRPO with a reference", "Distillation", "GKD"))
    for model in models:
        assert type(model).__module__.startswith("modeling_deepseekmoe."), type(model)
    difference = max(float((gradient - without[key]).abs().max()) for key, gradient in with_loss.items())
    logged = trainer.state.log_history[0]
    assert ("aux_loss" in logged, "aux_loss_not_trained" in logged) == (name in TRAINS, name not in TRAINS)
    assert difference > 1e-3 if name in TRAINS else difference == 0


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step(name: str, tmp_path: Path) -> None:
    kind = list(KINDS)[list(TRAINERS).index(name) % len(KINDS)]
    check(name, kind, name not in ("GKD", "ORPO"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("by_path", [False, True], ids=["model", "path"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_of_all_kinds(name: str, kind: str, by_path: bool, tmp_path: Path) -> None:
    check(name, kind, by_path, tmp_path)


@pytest.mark.parametrize("override", [False, True])
def test_whose_class_a_path_is_loaded_with(override: bool, tmp_path: Path) -> None:
    """The names in `architectures` are those of transformers' own classes too."""
    from trl.trainer import dpo_trainer, sft_trainer

    folder = saved("deepseek_v3", tmp_path / "v3", 0.0)
    modeling_deepseekmoe.register(override_native=override)
    owner = "modeling_deepseekmoe." if override else "transformers.models.deepseek_v3."
    for module in (sft_trainer, dpo_trainer):
        model = module.create_model_from_path(str(folder), device_map=None)
        assert type(model).__module__.startswith(owner)
    given = sft_trainer.create_model_from_path(str(folder), AutoModelForSequenceClassification, device_map=None)
    assert type(given).__name__ == "DeepseekV3ForSequenceClassification"


def test_trl_may_be_imported_first(tmp_path: Path) -> None:
    """In this process it comes after the package."""
    folder = saved("deepseek_v3", tmp_path / "v3", 0.0)
    code = (
        "from trl.trainer import sft_trainer\nimport modeling_deepseekmoe as m\nm.register(override_native=True)\n"
        f"print(type(sft_trainer.create_model_from_path({str(folder)!r}, device_map=None)).__module__)"
    )
    done = fresh_process.check("-c", code)
    assert done.stdout.split()[-1] == "modeling_deepseekmoe.modeling_deepseekmoe"


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_has_an_auto_map_that_is_empty_and_its_own(kind: str, tmp_path: Path) -> None:
    """Others read it without asking, and transformers writes into what it finds."""
    config_class, fields, _ = KINDS[kind]
    config = config_class(**fields)
    assert config.auto_map == {} and "auto_map" not in config.to_dict()
    config.auto_map["AutoConfig"] = "x.Y"  # as transformers does for code of one's own
    config.auto_map["AutoModel"] = "x.Z"
    assert config.auto_map == {"AutoConfig": "x.Y", "AutoModel": "x.Z"} and config_class(**fields).auto_map == {}
    assert config_class.auto_map == {}
    config.auto_map = {"AutoModel": "someone/else--x.Y"}
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).auto_map == {"AutoModel": "someone/else--x.Y"}


def test_a_member_of_the_family_without_experts(tmp_path: Path) -> None:
    """TRL's forward asks it for router logits all the same."""
    config = DeepseekMoeConfig(**{**SIZES, "n_routed_experts": None, "aux_loss_alpha": 0.01})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    trainer_class, config_class, data, _ = TRAINERS["SFT"]
    arguments = config_class(str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, report_to="none",
                             save_strategy="no", use_cpu=True, bf16=False, logging_steps=1)  # fmt: skip
    trainer = trainer_class(str(tmp_path / "dense"), args=arguments, train_dataset=Dataset.from_dict(data))
    trainer.train()
    assert 4 < trainer.state.log_history[0]["loss"] < 8


def test_code_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers names it in the config of what is saved."""
    (tmp_path / "my_moe.py").write_text(
        "from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM\n\n\n"
        "class MyModel(DeepseekMoeForCausalLM):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_moe

    my_moe.MyModel.register_for_auto_class("AutoModelForCausalLM")
    model = my_moe.MyModel(DeepseekMoeConfig(**SIZES))
    model.save_pretrained(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["auto_map"] == {"AutoModelForCausalLM": "my_moe.MyModel"}


# ------------------------------------------------------------------------- losses that are computed and not trained
def train_step(model: nn.Module, loss_of: Callable[[Any], torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    loss_of(model(torch.arange(3, 12)[None])).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("trained", [False, True])
def test_a_loop_of_ones_own(tiny_model: Callable, warnings_of_package: list[str], trained: bool) -> None:
    model = tiny_model(aux_loss_alpha=0.3)
    optimizer, stats = torch.optim.SGD(model.parameters(), lr=1e-3), modeling_deepseekmoe.RouterStats(model)
    for _ in range(2):
        train_step(model, lambda out: out.logits.square().mean() + (out.aux_loss if trained else 0.0), optimizer)
        stats.add(modeling_deepseekmoe.take_router_load(model))
    assert stats.to_dict()["losses_trained"] is trained
    assert ("aux_loss/expert" in stats.summary()) is trained
    assert ("aux_loss_not_trained/expert" in stats.summary()) is not trained
    said = [text for text in warnings_of_package if "NOT trained" in text]
    assert len(said) == (not trained) and all("{'aux_loss_alpha': 0.3}" in text for text in said)


def test_optimizers_that_step_inside_the_backward_pass(tiny_model: Callable, warnings_of_package: list[str]) -> None:
    """The gradient comes to the norm before it comes to the losses."""
    model = tiny_model(aux_loss_alpha=0.3)
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=1e-3)
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    model(torch.arange(3, 12)[None], labels=torch.arange(3, 12)[None]).loss.backward()
    assert not any("NOT trained" in text for text in warnings_of_package)


@pytest.mark.parametrize("kind", ["labels", "no labels", "reentrant", "frozen gates", "no losses", "a copy"])
def test_what_reaches_the_losses(tiny_model: Callable, warnings_of_package: list[str], kind: str) -> None:
    import copy

    model = tiny_model(aux_loss_alpha=0.0 if kind == "no losses" else 0.3)
    model = copy.deepcopy(model) if kind == "a copy" else model
    if kind == "frozen gates":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lm_head" in name)
    if kind == "reentrant":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    labels = torch.arange(3, 12)[None] if kind in ("labels", "reentrant", "frozen gates") else None
    out = model(torch.arange(3, 12)[None], labels=labels)
    (out.logits.square().mean() if labels is None else out.loss).backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    load = modeling_deepseekmoe.take_router_load(model)
    model(torch.arange(3, 12)[None])  # the next forward pass of training finds it
    said = any("NOT trained" in text for text in warnings_of_package)
    reached = {"labels": 1.0, "reentrant": 1.0}.get(kind, 0.0)
    watched = kind not in ("no losses", "frozen gates")  # which depend on nothing that is trained
    assert (float(load.loss_weight), int(load.losses_watched)) == (reached, int(watched))
    assert said is (kind in ("no labels", "a copy"))  # where something is trained, and not by these
