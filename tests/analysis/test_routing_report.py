"""The routing report: its numbers against loops, its page, the command."""

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import V3_LIKE, Golden
from dense_models import dense_model
from html_pages import Page
from transformers import AutoTokenizer
from typer.testing import CliRunner

from modeling_deepseekmoe.analysis.evaluation import RoutingTrace, expert_load, trace_routing
from modeling_deepseekmoe.analysis.routing_page import make_page
from modeling_deepseekmoe.analysis.routing_report import (
    RoutingReport,
    batch_violations_of,
    co_activation_of,
    loads_of,
    make_report,
    top_tokens_of,
)
from modeling_deepseekmoe.analysis.texts import read_texts, token_batches
from modeling_deepseekmoe.cli.app import app

blocks = torch.randint(3, 96, (6, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def tokenizer(source: Path) -> object:
    return AutoTokenizer.from_pretrained(source)


@pytest.fixture
def trace(tiny_model: Callable) -> RoutingTrace:
    return trace_routing(tiny_model(), blocks.split(4))


def test_trace_keeps_every_choice(tiny_model: Callable, trace: RoutingTrace) -> None:
    model = tiny_model().eval()
    logits = model(blocks, output_router_logits=True).router_logits
    assert trace.layers == (1, 2) and trace.batch_lengths == (36, 18) and trace.num_experts == 8
    assert torch.equal(trace.token_ids, blocks.flatten())
    for layer, layer_logits in enumerate(logits):
        scores = layer_logits.softmax(-1)
        weights, ids = scores.topk(3)
        assert torch.equal(trace.expert_ids[layer].long(), ids)
        assert torch.allclose(trace.weights[layer], weights, atol=1e-6)
        entropy = -(scores * scores.log()).sum(-1).mean().item()
        assert trace.entropy[layer].item() == pytest.approx(entropy, rel=1e-5)
    loads = expert_load(model, blocks.split(4))
    assert torch.equal(loads_of(trace), torch.stack([loads[1], loads[2]]))
    with pytest.raises(ValueError, match="at least one batch"):
        trace_routing(model, [])
    with pytest.raises(ValueError, match="no MoE layer"):
        trace_routing(tiny_model(n_routed_experts=0), [blocks])


def test_numbers_against_loops(trace: RoutingTrace) -> None:
    ids = trace.expert_ids[1].tolist()
    violations = []
    for part in (ids[:36], ids[36:]):
        loads = [sum(row.count(expert) for row in part) for expert in range(8)]
        violations.append(max(loads) / (sum(loads) / 8) - 1)
    assert batch_violations_of(trace)[:, 1].tolist() == pytest.approx(violations)

    load = [sum(row.count(expert) for row in ids) / 54 for expert in range(8)]
    table, compared = co_activation_of(trace, 2), 0
    for one in range(8):
        for other in range(8):
            pairs = sum(one in row and other in row for row in ids)
            expected = 54 * load[one] * load[other] * (2 / 3) / (1 - (load[one] + load[other]) / 6)
            if one == other or expected < 5:
                assert table[one, other].isnan()
            else:
                assert table[one, other].item() == pytest.approx(pairs / expected, rel=1e-5)
                compared += 1
    assert compared > 10

    tokens, occurrences = trace.token_ids.tolist(), Counter(trace.token_ids.tolist())
    prior = {token: 3 / 8 * times for token, times in occurrences.items()}
    for expert, entries in enumerate(top_tokens_of(trace, 2, count=3)):
        own = Counter(token for token, row in zip(tokens, ids, strict=True) if expert in row)
        scored = {}
        for token, a in prior.items():
            odds, y, others = [], own[token], 3 * occurrences[token] - own[token]
            for count, total in ((y, own.total()), (others, 3 * 54 - own.total())):
                odds.append((count + a) / (total + sum(prior.values()) - count - a))
            score = math.log(odds[0] / odds[1]) / math.sqrt(1 / (y + a) + 1 / (others + a))
            if score > 0 and y:
                scored[token] = score
        best = sorted(scored.values(), reverse=True)[:3]
        assert [entry["log_odds"] for entry in entries] == pytest.approx(best) and len(best) == 3
        for entry in entries:
            assert scored[entry["token_id"]] == pytest.approx(entry["log_odds"])
            assert entry["count"] == own[entry["token_id"]]
            assert entry["share"] == pytest.approx(entry["count"] / occurrences[entry["token_id"]])


def test_independent_choices_have_a_co_activation_of_one() -> None:
    """Random choices of equal chance: observed equals expected up to noise."""
    ids = torch.rand(1, 40_000, 12, generator=torch.Generator().manual_seed(0)).topk(4).indices.short()
    trace = RoutingTrace((0,), 12, torch.zeros(40_000, dtype=torch.long), (40_000,), ids, torch.ones(ids.shape),
                         torch.zeros(1))  # fmt: skip
    table = co_activation_of(trace, 0)
    off_diagonal = table[~torch.eye(12, dtype=torch.bool)]
    assert (off_diagonal - 1).abs().max() < 0.1 and abs(off_diagonal.mean().item() - 1) < 0.01


def test_the_page_is_self_contained_and_escaped(tiny_model: Callable, tokenizer: object) -> None:
    text = '<b>bold</b> & more: "quotes"\n\tand tabs ' * 20
    report = make_report(tiny_model(vocab_size=256), tokenizer, iter([text]), title="<my> model", source="a&b.txt",
                         block_size=64)  # fmt: skip
    page = Page(make_page(report))
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    images = [base64.b64decode(address.split(",", 1)[1]) for address in page.addresses]
    assert len(images) == 4 and all(image.startswith(b"\x89PNG") and len(image) > 5_000 for image in images)
    assert not {"script", "link", "iframe", "b", "my"} & set(page.tags)
    assert "Routing of <my> model" in page.text and "a&b.txt" in page.text
    for heading in ("Load of every expert", "Imbalance", "Co-activation", "Gate weights", "Typical tokens"):
        assert heading in page.text
    assert page.text.count("layer 1") == 1 and "\u2423" in page.text
    numbers = json.loads(json.dumps(report.to_dict()))
    assert [layer["layer"] for layer in numbers["layers"]] == [1, 2]
    for idx, layer in enumerate(numbers["layers"]):
        assert layer["tokens_per_expert"] == report.loads[idx].tolist()
        assert sum(layer["tokens_per_expert"]) == numbers["tokens"] * 3
        assert len(layer["top_tokens"]) == 8 and len(layer["gate_weight_quantiles"]["by_rank"]) == 3
        assert layer["most_co_activated"][0]["observed_over_expected"] > 1


@pytest.mark.parametrize(("layers", "experts"), [(28, 64), (1, 6)])
def test_pages_of_all_sizes(tokenizer: object, layers: int, experts: int) -> None:
    """With one token only, dead experts, and equal weights too."""
    tokens = 64 if layers > 1 else 2
    ids = torch.rand(layers, tokens, experts).topk(4).indices.short()
    weights = torch.rand(layers, tokens, 4) if layers > 1 else torch.ones(layers, tokens, 4)
    trace = RoutingTrace(tuple(range(layers)), experts, torch.randint(0, 256, (tokens,)), (tokens,), ids, weights,
                         torch.zeros(layers))  # fmt: skip
    page = Page(make_page(RoutingReport(trace, tokenizer, "model", {})))
    assert page.text.count("expert") > layers
    assert ("12 of" in page.text) == (layers > 12)


def test_texts_of_files_and_datasets(tmp_path: Path) -> None:
    rows = [{"text": "first", "other": 1}, {"text": "second", "other": 2}]
    (tmp_path / "a.txt").write_text("plain text", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text("text,other\nfirst,1\nsecond,2\n", encoding="utf-8")
    assert list(read_texts(str(tmp_path / "a.txt"))) == ["plain text"]
    assert list(read_texts(str(tmp_path / "a.jsonl"))) == ["first", "second"]
    with pytest.raises(ValueError, match=r"column='body' .*a\.jsonl, line 1 .* 'text', 'other'"):
        list(read_texts(str(tmp_path / "a.jsonl"), column="body"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary is not allowed as data: it is no text in UTF-8"):
        list(read_texts(str(tmp_path / "binary")))
    (tmp_path / "broken.jsonl").write_text('\ufeff{"text": "a"}\n{"text"\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2 is no JSON"):
        list(read_texts(str(tmp_path / "broken.jsonl")))
    assert list(read_texts(str(tmp_path / "a.txt"), max_characters=5)) == ["plain"]
    with pytest.raises(FileNotFoundError, match=r"absent\.txt is no file"):
        list(read_texts(str(tmp_path / "absent.txt")))  # and nobody asks the Hub for it
    assert list(read_texts(str(tmp_path / "a.csv"))) == ["first", "second"]
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert list(read_texts(str(folder))) == ["first", "second"]


def test_datasets_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        list(read_texts(str(tmp_path)))


def test_batches(tokenizer: object) -> None:
    sizes = {"max_tokens": 50, "block_size": 8, "batch_size": 4}
    batches = token_batches(iter(["abcdefg", "h" * 100, "never read"]), tokenizer, **sizes)
    assert [tuple(batch.shape) for batch in batches] == [(4, 8)]  # two more blocks are no batch
    assert tokenizer.decode(batches[0][0, :7]) == "abcdefg" and batches[0][0, 7] == tokenizer.eos_token_id
    assert [tuple(b.shape) for b in token_batches(iter(["abc"]), tokenizer, **sizes)] == [(1, 4)]
    with pytest.raises(ValueError, match="holds 0 tokens"):
        token_batches(iter([""]), tokenizer, **sizes)
    for name in sizes:
        with pytest.raises(ValueError, match=rf"{name}=0 is not allowed"):
            token_batches(iter(["abc"]), tokenizer, **{**sizes, name: 0})


@pytest.mark.parametrize("variant", [{}, V3_LIKE], ids=["softmax", "noaux"])
def test_command(tiny_model: Callable, tokenizer: object, tmp_path: Path, variant: dict) -> None:
    tiny_model(vocab_size=256, **variant).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    command = ["report", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--block-size", "64"]
    page = tmp_path / "sub" / "page.html"
    result = CliRunner().invoke(app, [*command, "--output", str(page)])
    assert result.exit_code == 0, result.output
    assert "2 layers, MaxVio_global" in result.output
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    result = CliRunner().invoke(app, [*command, "--json"])
    numbers = json.loads(re.search(r"^\{.*^\}", result.stdout, re.DOTALL | re.MULTILINE)[0])
    assert numbers["tokens"] == 768 and len(numbers["layers"]) == 2


def test_command_on_the_official_generations(golden: Golden, tokenizer: object, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = "".join(chr(33 + number % 60) for number in range(300))  # tokens that the small vocabularies have
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    result = CliRunner().invoke(
        app, ["report", str(golden.folder), "--data", str(tmp_path / "text.txt"), "--json",
              "--tokenizer", str(tmp_path / "tokenizer")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output


def test_command_with_bad_input(
    tiny_model: Callable, tokenizer: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # one of the commands below is right, and writes its page
    tiny_model(vocab_size=256, n_routed_experts=0).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("Some text of more than one token.", encoding="utf-8")

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["report", *arguments])
        return result.exit_code, result.output

    data = str(tmp_path / "text.txt")
    code, output = run(str(tmp_path / "dense"), "--data", data)
    assert code == 2 and "no MoE layer" in output
    code, output = run(str(tmp_path / "nothing"), "--data", data)
    assert code == 2 and "nothing" in output
    dense_model("llama").save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    code, output = run(str(tmp_path / "llama"), "--data", data)
    assert code == 2 and "LlamaForCausalLM has no MoE layer" in output
    tiny_model().save_pretrained(tmp_path / "small")  # of 96 tokens, and the tokenizer has 256
    code, output = run(str(tmp_path / "small"), "--data", data, "--tokenizer", str(tmp_path / "dense"))
    assert code == 2 and "vocab_size=96" in output and "another model's tokenizer" in output
    model = str(tmp_path / "model")
    tiny_model(vocab_size=256).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for option, value, message in (
        ("--max-tokens", "0", "max_tokens=0"), ("--max-tokens", "1", "at least 2"), ("--dtype", "nn", "dtype='nn'"),
        ("--output", str(tmp_path), "is a folder"), ("--column", "text", "2 layers"),
    ):  # fmt: skip
        code, output = run(model, "--data", data, option, value)
        assert (code, message in output) == (0 if message == "2 layers" else 2, True), output
