"""Converting between dialects, layouts and dtypes: what comes out, and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN_NAMES, V3_LIKE, Golden
from conversion_cases import INDEX, digests
from synthetic import CONFIG, dequantized, read, same_bytes, v3_tensors, write
from tolerances import GOLDEN_LOGITS, assert_same
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers import DeepseekV3Config as NativeV3Config

import modeling_deepseekmoe
from modeling_deepseekmoe import DeepseekMoeForCausalLM
from modeling_deepseekmoe.configuration import list_presets, load_config, load_preset
from modeling_deepseekmoe.conversion import convert, plan_conversion, verify
from modeling_deepseekmoe.conversion.converting import carry_out
from modeling_deepseekmoe.conversion.dialects import translate
from modeling_deepseekmoe.conversion.tensor_table import entries, stack_shape, stacks
from modeling_deepseekmoe.support import folders


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(tokens).logits


def assert_same_model(first: Path, second: Path, tokens: torch.Tensor) -> None:
    """The same weights, bit for bit, and so the same logits: 0 apart where nothing but the files differs, and here, as
    AutoModel loads them, to the rounding that depends on where in memory a weight begins."""
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (first, second)]
    states = [model.state_dict() for model in models]
    assert same_bytes(*states)
    with torch.no_grad():
        assert_same(*(model(tokens).logits for model in models))
    assert verify(first, second, logits=True).max_logit_difference == 0


# ---------------------------------------------------------------------------------------------------------- the tables
@pytest.mark.parametrize("name", [*list_presets(), *GOLDEN_NAMES])
def test_the_tables_name_what_the_models_hold(name: str) -> None:
    config = load_preset(name) if name in list_presets() else load_config(Golden(name).folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = entries(config)
    members = stacks(wanted)
    found = {}
    for key, entry in wanted.items():
        if entry.mtp_layer is None and entry.stack is None:
            found[key] = entry.shape
        elif entry.mtp_layer is None:
            found[entry.stack] = stack_shape(members[entry.stack], config.n_routed_experts)
    assert found == {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification", "Model"])
@pytest.mark.parametrize("fields", [{}, V3_LIKE, {"attention_bias": True, "n_shared_experts": None}], ids=len)
def test_other_heads(kind: str, fields: dict, tiny_config: Callable, tmp_path: Path) -> None:
    name = "DeepseekMoe" + ("Model" if kind == "Model" else f"For{kind}")
    model = getattr(modeling_deepseekmoe, name)(tiny_config(**fields, num_labels=5)).eval()
    model.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "stacked", layout="stacked")
    convert(tmp_path / "stacked", tmp_path / "back", layout="per-expert")
    assert same_bytes(read(tmp_path / "saved"), read(tmp_path / "back"))
    assert verify(tmp_path / "saved", tmp_path / "stacked", logits=True).max_logit_difference == 0
    again = type(model).from_pretrained(tmp_path / "stacked").eval()
    tokens = torch.randint(96, (1, 9))
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    with torch.no_grad():
        assert_same(again(tokens)[0], model(tokens)[0])


# --------------------------------------------------------------------------------------------------------- the layouts
@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_there_and_back(golden: Golden, tmp_path: Path, max_shard_size: str) -> None:
    before = digests(golden.folder)
    plan = convert(golden.folder, tmp_path / "stacked", layout="stacked", max_shard_size=max_shard_size)
    assert plan.layout == "stacked" and (len(plan.folder.shards) > 1) == (max_shard_size == "100KB")
    stacked = read(tmp_path / "stacked")
    reference = golden.model().state_dict()
    assert stacked.keys() == reference.keys()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in stacked.items())
    back = tmp_path / "back"
    convert(tmp_path / "stacked", back, layout="per-expert")
    assert same_bytes(read(back), golden.tensors)
    assert (back / "config.json").read_bytes() == (golden.folder / "config.json").read_bytes()
    assert digests(golden.folder) == before
    assert_same_model(golden.folder, back, golden.expected["input_ids"])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("mtp", [True, False])
def test_there_and_back_with_fp8_and_mtp(tmp_path: Path, shards: int, mtp: bool) -> None:
    tensors = v3_tensors(mtp)
    source = write(tmp_path / "source", tensors, CONFIG, shards)
    convert(source, tmp_path / "stacked", layout="stacked", max_shard_size="50KB")
    stacked = read(tmp_path / "stacked")
    stack, scales = (stacked[f"model.layers.1.mlp.experts.gate_up_proj{suffix}"] for suffix in ("", "_scale_inv"))
    assert stack.dtype == torch.float8_e4m3fn and stack.shape == (4, 256, 192) and scales.shape == (4, 2, 2)
    up = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert torch.equal(stack[3, 128:].view(torch.uint8), tensors[up].view(torch.uint8))
    assert torch.equal(scales[3, 1:], tensors[f"{up}_scale_inv"])
    convert(tmp_path / "stacked", tmp_path / "back", layout="per-expert")
    assert same_bytes(read(tmp_path / "back"), tensors)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert verify(source, tmp_path / "stacked").compared == {"identical": len(dequantized(tensors))}


def test_dropping_mtp(tmp_path: Path) -> None:
    tensors = v3_tensors()
    source = write(tmp_path / "source", tensors, CONFIG)
    plan = convert(source, tmp_path / "out", drop_mtp=True)
    assert any("multi-token-prediction" in note for note in plan.notes)
    assert same_bytes(read(tmp_path / "out"), {n: t for n, t in tensors.items() if ".layers.2." not in n})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**CONFIG, "num_nextn_predict_layers": 0}
    report = verify(source, tmp_path / "out")
    assert any("in one of the two alone" in note for note in report.notes)


def test_two_conversions_are_the_same_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "source", v3_tensors(), CONFIG, 3)
    for options in ({"layout": "stacked"}, {"dtype": "bfloat16", "to": "deepseekmoe"}, {"max_shard_size": "100KB"}):
        folders = [tmp_path / f"{number}-{'-'.join(options)}" for number in range(2)]
        for folder in folders:
            convert(source, folder, **options)
        assert digests(folders[0]) == digests(folders[1])


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """Nothing depends on the order of a set, which is another one in every process."""
    source = write(tmp_path / "source", v3_tensors(), CONFIG, 3)
    command = [sys.executable, "-m", "modeling_deepseekmoe.cli", "convert", source]
    options = ["--layout", "stacked", "--to", "deepseekmoe", "--max-shard-size", "100KB"]
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([*command, tmp_path / seed, *options], check=True, capture_output=True, env=environment)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_experts_in_both_layouts_at_once(v1: Golden, tmp_path: Path) -> None:
    """A folder may stack some layers only; a tensor that is there twice is refused."""
    tensors = v1.tensors
    prefix = "model.layers.1.mlp.experts."
    mixed = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    reference = v1.model().state_dict()
    mixed |= {f"{prefix}{stack}": reference[f"{prefix}{stack}"].clone() for stack in ("gate_up_proj", "down_proj")}
    convert(write(tmp_path / "mixed", mixed, v1.config), tmp_path / "out", layout="per-expert")
    assert same_bytes(read(tmp_path / "out"), tensors)
    mixed[f"{prefix}2.up_proj.weight"] = tensors[f"{prefix}2.up_proj.weight"]
    with pytest.raises(ValueError, match=r"experts\.2\.up_proj\.weight is there twice"):
        convert(write(tmp_path / "twice", mixed, v1.config), tmp_path / "no")


# -------------------------------------------------------------------------------------------------------- the dialects
def test_to_the_family_and_back(golden: Golden, tmp_path: Path) -> None:
    tokens, dialect = golden.expected["input_ids"], golden.config["model_type"]
    convert(golden.folder, tmp_path / "ours", to="deepseekmoe", layout="stacked")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(model) is DeepseekMoeForCausalLM and model.config.architectures == ["DeepseekMoeForCausalLM"]
    convert(tmp_path / "ours", tmp_path / "back", to=dialect)
    assert same_bytes(read(tmp_path / "back"), golden.tensors)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["model_type"] == dialect and config["architectures"] == golden.config["architectures"]
    changed = {name for name, value in golden.config.items() if name in config and config[name] != value}
    assert changed <= {"aux_loss_alpha"}  # the released V3 code ignores it
    assert_same_model(golden.folder, tmp_path / "ours", tokens)
    assert_same_model(golden.folder, tmp_path / "back", tokens)
    assert (logits(tmp_path / "ours", tokens) - golden.expected["logits"]).abs().max() <= GOLDEN_LOGITS
    assert verify(golden.folder, tmp_path / "ours").compared == {"identical": len(golden.tensors)}


def test_v3_output_in_native_transformers(v3: Golden, tmp_path: Path) -> None:
    convert(v3.folder, tmp_path / "ours", to="deepseekmoe", layout="stacked")
    convert(tmp_path / "ours", tmp_path / "v3", to="deepseek_v3")
    modeling_deepseekmoe.register()
    tokens = v3.expected["input_ids"]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (v3.folder, tmp_path / "v3")]
    assert all(type(model) is DeepseekV3ForCausalLM and type(model.config) is NativeV3Config for model in models)
    with torch.no_grad():
        found, expected = (model(tokens).logits for model in models)
    assert same_bytes(*(model.state_dict() for model in models))
    assert_same(found, expected)
    assert (found - v3.expected["logits"]).abs().max() <= GOLDEN_LOGITS


def test_tied_heads_are_written_out_for_the_official_dialects(tiny_model: Callable, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True, head_dim=8).eval()
    model.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in read(tmp_path / "tied")
    convert(tmp_path / "tied", tmp_path / "again", layout="stacked")
    assert "lm_head.weight" not in read(tmp_path / "again")
    convert(tmp_path / "tied", tmp_path / "v1", to="deepseek")
    tensors = read(tmp_path / "v1")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "v1" / "config.json").read_text())["tie_word_embeddings"] is False
    assert_same_model(tmp_path / "tied", tmp_path / "v1", torch.randint(96, (2, 9)))
    assert verify(tmp_path / "tied", tmp_path / "v1").compared == {"identical": len(tensors)}


def test_a_gate_without_a_bias_gets_one_of_zeros(tiny_model: Callable, tmp_path: Path) -> None:
    fields = {**V3_LIKE, "topk_method": "greedy", "n_group": None, "topk_group": None}
    tiny_model(**fields).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "v3", to="deepseek_v3")
    bias = read(tmp_path / "v3")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32 and bias.shape == (8,) and not bias.any()
    tokens = torch.randint(96, (2, 9))
    assert_same(logits(tmp_path / "v3", tokens), logits(tmp_path / "ours", tokens))
    assert verify(tmp_path / "ours", tmp_path / "v3").compared


SOFTMAX_MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
               "v_head_dim": 8}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("fields", "dialect", "reason"),
    [
        ({"scoring_func": "sigmoid"}, "deepseek", r"scoring_func='sigmoid' is not allowed"),
        (V3_LIKE, "deepseek", r"attention_type='mla'"),
        (V3_LIKE, "deepseek_v2", r"scoring_func='sigmoid'"),
        ({}, "deepseek_v2", r"attention_type='mha'"),
        ({}, "deepseek_v3", r"attention_type='mha'"),
        ({"routed_scaling_factor": 2.0}, "deepseek", r"gate_scaling_factor is 2\.0, and there it would be 1\.0"),
        ({"head_dim": 16}, "deepseek", r"head_dim=16"),
        ({"rope_parameters": PARTIAL}, "deepseek", r"its rope_parameters is .*partial_rotary_factor"),
        ({"rope_parameters": YARN}, "deepseek", r"rope_type is 'yarn', and it must be one of default, linear"),
        (
            {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
            "deepseek",
            r"topk_method='group_limi",
        ),
        (SOFTMAX_MLA, "deepseek_v3", r"scoring_func='softmax'"),
        ({**SOFTMAX_MLA, "topk_method": "noaux_tc"}, "deepseek_v2", r"topk_method='noaux_tc'"),
        ({**SOFTMAX_MLA, "rope_interleave": False}, "deepseek_v2", r"rope_interleave is False"),
        ({**SOFTMAX_MLA, "norm_topk_prob": True, "routed_scaling_factor": 2.0}, "deepseek_v2", r"factor is 2\.0"),
        ({**V3_LIKE, "topk_method": "group_limited_greedy"}, "deepseek_v3", r"topk_method='group_limited_greedy'"),
        ({}, "deepseek_v9", r"to='deepseek_v9' is not allowed: it must be one of deepseek, deepseek_v2"),
    ],
)
def test_what_a_dialect_cannot_express(
    fields: dict, dialect: str, reason: str, tiny_model: Callable, tmp_path: Path
) -> None:
    tiny_model(**fields).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=reason):
        convert(tmp_path / "source", tmp_path / "out", to=dialect)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_mtp_has_no_place_in_the_first_generations(tiny_model: Callable, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    tensors = read(tmp_path / "plain")
    layer = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in tensors.items() if "layers.2." in n}
    layer |= {f"model.layers.3.{name}.weight": torch.ones(32) for name in ("enorm", "hnorm", "shared_head.norm")}
    layer["model.layers.3.eh_proj.weight"] = torch.zeros(32, 64)
    source = write(tmp_path / "mtp", tensors | layer, config)
    with pytest.raises(ValueError, match=r"num_nextn_predict_layers=1\). Leave them out with --drop-mtp"):
        convert(source, tmp_path / "out", to="deepseek")
    convert(source, tmp_path / "out", to="deepseek", drop_mtp=True)
    assert same_bytes(read(tmp_path / "out"), tensors)
    with pytest.raises(ValueError, match=r"num_nextn_predict_layers=2 is not allowed: .* 1 layers beyond"):
        convert(write(tmp_path / "two", tensors | layer, config | {"num_nextn_predict_layers": 2}), tmp_path / "no")
    plan = plan_conversion(write(tmp_path / "none", tensors, config))
    assert plan.notes == ("num_nextn_predict_layers=1, and there are no tensors of such layers",)
    del layer["model.layers.3.hnorm.weight"]
    with pytest.raises(ValueError, match=r"asks for what is missing: model\.layers\.3\.hnorm\.weight\."):
        convert(write(tmp_path / "half", tensors | layer, config), tmp_path / "no")


@pytest.mark.parametrize("name", list_presets())
def test_released_configs_there_and_back(name: str) -> None:
    config = load_preset(name)
    again = translate(translate(config, "deepseekmoe"), config.model_type).to_dict()
    changed = {key for key, value in config.to_dict().items() if again[key] != value}
    assert changed <= ({"aux_loss_alpha"} if config.model_type == "deepseek_v3" else set())


# ------------------------------------------------------------------------------------------------------------ the plan
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "flat"}, r"layout='flat' is not allowed: it must be one of per-expert, stacked"),
        ({"dtype": "int4"}, r"dtype='int4' is not allowed: it must be one of keep, float32"),
        ({"max_shard_size": "5 bananas"}, r"max_shard_size='5 bananas' is not allowed"),
        ({"max_shard_size": "0GB"}, r"max_shard_size='0GB' is not allowed"),
        ({"max_shard_size": "infGB"}, r"max_shard_size='infGB' is not allowed"),
        ({"max_shard_size": "-1GB"}, r"max_shard_size='-1GB' is not allowed"),
        ({"max_shard_size": "0.1B"}, r"max_shard_size='0.1B' is not allowed"),
        ({"max_shard_size": f"{'9' * 400}GB"}, r"max_shard_size='9+GB' is not allowed"),
        ({"max_shard_size": 0}, r"max_shard_size=0 is not allowed"),
    ],
)
def test_wrong_options(v1: Golden, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(v1.folder, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_tensors_without_a_place_or_missing(v1: Golden, tmp_path: Path) -> None:
    tensors = v1.tensors
    odd = {f"model.layers.1.mlp.odd_{number}.weight": torch.zeros(2) for number in range(10)}
    with pytest.raises(
        ValueError, match=r"no place for: model\.layers\.1\.mlp\.odd_0\.weight \(model\.safetensors\), .* and 2 more\."
    ):
        convert(write(tmp_path / "a", tensors | odd, v1.config), tmp_path / "out")
    lacking = {name: tensor for name, tensor in tensors.items() if "experts.3.up" not in name}
    with pytest.raises(
        ValueError, match=r"asks for what is missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight, model"
    ):
        convert(write(tmp_path / "b", lacking, v1.config), tmp_path / "out")
    tensors["model.norm.weight"] = torch.ones(65)
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight \(model\.safetensors\) has shape \(65,\).*asks for \(64,\)"
    ):
        convert(write(tmp_path / "c", tensors, v1.config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_follows_from_the_config_is_left_out(v1: Golden, tmp_path: Path) -> None:
    tensors = v1.tensors
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(3)}
    plan = convert(write(tmp_path / "old", tensors | old, v1.config), tmp_path / "out")
    assert any("3 tensors of rotary embeddings" in note for note in plan.notes)
    assert same_bytes(read(tmp_path / "out"), tensors)


def test_small_files_come_along_and_code_only_in_its_dialect(v1: Golden, tmp_path: Path) -> None:
    source = write(tmp_path / "source", v1.tensors, {**v1.config, "auto_map": {"AutoModel": "modeling_x.Model"}})
    for name in ("modeling_x.py", "chat_template.jinja", "README.md", "training_args.bin", "tensors.sha256.json"):
        (source / name).write_text("{}")
    (source / "original").mkdir()
    convert(source, tmp_path / "same", layout="stacked")
    small = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert {file.name for file in (tmp_path / "same").iterdir()} == small | {"modeling_x.py", "model.safetensors"}
    assert (tmp_path / "same" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    convert(source, tmp_path / "ours", to="deepseekmoe")
    assert {file.name for file in (tmp_path / "ours").iterdir()} == small | {"model.safetensors"}
    assert "auto_map" not in (tmp_path / "ours" / "config.json").read_text()


def test_a_plan_without_weights(tmp_path: Path) -> None:
    plan = plan_conversion("deepseek-v3", layout="stacked", dtype="fp8", without_weights=True)
    facts = plan.to_dict()
    assert facts["source_bytes"] == 2 * 671_026_419_200 + 2 * 58 * 256  # the biases are in float32
    assert facts["tensors_by_dtype"]["float8_e4m3fn"] == 61 * 5 + 3 * 3 + 58 * 5
    assert "weights that are not here: model.safetensors" in plan.to_text() and "disk needed: 673.1" in plan.to_text()
    with pytest.raises(OSError, match="deepseek-v3 is no folder"):
        plan_conversion("deepseek-v3")

    tensors = v3_tensors()
    whole = write(tmp_path / "whole", tensors, CONFIG, 3)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", INDEX):
        (bare / name).write_bytes((whole / name).read_bytes())
    for options in ({"layout": "stacked"}, {"dtype": "bfloat16", "drop_mtp": True}):
        found, expected = (
            plan_conversion(folder, without_weights=True, **options).to_dict() for folder in (bare, whole)
        )
        for name in ("files", "tensors_by_dtype", "source_tensors", "source_bytes"):
            assert found[name] == expected[name], name
    convert(whole, tmp_path / "stacked", layout="stacked", max_shard_size="100KB")
    for file in (tmp_path / "stacked").glob("*.safetensors"):
        file.unlink()
    assert plan_conversion(tmp_path / "stacked", without_weights=True).layout == "stacked"
    with pytest.raises(FileNotFoundError, match=r"lacks model-00001-of-00003\.safetensors"):
        convert(bare, tmp_path / "out")
    (bare / "model-00002-of-00003.safetensors").write_bytes((whole / "model-00002-of-00003.safetensors").read_bytes())
    assert plan_conversion(bare, without_weights=True).to_dict()["files"] == plan_conversion(whole).to_dict()["files"]
    index = json.loads((bare / INDEX).read_text())
    index["weight_map"]["model.odd.weight"] = "model-00001-of-00003.safetensors"
    (bare / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"no place for: model\.odd\.weight"):
        plan_conversion(bare, without_weights=True)
    (bare / INDEX).unlink()
    plan = plan_conversion(bare, without_weights=True, drop_mtp=True)
    assert not plan.has_weights and plan.to_dict()["source_tensors"] == len(dequantized(v3_tensors(mtp=False)))
    with pytest.raises(ValueError, match="cannot be carried out: the source's weights are not there"):
        carry_out(plan, tmp_path / "out")


def test_a_dry_run_of_a_repository_leaves_its_weights_there(
    v3: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict] = []

    def download(repository: str, **kwargs: object) -> str:
        asked.append(kwargs)
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        (tmp_path / "snapshot" / "config.json").write_bytes((v3.folder / "config.json").read_bytes())
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(folders, "snapshot_download", download)
    assert not plan_conversion("someone/moe", without_weights=True).has_weights
    assert "*.safetensors" in asked[0]["ignore_patterns"]
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        plan_conversion("someone/moe")
    assert "*.safetensors" not in asked[1]["ignore_patterns"]


def test_a_plan_of_stacked_ragged_blocks(golden: Golden, tmp_path: Path) -> None:
    convert(golden.folder, tmp_path / "fp8", dtype="fp8", layout="stacked", max_shard_size="100KB")
    expected = plan_conversion(tmp_path / "fp8", layout="per-expert").to_dict()
    for file in (tmp_path / "fp8").glob("*.safetensors"):
        file.unlink()
    found = plan_conversion(tmp_path / "fp8", layout="per-expert", without_weights=True).to_dict()
    assert found["tensors_by_dtype"] == expected["tensors_by_dtype"] and found["bytes"] == expected["bytes"]


def test_progress_adds_up(v3: Golden, tmp_path: Path) -> None:
    sizes: list[int] = []
    lines: list[str] = []
    plan = convert(v3.folder, tmp_path / "out", max_shard_size="200KB", report=lines.append, progress=sizes.append)
    assert sum(sizes) == plan.nbytes == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert len(lines) == len(plan.folder.shards) and lines[0].startswith("[1/")
    assert plan.folder.nbytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


def test_an_option_of_plans_alone_is_refused(v3: Golden, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"takes no without_weights"):
        convert(v3.folder, tmp_path / "out", without_weights=True)
    assert not (tmp_path / "out").exists()
