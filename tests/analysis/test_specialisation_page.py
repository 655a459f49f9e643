"""The page of `deepseekmoe analyze`, and the command."""

import base64
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import run
from html_pages import Page
from matplotlib.text import Text
from other_families import family
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_deepseekmoe import measure_specialisation
from modeling_deepseekmoe.analysis import specialisation_plots
from modeling_deepseekmoe.analysis.evaluation import perplexity
from modeling_deepseekmoe.analysis.specialisation_page import make_page
from modeling_deepseekmoe.analysis.texts import token_batches

GENERATOR = torch.Generator().manual_seed(3)
DOMAINS = {name: list(torch.randint(3, 90, (2, 3, 12), generator=GENERATOR)) for name in ("<law>", "code", "talk")}


@pytest.fixture
def tokenizer(source: Path) -> Any:
    return AutoTokenizer.from_pretrained(source)


def sources(page: Page) -> list[bytes]:
    return [base64.b64decode(address.split(",", 1)[1]) for address in page.addresses]


def test_headings_fit_into_their_plots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn, make = [], specialisation_plots.new_figure
    monkeypatch.setattr(specialisation_plots, "new_figure", lambda *size: drawn.append(make(*size)) or drawn[-1])
    title = "Distance of halves of two domains; on the diagonal, of the halves of one"
    table = [[0.1, 0.2], [0.2, 0.1]]
    specialisation_plots.plot_tables({"": table}, tmp_path / "a.png", title=title, label="distance", names=("a", "b"))
    (figure,) = drawn
    heading = next(text for text in figure.findobj(Text) if text.get_text().replace("\n", " ") == title)
    extent = heading.get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.x1


def test_the_page_is_self_contained_and_escaped(tiny_model: Callable) -> None:
    measured = measure_specialisation(tiny_model(), DOMAINS, title="<my> model", source="a&b.jsonl", single_experts=2)
    other = measure_specialisation(
        family("qwen3_moe").eval(), {"": DOMAINS["code"]}, title="<my> model", source="a&b.jsonl"
    )
    for page, images in (
        (make_page(measured, "<{}>".format), 12),
        (make_page(measured, str, (other, str)), 14),
    ):
        read = Page(page)
        assert len(sources(read)) >= images and all(image.startswith(b"\x89PNG") for image in sources(read))
        assert all(address.startswith("data:image/png;base64,") for address in read.addresses)
        assert "<my>" not in page and "<law>" not in page and "<my> model" in read.text and "<law>" in read.text
        for section in measured.sections.values():
            assert section.heading in read.text and section.reading in read.text and section.source in read.text
    assert "<my> model (2): The model has no shared experts" in read.text
    assert "rise with the same sum" in read.text
    assert "<my> model (2): The text has no domains" in read.text


def test_a_page_of_empty_sections(tiny_model: Callable) -> None:
    """One domain, one block, K = 1, no shared experts: reasons, and a page all the same."""
    model = tiny_model(num_experts_per_tok=1, n_shared_experts=None)
    measured = measure_specialisation(model, {"": [DOMAINS["code"][0][:1]]}, title="small", source="x")
    text = Page(make_page(measured, str)).text
    for reason in ("K = 1: each token uses", "has no shared experts", "has no domains", "--single-experts N"):
        assert reason in text
    assert "not known" in text  # the standard error of a single block


