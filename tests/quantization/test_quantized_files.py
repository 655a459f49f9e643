"""Checkpoints with quantised experts: loaded, saved by their official names, loaded again; and what is refused."""

import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from family_models import tiny_model
from quantized_models import FOUR_BITS, IDS, KINDS, WIDE, base, decoded, load, quantized_modules, write
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from modeling_deepseekmoe import DeepseekMoeForCausalLM, StackedExpertsConfig, prepare_esft
from modeling_deepseekmoe.conversion.matrix_formats import decode, encode
from modeling_deepseekmoe.experts_quantized import stack_of

WEIGHTS = "model.safetensors"
of_nf4 = pytest.mark.skipif(FOUR_BITS != "nf4", reason="bitsandbytes is not installed")
NAMES = ("deepseekmoe", "deepseek_v3", "qwen3_moe", "mixtral", "deepseek_v4")


def assert_equal_states(first: nn.Module, second: nn.Module) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype and torch.equal(tensor, states[1][name]), name


def matrices(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a file, by the matrix they belong to and what stands behind its name."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parts = re.fullmatch(r"(.+?\.weight)(?!s)(.*)", name)
        matrix, suffix = parts.groups() if parts else (name, "")
        found.setdefault(matrix, {})[suffix] = tensor
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_again(tmp_path: Path, name: str, kind: str) -> None:
    """Official names, the bytes of the encoder for each matrix, the same bits when it is loaded again."""
    if name != "deepseekmoe":
        pytest.importorskip(f"transformers.models.{name}")
    original = matrices(load_file(write(tmp_path / "base", name) / WEIGHTS))
    model = load(tmp_path / "base", kind)
    model.save_pretrained(tmp_path / "saved")
    saved = matrices(load_file(tmp_path / "saved" / WEIGHTS))
    assert saved.keys() == original.keys()
    quantised = {key for key, parts in saved.items() if len(parts) > 1}
    assert quantised == {key for key in original if ".experts." in key and "shared" not in key}
    for key, parts in saved.items():
        if key not in quantised:
            assert torch.equal(parts[""], original[key][""]), key
            continue
        wanted = encode(original[key][""], kind)
        assert parts.keys() == wanted.keys()
        for suffix, tensor in parts.items():
            assert tensor.dtype == wanted[suffix].dtype and tensor.shape == wanted[suffix].shape, key
            assert torch.equal(tensor.view(torch.uint8), wanted[suffix].view(torch.uint8)), key
    again = load(tmp_path / "saved")
    assert_equal_states(model, again)
    assert again.config.quantization_config.format == kind
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / WEIGHTS).read_bytes() == (tmp_path / "saved" / WEIGHTS).read_bytes()


@of_nf4
def test_options(tmp_path: Path) -> None:
    """A layer that is skipped, scales that are not quantised, and another dtype for the products."""
    write(tmp_path / "base")
    options = {"double_quantisation": False, "skip_layers": [1], "compute_dtype": torch.bfloat16}
    model = load(tmp_path / "base", "nf4", **options)
    assert list(quantized_modules(model)) == ["model.layers.2.mlp.experts"]
    stack = stack_of(model.model.layers[2].mlp.experts, "down_proj")
    assert stack.nested is None and stack.scales.dtype == torch.float32 and stack.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert_equal_states(model, again)
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert stored == {
        "quant_method": "stacked_experts", "format": "nf4", "double_quantisation": False, "skip_layers": [1],
        "compute_dtype": "bfloat16", "linears": None,
    }  # fmt: skip
    assert torch.isfinite(again(IDS).logits).all()


