"""Conversion to other dtypes: FP8 both ways, blocks of other sizes, values that a dtype cannot hold."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import Golden
from conversion_cases import digests
from synthetic import CONFIG, PLAIN_CONFIG, as_stacked, dequantized, read, same_bytes, v3_tensors, write
from tolerances import assert_same
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

import modeling_deepseekmoe
from modeling_deepseekmoe.conversion import convert, streaming, verify


# ---------------------------------------------------------------------------------------------------------- the dtypes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["per-expert", "stacked"])
def test_fp8_to_other_dtypes(dtype: str, layout: str, tmp_path: Path) -> None:
    tensors = v3_tensors()
    source = write(tmp_path / "source", tensors, CONFIG, 2)
    convert(source, tmp_path / "out", dtype=dtype, layout=layout)
    convert(tmp_path / "out", tmp_path / "official", layout="per-expert")
    expected = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.to(getattr(torch, dtype))
        for name, tensor in dequantized(tensors).items()
    }
    assert same_bytes(read(tmp_path / "official"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**PLAIN_CONFIG, "torch_dtype": dtype}
    compared = verify(source, tmp_path / "out").compared
    assert compared["dequantised"] == sum(t.dtype == torch.float8_e4m3fn for t in tensors.values())
    modeling_deepseekmoe.register()  # transformers' own, of the output and of what the independent formula gives
    other = write(tmp_path / "other", expected, PLAIN_CONFIG)
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (tmp_path / "out", other)
    ]
    assert all(type(model) is DeepseekV3ForCausalLM for model in models)
    assert same_bytes(*(model.state_dict() for model in models))
    assert_same(*(model(torch.arange(9)[None]).logits for model in models))


@pytest.mark.parametrize("layout", ["per-expert", "stacked"])
def test_to_fp8_and_back(golden: Golden, layout: str, tmp_path: Path) -> None:
    convert(golden.folder, tmp_path / "fp8", dtype="fp8", layout=layout)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    convert(tmp_path / "fp8", tmp_path / "float32", dtype="float32", layout="per-expert")
    found = read(tmp_path / "float32")
    kept = ("embed_tokens", "lm_head", "norm", "gate.weight", "bias")
    for name, tensor in golden.tensors.items():
        if any(part in name for part in kept) and "_proj.weight" not in name:
            assert torch.equal(found[name], tensor), name
        else:
            bound = torch.maximum(tensor.abs() * 2**-4, tensor.abs().max() / 448 * 2**-10)
            assert ((found[name] - tensor).abs() <= bound * (1 + 1e-6)).all(), name
    report = verify(golden.folder, tmp_path / "fp8")
    assert report.compared["quantised"] == sum("_proj" in name and name.endswith("weight") for name in found)
    convert(tmp_path / "fp8", tmp_path / "again", dtype="fp8", layout=layout)
    assert same_bytes(read(tmp_path / "again"), read(tmp_path / "fp8"))  # untouched


@pytest.mark.parametrize("layout", ["per-expert", "stacked"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_files_against_an_independent_formula(layout: str, stored: torch.dtype, tmp_path: Path) -> None:
    """The scales are those of every block's largest value; every value is within the bound of its own block."""
    exact = {name: tensor.to(stored) for name, tensor in dequantized(v3_tensors()).items()}
    source = write(tmp_path / "source", exact, PLAIN_CONFIG, 2)
    convert(source, tmp_path / "fp8", dtype="fp8", layout=layout)
    convert(tmp_path / "fp8", tmp_path / "official", layout="per-expert")
    found, blocks = read(tmp_path / "official"), 0
    again = dequantized(found)
    assert found.keys() == v3_tensors().keys()
    for name in found:
        if not name.endswith("_scale_inv"):
            continue
        name, scales = name.removesuffix("_scale_inv"), found[name]
        for row, column in itertools.product(range(scales.shape[0]), range(scales.shape[1])):
            place = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            block = exact[name][place].float()
            assert scales[row, column] == block.abs().max() / 448
            bound = torch.maximum(block.abs() * 2**-4, scales[row, column] * 2**-10) * (1 + 1e-6)
            assert ((again[name][place] - block).abs() <= bound).all(), name
            blocks += 1
    assert blocks > 100


