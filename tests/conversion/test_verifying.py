"""verify: what is found, and what counts as equal."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runner import run
from conftest import V3_LIKE, Golden
from synthetic import CONFIG, PLAIN_CONFIG, dequantized, read, v3_tensors, write

from modeling_deepseekmoe.conversion import VerificationError, convert, verify
from modeling_deepseekmoe.conversion.verifying import bytes_to_read


def test_a_sound_checkpoint(golden: Golden) -> None:
    sizes: list[int] = []
    report = verify(golden.folder, progress=sizes.append)
    assert report.tensors == len(golden.tensors) and report.manifest is None
    notes = {"v1-gqa-norm": "llama.cpp ignores norm_topk_prob", "v3-noaux": "num_nextn_predict_layers=1"}
    assert [note[:24] for note in report.notes] == [text[:24] for name, text in notes.items() if name == golden.name]
    assert report.nbytes == sum(sizes) == sum(tensor.nbytes for tensor in golden.tensors.values())
    assert re.fullmatch("[0-9a-f]{64}", report.digest)
    sizes.clear()
    verify(golden.folder, golden.folder, progress=sizes.append)
    assert sum(sizes) == bytes_to_read(golden.folder, golden.folder)


def test_the_digest_knows_nothing_of_files(tmp_path: Path) -> None:
    tensors = v3_tensors()
    one, three = write(tmp_path / "one", tensors, CONFIG), write(tmp_path / "three", tensors, CONFIG, 3)
    assert verify(one).digest == verify(three).digest
    tensors["model.norm.weight"][0] += 1
    assert verify(write(tmp_path / "other", tensors, CONFIG)).digest != verify(one).digest


@pytest.mark.parametrize("dtype", ["F32", "F8_E4M3", "BF16"])
def test_values_that_are_not_finite(dtype: str, tmp_path: Path) -> None:
    tensors = v3_tensors()
    name, value = {
        "F32": ("model.layers.1.mlp.gate.e_score_correction_bias", float("inf")),
        "F8_E4M3": ("model.layers.0.mlp.up_proj.weight", float("nan")),
        "BF16": ("model.layers.1.mlp.gate.weight", float("-inf")),
    }[dtype]
    tensors[name].view(-1)[3] = value
    folder = write(tmp_path / "bad", tensors, CONFIG, 2)
    with pytest.raises(VerificationError, match=rf"not finite .*: {re.escape(name)} in model-0000\d-of-00002"):
        verify(folder)
    code, output = run("verify", folder, "--write-manifest")
    assert code == 1 and "Failed: values that are not finite" in output
    assert not (folder / "tensors.sha256.json").exists()


def test_the_manifest(tmp_path: Path) -> None:
    tensors = v3_tensors()
    folder = write(tmp_path / "source", tensors, CONFIG, 2)
    assert verify(folder, write_manifest=True).manifest == "written"
    assert verify(folder).manifest == "checked"
    manifest = folder / "tensors.sha256.json"
    content = json.loads(manifest.read_text())
    assert content["tensors"]["model.norm.weight"].keys() == {"dtype", "shape", "sha256"}
    content["tensors"]["model.gone.weight"] = content["tensors"].pop("model.norm.weight")
    content["tensors"]["lm_head.weight"]["sha256"] = "0" * 64
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    manifest.write_text(json.dumps(content))
    with pytest.raises(VerificationError) as error:
        verify(folder)
    for text in (
        "tensors not in the manifest: model.norm.weight",
        "in the manifest alone: model.gone.weight",
        "not what the manifest says: lm_head.weight",
        "config.json is not what the manifest says",
    ):
        assert text in str(error.value)
    manifest.write_text("[]")
    with pytest.raises(ValueError, match=r"tensors\.sha256\.json is not allowed"):
        verify(folder)
    assert verify(folder, write_manifest=True).manifest == "written"
    assert verify(folder).manifest == "checked"
    (tmp_path / "outside").write_text("mine")
    manifest.unlink()
    manifest.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"tensors\.sha256\.json is a link to"):
        verify(folder)
    assert verify(folder, write_manifest=True).manifest == "written"
    assert (tmp_path / "outside").read_text() == "mine" and not manifest.is_symlink()


def test_a_total_size_of_other_files_is_a_note(tmp_path: Path) -> None:
    """The released V3's index has the size of its bfloat16 copy."""
    folder = write(tmp_path / "source", v3_tensors(), CONFIG, 2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] = 1
    index.write_text(json.dumps(content))
    assert any("total_size of 1" in note for note in verify(folder).notes)
    del content["metadata"]
    index.write_text(json.dumps(content))
    assert not verify(folder).notes


