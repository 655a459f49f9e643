"""Multi-token prediction where several processes train: losses, gradients and counts as one process finds them."""

from pathlib import Path
from typing import Any

import fresh_process
import pytest
import torch
from mtp_models import batch_of, model_of
from paths import SCRIPTS
from tolerances import assert_same

from modeling_deepseekmoe import take_router_load

CASES = ("ddp", "ddp:checkpointing", "fsdp2", "fsdp2:checkpointing", "fsdp2:groups", "fsdp2:groups:detach")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two processes find, all cases in one start."""
    folder = tmp_path_factory.mktemp("ranks")
    fresh_process.check(SCRIPTS / "mtp_of_ranks.py", Path(folder) / "found.pt", *CASES, ranks=2, cwd=folder)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_find_what_one_finds(case: str, found: dict[str, dict[str, Any]]) -> None:
    model, batches = model_of(detach="detach" in case), [batch_of(rank) for rank in range(2)]
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    loss = model(**whole).loss
    loss.backward()
    assert abs(found[case]["loss"] - loss.item()) <= 1e-5 * loss.item()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found[case]["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_same(found[case]["gradients"][name], gradient, name)
    assert torch.equal(found[case]["counts"], take_router_load(model).tokens_per_expert)
    for name, value in model.model.mtp_statistics.take().items():
        assert found[case]["logged"][name] == pytest.approx(value, rel=1e-5)
