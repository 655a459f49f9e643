"""The launch files of configuration/accelerate, and what is made of them."""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from conftest import TINY, V3_LIKE
from paths import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers
from tolerances import LOW_PRECISION_LOSS
from transformers import PreTrainedTokenizerFast
from transformers.distributed import DistributedConfig

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM, sharding_of_launch
from modeling_deepseekmoe.conversion import verify
from modeling_deepseekmoe.support.folders import read_tensors

SHARDS_AT_LOADING = "dp_replicate_size" in {field.name for field in dataclasses.fields(DistributedConfig)}
FILES = {file.stem: file for file in sorted((ROOT / "configuration" / "accelerate").glob("*.yaml"))}
# What processes of these files are told, and how many of them run on the CPU. DeepSpeed and offloading need a GPU: of
# these only the launch is prepared.
SHARDING: dict[str, dict[str, Any] | None] = {
    "single_gpu": None,
    "ddp": None,
    "deepspeed_zero3": None,
    "fsdp2_full": {"fsdp_size": 8, "fsdp_mixed_precision": True},
    "fsdp2_lora": {"fsdp_size": 4, "fsdp_mixed_precision": True},
    "fsdp2_cpu_offload": {"fsdp_size": 2, "fsdp_cpu_offload": True, "fsdp_mixed_precision": True},
    "hsdp": {"fsdp_size": 8, "dp_replicate_size": 2, "fsdp_mixed_precision": True},
}
ON_THE_CPU = {"single_gpu": 1, "ddp": 2, "fsdp2_full": 2, "fsdp2_lora": 2, "hsdp": 4}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of an outer launch, and nothing that is left behind."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")) or name == "WORLD_SIZE":
            monkeypatch.delenv(name)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


def launched(file: Path, *options: str) -> tuple[Any, dict[str, str]]:
    """The arguments of `accelerate launch` with a file, and the environment that it gives its processes."""
    arguments = launch_command_parser().parse_args(["--config_file", str(file), *options, "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        return arguments, prepare_deepspeed_cmd_env(arguments)[1]
    if arguments.use_fsdp or arguments.multi_gpu:
        return arguments, prepare_multi_gpu_env(arguments)
    return arguments, prepare_simple_launcher_cmd_env(arguments)[1]


def test_every_file_is_listed() -> None:
    assert set(FILES) == set(SHARDING)


@pytest.mark.parametrize("name", FILES)
def test_file_is_understood_by_accelerate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    assert text.startswith("# ") and "# When to use it:" in text
    assert f"--config_file configuration/accelerate/{name}.yaml" in text
    config = load_config_from_file(str(FILES[name]))  # refuses fields that it does not know
    content = yaml.safe_load(text)
    known = {option.dest for option in launch_command_parser()._actions}
    for field in ("fsdp_config", "deepspeed_config", "parallelism_config"):
        assert set(content.get(field, {})) <= known, field
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    arguments, environment = launched(FILES[name])
    assert arguments.num_processes == config.num_processes == content["num_processes"]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment.get("ACCELERATE_USE_FSDP", "false") == str(name.startswith(("fsdp2", "hsdp"))).lower()
    assert environment.get("ACCELERATE_USE_DEEPSPEED", "false") == str(name == "deepspeed_zero3").lower()
    for key, value in {**environment, "WORLD_SIZE": str(content["num_processes"])}.items():
        monkeypatch.setenv(key, value)
    groups: list[str] = []
    monkeypatch.setattr("torch.cuda.set_device", lambda rank: None)
    monkeypatch.setattr("torch.distributed.init_process_group", groups.append)
    if SHARDING[name] is not None and not SHARDS_AT_LOADING:
        with pytest.raises(ImportError, match=r"needs transformers 5\.23"):
            sharding_of_launch()
        return
    sharding = sharding_of_launch()
    assert groups == (["cpu:gloo,cuda:nccl"] if name == "fsdp2_cpu_offload" else [])
    if SHARDING[name] is None:
        assert sharding is None
        return
    assert {key: getattr(sharding, key) for key in SHARDING[name]} == SHARDING[name]
    assert (sharding.tp_size, sharding.ep_size) == (1, 1)
    for switch in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        assert switch not in os.environ  # accelerate shards nothing again
    assert sharding_of_launch() == sharding  # of a second model


@pytest.mark.parametrize(("field", "size"), [("tp_size", 0), ("ep_size", -1)])
def test_sizes_below_one(field: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"{field}={size} is not allowed: it must be at least 1"):
        sharding_of_launch(**{field: size})


@pytest.mark.skipif(not SHARDS_AT_LOADING, reason="this transformers does not shard a model while it loads")
def test_sizes_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sharding_of_launch() is None
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert sharding_of_launch() is None  # torchrun alone: DDP
    spread = sharding_of_launch(tp_size=2, ep_size=4)
    assert (spread.fsdp_size, spread.tp_size, spread.ep_size) == (4, 2, 4)
    assert not spread.fsdp_mixed_precision and not spread.fsdp_cpu_offload
    spread = sharding_of_launch(tp_size=8)
    assert (spread.fsdp_size, spread.tp_size) == (1, 8)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    for name, size in (("TP", 2), ("DP_SHARD", 4), ("DP_REPLICATE", 1)):
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}_SIZE", str(size))
    spread = sharding_of_launch()
    assert (spread.fsdp_size, spread.tp_size, spread.dp_replicate_size) == (4, 2, 1)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FSDP_VERSION": "1"}, r"fsdp_version=1 is not allowed .* set fsdp_version: 2"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, r"fsdp_reshard_after_forward=false is not allowed"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, r"TrainingArguments\(gradient_checkpointing=True\)"),
        ({"FSDP_OFFLOAD_PARAMS": "true", "WORLD_SIZE": "1"}, r"fsdp_offload_params=true .* at least two"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "3"},
            r"dp_replicate_size=3 .* 4 processes",
        ),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"},
            r"parallelism_config_cp_size=2 is not allowed",
        ),
    ],
)
def test_launches_that_are_refused(environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "4", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        sharding_of_launch()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes, for the examples' text."""
    folder = tmp_path_factory.mktemp("bytes") / "model"
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ā", "ā"]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    torch.manual_seed(0)
    config = DeepseekMoeConfig(**{**TINY, **V3_LIKE, "vocab_size": len(alphabet)})
    DeepseekMoeForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="Ā", eos_token="ā").save_pretrained(folder)
    return folder


