"""What is computed with quantised experts: as with what they decode to, and never with a whole stack of that."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_models import tiny_model
from lora_cases import LargestTensor
from peft import get_peft_model
from quantized_models import IDS, KINDS, decoded, load, quantized_modules, write
from torch import nn

from modeling_deepseekmoe import StackedExpertsConfig, expert_lora_config
from modeling_deepseekmoe.experts import choose_backend, run_experts
from modeling_deepseekmoe.experts_operands import Adapter
from modeling_deepseekmoe.experts_quantized import QuantizedStack, stack_of
from modeling_deepseekmoe.experts_workers import run_in_workers
from modeling_deepseekmoe.triton_support import INTERPRETED

NAMES = ("deepseekmoe", "deepseek_v3", "qwen3_moe", "glm4_moe")


def assert_near(found: torch.Tensor, wanted: torch.Tensor, name: str = "", part: float = 1e-5) -> None:
    """Off by at most a part of the largest value."""
    assert found.shape == wanted.shape, name
    assert (found - wanted).abs().max() <= part * wanted.abs().max().clamp(min=1e-30), name


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module]:
    """The experts of a layer, quantised and decoded."""
    folder = write(tmp_path_factory.mktemp("experts"))
    models = load(folder, request.param), decoded(folder, request.param)
    return tuple(model.model.layers[1].mlp.experts for model in models)


def inputs(tokens: int, chosen: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Adapter]]:
    """Hidden states, ids of some of the experts, weights, and adapters of both projections."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    ids = torch.stack([torch.randperm(chosen, generator=generator)[:3] for _ in range(tokens)])
    adapters = [Adapter(draw(8, 4, 192), draw(8, 256, 4), 0.5), Adapter(draw(8, 4, 128), draw(8, 192, 4), 0.5)]
    return draw(tokens, 192), ids, draw(tokens, 3), adapters


@pytest.mark.parametrize("adapted", [False, True], ids=["frozen", "lora"])
@pytest.mark.parametrize(("tokens", "chosen"), [(1, 8), (9, 8), (70, 4)])
def test_outputs_and_gradients(pair: tuple[nn.Module, nn.Module], tokens: int, chosen: int, adapted: bool) -> None:
    results = []
    for experts in pair:
        hidden, ids, weights, adapters = inputs(tokens, chosen)
        own = adapters if adapted else [None, None]
        output = run_experts(experts, hidden, ids, weights, adapters=own, backend="loop")
        output.square().sum().backward()
        leaves = [hidden, weights] + [factor for adapter in adapters if adapted for factor in adapter[:2]]
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for number, (found, wanted) in enumerate(zip(*results, strict=True)):
        assert_near(found, wanted, str(number))


@pytest.mark.parametrize("workspace", [2**28, 1], ids=["all experts", "one at a time"])
def test_products_of_groups(pair: tuple, monkeypatch: pytest.MonkeyPatch, workspace: int) -> None:
    """What GPUs, and several adapters at once, compute with."""
    monkeypatch.setattr("modeling_deepseekmoe.experts_grouped.WORKSPACE", workspace)
    results = []
    for experts, backend in zip(pair, ("grouped", "loop"), strict=True):
        hidden, ids, weights, _ = inputs(20, 4)
        output = run_experts(experts, hidden, ids, weights, backend=backend)
        output.square().sum().backward()
        results.append([output.detach(), hidden.grad, weights.grad])
    for found, wanted in zip(*results, strict=True):
        assert_near(found, wanted)


