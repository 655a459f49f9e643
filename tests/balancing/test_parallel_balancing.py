"""Two processes make the same counts and the same biases as one, bit for bit."""

from pathlib import Path

import fresh_process
import pytest
import torch
from paths import SCRIPTS

SCRIPT = SCRIPTS / "balanced_training.py"


def run(how: str, output: Path, ranks: int, *options: str) -> dict[str, torch.Tensor]:
    fresh_process.check(SCRIPT, how, output, *options, ranks=ranks, cwd=output.parent)
    return torch.load(output)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    found = run("plain", tmp_path_factory.mktemp("alone") / "output.pt", 1)
    assert found["counts"].shape == found["biases"].shape == (5, 2, 8)
    assert found["counts"].sum(-1).unique().tolist() == [8 * 12 * 3]
    assert found["biases"][-1].abs().max() > 0.02
    return found


@pytest.mark.parametrize("how", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_two_processes_equal_one(how: str, alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    found = run(how, tmp_path / "output.pt", 2)
    assert torch.equal(found["counts"], alone["counts"])
    assert torch.equal(found["biases"], alone["biases"])


def test_ranks_with_different_numbers_of_tokens(tmp_path: Path) -> None:
    one, two = run("plain", tmp_path / "one.pt", 1, "ragged"), run("ddp", tmp_path / "two.pt", 2, "ragged")
    assert len(one["counts"].sum(-1).unique()) > 1
    assert torch.equal(one["counts"], two["counts"]) and torch.equal(one["biases"], two["biases"])


@pytest.mark.slow
def test_trainer_in_two_processes(tmp_path: Path) -> None:
    one, two = run("trainer", tmp_path / "one.pt", 1), run("trainer", tmp_path / "two.pt", 2)
    assert torch.equal(one["biases"], two["biases"]) and one["biases"].abs().max() > 0.02
    assert one["violations"] == two["violations"]
