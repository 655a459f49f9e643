"""Model cards: what they say of every kind of model, whose text stays, and as trainers write them."""

import copy
import json
import pickle
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
import torch
import yaml
from cli_runner import run
from conftest import MLA, V3_LIKE, Golden
from esft_cases import Rows
from huggingface_hub import HfApi, ModelCard, ModelCardData
from local_hub import WRITER, HubServer, metadata_problems
from markdown_it import MarkdownIt
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils.hub import create_and_tag_model_card

import modeling_deepseekmoe
from modeling_deepseekmoe import DeepseekMoeForCausalLM, ModelCardCallback, expert_lora_config
from modeling_deepseekmoe.hub.callbacks import RemoteCodeCallback, _HiddenToken
from modeling_deepseekmoe.hub.candidate import find_candidate
from modeling_deepseekmoe.hub.card import CardFacts, is_hand_written, make_card, metadata_of
from modeling_deepseekmoe.hub.card_sections import find_training_state, training_section
from modeling_deepseekmoe.hub.plan import plan_push
from modeling_deepseekmoe.hub.push import write_card
from modeling_deepseekmoe.remote_code import code_files

MIT = CardFacts(license="mit")


def card_of(folder: Path, facts: CardFacts = MIT, **options: object) -> str:
    return make_card(find_candidate(folder), "alice/model", facts, **options)


def check_page(card: str) -> str:
    """That a card renders and its metadata is valid; the page."""
    assert not metadata_problems(metadata_of(card)) and not is_hand_written(card)
    assert metadata_of(card).keys() == ModelCard(card).data.to_dict().keys()
    page = MarkdownIt("commonmark").enable("table").render(card.split("---\n", 2)[2])
    assert page.count("<h1>") == 1 and "{{" not in page and "{%" not in page and "None" not in page
    text = re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert "|" not in text and "**" not in text and "##" not in text, "a table or a heading that did not render"
    return page


# ------------------------------------------------------------------------------------------------------- what they say
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["2 of its 3 layers have 2 shared experts and 8 routed experts each", "softmax, <code>greedy</code>"]),
        ({"n_routed_experts": None, "n_shared_experts": None}, ["all of its 3 layers are dense"]),
        ({"n_shared_experts": None}, ["have no shared experts and 8 routed"]),
        ({"n_shared_experts": 1}, ["have 1 shared expert and 8 routed"]),
        ({"tie_word_embeddings": True, "moe_layer_freq": 2, "first_k_dense_replace": 0}, ["layers</td>\n<td>3, 2 of"]),
        ({**V3_LIKE}, ["2 of 4 groups, weights normalised, scaled by 2.5", "updates of the bias; losses: expert 0.01",
                       "multi-head latent attention, 4 heads"]),
        ({**V3_LIKE, "aux_loss_alpha": 0.0}, ["<td>updates of the bias</td>"]),
        ({"aux_loss_alpha": 0.0}, ["<td>nothing</td>", "grouped-query attention, 2 key-value heads"]),
        ({**MLA, "router_z_loss_alpha": 0.1}, ["losses: expert 0.01, router_z 0.1"]),
    ],
)  # fmt: skip
def test_every_kind_of_model(
    fields: dict, expected: list[str], tiny_model: Callable[..., DeepseekMoeForCausalLM], tmp_path: Path
) -> None:
    model = tiny_model(**fields)
    model.save_pretrained(tmp_path)
    page = check_page(card_of(tmp_path, with_code=True))
    for text in expected:
        assert text in page, (text, page)
    total = sum(parameter.numel() for parameter in model.parameters())
    biases = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("correction_bias"))
    assert f"<td>total</td>\n<td>{total + biases:,}</td>" in page
    assert page.count('class="language-python"') == 2