@pytest.mark.parametrize("block", [[64, 32], [100, 48], [1, 1]], ids=str)
def test_blocks_of_another_size(block: list[int], tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in v3_tensors().items() if not name.endswith("_scale_inv")}
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]:
        shape = [-(-size // step) for size, step in zip(tensors[name].shape, block, strict=True)]
        tensors[f"{name}_scale_inv"] = torch.rand(shape) * 1e-3 + 1e-4
    quantization = {**CONFIG["quantization_config"], "weight_block_size": block}
    source = write(tmp_path / "source", tensors, {**CONFIG, "quantization_config": quantization}, 2)
    convert(source, tmp_path / "stacked", layout="stacked")
    convert(tmp_path / "stacked", tmp_path / "back", layout="per-expert")
    assert same_bytes(read(tmp_path / "back"), tensors)
    convert(tmp_path / "stacked", tmp_path / "float32", layout="per-expert", dtype="float32")
    expected = {name: tensor.float() for name, tensor in dequantized(tensors, *block).items()}
    assert same_bytes(read(tmp_path / "float32"), expected)


def test_fp8_where_the_config_says_null(v1: Golden, tmp_path: Path) -> None:
    source = write(tmp_path / "source", v1.tensors, {**v1.config, "quantization_config": None})
    convert(source, tmp_path / "fp8", dtype="fp8")
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"


def test_fp8_keeps_what_is_fp8_already(tmp_path: Path) -> None:
    tensors = v3_tensors()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    mixed = {**tensors, name: dequantized(tensors)[name].to(torch.bfloat16)}
    del mixed[f"{name}_scale_inv"]
    source = write(tmp_path / "source", mixed, CONFIG)
    with pytest.raises(ValueError, match=r"gate_up_proj would be a stack of .*bfloat16 and torch.float8_e4m3fn"):
        convert(source, tmp_path / "stacked", layout="stacked")
    convert(source, tmp_path / "fp8", dtype="fp8")
    found = read(tmp_path / "fp8")
    assert found.keys() == tensors.keys()
    own = {name, f"{name}_scale_inv"}
    assert same_bytes(*({n: t for n, t in every.items() if n not in own} for every in (found, tensors)))
    assert found[name].dtype == torch.float8_e4m3fn


def test_values_that_a_dtype_cannot_hold(v1: Golden, tmp_path: Path) -> None:
    tensors = v1.tensors
    tensors["lm_head.weight"][3, 4] = 7e4
    source = write(tmp_path / "large", tensors, v1.config)
    with pytest.raises(ValueError, match=r"lm_head\.weight holds 70000, which torch\.float16 cannot.*65504"):
        convert(source, tmp_path / "out", dtype="float16")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    source = write(tmp_path / "nan", tensors, v1.config)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight holds values that are not finite"):
        convert(source, tmp_path / "out", dtype="fp8")
    assert {path.name for path in tmp_path.iterdir()} == {"large", "nan"}


@pytest.mark.parametrize("size", [2048, 20000])
def test_blocks_smaller_than_a_tensor(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything again with blocks so small that every matrix takes several; none in memory is larger."""
    pieces: list[int] = []
    monkeypatch.setattr(streaming, "BLOCK_BYTES", size)
    tensors = v3_tensors()
    source = write(tmp_path / "source", tensors, CONFIG, 3)
    convert(source, tmp_path / "stacked", layout="stacked", progress=pieces.append)
    assert max(pieces[1:]) <= size  # after the header
    assert same_bytes(read(tmp_path / "stacked"), as_stacked(tensors))
    pieces.clear()
    convert(tmp_path / "stacked", tmp_path / "float32", layout="per-expert", dtype="float32", progress=pieces.append)
    exact = {name: tensor.float() for name, tensor in dequantized(tensors).items()}
    assert same_bytes(read(tmp_path / "float32"), exact)
    assert max(pieces[1:]) <= max(size, 4 * 128 * 384)  # the rows of one FP8 block
    convert(tmp_path / "float32", tmp_path / "fp8", dtype="fp8")
    for folder in ("stacked", "float32", "fp8"):
        assert verify(tmp_path / folder).tensors == len(read(tmp_path / folder))
    assert verify(source, tmp_path / "float32").compared["dequantised"] > 40
    assert verify(tmp_path / "float32", tmp_path / "fp8").compared["quantised"] > 40
    monkeypatch.undo()
    convert(tmp_path / "float32", tmp_path / "again", dtype="fp8")
    assert digests(tmp_path / "again") == digests(tmp_path / "fp8")
