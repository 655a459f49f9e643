"""The same figures on a GPU. Run with `make test-gpu` where there is one."""

import contextlib
import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import pytest
import torch
from conftest import EXPERTS_IMPLEMENTATIONS, Golden
from experts_cases import Case as ExpertsCase
from experts_cases import Inputs as ExpertsInputs
from experts_cases import cases as experts_cases
from experts_cases import check_case, inputs_of
from hypothesis import given, settings
from hypothesis import seed as seeded
from lora_cases import IDS, direct, make
from operator_checks import CASE, check_dropout
from routing_cases import GENERATED, Case, cases, check_grouping, check_rounding, check_route
from tolerances import EXPERTS_LOW_PRECISION, GOLDEN_LOGITS, LOW_PRECISION_LOSS, SAME_COMPUTATION, assert_same

from modeling_deepseekmoe import (
    RouterStats,
    experts_kernels,
    group_by_expert,
    prepare_esft,
    route,
    routing_kernels,
    take_router_load,
    update_router_bias,
)
from modeling_deepseekmoe.experts import choose_backend, run_experts
from modeling_deepseekmoe.experts_sources import IN_PRODUCTS
from modeling_deepseekmoe.experts_tiles import DESCRIBING, gpu_of, rule, use_tiles
from modeling_deepseekmoe.experts_trial import try_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """An error for everything in here that waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(step: Callable[[], Sequence[torch.Tensor]]) -> tuple[torch.cuda.CUDAGraph, Sequence[torch.Tensor]]:
    """A CUDA graph of a step, after three ordinary ones, and the tensors that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


def compiled_kernels(module: ModuleType) -> int:
    """How many times the kernels of a module have been compiled."""
    kernels = (getattr(module, name) for name in module.__all__)
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


