"""Token dropping against a loop over the devices."""

import math
from collections.abc import Callable

import pytest
import torch

from modeling_deepseekmoe import RouterStats, Routing, route, take_router_load
from modeling_deepseekmoe.token_dropping import drop_tokens

TOKENS, EXPERTS, TOP_K, DEVICES = 29, 8, 3, 4


def dropped_by_loop(
    plan: Routing, scores: torch.Tensor, factor: float, mask: torch.Tensor, protected: torch.Tensor
) -> set[tuple[int, int]]:
    """(token, choice) of everything that is dropped."""
    dropped = set()
    budget = math.ceil(factor * TOP_K / DEVICES * int(mask.sum()))
    for device in range(DEVICES):
        choices = [
            (not protected[token], -scores[token, expert].item(), token, choice)
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
    logits = torch.randn(TOKENS, EXPERTS) + torch.linspace(0, 2, EXPERTS)
    plan, scores = route(logits, TOP_K, scaling_factor=2.0), logits.softmax(dim=-1)
    mask = torch.arange(TOKENS) % 4 != 0 if masked else torch.ones(TOKENS, dtype=torch.bool)
    protected = torch.rand(TOKENS) < share
    weights, dropped = drop_tokens(
        plan, scores, DEVICES, factor, token_mask=mask if masked else None, protected=protected if share else None
    )
    expected = dropped_by_loop(plan, scores, factor, mask, protected)
    found = {(int(token), int(choice)) for token, choice in (weights == 0).nonzero()}
    assert found == expected
    assert dropped == len(expected) and (len(expected) > 0 or share == 1.0 or factor > 1)
    kept = weights != 0
    assert torch.equal(weights[kept], plan.weights[kept])


def test_equal_affinities_are_dropped_from_the_end() -> None:
    plan = Routing(torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1))
    weights, dropped = drop_tokens(plan, torch.full((4, 2), 0.5), 2, 1.0)
    assert weights.flatten().tolist() == [1, 1, 0, 0] and dropped == 2


@pytest.mark.parametrize(("factor", "top_k", "devices", "tokens", "budget"),
                         [(1.2, 8, 8, 100, 120), (1.0, 6, 10, 100, 60), (1.0, 3, 4, 29, 22)])  # fmt: skip
def test_budgets_that_are_whole_numbers(factor: float, top_k: int, devices: int, tokens: int, budget: int) -> None:
    """Everything goes to the first device, whose budget is what is kept."""
    ids = torch.arange(top_k).repeat(tokens, 1)
    plan = Routing(ids, torch.ones(tokens, top_k))
    weights, dropped = drop_tokens(plan, torch.rand(tokens, devices * 10), devices, factor)
    assert weights.sum() == budget and dropped == tokens * top_k - budget


def test_a_dropped_choice_has_no_gradient() -> None:
    logits = torch.randn(TOKENS, EXPERTS, requires_grad=True)
    plan = route(logits, 1)
    weights, dropped = drop_tokens(plan, logits.softmax(dim=-1), DEVICES, 0.5)
    weights.sum().backward()
    gone = (weights == 0).flatten()
    assert 0 < dropped == gone.sum() < TOKENS
    assert not logits.grad[gone].any() and logits.grad[~gone].any(dim=1).all()


def test_padding_and_protected_sequences_through_the_model(
    tiny_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token of a protected sequence keeps its choices; padding is no token."""
    settings = {"n_device_groups": 4, "num_hidden_layers": 2, "token_drop_capacity_factor": 0.4}
    model = tiny_model(**settings)
    rows = torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(11)[None] < torch.tensor([11, 5, 8])[:, None]).long()
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.tensor([0.9, 0.05, 0.9]))
    weights = []
    model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, args: weights.append(args[2].view(3, 11, 3)))
    model(rows, attention_mask=mask)
    dropped = weights[0] == 0
    assert not dropped[1].any() and not dropped[mask == 0].any()
    assert dropped[0].any() and dropped[2].any()
    load = take_router_load(model)
    assert load.dropped.item() == dropped.sum() >= 24 * 3 - 4 * math.ceil(0.4 * 24 * 3 / 4) - 15
    assert load.tokens_per_expert.sum() == 24 * 3  # what the gates chose, dropped or not


def test_the_drop_rate_is_logged(tiny_model: Callable) -> None:
    model = tiny_model(n_device_groups=4, token_drop_capacity_factor=0.5, token_drop_protected_share=0.0)
    stats = RouterStats(model)
    rows = torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(5))
    model(rows)
    stats.add(take_router_load(model))
    dropped = stats.load.dropped.tolist()
    assert stats.to_dict()["drop_rate"] == pytest.approx([count / (33 * 3) for count in dropped])
    assert 0.4 < stats.summary()["router/drop_rate"] < 0.6


def test_dropping_happens_in_training_only(tiny_model: Callable) -> None:
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
        dropped = take_router_load(model).dropped
        assert (dropped > 0).all() and (dropped < 0.5 * batch.numel() * 3).all()  # some, and some are protected
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    whole = gradients(False)
    for name, gradient in gradients(True).items():
        assert torch.equal(gradient, whole[name]), name
