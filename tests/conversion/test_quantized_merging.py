"""Merging into quantised bases: the sum of what is decoded and the adapter, rounded or quantised again."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_cases import applied_by_loop
from cli_runner import run
from conversion_cases import digests
from lora_cases import IDS, direct, logits
from peft import PeftModel, get_peft_model
from synthetic import CONFIG, dequantized, read, same_bytes, v3_tensors, write
from tolerances import MERGED_LOGITS, ROUNDING_SHARE, assert_same
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_deepseekmoe import expert_lora_config, optimize_expert_lora, prepare_esft, save_esft
from modeling_deepseekmoe.conversion import (
    MergingError,
    VerificationError,
    convert,
    export_adapter,
    merge_adapter,
    verify,
)
from modeling_deepseekmoe.conversion.adapters import quantised_bases
from modeling_deepseekmoe.conversion.matrix_formats import NF4_STATE, SUFFIXES, decode, encode
from modeling_deepseekmoe.quantization.config import StackedExpertsConfig

FORMATS = ("nf4", "mxfp4", "fp8")
SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 16}


IN_FLOAT32 = pytest.mark.parametrize("model", [torch.float32], indirect=True, ids=["float32"])


@pytest.fixture
def model(tiny_model: Callable, request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(**SIZES).eval().to(getattr(request, "param", torch.bfloat16))


@pytest.fixture
def bases(model: nn.Module, tmp_path: Path) -> dict[str, Path]:
    """The model as it is, and with quantised experts in several files."""
    model.save_pretrained(tmp_path / "plain")
    for kind in FORMATS:
        convert(tmp_path / "plain", tmp_path / kind, dtype=kind, max_shard_size="60KB")
    return {name: tmp_path / name for name in ("plain", *FORMATS)}


@pytest.fixture
def adapter(model: nn.Module, tmp_path: Path) -> Path:
    """One that changes weights as much as they are: even four bits do not swallow that."""
    direct(model, target_modules=("self_attn", "shared_experts")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def parts_of(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {suffix: tensors[name + suffix] for suffix in SUFFIXES if name + suffix in tensors}


def is_beside(name: str, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a tensor belongs to a quantised matrix, and is not its codes."""
    return any(suffix and name.endswith(suffix) and name.removesuffix(suffix) in tensors for suffix in SUFFIXES)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights, decoded to float32."""
    tensors = read(folder)
    return {name: decode(parts_of(tensors, name), name) for name in tensors if not is_beside(name, tensors)}


def with_adapter(folder: Path, adapter: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """The decoded base with every pair of factors added to its own linear map, in float32."""
    export_adapter(adapter, scratch / "per-expert", "per-expert")
    convert(folder, scratch / "decoded", dtype="float32", layout="per-expert")
    model = AutoModelForCausalLM.from_pretrained(scratch / "decoded", dtype=torch.float32)
    applied_by_loop(model, scratch / "per-expert").save_pretrained(scratch / "applied")
    return read(scratch / "applied")


# ------------------------------------------------------------------------------------------------------------- merging
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [None, "float32", "float16", "keep"])
def test_merged_into_every_format(
    kind: str, dtype: str | None, bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    before, wanted = digests(bases[kind]), with_adapter(bases[kind], adapter, tmp_path / "scratch")
    report = merge_adapter(bases[kind], adapter, tmp_path / "merged", dtype=dtype)
    assert digests(bases[kind]) == before
    assert report.tensors == 2 * (2 * 2 + 3 * 4 + 2 * 3) and report.layer_errors.keys() == {0, 1, 2}
    assert report.base == kind and report.written == {None: "bfloat16", "keep": kind}.get(dtype, dtype)
    stored, found, base = read(tmp_path / "merged"), weights_of(tmp_path / "merged"), read(bases[kind])
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        quantised = len(parts_of(base, name)) > 1
        if quantised and dtype == "keep":
            assert stored[name].dtype == base[name].dtype
            again = decode(encode(exact, kind), name)
            worst = (again - found[name]).abs().max() / again.abs().max()  # where a sum lies between two codes
            assert (again != found[name]).float().mean() < 0.01 and worst < 0.3, name
        else:
            own = getattr(torch, dtype or "bfloat16") if quantised else base[name].dtype
            assert stored[name].dtype == own
            torch.testing.assert_close(found[name], exact, rtol=torch.finfo(own).eps, atol=1e-6)
    if dtype == "keep":
        assert stored.keys() == base.keys()
        assert (tmp_path / "merged" / "config.json").read_bytes() == (bases[kind] / "config.json").read_bytes()
        assert 0.02 < report.lost < 0.75
    else:
        config = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert "quantization_config" not in config and config["dtype"] == (dtype or "bfloat16")
        assert report.lost < 0.02
    assert f"of a base in {kind}, written in {report.written}; every value is the sum" in str(report)
    assert verify(tmp_path / "merged").tensors == len(stored)


@IN_FLOAT32
@pytest.mark.parametrize("kind", FORMATS)
def test_the_merged_model_computes_what_the_adapter_over_the_base_computes(
    kind: str, bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    own = {"quantization_config": StackedExpertsConfig(format=kind)}
    base = AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.float32, **own)
    alone = logits(base.eval())
    adapted = optimize_expert_lora(PeftModel.from_pretrained(base, adapter)).eval()
    merge_adapter(bases[kind], adapter, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    expected = logits(adapted)
    assert (logits(merged) - expected).abs().max() <= MERGED_LOGITS
    merge_adapter(bases[kind], adapter, tmp_path / "kept", dtype="keep")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.float32, **own).eval()
    assert kept.model.layers[1].mlp.experts.down_proj.dtype == torch.uint8
    difference = (logits(kept) - expected).norm() / (alone - expected).norm()
    assert MERGED_LOGITS < difference < 0.6


@IN_FLOAT32
def test_one_adapter_for_the_plain_base_and_the_quantised_one(
    bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    """An adapter that was trained over either of them names the other one at most in a line."""
    config = adapter / "adapter_config.json"
    named = {**json.loads(config.read_text()), "base_model_name_or_path": str(bases["nf4"])}
    config.write_text(json.dumps(named))
    lines: list[str] = []
    report = merge_adapter(bases["plain"], adapter, tmp_path / "plain-merged", report=lines.append)
    assert report.base is None and report.lost < 1e-5
    assert f"The adapter names {bases['nf4']} as its base, and this is {bases['plain']}." in lines
    lines.clear()
    merge_adapter(bases["nf4"], adapter, tmp_path / "nf4-merged", dtype="float32", report=lines.append)
    assert not any("names" in line for line in lines)
    first, second = (weights_of(tmp_path / f"{name}-merged") for name in ("plain", "nf4"))
    plain, quantised = weights_of(bases["plain"]), weights_of(bases["nf4"])
    for name in first:  # the same is added to each
        assert_same(second[name] - quantised[name], first[name] - plain[name], name)
        assert torch.equal(first[name], plain[name]) == torch.equal(second[name], quantised[name])


@pytest.mark.parametrize("kind", FORMATS)
def test_what_the_adapter_leaves_out_keeps_its_bytes(
    kind: str, model: nn.Module, bases: dict[str, Path], tmp_path: Path
) -> None:
    direct(model, experts={1: [6, 0], 2: [3]}, projections=("down",)).save_pretrained(tmp_path / "adapter")
    report = merge_adapter(bases[kind], tmp_path / "adapter", tmp_path / "kept", dtype="keep")
    changed = {
        f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight" for layer, expert in ((1, 6), (1, 0), (2, 3))
    }
    assert report.weights == 3
    base, found = read(bases[kind]), read(tmp_path / "kept")
    for name, tensor in base.items():
        own = name.endswith((NF4_STATE, "quant_map")) or not any(name.startswith(one) for one in changed)
        same = found[name].shape == tensor.shape and same_bytes({"": found[name]}, {"": tensor})
        assert same == own or NF4_STATE in name, name
    merge_adapter(bases[kind], tmp_path / "adapter", tmp_path / "whole")
    decoded, whole = weights_of(bases[kind]), weights_of(tmp_path / "whole")
    for name in decoded:
        assert torch.equal(whole[name], decoded[name].to(torch.bfloat16).float()) == (name not in changed), name


def test_experts_of_esft(model: nn.Module, bases: dict[str, Path], tmp_path: Path) -> None:
    """Trained experts take the place of quantised ones, in bfloat16, or quantised again."""
    prepare_esft(model, {1: [6, 0], 2: [3]})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "selected" in name or ".experts." in name
            parameter.data += torch.randn_like(parameter) * parameter.abs().mean()
    save_esft(model, tmp_path / "esft")
    trained = {name: tensor for name, tensor in read_esft_tensors(tmp_path / "esft").items()}
    assert len(trained) == 9
    report = merge_adapter(bases["nf4"], tmp_path / "esft", tmp_path / "merged")
    found = read(tmp_path / "merged")
    assert report.weights == 9 and all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    report = merge_adapter(bases["nf4"], tmp_path / "esft", tmp_path / "kept", dtype="keep")
    found = read(tmp_path / "kept")
    for name, tensor in trained.items():
        assert torch.equal(decode(parts_of(found, name), name), decode(encode(tensor, "nf4"), name)), name
    assert 0.05 < report.lost < 0.5


def read_esft_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(folder.glob("*.safetensors")))


# -------------------------------------------------------------------------------------------------- DeepSeek-V3's FP8
@pytest.mark.parametrize("shards", [1, 3])
def test_released_fp8_files_with_ragged_blocks(shards: int, tmp_path: Path) -> None:
    """Loaded as FP8, LoRA trained beside it, merged into FP8 and into bfloat16, verified, and loaded again."""
    tensors = v3_tensors()
    source = write(tmp_path / "source", tensors, CONFIG, shards)
    own = {"dtype": torch.float32, "quantization_config": StackedExpertsConfig(format="fp8")}
    base = AutoModelForCausalLM.from_pretrained(source, **own)
    assert base.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.uint8
    ids = IDS.clamp_max(159)
    config = expert_lora_config(base, r=8, target_modules=("self_attn", "shared_experts"))
    before, adapted = logits(base.eval(), ids), get_peft_model(base, config)
    optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = adapted.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.5
    adapted.eval().save_pretrained(tmp_path / "adapter")
    trained = logits(adapted, ids)

    kept = merge_adapter(source, tmp_path / "adapter", tmp_path / "fp8", dtype="keep")
    plain = merge_adapter(source, tmp_path / "adapter", tmp_path / "bfloat16")
    assert plain.lost < 0.02 < kept.lost < 0.75 and kept.written == "fp8"
    found = read(tmp_path / "fp8")
    assert found.keys() == tensors.keys() and all(found[name].dtype == one.dtype for name, one in tensors.items())
    changed = {name for name in tensors if not same_bytes({"": found[name]}, {"": tensors[name]})}
    linear = {name for name in dequantized(tensors) if tensors[name].dtype == torch.float8_e4m3fn}
    assert {name.removesuffix("_scale_inv") for name in changed} == {
        name for name in linear if ".layers.2." not in name and "layers.0.mlp" not in name
    }
    for folder in ("fp8", "bfloat16"):
        assert verify(tmp_path / folder).tensors == len(read(tmp_path / folder))
    with pytest.raises(VerificationError, match="tensors that differ"):
        verify(source, tmp_path / "fp8")
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", **own),
        AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype=torch.float32),
    ]
    errors = [float((logits(one.eval(), ids) - trained).norm() / (before - trained).norm()) for one in models]
    assert errors[1] < 0.05 and errors[1] < errors[0] < 0.75


def test_blocks_of_another_size(model: nn.Module, bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    config = json.loads((bases["fp8"] / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [48, 32]
    tensors = read(bases["fp8"])
    for name in [name for name in tensors if tensors[name].dtype == torch.float8_e4m3fn]:
        rows, columns = (-(-size // step) for size, step in zip(tensors[name].shape, (48, 32), strict=True))
        tensors[f"{name}_scale_inv"] = torch.rand(rows, columns) * 1e-4 + 1e-4
    source = write(tmp_path / "source", tensors, config)
    merge_adapter(source, adapter, tmp_path / "kept", dtype="keep")
    merge_adapter(source, adapter, tmp_path / "float32", dtype="float32")
    exact, found = read(tmp_path / "float32"), read(tmp_path / "kept")
    decoded = dequantized(found, 48, 32)
    for name in exact:
        bound = exact[name].abs() * 2**-4 + found.get(f"{name}_scale_inv", torch.zeros(1)).max() * 2**-10 + 1e-9
        assert ((decoded[name].float() - exact[name]).abs() <= bound).all(), name


# ------------------------------------------------------------------------------------------------------------- refused
def scaled(adapter: Path, folder: Path, factor: float) -> Path:
    """The same adapter, with smaller changes."""
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * factor}))
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_an_adapter_that_rounding_swallows_is_refused_with_figures(
    kind: str, bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    small = scaled(adapter, tmp_path / "small", 0.03)
    before = {path.name for path in tmp_path.iterdir()}
    message = rf"Rounding to {kind} is off by \d+\.\d\d times what the adapter changes, .*at most 0\.75 is allowed"
    with pytest.raises(MergingError, match=message):
        merge_adapter(bases[kind], small, tmp_path / "merged", dtype="keep")
    assert {path.name for path in tmp_path.iterdir()} == before
    code, output = run("merge", bases[kind], small, tmp_path / "merged", "--dtype", "keep")
    assert code == 1 and f"Failed: Rounding to {kind}" in output
    report = merge_adapter(bases[kind], small, tmp_path / "merged")
    assert report.lost < 0.5


def test_bfloat16_swallows_too(model: nn.Module, bases: dict[str, Path], tmp_path: Path) -> None:
    direct(model).save_pretrained(tmp_path / "adapter")
    tiny = scaled(tmp_path / "adapter", tmp_path / "tiny", 3e-4)
    with pytest.raises(MergingError, match=r"Rounding to bfloat16 is off by 0\.[89]\d times what the adapter"):
        merge_adapter(bases["plain"], tiny, tmp_path / "merged")
    with pytest.raises(MergingError, match=r"Rounding to bfloat16 is off by \d+\.\d\d times what the adapter"):
        merge_adapter(bases["nf4"], tiny, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert merge_adapter(bases["nf4"], tiny, tmp_path / "merged", dtype="float32").lost < 0.05


def test_a_merge_that_goes_wrong_is_found(
    bases: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum without the scaling, and something else in the files than the sum."""
    merged = quantised_bases.merged

    def unscaled(weight: torch.Tensor, change: quantised_bases.Change) -> torch.Tensor:
        sums = [(place, replace(part, scaling=1.0)) for place, part in change.sums]
        return merged(weight, replace(change, sums=sums))

    monkeypatch.setattr(quantised_bases, "merged", unscaled)
    for dtype in ("keep", "bfloat16"):
        with pytest.raises(MergingError, match="are not the rounded sum of base and adapter"):
            merge_adapter(bases["nf4"], adapter, tmp_path / "merged", dtype=dtype)
    monkeypatch.setattr(quantised_bases, "merged", merged)
    fill = quantised_bases.fill_folder

    def spoiled(plan: object, source: object, folder: Path, **options: object) -> None:
        fill(plan, source, folder, **options)
        (file,) = folder.glob("model*.safetensors")
        shard = next(one for one in plan.shards if one.name == file.name)
        place = len(shard.header)
        for output in shard.outputs:
            if output.name == "model.layers.1.mlp.experts.3.up_proj.weight":
                content = bytearray(file.read_bytes())
                content[place + 7] ^= 1
                file.write_bytes(content)
            place += output.nbytes

    monkeypatch.setattr(quantised_bases, "fill_folder", spoiled)
    for kind in FORMATS:
        for dtype in ("keep", "bfloat16"):
            with pytest.raises(MergingError, match=r"experts\.3\.up_proj\.weight: what was written is not the sum"):
                merge_adapter(bases[kind], adapter, tmp_path / "merged", dtype=dtype)
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))


