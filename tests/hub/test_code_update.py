"""`deepseekmoe push --code-only`: what is refused, and what an update of the code leaves alone."""

import json
import re

import pytest
from cli_runner import run
from huggingface_hub import HfApi
from local_hub import HubServer
from paths import GOLDEN_ROOT, ROOT

from modeling_deepseekmoe.hub import code_update
from modeling_deepseekmoe.hub import push as publishing
from modeling_deepseekmoe.hub.card import CardFacts
from modeling_deepseekmoe.hub.code_update import plan_code_update, version_of
from modeling_deepseekmoe.remote_code import CODE_VERSION, code_files


def publish(name: str = "v1-mha", **options: object) -> None:
    publishing.upload(
        publishing.plan_push(GOLDEN_ROOT / name, "alice/model", facts=CardFacts(license="mit"), **options)
    )


def change(path: str, content: bytes | None) -> None:
    """What somebody does to a file of the repository with another tool."""
    api = HfApi()
    if content is None:
        api.delete_file(path, "alice/model")
    else:
        api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="alice/model")


def named(version: str) -> bytes:
    """The file that names the version, with another one."""
    return code_files()["remote_code.py"].read_bytes().replace(CODE_VERSION.encode(), version.encode())


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The code of an earlier release, which had one file more."""
    code = {name: path.read_bytes() for name, path in code_files().items()}
    code |= {
        "remote_code.py": named("0.8.7"),
        "gone.py": b"x = 1\n",
        "moe.py": code["moe.py"] + b"from .gone import x\n",
    }
    monkeypatch.setitem(code_update.RELEASED, code_update.digest_of(code), "0.8.7")
    return code


def test_only_what_differs_is_uploaded_and_what_has_gone_is_removed(
    hub: HubServer, released: dict[str, bytes]
) -> None:
    publish()
    for name in ("remote_code.py", "gone.py", "moe.py"):
        change(name, released[name])
    change("mine.py", b"# a file of somebody else\n")
    before = hub.files("alice/model")
    plan = plan_code_update("alice/model")
    assert set(plan.files) == {"remote_code.py", "moe.py"} and plan.deleted == ("gone.py",)
    assert plan.notes == (f"replaces the code of 0.8.7 by that of {CODE_VERSION}", "the weights stay as they are")
    publishing.upload(plan)
    after = hub.files("alice/model")
    assert before.keys() - after.keys() == {"gone.py"} and after["moe.py"] == code_files()["moe.py"].read_bytes()
    assert all(after[name] == before[name] for name in after if name not in plan.files)
    assert plan_code_update("alice/model").is_empty


def test_the_code_of_checkpoints_in_folders(hub: HubServer, released: dict[str, bytes]) -> None:
    publish()
    for name, content in released.items():
        change(f"last-checkpoint/{name}", content)
    plan = plan_code_update("alice/model")
    assert set(plan.files) == {"last-checkpoint/remote_code.py", "last-checkpoint/moe.py"}
    assert plan.deleted == ("last-checkpoint/gone.py",)
    assert f"replaces the code of 0.8.7 in last-checkpoint/ by that of {CODE_VERSION}" in plan.notes


def test_code_in_a_folder_alone_leaves_the_config_beside_the_weights_alone(hub: HubServer) -> None:
    publish(code="never")
    for name, path in code_files().items():
        change(f"last-checkpoint/{name}", path.read_bytes())
    change("scripts/remote_code.py", b"# somebody else's\n")
    assert plan_code_update("alice/model").is_empty


def test_a_copy_that_was_fine_tuned_without_the_package(hub: HubServer) -> None:
    """It carries on what its own class needs, without the other heads."""
    publish()
    change("modeling_classification.py", None)
    plan = plan_code_update("alice/model")
    assert set(plan.files) == {"modeling_classification.py"}
    assert plan.notes[0] == f"replaces the code of {CODE_VERSION} by that of {CODE_VERSION}"


def test_a_config_that_does_not_name_the_code_names_it(hub: HubServer) -> None:
    publish()
    config = json.loads(hub.files("alice/model")["config.json"])
    wanted = config.pop("auto_map")
    change("config.json", json.dumps(config).encode())
    publishing.upload(plan_code_update("alice/model"))
    assert json.loads(hub.files("alice/model")["config.json"]) == config | {"auto_map": wanted}


@pytest.mark.parametrize("name", ["v1-mha", "v3-noaux"])
def test_repositories_without_the_code_are_refused(name: str, hub: HubServer) -> None:
    with pytest.raises(ValueError, match=r"there is no such repository, or the token may not see it"):
        plan_code_update("alice/model")
    publish(name, code="never")
    with pytest.raises(ValueError, match=r"there is no code of this family .*push the checkpoint \(--code always\)"):
        plan_code_update("alice/model")
    with pytest.raises(ValueError, match=r"revision='nope' is not allowed: alice/model has the branches main"):
        plan_code_update("alice/model", revision="nope")


@pytest.mark.parametrize(
    ("path", "content", "says"),
    [
        ("grouping.py", b"from .mine import x\n", f", though they name {CODE_VERSION}"),
        ("remote_code.py", named("1.4.0"), ", though they name 1.4.0"),
        ("remote_code.py", b"# no version\n", ""),
        ("auxiliary_losses.py", None, f", though they name {CODE_VERSION}"),
    ],
    ids=["changed", "newer", "unnamed", "a file is missing"],
)
def test_code_of_no_released_version_is_replaced_on_demand_alone(
    path: str, content: bytes | None, says: str, hub: HubServer
) -> None:
    publish()
    change("mine.py", b"x = 1\n")
    change(path, content)
    with pytest.raises(
        ValueError, match=rf"of no released version up to {CODE_VERSION}{says}: .* \(--replace\).* differ {path}"
    ):
        plan_code_update("alice/model")
    plan = plan_code_update("alice/model", replace_content=True)
    assert plan.notes[0].startswith("replaces the code of no released version") and path in plan.files
    publishing.upload(plan)
    assert hub.files("alice/model")[path] == code_files()[path].read_bytes()


def test_a_config_that_this_version_does_not_read_is_refused(hub: HubServer) -> None:
    publish()
    config = json.loads(hub.files("alice/model")["config.json"])
    change("config.json", json.dumps(config | {"topk_method": "unheard_of"}).encode())
    with pytest.raises(ValueError, match="topk_method='unheard_of' is not allowed"):
        plan_code_update("alice/model")


def test_every_released_version_is_known() -> None:
    """From 0.8.0 on. Before a version is raised, the digest of the code that was released is added."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert released[0] == CODE_VERSION
    assert set(code_update.RELEASED.values()) == set(released[1 : released.index("0.8.0") + 1])
    assert version_of({name: path.read_bytes() for name, path in code_files().items()}) == CODE_VERSION
    assert version_of({}) is None


def test_command_line(hub: HubServer, released: dict[str, bytes]) -> None:
    publish()
    for name, content in released.items():
        change(name, content)
    code, output = run("push", "--code-only", "alice/model", "--license", "mit", "--private")
    assert code == 2 and "--license, --private: not allowed with --code-only" in output
    code, output = run("push", "--code-only", "alice/model", "alice/other")
    assert code == 2 and "not allowed with --code-only" in output
    code, output = run("push", "alice/model")
    assert code == 2 and "REPO_ID is missing: deepseekmoe push FOLDER user/name" in output
    code, output = run("push", "--code-only", "alice/model", "--dry-run", "--json")
    assert code == 0 and set(json.loads(output)["files"]) == {"moe.py", "remote_code.py"}
    assert run("push", "--code-only", "alice/model", "--message", "New code")[0] == 0
    assert hub.history("alice/model")[0]["title"] == "New code"
    code, output = run("push", "--code-only", "alice/model")
    assert code == 0 and f"the code is that of {CODE_VERSION} already" in output
    assert hub.history("alice/model")[0]["title"] == "New code"
