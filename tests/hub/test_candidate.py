"""What is found before anything is uploaded: secrets, files that have no place, files that cannot be read."""

import json
from pathlib import Path

import pytest
from local_hub import WRITER
from safetensors.torch import load_file, save_file

from modeling_deepseekmoe.hub.candidate import PreflightError, check_hub_id, find_candidate, find_kind
from modeling_deepseekmoe.hub.card import CardFacts
from modeling_deepseekmoe.hub.plan import plan_push
from modeling_deepseekmoe.hub.secrets import check_secrets

MIT = CardFacts(license="mit")


def plan(folder: Path, **options: object) -> set[str]:
    """What would be uploaded, without a Hub."""
    return set(plan_push(folder, "alice/model", facts=MIT, ask_hub=False, **options).files)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (f"token = '{WRITER}'", "a Hugging Face token"),
        (f"my_{WRITER}", "a Hugging Face token"),
        ("sk-" + "ant-api03-" + "x" * 40, "an OpenAI or Anthropic key"),
        ("ghp_" + "a1" * 18, "a GitHub token"),
        ("github_pat_" + "a1" * 30, "a GitHub token"),
        ("glpat-" + "a1" * 12, "a GitLab token"),
        ("AKIA" + "A1B2" * 4, "an AWS key"),
        ("AIza" + "a1b2c" * 7, "a Google key"),
        ("xoxb-" + "1234-" * 6, "a Slack token"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
    ],
)
@pytest.mark.parametrize("place", ["small file", "across two blocks", "header of weights", "config", "bytes"])
def test_secrets_are_found_and_not_shown(text: str, what: str, place: str, folder: Path) -> None:
    if place == "header of weights":
        file = sorted(folder.glob("*.safetensors"))[0]
        save_file(load_file(file), file, metadata={"format": "pt", "note": text})
    elif place == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "note": text}))
    elif place != "bytes":
        padding = " " * (2**22 - 10) if place == "across two blocks" else ""
        (folder / "notes.md").write_text(padding + text)
    with pytest.raises(PreflightError, match=f"looks like {what}") as info:
        if place == "bytes":
            check_secrets({"card": text.encode()})
        else:
            plan(folder)
    assert text not in str(info.value)


def test_ordinary_words_are_no_secrets(folder: Path) -> None:
    (folder / "vocab.txt").write_text(
        "hf_ sk- task-specific-and-rather-long-words AKIA hf_transfer ghp_ xoxb-\n" * 1000
    )
    assert "vocab.txt" in plan(folder)


def test_the_own_token_is_looked_for_whatever_it_looks_like(folder: Path) -> None:
    with pytest.raises(PreflightError, match=r"notes holds what looks like your own token"):
        check_secrets({"notes": b"the word swordfish!"}, token="swordfish!")


def test_weights_are_never_left_out(folder: Path) -> None:
    """Whatever their names: an index without its files would be a checkpoint that nobody can load."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = {}
    for file, name in zip(sorted(folder.glob("*.safetensors")), ("_a", "my_secret", "hf_token"), strict=False):
        names[file.name] = f"{name}.safetensors"
        file.rename(folder / names[file.name])
    index["weight_map"] = {tensor: names[file] for tensor, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(names.values()) <= plan(folder)


def test_folders_in_the_folder(folder: Path) -> None:
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    for name in ("tools.jinja", ".env", "id_rsa", "optimizer.pt"):
        (templates / name).write_text("x")
    found = plan(folder)
    assert "additional_chat_templates/tools.jinja" in found
    assert not any(name in path for path in found for name in (".env", "id_rsa", "optimizer"))


def test_links(folder: Path) -> None:
    (folder / ".env").write_text("PASSWORD=hunter2")
    (folder / "notes.txt").symlink_to(folder / ".env")
    with pytest.raises(ValueError, match=r"notes.txt is a link to .env, which is not allowed"):
        find_candidate(folder)


def test_what_is_no_part_of_a_checkpoint(folder: Path) -> None:
    odd = ["a.ckpt", "a.pkl", "custom_checkpoint_0.pkl", "a.npz", "train.log", "events.out.tfevents.1", "a.tmp", "a~",
           "pytorch_model.bin", "model.gguf", "adapter_model.safetensors"]  # fmt: skip
    for name in odd:
        (folder / name).write_text("x")
    assert not set(odd) & plan(folder)
    assert set(odd) & plan(folder, with_training_state=True) == {"custom_checkpoint_0.pkl"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not allowed: it must be a JSON object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not readable JSON"),
        ("tokenizer.json", "{}", "The tokenizer cannot be loaded"),
        ("generation_config.json", "[]", "generation_config.json"),
        ("generation_config.json", "{", "generation_config.json"),
        ("config.json", "[]", "config"),
        ("README.md", b"\xff\xfe broken", "README.md is not allowed: it is no text in UTF-8"),
        ("routing.py", "mine = 1", "holds routing.py: these are names of the family's code"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: str | bytes, message: str, folder: Path) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, PreflightError), match=message):
        plan(folder)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "DeepseekV3ForCausalLM", "DeepseekMoeForCausalLM"])
def test_another_models_class(architecture: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    with pytest.raises(
        ValueError, match=rf"architectures=\['{architecture}'\] is not allowed for model_type='deepseek'"
    ):
        plan(folder)


def test_kinds(folder: Path, tmp_path: Path) -> None:
    assert find_kind(folder) == "model"
    with pytest.raises(FileNotFoundError, match="is no folder"):
        find_kind(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is no checkpoint"):
        find_kind(tmp_path / "empty")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "empty" / name).write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config.json is not allowed: it must be a JSON object"):
        find_candidate(tmp_path / "empty")
    (tmp_path / "experts").mkdir()
    for name in ("esft.json", "esft.safetensors"):
        (tmp_path / "experts" / name).write_text("{}")
    with pytest.raises(ValueError, match=r"esft.json"):
        find_candidate(tmp_path / "experts")


def test_a_model_and_an_adapter_in_one_folder(folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=r"holds adapter_config.json and model.safetensors.index.json: publish each"):
        find_kind(folder)


@pytest.mark.parametrize("value", ["", "/a/b", "./a", "~/a", "a/b/c", "a b", "-a/b"])
def test_ids_that_are_none(value: str) -> None:
    with pytest.raises(ValueError, match=r"base_model=.* is not allowed"):
        check_hub_id("base_model", value)
