"""Checkpoints whose routed experts are in four bits: written, read, compared, refused."""

import functools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runner import run
from conftest import Golden
from conversion_cases import digests
from synthetic import CONFIG, PLAIN_CONFIG, as_stacked, dequantized, read, same_bytes, v3_tensors, write
from tolerances import assert_same
from transformers import AutoModelForCausalLM

from modeling_deepseekmoe import inspect_model
from modeling_deepseekmoe.conversion import VerificationError, convert, plan_conversion, streaming, verify, writing
from modeling_deepseekmoe.conversion.matrix_formats import NF4_STATE, SUFFIXES, bytes_a_weight, decode, encode
from modeling_deepseekmoe.conversion.verifying import bytes_to_read

FORMATS = ("nf4", "mxfp4")
UP = "model.layers.1.mlp.experts.2.up_proj.weight"
STATE = f"{UP}{NF4_STATE}"
SCALE = f"{UP}_scale_inv"


def is_expert(name: str) -> bool:
    return ".mlp.experts." in name


def quantization(kind: str, **fields: object) -> dict:
    """What the quantiser reads."""
    return {
        "quant_method": "stacked_experts", "format": kind, "double_quantisation": True, "skip_layers": [],
        "compute_dtype": None, "linears": None, **fields,
    }  # fmt: skip


def quantised(plain: dict[str, torch.Tensor], kind: str, double: bool = True) -> dict[str, torch.Tensor]:
    """The experts of a checkpoint in another format, the rest as it is."""
    found = {}
    for name, tensor in plain.items():
        if is_expert(name):
            parts = encode(tensor, kind, name, double)
            found |= {name + suffix: part for suffix, part in parts.items()}
        else:
            found[name] = tensor
    return found


