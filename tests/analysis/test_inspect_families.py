"""inspect and the planner on transformers' own families: against counts of real models, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import run
from conftest import MLA, TINY
from family_models import tiny_model
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from modeling_deepseekmoe import (
    DeepseekMoeConfig,
    DeepseekMoeForCausalLM,
    expert_lora_config,
    inspect_model,
    plan_training,
)
from modeling_deepseekmoe.analysis import counted_model
from modeling_deepseekmoe.analysis.activations import Activations
from modeling_deepseekmoe.analysis.counted_model import CountedModel
from modeling_deepseekmoe.analysis.inspection import report_on
from modeling_deepseekmoe.analysis.meta_models import read_config
from modeling_deepseekmoe.analysis.planning import Layout, plan_memory

EXPERTS = 8
SHARED = ("shared_expert.", "shared_experts.", "shared_mlp.")
# Every one with its K, and with fields without which the tiny model would lack a kind of layer. One or more of every
# kind: plain, shared experts in the block and beside it, a bias, MLA, an indexer, linear attention, state spaces,
# transposed experts with biases, experts without a gate projection, a dense FFN beside the experts, a network as the
# gate, two towers, experts in some layers.
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "qwen3_moe": (3, {}),
    "mixtral": (3, {}),
    "qwen2_moe": (3, {}),
    "glm4_moe": (3, {}),
    "afmoe": (3, {}),
    "deepseek_v2": (3, {}),
    "deepseek_v3": (3, {}),
    "deepseek_v32": (3, {}),
    "deepseek_v4": (3, {}),
    "qwen3_next": (3, {}),
    "gpt_oss": (3, {}),
    "nemotron_h": (3, {}),
    "jamba": (3, {"attn_layer_offset": 1, "attn_layer_period": 2}),
    "granitemoeshared": (3, {}),
    "gemma4": (3, {}),
    "zaya": (1, {}),
    "llama4": (3, {}),
    "lfm2_moe": (3, {}),
    "qwen3_vl_moe": (3, {}),
}


def saved(model: PreTrainedModel, folder: Path, **more: Any) -> Path:
    """Write the config.json of a model as `save_pretrained` does, and more fields."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return folder


def tiny(name: str, **more: Any) -> PreTrainedModel:
    pytest.importorskip(f"transformers.models.{name}")
    return tiny_model(name, **more).eval()


def numel(model: nn.Module, *parts: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in parts))


