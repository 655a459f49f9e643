"""Publishing folders: what goes up, what is refused, what an interruption leaves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runner import run
from conftest import GOLDEN_NAMES, Golden
from huggingface_hub import ModelCard, snapshot_download
from local_hub import READER, WRITER, HubServer
from mtp_cases import golden_with_mtp
from peft import get_peft_model
from publishing_cases import (
    CODE,
    MIT,
    push,
)
from safetensors.torch import load_file, save_file
from synthetic import CONFIG as V3_CONFIG
from synthetic import v3_tensors, write
from transformers import AutoModelForCausalLM

import modeling_deepseekmoe
from modeling_deepseekmoe import DeepseekMoeForCausalLM, expert_lora_config, prepare_esft, save_esft
from modeling_deepseekmoe.conversion import convert, verify
from modeling_deepseekmoe.hub.candidate import PreflightError
from modeling_deepseekmoe.hub.card import CardFacts
from modeling_deepseekmoe.hub.plan import plan_push
from modeling_deepseekmoe.hub.push import push_model, upload


def nothing_uploaded(hub: HubServer) -> bool:
    return not any(line.startswith(("POST", "PUT")) and "validate-yaml" not in line for line in hub.requests)


# -------------------------------------------------------------------------------------------------------- what goes up
@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("code", ["auto", "always", "never"])
def test_code_travels_where_transformers_does_not_know_the_model(name: str, code: str, hub: HubServer) -> None:
    golden = Golden(name)
    before = {file.name: file.read_bytes() for file in golden.folder.iterdir()}
    push(golden.folder, "alice/model", code=code)
    files = hub.files("alice/model")
    carried = code == "always" or (code == "auto" and name.startswith("v1"))
    assert CODE & set(files) == (CODE if carried else set())
    assert files.keys() - CODE == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert files["model.safetensors"] == before["model.safetensors"]
    assert (files["config.json"] == before["config.json"]) != carried
    for file in CODE & set(files):
        assert files[file] == Path(modeling_deepseekmoe.__file__).with_name(file).read_bytes()
    if carried:
        config = json.loads(files["config.json"])
        assert {key: value for key, value in config.items() if key != "auto_map"} == golden.config
        for target in config["auto_map"].values():
            module, _, cls = target.partition(".")
            assert f"class {cls}(".encode() in files[f"{module}.py"]
    assert before == {file.name: file.read_bytes() for file in golden.folder.iterdir()}


@pytest.mark.parametrize("code", ["never", "always"])
def test_layers_of_multi_token_prediction_go_up_with_the_others(
    v3: Golden, code: str, hub: HubServer, tmp_path: Path
) -> None:
    folder = golden_with_mtp(v3, tmp_path / "model")
    (folder / "tokenizer.json").unlink()  # an empty one
    before = {"model.safetensors": (folder / "model.safetensors").read_bytes()}
    push(folder, "alice/model", code=code)
    files = hub.files("alice/model")
    assert {name: content for name, content in files.items() if name.endswith(".safetensors")} == before
    model = AutoModelForCausalLM.from_pretrained("alice/model", mtp=True, trust_remote_code=code == "always")
    ids = torch.arange(3, 9)[None]
    wanted = DeepseekMoeForCausalLM.from_pretrained(folder, mtp=True)(ids, labels=ids).mtp_loss
    assert torch.equal(model(ids, labels=ids).mtp_loss, wanted)


def test_a_config_that_named_code_of_its_own(hub: HubServer, folder: Path) -> None:
    """As the official one of the first generation does, whose code is not there."""
    config = json.loads((folder / "config.json").read_text())
    official = {"AutoConfig": "configuration_deepseek.DeepseekConfig", "AutoModel": "other/repo--modeling_x.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": official}))
    push(folder, "alice/auto")
    assert "configuration_dialects.DeepseekConfig" in hub.files("alice/auto")["config.json"].decode()
    plan = plan_push(folder, "alice/never", code="never", facts=MIT)
    assert any("auto_map" in note for note in plan.notes)
    upload(plan)
    named = json.loads(hub.files("alice/never")["config.json"])["auto_map"]
    assert named == {"AutoModel": "other/repo--modeling_x.Model"}
    (folder / "configuration_deepseek.py").write_text("class DeepseekConfig: ...\n")
    push(folder, "alice/kept", code="never")
    assert json.loads(hub.files("alice/kept")["config.json"])["auto_map"] == official
    assert "configuration_deepseek.py" in hub.files("alice/kept")


def test_what_was_pushed_is_what_was_there(hub: HubServer, folder: Path) -> None:
    plan = plan_push(folder, "alice/model", facts=MIT)
    assert not plan.exists and plan.kind == "model" and not (hub.storage.folder / "repos").exists()
    text = plan.to_text()
    assert "(new)" in text and "model-00001-of-" in text and "loads as DeepseekForCausalLM" in text
    assert f"{(folder / 'model.safetensors.index.json').stat().st_size:,}" in text
    assert upload(plan).startswith(f"{hub.url}/alice/model/commit/")
    assert len(hub.history("alice/model")) == 2
    assert str(verify("alice/model", folder)).count("identical") == 1
    before = len(hub.history("alice/model"))
    push(folder, "alice/model")
    assert len(hub.history("alice/model")) == before, "nothing has changed, so there is no commit"


def test_a_new_version_takes_the_place_of_the_former_one(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    push(folder, "alice/model")
    convert(folder, tmp_path / "one", max_shard_size="1GB")
    plan = plan_push(tmp_path / "one", "alice/model", facts=MIT, code="never")
    assert plan.exists and set(plan.deleted) == {
        *CODE, "model.safetensors.index.json", *(file.name for file in folder.glob("model-*.safetensors"))
    }  # fmt: skip
    upload(plan)
    assert hub.files("alice/model").keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert len(hub.history("alice/model")) == 3


@pytest.mark.parametrize("layout", ["per-expert", "stacked"])
@pytest.mark.parametrize("stored", ["fp8", "bfloat16"])
def test_layouts_quantised_weights_and_further_layers(
    layout: str, stored: str, hub: HubServer, tmp_path: Path
) -> None:
    """A checkpoint of V3's kind, with a multi-token-prediction layer."""
    source = write(tmp_path / "v3", v3_tensors(), V3_CONFIG, shards=3)
    (source / "tokenizer.json").unlink()
    if (layout, stored) != ("per-expert", "fp8"):
        convert(source, tmp_path / "converted", layout=layout, dtype="keep" if stored == "fp8" else stored)
        source = tmp_path / "converted"
    plan = plan_push(source, "alice/v3", facts=MIT)
    loaded = (
        "note: loading was not tried, because the weights are quantised" if stored == "fp8" else "loads as Deepseek"
    )
    assert any(check.startswith(loaded) for check in plan.checks), plan.checks
    upload(plan)
    assert "identical" in str(verify("alice/v3", source))


