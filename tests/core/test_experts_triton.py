"""The kernels of the experts in Triton's interpreter; test_gpu.py has those that need a GPU."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import Golden
from experts_cases import Case, cases, check_case, inputs_of
from hypothesis import given, settings
from lora_cases import IDS, direct, make
from operator_checks import CASE, check_dropout, check_operators
from program_order import shuffled_programs
from routing_cases import GENERATED
from tolerances import GOLDEN_LOGITS, assert_same

from modeling_deepseekmoe import experts, experts_operator, experts_tiles, experts_triton, prepare_esft
from modeling_deepseekmoe.experts import run_experts
from modeling_deepseekmoe.experts_tiles import Gpu, Tile, use_tiles
from modeling_deepseekmoe.triton_support import INTERPRETED, _why_not_interpreted

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is on where there is no GPU")


@settings(GENERATED, max_examples=40)
@given(cases(dtypes=(torch.float32, torch.float32, torch.bfloat16, torch.float16)))
def test_kernels_equal_the_reference(case: Case) -> None:
    check_case(case, "triton")


TILES = (Tile(16, 16, 16, 4, 1), Tile(16, 64, 32, 8, 2), Tile(64, 16, 16, 4, 1))
TILED_KINDS = ("random", "one expert", "elsewhere")


@pytest.mark.parametrize(
    ("tile", "kind"),
    [
        *zip(TILES, TILED_KINDS, strict=True),
        *(
            pytest.param(tile, kind, marks=pytest.mark.slow)
            for tile in TILES
            for kind in TILED_KINDS
            if TILES.index(tile) != TILED_KINDS.index(kind)
        ),
    ],
)
def test_several_tiles_in_every_direction(tile: Tile, kind: str) -> None:
    """Tiles of 16, and more rows, columns and inner numbers than one has; then wide ones, and tall ones."""
    with use_tiles(lambda problem: tile):
        check_case(dataclasses.replace(CASE, tokens=40, kind=kind, hidden=37, width=21, rank=18), "triton")


@pytest.mark.parametrize(
    ("dtype", "rank", "hidden", "tile", "used"),
    [
        (torch.float32, 0, 40, Tile(16, 16, 16, 4, 1, 0, 1), {"rows", "columns"}),
        (torch.bfloat16, 16, 40, Tile(32, 64, 64, 4, 1, 0, 1), {"rows", "columns"}),
        (torch.bfloat16, 0, 37, Tile(16, 16, 16, 4, 1, 0, 1), {""}),
    ],
)
def test_weights_through_descriptors(
    dtype: torch.dtype, rank: int, hidden: int, tile: Tile, used: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows begin at multiples of 16 bytes; and nothing of the next expert is read, whose weights are NaN."""
    found, choose = set(), experts_triton._described

    def spied(matrices: torch.Tensor, options: dict) -> tuple:
        source, options = choose(matrices, options)
        found.add(options["DESCRIBED"])
        return source, options

    monkeypatch.setattr(experts_triton, "_described", spied)
    case = dataclasses.replace(CASE, tokens=24, hidden=hidden, width=hidden - 16, rank=rank, dtype=dtype)
    with use_tiles(lambda problem: tile):
        check_case(case, "triton")
        inputs = inputs_of(dataclasses.replace(case, kind="one expert"))
        with torch.no_grad():
            chosen = int(inputs.ids.flatten()[0])
            for stack in inputs.experts.parameters():
                stack[torch.arange(len(stack)) != chosen] = torch.nan
        output = run_experts(inputs.experts, inputs.hidden, inputs.ids, inputs.weights, backend="triton")
        output.backward(inputs.grad)
    assert output.isfinite().all() and inputs.hidden.grad.isfinite().all()
    assert found - {""} == used - {""}


@pytest.mark.parametrize("gpu", [Gpu("sm_80", 166_912), Gpu("sm_90", 232_448)], ids=lambda gpu: gpu.name)
def test_the_tiles_of_a_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_tiles, "gpu_of", lambda device: gpu)
    for dtype, rank in ((torch.float32, 18), (torch.bfloat16, 0)):
        case = dataclasses.replace(CASE, tokens=300, experts=2, top_k=2, hidden=280, width=150, rank=rank, dtype=dtype)
        check_case(case, "triton")


