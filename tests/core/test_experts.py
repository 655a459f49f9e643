"""The experts in every way on the CPU, and the choice between the ways; the kernels are in test_experts_triton."""

import dataclasses
import logging as pylogging
from collections.abc import Callable
from types import SimpleNamespace

import fresh_process
import pytest
import torch
import torch.nn.functional as F
from experts_cases import GATINGS, LIMIT, Case, Experts, cases, check_case, inputs_of
from hypothesis import given, settings
from lora_cases import IDS as LORA_IDS
from lora_cases import direct, make
from operator_checks import CASE, WITHOUT_ADAPTERS, check_dropout, check_operators, stacks_of
from paths import TESTS
from routing_cases import GENERATED
from tolerances import assert_same
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from modeling_deepseekmoe import DeepseekMoeForCausalLM, experts, experts_gating, experts_operator, register
from modeling_deepseekmoe.experts import choose_backend, experts_forward, run_experts
from modeling_deepseekmoe.experts_gating import SILU
from modeling_deepseekmoe.experts_operator import experts_op
from modeling_deepseekmoe.experts_triton import why_not_fused

IDS = torch.arange(33).view(3, 11) % 90


# --------------------------------------------------------------------------------------------------------- the figures
@settings(GENERATED, max_examples=400)
@given(cases(most_tokens=40))
def test_one_expert_after_the_other_equals_the_reference(case: Case) -> None:
    check_case(case, "loop")


@pytest.mark.parametrize("backend", ["grouped"])
@settings(GENERATED, max_examples=100)
@given(case=cases(most_tokens=40))
def test_small_experts_equal_the_reference(backend: str, case: Case) -> None:
    check_case(case, backend)


def test_more_slots_than_a_block_has_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_deepseekmoe.experts_loop.MAX_ROWS", 4)
    for kind in ("random", "one expert"):
        check_case(dataclasses.replace(CASE, tokens=30, kind=kind, rank=3), "loop")


def test_the_same_bits_in_every_run() -> None:
    def run() -> list[torch.Tensor]:
        inputs = inputs_of(dataclasses.replace(CASE, tokens=50, rank=4), dropout=0.3)
        tensors = inputs.differentiable
        output = run_experts(
            inputs.experts, inputs.hidden, inputs.ids, inputs.weights, adapters=inputs.adapters, backend="loop"
        )
        output.backward(inputs.grad)
        return [output, *(tensor.grad for tensor in tensors.values())]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_dropout_has_the_right_mean_and_gradients() -> None:
    check_dropout("loop", seeds=300)


# ----------------------------------------------------------------------------------------------- what it keeps in mind
def test_only_the_first_product_is_kept() -> None:
    inputs = inputs_of(dataclasses.replace(CASE, tokens=64, rank=4))
    known = {tensor.untyped_storage().data_ptr() for tensor in (*inputs.differentiable.values(), inputs.ids)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_experts(
            inputs.experts, inputs.hidden, inputs.ids, inputs.weights, adapters=inputs.adapters, backend="loop"
        )
    slots = 64 * CASE.top_k
    order = 8 * slots + 4 * (CASE.experts + 1)  # int64 permutation, int32 offsets
    assert sum(kept.values()) == slots * 2 * CASE.width * 4 + order


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    inputs = inputs_of(CASE)
    arguments = (inputs.hidden, inputs.ids, inputs.weights, *stacks_of(inputs.experts))
    with torch.no_grad():
        _, kept, _, _ = experts_op(*arguments, *SILU, *WITHOUT_ADAPTERS, False, "eager")
    assert kept.numel() == 0


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_a_token_touches_only_its_experts(backend: str) -> None:
    inputs = inputs_of(dataclasses.replace(CASE, tokens=1))
    others = [expert for expert in range(CASE.experts) if expert not in inputs.ids]
    with torch.no_grad():
        for stack in (inputs.experts.gate_up_proj, inputs.experts.down_proj):
            stack[others] = torch.nan
    output = run_experts(inputs.experts, inputs.hidden, inputs.ids, inputs.weights, backend=backend)
    output.sum().backward()
    assert output.isfinite().all() and inputs.hidden.grad.isfinite().all()
    assert (inputs.experts.gate_up_proj.grad[others] == 0).all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_dropout_under_gradient_checkpointing_falls_where_it_fell(use_reentrant: bool) -> None:
    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        inputs = inputs_of(dataclasses.replace(CASE, rank=4))

        def run(hidden: torch.Tensor) -> torch.Tensor:
            adapters = [adapter._replace(dropout=0.5, seed=torch.randint(2**62, ())) for adapter in inputs.adapters]
            return run_experts(inputs.experts, hidden, inputs.ids, inputs.weights, adapters=adapters, backend="loop")

        torch.manual_seed(3)
        if checkpointed:
            output = torch.utils.checkpoint.checkpoint(run, inputs.hidden, use_reentrant=use_reentrant)
        else:
            output = run(inputs.hidden)
        output.backward(inputs.grad)
        return [tensor.grad for tensor in inputs.differentiable.values()]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(found, expected)


# ----------------------------------------------------------------------------------------------------- in transformers
def tiny_native(config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


SIZES = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 3,
         "max_position_embeddings": 64, "intermediate_size": 24, "pad_token_id": 0}  # fmt: skip
MLA = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
       "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
       "topk_group": 1}  # fmt: skip