def test_branches_private_repositories_and_the_own_name(hub: HubServer, folder: Path) -> None:
    push(folder, "model")
    assert hub.storage.read("alice/model")["private"] is False
    push(folder, "alice/hidden", private=True)
    assert hub.storage.read("alice/hidden")["private"] is True
    push(folder, "alice/hidden", private=True, revision="v2", code="never")
    assert hub.files("alice/hidden").keys() >= CODE and not CODE & hub.files("alice/hidden", "v2").keys()
    with pytest.raises(ValueError, match="private=True is not allowed: alice/model exists and is public"):
        plan_push(folder, "alice/model", private=True, facts=MIT)


def test_training_state_hidden_files_and_secrets_are_left_out(hub: HubServer, folder: Path) -> None:
    left = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin",
            "trainer_state.json", ".env", ".netrc", "hf_token.txt", "token", "server.pem", "id_rsa",
            "credentials.json", "pytorch_model.bin", "model-00009-of-00009.safetensors"]  # fmt: skip
    for name in left:
        (folder / name).write_text("{}")
    (folder / "checkpoint-3").mkdir()
    (folder / "runs").mkdir()
    kept = ["LICENSE", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json"]
    for name in kept:
        (folder / name).write_text("{}")
    plan = plan_push(folder, "alice/model", facts=MIT)
    assert plan.left_out.keys() == {*left, "checkpoint-3/", "runs/"} and set(kept) <= plan.files.keys()
    assert "leaves out .env: hidden" in plan.to_text()
    upload(plan)
    assert not set(left) & hub.files("alice/model").keys()
    asked = plan_push(folder, "alice/model", facts=MIT, with_training_state=True)
    assert asked.files.keys() - plan.files.keys() == {*left[:6]}


@pytest.mark.parametrize(
    ("model_type", "named"), [("deepseek", "PreTrainedTokenizerFast"), ("deepseek_v2", "LlamaTokenizerFast")]
)
def test_a_byte_level_tokenizer_under_the_name_of_llamas(
    model_type: str, named: str, hub: HubServer, folder: Path, source: Path
) -> None:
    """As the first generation was released: the oldest transformers reads it as Llama's where this package is not
    installed, and loses its spaces. That of V2 and V3 they know."""
    settings = json.loads((source / "tokenizer_config.json").read_text())
    model = Golden("v2-lite").model() if model_type == "deepseek_v2" else Golden("v1-mha").model()
    model.resize_token_embeddings(256)
    model.save_pretrained(folder.with_name("model"))
    shutil.copy(source / "tokenizer.json", folder.with_name("model"))
    file = folder.with_name("model") / "tokenizer_config.json"
    file.write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizerFast"}))
    push(file.parent, "alice/model")
    published = json.loads(hub.files("alice/model")["tokenizer_config.json"])
    assert published == {**settings, "tokenizer_class": named}
    assert json.loads(file.read_text())["tokenizer_class"] == "LlamaTokenizerFast"


def test_models_push_themselves(
    hub: HubServer, tiny_model: Callable[..., DeepseekMoeForCausalLM], source: Path, warnings_of_package: list[str]
) -> None:
    from transformers import AutoTokenizer

    model = tiny_model(vocab_size=256)
    address = model.push_to_hub(
        "alice/mine", tokenizer=AutoTokenizer.from_pretrained(source), tags=["tiny"], base_model="alice/base",
        commit_message="First", max_shard_size="40KB",
    )  # fmt: skip
    files = hub.files("alice/mine")
    assert address == f"{hub.url}/alice/mine/commit/{hub.storage.read('alice/mine')['branches']['main']}"
    assert hub.history("alice/mine")[0]["title"] == "First" and files.keys() >= CODE
    assert "tokenizer.json" in files and "model.safetensors.index.json" in files
    card = files["README.md"].decode()
    assert any("states no license" in text for text in warnings_of_package)
    assert "- tiny\n" in card and "base_model: alice/base\n" in card and "license" not in card.split("---")[1]
    assert not hasattr(model.config, "auto_map") or not model.config.auto_map
    model.save_pretrained(source / "ordinary")
    assert not list((source / "ordinary").glob("*.py"))
    assert "auto_map" not in json.loads((source / "ordinary" / "config.json").read_text())


def test_what_transformers_uploads_itself(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """Checked, and with the code."""
    model = modeling_deepseekmoe.DeepseekForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="alice/model")
    assert hub.files("alice/model").keys() >= CODE
    # What is in the folder already goes to another repository too.
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="alice/second")
    assert CODE | {"config.json", "model.safetensors"} <= hub.files("alice/second").keys()
    model.config.push_to_hub("alice/model")
    assert "AutoModelForCausalLM" in json.loads(hub.files("alice/model")["config.json"])["auto_map"]
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    history = len(hub.history("alice/model"))
    with pytest.raises(PreflightError, match="not finite"):
        model.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="alice/model")
    assert history == len(hub.history("alice/model"))