def test_what_is_refused_before_anything_is_written(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype='int8' is not allowed: it must be one of keep, float32, bfloat16"):
        merge_adapter(bases["nf4"], adapter, tmp_path / "merged", dtype="int8")
    with pytest.raises(ValueError, match=r"dtype='float32' is not allowed: the base is not quantised"):
        merge_adapter(bases["plain"], adapter, tmp_path / "merged", dtype="float32")
    convert(bases["fp8"], tmp_path / "stacked", layout="stacked")
    with pytest.raises(ValueError, match=r"gate_up_proj of the base is a quantised stack of shape .*per-expert"):
        merge_adapter(tmp_path / "stacked", adapter, tmp_path / "merged")
    config = json.loads((bases["nf4"] / "config.json").read_text())
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    for number, (change, message) in enumerate({
        (f"{name}.absmax", None): rf"lacks {re.escape(name)}\.absmax, which nf4 has",
        (f"{name}{NF4_STATE}", b"{}"): r"bitsandbytes__nf4 of the base is not allowed: it holds no shape",
        (f"{name}{NF4_STATE}", b'{"shape": [64, 96]}'): r"has shape \(2048, 1\) .*\(3072, 1\)|format='nf4' is not",
    }.items()):  # fmt: skip
        tensors = read(bases["nf4"])
        key, content = change
        if content is None:
            del tensors[key]
        else:
            tensors[key] = torch.tensor(list(content), dtype=torch.uint8)
        source = write(tmp_path / f"damaged{number}", tensors, config)
        with pytest.raises(ValueError, match=message):
            merge_adapter(source, adapter, tmp_path / "merged")
    source = write(tmp_path / "awq", read(bases["nf4"]), {**config, "quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ValueError, match=r"quant_method='awq' is not allowed"):
        merge_adapter(source, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_family(tmp_path: Path) -> None:
    """Weights are found by the names of their tensors alone."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(vocab_size=96, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, head_dim=16,
                            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=8,
                            num_experts_per_tok=2)  # fmt: skip
    Qwen3MoeForCausalLM(config).eval().save_pretrained(tmp_path / "plain")
    own = {"quantization_config": StackedExpertsConfig(format="mxfp4")}
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32, **own)
    quantised.save_pretrained(tmp_path / "mxfp4")
    torch.manual_seed(2)
    adapted = get_peft_model(quantised, expert_lora_config(quantised, r=4, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "mxfp4", tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert type(merged) is Qwen3MoeForCausalLM
    assert (logits(merged) - logits(adapted)).abs().max() <= MERGED_LOGITS


@pytest.mark.parametrize(
    ("kind", "of_one_percent", "of_ten"),
    [("nf4", 1.1, 0.8), ("mxfp4", 2.8, 0.8), ("fp8", 0.9, 0.25), ("bfloat16", 0.2, 0.0)],
)
def test_what_rounding_loses(kind: str, of_one_percent: float, of_ten: float) -> None:
    """The figures of docs/lora.md: of changes of normal weights that are quantised already, of rank 8."""
    weight, inputs = torch.randn(512, 1024) * 0.02, torch.randn(64, 1024)
    base = decode(encode(weight, "nf4" if kind == "bfloat16" else kind), "w")
    low_rank = torch.randn(512, 8) @ torch.randn(8, 1024)
    for size, lost in ((0.01, of_one_percent), (0.1, of_ten)):
        change = low_rank * (size * 0.02 / low_rank.std())
        total = base + change
        found = total.to(torch.bfloat16).float() if kind == "bfloat16" else decode(encode(total, kind), "w")
        share = (inputs @ (found - total).t()).norm() / (inputs @ change.t()).norm()
        assert float(share) == pytest.approx(lost, abs=ROUNDING_SHARE), size