@of_nf4
def test_other_linear_maps_by_bitsandbytes(tmp_path: Path) -> None:
    write(tmp_path / "base")
    model = load(tmp_path / "base", "nf4", linears="nf4")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert (
        kinds["model.layers.0.self_attn.o_proj"] == kinds["model.layers.1.mlp.shared_experts.up_proj"] == "Linear4bit"
    )
    assert kinds["lm_head"] == "DeepseekMoeHead" and len(quantized_modules(model)) == 2
    model.save_pretrained(tmp_path / "saved")  # before bitsandbytes packs them anew, which it does in a forward pass
    again = load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_model_whose_file_has_stacks(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "base" / WEIGHTS)
    write(tmp_path / "apart")
    model = load(tmp_path / "base", FOUR_BITS)
    assert_equal_states(model, load(tmp_path / "apart", FOUR_BITS))
    model.save_pretrained(tmp_path / "saved")
    assert_equal_states(model, load(tmp_path / "saved"))


def write_as_released(folder: Path, model: nn.Module, kind: str, config: dict) -> dict[str, torch.Tensor]:
    """A checkpoint all of whose matrices are quantised, as DeepSeek-V3's (fp8) or V4's (experts in mxfp4) are."""
    model.save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        others = any(part in name for part in ("embed", "head", "gate.weight", "norm"))
        plain = tensor.ndim != 2 or others or not name.endswith(".weight")
        parts = {"": tensor} if plain else encode(tensor, kind if ".experts." in name else "fp8")
        tensors |= {name + suffix: part.contiguous() for suffix, part in parts.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    return tensors


V3 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_a_released_fp8_checkpoint_keeps_its_bytes(tmp_path: Path) -> None:
    """Ragged blocks too: 192 columns, and a latent projection of 24 rows. Other layers are in the model's dtype."""
    tensors = write_as_released(tmp_path / "v3", base("deepseek_v3"), "fp8", V3)
    model = load(tmp_path / "v3", "fp8", torch.bfloat16)
    experts = quantized_modules(model)
    assert len(experts) == 3
    name = next(iter(experts))
    stored = {key: value for key, value in tensors.items() if key.startswith(name)}
    ups = [stored[f"{name}.{expert}.up_proj.weight"].view(torch.uint8) for expert in range(8)]
    scales = [stored[f"{name}.{expert}.up_proj.weight_scale_inv"] for expert in range(8)]
    assert torch.equal(experts[name].gate_up_proj[:, 128:], torch.stack(ups))
    assert torch.equal(stack_of(experts[name], "gate_up_proj").scales[:, 1], torch.stack(scales))
    for key in ("self_attn.kv_a_proj_with_mqa", "mlp.shared_experts.down_proj", "mlp.gate"):
        full = f"model.layers.1.{key}.weight"
        parts = {"": tensors[full]} | ({"_scale_inv": tensors[full + "_scale_inv"]} if key != "mlp.gate" else {})
        found = model.get_parameter(full)
        assert torch.equal(found, decode(parts, full, found.dtype)), key
        assert found.dtype == (torch.float32 if key == "mlp.gate" and found.dtype == torch.float32 else torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", dtype=torch.bfloat16)
    assert_equal_states(model, again)
    stored_config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert stored_config["quant_method"] == "fp8" and "lm_head" in stored_config["modules_to_not_convert"]
    saved = load_file(tmp_path / "saved" / WEIGHTS)
    assert saved[f"{name}.0.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert saved["model.layers.1.self_attn.o_proj.weight"].dtype == torch.bfloat16


def test_other_readers_know_saved_fp8_files(tmp_path: Path) -> None:
    """transformers' own quantiser reads them, as DeepSeek-V3's own."""
    write(tmp_path / "base", "deepseek_v3", hidden_size=256)
    model = load(tmp_path / "base", "fp8")
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["stacked_experts"]
    path.write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).eval()
    with torch.no_grad():
        wanted = decoded(tmp_path / "base", "fp8")(IDS).logits
        assert torch.allclose(theirs(IDS).logits, wanted, atol=1e-3)


@of_nf4
def test_from_one_format_to_another(tmp_path: Path) -> None:
    """A checkpoint in FP8 is quantised to NF4 while it is loaded."""
    tensors = write_as_released(tmp_path / "v3", base("deepseek_v3"), "fp8", V3)
    model = load(tmp_path / "v3", "nf4")
    name, experts = next(iter(quantized_modules(model).items()))
    key = f"{name}.3.down_proj.weight"
    wanted = encode(decode({"": tensors[key], "_scale_inv": tensors[key + "_scale_inv"]}, key), "nf4")
    assert torch.equal(experts.down_proj[3].view(-1), wanted[""].view(-1))


def test_experts_in_mxfp4_as_released_with_deepseek_v4(tmp_path: Path) -> None:
    pytest.importorskip("transformers.models.deepseek_v4")
    fields = {**WIDE, "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}}
    torch.manual_seed(0)
    tensors = write_as_released(tmp_path / "v4", tiny_model("deepseek_v4", **fields).eval(), "mxfp4", V3)
    names = [name for name in tensors if ".experts." in name and name.endswith(".weight")]
    assert {tensors[name].dtype for name in names} == {torch.int8}
    short = {name.replace(".weight_scale_inv", ".scale"): tensor for name, tensor in tensors.items()}
    save_file(short, tmp_path / "v4" / WEIGHTS, metadata={"format": "pt"})
    model = load(tmp_path / "v4", "mxfp4")  # transformers 5.17 cannot run it in bfloat16
    expert = names[0].rpartition(".")[0].rpartition(".")[0]  # of some expert, by the names of the file
    down = tensors[f"{expert}.w2.weight"].view(torch.uint8)
    assert any(
        torch.equal(codes, down) for experts in quantized_modules(model).values() for codes in experts.down_proj.data
    )
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(3, 27)[None]).logits).all()
    model.save_pretrained(tmp_path / "saved")
    assert_equal_states(model, load(tmp_path / "saved"))


REFUSED = {
    "width": (
        {"format": "nf4"}, {"moe_intermediate_size": 100},
        r"format='nf4' is not allowed for model.layers.1.mlp.experts.down_proj .* a multiple of 64",
    ),
    "width of mxfp4": (
        {"format": "mxfp4"}, {"moe_intermediate_size": 100}, r"format='mxfp4' is not allowed .* a multiple of 32"),
    "layer": (
        {"skip_layers": [0]}, {}, r"skip_layers=\[0\] is not allowed: layer 0 has no routed experts; .* \[1, 2\]"),
    "all layers": ({"skip_layers": [1, 2]}, {}, "has no stacked experts to quantise"),
}  # fmt: skip


@of_nf4
@pytest.mark.parametrize("case", REFUSED)
def test_refused_when_it_is_loaded(tmp_path: Path, case: str) -> None:
    options, fields, message = REFUSED[case]
    write(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=StackedExpertsConfig(**options))
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int4"}, "format='int4' is not allowed: one of 'nf4', 'fp8', 'mxfp4'"),
        ({"linears": "fp8"}, "linears='fp8' is not allowed: one of None, 'nf4'"),
        ({"compute_dtype": torch.int8}, "compute_dtype='int8' is not allowed"),
        ({"double_quantisation": "yes"}, "double_quantisation='yes' is not allowed"),
        ({"skip_layers": ["1"]}, r"skip_layers=\['1'\] is not allowed"),
        ({"skip_layers": "1"}, "skip_layers='1' is not allowed"),
        ({"blocksize": 32}, "blocksize is not allowed in a StackedExpertsConfig: its fields are format, double"),
        ({"quant_method": "fp8"}, "quant_method='fp8' is not allowed"),
    ],
)
def test_refused_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StackedExpertsConfig(**options)


