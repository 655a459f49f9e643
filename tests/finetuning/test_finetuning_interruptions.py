"""Runs that are killed and called again end with the same weights, bit for bit."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runner import run
from finetuning_cases import assert_same_bits, chats, checkpoint, native_checkpoint, write_rows

from modeling_deepseekmoe import experts
from modeling_deepseekmoe.finetuning import results
from modeling_deepseekmoe.finetuning import run as runs
from modeling_deepseekmoe.finetuning.progress import ProgressLines

# As in a process of a user's, which is compared with this one.
pytestmark = pytest.mark.parametrize("size_of_experts", [experts.LOOP_FROM], indirect=True, ids=[""])
# Two passes and a half over 22 rows in batches of 4, with dropout and evaluations, which draw random numbers too.
COMMON = ("--learning-rate", 0.003, "--epochs", 2.5, "--eval-steps", 4)
METHODS = {
    "lora": ("--dropout", 0.2, "--rank", 2, "--train-router", "--balance-rate", 0.01),
    "qlora": ("--dropout", 0.2, "--rank", 2, "--format", "fp8"),
    "esft": ("--p", 0.3),
    "full": ("--balance-rate", 0.01, "--accumulation", 2),
    "lora, packed": ("--packing", "--max-length", 160, "--dropout", 0.2),
    "full, of another family": (),
    "qlora, corrected": ("--rank", 2, "--format", "fp8", "--correction-rank", 4),
}
TRAINED = {"lora": "adapter", "qlora": "adapter", "esft": "experts", "full": "model"}
WITHOUT_PAGES = (
    "import modeling_deepseekmoe.finetuning.run as run, modeling_deepseekmoe.finetuning.results as results\n"
    "run.has_plots = results.has_plots = lambda: False\n"
    "from modeling_deepseekmoe.cli.app import main\n"
    "main()\n"
)


class Killed(BaseException):
    """What no code catches, as a kill."""


class Place:
    """A folder with a model, 24 chats, and runs that nobody has interrupted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        checkpoint(folder / "model", biased=True)
        native_checkpoint(folder / "native")
        write_rows(folder / "chat.jsonl", chats(24))

    def command(self, case: str, output: Path, *options: object) -> tuple[object, ...]:
        own = ("--method", case.partition(",")[0], "--output", output, *METHODS[case], *COMMON)
        model = self.folder / ("native" if "another" in case else "model")
        return ("finetune", model, "--data", self.folder / "chat.jsonl", *own, *options)

    def whole(self, case: str) -> Path:
        """The folder of a run from beginning to end."""
        output = self.folder / f"whole-{case.replace(', ', '-').replace(' ', '-')}"
        if not output.exists():
            code, said = run(*self.command(case, output, "--save-steps", 1000))
            assert code == 0, said
        return output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("interrupted"))


@pytest.fixture(autouse=True)
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (results, runs):
        monkeypatch.setattr(module, "has_plots", lambda: False)


def kill_when(patched: pytest.MonkeyPatch, owner: object, name: str, after: int) -> None:
    """Let the process end, as it were, when something is called for so many times."""
    calls = iter(range(1, after + 1))
    original = getattr(owner, name)

    def killed(*args: object, **kwargs: object) -> object:
        if next(calls, after) == after:
            raise Killed
        return original(*args, **kwargs)

    patched.setattr(owner, name, killed)


def run_and_kill(command: tuple[object, ...], owner: object, name: str, after: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        kill_when(patched, owner, name, after)
        with pytest.raises(Killed):
            run(*command)


@pytest.mark.parametrize("case", METHODS)
def test_a_run_that_goes_on_ends_with_the_same_weights(place: Place, case: str, tmp_path: Path) -> None:
    output, whole = tmp_path / "out", place.whole(case)
    run_and_kill(place.command(case, output, "--save-steps", 1), ProgressLines, "on_save", after=4)
    checkpoints = sorted(output.glob("checkpoints/checkpoint-*"))
    assert not (output / "result.json").exists() and len(checkpoints) == 2
    begins = 4
    if case == "lora":  # what was written only in part is not used, and goes
        (checkpoints[-1] / "trainer_state.json").write_text('{"global_st')
        (checkpoints[-1] / "adapter_model.safetensors").write_bytes(b"")
        (output / ".before-x1y2").mkdir()
        (output / ".finetune.yaml.unfinished").write_text("")
        begins = 3
    code, said = run(*place.command(case, output, "--save-steps", 1000))
    assert code == 0 and f"going on after step {begins}" in said, said
    trained = TRAINED[case.partition(",")[0]]
    assert_same_bits(output / trained, whole / trained)
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (whole, output))
    assert first["steps"] == second["steps"] > 4
    assert first["before"] == second["before"] and first["after"] == second["after"]
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("write_measures", 1),  # nothing measured yet
        ("set_seed", 1),  # measured, and not begun
        ("save_trained", 1),  # trained
        ("write_measures", 2),  # the adapter saved, and not measured
        ("read_measures", 1),  # everything written but the result
    ],
    ids=["not measured", "before training", "trained", "not measured after", "no result"],
)
def test_a_kill_at_any_other_moment(place: Place, name: str, after: int, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = place.command("lora", output, "--save-steps", 1000)
    run_and_kill(command, runs, name, after)
    code, said = run(*command)
    assert code == 0, said
    assert_same_bits(output / "adapter", place.whole("lora") / "adapter")
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter", "after", "before", "finetune.yaml", "result.json", "run.json"
    ]  # fmt: skip


def test_another_run_does_not_go_on(place: Place, tmp_path: Path) -> None:
    output, data = tmp_path / "out", tmp_path / "chat.jsonl"
    shutil.copy(place.folder / "chat.jsonl", data)
    command = (*place.command("lora", output, "--save-steps", 1), "--data", data)
    run_and_kill(command, ProgressLines, "on_save", after=2)
    for options, message in (
        (("--rank", 4), f"rank=4 is not allowed: the run in {output} has 2"),
        (("--batch-size", 2), f"batch_size=2 is not allowed: the run in {output} has 4"),
        (("--max-length", 100), f"max_length=100 is not allowed: the run in {output} has 160"),
        (("--seed", 1), f"seed=1 is not allowed: the run in {output} has 0"),
    ):
        code, said = run(*command, *options)
        assert code == 2 and message in said, said
    write_rows(data, chats(23))
    code, said = run(*command)
    assert code == 2 and f"data: the rows are not those that the run in {output} began with" in said
    write_rows(data, chats(24))
    began = json.loads((output / "run.json").read_text())
    began["environment"]["torch"] = "1.0"
    (output / "run.json").write_text(json.dumps(began))
    code, said = run(*command, "--logging-steps", 1, "--save-steps", 3)  # which have no part in the weights
    assert code == 0 and "so that the last bits may differ: torch was 1.0, and is" in said


@pytest.mark.slow
def test_a_process_that_is_killed(place: Place, tmp_path: Path) -> None:
    """The real thing: another process, and SIGKILL after its first checkpoint."""
    output = tmp_path / "out"
    command = place.command("lora", output, "--save-steps", 1)
    words = [sys.executable, "-c", WITHOUT_PAGES, *map(str, command)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 240
        while not list(output.glob("checkpoints/checkpoint-*/trainer_state.json")):
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL and not (output / "adapter").exists()
    code, said = run(*command)
    assert code == 0 and "going on after step" in said, said
    assert_same_bits(output / "adapter", place.whole("lora") / "adapter")
