"""The command line: output, exit codes."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from cli_runner import run
from conftest import Golden
from dense_models import spoil_one_expert
from safetensors.torch import save_file

from modeling_deepseekmoe.analysis import kernel_report


def test_inspect_prints_a_table_or_json() -> None:
    code, output = run("inspect", "deepseek-v2-lite")
    assert code == 0 and "15,706,484,224" in output and "2.661 B" in output
    code, output = run("inspect", "deepseek-v2-lite", "--json")
    assert code == 0 and json.loads(output)["total_parameters"] == 15_706_484_224


def test_inspect_check(v1: Golden, tmp_path: Path) -> None:
    config, tensors = json.dumps(v1.config), v1.tensors
    (tmp_path / "config.json").write_text(config)
    save_file(tensors, tmp_path / "model.safetensors")
    assert run("inspect", tmp_path, "--check")[0] == 0
    code, output = run("inspect", tmp_path, "--check", "--json")
    assert code == 0 and '"total_parameters"' in output
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    code, output = run("inspect", tmp_path, "--check")
    assert code == 1 and "model.safetensors is not a readable safetensors file" in output
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    code, output = run("inspect", tmp_path, "--check")
    assert code == 1 and re.search(r"not finite .*: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight in", output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "nothing"), "'nothing' is not allowed"),
        (("inspect", "dense", "--lora-rank", "0"), "lora_rank=0"),
        (("inspect", "dense", "--check"), "has no weights"),
        (("inspect", "dense", "--gpus", "2", "--lora-rank", "4"), "--lora-rank: not allowed with --method full"),
        (("inspect", "dense", "--gpus", "2", "--method", "lora", "--esft-share", "0.5"), "--esft-share: not allowed"),
        (("upcycle", "x", "y", "--shared-width", "-1", "--shards", "4", "--copies", "2"), "shared_width=-1"),
    ],
)
def test_mistakes_exit_with_2(arguments: tuple[str, ...], message: str) -> None:
    code, output = run(*arguments)
    assert code == 2 and message in output


def test_upcycle(source: Path, tmp_path: Path) -> None:
    options = ("--shared-width", 16, "--shards", 4, "--copies", 3)
    code, output = run("upcycle", source, tmp_path / "moe", *options, "--dialect", "deepseek")
    assert code == 0 and "greedy text of 32 tokens the same" in output
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["model_type"] == "deepseek"
    code, output = run("upcycle", tmp_path / "nowhere", tmp_path / "other", *options)
    assert code == 2 and "nowhere" in output
    code, output = run("upcycle", source, tmp_path / "moe", *options)
    assert code == 2 and "must not exist" in output


def test_help_names_every_command() -> None:
    code, output = run("--help")
    assert code == 0 and all(name in output for name in ("inspect", "upcycle", "merge"))


def test_upcycle_that_fails_its_check(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_one_expert(monkeypatch)
    code, output = run("upcycle", source, tmp_path / "moe", "--shared-width", 16, "--shards", 4, "--copies", 3)
    assert code == 1 and "differs from the dense model" in output
    assert not (tmp_path / "moe").exists()


def test_convert(v3: Golden, tmp_path: Path) -> None:
    code, output = run("convert", "deepseek-v3", tmp_path / "out", "--dry-run", "--layout", "stacked")
    assert code == 0 and "45,395 tensors, 1,342.053 GB" in output and "disk needed: 1,342.0" in output
    code, output = run("convert", v3.folder, tmp_path / "out", "--dry-run", "--json", "--dtype", "bfloat16")
    plan = json.loads(output)
    assert code == 0 and plan["dtype"] == "bfloat16" and plan["tensors_by_dtype"]["bfloat16"] == 89
    assert not list(tmp_path.iterdir())
    code, output = run("convert", v3.folder, tmp_path / "out", "--to", "deepseekmoe", "--layout", "stacked")
    assert code == 0 and "out: complete." in output
    assert run("verify", v3.folder, tmp_path / "out")[0] == 0
    assert run("inspect", tmp_path / "out", "--check")[0] == 0
    code, output = run("convert", v3.folder, tmp_path / "no", "--to", "deepseek")
    assert code == 2 and "cannot be expressed in dialect 'deepseek'" in output
    code, output = run("convert", "deepseek-v3", tmp_path / "no")
    assert code == 2 and "deepseek-v3 is no folder" in output


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = run("kernels", "--no-time", "--json")
    report = json.loads(output)
    assert code == 0 and not report["timings"] and not report["trials"]
    assert report["uses"][0]["implementation"] == "eager" and report["uses"][0]["reason"]
    assert [use["implementation"] for use in report["uses"][1:]] == ["loop", "loop"]
    monkeypatch.setattr(kernel_report, "CPU_SIZE", kernel_report.Size(4, 2, 1024, 512, 20, 40, rounds=1))
    code, output = run("kernels")
    assert code == 0 and "experts in float32: loop, because the tensors are on the CPU" in output
    for part in ("routing  ", "experts, forward", "experts, training step", "frozen experts, here with LoRA r 16"):
        assert re.search(rf"{part} +[0-9.]+ ms +[0-9.]+ ms +[0-9.]+$", output, re.MULTILINE)


def test_kernels_read_the_tiles_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too, where nothing else does."""
    entry = {"gpu": "sm_90", "kind": "first", "dtype": "bfloat16", "rows": 512, "columns": 768, "inside": 2048,
             "tile": [128, 64, 64, 8, 3]}  # fmt: skip
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps([entry]))
    monkeypatch.setenv("DEEPSEEKMOE_TILES", str(path))
    code, output = run("kernels", "--no-time")
    assert code == 0 and f"tiles of the experts' kernels: 1 of {path}" in output
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps([{**entry, "kind": "frist"}]))
    monkeypatch.setenv("DEEPSEEKMOE_TILES", str(wrong))
    code, output = run("kernels", "--no-time")
    assert code == 2 and "the kind is not one of first" in output.replace("\n", " ")


def test_kernels_that_fail_their_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    report = kernel_report.report_kernels(timed=False)
    failed = dataclasses.replace(report, trials={"routing": "passed", "experts": "the output differs by 1.0e+00"})
    monkeypatch.setattr(kernel_report, "report_kernels", lambda **_: failed)
    code, output = run("kernels")
    assert code == 1 and "trial of the experts kernels: the output differs" in output