@pytest.mark.parametrize(
    ("head", "pipeline", "auto_class"),
    [
        ("ForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
        ("ForTokenClassification", "token-classification", "AutoModelForTokenClassification"),
        ("Model", "feature-extraction", "AutoModel"),
    ],
)
@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_other_heads(
    head: str,
    pipeline: str,
    auto_class: str,
    with_tokenizer: bool,
    tiny_config: Callable,
    source: Path,
    tmp_path: Path,
) -> None:
    getattr(modeling_deepseekmoe, f"DeepseekMoe{head}")(tiny_config(vocab_size=256)).save_pretrained(tmp_path / "x")
    if with_tokenizer:
        AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "x")
    card = card_of(tmp_path / "x")
    check_page(card)
    assert metadata_of(card)["pipeline_tag"] == pipeline
    blocks = [token.content for token in MarkdownIt().parse(card) if token.type == "fence"]
    assert len(blocks) == 1 and f"{auto_class}.from_pretrained(" in blocks[0]
    code = blocks[0].replace("alice/model", str(tmp_path / "x"))
    exec(compile(code, "snippet", "exec"), {})


@pytest.mark.parametrize("name", ["v2-lite", "v3-noaux", "v1-mha"])
def test_generations(name: str) -> None:
    card = card_of(Golden(name).folder)
    page = check_page(card)
    generation = {"v2": "DeepSeek-V2", "v3": "DeepSeek-V3", "v1": "first-generation DeepSeekMoE"}[name[:2]]
    assert f"A {generation} language model" in page
    assert ("With transformers alone:" in page) == (name[:2] != "v1")
    assert ("register(override_native=True)" in page) == (name[:2] != "v1")
    assert metadata_of(card)["tags"][:3] == ["mixture-of-experts", "moe", "deepseekmoe"]


def test_routing_on_a_text(
    hub: HubServer, tiny_model: Callable[..., DeepseekMoeForCausalLM], source: Path, tmp_path: Path
) -> None:
    tiny_model(vocab_size=256).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("One two three four. " * 60)
    code, output = run("push", tmp_path / "model", "alice/model", "--license", "mit", "--data", tmp_path / "text.txt")
    assert code == 0, output
    files = hub.files("alice/model")
    assert files["expert_load.png"].startswith(b"\x89PNG") and len(files["expert_load.png"]) > 5000
    page = check_page(files["README.md"].decode())
    assert '<img src="expert_load.png"' in page and "tokens of text.txt" in page
    rows = re.findall(r"<tr>\n<td>(\w+)</td>\n<td>([\d.]+)</td>\n<td>([\d.]+)</td>", page)
    assert [row[0] for row in rows[-3:]] == ["1", "2", "mean"]
    mean = (float(rows[-3][1]) + float(rows[-2][1])) / 2
    assert float(rows[-1][1]) == pytest.approx(mean, abs=1e-3)
    (tmp_path / "empty.jsonl").write_text("")
    code, output = run("push", tmp_path / "model", "alice/x", "--license", "mit", "--data", tmp_path / "empty.jsonl")
    assert code == 2 and "The data holds 0 tokens" in output
    # A card without the statistics takes the picture away.
    for options in ((), ("--replace",)):
        hub.storage.write("alice/again", hub.storage.read("alice/model"))
        code, output = run("push", tmp_path / "model", "alice/again", "--license", "mit", *options)
        assert code == 0 and "expert_load.png" not in hub.files("alice/again"), output


def test_figures_of_the_training(folder: Path) -> None:
    history = [{"loss": 5.0, "learning_rate": 1e-4, "step": 1}, {"loss": 4.5, "learning_rate": 5e-5, "step": 2},
               {"eval_loss": 2.0, "step": 2}, {"router/dead_experts": 0.25, "step": 2}]  # fmt: skip
    state = {"global_step": 1234, "epoch": 2.0, "train_batch_size": 8, "total_flos": 1.5e15, "log_history": history}
    for step, content in ((5, {}), (12, state), (9, {})):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(content))
    assert find_training_state(folder) == state, "the latest, by number"
    page = check_page(card_of(folder, training=state))
    for text in ("1,234", "2.00", "5.0000 and 4.5000", "2.0000 (perplexity 7.389)", "0.0001", "1.5e+15", "0.25"):
        assert f"<td>{text}</td>" in page, text


