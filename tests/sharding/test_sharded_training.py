"""Several processes, however they share the model, train as one does; what they save resumes on any other number.

Losses are compared with an absolute tolerance of 1e-5, counts and biases bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, V3_LIKE
from fresh_process import ranks_of_a_group
from paths import SCRIPTS
from tolerances import SAME_COMPUTATION, assert_same
from transformers import AutoModelForCausalLM

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM, last_complete_checkpoint
from modeling_deepseekmoe.conversion import verify

SCRIPT = SCRIPTS / "sharded_training.py"
# What every dialect and attention type has, with what is balanced by a bias and what by losses.
MODELS: dict[str, dict[str, Any]] = {
    "v3": {**TINY, **V3_LIKE, "sequence_balance_alpha": 0.01, "q_lora_rank": 12},
    "v1": {**TINY, "first_k_dense_replace": 1, "router_z_loss_alpha": 0.001},
    "v2": {
        **TINY, **V3_LIKE, "scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False,
        "communication_balance_alpha": 0.02, "n_device_groups": 4, "first_k_dense_replace": 0,
    },
}  # fmt: skip
LAYOUTS = {
    "ddp2": (2, {}),
    "ddp4": (4, {}),
    "fsdp2": (2, {"fsdp_size": 2}),
    "fsdp4": (4, {"fsdp_size": 4}),
    "hsdp4": (4, {"fsdp_size": 2, "dp_replicate_size": 2}),
    "tp2": (2, {"tp_size": 2}),
    "ep2": (2, {"tp_size": 2, "ep_size": 2}),
    "fsdp-ep2": (2, {"fsdp_size": 2, "ep_size": 2}),
    "fsdp-ep4": (4, {"fsdp_size": 2, "tp_size": 2, "ep_size": 2}),
    "fsdp4-ep2": (4, {"fsdp_size": 4, "ep_size": 2}),
    "fsdp-tp4": (4, {"fsdp_size": 2, "tp_size": 2}),
}
CASES = [("v3", what, layout) for what in ("full", "lora") for layout in LAYOUTS]
CASES += [("v3", "esft", layout) for layout in ("ddp2", "fsdp2", "hsdp4")]
CASES += [(name, "full", layout) for name in ("v1", "v2") for layout in ("ddp2", "fsdp2", "tp2", "ep2", "fsdp-ep4")]
CASES += [("v1", "lora", layout) for layout in ("tp2", "fsdp-ep4")]

Start = Callable[..., dict[str, torch.Tensor]]


def start(ranks: int, settings: dict[str, Any], **kwargs: Any) -> subprocess.CompletedProcess:
    """Run the script alone or under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(SCRIPT), json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False, **kwargs)


