"""The kernels' trials: what passes, what is made wrong on purpose, what is kept, and what computes then."""

import dataclasses
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from experts_cases import inputs_of
from operator_checks import CASE
from tolerances import assert_same
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_deepseekmoe import (
    experts,
    experts_blocks,
    experts_decoding,
    experts_kernels,
    experts_triton,
    group_by_expert,
    kernel_trial,
    route,
    routing_kernels,
    routing_triton,
    triton_support,
)
from modeling_deepseekmoe.experts import choose_backend, run_experts
from modeling_deepseekmoe.experts_gating import Gating
from modeling_deepseekmoe.kernel_trial import record_path, why_failed
from modeling_deepseekmoe.triton_support import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="faults are made in the interpreter")
CPU = torch.device("cpu")
TRIALS = ("routing", "grouping", "experts")
# The activations of DeepSeek-V4, MiniMax-M3 and Gemma 4.
CLAMPED, SHIFTED, GELU = (
    gating.trial_case for gating in (Gating(limit=10.0), Gating("silu", 7.0, 1.702, 1.0), Gating("gelu_tanh"))
)
FP8, MXFP4 = ("silu", "fp8"), ("silu", "mxfp4")
CASE_OF_ROUTING = (8, 2, "softmax", 1, 1, "max", "scores")  # that of eight experts, top-2


