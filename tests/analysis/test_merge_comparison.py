"""A merged model against the adapter over its base, on text."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runner import run
from lora_cases import direct
from peft import PeftModel
from tokenizers_of_tests import tokenizer
from tolerances import SAME_COMPUTATION
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_deepseekmoe import optimize_expert_lora, prepare_esft, save_esft
from modeling_deepseekmoe.analysis.merge_comparison import MergeComparison, compare_merged
from modeling_deepseekmoe.conversion import convert, merge_adapter
from modeling_deepseekmoe.quantization.config import StackedExpertsConfig

SIZES = {"vocab_size": 300, "hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 16}
BATCHES = list(torch.randint(3, 300, (3, 2, 17), generator=torch.Generator().manual_seed(4)))


@pytest.fixture
def model(tiny_model: Callable) -> nn.Module:
    torch.manual_seed(1)
    return tiny_model(**SIZES, initializer_range=0.1).eval()


@pytest.fixture
def folders(model: nn.Module, tmp_path: Path) -> Path:
    """A base in float32 and in nf4, each with a tokenizer, and an adapter."""
    model.save_pretrained(tmp_path / "plain")
    tokenizer().save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "nf4", dtype="nf4")
    direct(model).save_pretrained(tmp_path / "adapter")
    return tmp_path


@torch.no_grad()
def by_hand(model: nn.Module) -> tuple[float, list[int]]:
    """The perplexity, token by token, and the most probable tokens."""
    losses, chosen = [], []
    for rows in BATCHES:  # as they are: in bfloat16 a row's values depend on the other ones
        for row, logits in zip(rows, model(rows).logits.double(), strict=True):
            for place in range(len(row) - 1):
                losses.append(float(logits[place].logsumexp(0) - logits[place, row[place + 1]]))
                chosen.append(int(logits[place].argmax()))
    return math.exp(sum(losses) / len(losses)), chosen


@pytest.mark.parametrize("base", ["plain", "nf4"])
def test_figures_by_hand(base: str, folders: Path) -> None:
    """The adapter over nf4, whether the base that is named is quantised or is to be; merged into either of them."""
    own = {} if base == "nf4" else {"quantization_config": StackedExpertsConfig("nf4")}
    quantised = AutoModelForCausalLM.from_pretrained(folders / base, **own)
    adapted = optimize_expert_lora(PeftModel.from_pretrained(quantised, folders / "adapter")).eval()
    merge_adapter(folders / base, folders / "adapter", folders / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folders / "merged").eval()
    result = compare_merged(
        folders / base, folders / "adapter", folders / "merged", BATCHES, format="nf4" if base == "plain" else None
    )
    (before, first), (after, second) = by_hand(adapted), by_hand(merged)
    assert result.tokens == len(first) == 3 * 2 * 16 and result.base == "nf4"
    assert result.adapted_perplexity == pytest.approx(before, rel=SAME_COMPUTATION)
    assert result.merged_perplexity == pytest.approx(after, rel=SAME_COMPUTATION)
    same = sum(one == other for one, other in zip(first, second, strict=True)) / len(first)
    assert result.agreement == pytest.approx(same) and 0.3 < same <= 1
    assert before != after


def test_the_same_model_agrees_with_itself(folders: Path) -> None:
    merge_adapter(folders / "nf4", folders / "adapter", folders / "merged", dtype="float32")
    result = compare_merged(folders / "nf4", folders / "adapter", folders / "merged", BATCHES)
    assert result.agreement == 1 and result.merged == "float32"
    assert result.merged_perplexity == pytest.approx(result.adapted_perplexity, rel=SAME_COMPUTATION)
    merge_adapter(folders / "nf4", folders / "adapter", folders / "kept", dtype="keep")
    kept = compare_merged(folders / "nf4", folders / "adapter", folders / "kept", BATCHES)
    assert kept.merged == "nf4" and kept.adapted_perplexity == result.adapted_perplexity
    assert kept.merged_perplexity != pytest.approx(result.merged_perplexity, rel=SAME_COMPUTATION)
    plain = compare_merged(folders / "plain", folders / "adapter", folders / "merged", BATCHES)
    assert plain.base == "float32" and plain.agreement < 1


def test_what_is_said() -> None:
    text = str(MergeComparison(1234, "nf4", "bfloat16", 10.0, 10.5, 0.987654))
    assert text == (
        "on 1,234 tokens: the adapter over experts in nf4 has a perplexity of 10.0000, merged into bfloat16 10.5000; "
        "their most probable token is the same at 98.77% of the positions"
    )


def test_what_is_refused(model: nn.Module, folders: Path) -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        compare_merged(folders / "plain", folders / "adapter", folders / "plain", [])
    with pytest.raises(ValueError, match="format='int4' is not allowed: it must be one of nf4, fp8, mxfp4"):
        compare_merged(folders / "plain", folders / "adapter", folders / "plain", BATCHES, format="int4")
    with pytest.raises(ValueError, match=r"format='fp8' is not allowed: the experts of .*nf4 are stored in 'nf4'"):
        compare_merged(folders / "nf4", folders / "adapter", folders / "plain", BATCHES, format="fp8")
    config = json.loads((folders / "nf4" / "config.json").read_text())
    (folders / "nf4" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "x"}}))
    with pytest.raises(ValueError, match="format='x' is not allowed"):
        compare_merged(folders / "nf4", folders / "adapter", folders / "plain", BATCHES)


def test_on_the_command_line(model: nn.Module, folders: Path) -> None:
    (folders / "text.txt").write_text("Every token is sent to a few experts. " * 20)
    prepare_esft(model, {1: [0]})
    save_esft(model, folders / "esft")
    out, text = folders / "merged", ("--compare", folders / "text.txt")
    for wrong, message in (
        (("plain", "adapter", "--format", "nf4"), "--format: not allowed without --compare"),
        (("plain", "adapter", *text, "--format", "int4"), "format='int4' is not allowed"),
        (("plain", "adapter", "--compare", folders / "none.txt"), "none.txt is no file"),
        (("plain", "esft", *text), "it holds experts, and no LoRA adapter"),
        (("plain", "adapter", *text, "--max-tokens", 1), "max_tokens=1 is not allowed"),
        (("plain", "adapter", "--dtype", "float32"), "dtype='float32' is not allowed: the base is not quantised"),
    ):
        base, adapter, *options = wrong
        code, output = run("merge", folders / base, folders / adapter, out, *options)
        assert code == 2 and message in output and not out.exists(), message
    sizes = ("--max-tokens", 64, "--block-size", 16)
    code, output = run("merge", folders / "nf4", folders / "adapter", out, "--dtype", "float32", *text, *sizes)
    assert code == 0 and "of a base in nf4, written in float32" in output
    assert "on 60 tokens: the adapter over experts in nf4 has a perplexity of" in output
    assert "is the same at 100.00% of the positions." in output
    code, output = run("merge", folders / "plain", folders / "adapter", folders / "second", *text, "--format", "mxfp4")
    assert code == 0 and "the adapter over experts in mxfp4" in output and "merged into float32" in output
