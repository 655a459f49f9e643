"""Generated inputs for the experts, and the comparison of every way to compute them with a loop over tokens: on the
CPU (the kernels in Triton's interpreter), and the same on a GPU."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from tolerances import DOUBLE, EXPERTS_LOW_PRECISION, SAME_COMPUTATION
from torch import nn
from transformers.integrations import use_experts_implementation

from modeling_deepseekmoe.experts import run_experts
from modeling_deepseekmoe.experts_operands import Adapter, factors_of

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("random", "one expert", "elsewhere", "all elsewhere", "repeated")
# What can have a gradient.
LEAVES = ("hidden", "weights", "gate_up", "down", "gate_up_a", "gate_up_b", "down_a", "down_b")
# Activations: the one of most families, and those of DeepSeek-V4, MiniMax-M3 and Gemma 4.
GATINGS = ("silu", "clamped", "shifted", "gelu")
LIMIT, SLOPE = 0.6, 1.7


@use_experts_implementation
class Experts(nn.Module):
    """Stacked experts as transformers makes them."""

    def __init__(self, config: SimpleNamespace, num_experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.num_experts, self.act_fn, self.limit = num_experts, nn.SiLU(), LIMIT
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * width, hidden) / hidden**0.5)
        self.down_proj = nn.Parameter(torch.randn(num_experts, hidden, width) / width**0.5)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Not called."""
        raise NotImplementedError


@use_experts_implementation
class ClampedExperts(Experts):
    """Experts as those of DeepSeek-V4."""

    def _apply_gate(self, first: torch.Tensor) -> torch.Tensor:
        gate, up = first.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(min=-self.limit, max=self.limit)


@use_experts_implementation
class ShiftedExperts(Experts):
    """Experts as those of MiniMax-M3."""

    slope = SLOPE

    def _apply_gate(self, first: torch.Tensor) -> torch.Tensor:
        gate, up = first.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.slope))