NATIVE = {
    "DeepSeek-V2": lambda: DeepseekV2Config(**SIZES, **MLA),
    "DeepSeek-V3": lambda: DeepseekV3Config(**SIZES, **MLA),
    "Qwen3-MoE": lambda: Qwen3MoeConfig(**SIZES, num_experts=8, decoder_sparse_step=1, head_dim=8),
    "OLMoE": lambda: OlmoeConfig(**{**SIZES, "intermediate_size": 12}, num_experts=8),
    "Mixtral": lambda: MixtralConfig(**{**SIZES, "num_experts_per_tok": 2}, num_local_experts=4),
}


@pytest.mark.parametrize("name", NATIVE)
def test_models_of_transformers(name: str, count_calls: Callable) -> None:
    register()  # V2 and V3 are transformers' own
    model, results, calls = tiny_native(NATIVE[name]()), [], count_calls("deepseekmoe")
    assert not type(model).__module__.startswith("modeling_deepseekmoe")
    for implementation in ("eager", "deepseekmoe"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        logits = model(IDS, use_cache=False).logits
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(calls) == (1 if "DeepSeek" in name else 2)
    assert len(results[0]) == len(results[1])
    for expected, found in zip(*results, strict=True):
        assert_same(found, expected)


def test_the_default_of_this_family_alone(tiny_model: Callable) -> None:
    assert tiny_model().config._experts_implementation == "deepseekmoe"
    assert tiny_model(experts_implementation="eager").config._experts_implementation == "eager"
    assert "experts_implementation" not in tiny_model().config.to_json_string()
    register()
    assert tiny_native(NATIVE["DeepSeek-V3"]()).config._experts_implementation == "grouped_mm"


def test_importing_the_package_offers_it_without_loading_anything() -> None:
    script = (
        "import sys, modeling_deepseekmoe\n"
        "print('transformers.integrations.moe' in sys.modules, 'modeling_deepseekmoe.experts' in sys.modules)\n"
        "from transformers import DeepseekV3Config, AutoModelForCausalLM\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS\n"
        "print('deepseekmoe' in ALL_EXPERTS_FUNCTIONS, 'modeling_deepseekmoe.experts' in sys.modules)\n"
        "import sys, torch\n"
        "sys.path[:0] = ['.', 'helpers', 'core']\n"
        "import test_experts\n"
        "model = AutoModelForCausalLM.from_config(test_experts.NATIVE['DeepSeek-V3'](),\n"
        "                                         experts_implementation='deepseekmoe')\n"
        "print(model(torch.ones(1, 3, dtype=torch.long)).logits.shape[-1], model.config._experts_implementation)\n"
    )
    ran = fresh_process.check("-c", script, cwd=TESTS)
    assert ran.stdout.split("\n")[:3] == ["False False", "True False", "90 deepseekmoe"]


def test_experts_that_are_stored_in_another_way_are_refused() -> None:
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    del sizes["moe_intermediate_size"]
    model = tiny_native(GptOssConfig(**sizes))
    model.set_experts_implementation("deepseekmoe")
    with pytest.raises(ValueError, match=r"'deepseekmoe' is not allowed for GptOssExperts: its experts have biases"):
        model(IDS)


def test_another_activation_takes_the_products_of_torch(
    tiny_model: Callable, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pylogging.getLogger("modeling_deepseekmoe"), "propagate", True)
    logits = []
    for implementation in ("eager", "deepseekmoe"):
        model = tiny_model(hidden_act="gelu").eval()
        model.set_experts_implementation(implementation)
        experts._tell.cache_clear()
        with caplog.at_level("INFO", "modeling_deepseekmoe"):
            logits.append(model(IDS).logits)
    assert_same(logits[1], logits[0])
    way = "DeepseekMoeExperts: experts_implementation='deepseekmoe' computes with the backend 'grouped' on cpu"
    assert any(
        text.startswith(f"{way}, because their activation is neither silu(gate) * up,") for text in caplog.messages
    )


def other_gatings() -> dict[str, Callable]:
    """What looks like a formula that is known, and is another one."""

    def halves(first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return first.chunk(2, dim=-1)

    return {
        "a constant": lambda self, x: self.act_fn(halves(x)[0].clamp(max=200.0)) * halves(x)[1],
        "a flag": lambda self, x: self.act_fn(halves(x)[0] if self.flag else 2 * halves(x)[0]) * halves(x)[1],
        "a mode": lambda self, x: self.act_fn(halves(x)[0]) * halves(x)[1] * (1 if self.training else 2),
        "a threshold": lambda self, x: self.act_fn(halves(x)[0]) * halves(x)[1] * (1 if self.limit < 3 else 2),
        "another clamp": lambda self, x: self.act_fn(halves(x)[0]).clamp(max=self.limit) * halves(x)[1],
        "another function": lambda self, x: F.relu(halves(x)[0]) * halves(x)[1],
        "another order": lambda self, x: self.act_fn(x[..., ::2]) * x[..., 1::2],
        "an error": lambda self, x: self.act_fn(halves(x)[0]) * halves(x)[1] + self.weights[0],
    }


@pytest.mark.parametrize("name", other_gatings())
def test_an_activation_that_only_looks_known(name: str) -> None:
    @use_experts_implementation
    class Others(Experts):
        flag, weights = False, (0.5,)
        _apply_gate = other_gatings()[name]

    experts = Others(SimpleNamespace(_experts_implementation="deepseekmoe"), 2, 16, 8).eval()
    assert experts_gating.gating_numbers(experts) is None
    hidden, ids, weights = torch.randn(3, 16), torch.tensor([[0, 1], [1, 0], [0, 0]]), torch.rand(3, 2)
    expected = ALL_EXPERTS_FUNCTIONS["batched_mm"](experts, hidden, ids, weights)
    assert_same(run_experts(experts, hidden, ids, weights), expected)
    with pytest.raises(ValueError, match="backend='loop' is not allowed: their activation is neither"):
        run_experts(experts, hidden, ids, weights, backend="loop")


def test_numbers_of_an_activation_are_those_of_the_moment() -> None:
    experts = inputs_of(dataclasses.replace(CASE, gating="clamped")).experts
    assert experts_gating.gating_numbers(experts) == ("silu", LIMIT, 1.0, 0.0)
    experts.limit = 3
    assert experts_gating.gating_numbers(experts) == ("silu", 3.0, 1.0, 0.0)
    for limit in (0, -1.0, None, torch.tensor(2.0)):  # a branch that nobody has tried may ask for these
        experts.limit = limit
        assert experts_gating.gating_numbers(experts) is None
    del experts.limit
    assert experts_gating.gating_numbers(experts) is None
    plain = inputs_of(CASE).experts
    plain._apply_gate = lambda first: first
    assert experts_gating.gating_numbers(plain) is None


def test_a_class_that_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = inputs_of(CASE).experts
    assert experts_gating.gating_numbers(experts) == experts_gating.SILU
    monkeypatch.setattr(Experts, "_apply_gate", other_gatings()["another function"])
    assert experts_gating.gating_numbers(experts) is None


# ------------------------------------------------------------------------------------------ which backend, and the log
def test_which_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the limit as it is

    def backend(hidden: int, width: int, **module: object) -> tuple[str, str]:
        stacks = Experts(None, 2, 1, 1).to("meta")
        stacks.gate_up_proj = nn.Parameter(torch.empty(2, 2 * width, hidden, device="meta"))
        for name, value in module.items():
            setattr(stacks, name, value)
        return choose_backend(stacks, torch.empty(0, hidden))

    assert backend(1024, 704) == ("loop", "")
    assert backend(512, 512) == ("loop", "")
    assert backend(576, 96)[0] == "grouped" and "so small" in backend(576, 96)[1]
    assert backend(64, 32)[0] == "grouped"
    assert backend(1024, 704, act_fn=nn.GELU())[1].startswith("their activation is neither silu(gate) * up")
    assert backend(1024, 704, act_fn=nn.GELU(approximate="tanh")) == ("loop", "")
    other = SimpleNamespace(device=torch.device("xpu"))
    assert choose_backend(Experts(None, 2, 8, 8), other) == ("grouped", "the tensors are on the device 'xpu'")
    cpu = torch.device("cpu")
    assert why_not_fused(cpu, torch.float64, 8) == (
        "the products are in torch.float64, and the kernels take float32, bfloat16 and float16"
    )
    assert why_not_fused(cpu, torch.float32, 1025) == "there are 1025 experts, and the kernels take at most 1024"
    with pytest.raises(ValueError, match="backend='gruoped' is not allowed: one of"):
        run_experts(
            Experts(None, 2, 8, 8), torch.empty(0, 8), torch.empty(0, 1).long(), torch.empty(0, 1), backend="gruoped"
        )


def test_autocast_decides_the_dtype(tiny_model: Callable) -> None:
    model = tiny_model().eval()
    module = model.model.layers[1].mlp.experts
    seen = []

    def note(*arguments: object) -> object:
        seen.append(arguments[0].dtype)
        return experts_op(*arguments)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(experts_operator, "experts_op", note)
        hidden = torch.randn(4, 32)
        output = experts_forward(module, hidden, torch.tensor([[0, 1, 2]] * 4), torch.rand(4, 3))
    assert seen == [torch.bfloat16] and output.dtype == torch.float32


def test_a_trace_of_few_tokens_in_16_bits_takes_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "has_instructions", lambda dtype: False)
    inputs = inputs_of(dataclasses.replace(CASE, dtype=torch.bfloat16, tokens=9))
    module = inputs.experts.eval().requires_grad_(False)
    with torch.no_grad():
        few = inputs.hidden[:3], inputs.ids[:3], inputs.weights[:3]
        traced = torch.jit.trace(lambda *given: run_experts(module, *given), few)
        all_of_them = inputs.hidden, inputs.ids, inputs.weights
        expected = run_experts(module, *all_of_them, backend="loop")
        assert (traced(*all_of_them) - expected).norm() <= 1e-2 * expected.norm()


# --------------------------------------------------------------------------------------------- as an operator of torch
@pytest.mark.parametrize(("rank", "gating"), [(0, "silu"), (4, "silu"), (0, "shifted"), (0, "gelu")])
def test_operators_keep_the_rules_of_torch_library(rank: int, gating: str) -> None:
    check_operators(rank, "eager", gating)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    inputs = inputs_of(CASE)
    output = run_experts(inputs.experts, inputs.hidden, inputs.ids, inputs.weights, backend="loop")
    (gradient,) = torch.autograd.grad(output.square().sum(), inputs.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize("gating", GATINGS)
def test_compiled_as_one_graph_for_any_number_of_tokens(gating: str) -> None:
    frames, module = [], inputs_of(dataclasses.replace(CASE, gating=gating)).experts
    experts_gating._found_form.cache_clear()

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        frames.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def run(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return run_experts(module, hidden, ids, weights, backend="loop")

    for tokens in (5, 12, 31):
        inputs = inputs_of(dataclasses.replace(CASE, tokens=tokens, gating=gating))
        arguments = (inputs.hidden, inputs.ids, inputs.weights)
        assert_same(run(*arguments), run_experts(module, *arguments, backend="loop"))
    assert len(frames) == 1


def test_compiled_training_step_with_adapters() -> None:
    def gradients(compiled: bool) -> dict[str, torch.Tensor]:
        model = direct(make(), lora_dropout=0.5)
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        torch.manual_seed(5)
        step.eval()(LORA_IDS, labels=LORA_IDS, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    for (name, expected), found in zip(gradients(False).items(), gradients(True).values(), strict=True):
        assert_same(found, expected, name)


def test_compiled_training_step(tiny_model: Callable) -> None:
    def gradients(compiled: bool) -> dict[str, torch.Tensor]:
        model: DeepseekMoeForCausalLM = tiny_model()
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        step(IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    for (name, expected), found in zip(gradients(False).items(), gradients(True).values(), strict=True):
        assert_same(found, expected, name)
