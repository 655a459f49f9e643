"""Models that are recorded: `torch.jit.trace`, `torch.export`, ONNX."""

import io
from pathlib import Path

import pytest
import torch
from conftest import BOTH_SIZES, GOLDEN_NAMES, Golden
from peft import get_peft_model
from tolerances import assert_same
from torch import nn

from modeling_deepseekmoe import expert_lora_config, prepare_esft, route
from modeling_deepseekmoe.routing_eager import _FEW_VALUES

# What torch says of every number that a trace keeps; the tests look at what matters, the choices.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
OTHERS = [torch.randint(3, 90, (1, 5), generator=torch.Generator().manual_seed(seed)) for seed in range(2, 6)]


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, use_cache=False).logits


@BOTH_SIZES
@pytest.mark.parametrize("implementation", ["deepseekmoe", "grouped_mm", "batched_mm"])
def test_a_trace_routes_every_input_for_itself(golden: Golden, implementation: str) -> None:
    model = Logits(golden.model(experts_implementation=implementation))
    with torch.no_grad():
        traced = torch.jit.trace(model, (OTHERS[0],), check_trace=False)
        for ids in OTHERS[1:]:
            assert_same(traced(ids), model(ids))


@BOTH_SIZES
def test_a_trace_that_checks_itself(v3: Golden) -> None:
    """It runs once more without gradients, in which the experts are computed in another way."""
    model = Logits(v3.model())
    traced = torch.jit.trace(model, (OTHERS[0],))
    assert_same(traced(OTHERS[1]), model(OTHERS[1]))


def test_a_trace_of_eager_experts_is_refused(v3: Golden) -> None:
    with pytest.raises(ValueError, match=r"'eager' is not allowed under torch.jit.trace, .* choose 'deepseekmoe'"):
        torch.jit.trace(Logits(v3.model(experts_implementation="eager")), (OTHERS[0],), check_trace=False)
    with pytest.raises(
        ValueError, match=r"'eager' is not allowed .* nor under torch\.export, .* choose 'deepseekmoe'"
    ):
        torch.export.export(Logits(v3.model(experts_implementation="eager")), (OTHERS[0],), strict=False)


def test_a_trace_of_many_tokens_takes_fewer() -> None:
    """The CPU takes many values in parts, whose number a trace would keep."""

    class Route(nn.Module):
        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            return route(logits, 3, correction_bias=torch.zeros(64), implementation="eager").expert_ids

    traced = torch.jit.trace(Route(), (torch.randn(5000, 64),), check_trace=False)
    for tokens in (1, 70, 9000):
        logits = torch.randn(tokens, 64)
        assert torch.equal(traced(logits), Route()(logits))


def test_an_exported_program(v3: Golden) -> None:
    model = Logits(v3.model())
    with torch.no_grad():
        program = torch.export.export(model, (OTHERS[0],), strict=False)
        for ids in OTHERS[1:]:
            assert_same(program.module()(ids), model(ids))


@pytest.mark.parametrize("name", ["v1-mha", "v2-group-limited", "v3-noaux"])
@pytest.mark.parametrize("implementation", ["deepseekmoe", "batched_mm"])
def test_what_onnx_gets(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators that it has, and the same values. (It has no stable sort, and none of this package's operators.)"""
    model = Logits(Golden(name).model(experts_implementation=implementation))
    with torch.no_grad():
        expected = [model(ids) for ids in OTHERS]
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        for ids, logits in zip(OTHERS, expected, strict=True):
            assert_same(model(ids), logits)
        program = torch.export.export(model, (OTHERS[0],), strict=False)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any(name.startswith("aten.sort.stable") or "deepseekmoe" in name for name in called), called


@pytest.mark.parametrize("kind", ["adapter", "esft"])
def test_what_onnx_does_not_get(v3: Golden, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that compute otherwise are merged first."""
    model = v3.model()
    if kind == "esft":
        prepare_esft(model, {1: [0, 3]})
    else:
        model = get_peft_model(model, expert_lora_config(model, r=2))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(ValueError, match=r"ONNX is not allowed.*merge_and_unload\(\).*merge_esft"):
        model(OTHERS[0])


@pytest.mark.parametrize("tokens", [3, 400])
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_the_choice_for_onnx_is_the_same(tokens: int, group_score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, infinities and excluded groups included."""
    logits = torch.randn(tokens, 16).round()
    logits[0, :5] = float("-inf")
    assert (logits.numel() <= _FEW_VALUES) is (tokens == 3)
    options = {"score_function": "sigmoid", "num_groups": 4, "top_k_groups": 2, "group_score": group_score}
    expected = route(logits, 4, **options, implementation="eager")
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    found = route(logits, 4, **options, implementation="eager")
    assert torch.equal(found.expert_ids, expected.expert_ids) and torch.equal(found.weights, expected.weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_onnx_itself(name: str, tmp_path: Path) -> None:
    """With the extra `onnx`, which is no part of `dev`."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, file = Logits(Golden(name).model()), tmp_path / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(model, (OTHERS[0],), file, dynamo=True, verbose=False, input_names=["input_ids"])
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for ids in OTHERS[1:]:
            logits = torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])
            torch.testing.assert_close(logits, model(ids), atol=1e-4, rtol=1e-4)


def test_a_trace_is_saved_and_loaded(v3: Golden) -> None:
    model, buffer = Logits(v3.model(experts_implementation="batched_mm")), io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, (OTHERS[0],), check_trace=False), buffer)
        buffer.seek(0)
        assert_same(torch.jit.load(buffer)(OTHERS[1]), model(OTHERS[1]))