@pytest.mark.parametrize(
    "state",
    [
        {"log_history": None}, {"log_history": 5}, {"log_history": [None, 3]}, {},
        {"log_history": [{"loss": "x"}], "global_step": None, "epoch": "x", "total_flos": "x", "train_batch_size": []},
        {"log_history": [{"loss": 10**400, "eval_loss": float("nan"), "learning_rate": True}], "global_step": 10**400},
        {"log_history": [{"loss": 1.0, "eval_loss": 800.0}], "total_flos": float("inf")},
    ],
)  # fmt: skip
def test_odd_figures_of_the_training(state: dict, folder: Path) -> None:
    page = check_page(card_of(folder, training=state))
    assert "nan" not in page and "inf" not in (training_section(state) or "")
    (folder / "trainer_state.json").write_text("{")
    assert find_training_state(folder) is None


# ---------------------------------------------------------------------------------------------------- whose text stays
def test_trainers_own_card_counts_as_written(tiny_model: Callable, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model(), tmp_path)
    trainer.train()
    trainer.hub_model_id = None
    trainer.create_model_card(model_name="x", finetuned_from="a/b", dataset="some", license="mit")
    card = (tmp_path / "README.md").read_text()
    assert "More information needed" in card and is_hand_written(card)


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("1: x", {"1": "x"}),
        ("card_data: x\nself: y", {"card_data": "x", "self": "y"}),
        ("language: [en, no]", {"language": ["en", "no"]}),
        ("language: no", {"language": "no"}),
        ("date: 2024-01-31", {"date": date(2024, 1, 31)}),
        ("inference: false", {"inference": False}),
        ("datasets: a/b", {"datasets": ["a/b"]}),
        ("tags: [1, x]", {}),
        ("tags: 5\ndatasets: 5\nbase_model: 5", {"datasets": None, "base_model": None}),
        ("eval_results: x\nmodel-index: [{name: x}]", {"eval_results": "x"}),
        ("license: [mit]", {"license": "mit"}),
        ("widget:\n- text: caf\u00e9", {"widget": [{"text": "caf\u00e9"}]}),
    ],
)
def test_odd_metadata_of_a_former_card(front: str, expected: dict, folder: Path) -> None:
    (folder / "README.md").write_text(f"---\n{front}\n---\n", encoding="utf-8")
    plan = plan_push(folder, "alice/model", facts=MIT, ask_hub=False)
    found = metadata_of(plan.files["README.md"].decode())
    assert {name: found.get(name) for name in expected} == expected
    assert "model-index" not in found, "results of other weights"


@pytest.mark.parametrize("front", ["a: [", "- a\n- b", "a: b: c"])
def test_metadata_that_cannot_be_read(front: str, folder: Path) -> None:
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"README.md is not allowed: its metadata"):
        plan_push(folder, "alice/model", facts=MIT, ask_hub=False)


def test_what_counts_as_written_by_hand(folder: Path) -> None:
    generated = card_of(folder)
    assert not is_hand_written(generated) and not is_hand_written(generated.replace("\n", "\r\n"))
    assert not is_hand_written("") and not is_hand_written("---\nlicense: mit\n---\n")
    blank = str(ModelCard.from_template(ModelCardData(tags=["x"])))
    assert not is_hand_written(blank) and not is_hand_written(f"{blank}\n### Framework versions\n\n- PEFT 0.21.2\n")
    for edited in (
        generated.replace("## Use", "## Usage"),
        generated + "One more line.\n",
        generated.replace("license: mit", "license: apache-2.0"),
        blank.replace("[More Information Needed]", "Me", 1),
        f"{blank}\nThis is the model card of a chess engine.\n",
        f"{blank}\n- PEFT 0.21.2 did not work for us\n",
        "# Mine",
    ):
        assert is_hand_written(edited), edited


