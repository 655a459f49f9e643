"""The ablation of architectures: its models, its texts, its results, and what is said of them."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from paths import ROOT

from modeling_deepseekmoe import inspect_model


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def architecture(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("architecture")


def test_the_ladder_is_equal_in_parameters_and_computation(architecture: ModuleType, tmp_path: Path) -> None:
    settings = architecture.Training()
    sizes = architecture.sizes(settings)
    equal = ("switch", "gshard", "shared", "fine-2", "fine-4", "fine-4-bias", "fine-4-alone", "fine-4-unscaled")
    for name in equal:
        of_gate = (sizes[name]["total_parameters"] - sizes["gshard"]["total_parameters"]) * 2  # FLOPs; biases too
        figures = {
            "expert_parameters": 0,
            "total_parameters": 0.01 * sizes["gshard"]["total_parameters"],
            "forward_flops_per_token": abs(of_gate),  # a gate has a row more for each expert, and nothing else differs
        }
        for figure, off in figures.items():
            assert sizes[name][figure] == pytest.approx(sizes["gshard"][figure], abs=off), (name, figure)
    dense = sizes["dense"]["forward_flops_per_token"]
    assert dense == pytest.approx(sizes["gshard"]["forward_flops_per_token"], rel=0.01)
    assert sizes["dense-all"]["total_parameters"] == pytest.approx(sizes["gshard"]["total_parameters"], rel=0.01)
    assert sizes["gshard-1.5"]["expert_parameters"] == 1.5 * sizes["gshard"]["expert_parameters"]
    architecture.BY_NAME["fine-4"].config(settings).save_pretrained(tmp_path)
    report = inspect_model(tmp_path)  # what `deepseekmoe inspect` shows of a model that was saved
    assert report.total_parameters == sizes["fine-4"]["total_parameters"]


def test_batches_go_over_all_blocks_before_one_comes_again(architecture: ModuleType) -> None:
    blocks = torch.arange(10)[:, None]
    settings = architecture.Training(steps=7, batch_size=3)
    batches = list(architecture._training_batches(blocks, settings, seed=1))
    seen = torch.cat(batches).flatten().tolist()
    assert [len(batch) for batch in batches] == [3] * 7
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]
    again = torch.cat(list(architecture._training_batches(blocks, settings, seed=1)))
    assert torch.equal(again, torch.cat(batches))


def test_results_of_other_settings_are_refused(architecture: ModuleType, tmp_path: Path) -> None:
    data = architecture.Corpus(torch.zeros(4, 8, dtype=torch.long), {"a": torch.ones(2, 8, dtype=torch.long)}, "")
    settings, path = architecture.Training(steps=2), tmp_path / "results.json"
    figures = architecture.load_results(path, settings, data)
    path.write_text(json.dumps(figures))
    assert architecture.load_results(path, settings, data) == json.loads(json.dumps(figures))
    with pytest.raises(ValueError, match="other training"):
        architecture.load_results(path, architecture.Training(steps=3), data)
    other = architecture.Corpus(data.training + 1, data.validation, "")
    with pytest.raises(ValueError, match="other corpus_sha256"):
        architecture.load_results(path, settings, other)
    # A model may be changed as long as it was not measured.
    figures["ladder"]["gshard"]["top_k"] = 3
    path.write_text(json.dumps(figures))
    assert architecture.load_results(path, settings, data)["ladder"]["gshard"]["top_k"] == 2
    path.write_text(json.dumps(figures | {"runs": [{"architecture": "gshard", "seed": 0}]}))
    with pytest.raises(ValueError, match="other ladder"):
        architecture.load_results(path, settings, data)


@pytest.mark.parametrize("name", ["fine-4-bias", "dense"])
def test_a_run(
    name: str, architecture: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Callable
) -> None:
    corpus = script("corpus")
    tokenizer = corpus.train_tokenizer(["the gate chooses experts for every token"] * 9, 300)
    validation = {
        domain: torch.randint(1, 300, (4, 16), generator=torch.Generator().manual_seed(1)) for domain in ("a", "b")
    }
    blocks = torch.randint(1, 300, (8, 16), generator=torch.Generator().manual_seed(0))
    data = architecture.Corpus(blocks, validation, tokenizer.to_str())
    monkeypatch.setattr(architecture, "read_corpus", lambda block_size: data)
    monkeypatch.setattr(architecture, "RUNS", tmp_path)
    monkeypatch.setattr(architecture, "SINGLE_BLOCKS", 1)
    settings = architecture.Training(steps=2, batch_size=2, block_size=16)
    run = architecture.train((architecture.BY_NAME[name], 0, settings))
    assert run["loss"] == pytest.approx(sum(run["loss_by_domain"].values()) / 2) and 0 < run["loss"] < 12
    assert (tmp_path / f"{name}-0" / "tokenizer.json").exists()
    assert len((tmp_path / "validation.jsonl").read_text().splitlines()) == 8
    if name == "dense":
        assert run["measured"] is None and run["max_violation_global"] is None
        return
    measured = run["measured"]
    assert len(measured["single"]["layers"][0]["experts"]) == 63
    assert [point["masked"] for point in measured["redundancy"]["points"]] == [0, 4, 8, 12, 16]
    assert "table" not in json.dumps(measured)


def run_of(name: str, seed: int, loss: float, rise: float) -> dict[str, Any]:
    points = [
        {"masked": n, "share": n / 16, "loss": loss, "rise": rise * n, "error": 0.0, "rise_with_the_same_sum": n * 1.0}
        for n in range(3)
    ]
    return {
        "architecture": name, "seed": seed, "loss": loss, "max_violation_global": 0.25,
        "measured": {"redundancy": {"points": points}} if name in ("gshard", "fine-4") else None,
    }  # fmt: skip


def test_tables(architecture: ModuleType, script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    results = script("architecture_results")
    losses = {"gshard": (3.0, 3.2), "shared": (2.9, 3.4), "fine-2": (2.8, 3.0), "fine-4": (2.7, 2.9)}
    runs = [
        run_of(name, seed, loss, 0.1 if name == "gshard" else 0.3)
        for name, own in losses.items()
        for seed, loss in enumerate(own)
    ]
    figures = {"runs": runs, "sizes": architecture.sizes(architecture.Training()), "model": {"num_hidden_layers": 3},
               "training": {"steps": 10, "batch_size": 10, "block_size": 100, "learning_rate": 0.5},
               "corpus_tokens": 20_000, "passes_over_the_corpus": 0.5}  # fmt: skip
    ladder = results.ladder_table(figures)
    assert ladder.startswith("0.01 M training tokens in 10 steps, 0.50 of a pass over 0.02 M tokens")
    assert "| 3.100 (3.000 to 3.200) | | 0.25 (0.25 to 0.25) |" in ladder and "-0.300, -0.300" in ladder
    order = results.order(figures)
    assert "+0.050 (-0.100 to +0.200) | 1 of 2 seeds" in order and "-0.300 (-0.300 to -0.300) | 2 of 2 seeds" in order
    redundancy = results.redundancy_table(figures)
    assert "| 2/16 | +0.600 (+0.600 to +0.600) | not measured | +0.200 (+0.200 to +0.200) |" in redundancy
    assert "| not measured | +0.400, +0.400 | |\n| 1/16, same" in redundancy
    assert "| 2/16, same sum of weights | +2.000 (+2.000 to +2.000) |" in redundancy
    results.draw(figures, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"architecture_ladder.png", "architecture_redundancy.png"}


def test_texts_are_split_by_documents(script: Callable[[str], ModuleType]) -> None:
    corpus = script("corpus")
    words = [" ".join(f"word{number}-{place}" for place in range(40)) for number in range(300)]
    found = [corpus.Document("python", f"file{number}", text) for number, text in enumerate(words)]
    training, held_out = corpus.split(found)
    assert len(training) + len(held_out) == 300 and 5 < len(held_out) < 45
    copies = [corpus.Document("data", f"copy{number}", f"{text} again") for number, text in enumerate(words)]
    training, held_out = corpus.split([*found, *copies])
    texts = {document.text for document in training}
    assert held_out
    for one in held_out:
        assert f"{one.text} again" not in texts and one.text.removesuffix(" again") not in texts


def test_a_paragraph_counts_once(script: Callable[[str], ModuleType]) -> None:
    corpus, seen = script("corpus"), set()
    text = "Heading\n\nA paragraph that is long enough to count.\n\nA  paragraph that is long\nenough to count."
    assert list(corpus._new_paragraphs(text, seen)) == ["Heading", "A paragraph that is long enough to count."]
    assert list(corpus._new_paragraphs(text, seen)) == ["Heading"]
