"""Adapters and selected experts in training: Trainer, two processes, and the examples as users run them."""

import copy
import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import fresh_process
import pytest
import torch
from esft_cases import Rows
from lora_cases import logits, make
from paths import ROOT
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tolerances import MERGED_LOGITS, assert_same
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from modeling_deepseekmoe import LoadBalancingCallback, expert_lora_config
from modeling_deepseekmoe.conversion import UpcyclingPlan, merge_adapter, upcycle


def load(name: str, folder: Path = ROOT / "examples") -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"loaded_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("train_router", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_run_with_dropout_resumes_bit_for_bit(
    train_router: bool, checkpointing: bool, tmp_path: Path
) -> None:
    """Adapters, router copies and their biases, which are updated along the way."""

    def run(**kwargs: object) -> tuple[nn.Module, list[float]]:
        model = make("deepseek_v3")
        config = expert_lora_config(
            model, r=4, lora_dropout=0.1, target_modules=("shared_experts", "o_proj"), train_router=train_router
        )
        torch.manual_seed(1)
        model = get_peft_model(model, config)
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, learning_rate=0.02, logging_steps=1, save_steps=2,
            report_to="none", seed=0, max_steps=4, use_cpu=True, gradient_checkpointing=checkpointing,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[LoadBalancingCallback(0.01)])
        trainer.train(**kwargs)
        return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]

    whole, losses = run()
    resumed, again = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses == again and len(losses) == 4
    states = whole.state_dict(), resumed.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    biases = [t for name, t in states[0].items() if name.endswith("modules_to_save.default.e_score_correction_bias")]
    assert len(biases) == (2 if train_router else 0) and all(bias.any() for bias in biases)
    loaded = PeftModel.from_pretrained(make("deepseek_v3"), tmp_path / "checkpoint-4").eval()
    assert_same(logits(loaded), logits(whole.eval()))


# ------------------------------------------------------------------------------------------------------- two processes
@pytest.mark.parametrize("what", ["lora", "esft"])
@pytest.mark.parametrize("how", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_processes_equal_one(what: str, how: str, tmp_path: Path) -> None:
    for part in ("one", "two"):
        (tmp_path / part).mkdir()
    script = load("adapted_training", ROOT / "tests" / "scripts")
    script.train(what, "plain", str(tmp_path / "one"))
    fresh_process.check(script.__file__, what, how, tmp_path / "two", ranks=2)
    one, two = (torch.load(tmp_path / part / "found.pt") for part in ("one", "two"))
    assert_same(two["losses"], one["losses"], "losses")
    assert one["losses"][2] < one["losses"][0]
    assert two["trained"].keys() == one["trained"].keys() and len(one["trained"]) >= 4
    for name, tensor in one["trained"].items():
        assert_same(two["trained"][name], tensor, name)
    if what == "esft":
        files = [load_file(tmp_path / part / "esft" / "esft.safetensors") for part in ("one", "two")]
    else:
        files = [load_file(tmp_path / part / "adapter_model.safetensors") for part in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        assert_same(files[1][name], files[0][name], name)


# ------------------------------------------------------------------------------------------------------------ examples
@pytest.fixture
def demo_model(source: Path, tmp_path: Path) -> Path:
    """A small upcycled model with a tokenizer, in the place of the demo's."""
    folder = tmp_path / "model"
    upcycle(source, folder, UpcyclingPlan(shared_width=16, num_shards=2, num_copies=2), dtype="float32")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def run_example(name: str, **settings: object) -> None:
    module = load(name)
    module.main(module.Settings(**settings))


def test_example_of_lora(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("finetune_lora",
        model=str(demo_model), output=tmp_path / "lora", rank=4, steps=3, block_size=32, held_out=8, experts=None,
        dropout=0.05, learning_rate=1e-2,
    )  # fmt: skip
    before, after = perplexities(capsys.readouterr().out)
    assert after < before
    report = merge_adapter(demo_model, tmp_path / "lora" / "adapter", tmp_path / "merged")
    assert report.weights > 0
    base = AutoModelForCausalLM.from_pretrained(demo_model)
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.randint(0, 256, (1, 9))
    assert (logits(merged, ids) - logits(adapted, ids)).abs().max() <= MERGED_LOGITS
    assert not torch.equal(logits(base, ids), logits(merged, ids))


def test_example_of_esft(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("finetune_esft",
        model=str(demo_model), output=tmp_path / "esft", method="token", threshold=0.3, samples=8, steps=6,
        block_size=32, held_out=8, learning_rate=1e-2,
    )  # fmt: skip
    printed = capsys.readouterr().out
    before, after = perplexities(printed)
    assert after < before and "parameters are trained" in printed and "MB in" in printed
    assert merge_adapter(demo_model, tmp_path / "esft", tmp_path / "merged").tensors > 0


def perplexities(printed: str) -> tuple[float, float]:
    line = next(line for line in printed.splitlines() if line.startswith("held-out perplexity"))
    words = line.replace(";", " ").split()
    return float(words[2]), float(words[4])


def test_example_of_trl(demo_model: Path, tmp_path: Path) -> None:
    module = load("sft_trl")
    rows = module.conversations()
    assert len(rows) > 100 and rows[0]["messages"][0]["role"] == "user"
    run_example(
        "sft_trl", model=str(demo_model), output=tmp_path / "sft", rank=4, steps=2, learning_rate=1e-2, max_length=64
    )
    tensors = load_file(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")
    assert any(".mlp.experts.lora_B" in name and tensor.any() for name, tensor in tensors.items())
    assert any(".self_attn.q_proj.lora_B" in name and tensor.any() for name, tensor in tensors.items())
    shutil.rmtree(tmp_path / "sft")