@pytest.mark.parametrize(
    ("first", "second", "how"),
    [
        ({}, {"dtype": "bfloat16"}, "equal after rounding"),
        ({}, {"dtype": "float16"}, "equal after rounding"),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "layout": "stacked"}, "identical"),
        ({"dtype": "bfloat16"}, {"dtype": "float16"}, None),
        ({}, {"dtype": "fp8", "layout": "stacked"}, "quantised"),
        ({"dtype": "fp8"}, {"dtype": "fp8", "layout": "stacked"}, "identical"),
    ],
)
def test_any_layout_and_dtype(v3: Golden, tmp_path: Path, first: dict, second: dict, how: str | None) -> None:
    convert(v3.folder, tmp_path / "a", **first)
    convert(v3.folder, tmp_path / "b", **second)
    for pair in ((tmp_path / "a", tmp_path / "b"), (tmp_path / "b", tmp_path / "a")):
        if how is None:  # neither of the two has the values of the other, unless they were made of it
            with pytest.raises(VerificationError, match="tensors that differ"):
                verify(*pair)
            return
        assert how in verify(*pair).compared
    tensors = read(tmp_path / "b")
    name = "model.layers.2.mlp.experts.7.down_proj.weight"
    if name not in tensors:
        name = "model.layers.2.mlp.experts.down_proj"
    content = tensors[name].view(-1).view(torch.uint8)
    content[-tensors[name].element_size()] ^= 8  # a bit of the last value
    folder = write(tmp_path / "c", tensors, json.loads((tmp_path / "b" / "config.json").read_text()))
    for pair in ((tmp_path / "a", folder), (folder, tmp_path / "a")):
        with pytest.raises(
            VerificationError, match=r"tensors that differ: model\.layers\.2\.mlp\.experts\.7\.down_pr"
        ):
            verify(*pair)


def test_dequantised_copies(tmp_path: Path) -> None:
    tensors = v3_tensors()
    source = write(tmp_path / "source", tensors, CONFIG, 3)
    exact = dequantized(tensors)
    for dtype in (torch.float32, torch.bfloat16):
        folder = write(tmp_path / str(dtype), {n: t.to(dtype) for n, t in exact.items()}, PLAIN_CONFIG)
        assert "dequantised" in verify(source, folder).compared and "dequantised" in verify(folder, source).compared
    exact["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"][143, 191] *= 1.001
    with pytest.raises(VerificationError, match=r"differ: .*kv_a_proj_with_mqa"):
        verify(source, write(tmp_path / "wrong", exact, PLAIN_CONFIG))


def test_wider_and_other_dtypes(v3: Golden, tmp_path: Path) -> None:
    tensors = v3.tensors
    convert(v3.folder, tmp_path / "bfloat16", dtype="bfloat16")
    convert(tmp_path / "bfloat16", tmp_path / "float16", dtype="float16")
    assert verify(tmp_path / "float16", tmp_path / "bfloat16").compared["equal after rounding"] > 80
    wide = write(tmp_path / "float64", {name: tensor.double() for name, tensor in tensors.items()}, v3.config)
    assert verify(wide, v3.folder).compared == {"equal after rounding": len(tensors)}
    convert(wide, tmp_path / "float32", dtype="float32")
    assert verify(v3.folder, tmp_path / "float32").compared == {"identical": len(tensors)}