def cached(model: PreTrainedModel, tokens: int) -> int:
    """Run a model, and count all elements that its cache holds."""

    def elements(value: Any) -> int:
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return value.numel() if isinstance(value, torch.Tensor) else sum(map(elements, values))

    with torch.no_grad():
        outputs = model(input_ids=torch.full((1, tokens), 5), use_cache=True)
    return sum(elements(vars(layer)) for layer in outputs.past_key_values.layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_are_those_of_a_real_model(name: str, tmp_path: Path) -> None:
    top_k, more = FAMILIES[name]
    model = tiny(name, **more)
    report = inspect_model(saved(model, tmp_path))
    biases = sum(one.numel() for key, one in model.named_buffers() if "bias" in key.rpartition(".")[2])
    total, routed = numel(model, ""), numel(model, ".experts.")
    assert routed > 0 and report.routed_parameters == routed
    assert report.total_parameters == total + biases
    assert report.activated_parameters == total + biases - routed * (EXPERTS - top_k) // EXPERTS
    assert report.shared_parameters == numel(model, *SHARED)
    assert report.full_bytes == 16 * report.total_parameters
    text = report.to_text()
    if name == "deepseek_v4":  # of compressed keys there is one for several tokens
        assert report.kv_cache_elements_per_token is None and report.kv_cache_bytes_per_token is None
        assert "does not grow by the same with every token" in text
    else:
        assert report.kv_cache_elements_per_token == cached(model, 2) - cached(model, 1) > 0


def test_sizes_of_released_models() -> None:
    """The defaults of these config classes are released models. The figures are those of their model cards."""
    for model_type, total, activated, cache in (
        ("mixtral", 46.7, 12.9, 2 * 32 * 8 * 128),
        ("gpt_oss", 116.8, 5.71, 2 * 36 * 8 * 64),  # 5.13 without the token embedding
        ("qwen3_next", 79.7, 3.87, 2 * 12 * 2 * 256),
        ("jamba", 51.6, 12.1, 2 * 4 * 8 * 128),
    ):
        report = report_on(AutoConfig.for_model(model_type), model_type)
        assert round(report.total_parameters / 1e9, 1) == total
        assert report.activated_parameters / 1e9 == pytest.approx(activated, abs=0.05)
        assert report.kv_cache_elements_per_token == cache
    report = report_on(AutoConfig.for_model("mixtral"), "x")
    assert report.ffn_multiple == 2 * 3 * 4096 * 14336 / (8 * 4096**2)


def test_another_k_in_every_layer() -> None:
    pytest.importorskip("transformers.models.hunyuan_v1_moe")
    model = tiny("hunyuan_v1_moe", moe_topk=[1, 2, 3, 2])
    report = report_on(model.config, "x")
    routed = numel(model, ".experts.")
    assert report.activated_parameters == report.total_parameters - routed + routed * (1 + 2 + 3 + 2) // 4 // EXPERTS


def test_dense_models_and_towers(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    report = inspect_model(saved(model, tmp_path))
    assert report.total_parameters == report.activated_parameters == numel(model, "")
    assert report.embedding_parameters == 96 * 32 and report.forward_flops_per_token == 2 * numel(model, "")
    assert (report.routed_parameters, report.shared_parameters, report.tower_parameters) == (0, 0, 0)
    assert report.ffn_multiple == 3 * 64 * 32 / (8 * 32**2)
    assert report.kv_cache_elements_per_token == 3 * 2 * 2 * 8
    vision = tiny("qwen3_vl_moe")
    report = report_on(vision.config, "x")
    assert report.tower_parameters == numel(vision, "visual.") > 0
    active = report.activated_parameters - report.tower_parameters - vision.get_input_embeddings().weight.numel()
    assert report.forward_flops_per_token == 2 * active and "beside the language model" in report.to_text()


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe", "deepseek_v32", "deepseek_v4", "gemma4", "lfm2_moe"])
def test_lora_figure_is_what_is_trained(name: str) -> None:
    """Without indexers, V4's grouped maps, gates and head."""
    model = tiny(name)
    expected = report_on(model.config, "x", lora_rank=4).lora_parameters
    adapted = get_peft_model(model, expert_lora_config(model, r=4, target_modules="all-linear"))
    assert expected == adapted.get_nb_trainable_parameters()[0]


def test_what_cannot_be_told_is_said(tmp_path: Path) -> None:
    """JetMoE's experts are in no block with a gate beside them, and its gates cannot be run without weights."""
    model = tiny("jetmoe")
    report = inspect_model(saved(model, tmp_path))
    assert report.total_parameters == numel(model, "") and report.load_bytes["bfloat16"] == 2 * numel(model, "")
    for figure in ("activated_parameters", "routed_parameters", "training_flops_4k", "lora_bytes"):
        assert getattr(report, figure) is None
        assert "input_linear (JetMoeParallelExperts) holds experts" in report.unknown[figure]
    assert report.kv_cache_elements_per_token is None
    text = report.to_text()
    assert "not known (a run on the meta device fails: NotImplementedError" in text and "None" not in text
    code, output = run("inspect", tmp_path, "--json")
    assert code == 0 and json.loads(output)["unknown"] == report.unknown
    with pytest.raises(ValueError, match=r"JetMoeParallelExperts\) holds experts"):
        plan_training(tmp_path, gpus=1, gpu_memory="80GB")


def test_k_that_is_not_written_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's gate cannot be tried, and has no `top_k`: only the config says it."""
    monkeypatch.setattr(counted_model, "_CHOICES", ("another_name",))
    report = report_on(tiny("gemma4").config, "x")
    assert report.activated_parameters is None and report.routed_parameters and report.lora_parameters
    assert "model.layers.0 (Gemma4TextDecoderLayer): how many experts" in report.unknown["activated_parameters"]


def test_two_moe_blocks_in_a_layer() -> None:
    pytest.importorskip("transformers.models.ernie4_5_vl_moe")
    try:
        model = tiny("ernie4_5_vl_moe")
    except RuntimeError as error:  # transformers before 5.24
        pytest.skip(str(error))
    report = report_on(model.config, "x")
    assert report.routed_parameters == numel(model, "_moe.experts.") and report.activated_parameters is None
    assert "text_moe and " in report.unknown["activated_parameters"]


def test_on_the_command_line(tmp_path: Path) -> None:
    model = tiny("glm4_moe")
    folder = saved(model, tmp_path)
    code, output = run("inspect", folder)
    assert code == 0 and "glm4_moe" in output and f"{numel(model, '.experts.'):,}" in output
    code, output = run("inspect", folder, "--check")
    assert code == 2 and "--check is not allowed for model_type='glm4_moe'" in output
    assert "without --check" in output and "parameters, total" not in output
    code, output = run("inspect", folder, "--gpus", 8)
    assert code == 0 and "fsdp2_full.yaml" in output and "--ep-size" not in output


def test_quantised_weights_are_counted_by_their_shapes(tmp_path: Path) -> None:
    model = tiny("gpt_oss")
    (tmp_path / "plain").mkdir()
    plain = inspect_model(saved(model, tmp_path / "plain")).to_dict()
    (tmp_path / "quantised").mkdir()
    quantised = saved(model, tmp_path / "quantised", quantization_config={"quant_method": "mxfp4"})
    assert inspect_model(quantised).to_dict() == {**plain, "name": str(quantised)}
    assert "quantization_config" not in read_config(quantised).to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "no_such_type"}, r"config\.json: model_type='no_such_type' is not allowed.*transformers"),
        ({"model_type": ["a"]}, r"config\.json is not allowed: model_type=\['a'\] is no name of a type"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not allowed: Qwen3MoeForCausalLM has no layers then"),
        ({"num_experts_per_tok": 99}, r"layers\.0\.mlp: 99 experts for each token are not allowed: .* from 1 to 8"),
        ({"num_experts_per_tok": 0}, r"layers\.0\.mlp: 0 experts for each token are not allowed: .* from 1 to 8"),
        ({"model_type": None}, r"config\.json is not allowed: it has no model_type"),
        ({"hidden_size": "wide"}, r"config\.json is not allowed for qwen3_moe: .*hidden_size"),
        ({"num_attention_heads": 0}, r"qwen3_moe.*ZeroDivisionError"),
        ({"model_type": "vit"}, "model_type='vit' is not allowed: .* no language model"),
        ({"model_type": "t5"}, "model_type='t5' is not allowed: .* an encoder and a decoder"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = tiny("qwen3_moe").config.to_dict() | {"architectures": []}
    if "model_type" in change:  # the fields of another type are not those
        content = {}
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    for count in (inspect_model, lambda folder: plan_training(folder, gpus=1, gpu_memory="80GB")):
        with pytest.raises(ValueError, match=message):
            count(tmp_path)


def test_files_that_are_refused(tmp_path: Path) -> None:
    for content, message in (("[1]", "must hold a JSON object, and holds a list"), ("{", "is not valid JSON")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            inspect_model(tmp_path)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "of_the_folder"])
def test_code_of_a_folder_is_not_run(model_type: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for name in ("configuration_own", "modeling_own"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\n")
    model = tiny("qwen3_moe")
    auto_map = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    saved(model, tmp_path, auto_map=auto_map, model_type=model_type)
    if model_type == "qwen3_moe":
        assert inspect_model(tmp_path).total_parameters == numel(model, "")
    else:
        with pytest.raises(ValueError, match=r"model_type='of_the_folder'.* auto_map names code of the folder"):
            inspect_model(tmp_path)
    assert not mark.exists()


# ---------------------------------------------------------------------------------------------------------- planning
@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h", "longcat_flash", "llama4"])
def test_a_plan_is_for_what_can_be_trained(name: str, tmp_path: Path) -> None:
    folder = saved(tiny(name), tmp_path)
    assert plan_training(folder, gpus=1, gpu_memory="80GB")
    for method in ("lora", "esft"):
        with pytest.raises(ValueError, match=f"method='{method}' is not allowed: .* It must be 'full'"):
            plan_training(folder, gpus=1, gpu_memory="80GB", method=method)


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4", "qwen3_vl_moe"])
def test_plans_of_other_families(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    folder, parameters = saved(model, tmp_path), numel(model, "")
    plans = {plan.layout.configuration: plan for plan in plan_training(folder, gpus=8, gpu_memory="80GB")}
    assert list(plans) == ["ddp.yaml", "fsdp2_full.yaml", "fsdp2_cpu_offload.yaml"]
    assert plans["ddp.yaml"].parts["weights"] == 4 * parameters == 8 * plans["fsdp2_full.yaml"].parts["weights"]
    (lora,) = plan_training(folder, gpus=1, gpu_memory="80GB", method="lora", lora_rank=4)
    assert lora.trained == report_on(model.config, "x", lora_rank=4).lora_parameters
    (esft,) = plan_training(folder, gpus=1, gpu_memory="80GB", method="esft", esft_share=0.5)
    assert esft.trained == numel(model, ".experts.") // 2
    allowed = "the model must be of one of the types deepseekmoe"
    with pytest.raises(ValueError, match=f"ep_size=2 is not allowed: .*{allowed}"):
        plan_memory(model.config, Layout("x", shards=2, ep_size=2))


def test_plan_of_a_dense_model(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    (plan,) = plan_training(saved(model, tmp_path), gpus=1, gpu_memory="80GB")
    assert plan.parts["weights"] == 4 * numel(model, "")
    assert Activations.of(CountedModel.of(config)).layer == 8 * 32 + (2 * 4 + 2 * 2) * 8 + 3 * 64
    with pytest.raises(ValueError, match="method='esft' is not allowed for a model without routed experts"):
        plan_training(tmp_path, gpus=1, gpu_memory="80GB", method="esft")


@pytest.mark.parametrize("mla", [False, True])
def test_activations_of_this_family(mla: bool) -> None:
    config = DeepseekMoeConfig(**TINY | (MLA if mla else {}))
    kept = Activations.of(CountedModel.of(config))
    width = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    if mla:
        width = config.num_attention_heads * 2 * (config.qk_head_dim + config.v_head_dim) + config.kv_lora_rank
    experts = 2 * config.num_experts_per_tok * config.moe_intermediate_size + 3 * config.shared_intermediate_size
    assert kept.layer == 8 * config.hidden_size + width + experts
    assert kept.rows == 2 * config.num_experts_per_tok * config.hidden_size
    assert (kept.layers, kept.hidden, kept.vocabulary) == (
        config.num_hidden_layers, config.hidden_size, config.vocab_size
    )  # fmt: skip


def test_layers_are_told_apart_by_their_tower() -> None:
    units = CountedModel.of(tiny("qwen3_vl_moe").config).units
    assert {"model.visual.blocks.0", "model.language_model.layers.0"} <= set(units)
    own = CountedModel.of(DeepseekMoeConfig(**TINY))
    assert list(own.units) == [f"model.layers.{idx}" for idx in range(TINY["num_hidden_layers"])]
    layer = dict(DeepseekMoeForCausalLM(own.model.config).model.layers[1].named_parameters())
    assert own.units["model.layers.1"] == [f"model.layers.1.{name}" for name in layer]