def test_the_card_that_transformers_makes_is_not_by_hand(hub: HubServer) -> None:
    HfApi().create_repo("alice/empty")
    assert not is_hand_written(str(create_and_tag_model_card("alice/empty", tags=["x"])))


def test_what_a_former_card_says_is_taken_over(folder: Path) -> None:
    former = {
        "license": "other", "license_name": "deepseek", "license_link": "LICENSE", "language": ["en", "zh"],
        "datasets": ["a/b"], "base_model": ["x/one", "x/two"], "tags": ["mine", "custom_code"],
        "extra_gated_prompt": "Be kind.", "library_name": "old", "pipeline_tag": "old",
    }  # fmt: skip
    for mark in ("", "\ufeff"):
        (folder / "README.md").write_text(f"{mark}---\n{yaml.safe_dump(former)}---\n", encoding="utf-8")
        plan = plan_push(folder, "alice/model", facts=CardFacts(tags=("new",)), ask_hub=False)
        card = plan.files["README.md"].decode()
        check_page(card)
        found = metadata_of(card)
        for name in ("license", "license_name", "license_link", "language", "datasets", "base_model",
                     "extra_gated_prompt"):  # fmt: skip
            assert found[name] == former[name]
        assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-generation"
        assert found["tags"][-2:] == ["new", "mine"]
    plan = plan_push(folder, "alice/model", facts=CardFacts(license="mit", base_model="x/three"), ask_hub=False)
    found = metadata_of(plan.files["README.md"].decode())
    assert found["license"] == "mit" and found["base_model"] == "x/three" and "license_name" not in found


def test_a_card_by_hand_needs_a_license_too(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match=r"license is missing: README.md is written by hand, and states no license"):
        plan_push(folder, "alice/model", facts=MIT, ask_hub=False)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    plan = plan_push(folder, "alice/model", facts=CardFacts(license="apache-2.0"), ask_hub=False)
    assert plan.files["README.md"] == folder / "README.md"
    assert any("what was said for it is left out" in note for note in plan.notes)


# ------------------------------------------------------------------------------------------------------------ trainers
def trainer_of(model: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, **options) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, logging_steps=1,
        save_strategy="no", **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows(), processing_class=tokenizer)


def test_trainer_leaves_a_card_that_somebody_wrote(hub: HubServer, tiny_model: Callable, tmp_path: Path) -> None:
    options = {"push_to_hub": True, "hub_model_id": "alice/model", "hub_token": WRITER}
    trainer = trainer_of(tiny_model(), tmp_path / "run", **options)
    ModelCardCallback(license="mit", base_model="alice/base").add_to(trainer)
    trainer.train()
    trainer.push_to_hub()
    card = hub.files("alice/model")["README.md"].decode()
    assert "base_model: alice/base" in card and "optimizer steps" in check_page(card)
    edited = card.replace("## Use", "## My words\n\n## Use").encode()
    HfApi(token=WRITER).upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id="alice/model")
    assert (tmp_path / "run" / "README.md").is_file()
    trainer.push_to_hub()
    assert hub.files("alice/model")["README.md"] == edited and not (tmp_path / "run" / "README.md").exists()
    # Another branch has a card of its own.
    HfApi(token=WRITER).create_branch("alice/model", branch="dev")
    trainer.args.hub_revision = "dev"
    trainer.push_to_hub()
    assert hub.files("alice/model", "dev")["README.md"] == edited
    # One that lies in the folder goes up where the repository has none that somebody wrote.
    mine = "---\nlicense: mit\n---\n# In the folder\n"
    (tmp_path / "run" / "README.md").write_text(mine)
    trainer.push_to_hub()
    assert hub.files("alice/model", "dev")["README.md"] == edited
    assert (tmp_path / "run" / "_README.md").read_text() == mine, "it is kept where it is not uploaded"
    trainer.args.hub_revision = None
    HfApi(token=WRITER).delete_file("README.md", "alice/model")
    (tmp_path / "run" / "README.md").write_text(mine)
    trainer.push_to_hub()
    assert hub.files("alice/model")["README.md"].decode() == mine