def parts_of(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {suffix: tensors[name + suffix] for suffix in SUFFIXES if name + suffix in tensors}


def without_spaces(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The states of NF4 as bitsandbytes writes them."""
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith(NF4_STATE)]:
        found[name] = torch.tensor(list(bytes(tensors[name].numpy()).rstrip()), dtype=torch.uint8)
    return found


@functools.cache
def _bfloat16() -> dict[str, torch.Tensor]:
    return {
        name: tensor if "correction" in name else tensor.to(torch.bfloat16)
        for name, tensor in dequantized(v3_tensors()).items()
    }


def bfloat16() -> dict[str, torch.Tensor]:
    """The synthetic checkpoint in bfloat16."""
    return {name: tensor.clone() for name, tensor in _bfloat16().items()}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write(tmp_path / "plain", bfloat16(), PLAIN_CONFIG, 2)


# ------------------------------------------------------------------------------------------------------------ writing
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("layout", ["per-expert", "stacked"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_experts_of_bfloat16_files(kind: str, layout: str, max_shard_size: str, plain: Path, tmp_path: Path) -> None:
    """Bit for bit what bitsandbytes or the standard makes of every matrix; all else is copied."""
    convert(plain, tmp_path / "source", layout=layout)
    plan = convert(tmp_path / "source", tmp_path / "out", dtype=kind, max_shard_size=max_shard_size)
    assert plan.layout == "per-expert" and not plan.notes
    assert (len(plan.folder.shards) > 9) == (max_shard_size == "20KB")
    assert same_bytes(without_spaces(read(tmp_path / "out")), quantised(bfloat16(), kind))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**PLAIN_CONFIG, "quantization_config": quantization(kind)}
    assert plan.nbytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (plain / name).read_bytes()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("layout", ["per-expert", "stacked"])
def test_experts_of_fp8_files_with_ragged_blocks(kind: str, layout: str, tmp_path: Path) -> None:
    """Experts are quantised from the exact values; what else was FP8 becomes bfloat16, and a note says so."""
    tensors = v3_tensors()
    exact = dequantized(tensors)
    source = write(tmp_path / "fp8", tensors if layout == "per-expert" else as_stacked(tensors), CONFIG, 3)
    plan = convert(source, tmp_path / "out", dtype=kind)
    others = [name for name, one in tensors.items() if one.dtype == torch.float8_e4m3fn and not is_expert(name)]
    assert plan.notes == (f"{len(others)} quantised tensors that are not of routed experts become bfloat16",)
    wanted = {name: one.to(torch.bfloat16) if name in others else one for name, one in exact.items()}
    assert same_bytes(without_spaces(read(tmp_path / "out")), quantised(wanted, kind))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**CONFIG, "quantization_config": quantization(kind)}
    report = verify(source, tmp_path / "out")
    assert report.compared["quantised"] == sum(map(is_expert, exact)) and report.compared["dequantised"] == len(others)


@pytest.mark.parametrize("kind", FORMATS)
def test_other_dtypes_of_the_source(kind: str, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):
        tensors = {name: tensor.to(dtype) for name, tensor in bfloat16().items()}
        source = write(tmp_path / str(dtype), tensors, PLAIN_CONFIG)
        convert(source, tmp_path / f"{dtype}-out", dtype=kind)
        plain = {
            name: tensor.float() if dtype == torch.float64 and is_expert(name) else tensor
            for name, tensor in tensors.items()
        }
        assert same_bytes(without_spaces(read(tmp_path / f"{dtype}-out")), quantised(plain, kind)), dtype


@pytest.mark.parametrize("kind", FORMATS)
def test_every_matrix_is_encoded_once(kind: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its tensors lie in two places of a file, by the width of their values; no more than one is in memory."""
    encoded: list[str] = []

    def counted(weight: torch.Tensor, kind: str, name: str, double: bool) -> dict[str, torch.Tensor]:
        encoded.append(name)
        return encode(weight, kind, name, double)

    monkeypatch.setattr(streaming, "encode", counted)
    convert(plain, tmp_path / "out", dtype=kind)
    assert len(encoded) == len(set(encoded)) == sum(map(is_expert, bfloat16()))


@pytest.mark.parametrize("kind", FORMATS)
def test_interrupted_and_resumed(kind: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of a matrix lie in several files, some of which are written by another process."""
    options = {"dtype": kind, "max_shard_size": "20KB"}
    convert(plain, tmp_path / "whole", **options)
    written: list[int] = []

    def stop(size: int) -> None:
        written.append(size)
        if sum(written) > 300_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plain, tmp_path / "out", **options, progress=stop)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.unfinished").exists()
    monkeypatch.setattr("modeling_deepseekmoe.conversion.unfinished_work._machine_start", lambda: "another")
    lines: list[str] = []
    convert(plain, tmp_path / "out", **options, resume=True, report=lines.append)
    assert any("finished earlier" in line for line in lines)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------------------ reading
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["per-expert", "stacked"])
def test_back_to_other_dtypes(kind: str, dtype: str, layout: str, plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / kind, dtype=kind)
    convert(tmp_path / kind, tmp_path / "out", dtype=dtype, layout=layout)
    convert(tmp_path / "out", tmp_path / "official", layout="per-expert")
    stored, wanted = read(tmp_path / kind), {}
    for name, tensor in bfloat16().items():
        value = decode(parts_of(stored, name), name) if is_expert(name) else tensor
        wanted[name] = value if "correction" in name else value.to(getattr(torch, dtype))
    assert same_bytes(read(tmp_path / "official"), wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**PLAIN_CONFIG, "torch_dtype": dtype}
    for pair in ((tmp_path / kind, tmp_path / "out"), (tmp_path / "out", tmp_path / kind)):
        assert verify(*pair).compared["dequantised"] == sum(map(is_expert, wanted))


@pytest.mark.parametrize(("first", "second"), [("nf4", "mxfp4"), ("mxfp4", "nf4"), ("nf4", "fp8"), ("mxfp4", "fp8")])
def test_from_one_format_to_another(first: str, second: str, plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / first, dtype=first)
    convert(tmp_path / first, tmp_path / second, dtype=second)
    stored, found = read(tmp_path / first), without_spaces(read(tmp_path / second))
    for name in filter(is_expert, bfloat16()):
        wanted = encode(decode(parts_of(stored, name), name), second)
        assert same_bytes(parts_of(found, name), wanted), name
    config = json.loads((tmp_path / second / "config.json").read_text())
    if second == "fp8":
        assert config == CONFIG
        assert found["model.layers.0.self_attn.kv_b_proj.weight"].dtype == torch.float8_e4m3fn
    else:
        assert config["quantization_config"] == quantization(second)
    report = verify(tmp_path / first, tmp_path / second)
    assert report.compared["quantised"] >= sum(map(is_expert, bfloat16())) and "identical" in report.compared


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_kept_keeps_its_bytes(kind: str, tmp_path: Path) -> None:
    """Also the states as others write them, in another dialect, and beside FP8 with ragged blocks."""
    fp8 = v3_tensors()
    mixed = {name: tensor for name, tensor in fp8.items() if not is_expert(name)}
    for name in filter(is_expert, bfloat16()):
        mixed |= {name + suffix: tensor for suffix, tensor in encode(bfloat16()[name], kind).items()}
    source = write(tmp_path / "source", mixed, {**CONFIG, "quantization_config": quantization(kind)}, 3)
    convert(source, tmp_path / "kept", max_shard_size="50KB")
    assert same_bytes(read(tmp_path / "kept"), mixed)
    assert (tmp_path / "kept" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    convert(source, tmp_path / "other", to="deepseekmoe")
    assert same_bytes(read(tmp_path / "other"), mixed)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["model_type"] == "deepseekmoe" and config["quantization_config"] == quantization(kind)
    assert verify(source, tmp_path / "other").compared == {"identical": len(dequantized(fp8))}
    convert(source, tmp_path / "again", dtype=kind)
    found = read(tmp_path / "again")
    assert same_bytes(*({n: t for n, t in every.items() if is_expert(n)} for every in (found, mixed)))
    assert found["model.layers.0.self_attn.kv_b_proj.weight"].dtype == torch.bfloat16


def test_scales_that_are_not_quantised(plain: Path, tmp_path: Path) -> None:
    """Files that the quantiser writes with double_quantisation=False; layers that it was told to skip join them."""
    tensors = quantised(bfloat16(), "nf4", double=False)
    for name in [name for name in tensors if name.startswith(UP)]:
        del tensors[name]
    tensors[UP] = bfloat16()[UP]
    config = {**PLAIN_CONFIG, "quantization_config": quantization("nf4", double_quantisation=False, skip_layers=[1])}
    source = write(tmp_path / "source", tensors, config)
    convert(source, tmp_path / "kept")
    assert same_bytes(read(tmp_path / "kept"), tensors)
    convert(source, tmp_path / "nf4", dtype="nf4")
    assert same_bytes(without_spaces(read(tmp_path / "nf4")), quantised(bfloat16(), "nf4", double=False))
    written = json.loads((tmp_path / "nf4" / "config.json").read_text())["quantization_config"]
    assert written == quantization("nf4", double_quantisation=False)
    assert "quantised" in verify(plain, tmp_path / "nf4").compared
    convert(plain, tmp_path / "nested", dtype="nf4")
    with pytest.raises(VerificationError, match="tensors that differ"):
        verify(tmp_path / "nested", tmp_path / "nf4")


def test_other_linear_layers_in_nf4(plain: Path, tmp_path: Path) -> None:
    """As bitsandbytes writes them, when the quantiser hands them to it."""
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = quantised(bfloat16(), "nf4")
    parts = encode(tensors.pop(name), "nf4")
    tensors |= {name + suffix: part for suffix, part in parts.items()}
    config = {**PLAIN_CONFIG, "quantization_config": quantization("nf4", linears="nf4")}
    source = write(tmp_path / "source", tensors, config)
    convert(source, tmp_path / "mxfp4", dtype="mxfp4")
    assert torch.equal(read(tmp_path / "mxfp4")[name], decode(parts, name, torch.bfloat16))
    report = verify(plain, source)
    assert report.compared["quantised"] == sum(map(is_expert, bfloat16())) + 1


@pytest.mark.parametrize("kind", FORMATS)
def test_transformers_loads_what_was_written(kind: str, plain: Path, tmp_path: Path) -> None:
    """As it is stored; the model computes what the dequantised one computes, and saves the same tensors."""
    convert(plain, tmp_path / kind, dtype=kind, drop_mtp=True)
    convert(tmp_path / kind, tmp_path / "float32", dtype="float32")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in (kind, "float32")]
    assert models[0].model.layers[1].mlp.experts.gate_up_proj.dtype == torch.uint8
    with torch.no_grad():
        assert_same(*(model(torch.arange(9)[None]).logits for model in models))
    models[0].save_pretrained(tmp_path / "saved")
    found, wanted = (read(tmp_path / name) for name in ("saved", kind))
    experts = {name for name in wanted if is_expert(name) and not name.endswith(NF4_STATE)}
    assert same_bytes(*({name: every[name] for name in experts} for every in (found, wanted)))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert saved == quantization(kind)
    assert verify(tmp_path / kind, tmp_path / "saved").compared["identical"] == 12 + 1  # the experts and the bias


# ----------------------------------------------------------------------------------------------------------- verifying
@pytest.mark.parametrize("kind", FORMATS)
def test_verifying(kind: str, plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "a", dtype=kind)
    sizes: list[int] = []
    report = verify(tmp_path / "a", write_manifest=True, progress=sizes.append)
    assert report.tensors == len(read(tmp_path / "a")) and sum(sizes) == report.nbytes
    assert verify(tmp_path / "a").manifest == "checked"
    convert(tmp_path / "a", tmp_path / "b", max_shard_size="20KB")
    sizes.clear()
    assert verify(tmp_path / "a", tmp_path / "b", progress=sizes.append).compared == {"identical": len(bfloat16())}
    assert sum(sizes) == bytes_to_read(tmp_path / "a", tmp_path / "b")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    own = write(tmp_path / "theirs", without_spaces(read(tmp_path / "a")), config)
    assert verify(tmp_path / "a", own).compared == {"identical": len(bfloat16())}  # whatever stands behind a state
    for suffix in {"nf4": ("", ".absmax", ".nested_absmax"), "mxfp4": ("", "_scale_inv")}[kind]:
        tensors = read(tmp_path / "a")
        tensors[UP + suffix].view(torch.uint8).view(-1)[5] ^= 1
        wrong = write(tmp_path / f"wrong{suffix}", tensors, config)
        for pair in ((plain, wrong), (wrong, plain), (tmp_path / "a", wrong)):
            with pytest.raises(VerificationError, match=rf"tensors that differ: {re.escape(UP)}$"):
                verify(*pair)


@pytest.mark.parametrize("kind", FORMATS)
def test_logits(kind: str, plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / kind, dtype=kind, drop_mtp=True)
    convert(tmp_path / kind, tmp_path / "float32", dtype="float32")
    assert verify(tmp_path / kind, tmp_path / "float32", logits=True).max_logit_difference == 0
    with pytest.raises(VerificationError, match="the logits differ by"):
        verify(plain, tmp_path / kind, logits=True, tolerance=1e-4)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("nf4", lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"][:-1]}), r"absmax .*has shape \(383,\)"),
        ("nf4", lambda t: t.pop(f"{UP}.quant_map"), r"lacks .*up_proj\.weight\.quant_map, which nf4 has"),
        ("nf4", lambda t: t.pop(STATE), r"up_proj\.weight .*is stored as torch\.uint8.*no scales of a format"),
        ("nf4", lambda t: t.update({SCALE: torch.ones(1)}), r"_scale_inv .*is not allowed: nf4 has no such tensor"),
        ("nf4", lambda t: t.update({UP: t[UP][:-64]}), r"up_proj\.weight .*has shape \(12224, 1\).*has \(12288, 1\)"),
        ("mxfp4", lambda t: t.update({SCALE: t[SCALE].view(torch.uint8).float()}), r"dtype torch\.float32.*mxfp4 of"),
        ("mxfp4", lambda t: t.update({UP: t[UP][:, :-1].contiguous()}), r"has shape \(128, 95\) .*\(128, 96\)"),
        ("mxfp4", lambda t: t.pop(SCALE), r"is stored as torch\.int8, .*no scales of a format that is known"),
        ("mxfp4", lambda t: t.update({"lm_head.weight": torch.ones(160, 192, dtype=torch.int8)}), r"no scales of a"),
        ("mxfp4", lambda t: t.update({"model.norm.weight": t[SCALE].view(-1)[:192].clone()}), r"float8_e8m0fnu, "),
        ("mxfp4", lambda t: t.update({"model.extra.absmax": torch.ones(1)}), r"has no place for: model\.extra"),
    ],
)  # fmt: skip
def test_tensors_that_are_of_no_format(kind: str, change: Callable, message: str, tmp_path: Path) -> None:
    tensors = quantised(bfloat16(), kind)
    change(tensors)
    source = write(tmp_path / "source", tensors, {**PLAIN_CONFIG, "quantization_config": quantization(kind)})
    for read_it in (lambda: verify(source), lambda: convert(source, tmp_path / "out")):
        with pytest.raises(ValueError, match=message):
            read_it()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_values_that_do_not_fit_each_other_are_found(tmp_path: Path) -> None:
    tensors = quantised(bfloat16(), "nf4")
    state = json.loads(bytes(tensors[STATE].numpy()))
    config = {**PLAIN_CONFIG, "quantization_config": quantization("nf4")}
    cases = {
        "shape=[192, 128]: [128, 192]": {"shape": [192, 128]},
        "has blocksize=128, which is not allowed: it must be 64": {"blocksize": 128},
        "has nested_blocksize=512": {"nested_blocksize": 512},
        "decoded to values that are not finite": {"nested_offset": float("nan")},
    }
    for number, (message, fields) in enumerate(cases.items()):
        text = json.dumps({**state, **fields}).encode()
        wrong = {**tensors, STATE: torch.tensor(list(text), dtype=torch.uint8)}
        folder = write(tmp_path / str(number), wrong, config)
        with pytest.raises(VerificationError, match=re.escape(message)):
            verify(folder)
    tensors = quantised(bfloat16(), "mxfp4")
    tensors[SCALE].view(torch.uint8)[3, 2] = 255  # NaN in E8M0
    folder = write(tmp_path / "nan", tensors, {**PLAIN_CONFIG, "quantization_config": quantization("mxfp4")})
    with pytest.raises(VerificationError, match=rf"not finite .*: {re.escape(SCALE)} in model\.safetensors"):
        verify(folder)


# ------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("kind", FORMATS)
def test_what_cannot_be_written_is_refused_before_anything_is(kind: str, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layout='stacked' is not allowed for .*gate_up_proj: in four bits"):
        convert(plain, tmp_path / "out", dtype=kind, layout="stacked")
    convert(plain, tmp_path / kind, dtype=kind)
    with pytest.raises(ValueError, match=r"layout='stacked' is not allowed for .*: in four bits"):
        convert(tmp_path / kind, tmp_path / "out", layout="stacked")
    tensors = bfloat16()
    tensors[UP][3, 4] = float("nan")
    source = write(tmp_path / "nan", tensors, PLAIN_CONFIG)
    with pytest.raises(ValueError, match=rf"Tensor {re.escape(UP)} holds values that are not finite"):
        convert(source, tmp_path / "out", dtype=kind)
    with pytest.raises(ValueError, match=f"dtype='{kind}' is not allowed: it is for routed experts"):
        plan_conversion("dense", dtype=kind, without_weights=True)
    assert {path.name for path in tmp_path.iterdir()} == {"plain", kind, "nan"}


@pytest.mark.parametrize("kind", FORMATS)
def test_odd_widths_are_refused(kind: str, golden: Golden, tmp_path: Path) -> None:
    code, output = run("convert", golden.folder, tmp_path / "out", "--dtype", kind)
    assert code == 2 and f"format='{kind}' is not allowed for model.layers." in output and "Choose 'fp8'" in output
    assert not list(tmp_path.iterdir())


def test_other_quantisations_are_refused(tmp_path: Path) -> None:
    tensors = quantised(bfloat16(), "nf4")
    for name, own, message in (
        ("format", quantization("int4"), r"format='int4' is not allowed in quantization_config: .*nf4, fp8, mxfp4"),
        ("method", {"quant_method": "awq"}, r"quant_method='awq' is not allowed: only 'fp8' .*and 'stacked_experts'"),
    ):
        source = write(tmp_path / name, tensors, {**PLAIN_CONFIG, "quantization_config": own})
        with pytest.raises(ValueError, match=message):
            verify(source)


def test_without_bitsandbytes(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling_deepseekmoe.conversion.matrix_formats import layout_of

    layout_of.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    code, output = run("convert", plain, tmp_path / "out", "--dtype", "nf4")
    assert code == 2 and "format='nf4' needs bitsandbytes" in output and "modeling-deepseekmoe[quant]" in output
    code, output = run("convert", plain, tmp_path / "out", "--dtype", "mxfp4")
    assert code == 0
    layout_of.cache_clear()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_plan_from_an_index_alone(kind: str, plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / kind, dtype=kind, max_shard_size="50KB")
    for file in (tmp_path / kind).glob("*.safetensors"):
        file.unlink()
    plan = plan_conversion(tmp_path / kind, dtype="bfloat16", without_weights=True, max_shard_size="50KB")
    convert(plain, tmp_path / "whole", max_shard_size="50KB")
    assert plan.nbytes == sum(file.stat().st_size for file in (tmp_path / "whole").glob("*.safetensors"))
    kept = plan_conversion(tmp_path / kind, without_weights=True)
    assert kept.nbytes == plan_conversion(plain, dtype=kind).nbytes


@pytest.mark.parametrize("kind", FORMATS)
def test_inspecting(kind: str, plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / kind, dtype=kind, drop_mtp=True)
    report = inspect_model(tmp_path / kind)
    names = {name: tensor for name, tensor in bfloat16().items() if ".layers.2." not in name}
    assert report.total_parameters == sum(tensor.numel() for tensor in names.values())
    experts = sum(tensor.numel() for name, tensor in names.items() if is_expert(name))
    assert report.routed_parameters == experts
    size = report.load_bytes[f"{kind} (routed experts; the rest in bfloat16)"]
    assert size == round(experts * bytes_a_weight(kind) + 2 * (report.total_parameters - experts))
    stored = sum(tensor.nbytes for name, tensor in read(tmp_path / kind).items() if "quant" not in name)
    assert math.isclose(size, stored, rel_tol=0.01)
    code, output = run("inspect", tmp_path / kind, "--check")
    assert code == 0 and "names, shapes and values are in order" in output


def test_blocks_do_not_cut_a_matrix(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in FORMATS:
        convert(plain, tmp_path / kind, dtype=kind)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 2048)
    pieces: list[int] = []
    for kind in FORMATS:
        convert(plain, tmp_path / f"{kind}-small", dtype=kind)
        assert digests(tmp_path / f"{kind}-small") == digests(tmp_path / kind)
        convert(tmp_path / kind, tmp_path / f"{kind}-float32", dtype="float32", progress=pieces.append)
        assert verify(tmp_path / kind, tmp_path / f"{kind}-float32").compared["dequantised"]
        convert(tmp_path / kind, tmp_path / f"{kind}-fp8", dtype="fp8")
        assert verify(tmp_path / f"{kind}-fp8", tmp_path / kind).compared["quantised"]
    assert max(pieces[1:]) <= 4 * 320 * 192 and writing.say_nothing(0) is None