def test_a_published_model_is_saved_without_code(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    push(folder, "alice/model")
    model = modeling_deepseekmoe.DeepseekForCausalLM.from_pretrained("alice/model")
    assert "AutoConfig" in model.config.auto_map
    model.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    into = Path(snapshot_download("alice/model", local_dir=tmp_path / "copy"))
    model.save_pretrained(into)
    assert "auto_map" in json.loads((into / "config.json").read_text())


def test_an_adapter(hub: HubServer, adapter: Path, tmp_path: Path) -> None:
    code, output = run("push", adapter, "alice/adapter", "--license", "mit")
    assert code == 0, output
    files = hub.files("alice/adapter")
    assert files.keys() == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "base_model: alice/base\n" in files["README.md"].decode()
    code, output = run("merge", "alice/base", "alice/adapter", tmp_path / "merged")
    assert code == 0, output


def test_an_adapter_of_a_folder_needs_the_name_of_its_base(hub: HubServer, adapter: Path, folder: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(folder)}))
    rewritten = plan_push(adapter, "alice/adapter", facts=MIT).files["adapter_config.json"]
    assert json.loads(rewritten) == {**config, "base_model_name_or_path": "alice/base"}
    (adapter / "README.md").unlink()  # in which PEFT has noted the base
    hub.requests.clear()
    with pytest.raises(ValueError, match=r"base_model is missing: the adapter names .*folder"):
        plan_push(adapter, "alice/adapter", facts=MIT)
    assert nothing_uploaded(hub)
    push(adapter, "alice/adapter", facts=CardFacts(license="mit", base_model="alice/base"))
    assert json.loads(hub.files("alice/adapter")["adapter_config.json"])["base_model_name_or_path"] == "alice/base"
    push(adapter, "alice/adapter", facts=CardFacts(license="mit", base_model="alice/base"))
    with pytest.raises(ValueError, match=r"other content \(its adapter_config.json has base_model_name_or_path"):
        plan_push(adapter, "alice/adapter", facts=CardFacts(license="mit", base_model="alice/other"))


