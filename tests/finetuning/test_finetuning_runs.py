"""Runs of `deepseekmoe finetune` on tiny models: what they train, measure, write and say."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from cli_runner import run
from finetuning_cases import assert_same_bits, chats, checkpoint, tensors_of, write_rows
from peft import PeftModel
from tokenizers_of_tests import TEMPLATE, chat_tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from modeling_deepseekmoe import StackedExpertsConfig, load_correction, load_esft, optimize_expert_lora
from modeling_deepseekmoe.finetuning import fitting, results
from modeling_deepseekmoe.finetuning import run as runs
from modeling_deepseekmoe.finetuning.build import trainer_settings
from modeling_deepseekmoe.finetuning.data import split_examples
from modeling_deepseekmoe.finetuning.encoding import IGNORED, Example, encode_rows
from modeling_deepseekmoe.finetuning.rows import load_rows
from modeling_deepseekmoe.quantization.experts import QuantizedExperts

QUICK = ("--max-steps", 3, "--learning-rate", 0.003, "--save-steps", 100, "--eval-steps", 0)


@pytest.fixture(autouse=True)
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of reports take longer than the runs."""
    for module in (results, runs):
        monkeypatch.setattr(module, "has_plots", lambda: False)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model that has biased gates, and 24 chats."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "model", biased=True)
    write_rows(tmp_path / "chat.jsonl", chats(24))
    return tmp_path


def held_out(place: Path, template: str = TEMPLATE) -> tuple[Example, ...]:
    rows = load_rows(str(place / "chat.jsonl"))
    examples = encode_rows(rows, chat_tokenizer(template), loss_on="assistant", max_length=160).examples
    return split_examples(examples, 0.1, 0)[1]


