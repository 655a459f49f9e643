"""Token dropping against a loop over the devices."""

import math
from collections.abc import Callable

import pytest
import torch

from modeling_deepseekmoe import RoutingPlan, route
from modeling_deepseekmoe.token_dropping import drop_tokens

TOKENS, EXPERTS, TOP_K, DEVICES = 29, 8, 3, 4


def dropped_by_loop(
    plan: RoutingPlan, factor: float, mask: torch.Tensor, protected: torch.Tensor
) -> set[tuple[int, int]]:
    """(token, choice) of everything that is dropped."""
    dropped = set()
    budget = math.ceil(factor * TOP_K / DEVICES * int(mask.sum()))
    for device in range(DEVICES):
        choices = [
            (not protected[token], -plan.scores[token, expert].item(), token, choice)
            for token in range(TOKENS) if mask[token]
            for choice, expert in enumerate(plan.expert_ids[token].tolist())
            if expert // (EXPERTS // DEVICES) == device
        ]  # fmt: skip
        dropped |= {(token, choice) for free, _, token, choice in sorted(choices)[budget:] if free}
    return dropped


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_lowest_affinities_beyond_the_budget(factor: float, masked: bool, share: float) -> None:
    plan = route(torch.randn(TOKENS, EXPERTS) + torch.linspace(0, 2, EXPERTS), TOP_K, scaling_factor=2.0)
    mask = torch.arange(TOKENS) % 4 != 0 if masked else torch.ones(TOKENS, dtype=torch.bool)
    protected = torch.rand(TOKENS) < share
    weights, dropped = drop_tokens(
        plan, DEVICES, factor, token_mask=mask if masked else None, protected=protected if share else None
    )
    expected = dropped_by_loop(plan, factor, mask, protected)
    found = {(int(token), int(choice)) for token, choice in (weights == 0).nonzero()}
    assert found == expected
    assert dropped == len(expected) and (len(expected) > 0 or share == 1.0 or factor > 1)
    kept = weights != 0
    assert torch.equal(weights[kept], plan.weights[kept])


def test_dropping_happens_in_training_only_and_has_no_gradient(tiny_model: Callable) -> None:
    settings = {"n_device_groups": 4, "token_drop_protected_share": 0.0, "num_hidden_layers": 2}
    batch = torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(5))
    plain, dropping = tiny_model(**settings), tiny_model(**settings, token_drop_capacity_factor=0.5)
    without, with_dropping = plain(batch).logits, dropping(batch).logits
    assert not torch.equal(without, with_dropping)
    choices = batch.numel() * 3
    dropped = dropping.model.router_load.load.dropped
    assert dropped.item() >= choices - 4 * math.ceil(0.5 * choices / 4) > 0
    assert torch.equal(plain.eval()(batch).logits, dropping.eval()(batch).logits)
    protected = tiny_model(**{**settings, "token_drop_protected_share": 1.0}, token_drop_capacity_factor=0.5)
    assert torch.equal(protected(batch).logits, without)
    assert protected.model.router_load.load.dropped == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_layer_drops_the_same_tokens(tiny_model: Callable, use_reentrant: bool) -> None:
    batch = torch.randint(3, 96, (6, 11), generator=torch.Generator().manual_seed(5))

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny_model(n_device_groups=4, token_drop_capacity_factor=0.5, token_drop_protected_share=0.5)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(1)
        model(batch, labels=batch).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    whole = gradients(False)
    for name, gradient in gradients(True).items():
        assert torch.equal(gradient, whole[name]), name