def test_named_adapters(hub: HubServer, folder: Path, warnings_of_package: list[str]) -> None:
    push(folder, "alice/base")
    base = modeling_deepseekmoe.DeepseekForCausalLM.from_pretrained("alice/base")
    adapted = get_peft_model(base, expert_lora_config(base, r=2), adapter_name="mine")
    adapted.add_adapter("other", expert_lora_config(base, r=4))
    push_model(adapted, "alice/mine", facts=CardFacts(license="mit", tags=("chess",)), tags="go")
    card = ModelCard(hub.files("alice/mine")["README.md"].decode())
    assert card.data.license == "mit" and "go" in card.data.tags and "chess" not in card.data.tags
    assert json.loads(hub.files("alice/mine")["adapter_config.json"])["r"] == 2
    assert "Of 2 adapters the active one, mine, is published." in warnings_of_package


@pytest.mark.parametrize("option", ["ask_hub", "with_training_state"])
def test_options_of_folders_are_not_for_models(tiny_model: Callable, option: str) -> None:
    with pytest.raises(TypeError, match=f"push_model.. takes no {option}"):
        push_model(tiny_model(), "alice/model", license="mit", **{option: True})


def test_adapted_models_and_trained_experts(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    push(folder, "alice/base")
    base = modeling_deepseekmoe.DeepseekForCausalLM.from_pretrained("alice/base")
    push_model(get_peft_model(base, expert_lora_config(base, r=2)), "alice/lora", license="mit")
    assert "adapter_model.safetensors" in hub.files("alice/lora")
    assert "deepseekmoe merge alice/base alice/lora merged" in hub.files("alice/lora")["README.md"].decode()
    model = modeling_deepseekmoe.DeepseekForCausalLM.from_pretrained("alice/base")
    prepare_esft(model, {1: [0, 3], 2: [5]})
    save_esft(model, tmp_path / "experts")
    with pytest.raises(ValueError, match="base_model='' is not allowed"):
        plan_push(tmp_path / "experts", "alice/experts", facts=MIT)
    push(tmp_path / "experts", "alice/experts", facts=CardFacts(license="mit", base_model="alice/base"))
    card = hub.files("alice/experts")["README.md"].decode()
    assert "3 in 2 layers" in card
    code, output = run("merge", "alice/base", "alice/experts", tmp_path / "merged")
    assert code == 0, output


# ----------------------------------------------------------------------------------------------------------- bad input
def damage(folder: Path, how: str) -> None:
    """Make a folder one that must not be published."""
    first = sorted(folder.glob("model-*.safetensors"))[0]
    if how == "not finite":
        tensors = load_file(first)
        next(iter(tensors.values())).view(-1)[0] = float("nan")
        save_file(tensors, first)
    elif how == "other values":
        save_file({name: tensor + 1 for name, tensor in load_file(first).items()}, first)
    elif how == "tensor missing":
        tensors = load_file(first)
        name = next(iter(tensors))
        del tensors[name]
        save_file(tensors, first)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        del index["weight_map"][name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "file missing":
        first.unlink()
    elif how == "wrong shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    elif how == "no checkpoint":
        (folder / "config.json").unlink()
    elif how == "another model":
        (folder / "config.json").write_text('{"model_type": "llama"}')
    elif how == "secret":
        (folder / "notes.txt").write_text("x" * 2**22 + f"\nexport TOKEN={WRITER}\n")
    elif how == "private key":
        (folder / "notes.txt").write_text("-----BEGIN RSA PRIVATE KEY-----\n")
    elif how == "link":
        (folder / "notes.txt").symlink_to("/etc/hostname")
    elif how == "generation":
        (folder / "generation_config.json").write_text('{"max_new_tokens": -5}')
    elif how == "tokenizer":
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("not finite", 1, "not finite"),
        ("tensor missing", 2, "missing"),
        ("file missing", 2, "lacks model-00001"),
        ("wrong shape", 2, "shape"),
        ("no checkpoint", 2, "is no checkpoint"),
        ("another model", 2, "llama"),
        ("secret", 1, "notes.txt holds what looks like your own token"),
        ("private key", 1, "notes.txt holds what looks like a private key"),
        ("link", 2, "notes.txt is a link"),
        ("generation", 1, "generation_config.json"),
        ("tokenizer", 1, "tokenizer cannot be loaded"),
    ],
)
def test_folders_that_are_not_in_order(how: str, code: int, message: str, hub: HubServer, folder: Path) -> None:
    damage(folder, how)
    found, output = run("push", folder, "alice/model", "--license", "mit")
    assert found == code and message in output and WRITER not in output, output
    assert nothing_uploaded(hub)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no/good/id", "--license", "mit"), "repo_id='no/good/id' is not allowed"),
        (("alice/with space", "--license", "mit"), "repo_id='alice/with space' is not allowed"),
        (("alice/-x..y", "--license", "mit"), "is not allowed"),
        (("alice/model",), "license is missing"),
        (("alice/model", "--license", "Apache 2"), "license='Apache 2' is not allowed"),
        (("alice/model", "--license", "other"), "without license_name"),
        (("alice/model", "--license", "mit", "--code", "maybe"), "code='maybe' is not allowed"),
        (("alice/model", "--license", "mit", "--base-model", "/my/base"), "base_model='/my/base' is not allowed"),
        (("alice/model", "--license", "mit", "--data", "nothing.txt"), "nothing.txt"),
    ],
)
def test_arguments_that_are_not_allowed(
    arguments: tuple[str, ...], message: str, hub: HubServer, folder: Path
) -> None:
    code, output = run("push", folder, *arguments)
    assert code == 2 and message in output, output
    assert nothing_uploaded(hub)