def write_rows(path: Path, **columns: list[Any]) -> Path:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def model(tiny_model: Callable, tokenizer: Any, tmp_path: Path) -> Path:
    tiny_model(vocab_size=256).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_command(model: Path, tmp_path: Path) -> None:
    texts = ["The gate chooses experts. " * 9, "def route(): return 1\n" * 9] * 2
    data = write_rows(tmp_path / "rows.jsonl", text=texts, domain=["prose", "code"] * 2)
    sizes = ("--block-size", "32", "--max-tokens", "256")
    page = tmp_path / "sub" / "page.html"
    code, output = run("analyze", model, "--data", data, "--domains", "domain", *sizes, "--output", page)
    assert code == 0 and "model: loss" in output and "One expert at a time: Not asked for" in output
    shown = Page(page.read_text(encoding="utf-8")).text
    assert "prose and code" in shown and "256 in 8 sequences of at most 32" in shown and "by chance" in shown
    summary = re.search(r"Domains: (Mean distance of two domains .*)$", output, re.MULTILINE)
    assert summary is not None and summary[1] in shown  # what is printed stands on the page too
    code, output = run("analyze", model, "--data", data, *sizes, "--json", "--against", model, "--single-experts", "1")
    found = json.loads(re.search(r"^\[$.*^\]$", output, re.DOTALL | re.MULTILINE)[0])
    assert code == 0 and len(found) == 2 and found[0]["loss"] == found[1]["loss"]
    assert "no domains" in found[0]["sections"]["domains"]["empty"]
    assert "NaN" not in output and len(found[0]["sections"]["single"]["figures"]["layers"][0]["experts"]) == 1
    assert all(isinstance(one["token"], str) for one in found[0]["typical_tokens"][0]["experts"][0])
    code, output = run("analyze", model, "--data", data, *sizes, "--against", model, "--output", page)
    assert code == 0 and f"{model} (2)" in page.read_text(encoding="utf-8")  # two of one name have their paths


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "text.txt", "--domains", "domain"), "holds no rows, and so no columns"),
        (("--data", "nothing.jsonl"), "nothing.jsonl is no file"),
        (("--data", "empty.txt"), "holds 0 tokens"),
        (("--data", "empty.jsonl", "--domains", "domain"), "holds no rows"),
        (("--data", "rows.jsonl", "--domains", "kind"), "line 1 has no such field, but 'text', 'domain'"),
        (("--data", "rows.jsonl", "--split", "test"), "split='test' is not allowed for rows.jsonl"),
        (("--data", "text.txt", "--subset", "en"), "subset='en' is not allowed for text.txt"),
        (("--data", "text.txt", "--column", "body"), "column='body' is not allowed for text.txt"),
        (("--data", "text.txt", "--json", "--output", "page.html"), "not allowed with --json"),
        (("--data", "text.txt", "--block-size", "1"), "Invalid value for '--block-size'"),
        (("--data", "text.txt", "--device-map", "cuda"), "torch finds no CUDA device"),
        (
            ("--data", "text.txt", "--against", "dense"),
            "dense: DeepseekMoeForCausalLM has no MoE layer",
        ),
        (
            ("--data", "text.txt", "--against", "adapter"),
            "adapter: it is an adapter, and does not name its base",
        ),
        (("--data", "text.txt", "--against", "./nowhere"), "./nowhere: there is no such folder"),
        (("--data", "text.txt", "--tokenizer", "adapter"), "it holds no tokenizer"),
        (("--data", "rows.jsonl", "--domains", "domain", "--max-tokens", "8"), "max_tokens=8 is not allowed"),
        (("--data", "text.txt", "--output", "."), "it is a folder"),
        (("--data", "text.txt", "--against", "nowhere"), "Error: nowhere: "),
        (("--data", "text.txt", "--single-experts", "-1"), "single_experts=-1"),
    ],
)
def test_mistakes(
    options: tuple[str, ...],
    message: str,
    model: Path,
    tiny_model: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "text.txt").write_text("Some text of more than one token.", encoding="utf-8")
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text("", encoding="utf-8")
    write_rows(tmp_path / "rows.jsonl", text=["some text"] * 2, domain=["a", "b"])
    tiny_model(n_routed_experts=None).save_pretrained(tmp_path / "dense")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    code, output = run("analyze", model, *options)
    assert code == 2 and message in " ".join(output.split()), output


def test_a_domain_that_is_too_short_is_named(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", text=["many words " * 40, "more words " * 40, "few"], domain=[1, 2, 3])
    options = ("--domains", "domain", "--block-size", "16", "--max-tokens", "300", "--json")
    code, output = run("analyze", model, "--data", data, *options)
    reason = "Left out: 3: it holds fewer than two blocks of 16 tokens."
    found = json.loads(re.search(r"^\{$.*^\}$", output, re.DOTALL | re.MULTILINE)[0])
    assert code == 0 and output.count(reason) == 2  # said, and in the result
    assert found["sections"]["domains"]["notes"] == [reason]
    sizes = [one["tokens"] for one in found["sections"]["domains"]["figures"]["domains"]]
    assert sizes == [144, 144]  # 300 / 2 each, not 300 / 3


def test_an_adapter_over_its_base(model: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "text.txt").write_text("The gate chooses experts. " * 9, encoding="utf-8")
    options = ("--data", tmp_path / "text.txt", "--block-size", "16", "--json")
    losses = []
    for name in ("model", "adapter"):
        code, output = run("analyze", tmp_path / name, *options, "--tokenizer", model)
        losses.append(json.loads(re.search(r"^\{$.*^\}$", output, re.DOTALL | re.MULTILINE)[0])["loss"])
        assert code == 0
    batches = token_batches(iter(["The gate chooses experts. " * 9]), AutoTokenizer.from_pretrained(model),
                            max_tokens=16384, block_size=16, batch_size=4)  # fmt: skip
    own = math.log(perplexity(adapted, batches))
    assert losses[1] == pytest.approx(own, abs=1e-5) and abs(losses[0] - own) > 1e-3


@pytest.mark.parametrize("command", ["report", "analyze", "esft-select"])
def test_ignored_options_are_refused_before_a_model_is_loaded(command: str, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (tmp_path / "text.txt").write_text("some text", encoding="utf-8")
    data = ("--data", tmp_path / "text.txt")
    for options, message in (
        (("--split", "test"), "split='test' is not allowed"),
        (("--column", "body"), "a plain text has no columns"),
        *([(("--json", "--output", "x.html"), "not allowed with --json")] * (command != "esft-select")),
    ):
        code, output = run(command, model, *data, *options)
        assert code == 2 and message in " ".join(output.split()), output


def test_a_page_of_single_experts_without_shared_ones(tiny_model: Callable) -> None:
    found = measure_specialisation(tiny_model(n_shared_experts=None), DOMAINS, title="m", source="x", single_experts=2)
    single = found.sections["single"]
    rises = {(row["layer"], one["expert"]): one["rise"] for row in single.figures["layers"] for one in row["experts"]}
    layer, expert = max(rises, key=rises.__getitem__)
    assert f"missed most, of {len(rises)} tried, is {expert} in layer {layer}" in single.summary
    assert "shared" not in single.summary and single.summary in Page(make_page(found, str)).text
