"""The kernels against the reference, in Triton's interpreter on the CPU, and as operators of torch."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from program_order import shuffled_programs
from routing_cases import GENERATED, Case, cases, check_grouping, check_rounding, check_route
from tolerances import GOLDEN_LOGITS, SAME_COMPUTATION, assert_same
from torch.library import opcheck
from transformers import AutoModelForCausalLM

import modeling_deepseekmoe
from modeling_deepseekmoe import group_by_expert, route, route_native_gates, routing_triton
from modeling_deepseekmoe.auxiliary_losses import auxiliary_losses
from modeling_deepseekmoe.triton_support import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="where there is a GPU, test_gpu.py runs the same on it")
V3_OPTIONS = {"score_function": "sigmoid", "num_groups": 4, "top_k_groups": 2, "group_score": "top2_sum",
              "normalize": True, "scaling_factor": 2.5}  # fmt: skip


@settings(GENERATED, max_examples=70)
@given(cases())
def test_generated_cases_equal_the_reference(case: Case) -> None:
    check_route(case)


@settings(GENERATED, max_examples=40)
@given(
    tokens=st.integers(0, 40), experts=st.integers(1, 70), top_k=st.integers(1, 9), seed=st.integers(0, 2**20),
    kind=st.sampled_from(["random", "one expert", "elsewhere", "few experts"]),
)  # fmt: skip
def test_generated_groups_are_stable(tokens: int, experts: int, top_k: int, seed: int, kind: str) -> None:
    check_grouping(tokens, experts, top_k, seed, kind)


def test_groups_of_many_choices() -> None:
    """More choices than one program takes, and more programs than are read at once."""
    check_grouping(1500, 33, 3, 0, "elsewhere")


def test_real_sizes_differ_by_rounding_at_most() -> None:
    assert check_rounding(60) <= 1


def test_sums_of_programs_with_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than programs take at once, in two sequences, and the same bits in every run."""
    monkeypatch.setattr(routing_triton, "MAX_PROGRAMS", 6)
    logits = torch.randn(2 * 90, 100)
    plans = [route(logits, 4, num_sequences=2, implementation=name) for name in ("eager", "triton", "triton")]
    assert torch.equal(plans[0].counts_by_sequence, plans[1].counts_by_sequence)
    torch.testing.assert_close(plans[0].score_sums, plans[1].score_sums, rtol=SAME_COMPUTATION, atol=0)
    assert torch.equal(plans[1].score_sums, plans[2].score_sums)