def test_other_scales_are_other_values(tmp_path: Path) -> None:
    tensors = v3_tensors()
    source = write(tmp_path / "source", tensors, CONFIG)
    tensors["model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv"][1, 1] *= 2  # of the ragged block
    with pytest.raises(VerificationError, match=r"differ: .*kv_a_proj_with_mqa"):
        verify(source, write(tmp_path / "other", tensors, CONFIG))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("routed_scaling_factor", 2.0, r"gate_scaling_factor: 2\.5 and 2\.0"),
        ("topk_group", 3, r"groups \(topk_method, n_group, topk_group\)"),
        ("rope_theta", 5e4, "rope_parameters"),
        ("rms_norm_eps", 1e-5, "rms_norm_eps: 1e-06 and 1e-05"),
        ("norm_topk_prob", False, "gate_normalizes"),
        ("max_position_embeddings", 64, "max_position_embeddings: 128 and 64"),  # of YaRN
    ],
)
def test_configs_that_compute_something_else(
    v3: Golden, tmp_path: Path, field: str, value: object, message: str
) -> None:
    other = write(tmp_path / "other", v3.tensors, {**v3.config, field: value})
    with pytest.raises(VerificationError, match=f"the configs differ in {message}"):
        verify(v3.folder, other)


def test_a_bias_that_is_missing_counts_as_zeros(tiny_model: Callable, tmp_path: Path) -> None:
    model = tiny_model(**{**V3_LIKE, "topk_method": "greedy", "n_group": None, "topk_group": None})
    model.save_pretrained(tmp_path / "none")
    convert(tmp_path / "none", tmp_path / "zeros", to="deepseek_v3")
    assert verify(tmp_path / "none", tmp_path / "zeros").compared
    tensors = read(tmp_path / "zeros")
    tensors["model.layers.2.mlp.gate.e_score_correction_bias"][1] = 1e-3
    other = write(tmp_path / "some", tensors, json.loads((tmp_path / "zeros" / "config.json").read_text()))
    with pytest.raises(VerificationError, match=r"one of the two alone: model\.layers\.2.*e_score_correction_bias"):
        verify(tmp_path / "none", other)


def test_logits(v3: Golden, tmp_path: Path) -> None:
    convert(v3.folder, tmp_path / "half", dtype="bfloat16", layout="stacked")
    report = verify(v3.folder, tmp_path / "half", logits=True, tolerance=10)
    assert 0 < report.max_logit_difference < 10
    with pytest.raises(VerificationError, match=r"the logits differ by .*, and 1e-09 is allowed"):
        verify(v3.folder, tmp_path / "half", logits=True, tolerance=1e-9)
    code, output = run("verify", v3.folder, v3.folder, "--logits")
    assert code == 0 and "largest difference of the logits on random tokens: 0.00e+00" in output
    code, output = run("verify", v3.folder, "--logits")
    assert code == 2 and "without another checkpoint" in output


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_logits_of_classifiers_and_odd_widths(kind: str, tiny_config: Callable, tmp_path: Path) -> None:
    import modeling_deepseekmoe

    config = tiny_config(moe_intermediate_size=13, pad_token_id=None)
    getattr(modeling_deepseekmoe, f"DeepseekMoeFor{kind}")(config).save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", layout="stacked")
    assert verify(tmp_path / "a", tmp_path / "b", logits=True).max_logit_difference == 0


def test_streamed_logits_are_those_of_the_official_code(golden: Golden) -> None:
    from tolerances import GOLDEN_LOGITS

    from modeling_deepseekmoe.conversion.description import describe
    from modeling_deepseekmoe.conversion.streamed_model import checkpoint_model, greedy_text, logits_of

    model = checkpoint_model(describe(golden.folder))
    found = logits_of(model, golden.expected["input_ids"])
    assert (found - golden.expected["logits"]).abs().max() <= GOLDEN_LOGITS
    assert all(parameter.is_meta for parameter in model.parameters())
    text = greedy_text(model, golden.expected["input_ids"][:1, :9], 12)
    assert torch.equal(text, golden.expected["generated"])
