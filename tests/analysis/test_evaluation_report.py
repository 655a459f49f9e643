"""Perplexity, expert load and the plots."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modeling_deepseekmoe.analysis.evaluation import expert_load, perplexity
from modeling_deepseekmoe.analysis.plots import plot_expert_load, plot_loss_curve

blocks = torch.randint(3, 96, (6, 9), generator=torch.Generator().manual_seed(2))


def test_perplexity_does_not_depend_on_the_batches(tiny_model: Callable) -> None:
    model = tiny_model()
    whole = perplexity(model, [blocks])
    logits = model.eval()(blocks).logits[:, :-1].log_softmax(-1)
    expected = math.exp(-logits.gather(-1, blocks[:, 1:, None]).mean().item())
    assert whole == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, blocks.split(4)) == pytest.approx(whole, rel=1e-5)
    with pytest.raises(ValueError, match="at least one batch"):
        perplexity(model, [])


def test_expert_load_counts_every_choice(tiny_model: Callable) -> None:
    model = tiny_model()
    model.train()
    loads = expert_load(model, blocks.split(4))
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert set(loads) == {1, 2}
    assert all(load.sum() == blocks.numel() * 3 for load in loads.values())
    logits = model.eval()(blocks, output_router_logits=True).router_logits[0]
    assert torch.equal(loads[1], torch.bincount(logits.topk(3).indices.flatten(), minlength=8))
    with pytest.raises(ValueError, match="no MoE layer"):
        expert_load(tiny_model(n_routed_experts=0), [blocks])


def test_plots_are_png_files_of_the_right_size(tmp_path: Path) -> None:
    plot_loss_curve([1, 2, 3], [3.0, 2.5, 2.4], tmp_path / "loss.png")
    loads = {layer: torch.randint(1, 100, (64,)) for layer in range(1, 28)}
    plot_expert_load(loads, tmp_path / "load.png")
    for name in ("loss.png", "load.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5_000
    with pytest.raises(ValueError, match="at least one MoE layer"):
        plot_expert_load({}, tmp_path / "none.png")


def test_plots_say_what_they_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    for module in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"modeling-deepseekmoe\[report\]"):
        plot_loss_curve([1], [1.0], tmp_path / "loss.png")