@torch.no_grad()
def perplexity_of(model: torch.nn.Module, examples: tuple[Example, ...]) -> float:
    """One sequence at a time, without padding, by the definition."""
    loss, tokens = 0.0, 0
    for example in examples:
        logits = model(torch.tensor([example.ids])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        loss += float(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        tokens += int((labels != IGNORED).sum())
    return math.exp(loss / tokens)


def trained_model(place: Path, method: str) -> torch.nn.Module:
    """The model as a user loads it."""
    if method == "full":
        return AutoModelForCausalLM.from_pretrained(place / "out" / "model").eval()
    base = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    if method == "esft":
        load_esft(base, place / "out" / "experts")
        return base
    return PeftModel.from_pretrained(base, place / "out" / "adapter").eval()


@pytest.mark.parametrize("method", ["lora", "esft", "full"])
def test_what_a_run_leaves_is_what_it_says(place: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if method == "esft":
        monkeypatch.setattr(results, "has_plots", lambda: True)
    code, output = run("finetune", "model", "--data", "chat.jsonl", "--method", method, "--output", "out", *QUICK)
    assert code == 0, output
    result = json.loads((place / "out" / "result.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    assert result["before"]["perplexity"] == pytest.approx(perplexity_of(base, held_out(place)), rel=1e-5)
    after = perplexity_of(trained_model(place, method), held_out(place))
    assert result["after"]["perplexity"] == pytest.approx(after, rel=1e-5)
    assert after < result["before"]["perplexity"] and f"{result['after']['perplexity']:.3f} after" in output
    for when in ("before", "after"):
        report = json.loads((place / "out" / when / "routing.json").read_text())
        assert len(report["layers"]) == 2 and report["title"].startswith("model, ")
        page = place / "out" / when / "routing.html"
        assert "<html" in page.read_text() if method == "esft" else not page.exists()
    assert not (place / "out" / "checkpoints").exists()
    for command in result["next"]:  # as they are printed
        assert f"  {command}\n" in output
        code, said = run(*shlex.split(command)[1:])
        assert code == 0, said
    assert [command.split()[1] for command in result["next"]] == (["push"] if method == "full" else ["merge", "push"])
    merged = place / "out" / ("model" if method == "full" else "merged")
    tokens = held_out(place)
    assert perplexity_of(AutoModelForCausalLM.from_pretrained(merged).eval(), tokens) == pytest.approx(after, rel=1e-4)


def test_qlora_trains_over_quantised_experts(place: Path) -> None:
    checkpoint(place / "wide", biased=True, hidden_size=64, moe_intermediate_size=64)
    code, output = run("finetune", "wide", "--data", "chat.jsonl", "--method", "qlora", "--output", "out", *QUICK)
    assert code == 0 and "qlora" in output, output
    result = json.loads((place / "out" / "result.json").read_text())
    quantised = StackedExpertsConfig(format="nf4")
    base = AutoModelForCausalLM.from_pretrained(place / "wide", quantization_config=quantised).eval()
    assert isinstance(base.model.layers[1].mlp.experts, QuantizedExperts)
    before = perplexity_of(base, held_out(place))
    assert result["before"]["perplexity"] == pytest.approx(before, rel=1e-5)
    adapted = optimize_expert_lora(PeftModel.from_pretrained(base, place / "out" / "adapter")).eval()
    after = perplexity_of(adapted, held_out(place))
    assert result["after"]["perplexity"] == pytest.approx(after, rel=1e-5) and after < before
    assert {tensor.dtype for tensor in tensors_of(place / "out" / "adapter").values()} == {torch.float32}
    whole = AutoModelForCausalLM.from_pretrained(place / "wide").eval()
    assert perplexity_of(whole, held_out(place)) != pytest.approx(before, rel=1e-5)
    for command in result["next"]:
        code, said = run(*shlex.split(command)[1:])
        assert code == 0, said
    merged = AutoModelForCausalLM.from_pretrained(place / "out" / "merged").eval()
    unrounded = perplexity_of(PeftModel.from_pretrained(whole, place / "out" / "adapter").eval(), held_out(place))
    assert perplexity_of(merged, held_out(place)) == pytest.approx(unrounded, rel=1e-4)


def test_qlora_gives_back_what_rounding_took(place: Path) -> None:
    checkpoint(place / "wide", biased=True, hidden_size=64, moe_intermediate_size=64)
    options = ("--method", "qlora", "--format", "mxfp4", "--correction-rank", 64, *QUICK)
    code, output = run("finetune", "wide", "--data", "chat.jsonl", "--output", "out", *options)
    assert code == 0, output
    result = json.loads((place / "out" / "result.json").read_text())
    whole = AutoModelForCausalLM.from_pretrained(place / "wide").eval()
    assert result["before"]["perplexity"] == pytest.approx(perplexity_of(whole, held_out(place)), rel=1e-5)
    base = AutoModelForCausalLM.from_pretrained(
        place / "wide", quantization_config=StackedExpertsConfig(format="mxfp4")
    )
    load_correction(base, place / "out" / "correction.safetensors")
    adapted = optimize_expert_lora(PeftModel.from_pretrained(base, place / "out" / "adapter"))
    after = perplexity_of(adapted.eval(), held_out(place))
    assert result["after"]["perplexity"] == pytest.approx(after, rel=1e-5)
    (place / "chat.txt").write_text("What is a gate? It scores experts. " * 20)
    compare = ("--compare", "chat.txt", "--format", "mxfp4", "--correction", "out/correction.safetensors")
    code, said = run(*shlex.split(result["next"][0])[1:], *compare)
    figures = re.search(r"has a perplexity of ([\d.]+), merged into float32 ([\d.]+);", said)
    assert code == 0 and figures is not None, said
    assert float(figures[1]) == pytest.approx(float(figures[2]), rel=1e-3)  # it is made for these very weights


def test_full_training_balances_the_gates_and_keeps_the_config(place: Path) -> None:
    options = ("--method", "full", "--output", "out", "--balance-rate", 0.5, *QUICK)
    assert run("finetune", "model", "--data", "chat.jsonl", *options)[0] == 0
    before, after = tensors_of(place / "model"), tensors_of(place / "out" / "model")
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    for name in biases:
        moved = (after[name] - before[name]).abs()
        assert moved.max() >= 0.5 and (moved / 0.5 - (moved / 0.5).round()).abs().max() < 1e-6  # whole updates
    configs = [json.loads((folder / "config.json").read_text()) for folder in (place / "model", place / "out/model")]
    assert configs[0] == configs[1]


def test_lora_with_gates_updates_their_bias_and_saves_it(place: Path) -> None:
    options = ("--output", "out", "--train-router", "--balance-rate", 0.5, *QUICK)
    assert run("finetune", "model", "--data", "chat.jsonl", *options)[0] == 0
    biases = [one for name, one in tensors_of(place / "out/adapter").items() if "e_score_correction_bias" in name]
    assert len(biases) == 2 and all(bias.abs().max() >= 0.5 for bias in biases)


def test_lora_adapts_experts_attention_and_shared_experts(place: Path) -> None:
    assert run("finetune", "model", "--data", "chat.jsonl", "--output", "out", "--rank", 3, *QUICK)[0] == 0
    names = [name for name in tensors_of(place / "out" / "adapter") if "lora_B" in name]
    for part in (".self_attn.o_proj.", ".mlp.experts.", ".mlp.shared_experts."):
        assert any(part in name for name in names), part
    assert not any(".gate." in name for name in names)
    options = ("--output", "other", "--target-modules", "q_proj", *QUICK)
    assert run("finetune", "model", "--data", "chat.jsonl", *options)[0] == 0
    names = list(tensors_of(place / "other" / "adapter"))
    assert any("q_proj" in name for name in names) and not any("o_proj" in name for name in names)


@pytest.mark.parametrize("kind", ["completion", "text", "plain"])
def test_other_kinds_of_data(place: Path, kind: str) -> None:
    texts = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in chats(24)]
    rows = [{"prompt": q, "completion": a, "id": 3} if kind == "completion" else {"body": q + a} for q, a in texts]
    path, column = write_rows(place / "rows.jsonl", rows), ("--column", "body") if kind == "text" else ()
    if kind == "plain":
        path = place / "page.txt"
        path.write_text("\n".join(q + a for q, a in texts))
    code, output = run("finetune", "model", "--data", path, *column, "--output", "out", *QUICK)
    assert code == 0, output
    measures = [json.loads((place / "out" / when / "measures.json").read_text()) for when in ("before", "after")]
    assert measures[1]["perplexity"] < measures[0]["perplexity"]
    assert ("not used: id" in output) == (kind == "completion")
    assert ("is continued in a further sequence" in output) == (kind == "plain")


def test_packed_rows_do_not_see_each_other(place: Path) -> None:
    """The perplexity of packed sequences is that of each alone, and packed training gives other batches."""
    options = ("--packing", "--output", "packed", "--max-length", 160, *QUICK)
    code, output = run("finetune", "model", "--data", "chat.jsonl", *options)
    assert code == 0, output
    result = json.loads((place / "packed" / "result.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    assert result["before"]["perplexity"] == pytest.approx(perplexity_of(base, held_out(place)), rel=1e-5)
    assert result["after"]["perplexity"] < result["before"]["perplexity"]


def test_an_evaluation_file_and_none(place: Path) -> None:
    write_rows(place / "eval.jsonl", chats(30)[24:])
    options = ("--output", "out", "--eval-data", "eval.jsonl", *QUICK)
    code, output = run("finetune", "model", "--data", "chat.jsonl", *options)
    assert code == 0 and "on 6 sequences held out" in output and "to train on: 24 sequences" in output
    code, output = run("finetune", "model", "--data", "chat.jsonl", "--output", "none", "--eval-share", 0, *QUICK)
    assert code == 0 and "nothing to evaluate on" in output and "on 24 sequences that were trained on" in output


# ------------------------------------------------------------------------------------------------------------ refusals
BAD_DATA = {
    "empty": ([], (), "chat.jsonl is empty"),
    "no such column": (chats(4), ("--column", "body"), "column='body' is not allowed"),
    "a broken row": ([*chats(4), '{"messages": ['], (), "chat.jsonl, line 5 is no JSON"),
    "no assistant": ([*chats(4), {"messages": [{"role": "user", "content": "Hi"}]}], (), "line 5"),
    "one row": (chats(1), (), "eval_share=0.1 is not allowed for 1 row"),
    "too long": (chats(4), ("--max-length", 500), "max_length=500 is not allowed: the model's context is 160"),
    "another loss": (chats(4), ("--loss-on", "completion"), "loss_on='completion' is not allowed for rows of chat"),
    "another kind to evaluate on": (
        chats(4),
        ("--eval-data", "texts.jsonl"),
        "eval_data='texts.jsonl' is not allowed",
    ),
}


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_message_and_nothing_written(place: Path, case: str) -> None:
    rows, options, message = BAD_DATA[case]
    write_rows(place / "chat.jsonl", rows)
    write_rows(place / "texts.jsonl", [{"text": "A text."}])
    before = listing(place)
    code, output = run("finetune", "model", "--data", "chat.jsonl", "--output", "out", *options)
    assert code == 2 and message in output
    assert output.count("Error: ") == 1 and output.startswith("Error: ") and listing(place) == before


def test_a_model_without_a_chat_template_or_of_another_tokenizer(place: Path) -> None:
    checkpoint(place / "bare", template=None)
    before = listing(place)
    code, output = run("finetune", "bare", "--data", "chat.jsonl", "--output", "out")
    assert code == 2 and "the tokenizer has no chat template" in output and listing(place) == before
    assert run("finetune", "bare", "--data", "chat.jsonl", "--output", "out", "--tokenizer", "model", *QUICK)[0] == 0
    checkpoint(place / "small", vocab_size=150)
    code, output = run("finetune", "small", "--data", "chat.jsonl", "--output", "out2")
    assert code == 2 and "and the model has vocab_size=150: it is another model's" in output


def test_mistakes_that_the_model_shows_leave_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(place)
    for options, message in (
        (("--target-modules", "nothing"), "target_modules: 'nothing' is not allowed"),
        (("--report-to", "nobody"), "nobody is not supported"),
        (("--max-length", 161), "max_length=161 is not allowed"),
    ):
        code, output = run("finetune", "model", "--data", "chat.jsonl", "--output", "out", *options)
        assert code == 2 and message in output and listing(place) == before, output
    checkpoint(place / "unbiased")
    before = listing(place)
    options = ("--method", "full", "--balance-rate", 0.01)
    code, output = run("finetune", "unbiased", "--data", "chat.jsonl", "--output", "out", *options)
    assert code == 2 and "balance_rate=0.01 is not allowed for unbiased: its gates have no balancing bias" in output
    assert listing(place) == before
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "fp8"}})
    )
    code, output = run("finetune", "model", "--data", "chat.jsonl", "--output", "out")
    assert code == 2 and "its weights are quantised. Convert it first" in output
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, output = run("finetune", "model", "--data", "chat.jsonl", "--output", "out")
    assert code == 2 and "WORLD_SIZE=2 is not allowed: a run is one process" in output


def test_what_does_not_fit_is_not_tried(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = fitting.Machine(10**6, None, False)
    monkeypatch.setattr(runs, "this_machine", lambda: machine)
    before = listing(place)
    code, output = run("finetune", "model", "--data", "chat.jsonl", "--output", "out", *QUICK)
    assert code == 1 and "Failed: method='lora' does not fit: 0.00 GB of this machine's memory" in output
    assert listing(place) == before
    code, output = run("finetune", "model", "--data", "chat.jsonl", "--output", "out", "--force", *QUICK)
    assert code == 0 and "is tried all the same" in output


def test_activations_are_recomputed_where_it_fits_only_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, options = runs.read_config(place / "model"), runs.FinetuneOptions(model="m", data="d", output="o")
    ample = fitting.Machine(10**12, None, False)
    plain, again = (
        next(one for one in fitting.plan_methods(config, runs.replace(options, recompute=value), ample, 160)
             if one.method == "lora").needs for value in (False, True)
    )  # fmt: skip
    assert again < plain
    for memory, recompute, fits in ((plain, False, True), (plain - 1, True, True), (again - 1, True, False)):
        machine = fitting.Machine(memory, None, False)
        plans = {one.method: one for one in fitting.plan_methods(config, options, machine, 160)}
        assert (plans["lora"].recompute, plans["lora"].fits) == (recompute, fits)
        assert "<- this run" in fitting.fitting_table(list(plans.values()), machine, "lora")


def test_what_is_decided_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    machine = fitting.this_machine()
    assert str(machine) == "70.00 GB of A GPU are free" and machine.device == "cuda:0"
    dtypes = {"lora": "bfloat16", "qlora": "bfloat16", "esft": "bfloat16", "full": "float32"}
    for method, dtype in dtypes.items():
        options = runs.FinetuneOptions(model="m", data="d", output="o", method=method)
        assert fitting.choose_dtype(options, machine) == dtype
        settings = trainer_settings(options, machine, evaluates=True)
        assert settings["bf16"] and not settings["use_cpu"] and settings["eval_steps"] == 0.5
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="2 GPUs are visible, and a run takes one: set CUDA_VISIBLE_DEVICES=0"):
        fitting.this_machine()


def test_folders_that_are_in_use(place: Path) -> None:
    command = ("finetune", "model", "--data", "chat.jsonl", "--output", "out", *QUICK)
    (place / "out").mkdir()
    (place / "out" / "mine.txt").write_text("mine")
    code, output = run(*command)
    assert code == 2 and "must not exist, or be an empty folder" in output
    code, output = run(*command, "--overwrite")
    assert code == 2 and "must not exist, or be an empty folder" in output
    (place / "out" / "mine.txt").unlink()
    assert run(*command)[0] == 0
    (place / "out" / "mine.txt").write_text("mine")
    code, output = run(*command)
    assert code == 2 and "the run there is over" in output
    assert run(*command, "--rank", 2, "--overwrite")[0] == 0
    assert (place / "out" / "mine.txt").read_text() == "mine"
    assert json.loads((place / "out" / "adapter" / "adapter_config.json").read_text())["r"] == 2


# -------------------------------------------------------------------------------------------------------------- script
@pytest.mark.parametrize(
    "options",
    [
        ("--method", "lora", "--dropout", 0.1, "--epochs", 1.5, "--rank", 2),
        ("--method", "qlora", "--max-steps", 3, "--format", "fp8", "--correction-rank", 4),
        ("--method", "esft", "--max-steps", 4, "--p", 0.3),
        ("--method", "full", "--packing", "--max-steps", 3, "--eval-data", "eval.jsonl", "--learning-rate", 0.001),
    ],
    ids=lambda options: options[1],
)
def test_the_script_trains_the_same_weights(
    place: Path, options: tuple, monkeypatch: pytest.MonkeyPatch, override_native: None
) -> None:
    write_rows(place / "eval.jsonl", chats(30)[24:])
    command = ("finetune", "model", "--data", "chat.jsonl", "--save-steps", 2, *options)
    before = listing(place)
    code, output = run(*command, "--output", "of-script", "--write-script", "train.py")
    assert code == 0 and listing(place) == sorted([*before, "train.py"]), output
    exec(compile((place / "train.py").read_text(), "train.py", "exec"), {"__name__": "__main__"})
    code, output = run(*command, "--output", "out")
    assert code == 0, output
    trained = {"lora": "adapter", "qlora": "adapter", "esft": "experts", "full": "model"}[options[1]]
    assert_same_bits(place / "out" / trained, place / "of-script" / trained)
