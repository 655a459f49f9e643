"""The parallel plans, with two processes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Golden
from paths import SCRIPTS
from tolerances import assert_same

SCRIPT = SCRIPTS / "parallel_logits.py"
GENERATION = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
PLANS = {
    "tp": {"tp_size": 2, "tp_plan": "auto"},
    "ep": {"tp_size": 2, "ep_size": 2},
    "fsdp-ep": {"fsdp_size": 2, "ep_size": 2},
    "pp": {"pp_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("loop_from", [0, 2**18], ids=["large", "small"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["v1-mha", "v2-lite", "v3-noaux"])
def test_two_processes_equal_one(name: str, plan: str, loop_from: int, tmp_path: Path) -> None:
    golden, output = Golden(name), tmp_path / "output.pt"
    model = golden.model()
    if "ep_size" in PLANS[plan] and model.config.base_model_ep_plan is None:
        pytest.skip("this transformers has no expert parallelism that works without help from the gate")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    command += [str(golden.folder), str(output), json.dumps(PLANS[plan]), json.dumps(GENERATION), str(loop_from)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = torch.load(output)
    input_ids = torch.arange(24).view(2, 12) * 3
    with torch.no_grad():
        assert_same(found["logits"], model(input_ids).logits)
    generated = model.generate(input_ids[:1], attention_mask=torch.ones_like(input_ids[:1]), **GENERATION)
    assert torch.equal(found["generated"], generated)
    if plan == "pp":
        assert 0 < found["layers"] < model.config.num_hidden_layers
        return
    whole = tuple(model.model.layers[-1].mlp.experts.gate_up_proj.shape)
    halved = (whole[0], whole[1] // 2, whole[2]) if plan == "tp" else (whole[0] // 2, *whole[1:])
    assert found["shard"] == halved
    if plan == "ep":
        model(input_ids, labels=input_ids).loss.backward()
        gradient = model.model.layers[-1].mlp.experts.gate_up_proj.grad
        assert_same(found["gradient"], gradient[: len(found["gradient"])])