def test_programs_in_any_order_give_the_same_bits() -> None:
    case = dataclasses.replace(CASE, tokens=30, rank=4, kind="elsewhere")

    def results() -> list[torch.Tensor]:
        inputs = inputs_of(case)
        output = run_experts(
            inputs.experts, inputs.hidden, inputs.ids, inputs.weights, adapters=inputs.adapters, backend="triton"
        )
        output.backward(inputs.grad)
        return [output, *(leaf.grad for leaf in inputs.differentiable.values())]

    expected = results()
    for seed in range(2):
        with shuffled_programs(seed) as numbers:
            assert all(torch.equal(one, other) for one, other in zip(results(), expected, strict=True))
        assert max(numbers) >= 8


def test_dropout_has_the_right_mean_and_gradients() -> None:
    check_dropout("triton", seeds=15)


@pytest.mark.parametrize("rank", [0, 4])
def test_operators_keep_the_rules_of_torch_library(rank: int) -> None:
    check_operators(rank, "triton", "clamped" if rank else "silu")


def test_nothing_unwritten_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """All memory that is not initialised holds NaN."""
    inputs = inputs_of(dataclasses.replace(CASE, kind="elsewhere", rank=4, tokens=20))
    empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *size: object, **kwargs: object) -> torch.Tensor:
        found = empty(self, *size, **kwargs)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    output = run_experts(
        inputs.experts, inputs.hidden, inputs.ids, inputs.weights, adapters=inputs.adapters, backend="triton"
    )
    output.backward(inputs.grad)
    assert all(tensor.isfinite().all() for tensor in (output, *(t.grad for t in inputs.differentiable.values())))


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU; the kernels must have run at the end."""
    calls = []

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return experts_triton.experts_forward_triton(*arguments)

    monkeypatch.setattr(experts_operator, "experts_forward_triton", counted)
    monkeypatch.setattr(experts, "choose_backend", lambda *_, **__: ("triton", ""))
    monkeypatch.setattr("modeling_deepseekmoe.lora.layer.choose_backend", lambda *_, **__: ("triton", ""))
    yield
    assert calls


@pytest.mark.usefixtures("on_kernels")
def test_golden_logits_and_generated_text(golden: Golden) -> None:
    model, expected = golden.model(), golden.expected
    with torch.no_grad():
        assert (model(expected["input_ids"]).logits - expected["logits"]).abs().max() <= GOLDEN_LOGITS
    model.generation_config.eos_token_id = None
    prompt = expected["input_ids"][:1, :9]
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert torch.equal(generated, expected["generated"][:, : generated.shape[1]])


def step_of(prepare: Callable[[], torch.nn.Module]) -> dict[str, torch.Tensor]:
    model = prepare().train()
    outputs = model(IDS, labels=IDS)
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": outputs.logits.detach(), **gradients}


def selected() -> torch.nn.Module:
    model = make()
    prepare_esft(model, {1: [0, 6], 2: [3]})
    return model


@pytest.mark.parametrize("prepare", [lambda: direct(make()), selected], ids=["lora", "esft"])
def test_training_of_adapters_and_of_selected_experts(
    prepare: Callable[[], torch.nn.Module], request: pytest.FixtureRequest
) -> None:
    expected = step_of(prepare)
    request.getfixturevalue("on_kernels")
    for name, found in step_of(prepare).items():
        assert_same(found, expected[name], name)


def test_an_interpreter_that_cannot_run_says_so() -> None:
    assert _why_not_interpreted("3.6.0", "2.4.1") == (
        "the interpreter of Triton 3.6.0 cannot use numpy 2.4.1 (pip install 'numpy<2.4')"
    )
    assert _why_not_interpreted("3.6.0", "2.3.5") == _why_not_interpreted("3.7.1", "2.4.1") == ""