def train(ranks: int, sharding: dict[str, int], output: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """What a run that ends well has saved."""
    result = start(ranks, {"output": str(output), "sharding": sharding, **settings})
    assert result.returncode == 0, result.stderr[-4000:]
    return torch.load(f"{output}.pt")


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Writes one of `MODELS` once."""

    @cache
    def write(name: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        DeepseekMoeForCausalLM(DeepseekMoeConfig(**MODELS[name])).save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture(scope="module")
def alone(checkpoint_of: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """What one process finds, once for each model and method."""

    @cache
    def run(name: str, what: str) -> dict[str, torch.Tensor]:
        output = tmp_path_factory.mktemp("alone") / f"{name}-{what}"
        return train(1, {}, output, checkpoint=checkpoint_of(name), what=what)

    return run


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """That the log is the same, and so are the counts and biases of the steps that this run made itself."""
    for name in ("loss", "aux_loss"):
        torch.testing.assert_close(found[name], wanted[name], atol=SAME_COMPUTATION, rtol=0)
    assert_same(found["grad_norm"], wanted["grad_norm"])
    assert torch.equal(found["router/max_violation_batch"], wanted["router/max_violation_batch"])
    for name in ("counts", "biases"):
        assert torch.equal(found[name], wanted[name][-len(found[name]) :]), name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "what", "layout"), CASES, ids=["-".join(case) for case in CASES])
def test_ranks_equal_one_process(
    name: str, what: str, layout: str, checkpoint_of: Callable[[str], str], alone: Start, tmp_path: Path
) -> None:
    ranks, sharding = LAYOUTS[layout]
    found = train(ranks, sharding, tmp_path / "out", checkpoint=checkpoint_of(name), what=what)
    wanted = alone(name, what)
    assert len(found["counts"]) == 5 and wanted["counts"].sum(-1).unique().tolist() == [8 * 12 * 3]
    assert name != "v3" or wanted["biases"][-1].abs().max() > 0 or what != "full"
    assert_equal(found, wanted)


@pytest.mark.slow
def test_devices_of_the_losses_are_the_expert_parallel_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    fields = {**TINY, "device_balance_alpha": 0.05, "communication_balance_alpha": 0.02}
    torch.manual_seed(0)
    DeepseekMoeForCausalLM(DeepseekMoeConfig(**fields, n_device_groups=2)).save_pretrained(folder)
    wanted = train(1, {}, tmp_path / "one", checkpoint=str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_device_groups": None}))
    found = train(2, {"fsdp_size": 2, "ep_size": 2}, tmp_path / "two", checkpoint=str(folder))
    assert_equal(found, wanted)
    result = start(1, {"output": str(tmp_path / "x"), "sharding": {}, "checkpoint": str(folder)})
    assert result.returncode == 1 and "device_balance_alpha=0.05 is not allowed" in result.stderr


# ---------------------------------------------------------------------------------------------------- saving, resuming
RESUMED = {
    "full": ["fsdp4", "fsdp-ep2", "fsdp-tp4", "ddp2", "one"],
    "lora": ["fsdp-ep4", "ddp2", "one"],
    "esft": ["fsdp4", "one"],
}


@pytest.mark.slow
@pytest.mark.parametrize("what", RESUMED)
def test_what_two_ranks_save_resumes_on_others(
    what: str, checkpoint_of: Callable[[str], str], alone: Start, tmp_path: Path
) -> None:
    checkpoint, saved = checkpoint_of("v3"), tmp_path / "saved"
    assert_equal(train(2, {"fsdp_size": 2}, saved, checkpoint=checkpoint, what=what, save=3), alone("v3", what))
    for layout in RESUMED[what]:
        ranks, sharding = LAYOUTS.get(layout, (1, {}))
        output = tmp_path / layout
        shutil.copytree(saved / "checkpoint-3", output / "checkpoint-3")
        found = train(ranks, sharding, output, checkpoint=checkpoint, what=what, save=3, resume=True)
        assert len(found["counts"]) == 2
        assert_equal(found, alone("v3", what))
        if what == "lora":
            continue
        verify(output / "checkpoint-3")
        verify(output / "final")
        # What the interrupted run and the resumed one end with, read by one process.
        ends = [AutoModelForCausalLM.from_pretrained(folder / "final").state_dict() for folder in (saved, output)]
        for name, tensor in ends[0].items():
            assert_same(ends[1][name], tensor, name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "ep2", "fsdp-ep4"])
def test_one_process_resumes_what_other_layouts_save(
    layout: str, checkpoint_of: Callable[[str], str], alone: Start, tmp_path: Path
) -> None:
    ranks, sharding = LAYOUTS[layout]
    checkpoint = checkpoint_of("v3")
    train(ranks, sharding, tmp_path / "saved", checkpoint=checkpoint, save=3)
    shutil.copytree(tmp_path / "saved" / "checkpoint-3", tmp_path / "one" / "checkpoint-3")
    found = train(1, {}, tmp_path / "one", checkpoint=checkpoint, save=3, resume=True)
    assert_equal(found, alone("v3", "full"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "fsdp-ep2"])
def test_sharded_and_gathered_files_are_the_same(
    layout: str, checkpoint_of: Callable[[str], str], tmp_path: Path
) -> None:
    ranks, sharding = LAYOUTS[layout]
    for what in ("full", "gathered"):
        train(ranks, sharding, tmp_path / what, checkpoint=checkpoint_of("v3"), what=what, save=5)
    result = verify(tmp_path / "full" / "final", tmp_path / "gathered" / "final")
    assert set(result.compared) == {"identical"} and result.compared["identical"] > 80


# ------------------------------------------------------------------------------------------------ ranks that end early
def start_apart(settings: dict[str, Any], ranks: int = 2) -> list[subprocess.Popen]:
    """Ranks without a launcher, which would end the others itself."""
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps(settings)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for variables in ranks_of_a_group(ranks)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "hang", "kill-writing", "kill-saving"])
def test_others_end_when_a_rank_does_and_the_last_complete_checkpoint_resumes(
    how: str, checkpoint_of: Callable[[str], str], alone: Start, tmp_path: Path
) -> None:
    output, timeout = tmp_path / "out", 10
    settings = {"checkpoint": checkpoint_of("v3"), "output": str(output), "sharding": {"fsdp_size": 2}, "save": 2}
    processes = start_apart({**settings, "hurt": [1, 3, how], "timeout": timeout})
    try:
        message = processes[0].communicate(timeout=180)[1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 1
    assert "Rank 0 of 2 stopped after step" in message and f"(ddp_timeout={timeout} s)" in message
    last = str(output / "checkpoint-2")
    assert last_complete_checkpoint(output) == last and f"the last complete checkpoint is {last}" in message
    assert (output / "checkpoint-4").exists() == (how in ("kill-writing", "kill-saving"))
    assert (output / "checkpoint-4" / "optimizer").exists() == (how == "kill-saving")
    found = train(2, {"fsdp_size": 2}, output, checkpoint=settings["checkpoint"], save=2, resume=True)
    assert len(found["counts"]) == 3
    assert_equal(found, alone("v3", "full"))


@pytest.mark.slow
def test_the_launcher_names_a_killed_rank(checkpoint_of: Callable[[str], str], tmp_path: Path) -> None:
    settings = {"checkpoint": checkpoint_of("v3"), "sharding": {"fsdp_size": 2}, "hurt": [1, 1, "kill"]}
    result = start(2, {**settings, "output": str(tmp_path / "out")})
    assert result.returncode == 1
    assert "Signal 9 (SIGKILL)" in result.stderr and "local_rank: 1" in result.stderr