def test_files_in_another_format(tmp_path: Path) -> None:
    load(write(tmp_path / "base"), FOUR_BITS).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"format='fp8' is not allowed: .* stored with format="):
        load(tmp_path / "saved", "fp8")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantization_config=.*'gptq'.* is not allowed with a StackedExpertsConfig"):
        load(tmp_path / "saved", FOUR_BITS)


def test_refused_of_a_loaded_model(tmp_path: Path) -> None:
    folder = write(tmp_path)
    with pytest.raises(ValueError, match="experts_implementation='grouped_mm' is not allowed for quantised experts"):
        load(folder, FOUR_BITS).set_experts_implementation("grouped_mm")
    native = load(write(tmp_path / "v3", "qwen3_moe"), FOUR_BITS)
    native.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="experts_implementation='eager' is not allowed for quantised experts"):
        native(IDS)
    model = load(folder, FOUR_BITS)
    state = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    with pytest.raises(RuntimeError, match="which is quantised and stays: use from_pretrained"):
        model.load_state_dict(state, strict=False)


def test_an_expert_that_is_not_finite(tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path) / WEIGHTS)
    tensors["model.layers.2.mlp.experts.5.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RuntimeError):
        load(tmp_path, "mxfp4")


def test_own_state_is_loaded_again(tmp_path: Path) -> None:
    """As Trainer does when it resumes: the stacks stay, and the rest is read."""
    model = load(write(tmp_path / "base"), FOUR_BITS)
    model.save_pretrained(tmp_path / "saved")
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.model.norm.weight.zero_()
    again.load_state_dict(load_file(tmp_path / "saved" / WEIGHTS), strict=False)
    assert_equal_states(model, again)
    assert isinstance(model, DeepseekMoeForCausalLM)


def test_saved_as_stacks(tmp_path: Path) -> None:
    """`save_original_format=False` writes the codes with what stands beside them."""
    model = load(write(tmp_path / "base"), FOUR_BITS)
    model.save_pretrained(tmp_path / "saved", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj_scales" in load_file(tmp_path / "saved" / WEIGHTS)
    assert_equal_states(model, load(tmp_path / "saved"))


def test_several_files(tmp_path: Path) -> None:
    model = load(write(tmp_path / "base"), "fp8")
    model.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    assert_equal_states(model, load(tmp_path / "saved"))


@pytest.mark.parametrize("name", ["deepseekmoe", "qwen3_moe"])
def test_stacks_of_another_model_are_not_read(tmp_path: Path, name: str) -> None:
    """Of FP8 the codes have the shape of the weights: torch would round these to whole numbers."""
    model = load(write(tmp_path / "base", name), "fp8")
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"gate_up_proj is quantised, and torch.float32 of \(8, 256, 192\) is not"):
        model.load_state_dict(base(name).state_dict(), strict=False)
    assert_equal_states(quantised_part(model), quantised_part(before))


def quantised_part(model: nn.Module) -> nn.Module:
    return nn.ModuleList(quantized_modules(model).values())


def test_refused_places(tmp_path: Path) -> None:
    folder = write(tmp_path / "base")
    config = StackedExpertsConfig("fp8")
    with pytest.raises(ValueError, match=r"device_map=\{.*\} is not allowed .*: what is on the disk"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "disk"})
    model = load(folder, "fp8")
    cpu_offload(model)
    assert torch.isfinite(model(IDS).logits).all()
    with pytest.raises(ValueError, match=r"Saving is not allowed while quantised experts are offloaded"):
        model.save_pretrained(tmp_path / "saved")


def test_linears_must_be_those_of_the_files(tmp_path: Path) -> None:
    load(write(tmp_path / "base"), "fp8").save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="linears='nf4' is not allowed: the experts of these files are stored with"):
        load(tmp_path / "saved", "fp8", linears="nf4")
    write_as_released(tmp_path / "v3", base("deepseek_v3"), "fp8", V3)
    with pytest.raises(ValueError, match="linears='nf4' is not allowed with files that are quantised"):
        load(tmp_path / "v3", "fp8", linears="nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_configs_and_what_is_dequantised(tmp_path: Path, kind: str) -> None:
    config = StackedExpertsConfig(kind, skip_layers=[1])
    assert StackedExpertsConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    model = load(write(tmp_path), kind)
    assert f"storage_format={kind}" in repr(model)
    plain = model.dequantize(torch.float32)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in plain.parameters())
    assert not hasattr(plain, "hf_quantizer") and not getattr(plain, "is_loaded_in_4bit", False)
    prepared = load(tmp_path, kind)
    prepare_esft(prepared, {1: [0]})
    with pytest.raises(ValueError, match="dequantize"):
        prepared.dequantize()
