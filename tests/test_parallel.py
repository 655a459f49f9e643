"""The parallel plans, with two processes on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Golden
from tolerances import SAME_COMPUTATION

SCRIPT = Path(__file__).parent / "scripts" / "parallel_logits.py"


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp", "ep", "fsdp-ep"])
@pytest.mark.parametrize("name", ["v1-mha", "v2-lite", "v3-noaux"])
def test_two_processes_equal_one(name: str, plan: str, tmp_path: Path) -> None:
    golden, output = Golden(name), tmp_path / "output.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    result = subprocess.run(
        [*command, str(golden.folder), str(output), plan], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    model, found = golden.model(), torch.load(output)
    input_ids = torch.arange(24).view(2, 12) * 3
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(input_ids).logits, atol=SAME_COMPUTATION, rtol=1e-4)
    generated = model.generate(
        input_ids[:1], attention_mask=torch.ones(1, 12, dtype=torch.long), max_new_tokens=6, do_sample=False,
        pad_token_id=0)  # fmt: skip
    assert torch.equal(found["generated"], generated)