def test_the_backends(pair: tuple[nn.Module, nn.Module]) -> None:
    quantised = pair[0]
    hidden, ids, weights, _ = inputs(2)
    assert choose_backend(quantised, hidden, top_k=3) == ("loop", "")
    if not INTERPRETED:
        with pytest.raises(ValueError, match=r"backend='triton' is not allowed"):
            run_experts(quantised, hidden, ids, weights, backend="triton")
        return
    found, wanted = (run_experts(pair[0], hidden, ids, weights, backend=name) for name in ("triton", "loop"))
    assert_near(found.detach(), wanted.detach())


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_no_stack_is_decoded(pair: tuple, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """No tensor is as large as the rows of a stack, in both passes, on threads as well."""
    quantised = pair[0]
    monkeypatch.setattr("modeling_deepseekmoe.experts_grouped.WORKSPACE", 1)
    seen = LargestTensor()

    def watched(items: list, start: Callable, **kwargs: object) -> None:
        def begin() -> Callable:
            work = start()

            def run(item: object) -> None:
                with seen:
                    work(item)

            return run

        run_in_workers(items, begin, **kwargs)

    monkeypatch.setattr("modeling_deepseekmoe.experts_loop.run_in_workers", watched)
    hidden, ids, weights, adapters = inputs(9)
    own = adapters if backend == "loop" else [None, None]
    with seen:
        run_experts(quantised, hidden, ids, weights, adapters=own, backend=backend).sum().backward()
    one_expert = 256 * 192
    assert one_expert // 4 <= seen.elements <= one_expert < stack_of(quantised, "gate_up_proj").shape.numel()


def test_bfloat16(tmp_path: Path) -> None:
    """Products of what is decoded and then rounded."""
    folder = write(tmp_path)
    for kind in KINDS:
        quantised, plain = load(folder, kind, torch.bfloat16), load(folder, kind, torch.bfloat16)
        plain.dequantize(torch.bfloat16)
        hidden, ids, weights, _ = inputs(33)
        outputs = [
            run_experts(model.model.layers[1].mlp.experts, hidden.detach().bfloat16(), ids, weights.detach(),
                        backend="loop")
            for model in (quantised, plain)
        ]  # fmt: skip
        assert outputs[0].dtype == torch.bfloat16
        assert_near(outputs[0].float(), outputs[1].float(), kind, 0.02)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_models_with_and_without_adapters(tmp_path: Path, name: str, kind: str) -> None:
    """Logits, the gradient of the embeddings, and those of all factors, for this family and three of transformers."""
    pytest.importorskip(f"transformers.models.{name}") if name != "deepseekmoe" else None
    folder = write(tmp_path, name)
    models = [load(folder, kind), decoded(folder, kind)]
    assert len(quantized_modules(models[0])) >= 2 and not quantized_modules(models[1])
    models[1].set_experts_implementation("deepseekmoe")
    results = []
    for model in models:
        with torch.no_grad():
            found = [model(IDS).logits]
        torch.manual_seed(4)
        adapted = get_peft_model(model, expert_lora_config(model, r=4, init_lora_weights=False))
        embeddings = adapted.get_input_embeddings()(IDS).detach().requires_grad_()
        output = adapted(inputs_embeds=embeddings).logits
        output.float().square().mean().backward()
        factors = {key: p.grad for key, p in adapted.named_parameters() if p.grad is not None}
        assert len(factors) == 4 * len(quantized_modules(models[0]))
        results.append([*found, output.detach(), embeddings.grad, *factors.values()])
    for number, (found, wanted) in enumerate(zip(*results, strict=True)):
        assert_near(found, wanted, f"{number}")


def test_compiled(tmp_path: Path) -> None:
    model = load(write(tmp_path), "mxfp4")
    experts = model.model.layers[1].mlp.experts
    hidden, ids, weights, _ = inputs(7)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert_near(compiled(hidden, ids, weights).detach(), experts(hidden, ids, weights).detach())


def test_a_stack_says_what_it_is(pair: tuple[nn.Module, nn.Module]) -> None:
    quantised, plain = pair
    for name in ("gate_up_proj", "down_proj"):
        stack = stack_of(quantised, name)
        assert isinstance(stack, QuantizedStack) and stack.shape == getattr(plain, name).shape
        assert stack_of(plain, name) is getattr(plain, name)
        assert torch.equal(stack.decode(slice(None)), getattr(plain, name))
        assert torch.equal(stack.to(torch.bfloat16).decode(slice(2, 4)), getattr(plain, name)[2:4].bfloat16())
        rows = stack.unbind()[5].reader()(slice(16, 48), torch.empty(32, stack.shape[2]))
        assert torch.equal(rows, getattr(plain, name)[5, 16:48])
    assert all(not p.requires_grad and not p.is_floating_point() for p in quantised.parameters())


def test_casting_a_model_leaves_the_codes_alone(pair: tuple[nn.Module, nn.Module]) -> None:
    cast = copy.deepcopy(pair[0]).to(torch.bfloat16).to(torch.float32)
    for (name, found), wanted in zip(cast.named_parameters(), pair[0].parameters(), strict=True):
        assert torch.equal(found, wanted), name


def test_experts_that_are_not_exchangeable(tmp_path: Path) -> None:
    """Those of Step-3.7 have no config that would name an implementation: their class reads the stacks by itself."""
    torch.manual_seed(0)
    tiny_model("step3p7").save_pretrained(tmp_path)
    options = {"dtype": torch.float32, "quantization_config": StackedExpertsConfig("fp8")}
    model = type(tiny_model("step3p7")).from_pretrained(tmp_path, **options).eval()
    ids = torch.randint(3, 100, (2, 9))
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
        wanted = model.dequantize(torch.float32)(input_ids=ids, use_cache=False).logits
    assert_near(found, wanted)