def activation(gating: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The reference of an activation."""
    if gating in ("clamped", "shifted"):
        gate, up = torch.clamp(gate, max=LIMIT), torch.clamp(up, -LIMIT, LIMIT)
    if gating == "shifted":
        return gate / (1 + torch.exp(-SLOPE * gate)) * (up + 1)
    if gating == "gelu":
        return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    return F.silu(gate) * up


@dataclass(frozen=True)
class Case:
    """One call of the experts, without its tensors."""

    seed: int
    kind: str
    dtype: torch.dtype
    tokens: int
    experts: int
    top_k: int
    hidden: int
    width: int
    rank: int
    adapted: str
    strided: bool
    masked: bool
    trained: frozenset[str]
    gating: str = "silu"


@st.composite
def cases(draw: st.DrawFn, most_tokens: int = 12, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """Sizes that are no powers of two, none at all, one expert, as many choices as experts."""
    experts, kind, gating = draw(st.integers(1, 7)), draw(st.sampled_from(KINDS)), draw(st.sampled_from(GATINGS))
    # Equal slots are rounded alike, and their errors add up; a gate at its limit is rounded to one of its two sides.
    if kind == "repeated" or gating in ("clamped", "shifted"):
        dtypes = tuple(dtype for dtype in dtypes if dtype.itemsize > 2)
    return Case(
        seed=draw(st.integers(0, 2**20)),
        kind=kind,
        dtype=draw(st.sampled_from(dtypes)),
        tokens=draw(st.one_of(st.sampled_from([0, 1]), st.integers(2, most_tokens))),
        experts=experts,
        top_k=1 if kind == "one expert" else draw(st.one_of(st.just(experts), st.integers(1, experts))),
        hidden=draw(st.integers(1, 40)),
        width=draw(st.integers(1, 36)),
        rank=draw(st.sampled_from([0, 0, 1, 3, 16, 17])),
        adapted=draw(st.sampled_from(["both", "gate_up", "down"])),
        strided=draw(st.booleans()),
        masked=draw(st.booleans()),
        trained=draw(st.one_of(st.just(frozenset(LEAVES)), st.frozensets(st.sampled_from(LEAVES)))),
        gating=gating,
    )


@dataclass
class Inputs:
    """The tensors of a case."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    experts: Experts
    adapters: list[Adapter | None]
    grad: torch.Tensor
    gating: str = "silu"

    @property
    def differentiable(self) -> dict[str, torch.Tensor]:
        """Everything that can have a gradient."""
        factors = factors_of(*self.adapters)
        stacks = {"gate_up": self.experts.gate_up_proj, "down": self.experts.down_proj}
        found = {
            "hidden": self.hidden,
            "weights": self.weights,
            **stacks,
            **dict(zip(LEAVES[4:], factors, strict=True)),
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def inputs_of(case: Case, device: str = "cpu", dropout: float = 0.0) -> Inputs:
    """Random tensors, leaves that have a gradient where the case wants one."""
    torch.manual_seed(case.seed)
    kind = {"clamped": ClampedExperts, "shifted": ShiftedExperts}.get(case.gating, Experts)
    experts = kind(SimpleNamespace(_experts_implementation="deepseekmoe"), case.experts, case.hidden, case.width)
    if case.gating == "gelu":
        experts.act_fn = nn.GELU(approximate="tanh")
    experts = experts.to(device, case.dtype)
    hidden = torch.randn(case.tokens, 2 * case.hidden if case.strided else case.hidden).to(device, case.dtype)
    hidden = hidden[:, ::2] if case.strided else hidden
    ids = [torch.randperm(case.experts)[: case.top_k] for _ in range(case.tokens)]
    ids = torch.stack(ids) if ids else torch.zeros(0, case.top_k, dtype=torch.long)
    if case.kind == "one expert":
        ids = torch.full_like(ids, case.experts - 1)
    elif case.kind == "elsewhere":
        ids = ids.masked_fill(torch.rand(ids.shape) < 0.3, case.experts)
    elif case.kind == "all elsewhere":
        ids = torch.full_like(ids, case.experts)
    elif case.kind == "repeated":  # the same expert several times, which no gate chooses
        ids = ids // 3 * 3
    weights = torch.rand(case.tokens, case.top_k)
    if case.masked:
        weights[::2] = 0
    if case.strided:
        ids, weights = (tensor.t().contiguous().t() for tensor in (ids, weights))
    sizes = {"gate_up": (2 * case.width, case.hidden), "down": (case.hidden, case.width)}
    adapters: list[Adapter | None] = []
    for name, (outside, inside) in sizes.items():
        if not case.rank or case.adapted not in ("both", name):
            adapters.append(None)
            continue
        factor_a = (torch.randn(case.experts, case.rank, inside) / inside**0.5).to(device, case.dtype)
        factor_b = (torch.randn(outside, case.rank, case.experts) / case.rank).to(device, case.dtype)
        factor_b = factor_b.permute(2, 0, 1)
        seed = torch.randint(2**62, (), device=device) if dropout else None
        adapters.append(Adapter(factor_a, factor_b, 0.7, dropout, seed))
    grad = torch.randn(case.tokens, case.hidden).to(device, case.dtype)
    inputs = Inputs(hidden, ids.to(device), weights.to(device), experts, adapters, grad, case.gating)
    for name, tensor in inputs.differentiable.items():
        tensor.requires_grad_(name in case.trained)
    return inputs


def by_token(inputs: Inputs) -> torch.Tensor:
    """The reference: token by token and choice by choice, in float64."""
    rows = []
    stacks = (inputs.experts.gate_up_proj.double(), inputs.experts.down_proj.double())
    adapters = inputs.adapters
    for hidden, ids, weights in zip(inputs.hidden.double(), inputs.ids, inputs.weights.double(), strict=True):
        row = torch.zeros_like(hidden)
        for expert, weight in zip(ids.tolist(), weights, strict=True):
            if expert == len(stacks[0]):
                continue
            values = hidden
            for number, (stack, adapter) in enumerate(zip(stacks, adapters, strict=True)):
                product = stack[expert] @ values
                if adapter is not None:
                    factor_a, factor_b = adapter.factor_a[expert].double(), adapter.factor_b[expert].double()
                    product = product + adapter.scale * (factor_b @ (factor_a @ values))
                if number == 0:
                    product = activation(inputs.gating, *product.chunk(2))
                values = product
            row = row + weight * values
        rows.append(row)
    return torch.stack(rows) if rows else inputs.hidden.double()


def check_case(case: Case, backend: str, device: str = "cpu") -> None:
    """Output and all gradients of one way against the reference; those that nobody asked for do not exist."""
    inputs = inputs_of(case, device)
    if backend not in ("triton", "loop"):
        inputs.adapters = [None, None]
    tensors = inputs.differentiable
    found = run_experts(
        inputs.experts,
        inputs.hidden,
        inputs.ids,
        inputs.weights,
        adapters=inputs.adapters,
        backend=backend,
    )
    expected = by_token(inputs)
    assert found.dtype == case.dtype and found.shape == expected.shape
    close(found, expected, case.dtype, "output")
    assert found.requires_grad == any(tensor.requires_grad for tensor in tensors.values())
    if not found.requires_grad:
        return
    found.backward(inputs.grad)
    gradients = {name: tensor.grad for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.grad = None
    if expected.requires_grad:
        expected.backward(inputs.grad.double())
    for name, tensor in tensors.items():
        if not tensor.requires_grad:
            assert gradients[name] is None, name
            continue
        assert gradients[name] is not None and gradients[name].dtype == tensor.dtype, name
        reference = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        close(gradients[name], reference, case.dtype, name)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """By the largest value of the tensor."""
    tolerance = {torch.float64: DOUBLE, **EXPERTS_LOW_PRECISION}.get(dtype, SAME_COMPUTATION)
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    difference = float((found.double() - expected.double()).detach().abs().max()) if expected.numel() else 0.0
    assert difference <= tolerance * scale, f"{name}: {difference} of {scale}"
