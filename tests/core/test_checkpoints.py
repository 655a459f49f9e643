"""Official checkpoints: loaded, saved in the same names and bytes, checked before anything is read."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Golden
from safetensors.torch import load_file, save_file
from tolerances import GOLDEN_LOGITS
from transformers import AutoModelForCausalLM

import modeling_deepseekmoe
from modeling_deepseekmoe import DeepseekForCausalLM, DeepseekV3ForCausalLM


def write(folder: Path, config: dict, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """Write a checkpoint folder, in one file or in several with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    index = {}
    names = sorted(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("variant", ["float32", "bfloat16", "sharded"])
def test_load_and_save_keeps_names_bytes_and_type(golden: Golden, variant: str, tmp_path: Path) -> None:
    config, tensors = golden.config, golden.tensors
    if variant == "bfloat16":
        config["torch_dtype"] = "bfloat16"
        # The released checkpoints keep the bias in float32.
        tensors = {key: value if key.endswith("bias") and "gate" in key else value.bfloat16()
                   for key, value in tensors.items()}  # fmt: skip
    source = write(tmp_path / "source", config, tensors, shards=5 if variant == "sharded" else 1)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB" if variant == "sharded" else "1GB")

    saved = read(tmp_path / "saved")
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    if variant == "sharded":
        index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(files) > 5 and index.keys() == tensors.keys() and sorted(set(index.values())) == files
    else:
        assert files == ["model.safetensors"]
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert saved[name].dtype == tensor.dtype, name
        assert torch.equal(saved[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    saved_config = json.loads((tmp_path / "saved" / "config.json").read_text())
    if (config["rope_scaling"] or {}).get("type") == "yarn":
        assert config.pop("rope_theta") == 10000  # in transformers' own field, beside the official rope_scaling
        assert saved_config["rope_parameters"]["rope_theta"] == 10000
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0  # no such layer is in the files, and none is in the source's
    assert {key: saved_config.get(key, "absent") for key in config} == config

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    input_ids = golden.expected["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, again(input_ids).logits)
    assert type(again) is type(model)


def test_stacked_parameters_on_disk_load_too(v1: Golden, tmp_path: Path) -> None:
    model = v1.model()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(v1.config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


@pytest.mark.parametrize("name", ["v2-lite", "v2-group-limited", "v3-noaux"])
def test_saved_official_dialect_loads_natively(name: str, tmp_path: Path) -> None:
    """What was loaded as an official dialect is read by transformers' own class, which never heard of this package."""
    golden, register = Golden(name), modeling_deepseekmoe.register
    golden.model().save_pretrained(tmp_path)
    register(override_native=False)
    native = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(native).__module__.startswith("transformers.")
    with torch.no_grad():
        logits = native(golden.expected["input_ids"]).logits
    torch.testing.assert_close(logits, golden.expected["logits"], atol=GOLDEN_LOGITS, rtol=0)


def test_names_of_remote_code_are_not_written_where_the_code_is_not(v1: Golden, tmp_path: Path) -> None:
    """The released config.json files name modeling files that lie beside them."""
    remote = {"AutoConfig": "configuration_deepseek.DeepseekConfig",
              "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"}  # fmt: skip
    folder = write(tmp_path / "source", {**v1.config, "auto_map": remote}, v1.tensors)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    qualified = {key: f"someone/repository--{value}" for key, value in remote.items()}
    model.config.auto_map = qualified
    assert model.config.to_diff_dict()["auto_map"] == qualified


def test_the_family_saves_per_expert_tensors_too(tiny_model: Callable, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    names = read(tmp_path).keys()
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in names
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in names)


def test_bias_stays_float32(v3: Golden) -> None:
    model = AutoModelForCausalLM.from_pretrained(v3.folder, dtype=torch.bfloat16)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert model.dtype == torch.bfloat16
    assert torch.equal(bias, v3.tensors["model.layers.1.mlp.gate.e_score_correction_bias"])


def test_mtp_tensors_are_ignored_with_one_message(
    v3: Golden, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = v3.tensors
    layer = {
        name.replace("layers.2.", "layers.3."): value.clone() for name, value in tensors.items() if "layers.2." in name
    }
    layer |= {f"model.layers.3.{name}.weight": torch.ones(64) for name in ("enorm", "hnorm", "shared_head.norm")}
    folder = write(tmp_path / "mtp", v3.config, tensors | layer)
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
    finally:
        transformers_logger.removeHandler(caplog.handler)
    messages = {record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING}
    assert len(messages) == 1
    assert f"{len(layer)} tensors of the multi-token-prediction layer(s) 3" in messages.pop()
    assert isinstance(model, DeepseekV3ForCausalLM)
    with torch.no_grad():
        logits = model(v3.expected["input_ids"]).logits
    torch.testing.assert_close(logits, v3.expected["logits"], atol=GOLDEN_LOGITS, rtol=0)


PREFIX = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"layers\.1\.mlp\.experts\.5\.up_proj\.weight is missing.*experts 0 to 7 \(n_routed_experts=8\)"),
        ("all missing", r"layers\.1\.mlp\.experts\.0\.gate_proj\.weight is missing \(and 7 more\)"),
        ("extra", r"layers\.1\.mlp\.experts\.8\.down_proj\.weight is one too many.*experts 0 to 7"),
        ("in a dense layer", r"layers\.0\.mlp\.experts\.0\.gate_proj\.weight is one too many.*no expert"),
        ("expert shape", r"layers\.1\.mlp\.experts\.5\.up_proj\.weight has shape \(23, 64\).*\(24, 64\)"),
        ("one stack of two", r"layers\.1\.mlp\.experts\.0\.gate_proj\.weight is missing"),
        ("other shape", r"layers\.0\.self_attn\.q_proj\.weight has shape \(64, 63\).*\(64, 64\)"),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_wrong_checkpoints_are_refused(v1: Golden, tmp_path: Path, change: str, message: str, shards: int) -> None:
    tensors = v1.tensors
    if change == "missing":
        del tensors[f"{PREFIX}.5.up_proj.weight"]
    elif change == "all missing":
        tensors = {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}
    elif change == "extra":
        tensors[f"{PREFIX}.8.down_proj.weight"] = torch.zeros(64, 24)
    elif change == "in a dense layer":
        tensors["model.layers.0.mlp.experts.0.gate_proj.weight"] = torch.zeros(24, 64)
    elif change == "expert shape":
        tensors[f"{PREFIX}.5.up_proj.weight"] = torch.zeros(23, 64)
    elif change == "one stack of two":
        tensors = {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}
        tensors[f"{PREFIX}.gate_up_proj"] = torch.zeros(8, 48, 64)
    else:
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 63)
    folder = write(tmp_path / "wrong", v1.config, tensors, shards)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_pickled_checkpoints_are_checked_too(v1: Golden, tmp_path: Path) -> None:
    tensors = v1.tensors
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(v1.config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    del tensors[f"{PREFIX}.2.gate_proj.weight"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"experts\.2\.gate_proj\.weight is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)


def test_mismatched_sizes_can_be_ignored_on_request(v1: Golden, tmp_path: Path) -> None:
    tensors = v1.tensors
    tensors["lm_head.weight"] = torch.zeros(50, 64)
    folder = write(tmp_path / "head", v1.config, tensors)
    model = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape == (96, 64)


def test_state_dict_argument_is_checked_too(v1: Golden) -> None:
    tensors = v1.tensors
    del tensors[f"{PREFIX}.0.down_proj.weight"]
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj\.weight is missing"):
        DeepseekForCausalLM.from_pretrained(None, config=v1.model().config, state_dict=tensors)


@pytest.mark.parametrize("parts", [1, 3])
def test_load_state_dict_reads_the_official_names(v3: Golden, parts: int) -> None:
    """As Trainer resumes: a plain `load_state_dict` of the saved file, or of one shard after the other."""
    model, reference = AutoModelForCausalLM.from_config(v3.model().config), v3.model()
    tensors = v3.tensors
    for part in range(parts):
        shard = {name: tensors[name] for name in sorted(tensors)[part::parts]}
        result = model.load_state_dict(shard, strict=parts == 1)
        assert not result.unexpected_keys
        assert bool(result.missing_keys) == (parts > 1)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_part_of_the_experts_does_not_fill_a_model_without_values(v1: Golden) -> None:
    def empty() -> torch.nn.Module:
        config = v1.model().config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    model, tensors = empty(), v1.tensors
    model.load_state_dict(tensors, assign=True)
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj[3], tensors[f"{PREFIX}.3.down_proj.weight"])
    model = empty()
    del tensors[f"{PREFIX}.3.down_proj.weight"]
    result = model.load_state_dict(tensors, assign=True, strict=False)
    assert f"{PREFIX}.3.down_proj.weight" in result.missing_keys
    assert model.model.layers[1].mlp.experts.down_proj.is_meta


def test_load_state_dict_reports_missing_and_wrong_experts(v1: Golden) -> None:
    model, tensors = v1.model(), v1.tensors
    del tensors[f"{PREFIX}.5.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.5\.up_proj\.weight"):
        model.load_state_dict(tensors)
    tensors[f"{PREFIX}.5.up_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(
        RuntimeError, match=r"size mismatch for .*experts\.5\.up_proj\.weight: \(3, 3\), not \(24, 64\)"
    ):
        model.load_state_dict(tensors)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["float32 gates", "bfloat16 gates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["v2-lite", "v3-noaux"])
def test_one_checkpoint_gives_one_routing(name: str, dtype: torch.dtype, stored: torch.dtype, tmp_path: Path) -> None:
    """In every dtype: the logits of a gate are the product, in float32, with what the file holds, and so they are in
    transformers 5.24's own classes."""
    tensors = {
        key: value if key.endswith("bias") else value.to(stored if key.endswith("gate.weight") else torch.bfloat16)
        for key, value in Golden(name).tensors.items()
    }
    folder = write(tmp_path / "stored", Golden(name).config, tensors)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert model.dtype == dtype
    hidden = torch.randn(64, model.config.hidden_size).to(dtype)
    for layer in model.config.moe_layers:
        weight = tensors[f"model.layers.{layer}.mlp.gate.weight"]
        logits, _ = model.model.layers[layer].mlp.gate(hidden)
        assert torch.equal(logits, torch.nn.functional.linear(hidden.float(), weight.float()))
        gate = model.model.layers[layer].mlp.gate.weight
        assert gate.dtype == (dtype if torch.promote_types(dtype, stored) == dtype else torch.float32)
    if dtype == torch.bfloat16:
        model.save_pretrained(tmp_path / "again")
        for key, value in read(tmp_path / "again").items():
            assert value.dtype == tensors[key].dtype and torch.equal(value, tensors[key]), key
    modeling_deepseekmoe.register()
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    theirs = [module for key, module in native.named_modules() if key.endswith("mlp.gate")]
    if stored == dtype or theirs[0].weight.dtype == torch.float32:  # before 5.24 these round
        for gate, layer in zip(theirs, model.config.moe_layers, strict=True):
            _, _, ids = gate(hidden)
            _, plan = model.model.layers[layer].mlp.gate(hidden)
            assert torch.equal(ids.sort().values, plan.expert_ids.sort().values)


def test_gates_that_compute_in_the_dtype_of_the_model_are_cast_to_it(v1: Golden) -> None:
    model = AutoModelForCausalLM.from_pretrained(v1.folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_gates_that_are_sharded_already_are_rounded_with_a_warning(v3: Golden, warnings_of_package: list[str]) -> None:
    gate = v3.model(dtype=torch.bfloat16).model.layers[1].mlp.gate.bfloat16()
    gate.weight.device_mesh = "of a DTensor"
    gate.keep_precision(torch.float32)
    gate.keep_precision(torch.float32)
    assert gate.weight.dtype == torch.bfloat16 and len(warnings_of_package) == 1
    assert "stored as torch.float32 and are rounded to torch.bfloat16" in warnings_of_package[0]
    gate.keep_precision(torch.bfloat16)
    assert len(warnings_of_package) == 1


def test_a_bias_that_was_assigned_in_bfloat16_becomes_float32_again(v3: Golden) -> None:
    model = v3.model()
    state = {key: value.bfloat16() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert model.to(torch.bfloat16).model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