def test_programs_in_any_order_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_triton, "MAX_PROGRAMS", 14)
    logits = torch.randn(2 * 90, 100)

    def results() -> list[torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        found = route(leaf, 4, num_sequences=2, implementation="triton", **{**V3_OPTIONS, "num_groups": 5})
        (found.weights.square().sum() + found.score_sums.square().sum()).backward()
        groups = group_by_expert(found.expert_ids, 100, implementation="triton")
        return [found.expert_ids, found.weights, found.counts_by_sequence, found.score_sums, leaf.grad, *groups]

    expected = results()
    for seed in range(3):
        with shuffled_programs(seed) as numbers:
            assert all(torch.equal(one, other) for one, other in zip(results(), expected, strict=True))
        assert max(numbers) > 10


def test_golden_cases(golden: Golden) -> None:
    """The official figures with the kernels choosing the experts."""
    expected = golden.expected
    model = golden.model(router_implementation="triton")
    assert model.config.router_implementation == "triton"
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    assert (logits - expected["logits"]).abs().max() <= GOLDEN_LOGITS
    generated = model.generate(expected["input_ids"][:1, :9], max_new_tokens=12, do_sample=False)
    assert generated[0, -12:].tolist() == expected["generated"].flatten().tolist()[-12:]


@pytest.mark.parametrize("fields", [{"seq_aux": True}, {"seq_aux": False}, {"topk_method": "noaux_tc", "n_group": 2,
    "topk_group": 1, "scoring_func": "sigmoid", "norm_topk_prob": True, "sequence_balance_alpha": 0.02}])  # fmt: skip
def test_training_is_that_of_eager(tiny_model: Callable, fields: dict) -> None:
    """Loss, auxiliary losses, gradients and counts, with padding."""
    losses = {"aux_loss_alpha": 0.1, "device_balance_alpha": 0.1, "communication_balance_alpha": 0.1,
              "n_device_groups": 2, "max_devices_per_token": 1, "router_z_loss_alpha": 0.01}  # fmt: skip
    input_ids = torch.randint(96, (3, 7))
    mask = (torch.arange(7)[None] < torch.tensor([7, 3, 5])[:, None]).long()
    results = []
    for implementation in ("eager", "triton"):
        torch.manual_seed(0)
        model = tiny_model(**{**losses, **fields}, router_implementation=implementation).train()
        outputs = model(input_ids, attention_mask=mask, labels=input_ids)
        outputs.loss.backward()
        results.append((model, outputs, modeling_deepseekmoe.take_router_load(model)))
    (model, outputs, load), (other, found, found_load) = results
    assert outputs.aux_loss > 0
    assert_same(found.loss, outputs.loss)
    assert_same(found.aux_loss, outputs.aux_loss)
    assert torch.equal(found_load.tokens_per_expert, load.tokens_per_expert)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_same(two.grad, one.grad, name)


# ----------------------------------------------------------------------------------------------- as operators of torch
@pytest.mark.parametrize("transposed", [False, True])
def test_operators_keep_the_rules_of_torch_library(transposed: bool) -> None:
    from modeling_deepseekmoe.routing_triton import group_by_expert_op, route_backward_op, route_op

    logits = torch.randn(8, 6).t() if transposed else torch.randn(6, 8)
    logits.requires_grad_()
    bias, mask = torch.randn(8), torch.arange(6) % 3 != 0
    arguments = (logits, bias, mask, 3, "sigmoid", 4, 2, "top2_sum", 0.1, 2.5, False, 2, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(route_op, arguments, test_utils=checks)
    ids = route_op(*arguments)[0]
    grads = (torch.randn(6, 3), torch.randn(2, 8), logits.detach(), ids, mask, "sigmoid", 0.1, 2.5)
    opcheck(route_backward_op, grads, test_utils=checks)
    opcheck(group_by_expert_op, (ids, 8))


def test_compiled_as_one_graph_for_any_number_of_tokens() -> None:
    frames = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        frames.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def step(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        plan = route(logits, 3, correction_bias=bias, **V3_OPTIONS, implementation="triton")
        groups = group_by_expert(plan.expert_ids, 16, implementation="triton")
        return plan.weights, plan.score_sums, groups.permutation, groups.offsets

    bias = torch.randn(16)
    for tokens in (5, 12, 31):
        logits = torch.randn(tokens, 16)
        plan = route(logits, 3, correction_bias=bias, **V3_OPTIONS, implementation="eager")
        groups = group_by_expert(plan.expert_ids, 16, implementation="eager")
        weights, sums, permutation, offsets = step(logits, bias)
        assert_same(weights, plan.weights)
        assert_same(sums, plan.score_sums)
        assert torch.equal(permutation, groups.permutation) and torch.equal(offsets, groups.offsets)
    assert len(frames) == 1


def test_compiled_with_its_gradient() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def objective(logits: torch.Tensor, implementation: str) -> torch.Tensor:
        plan = route(logits.t(), 3, normalize=True, num_sequences=2, implementation=implementation)
        return plan.weights.square().sum() + plan.score_sums.square().sum()

    gradients = []
    for implementation in ("eager", "triton"):
        logits = torch.linspace(-2, 3, 60).cos().view(6, 10).requires_grad_()
        objective(logits, implementation).backward()
        gradients.append(logits.grad)
    assert_same(*gradients)


# ----------------------------------------------------------------------------------------------- choosing and telling
def test_auto_is_eager_on_the_cpu_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    routing_triton._tell.cache_clear()
    monkeypatch.setattr(logging.getLogger("modeling_deepseekmoe"), "propagate", True)
    monkeypatch.setattr(routing_triton.logger, "propagate", True)
    with caplog.at_level(logging.INFO, logger="modeling_deepseekmoe.routing_triton"):
        for _ in range(3):
            route(torch.randn(2, 4), 2)
    lines = [record.getMessage() for record in caplog.records if "Routing on" in record.getMessage()]
    assert len(lines) == 1 and "Routing on cpu: implementation='auto' is 'eager', because" in lines[0]


def test_without_triton(tmp_path: Path) -> None:
    """The whole module, where Triton cannot be imported: eager works, and "triton" says what is missing."""
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')")
    code = (
        "import torch; from modeling_deepseekmoe import route; plan = route(torch.randn(3, 8), 2)\n"
        "try: route(torch.randn(3, 8), 2, implementation='triton')\n"
        "except ValueError as error: print(plan.weights.shape, error)"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    assert "torch.Size([3, 2]) implementation='triton' is not allowed: triton is not installed" in ran.stdout, (
        ran.stderr
    )


@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("name", ["v2-lite", "v2-group-limited", "v3-noaux"])
def test_gates_of_transformers_own_models(name: str, implementation: str) -> None:
    """The same logits and the same choices as before, in another order."""
    modeling_deepseekmoe.register()
    golden = Golden(name)
    model = AutoModelForCausalLM.from_pretrained(golden.folder).eval()
    assert type(model).__module__.startswith("transformers.")
    input_ids = golden.expected["input_ids"]
    chosen: list[torch.Tensor] = []
    gate = model.model.layers[-1].mlp.gate
    gate.register_forward_hook(lambda module, inputs, output: chosen.append(output[2].sort(dim=1).values))
    with torch.no_grad():
        before = model(input_ids).logits
        assert route_native_gates(model, implementation) == sum(hasattr(x.mlp, "gate") for x in model.model.layers)
        after = model(input_ids).logits
    assert_same(after, before)
    assert torch.equal(chosen[0], chosen[1]) and chosen[0].shape[0] == input_ids.numel()
    assert route_native_gates(model, "eager")


def test_gates_behind_a_hook_of_accelerate() -> None:
    modeling_deepseekmoe.register()
    model = AutoModelForCausalLM.from_pretrained(Golden("v3-noaux").folder).eval()
    gate, seen = model.model.layers[-1].mlp.gate, []

    class Watch(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: object, **kwargs: object) -> tuple:
            seen.append(type(module).__name__)
            return args, kwargs

    hidden = torch.randn(5, gate.hidden_dim)
    before = gate(hidden)[1].sort(dim=1).values
    add_hook_to_module(gate, Watch())
    route_native_gates(model, "triton")
    assert_same(gate(hidden)[1].sort(dim=1).values, before)
    assert seen == ["DeepseekV3TopkRouter"]


def test_a_plan_of_other_sequences_is_refused(tiny_config: Callable) -> None:
    config, logits = tiny_config(), torch.randn(2, 5, 8)
    for options in ({"num_sequences": 1}, {"statistics": False}):
        with pytest.raises(ValueError, match=r"routing is not allowed: .* 10 tokens, .* num_sequences=2"):
            auxiliary_losses(config, logits, route(logits.flatten(0, 1), 3, **options), None)


def test_models_without_native_gates(tiny_model: Callable) -> None:
    with pytest.raises(ValueError, match="it has no gates of transformers' own models"):
        route_native_gates(tiny_model())
    with pytest.raises(ValueError, match="implementation='fast' is not allowed"):
        route_native_gates(tiny_model(), "fast")


COMPILE = """
import sys

sys.path.insert(0, "benchmarks")
from prewarm_kernels import NoDevice, meta
import torch
from triton.runtime import driver
from modeling_deepseekmoe.routing_kernels import route_kernel
from modeling_deepseekmoe.routing_triton import WARPS, route_options

driver.set_active(NoDevice(90))
for experts, groups, kept in ((32, 1, 1), (64, 1, 1), (64, 8, 4), (72, 8, 4), (128, 1, 1), (256, 8, 4), (384, 1, 1)):
    ids, weights = meta(64, 6, dtype=torch.int64), meta(64, 6, dtype=torch.float32)
    nothing = [meta(64, dtype=torch.int64)] * 4 + [meta(64, dtype=torch.float32)]
    compiled = route_kernel.warmup(
        meta(64, experts, dtype=torch.float32), None, None, ids, weights, *nothing, experts, 64, 8, 8, 1.0, 1e-20,
        **route_options(experts, 6, groups, kept), SCORE_FUNCTION="sigmoid", TOP2_SUM=False, NORMALIZE=True,
        BIAS_ON_LOGITS=False, STATISTICS=False, ORDER="relaxed", num_warps=WARPS, grid=(8,),
    )
    print(experts, groups, compiled.asm["ptx"].count("bar.sync"))
"""


def test_compiled_rows_lie_in_one_warp(tmp_path: Path) -> None:
    """With this version of Triton. Across warps each reduction would take barriers, and may be wrong (Triton 3.6)."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    ran = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    barriers = {tuple(map(int, line.split()[:2])): int(line.split()[2]) for line in ran.stdout.splitlines()}
    assert len(barriers) == 7 and max(barriers.values()) <= 6, barriers