def run_example(name: str, example: str, checkpoint: Path, output: Path, *options: str, precision: str = "no") -> str:
    """An example under `accelerate launch`, as a user starts it, on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILES[name])]
    command += ["--num_processes", str(ON_THE_CPU[name]), "--mixed_precision", precision, "--main_process_port", "0"]
    if name == "hsdp":
        command += ["--num_machines", "1", "--main_process_ip", "127.0.0.1", "--parallelism_config_dp_shard_size", "2"]
    command += [str(ROOT / "examples" / f"{example}.py"), "--model", str(checkpoint), "--output", str(output)]
    command += ["--steps", "3", "--save-steps", "2", "--block-size", "32", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("loss ")]
    assert line.endswith(f"on {ON_THE_CPU[name]} processes")
    return line.partition(" on ")[0]


@pytest.mark.slow
def test_train_fsdp2_runs_with_every_file_the_same(checkpoint: Path, tmp_path: Path) -> None:
    lines = {}
    for name in ON_THE_CPU:
        lines[name] = run_example(name, "train_fsdp2", checkpoint, tmp_path / name)
        verify(tmp_path / name / "model")
    assert len(set(lines.values())) == 1, lines
    # Interrupted after two steps under DDP, resumed under FSDP2.
    shutil.rmtree(tmp_path / "ddp" / "checkpoint-3")
    resumed = run_example("fsdp2_full", "train_fsdp2", checkpoint, tmp_path / "ddp", "--resume")
    assert resumed == lines["single_gpu"]
    # In bfloat16, as the files say; the first loss is that of float32 but for rounding.
    rounded = run_example("fsdp2_full", "train_fsdp2", checkpoint, tmp_path / "rounded", precision="bf16")
    first = [float(line.split()[1]) for line in (rounded, resumed)]
    assert first[0] == pytest.approx(first[1], abs=LOW_PRECISION_LOSS) and first[0] != first[1]


@pytest.mark.slow
def test_finetune_lora_fsdp2_runs_with_every_file_the_same(checkpoint: Path, tmp_path: Path) -> None:
    lines = {}
    for name in ("single_gpu", "ddp", "fsdp2_lora", "hsdp"):
        lines[name] = run_example(name, "finetune_lora_fsdp2", checkpoint, tmp_path / name)
        assert len(read_tensors(tmp_path / name / "adapter" / "adapter_model.safetensors")) > 30
    assert len(set(lines.values())) == 1, lines
