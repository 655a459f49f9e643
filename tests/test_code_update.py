"""`deepseekmoe push --code-only`: what is refused, and what an update of the code leaves alone."""

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from local_hub import HubServer
from test_cli import run

from modeling_deepseekmoe import hub as publishing
from modeling_deepseekmoe.code_update import plan_code_update, version_of
from modeling_deepseekmoe.model_card import CardFacts
from modeling_deepseekmoe.remote_code import CODE_VERSION, code_files

GOLDEN = Path(__file__).parent / "data" / "golden"


def publish(name: str = "v1-mha", **options: object) -> None:
    publishing.upload(publishing.plan_push(GOLDEN / name, "alice/model", facts=CardFacts(license="mit"), **options))


def change(path: str, content: bytes | None) -> None:
    """What somebody does to a file of the repository with another tool."""
    api = HfApi()
    if content is None:
        api.delete_file(path, "alice/model")
    else:
        api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="alice/model")


def older(version: str) -> bytes:
    return code_files()["remote_code.py"].read_bytes().replace(CODE_VERSION.encode(), version.encode())


def test_only_what_differs_is_uploaded_and_what_has_gone_is_removed(hub: HubServer) -> None:
    publish()
    change("remote_code.py", older("0.9.7"))
    change("gone.py", b"x = 1\n")
    routing = code_files()["routing.py"].read_bytes()
    change("routing.py", routing + b"from .gone import x\n")
    change("mine.py", b"# a file of somebody else\n")
    before = hub.files("alice/model")
    plan = plan_code_update("alice/model")
    assert set(plan.files) == {"remote_code.py", "routing.py"} and plan.deleted == ("gone.py",)
    assert plan.notes == (f"replaces the code of 0.9.7 by that of {CODE_VERSION}", "the weights stay as they are")
    publishing.upload(plan)
    after = hub.files("alice/model")
    assert before.keys() - after.keys() == {"gone.py"} and after["routing.py"] == routing
    assert all(after[name] == before[name] for name in after if name not in plan.files)
    assert plan_code_update("alice/model").is_empty


def test_the_code_of_checkpoints_in_folders(hub: HubServer) -> None:
    publish()
    for name, path in code_files().items():
        change(f"last-checkpoint/{name}", older("0.9.7") if name == "remote_code.py" else path.read_bytes())
    plan = plan_code_update("alice/model")
    assert set(plan.files) == {"last-checkpoint/remote_code.py"}
    assert f"replaces the code of 0.9.7 in last-checkpoint/ by that of {CODE_VERSION}" in plan.notes


def test_a_config_that_does_not_name_the_code_names_it(hub: HubServer) -> None:
    publish()
    config = json.loads(hub.files("alice/model")["config.json"])
    wanted = config.pop("auto_map")
    change("config.json", json.dumps(config).encode())
    publishing.upload(plan_code_update("alice/model"))
    assert json.loads(hub.files("alice/model")["config.json"]) == config | {"auto_map": wanted}


@pytest.mark.parametrize("name", ["v1-mha", "v3-noaux"])
def test_repositories_without_the_code_are_refused(name: str, hub: HubServer) -> None:
    with pytest.raises(ValueError, match=r"holds no code of this family \(it does not exist"):
        plan_code_update("alice/model")
    publish(name, code="never")
    with pytest.raises(ValueError, match=r"remote_code.py is not there\)\. Push the checkpoint itself"):
        plan_code_update("alice/model")


def test_code_that_somebody_changed_is_replaced_on_demand_alone(hub: HubServer) -> None:
    publish()
    change("remote_code.py", code_files()["remote_code.py"].read_bytes().replace(b"CODE_VERSION =", b"VERSION ="))
    with pytest.raises(ValueError, match=r"a version before 0\.8\.0, or somebody has changed them"):
        plan_code_update("alice/model")
    plan = plan_code_update("alice/model", replace_content=True)
    assert plan.notes[0] == f"replaces the code of a version that it does not name by that of {CODE_VERSION}"
    change("modeling_deepseekmoe.py", None)
    with pytest.raises(ValueError, match=r"modeling_deepseekmoe.py is missing there"):
        plan_code_update("alice/model", replace_content=True)


def test_a_config_that_this_version_does_not_read_is_refused(hub: HubServer) -> None:
    publish()
    config = json.loads(hub.files("alice/model")["config.json"])
    change("config.json", json.dumps(config | {"topk_method": "unheard_of"}).encode())
    with pytest.raises(ValueError, match="topk_method='unheard_of' is not allowed"):
        plan_code_update("alice/model")


def test_versions() -> None:
    assert version_of({name: path.read_bytes() for name, path in code_files().items()}) == CODE_VERSION
    assert version_of({}) is None


def test_command_line(hub: HubServer) -> None:
    publish()
    change("remote_code.py", older("0.9.7"))
    code, output = run("push", "--code-only", "alice/model", "--license", "mit", "--private")
    assert code == 2 and "license, private: not allowed with --code-only" in output
    code, output = run("push", "--code-only", "alice/model", "alice/other")
    assert code == 2 and "repo_id: not allowed with --code-only" in output
    code, output = run("push", "alice/model")
    assert code == 2 and "REPO_ID is missing: deepseekmoe push FOLDER user/name" in output
    code, output = run("push", "--code-only", "alice/model", "--dry-run", "--json")
    assert code == 0 and list(json.loads(output)["files"]) == ["remote_code.py"]
    assert run("push", "--code-only", "alice/model", "--message", "New code")[0] == 0
    assert hub.history("alice/model")[0]["title"] == "New code"
    code, output = run("push", "--code-only", "alice/model")
    assert code == 0 and f"the code is that of {CODE_VERSION} already" in output
    assert hub.history("alice/model")[0]["title"] == "New code"