def test_what_the_card_callback_refuses(tiny_model: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base_model='/my/base' is not allowed"):
        ModelCardCallback(license="mit", base_model="/my/base")
    with pytest.raises(ValueError, match="license='Apache 2' is not allowed"):
        ModelCardCallback(license="Apache 2")
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"call add_to\(trainer\) instead"):
        Trainer(tiny_model(), arguments, train_dataset=Rows(), callbacks=[ModelCardCallback(license="mit")])
    (tmp_path / "routing.py").write_text("mine")
    with pytest.raises(ValueError, match=r"routing.py: these are names of the family's code"):
        trainer_of(tiny_model(), tmp_path, push_to_hub=False).callback_handler.on_push_begin(
            arguments, TrainerState(), TrainerControl()
        )
    assert (tmp_path / "routing.py").read_text() == "mine"


def test_a_hub_that_cannot_be_asked_does_not_stop_a_training(
    hub: HubServer, tiny_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(card_of(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    write_card(tmp_path, "alice/model", MIT, {}, token=WRITER)
    assert not (tmp_path / "README.md").exists(), "it could take the place of one that somebody wrote"
    write_card(tmp_path, None, MIT, {})
    assert not is_hand_written((tmp_path / "README.md").read_text())
    write_card(tmp_path / "nothing", None, MIT, {})


def test_an_adapter_in_training(hub: HubServer, tiny_model: Callable, tmp_path: Path) -> None:
    base = tiny_model()
    adapted = get_peft_model(base, expert_lora_config(base, r=2))
    trainer = trainer_of(adapted, tmp_path / "run", push_to_hub=True, hub_model_id="alice/lora", hub_token=WRITER)
    with pytest.raises(ValueError, match="base_model is missing: the adapter names"):
        ModelCardCallback(license="mit").add_to(trainer)
    ModelCardCallback(license="mit", base_model="alice/base").add_to(trainer)
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("alice/lora")
    assert "adapter_model.safetensors" in files and not [name for name in files if name.endswith(".py")]
    assert "deepseekmoe merge alice/base alice/lora merged" in files["README.md"].decode()
    assert not any(WRITER.encode() in content for content in files.values())


def test_the_token_of_a_trainer(tiny_model: Callable, tmp_path: Path) -> None:
    hidden = _HiddenToken(WRITER)
    assert hidden == WRITER and f"Bearer {hidden}" == f"Bearer {WRITER}" and WRITER not in repr(hidden)
    assert copy.copy(hidden) == WRITER and copy.deepcopy([hidden]) == [WRITER]
    assert pickle.loads(pickle.dumps(hidden)) is None
    trainer = trainer_of(tiny_model(), tmp_path, hub_token=WRITER)
    assert type(trainer.args.hub_token) is _HiddenToken
    trainer.args.hub_token = WRITER
    trainer.train()
    trainer.save_model()
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).hub_token is None
    other = trainer_of(nn.Linear(2, 2), tmp_path, hub_token=WRITER)
    assert type(other.args.hub_token) is str, "another model's trainer is none of our business"


def test_code_beside_a_wrapped_model(tiny_model: Callable, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model(), tmp_path)
    assert sum(isinstance(callback, RemoteCodeCallback) for callback in trainer.callback_handler.callbacks) == 1
    callback = RemoteCodeCallback()
    for rank, expected in ((1, 0), (0, len(code_files()))):
        trainer.state.is_world_process_zero = rank == 0
        wrapped = nn.DataParallel(tiny_model())
        callback.on_push_begin(trainer.args, trainer.state, trainer.control, model=wrapped)
        assert len(list(tmp_path.glob("*.py"))) == expected