@pytest.mark.parametrize("implementation", EXPERTS_IMPLEMENTATIONS)
def test_golden_logits(golden: Golden, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model, expected = golden.model(experts_implementation=implementation).cuda(), golden.expected
    with torch.no_grad():
        logits = model(expected["input_ids"].cuda()).logits.cpu()
    assert (logits - expected["logits"]).abs().max() <= GOLDEN_LOGITS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_training_step(golden: Golden, dtype: torch.dtype) -> None:
    model, expected = golden.model(dtype=dtype).cuda().train(), golden.expected
    input_ids = expected["input_ids"].cuda()
    outputs = model(input_ids, labels=input_ids)
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    if "train.task_loss" in expected:
        task_loss = outputs.loss - outputs.aux_loss
        assert abs(task_loss.item() - expected["train.task_loss"].item()) <= LOW_PRECISION_LOSS


def test_counts_are_those_of_the_cpu_and_nothing_waits_for_the_host(v3: Golden) -> None:
    on_cpu, on_gpu = v3.model().train(), v3.model(experts_implementation="grouped_mm").cuda().train()
    input_ids = v3.expected["input_ids"]
    mask = (torch.arange(17)[None] < torch.tensor([17, 9, 13])[:, None]).long()
    on_cpu(input_ids, attention_mask=mask, labels=input_ids)
    stats = RouterStats(on_gpu)
    on_gpu(input_ids.cuda(), attention_mask=mask.cuda(), labels=input_ids.cuda()).loss.backward()
    with no_waiting():
        load = update_router_bias(on_gpu)
        stats.add(load)
    assert torch.equal(load.tokens_per_expert.cpu(), take_router_load(on_cpu).tokens_per_expert)
    assert stats.summary()["router/entropy"] > 0


@pytest.mark.parametrize("tokens", [1, 18])
def test_lora_on_experts_is_that_of_the_cpu(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    ids = IDS.flatten()[None, :tokens]
    on_cpu, on_gpu = direct(make()).train(), direct(make()).cuda().train()
    found, expected = on_gpu(ids.cuda()).logits, on_cpu(ids).logits
    assert_same(found.cpu(), expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in on_gpu.named_parameters() if p.requires_grad}
    for name, parameter in on_cpu.named_parameters():
        if parameter.requires_grad:
            assert_same(gradients[name].cpu(), parameter.grad, name)


@pytest.mark.parametrize("rank", [2, 16])
def test_lora_in_bfloat16_never_waits_for_the_host(rank: int) -> None:
    experts = direct(make().to(torch.bfloat16), r=rank).cuda().train().base_model.model.model.layers[1].mlp.experts
    hidden = torch.randn(64, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    ids = torch.rand(64, 8, device="cuda").topk(3).indices
    weights = torch.rand(64, 3, device="cuda")
    with no_waiting():
        experts(hidden, ids, weights).float().sum().backward()
    assert all(p.grad.isfinite().all() for name, p in experts.named_parameters() if "lora_" in name)


def test_selected_experts_never_wait_for_the_host() -> None:
    model = make().to(torch.bfloat16).cuda()
    prepare_esft(model, {1: [0, 6], 2: [3]})
    module = model.model.layers[1].mlp.experts
    hidden = torch.randn(64, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    ids, weights = torch.rand(64, 8, device="cuda").topk(3).indices, torch.rand(64, 3, device="cuda")
    with no_waiting():
        module(hidden, ids, weights).float().sum().backward()
    assert module.selected_down_proj.grad.isfinite().all()


def test_selected_experts_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    models = [make(), make().cuda()]
    for model in models:
        prepare_esft(model, {1: [0, 6], 2: [3]})
        model.train()(IDS.to(model.device), labels=IDS.to(model.device)).loss.backward()
    for (name, one), (_, two) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        if one.requires_grad:
            assert_same(two.grad.cpu(), one.grad, name)


V3_OPTIONS = {"score_function": "sigmoid", "num_groups": 8, "top_k_groups": 4, "group_score": "top2_sum",
              "normalize": True, "scaling_factor": 2.5, "implementation": "triton"}  # fmt: skip


# Parts of the generated cases, which processes of pytest-xdist can take side by side.
PARTS = 8


@pytest.mark.generated
@pytest.mark.parametrize("part", range(PARTS))
def test_routing_kernels_equal_the_reference(part: int) -> None:
    @seeded(part)
    @settings(GENERATED, derandomize=False, max_examples=600 // PARTS)
    @given(cases())
    def check(case: Case) -> None:
        check_route(case, "cuda")

    check()


@pytest.mark.parametrize("kind", ["random", "one expert", "elsewhere", "few experts"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 8, 2), (1, 384, 8), (40, 7, 3), (4096, 64, 6)])
def test_grouping_kernels_are_stable(kind: str, tokens: int, experts: int, top_k: int) -> None:
    check_grouping(tokens, experts, top_k, 0, kind, "cuda")


def test_routing_of_many_tokens() -> None:
    assert check_rounding(65536, "cuda") <= 200
    logits = torch.randn(16 * 4096, 256, device="cuda")
    plans = [route(logits, 8, num_sequences=16, **V3_OPTIONS) for _ in range(3)]
    for other in plans[1:]:
        assert torch.equal(plans[0].score_sums, other.score_sums) and torch.equal(plans[0].weights, other.weights)
    eager = route(logits, 8, num_sequences=16, **{**V3_OPTIONS, "implementation": "eager"})
    assert_same(plans[0].score_sums, eager.score_sums)
    assert plans[0].counts_by_sequence.sum() == 16 * 4096 * 8


def routing_step(logits: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    plan = route(logits, 8, correction_bias=bias, token_mask=mask, num_sequences=2, **V3_OPTIONS)
    groups = group_by_expert(plan.expert_ids, 256, implementation="triton")
    (plan.weights.square().sum() + plan.score_sums.square().sum()).backward()
    return plan.expert_ids, plan.weights, plan.counts_by_sequence, plan.score_sums, *groups, logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_routing_never_waits_for_the_host_and_is_not_compiled_again(dtype: torch.dtype) -> None:
    bias = torch.randn(256, device="cuda")
    routing_step(
        torch.randn(64, 256, device="cuda", dtype=dtype, requires_grad=True), bias, torch.ones(64, device="cuda")
    )
    before = compiled_kernels(routing_kernels)
    for tokens in (2, 16, 30, 32, 34, 1024, 1026):
        logits = torch.randn(tokens, 256, device="cuda", dtype=dtype, requires_grad=True)
        mask = torch.ones(tokens, device="cuda")
        with no_waiting():
            routing_step(logits, bias, mask)
    assert compiled_kernels(routing_kernels) == before


def test_routing_in_a_cuda_graph() -> None:
    bias, mask = torch.randn(256, device="cuda"), torch.rand(512, device="cuda") > 0.2
    logits = torch.randn(512, 256, device="cuda", requires_grad=True)

    def step() -> tuple[torch.Tensor, ...]:
        logits.grad = None
        return routing_step(logits, bias, mask)

    graph, captured = capture(step)
    for _ in range(3):
        fresh = torch.randn(512, 256, device="cuda", requires_grad=True)
        with torch.no_grad():
            logits.copy_(fresh)
        graph.replay()
        for found, expected in zip(captured, routing_step(fresh, bias, mask), strict=True):
            assert torch.equal(found, expected)


def test_routing_in_one_compiled_graph() -> None:
    """What "auto" looks at on a GPU does not break the graph, and bfloat16 logits are taken."""
    options = {**V3_OPTIONS, "implementation": "auto"}
    compiled = torch.compile(lambda logits: route(logits, 8, **options), fullgraph=True)
    for tokens in (16, 48):
        logits = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
        found, expected = compiled(logits), route(logits, 8, **options)
        assert torch.equal(found.expert_ids, expected.expert_ids) and torch.equal(found.weights, expected.weights)


# --------------------------------------------------------------------------------------------------------- the experts
# Almost every case has sizes of its own, for which all kernels are compiled.
@pytest.mark.generated
@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_of_experts_equal_the_reference(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")

    @seeded(part)
    @settings(GENERATED, derandomize=False, max_examples=40 // PARTS)
    @given(experts_cases(most_tokens=40, dtypes=(torch.float32, torch.bfloat16, torch.float16)))
    def check(case: ExpertsCase) -> None:
        check_case(case, "triton", "cuda")

    check()


def test_dropout_of_experts_has_the_right_mean_and_gradients() -> None:
    check_dropout("triton", seeds=300, device="cuda")


def layer_of_experts(tokens: int, rank: int = 0, dtype: torch.dtype = torch.bfloat16) -> ExpertsInputs:
    """One that is large enough for several tiles."""
    case = dataclasses.replace(CASE, tokens=tokens, experts=16, top_k=4, hidden=512, width=320, rank=rank, dtype=dtype)
    return inputs_of(case, "cuda", dropout=0.1 if rank else 0.0)


def experts_step(inputs: ExpertsInputs) -> list[torch.Tensor]:
    """Output and gradients."""
    for tensor in inputs.differentiable.values():
        tensor.grad = None
    output = run_experts(
        inputs.experts, inputs.hidden, inputs.ids, inputs.weights, adapters=inputs.adapters, backend="triton"
    )
    output.backward(inputs.grad)
    return [output.detach(), *(tensor.grad for tensor in inputs.differentiable.values())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 16])
def test_experts_at_size_equal_those_of_the_cpu(
    dtype: torch.dtype, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    inputs = layer_of_experts(3000, rank, dtype)
    inputs.adapters = [adapter and adapter._replace(dropout=0.0, seed=None) for adapter in inputs.adapters]
    found = [tensor.cpu() for tensor in experts_step(inputs)]
    module = copy.deepcopy(inputs.experts).cpu().float()
    leaves = [inputs.hidden, inputs.weights, *(f for a in inputs.adapters if a is not None for f in a[:2])]
    leaves = [leaf.detach().cpu().float().requires_grad_() for leaf in leaves]
    factors = iter(leaves[2:])
    adapters = [a and a._replace(factor_a=next(factors), factor_b=next(factors)) for a in inputs.adapters]
    output = run_experts(module, leaves[0], inputs.ids.cpu(), leaves[1], adapters=adapters, backend="loop")
    output.backward(inputs.grad.cpu().float())
    stacks = [module.gate_up_proj.grad, module.down_proj.grad]
    expected = [output, *(leaf.grad for leaf in leaves[:2]), *stacks, *(leaf.grad for leaf in leaves[2:])]
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() <= EXPERTS_LOW_PRECISION.get(dtype, SAME_COMPUTATION) * other.norm()


def test_weights_through_descriptors_are_those_through_pointers() -> None:
    """With rows of whole multiples of 16 bytes, and the last tiles not full."""
    gpu = gpu_of(torch.device("cuda"))
    if not re.fullmatch(DESCRIBING, gpu.name):
        pytest.skip(f"{gpu.name} has no descriptors")
    case = dataclasses.replace(CASE, tokens=3000, experts=16, top_k=4, hidden=504, width=328, dtype=torch.bfloat16)
    results = []
    for descriptors in (0, 1):
        inputs = inputs_of(case, "cuda")
        with use_tiles(lambda problem, flag=descriptors: rule(problem, gpu)._replace(descriptors=flag)):
            results.append(experts_step(inputs))
    for pointed, described in zip(*results, strict=True):
        torch.testing.assert_close(described, pointed)


@pytest.mark.parametrize("kind", IN_PRODUCTS)
def test_quantised_experts_equal_the_loop(kind: str) -> None:
    try_experts(torch.device("cuda"), "silu", kind)


@pytest.mark.parametrize("rank", [0, 16])
def test_experts_never_wait_are_not_compiled_again_and_have_the_same_bits(rank: int) -> None:
    experts_step(layer_of_experts(1024, rank))
    before = compiled_kernels(experts_kernels)
    for tokens in (1023, 1000, 1040):
        inputs = layer_of_experts(tokens, rank)
        with no_waiting():
            runs = [experts_step(inputs) for _ in range(3)]
        for other in runs[1:]:
            assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))
    assert compiled_kernels(experts_kernels) == before


@pytest.mark.parametrize("tokens", [1, 512])
def test_experts_in_a_cuda_graph(tokens: int) -> None:
    inputs = layer_of_experts(tokens)
    graph, captured = capture(lambda: experts_step(inputs))
    for seed in range(1, 4):
        other = inputs_of(dataclasses.replace(CASE, seed=seed, tokens=tokens, experts=16, top_k=4, hidden=512,
                                              width=320, dtype=torch.bfloat16), "cuda")  # fmt: skip
        with torch.no_grad():
            inputs.hidden.copy_(other.hidden)
            inputs.ids.copy_(other.ids)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for found, expected in zip(replayed, experts_step(inputs), strict=True):
            assert torch.equal(found, expected)


def test_experts_in_one_compiled_graph() -> None:
    compiled = torch.compile(run_experts, fullgraph=True)
    for tokens in (16, 48):
        inputs = layer_of_experts(tokens)
        arguments = (inputs.experts, inputs.hidden, inputs.ids, inputs.weights)
        assert choose_backend(inputs.experts, inputs.hidden) == ("triton", "")
        assert torch.equal(compiled(*arguments), run_experts(*arguments))


def test_an_offloaded_cache_gives_the_same_text(golden: Golden) -> None:
    model = golden.model(device_map="cuda")
    model.generation_config.eos_token_id = None
    prompt = golden.expected["input_ids"][:1, :9].to("cuda")
    arguments = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
    }
    offloaded = model.generate(prompt, cache_implementation="offloaded", **arguments)
    assert torch.equal(offloaded, model.generate(prompt, use_cache=False, **arguments))