@pytest.fixture(autouse=True)
def on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trials are held on the CPU, as if it were a GPU that nobody knows yet."""
    monkeypatch.setattr(kernel_trial, "DEVICES", ("cpu",))
    monkeypatch.setattr(triton_support.triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("modeling_deepseekmoe"), "propagate", True)
    kernel_trial.forget_outcomes()
    yield
    kernel_trial.forget_outcomes()


def records(tmp_path: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in (tmp_path / "deepseekmoe").glob("*.json"))


class Fault(NamedTuple):
    """A constant of a kernel's source that is made wrong."""

    trial: str
    kernel: str
    right: str
    wrong: str
    case: tuple = ()

    def make(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the wrong kernel in place of the right one."""
        of_experts = (experts_decoding, experts_blocks, experts_kernels), experts_triton
        modules, caller = {"experts": of_experts}.get(self.trial, ((routing_kernels,), routing_triton))
        sources = [Path(module.__file__).read_text(encoding="utf-8") for module in modules]
        assert sum(source.count(self.right) for source in sources) == 1
        for module, source in zip(modules, sources, strict=True):
            name = module.__name__.rpartition(".")[2]
            path = folder / f"faulty_{name}.py"
            source = source.replace(self.right, self.wrong)
            for name_of_part in ("experts_decoding", "experts_blocks"):
                source = source.replace(f"from .{name_of_part}", f"from .faulty_{name_of_part}")
            path.write_text(source, encoding="utf-8")
            spec = importlib.util.spec_from_file_location(f"modeling_deepseekmoe.faulty_{name}", path)
            faulty = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, spec.name, faulty)
            spec.loader.exec_module(faulty)
        monkeypatch.setattr(caller, self.kernel, getattr(faulty, self.kernel))


@pytest.mark.parametrize("name", TRIALS)
def test_right_kernels_pass_once_a_machine(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert why_failed(name, CPU) == "" and not caplog.records
    assert records(tmp_path) == [name]
    assert json.loads(record_path(name, CPU).read_text())["torch"] == torch.__version__
    kernel_trial.forget_outcomes()  # another process
    monkeypatch.setitem(kernel_trial._TRIALS, name, pytest.fail)
    assert why_failed(name, CPU) == ""


FAULTS = (
    Fault("routing", "route_kernel", "e, 1.0) / (1.0 + e)", "e, 1.0) / (1.01 + e)"),
    Fault("routing", "route_backward_kernel", "score * (1.0 - score)", "score * (1.01 - score)"),
    Fault("grouping", "group_kernel", "position[None, :] < position", "position[None, :] <= position"),
    Fault("experts", "first_product_kernel", "gate / (1.0 + tl.exp(", "gate / (1.1 + tl.exp("),
    Fault("experts", "activation_gradient_kernel", "opened * (1.0 - sigmoid)", "opened * (0.9 - sigmoid)"),
    Fault("experts", "activation_gradient_kernel", "tl.abs(stored_up) > LIMIT", "stored_up > LIMIT", CLAMPED),
    Fault("experts", "activation_gradient_kernel", "curve *= LINEAR + 3.0", "curve *= 2.0 * LINEAR + 3.0", GELU),
    Fault("experts", "first_product_kernel", "gate * LINEAR", "gate", SHIFTED),
    Fault("experts", "first_product_kernel", "row // PROJECTION * OF_PROJECTION", "row // PROJECTION * 0", FP8),
    Fault("experts", "activation_gradient_kernel", "(codes & 8) << 28", "(codes & 8) << 27", MXFP4),
    Fault("experts", "combine_kernel", "range(TOP_K):", "range(TOP_K - 1):"),
    Fault("experts", "outer_kernel", "range(begin, end, BLOCK_ROWS)", "range(begin + 1, end, BLOCK_ROWS)"),
)


# A trial takes ten seconds in the interpreter: of the experts' ordinary kernels one, and one of quantised weights.
OFTEN = [*FAULTS[:4], FAULTS[8], FAULTS[10]]


@pytest.mark.parametrize(
    "fault",
    [*OFTEN, *(pytest.param(fault, marks=pytest.mark.slow) for fault in FAULTS if fault not in OFTEN)],
    ids=lambda fault: f"{fault.kernel}-{fault.case[:2]}",
)
def test_a_wrong_constant_is_found_and_nothing_is_kept(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = fault.trial
    with monkeypatch.context() as patch:
        fault.make(tmp_path, patch)
        reason = why_failed(name, CPU, fault.case)
        of_case = f" for {', '.join(map(str, fault.case))}" if fault.case else ""
        assert f"the trial of the {name} kernels{of_case} failed on cpu (WrongKernelError" in reason
        assert why_failed(name, CPU, fault.case) == reason
        assert len([record for record in caplog.records if "Plain torch computes instead" in record.message]) == 1
        assert records(tmp_path) == []
        kernel_trial.forget_outcomes()
        assert why_failed(name, CPU, fault.case)  # a second start tries again
    kernel_trial.forget_outcomes()
    assert why_failed(name, CPU, fault.case) == "" and records(tmp_path) == [name]


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def __getitem__(self, grid: object) -> Callable:
            raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(experts_triton, "outer_kernel", Broken())
    assert "RuntimeError: PassManager::run failed" in why_failed("experts", CPU)
    assert "Plain torch computes instead" in caplog.text


def test_training_goes_on_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(CASE)
    arguments = (inputs.experts, inputs.hidden, inputs.ids, inputs.weights)
    monkeypatch.setitem(kernel_trial._OUTCOMES, ("experts", CPU, ()), "the trial failed")
    with pytest.raises(ValueError, match="backend='triton' is not allowed: the trial failed"):
        run_experts(*arguments, backend="triton")
    monkeypatch.setattr(experts, "why_not_fused", lambda *_: "")
    monkeypatch.setattr(
        experts, "why_failed", lambda name, device, case=(): "the trial failed" if name == "experts" else ""
    )

    class Rows:
        device = torch.device("cuda")

    backend, reason = choose_backend(inputs.experts, Rows())
    assert (backend, reason) == ("grouped", "the trial failed")
    expected = run_experts(*arguments, backend="loop")
    found = run_experts(*arguments, backend=backend)
    assert_same(found, expected)
    assert_same(*(torch.autograd.grad(of.square().sum(), inputs.hidden)[0] for of in (found, expected)))


def test_compiled_experts_whose_limit_changes(tmp_path: Path) -> None:
    """In one graph, and their kernels are tried once."""
    inputs = inputs_of(dataclasses.replace(CASE, gating="shifted"))
    arguments = (inputs.experts, inputs.hidden, inputs.ids, inputs.weights)

    @torch.compile(fullgraph=True, backend="eager")
    def run() -> torch.Tensor:
        return run_experts(*arguments, backend="triton")

    for limit in (0.6, 3.0, 7):
        inputs.experts.limit = limit
        assert_same(run(), run_experts(*arguments, backend="loop"))
    assert records(tmp_path) == ["experts", "grouping"]


def test_routing_goes_on_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(6, 8, requires_grad=True)
    monkeypatch.setitem(kernel_trial._OUTCOMES, ("routing", CPU, CASE_OF_ROUTING), "the trial failed")
    monkeypatch.setitem(kernel_trial._OUTCOMES, ("grouping", CPU, ()), "the trial failed")
    monkeypatch.setattr(routing_triton, "INTERPRETED", False)  # as on a GPU, where "auto" means the kernels
    expected = route(logits, 2, implementation="eager")
    found = route(logits, 2, implementation="auto")
    assert torch.equal(found.expert_ids, expected.expert_ids)
    for name, case, call in (
        ("routing", CASE_OF_ROUTING, lambda: route(logits, 2, implementation="triton")),
        ("grouping", (), lambda: group_by_expert(found.expert_ids, 8, implementation="triton")),
    ):
        with pytest.raises(ValueError, match="implementation='triton' is not allowed: the trial failed"):
            call()
        monkeypatch.setitem(kernel_trial._OUTCOMES, (name, CPU, case), "")
        call()


def test_every_size_of_routing_has_a_trial_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Triton 3.6, whose kernels were right for all sizes but 64 experts."""
    right = routing_kernels.route_kernel

    class WrongFor64:
        def __getitem__(self, grid: object) -> Callable:
            def launch(*args: object, **sizes: int) -> None:
                right[grid](*args, **sizes)
                if sizes["WIDTH"] == 64:
                    args[3].fill_(0)  # type: ignore[attr-defined]

            return launch

    monkeypatch.setattr(routing_triton, "route_kernel", WrongFor64())
    monkeypatch.setattr(routing_triton, "INTERPRETED", False)
    for experts_of_gate, used in ((32, True), (64, False), (128, True), (60, False)):
        logits = torch.randn(5, experts_of_gate)
        assert_same(route(logits, 3).weights, route(logits, 3, implementation="eager").weights)
        failed = why_failed("routing", CPU, (experts_of_gate, 3, "softmax", 1, 1, "max", "scores"))
        assert bool(failed) != used
        assert not failed or f"for {experts_of_gate}, 3, softmax, 1, 1, max, scores failed" in failed
    assert records(tmp_path) == ["routing", "routing"]


MODES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "meta": lambda: torch.device("meta"),
    "fake": FakeTensorMode,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_trial_does_not_depend_on_where_it_is_held(mode: str) -> None:
    state = torch.get_rng_state()
    with MODES[mode]():
        assert [why_failed(name, CPU) for name in ("routing", "grouping")] == ["", ""]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trial_has_dtypes_of_its_own() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert [why_failed(name, CPU) for name in TRIALS] == ["", "", ""]
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_trial_while_a_model_is_traced() -> None:
    logits = torch.randn(6, 8)
    traced = torch.jit.trace(lambda logits: route(logits, 2, implementation="triton").weights, logits)
    assert_same(traced(logits), route(logits, 2, implementation="eager").weights)


def test_a_trial_while_a_model_is_compiled() -> None:
    def run(logits: torch.Tensor) -> torch.Tensor:
        return route(logits, 2, implementation="triton").weights

    logits = torch.randn(6, 8)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(compiled(logits), run(logits))
    assert record_path("routing", CPU, CASE_OF_ROUTING).exists()


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "deepseekmoe").write_text("a file")
    with caplog.at_level("INFO", "modeling_deepseekmoe"):
        assert why_failed("grouping", CPU) == ""
    assert "cannot be kept in" in caplog.text
