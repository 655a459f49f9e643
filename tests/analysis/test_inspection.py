"""inspect: exact counts of the released models, figures of the paper, checks of weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Golden

from modeling_deepseekmoe import inspect_model
from modeling_deepseekmoe.analysis.inspection import report_on, training_flops


@pytest.mark.parametrize(
    ("name", "total", "activated", "cache"),
    [
        ("deepseek-moe-16b", 16_375_728_128, 2.829e9, 114_688),
        ("deepseek-v2-lite", 15_706_484_224, 2.66e9, 15_552),
        ("deepseek-v2", 235_741_434_880, 21.38e9, 34_560),
        ("deepseek-v3", 671_026_419_200, 37.55e9, 35_136),
    ],
)
def test_released_models(name: str, total: int, activated: float, cache: int) -> None:
    report = inspect_model(name)
    assert report.total_parameters == total
    assert report.activated_parameters == pytest.approx(activated, rel=5e-4)
    assert report.kv_cache_elements_per_token == cache
    assert report.kv_cache_bytes_per_token == 2 * cache
    assert report.load_bytes["float32"] == 2 * report.load_bytes["bfloat16"] == 4 * total
    assert report.load_bytes["float8_e4m3 (128 x 128 blocks)"] == pytest.approx(total, rel=3e-4)
    assert report.full_bytes == 16 * total
    assert report.lora_bytes == 2 * total + 16 * report.lora_parameters


def test_shares_of_v2_lite() -> None:
    report = inspect_model("deepseek-v2-lite")
    assert report.routed_parameters == 26 * 64 * 3 * 2048 * 1408
    assert report.shared_parameters == 26 * 2 * 3 * 2048 * 1408
    without_input_embedding = report.activated_parameters - 102400 * 2048
    assert without_input_embedding == pytest.approx(2.45e9, rel=2e-3)
    assert report.forward_flops_per_token == 2 * without_input_embedding


def test_a_preset_is_not_hidden_by_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dense").mkdir()
    monkeypatch.chdir(tmp_path)
    assert inspect_model("dense").total_parameters == 197_931_520


def test_moonlight_without_embeddings() -> None:
    report = inspect_model("moonlight-16b-a3b")
    assert report.total_parameters - report.embedding_parameters == 15_289_021_568
    assert report.activated_parameters - report.embedding_parameters == 2_243_687_552


@pytest.mark.parametrize(
    ("name", "teraflops"), [("deepseek-moe-16b", 74.4), ("gshard-137b", 572.7), ("deepseekmoe-145b", 585.5)]
)
def test_flops_of_the_paper(name: str, teraflops: float) -> None:
    assert inspect_model(name).training_flops_4k / 1e12 == pytest.approx(teraflops, abs=0.05)


@pytest.mark.parametrize(
    ("layers", "hidden", "vocabulary", "teraflops"), [(30, 4096, 102400, 183.5), (32, 4096, 32000, 187.9)]
)
def test_flops_of_dense_models(layers: int, hidden: int, vocabulary: int, teraflops: float) -> None:
    assert training_flops(layers, hidden, vocabulary, 1.0, 4096) / 1e12 == pytest.approx(teraflops, abs=0.05)


def test_a_folder_is_counted_as_its_model(golden: Golden) -> None:
    model, report = golden.model(), inspect_model(golden.folder)
    biases = sum(buffer.numel() for name, buffer in model.named_buffers() if "correction" in name)
    assert report.total_parameters == sum(p.numel() for p in model.parameters()) + biases
    assert report.model_type == golden.config["model_type"]
    assert report.to_dict()["total_parameters"] == report.total_parameters
    assert f"{report.total_parameters:,}" in report.to_text()


def test_lora_figure_equals_peft(tiny_config: Callable) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = tiny_config()
    model = AutoModelForCausalLM.from_config(config)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=layers, target_parameters=stacks))
    trained, _ = peft_model.get_nb_trainable_parameters()
    assert report_on(config, "tiny", lora_rank=4).lora_parameters == trained


def test_tied_embeddings_are_counted_once(tiny_config: Callable) -> None:
    untied, tied = (report_on(tiny_config(tie_word_embeddings=tie), "tiny") for tie in (False, True))
    assert untied.total_parameters - tied.total_parameters == 96 * 32
    assert untied.forward_flops_per_token == tied.forward_flops_per_token


def test_dense_models(tiny_config: Callable) -> None:
    report = report_on(tiny_config(n_routed_experts=0), "dense")
    assert report.routed_parameters == 0
    assert report.activated_parameters == report.total_parameters


def test_wrong_names_and_ranks() -> None:
    with pytest.raises(ValueError, match=r"'deepseek-v9' is not allowed.*deepseek-v3"):
        inspect_model("deepseek-v9")
    with pytest.raises(ValueError, match=r"lora_rank=0 .* at least 1"):
        inspect_model("dense", lora_rank=0)
