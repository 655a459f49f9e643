"""Deep copies of models: each counts, trains and warns for itself."""

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import V3_LIKE
from native_models import batch, native_model
from tolerances import assert_same
from torch import nn

from modeling_deepseekmoe import (
    merge_esft,
    prepare_esft,
    route_native_gates,
    take_router_load,
    track_router_load,
    untrack_router_load,
)
from modeling_deepseekmoe.reminders import STEPS_UNTIL_WARNING
from modeling_deepseekmoe.support.official_names import read_official_names


def counts(model: nn.Module) -> int:
    return int(take_router_load(model).tokens)


@pytest.mark.parametrize("kind", ["ours", "native"])
@pytest.mark.parametrize("part", ["model", "wrapper"])
def test_a_copy_counts_for_itself(tiny_model: Callable, kind: str, part: str) -> None:
    model = native_model() if kind == "native" else tiny_model(**V3_LIKE)
    tracked = nn.Sequential(model) if part == "wrapper" else model
    track_router_load(tracked)
    other = copy.deepcopy(model)
    model(batch, labels=batch).loss.backward()
    other(batch[:2], labels=batch[:2]).loss.backward()
    other(batch[:2], labels=batch[:2]).loss.backward()
    assert (counts(tracked), counts(other)) == (batch.numel(), 4 * batch.shape[1])
    untrack_router_load(other)
    model(batch, labels=batch).loss.backward()
    assert counts(model) == batch.numel()
    assert kind == "ours" or not any(module._forward_pre_hooks for module in other.modules())


def test_a_copy_is_reminded_too(tiny_model: Callable, warnings_of_package: list[str]) -> None:
    model = copy.deepcopy(tiny_model(**V3_LIKE))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(STEPS_UNTIL_WARNING + 1):
        model(batch[:1], labels=batch[:1]).loss.backward()
        optimizer.step()
    assert sum("nothing updates the bias" in text for text in warnings_of_package) == 1


def test_a_copy_of_prepared_experts(tiny_model: Callable) -> None:
    model = tiny_model()
    expected = model.eval()(batch).logits.detach()
    prepare_esft(model, {1: [0, 3]})
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.experts.selected_down_proj.zero_()
    merge_esft(other)
    assert (other.eval()(batch).logits - expected).abs().max() > 1e-3
    assert not other.model.layers[1].mlp.experts.down_proj[[0, 3]].any()
    assert_same(model.eval()(batch).logits.detach(), expected)
    other.load_state_dict(model.state_dict())
    assert_same(other.eval()(batch).logits.detach(), expected)


def test_a_copy_with_other_gates_and_other_names() -> None:
    model = native_model().eval()
    route_native_gates(model)
    read_official_names(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers[1:]:
            layer.mlp.gate.weight.mul_(-1)
    assert (other(batch).logits - model(batch).logits).abs().max() > 1e-2
    state = model.state_dict()
    experts = state.pop("model.layers.1.mlp.experts.down_proj")
    names = {f"model.layers.1.mlp.experts.{idx}.down_proj.weight": expert for idx, expert in enumerate(experts + 1)}
    other.load_state_dict({**state, **names})
    assert_same(other.model.layers[1].mlp.experts.down_proj.detach(), experts + 1)
    assert_same(model.model.layers[1].mlp.experts.down_proj.detach(), experts)
