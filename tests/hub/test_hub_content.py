"""Repositories that hold something already: cards that stay, other content, what is replaced."""

import shutil
from pathlib import Path

import pytest
from cli_runner import run
from conftest import Golden
from local_hub import READER, HubServer
from publishing_cases import (
    CODE,
    MIT,
    commit,
    push,
)

from modeling_deepseekmoe.conversion import convert
from modeling_deepseekmoe.hub.card import CardFacts, is_hand_written
from modeling_deepseekmoe.hub.plan import plan_push
from modeling_deepseekmoe.hub.push import upload


# --------------------------------------------------------------------------------------------------------------- cards
def test_a_card_that_somebody_wrote_stays(hub: HubServer, folder: Path) -> None:
    push(folder, "alice/model")
    generated = hub.files("alice/model")["README.md"].decode()
    assert not is_hand_written(generated)
    plan = plan_push(folder, "alice/model", facts=CardFacts(license="apache-2.0"))
    assert b"license: apache-2.0" in plan.files["README.md"], "a generated card is made anew"
    edited = generated.replace("## Use", "## How I made it\n\nWith care.\n\n## Use")
    (folder / "README.md").write_text(edited)
    assert is_hand_written(edited)
    push(folder, "alice/model")
    assert hub.files("alice/model")["README.md"].decode() == edited
    (folder / "README.md").unlink()
    plan = plan_push(folder, "alice/model", facts=CardFacts())
    assert "README.md" not in plan.files and any("--overwrite-card" in note for note in plan.notes)
    upload(plan)
    assert hub.files("alice/model")["README.md"].decode() == edited
    (folder / "README.md").write_text("# Another one\n")
    push(folder, "alice/model")
    assert hub.files("alice/model")["README.md"].decode() == edited
    push(folder, "alice/model", overwrite_card=True, facts=CardFacts())
    assert hub.files("alice/model")["README.md"].decode() == generated, "the license is taken from the former card"


def test_a_repository_with_other_content(hub: HubServer, folder: Path, adapter: Path) -> None:
    push(Golden("v3-noaux").folder, "alice/model")
    history, stored = len(hub.history("alice/model")), set((hub.storage.folder / "lfs").iterdir())
    for other, problem in (
        (folder, "its config.json has model_type='deepseek_v3', and this one 'deepseek'"),
        (adapter, "it holds config.json, and no adapter_config.json"),
    ):
        code, output = run("push", other, "alice/model", "--license", "mit")
        assert code == 2 and f"the repository has other content ({problem})" in output, output
    assert history == len(hub.history("alice/model"))
    assert stored == set((hub.storage.folder / "lfs").iterdir())
    code, output = run("push", adapter, "alice/model", "--license", "mit", "--replace")
    assert code == 0 and "removes from the repository: config.json" in output
    assert hub.files("alice/model").keys() == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize(
    "files",
    [
        {"model_index.json": "{}", "unet/diffusion.safetensors": "x"},
        {"unet/diffusion.safetensors": "x"},
        {"model.ckpt": "x"},
        {"model-q4.gguf": "x"},
        {"sub/config.json": "{}"},
        {"config.json": "no json"},
    ],
)
def test_what_counts_as_other_content(files: dict[str, str], hub: HubServer, folder: Path) -> None:
    commit(hub, "alice/model", files)
    with pytest.raises(ValueError, match="has other content"):
        plan_push(folder, "alice/model", facts=MIT)
    push(folder, "alice/model", replace_content=True)
    assert not files.keys() & (hub.files("alice/model").keys() - {"config.json"})


def test_a_model_and_an_adapter_in_one_repository(hub: HubServer, folder: Path, adapter: Path) -> None:
    """Each replaces its own files alone."""
    push(adapter, "alice/both")
    assert "adapter_model.safetensors" in hub.files("alice/both")
    model = {file.name: file.read_bytes().decode("latin1") for file in folder.glob("*.json")}
    commit(hub, "alice/both", {**model, "model.safetensors": "of the model"})
    assert plan_push(adapter, "alice/both", facts=MIT).deleted == ()
    plan = plan_push(folder, "alice/both", facts=MIT)
    assert plan.deleted == ("model.safetensors",), "the index of the new version does not name it"


def test_replacing_takes_nothing_over(hub: HubServer, folder: Path) -> None:
    """Neither the license nor the page of what was there."""
    card = "---\nlicense: llama3\nbase_model: meta/x\nlanguage: en\n---\n"
    commit(hub, "alice/model", {"config.json": "{}", "model.safetensors": "x", "README.md": card, "a/b.bin": "x"})
    with pytest.raises(ValueError, match="license is missing"):
        plan_push(folder, "alice/model", facts=CardFacts(), replace_content=True)
    push(folder, "alice/model", replace_content=True)
    files = hub.files("alice/model")
    assert "a/b.bin" not in files and b"license: mit" in files["README.md"] and b"meta/x" not in files["README.md"]
    commit(hub, "alice/other", {"config.json": "{}", "README.md": card + "# A llama\n"})
    with pytest.raises(ValueError, match="somebody wrote the card of what is to be replaced"):
        plan_push(folder, "alice/other", facts=MIT, replace_content=True)
    push(folder, "alice/other", replace_content=True, overwrite_card=True)
    assert b"llama" not in hub.files("alice/other")["README.md"]


def test_a_plan_is_of_the_files_that_were_checked(hub: HubServer, folder: Path) -> None:
    for change in (lambda file: file.write_bytes(b"x" * file.stat().st_size), lambda file: file.unlink()):
        plan = plan_push(folder, "alice/model", facts=MIT)
        change(sorted(folder.glob("*.safetensors"))[0])
        with pytest.raises(ValueError, match=r"model-00001-of-\d+.safetensors: changed since they were checked"):
            upload(plan)
        shutil.rmtree(folder)
        convert(Golden("v1-mha").folder, folder, max_shard_size="300KB")
    assert not (hub.storage.folder / "repos").exists()


def test_pull_requests(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may be opened by somebody who may not write."""
    push(folder, "alice/model", code="never")
    head = hub.storage.read("alice/model")["branches"]["main"]
    monkeypatch.setenv("HF_TOKEN", READER)
    address = upload(plan_push(folder, "alice/model", facts=MIT), create_pr=True)
    assert address == f"{hub.url}/alice/model/discussions/1"
    assert hub.storage.read("alice/model")["branches"]["main"] == head
    assert hub.files("alice/model", "refs/pr/1").keys() >= CODE
    with pytest.raises(ValueError, match="create_pr=True is not allowed with revision='v2'"):
        upload(plan_push(folder, "alice/model", facts=MIT, revision="v2"), create_pr=True)


def test_a_repository_without_weights_is_taken(hub: HubServer, folder: Path, source: Path) -> None:
    """A tokenizer that was pushed before the model, and a card that was written on the page."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source).push_to_hub("alice/model")
    assert "tokenizer.json" in hub.files("alice/model")
    push(folder, "alice/model")
    assert {"tokenizer.json", "config.json"} <= hub.files("alice/model").keys()
