"""Adapters on disk: merging file by file, verification, the per-expert layout, and the commands."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_cases import DEEPSEEK, PREFIX, adapter, applied_by_loop, per_expert_adapter, save_base
from esft_cases import SELECTION, train
from lora_cases import IDS, direct, logits, make
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tolerances import MERGED_LOGITS, assert_same
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from modeling_deepseekmoe import (
    ExpertSelection,
    expert_lora_config,
    prepare_esft,
    save_esft,
    score_experts,
    select_experts,
)
from modeling_deepseekmoe.analysis.texts import token_batches
from modeling_deepseekmoe.cli.app import app
from modeling_deepseekmoe.conversion import MergingError, export_adapter, merge_adapter
from modeling_deepseekmoe.conversion.adapters import changes, merging


@pytest.mark.parametrize("name", DEEPSEEK)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_in_three_ways_and_unmerged(name: str, use_rslora: bool, tmp_path: Path) -> None:
    """By the command, by us in memory, by plain PEFT in memory; sharded, with attention, shared experts and gates."""
    model = make(name)
    base = save_base(model, tmp_path / "base", max_shard_size="60KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    fields = {"target_modules": ("self_attn", "shared_experts"), "train_router": True, "use_rslora": use_rslora}
    adapted = direct(model, **fields)
    for key, parameter in [*adapted.named_parameters(), *adapted.named_buffers()]:
        if "modules_to_save" in key:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    adapted.eval().save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)

    lines: list[str] = []
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", report=lines.append)
    assert report.layer_errors.keys() == {0, 1, 2} and max(report.layer_errors.values()) < 1e-6
    assert report.tensors == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert len(lines) == len(list(base.glob("*.safetensors")))
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert (logits(merged) - expected).abs().max() <= MERGED_LOGITS
    before = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == before
    for text in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert (base / text).read_bytes() == (tmp_path / "merged" / text).read_bytes()
    reference = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").merge_and_unload().eval()
    for other in (adapted.merge_and_unload(), reference):
        assert (logits(other) - expected).abs().max() <= MERGED_LOGITS


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_of_their_own(use_rslora: bool, tmp_path: Path) -> None:
    """Patterns for experts and for shared experts, which PEFT matches with the names of parameters."""
    model = make()
    patterns = {"experts.down_proj": 2, "shared_experts.gate_proj.weight": 8, "layers.0.self_attn.q_proj": 3}
    adapted = adapter(
        model, tmp_path / "adapter", target_modules=("shared_experts", "q_proj"), use_rslora=use_rslora,
        rank_pattern=patterns, alpha_pattern={"experts.gate_up_proj": 5, "shared_experts.up_proj.weight": 1},
    )  # fmt: skip
    save_base(model, tmp_path / "base")
    export_adapter(tmp_path / "adapter", tmp_path / "per-expert", "per-expert")
    export_adapter(tmp_path / "per-expert", tmp_path / "back", "peft")
    for folder in ("adapter", "per-expert", "back"):
        merge_adapter(tmp_path / "base", tmp_path / folder, tmp_path / f"merged-{folder}")
        merged = type(model).from_pretrained(tmp_path / f"merged-{folder}")
        assert (logits(merged) - logits(adapted)).abs().max() <= MERGED_LOGITS, folder
    back = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "back").eval()
    assert_same(logits(back), logits(adapted))


def test_merging_keeps_the_dtype_and_is_verified_in_it(tmp_path: Path) -> None:
    model = make().to(torch.bfloat16)
    base = save_base(model, tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"other weights, which would be the old ones")
    (base / "vocabulary.txt").write_text("kept")
    adapter(model, tmp_path / "adapter")
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "vocabulary.txt"}  # fmt: skip
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == report.weights == 48 and all(".experts." in name for name in changed)
    assert 1e-4 < max(report.layer_errors.values()) < 0.004


def test_a_stacked_base(tmp_path: Path) -> None:
    """As some converters write it: two parameters for all experts of a layer."""
    model = make()
    base = save_base(model, tmp_path / "base")
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, base / "model.safetensors")
    expected = logits(adapter(model, tmp_path / "adapter"))
    for folder in ("adapter", "per-expert"):
        if folder == "per-expert":
            export_adapter(tmp_path / "adapter", tmp_path / folder, folder)
        report = merge_adapter(base, tmp_path / folder, tmp_path / f"merged-{folder}")
        assert report.weights == 4
        merged = type(model).from_pretrained(tmp_path / f"merged-{folder}")
        assert (logits(merged) - expected).abs().max() <= MERGED_LOGITS


def test_trained_experts_are_merged_too(tmp_path: Path) -> None:
    model = make()
    base = save_base(model, tmp_path / "base")
    prepare_esft(model, SELECTION)
    train(model)
    save_esft(model, tmp_path / "esft")
    report = merge_adapter(base, tmp_path / "esft", tmp_path / "merged")
    assert (report.weights, report.tensors, report.layer_errors) == (9, 9, {1: 0.0, 2: 0.0})
    assert torch.equal(logits(type(make()).from_pretrained(tmp_path / "merged")), logits(
        type(make()).from_pretrained(save_base(model, tmp_path / "whole"))))  # fmt: skip


# --------------------------------------------------------------------------------------------------------- bad merges
def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 32),
                             "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": torch.ones(32, 4)}),
         r"layers\.9\.self_attn\.q_proj\.lora_A\.weight is for a weight of shape \(32, 32\), .* no weight model"),
        (lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 32)}),
         r"Adapter tensor .*\.score\.weight is for a weight of shape \(2, 32\), .* the base has no weight score"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(3)}),
         r"model\.norm\.weight is for a weight of shape \(3,\), .* model\.norm\.weight of shape \(32,\)"),
        (lambda t: t.pop(f"{PREFIX}.lora_A.weight"), r"lora_B\.weight has no partner"),
        (lambda t: t.update({f"{PREFIX}.base_layer.base_layer.lora_A.weight": torch.ones(32, 32),
                             f"{PREFIX}.base_layer.base_layer.lora_B.weight": torch.ones(32, 32)}),
         r"has factors at 3 levels, and target_parameters names \['gate_up_proj', 'down_proj'\]"),
        (lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(32)}), r"of shape \(32,\) is not allowed beside"),
        (lambda t: t.clear(), r"holds no tensors"),
        (lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(33, 16),
                             f"{PREFIX}.lora_B.weight": torch.ones(32, 33)}),
         r"lora_A\.weight of shape \(33, 16\) is not allowed beside .* and rank 4"),
        (lambda t: t.update({"base_model.model.lm_head.base_layer.lora_A.weight": torch.ones(4, 32),
                             "base_model.model.lm_head.base_layer.lora_B.weight": torch.ones(96, 4)}),
         r"a parameter of lm_head under base_layer is not supported"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_refused_and_nothing_is_written(
    change: Callable, message: str, tmp_path: Path
) -> None:
    model = make()
    save_base(model, tmp_path / "base")
    adapter(model, tmp_path / "adapter")
    edit(tmp_path / "adapter", change)
    with pytest.raises(ValueError, match=message):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_routed_experts": 4}, r"is for a weight of shape \(\d+, \d+\), .* the base has no weight .*experts\.4"),
        ({"n_routed_experts": 12}, r"is of 8 experts: the base has more in model\.layers\.1\.mlp\.experts"),
        ({"moe_intermediate_size": 24}, r"\(16, 32\), which is not allowed: the base has .* of shape \(24, 32\)"),
        ({"hidden_size": 64, "head_dim": 8}, r"which is not allowed: the base has .* of shape \(16, 64\)"),
    ],
)
def test_an_adapter_of_another_model(fields: dict, message: str, tiny_model: Callable, tmp_path: Path) -> None:
    save_base(tiny_model(**fields), tmp_path / "base")
    adapter(make(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_stacked_base_with_other_experts(tiny_model: Callable, tmp_path: Path) -> None:
    base = tiny_model(n_routed_experts=12)
    save_base(base, tmp_path / "base")
    save_file({name: t.contiguous() for name, t in base.state_dict().items()}, tmp_path / "base" / "model.safetensors")
    adapter(make(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is for 8 experts, .*gate_up_proj of shape \(12, 32, 32\)"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_a_quantised_base_a_wrong_index_and_missing_files(tmp_path: Path) -> None:
    model = make()
    base = save_base(model, tmp_path / "base")
    adapter(model, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.gate_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, base / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} of the base .*e4m3fn, and .*_scale_inv is missing"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match=r"names '\.\./elsewhere\.safetensors', which is not allowed"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    with pytest.raises(ValueError, match=r"holds model\.safetensors, which .* does not name: one of them is stale"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    (base / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"lacks gone\.safetensors"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_merge_that_goes_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verification reads what was written: a sum that leaves out the scaling, a replacement that is not made."""
    model = make()
    save_base(model, tmp_path / "base")
    adapter(model, tmp_path / "adapter", train_router=True)
    merged = changes.merged

    def unscaled(weight: torch.Tensor, change: changes.Change) -> torch.Tensor:
        sums = [(place, replace(part, scaling=1.0)) for place, part in change.sums]
        return merged(weight, replace(change, sums=sums))

    monkeypatch.setattr(merging, "merged", unscaled)
    result = CliRunner().invoke(app, ["merge", *(str(tmp_path / part) for part in ("base", "adapter", "merged"))])
    assert result.exit_code == 1 and "are not the rounded sum of base and adapter" in result.stderr

    def unreplaced(weight: torch.Tensor, change: changes.Change) -> torch.Tensor:
        return weight + 1 if change.replacements else merged(weight, change)

    monkeypatch.setattr(merging, "merged", unreplaced)
    with pytest.raises(MergingError, match="what was written is not what the adapter holds"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# ---------------------------------------------------------------------------------------------------------- commands
def test_a_change_below_the_noise_of_bfloat16_is_found_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every single value is checked: on the outputs alone an adapter this small could not be seen."""
    model = make().to(torch.bfloat16)
    save_base(model, tmp_path / "base")
    adapter(model, tmp_path / "adapter")
    edit(tmp_path / "adapter", lambda tensors: [t.mul_(0.1) for t in tensors.values()])
    report = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert max(report.layer_errors.values()) < 0.004
    monkeypatch.setattr(merging, "merged", lambda weight, change: weight.clone())
    with pytest.raises(MergingError, match="merged values are not the rounded sum"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "unmerged")
    assert not (tmp_path / "unmerged").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' is not allowed: .* weights that it has changed"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights='olora' is not allowed"),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens=\[5, 6\] is not allowed: only plain LoRA"),
        ({"use_dora": True}, r"use_dora=True is not allowed"),
        ({"r": 0}, r"r=0 of .* is not allowed: it must be at least 1"),
        ({"peft_type": "NOTHING"}, r"adapter_config\.json is not allowed as a config of an adapter"),
        ({"peft_type": "IA3"}, r"peft_type .*IA3 is not allowed: it must be LORA"),
    ],
)
def test_other_methods_are_refused(fields: dict, message: str, tmp_path: Path) -> None:
    model = make()
    save_base(model, tmp_path / "base")
    adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_heads_and_tied_embeddings(tiny_model: Callable, tmp_path: Path) -> None:
    """PEFT saves an adapted head with a copy of its weight; tied, neither can change alone."""
    model = tiny_model().eval()
    save_base(model, tmp_path / "base")
    adapted = adapter(model, tmp_path / "adapter", target_modules=("lm_head",))
    assert any("lm_head.base_layer" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert (logits(merged) - logits(adapted)).abs().max() <= MERGED_LOGITS
    tied = tiny_model(tie_word_embeddings=True).eval()
    save_base(tied, tmp_path / "tied")
    with pytest.raises(ValueError, match=r"no weight lm_head\.weight\. Is its head tied to the embedding\?"):
        merge_adapter(tmp_path / "tied", tmp_path / "adapter", tmp_path / "x")
    adapter(tied, tmp_path / "embedding", modules_to_save=("embed_tokens",))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is not allowed for a base with tie_word_emb"):
        merge_adapter(tmp_path / "tied", tmp_path / "embedding", tmp_path / "x")
    decoder = get_peft_model(copy.deepcopy(model.model), LoraConfig(target_modules=["q_proj"]))
    decoder.save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match=r"It has model\.layers\.0.*: the adapter is of a model without a head"):
        merge_adapter(tmp_path / "base", tmp_path / "decoder", tmp_path / "x")


def test_broken_files_of_the_base(tmp_path: Path) -> None:
    model = make()
    base = save_base(model, tmp_path / "base")
    adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "esft.json").write_text('{"experts": {}}')  # a note; the weights say what a folder is
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    (base / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is not allowed: it must be JSON with an object 'weight_map'"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "x")
    (base / "model.safetensors.index.json").unlink()
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"File model\.safetensors is not a readable safetensors file"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_experts_without_an_adapter_in_the_per_expert_layout(tmp_path: Path) -> None:
    def without_some(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts.7." in name or ".experts.2.gate" in name]:
            del tensors[name]

    source = per_expert_adapter(tmp_path / "theirs", without_some)
    with pytest.raises(ValueError, match=r"expert 2 of .*gate_proj is missing\. If it is to have none, give num_exp"):
        export_adapter(source, tmp_path / "peft", "peft")
    with pytest.raises(ValueError, match=r"num_experts=6 is not allowed: the adapter has an expert 6"):
        export_adapter(source, tmp_path / "peft", "peft", num_experts=6)
    export_adapter(source, tmp_path / "peft", "peft", num_experts=8)
    model = make()
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "peft").eval()
    assert_same(logits(loaded), logits(applied_by_loop(model, source)))


def test_commands(tmp_path: Path) -> None:
    model = make()
    save_base(model, tmp_path / "base")
    adapter(model, tmp_path / "adapter")
    folders = {name: str(tmp_path / name) for name in ("base", "adapter", "merged", "per-expert")}
    runner = CliRunner()
    result = runner.invoke(app, ["merge", folders["base"], folders["adapter"], folders["merged"]])
    assert result.exit_code == 0 and "8 adapter tensors merged into 48 weights of 2 layers" in result.stdout
    assert "layer by layer: largest relative difference" in result.stdout
    result = runner.invoke(app, ["merge", folders["base"], folders["adapter"], folders["merged"]])
    assert result.exit_code == 2 and "must not exist, or be an empty folder" in result.stderr
    result = runner.invoke(
        app, ["export-adapter", folders["adapter"], folders["per-expert"], "--layout", "per-expert"]
    )
    assert result.exit_code == 0 and "96 tensors" in result.stdout
    result = runner.invoke(app, ["export-adapter", folders["adapter"], str(tmp_path / "x"), "--layout", "other"])
    assert result.exit_code == 2 and "layout='other' is not allowed" in result.stderr


def test_esft_select_command(source: Path, tmp_path: Path) -> None:
    from modeling_deepseekmoe.conversion import UpcyclingPlan, upcycle

    upcycle(source, tmp_path / "moe", UpcyclingPlan(shared_width=0, num_shards=2, num_copies=2))
    shutil.copy(source / "tokenizer.json", tmp_path / "moe")
    (tmp_path / "task.txt").write_text("def f(x):\n    return x\n" * 40)
    arguments = ["esft-select", str(tmp_path / "moe"), "--data", str(tmp_path / "task.txt"), "--block-size", "64"]
    out, scores = tmp_path / "new" / "esft.json", tmp_path / "scores.json"
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--scores", str(scores), "--max-tokens", "256"])
    assert result.exit_code == 0, result.output
    assert "gate scores of 256 tokens, threshold 0.1" in result.stdout and "share of the score" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    sizes = {"max_tokens": 256, "block_size": 64, "batch_size": 2}
    texts = [(tmp_path / "task.txt").read_text()]
    token = ["--method", "token"]
    for extra, method, threshold in (
        ([], "gate", 0.1),
        (token, "token", 0.2),
        ([*token, "--threshold", "0.6"], "token", 0.6),
    ):
        arguments_of_it = [*arguments, "--max-tokens", "256", "--batch-size", "2", "--out", str(out), *extra]
        assert CliRunner().invoke(app, arguments_of_it).exit_code == 0
        values = score_experts(model, token_batches(iter(texts), tokenizer, **sizes), method)
        assert ExpertSelection.of(out).experts == select_experts(values, threshold)
    experts = json.loads(out.read_text())["experts"]
    assert experts and all(1 <= len(ids) <= 4 for ids in experts.values())
    assert json.loads(scores.read_text())["gate_scores"].keys() == experts.keys()
    for extra, message in (
        (["--threshold", "0"], "threshold=0.0 is not allowed"),
        (["--method", "other"], "method='other' is not allowed"),
        (["--dtype", "int8"], "dtype='int8' is not allowed"),
        (["--max-tokens", "1"], "max_tokens=1 is not allowed"),
    ):
        target = tmp_path / "bad" / "esft.json"
        result = CliRunner().invoke(app, [*arguments, "--out", str(target), *extra])
        assert result.exit_code == 2 and message in result.stderr and not target.parent.exists()


def test_adding_an_adapter_of_a_saved_folder_to_a_trained_one(tmp_path: Path) -> None:
    """A checkpoint of training, loaded into the same model again, as Trainer does when it resumes."""
    model = make()
    adapted = get_peft_model(copy.deepcopy(model), expert_lora_config(model, r=4, lora_dropout=0.1))
    train(adapted)
    adapted.save_pretrained(tmp_path)
    fresh = get_peft_model(copy.deepcopy(model), expert_lora_config(model, r=4, lora_dropout=0.1))
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(fresh.eval(), IDS), logits(adapted.eval(), IDS))
