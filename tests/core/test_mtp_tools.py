"""What other parts of the package do with layers of multi-token prediction."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import fresh_process
import pytest
import torch
from conftest import Golden
from mtp_cases import golden_with_mtp
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from synthetic import CONFIG, v3_tensors, write
from tolerances import assert_same
from transformers import AutoModelForCausalLM

from modeling_deepseekmoe import (
    ExpertSelection,
    StackedExpertsConfig,
    add_mtp,
    expert_lora_config,
    inspect_model,
    prepare_esft,
    score_experts,
)
from modeling_deepseekmoe.analysis.evaluation import trace_routing
from modeling_deepseekmoe.conversion import convert, verify
from modeling_deepseekmoe.remote_code import attach_code


def test_quantised_experts_keep_their_format(v3: Golden, tmp_path: Path) -> None:
    folder = golden_with_mtp(v3, tmp_path / "mtp")
    ids = v3.expected["input_ids"]
    config = StackedExpertsConfig("fp8")
    model = AutoModelForCausalLM.from_pretrained(folder, mtp=True, quantization_config=config).eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", mtp=True).eval()
    with torch.no_grad():
        assert torch.equal(model(ids, labels=ids).mtp_loss, loaded(ids, labels=ids).mtp_loss)
        whole = AutoModelForCausalLM.from_pretrained(folder, mtp=True).eval()(ids, labels=ids).mtp_loss
    assert 0 < abs(float(model(ids, labels=ids).mtp_loss - whole)) < 0.1 * float(whole)


def test_published_code_has_the_layers(v3: Golden, tiny_model: Callable, tmp_path: Path) -> None:
    model = tiny_model()
    add_mtp(model, 2)
    model.save_pretrained(tmp_path / "model")
    attach_code(tmp_path / "model")
    script = (
        "import sys, torch\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "folder = sys.argv[1]\n"
        "load = AutoModelForCausalLM.from_pretrained\n"
        "model = load(folder, trust_remote_code=True, mtp=True).eval()\n"
        "config = AutoConfig.from_pretrained(folder, trust_remote_code=True)\n"
        "assert len(load(folder, trust_remote_code=True, config=config, mtp=True).model.layers) == 5\n"
        "ids = torch.arange(3, 12)[None]\n"
        "options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)\n"
        "assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_mtp=True))\n"
        "assert not any(name.startswith('modeling_deepseekmoe') for name in sys.modules)\n"
    )
    (tmp_path / "script.py").write_text(script)
    fresh_process.check(tmp_path / "script.py", tmp_path / "model", cwd=tmp_path)


def test_lora_on_its_experts(v3: Golden, tmp_path: Path) -> None:
    folder = golden_with_mtp(v3, tmp_path / "mtp")
    model = AutoModelForCausalLM.from_pretrained(folder, mtp=True)
    ids, last = v3.expected["input_ids"], v3.config["num_hidden_layers"]
    adapted = get_peft_model(model, expert_lora_config(model, r=4))
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    own = {name: p for name, p in adapted.named_parameters() if ".lora_" in name and f".layers.{last}." in name}
    assert own and all(parameter.grad.abs().max() > 0 for parameter in own.values())
    adapted.eval().save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(f"model.layers.{last}.mlp.experts" in name for name in stored) == len(own)
    base = AutoModelForCausalLM.from_pretrained(folder, mtp=True)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_same(again(input_ids=ids, labels=ids).mtp_loss, adapted(input_ids=ids, labels=ids).mtp_loss)
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        wanted = again.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        found = again.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, use_mtp=True)
    assert torch.equal(wanted, found)


def test_esft_scores_and_trains_its_experts(v3: Golden, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(golden_with_mtp(v3, tmp_path / "mtp"), mtp=True)
    last, ids = v3.config["num_hidden_layers"], v3.expected["input_ids"]
    scores = score_experts(model, [ids, ids[:, :2]])
    assert scores[last].sum().item() == pytest.approx(scores[last - 1].sum().item(), rel=1e-3)
    prepare_esft(model, ExpertSelection({last: [0, 2]}))
    model.train()(ids, labels=ids).loss.backward()
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None} == {str(last)}


def test_tools_that_run_the_decoder_alone(v3: Golden, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(golden_with_mtp(v3, tmp_path / "mtp"), mtp=True).eval()
    trace = trace_routing(model, [v3.expected["input_ids"]])
    assert trace.layers == model.config.moe_layers
    report = inspect_model(tmp_path / "mtp")
    layer = model.model.layers[v3.config["num_hidden_layers"]]
    assert report.mtp_parameters == sum(tensor.numel() for tensor in layer.state_dict().values())


def test_an_fp8_file_that_was_converted(tmp_path: Path) -> None:
    write(tmp_path / "source", v3_tensors(), CONFIG)
    convert(tmp_path / "source", tmp_path / "plain", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", mtp=True)
    assert len(model.model.layers) == 3
    model.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "fp8", dtype="fp8")
    saved = load_file(tmp_path / "fp8" / "model.safetensors")
    assert saved.keys() == v3_tensors().keys()
    verify(tmp_path / "plain", tmp_path / "saved")
    verify(tmp_path / "saved", tmp_path / "fp8")


def test_neither_stages_nor_shards_of_sequences(v3: Golden, tmp_path: Path) -> None:
    folder = golden_with_mtp(v3, tmp_path / "mtp")
    with pytest.raises(ValueError, match="pp_size=2 is not allowed with mtp=True"):
        AutoModelForCausalLM.from_pretrained(folder, mtp=True, distributed_config=SimpleNamespace(pp_size=2))
    model, ids = AutoModelForCausalLM.from_pretrained(folder, mtp=True).train(), torch.arange(3, 12)[None]
    with pytest.raises(ValueError, match="shift_labels is not allowed with multi-token prediction"):
        model(ids, labels=ids, shift_labels=ids.roll(-1))
    model.config.mtp_loss_coef = 0.0
    assert model(ids, labels=ids, shift_labels=ids.roll(-1)).mtp_loss is None