def test_metadata_that_the_hub_refuses(hub: HubServer, folder: Path) -> None:
    code, output = run("push", folder, "alice/model", "--license", "my-own-1.0")
    assert code == 2 and '"license" must be one of' in output
    assert nothing_uploaded(hub)


def test_no_permission(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(folder, "alice/theirs")
    push(folder, "alice/hidden", private=True)
    histories = [len(hub.history(name)) for name in ("alice/theirs", "alice/hidden")]
    stored = set((hub.storage.folder / "lfs").iterdir())
    damage(folder, "other values")
    (folder / "more.txt").write_text("more")
    for token, repo in ((READER, "alice/theirs"), (READER, "alice/hidden"), (READER, "alice/new"), (READER, "bob/new"),
                        (WRITER, "bob/new"), ("hf_wrong", "alice/theirs"), ("", "alice/new")):  # fmt: skip
        monkeypatch.setenv("HF_TOKEN", token)
        code, output = run("push", folder, repo, "--license", "mit")
        assert code == 2 and "Error:" in output, output
        assert "hf auth login" in output, output
        assert not token or token not in output
    assert histories == [len(hub.history(name)) for name in ("alice/theirs", "alice/hidden")]
    assert not (hub.storage.folder / "repos" / "bob").exists()
    assert stored == set((hub.storage.folder / "lfs").iterdir())
    monkeypatch.setenv("HF_TOKEN", "")
    code, output = run("push", folder, "model", "--license", "mit")
    assert code == 2 and "hf auth login" in output


def test_a_folder_of_the_hubs_cache(hub: HubServer, folder: Path) -> None:
    push(folder, "alice/model", code="never")
    cached = Path(snapshot_download("alice/model"))
    assert (cached / "config.json").is_symlink()
    push(cached, "alice/copy")
    files = hub.files("alice/copy")
    assert files.keys() >= CODE and files["model.safetensors.index.json"] == hub.files("alice/model")[
        "model.safetensors.index.json"
    ]  # fmt: skip


def test_dry_run_and_offline(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = run("push", folder, "alice/model", "--license", "mit", "--dry-run", "--json")
    assert code == 0 and json.loads(output[output.index("{\n") :])["files"]["config.json"] > 500
    assert nothing_uploaded(hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, output = run("push", folder, "alice/model", "--license", "mit")
    assert code == 2 and "offline" in output
    code, output = run("push", folder, "alice/model", "--license", "mit", "--dry-run")
    assert code == 0 and "the Hub was not asked" in output


def test_preflight_names_what_does_not_load(hub: HubServer, folder: Path, source: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    with pytest.raises(PreflightError, match="The tokenizer has 256 tokens, and the model vocab_size=96"):
        plan_push(folder, "alice/model", facts=MIT)
    assert torch.get_default_dtype() == torch.float32
