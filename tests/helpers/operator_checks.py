"""Checks of the experts' operator that CPU and GPU share."""

import dataclasses

import torch
from experts_cases import LEAVES, Case, inputs_of
from torch.library import opcheck

from modeling_deepseekmoe.experts import run_experts
from modeling_deepseekmoe.experts_gating import gating_numbers
from modeling_deepseekmoe.experts_operator import experts_backward_op, experts_op

CASE = Case(0, "random", torch.float32, 9, 5, 3, 24, 20, 0, "both", False, False, frozenset(LEAVES))
WITHOUT_ADAPTERS = (None, None, 1.0, 0.0, None) * 2


def stacks_of(experts: torch.nn.Module) -> tuple:
    """Stacks that are not quantised, as the operator takes them."""
    return (experts.gate_up_proj, None, None, experts.down_proj, None, None, "")


def check_dropout(backend: str, seeds: int, device: str = "cpu") -> None:
    """The mean over seeds is the output without dropout, where that is linear; and each gradient is the slope."""
    inputs = inputs_of(dataclasses.replace(CASE, rank=4, tokens=6), device, dropout=0.5)

    def run(adapters: list, hidden: torch.Tensor = inputs.hidden) -> torch.Tensor:
        return run_experts(inputs.experts, hidden, inputs.ids, inputs.weights, adapters=adapters, backend=backend)

    with torch.no_grad():
        down_alone = [None, inputs.adapters[1]]
        without = run([None, down_alone[1]._replace(dropout=0.0)])
        drawn = [torch.tensor(seed, device=device) for seed in range(seeds)]
        outputs = torch.stack([run([None, down_alone[1]._replace(seed=seed)]) for seed in drawn])
        spread = outputs.std(0) / seeds**0.5
        assert ((outputs.mean(0) - without).abs() <= 5 * spread + 1e-5).all()
        assert (outputs.std(0) > 0).float().mean() > 0.9
    tensors = inputs.differentiable
    run(inputs.adapters).backward(inputs.grad)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        direction = torch.randn(tensor.shape, generator=generator).to(device)
        slopes = []
        with torch.no_grad():
            for step in (1e-2, -1e-2):
                tensor.add_(direction, alpha=step)
                slopes.append((run(inputs.adapters).double() * inputs.grad).sum() / 2e-2)
                tensor.sub_(direction, alpha=step)
        slope = float(slopes[0] - slopes[1])
        assert abs(slope - float((tensor.grad * direction).sum())) <= 1e-2 * max(1.0, abs(slope)), name


def check_operators(rank: int, implementation: str, gating: str = "silu") -> None:
    """The checks of torch, of both operators."""
    inputs = inputs_of(dataclasses.replace(CASE, rank=rank, gating=gating))
    adapters = [value for adapter in inputs.adapters for value in adapter or WITHOUT_ADAPTERS[:5]]
    stacks = stacks_of(inputs.experts)
    arguments = (inputs.hidden, inputs.ids, inputs.weights, *stacks, *gating_numbers(inputs.experts), *adapters)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(experts_op, (*arguments, True, implementation), test_utils=checks)
    _, kept, permutation, offsets = experts_op(*arguments, True, implementation)
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
    needs = [True] * 4 + [rank > 0] * 4
    opcheck(
        experts_backward_op,
        (inputs.grad, *detached, permutation, offsets, kept, needs, implementation),
        test_utils=checks,
    )
