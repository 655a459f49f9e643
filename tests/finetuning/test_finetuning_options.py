"""Options of a fine-tuning: names, types, limits, YAML, and what has no effect."""

from dataclasses import fields
from pathlib import Path

import pytest
from cli_runner import run
from paths import ROOT

from modeling_deepseekmoe.finetuning.options import METHODS, FinetuneOptions, read_options
from modeling_deepseekmoe.finetuning.rows import load_rows

NEEDED = {"model": "m", "data": "d", "output": "o"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rnak": 8}, "'rnak' is not an option: is it 'rank'"),
        ({"data": None}, "data is missing: give it on the command line or in the file"),
        ({"method": "dora"}, "method='dora' is not allowed: it must be one of lora, qlora, esft, full"),
        ({"rank": 0}, "rank=0 is not allowed: it must be at least 1"),
        ({"rank": True}, "rank=True is not allowed: it must be a whole number"),
        ({"rank": 8.5}, "rank=8.5 is not allowed: it must be a whole number"),
        ({"packing": "yes"}, "packing='yes' is not allowed: it must be true or false"),
        ({"learning_rate": "much"}, "learning_rate='much' is not allowed: it must be a number"),
        ({"learning_rate": 0}, "learning_rate=0.0 is not allowed: it must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan is not allowed: it must be a number"),
        ({"dropout": 1.0}, "dropout=1.0 is not allowed: it must be at least 0 and below 1"),
        ({"target_modules": "q_proj"}, "target_modules='q_proj' is not allowed: it must be a list of names"),
        ({"method": "esft", "p": 1.5}, "p=1.5 is not allowed: it must be above 0 and at most 1"),
        ({"loss_on": "user"}, "loss_on='user' is not allowed: it must be one of assistant, all, completion"),
        ({"method": "full", "rank": 8}, "rank=8 is not allowed with method='full': it belongs to lora, qlora"),
        ({"format": "fp8"}, "format='fp8' is not allowed with method='lora': it belongs to qlora"),
        ({"p": 0.2}, "p=0.2 is not allowed with method='lora': it belongs to esft"),
        ({"balance_rate": 0.1}, "balance_rate=0.1 is not allowed with method='lora', whose gates are frozen"),
        ({"method": "esft", "balance_rate": 0.1}, "balance_rate=0.1 is not allowed with method='esft'"),
        ({"max_steps": 3, "epochs": 2}, "epochs=2.0 is not allowed with max_steps=3: give one"),
        ({"eval_data": "e", "eval_share": 0.3}, "eval_share=0.3 is not allowed with eval_data"),
        ({"eval_share": 0, "eval_steps": 5}, "eval_steps=5.0 is not allowed with eval_share=0"),
    ],
)
def test_mistakes(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneOptions.of({**NEEDED, **values})


def test_yaml_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("learning-rate: 1e-4\nepochs: 2\nrank: 8\ntarget_modules: [q_proj, o_proj]\nmodel: a\n")
    values = {**NEEDED, **read_options(path)}
    options = FinetuneOptions.of(values)
    assert options.learning_rate == 1e-4 and options.epochs == 2.0 and options.target_modules == ["q_proj", "o_proj"]
    path.write_text(options.to_yaml())
    assert FinetuneOptions.of(read_options(path)) == options
    for content, message in (("- a\n- b\n", "must hold names and values"), ("a: [\n", "it is no YAML")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_options(path)
    path.write_text("")
    assert read_options(path) == {}


@pytest.mark.parametrize("method", METHODS)
def test_the_yaml_of_a_method_has_its_options_alone(method: str, tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(FinetuneOptions.of({**NEEDED, "method": method}).to_yaml())
    stored = read_options(path)
    assert ("rank" in stored) == (method in ("lora", "qlora")) and ("score" in stored) == (method == "esft")
    assert ("format" in stored) == (method == "qlora")


def test_the_page_and_the_command_have_every_option() -> None:
    page = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    help_of_command = run("finetune", "--help")[1]
    for one in fields(FinetuneOptions):
        if one.name == "model":
            continue
        flag = f"--{one.name.replace('_', '-')}"
        assert f"`{flag}`" in page, flag
        assert flag[:16] in help_of_command, flag  # long ones are shortened in a narrow terminal


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("model: nowhere\ndata: nothing.jsonl\noutput: out\nrank: 0\n")
    code, output = run("finetune", "--config", path)
    assert code == 2 and "rank=0 is not allowed" in output
    code, output = run("finetune", "--config", path, "--rank", 2)
    assert code == 2 and "nothing.jsonl is no file" in output
    code, output = run("finetune", "--config", path, "--rank", 16, "--method", "qlora", "--data", "other.jsonl")
    assert code == 2 and "other.jsonl is no file" in output
    code, output = run("finetune", "--config", path, "--rank", 16, "--method", "full")
    assert code == 2 and "rank=16 is not allowed with method='full': it belongs to lora, qlora" in output
    path.write_text("rnak: 3\n")
    code, output = run("finetune", "elsewhere", "--config", path)
    assert code == 2 and "'rnak' is not an option" in output
    assert run("finetune", "elsewhere")[1].startswith("Error: data is missing")


def test_what_is_given_must_have_an_effect_even_if_it_is_the_default() -> None:
    options = FinetuneOptions.of({"model": "m", "data": "d", "output": "o", "method": "lora", "format": "nf4"})
    options.check_given({"model", "method", "rank"})
    with pytest.raises(ValueError, match="format='nf4' is not allowed with method='lora': it belongs to qlora"):
        options.check_given({"model", "format"})


@pytest.mark.parametrize(("field", "value"), [("split", "test"), ("subset", "en")])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt"])
def test_options_of_datasets_are_refused_for_files(tmp_path: Path, field: str, value: str, name: str) -> None:
    (tmp_path / name).write_text('{"text": "a row"}\n')
    with pytest.raises(ValueError, match=f"{field}='{value}' is not allowed for .*: it belongs to a dataset"):
        load_rows(str(tmp_path / name), **{field: value})
