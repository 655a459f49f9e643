"""Uploads that are interrupted, refused, or overtaken: what the repository shows, and what the next call does."""

import json
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from cli_runner import run
from local_hub import WRITER, HubServer
from paths import TESTS
from publishing_cases import CODE, MIT, commit, push

import modeling_deepseekmoe
from modeling_deepseekmoe.hub.plan import plan_push
from modeling_deepseekmoe.hub.push import push_model, upload
from modeling_deepseekmoe.hub.repository import UploadError


def complete(hub: HubServer, folder: Path) -> None:
    """That a branch holds all of a folder."""
    files = hub.files("alice/model")
    index = json.loads(files["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) | {"config.json", "README.md", *CODE} <= files.keys()
    for file in folder.glob("*.safetensors*"):
        assert files[file.name] == file.read_bytes()


@pytest.mark.parametrize("kind", ["reset", "429", "503", "lose answer"])
def test_every_request_may_fail_and_the_next_call_completes(kind: str, hub: HubServer, folder: Path) -> None:
    """From the first, the second, ... request on that changes anything, the server fails every time."""

    def attempt(first: int) -> tuple[bool, int]:
        """A call with a server that fails from the n-th writing request on: whether it failed, how many there were."""
        seen = []

        def take(method: str, path: str) -> dict | None:
            seen.append(f"{method} {path}")
            if len(seen) <= first:
                return None
            if kind.isdigit():
                return {"kind": "status", "status": int(kind)}
            return {"kind": kind, "after": 1000}

        hub.take_fault = take
        try:
            upload(plan)
        except UploadError as error:
            assert "interrupted" in str(error) and WRITER not in str(error)
            return True, len(seen)
        finally:
            del hub.take_fault
        return False, len(seen)

    plan = plan_push(folder, "alice/model", facts=MIT)
    failures, number = 0, 0
    while True:
        shutil.rmtree(hub.storage.folder / "repos", ignore_errors=True)
        shutil.rmtree(hub.storage.folder / "lfs")
        (hub.storage.folder / "lfs").mkdir()
        failed, _ = attempt(number)
        if not failed:
            break
        failures += 1
        made = (hub.storage.folder / "repos" / "alice" / "model.json").exists()
        titles = [commit["title"] for commit in hub.history("alice/model")] if made else ["initial commit"]
        if titles != ["initial commit"]:
            assert kind == "lose answer" and titles == ["Upload model", "initial commit"]
            complete(hub, folder)
        push(folder, "alice/model")
        complete(hub, folder)
        assert [commit["title"] for commit in hub.history("alice/model")] == ["Upload model", "initial commit"]
        number += 1
    complete(hub, folder)
    assert failures >= 8


@pytest.mark.parametrize("how", [{"kind": "reset", "after": 50_000}, {"kind": "status", "status": 503}])
def test_a_short_interruption_is_repeated_by_itself(how: dict, hub: HubServer, folder: Path) -> None:
    hub.fail("PUT", "/storage/", times=2, **how)
    hub.fail("POST", "/preupload/", times=1, kind="status", status=429)
    push(folder, "alice/model")
    complete(hub, folder)


def test_a_server_that_is_killed_in_the_middle_of_a_file(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    def serve(port: int, faults: list[dict]) -> tuple[subprocess.Popen, str]:
        script = TESTS / "helpers" / "local_hub.py"
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "other"), str(port)],
            stdout=subprocess.PIPE, text=True, env={"HUB_FAULTS": json.dumps(faults)},
        )  # fmt: skip
        return process, process.stdout.readline().strip()

    process, url = serve(0, [{"method": "PUT", "pattern": "/storage/", "kind": "kill", "after": 40_000}])
    other = HubServer(tmp_path / "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", url)
        with pytest.raises(UploadError, match=r"interrupted: .*Err"):
            upload(plan_push(folder, "alice/model", facts=MIT))
        assert process.wait() == -9
        assert [commit["title"] for commit in other.history("alice/model")] == ["initial commit"]
        process, url = serve(int(url.rpartition(":")[2]), [])
        try:
            upload(plan_push(folder, "alice/model", facts=MIT))
        finally:
            process.kill()
            process.wait()
    complete(other, folder)
    other.server_close()


def test_what_arrived_is_not_sent_again(hub: HubServer, folder: Path) -> None:
    shards = len(list(folder.glob("*.safetensors")))
    hub.fail("POST", "/commit/", "status", times=9, status=503)
    with pytest.raises(UploadError, match="the Hub answered 503"):
        push(folder, "alice/model")
    hub.faults.clear()
    sent = sum(line.startswith("PUT") for line in hub.requests)
    assert sent >= shards > 1
    push(folder, "alice/model")
    assert sum(line.startswith("PUT") for line in hub.requests) == sent
    complete(hub, folder)


def test_nothing_is_ignored_without_a_word(hub: HubServer, folder: Path) -> None:
    commit(hub, "alice/model", {".gitignore": "*.safetensors\n"})
    push(folder, "alice/model")
    complete(hub, folder)


def test_errors_that_no_repetition_mends(hub: HubServer, folder: Path) -> None:
    hub.fail("POST", "/preupload/", "status", times=99, status=402)
    with pytest.raises(
        OSError, match=r"refuses what was asked of alice/model \(402\). It says: The server is busy"
    ) as info:
        push(folder, "alice/model")
    assert not isinstance(info.value, UploadError)
    with pytest.raises(ValueError, match="no such branch"):
        plan_push(folder, "alice/model", facts=MIT, revision="refs/pr/7")
    with pytest.raises(ValueError, match="must be a branch, not a commit"):
        plan_push(folder, "alice/model", facts=MIT, revision="a" * 40)


def test_a_hub_that_cannot_be_reached(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    code, output = run("push", folder, "alice/model", "--license", "mit")
    assert code == 2 and "ConnectError" in output and "Traceback" not in output
    code, output = run("push", folder, "model", "--license", "mit")
    assert code == 2 and "ConnectError" in output


@pytest.mark.parametrize("token", [f"{WRITER} {WRITER}", f"{WRITER}\u00fc", f"{WRITER}\nx"])
def test_tokens_that_cannot_be_sent_are_not_shown(token: str, hub: HubServer, folder: Path) -> None:
    for call in (plan_push, push_model):
        source = folder if call is plan_push else modeling_deepseekmoe.DeepseekForCausalLM.from_pretrained(folder)
        with pytest.raises(ValueError, match="token is not allowed") as info:
            call(source, "alice/model", token=token)
        assert WRITER not in "".join(traceback.format_exception(info.value))
    push(folder, "alice/model", token=f"{WRITER}\n")


def test_a_plan_without_the_hub_is_not_carried_out(hub: HubServer, folder: Path) -> None:
    plan = plan_push(folder, "alice/model", facts=MIT, ask_hub=False)
    with pytest.raises(ValueError, match="without asking the Hub"):
        upload(plan)
    plan = plan_push(folder, "alice/model", facts=MIT)
    commit(hub, "alice/model", {"theirs.txt": "x"})
    with pytest.raises(UploadError, match="has come into being meanwhile"):
        upload(plan)
    assert "config.json" not in hub.files("alice/model")


def test_somebody_else_was_faster(hub: HubServer, folder: Path) -> None:
    push(folder, "alice/model")
    (folder / "LICENSE").write_text("mine")
    plan = plan_push(folder, "alice/model", facts=MIT)
    commit(hub, "alice/model", {"LICENSE": "theirs"})
    with pytest.raises(UploadError, match="somebody has changed the branch"):
        upload(plan)
    assert hub.files("alice/model")["LICENSE"] == b"theirs"
