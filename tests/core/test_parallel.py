"""The parallel plans, with two processes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Golden
from mtp_cases import golden_with_mtp
from paths import SCRIPTS
from tolerances import assert_same
from torch import nn
from transformers import AutoModelForCausalLM

SCRIPT = SCRIPTS / "parallel_logits.py"
INPUT_IDS = torch.arange(24).view(2, 12) * 3
GENERATION = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
PLANS = {
    "tp": {"tp_size": 2, "tp_plan": "auto"},
    "ep": {"tp_size": 2, "ep_size": 2},
    "fsdp-ep": {"fsdp_size": 2, "ep_size": 2},
    "pp": {"pp_size": 2},
}


def require(plan: str, model: nn.Module) -> None:
    if "ep_size" in PLANS[plan] and model.config.base_model_ep_plan is None:
        pytest.skip("this transformers has no expert parallelism that works without help from the gate")


def check_shard(found: dict, model: nn.Module, plan: str, loss: torch.Tensor) -> None:
    """What a rank holds of the last layer's experts, and their gradient of a loss."""
    stack = model.model.layers[-1].mlp.experts.gate_up_proj
    experts, rows, columns = stack.shape
    assert found["shard"] == ((experts, rows // 2, columns) if plan == "tp" else (experts // 2, rows, columns))
    if plan == "ep":
        loss.backward()
        assert stack.grad.abs().max() > 0
        assert_same(found["gradient"], stack.grad[: len(found["gradient"])])


def spread(plan: str, folder: Path, output: Path, generation: dict, loop_from: int, **fields: object) -> dict:
    """What two processes compute."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    command += [str(folder), str(output), json.dumps(PLANS[plan]), json.dumps(generation), str(loop_from)]
    command += [json.dumps(fields)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(output)


@pytest.mark.slow
@pytest.mark.parametrize("loop_from", [0, 2**18], ids=["large", "small"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["v1-mha", "v2-lite", "v3-noaux"])
def test_two_processes_equal_one(name: str, plan: str, loop_from: int, tmp_path: Path) -> None:
    golden = Golden(name)
    model = golden.model()
    require(plan, model)
    found = spread(plan, golden.folder, tmp_path / "output.pt", GENERATION, loop_from)
    with torch.no_grad():
        assert_same(found["logits"], model(INPUT_IDS).logits)
    generated = model.generate(INPUT_IDS[:1], attention_mask=torch.ones_like(INPUT_IDS[:1]), **GENERATION)
    assert torch.equal(found["generated"], generated)
    if plan == "pp":
        assert 0 < found["layers"] < model.config.num_hidden_layers
        return
    check_shard(found, model, plan, model(INPUT_IDS, labels=INPUT_IDS).loss)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp", "ep", "fsdp-ep"])
def test_multi_token_prediction_of_two_processes_equals_one(v3: Golden, plan: str, tmp_path: Path) -> None:
    folder = golden_with_mtp(v3, tmp_path / "mtp", 1)
    model = AutoModelForCausalLM.from_pretrained(folder, mtp=True).eval()
    require(plan, model)
    # Ranks that share weights must make the same steps: there `use_mtp` is refused.
    generation = GENERATION | {"use_mtp": plan != "fsdp-ep"}
    found = spread(plan, folder, tmp_path / "output.pt", generation, 0, mtp=True)
    mtp_loss = model(INPUT_IDS, labels=INPUT_IDS).mtp_loss
    assert_same(found["mtp_loss"], mtp_loss)
    generated = model.generate(INPUT_IDS[:1], attention_mask=torch.ones_like(INPUT_IDS[:1]), **GENERATION)
    assert torch.equal(found["generated"], generated)
    check_shard(found, model, plan, mtp_loss.sum())
