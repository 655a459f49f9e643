# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The routed experts in plain torch, one expert after the other, for the CPU.

An expert's tokens are brought together in a buffer, go through its two products and are added to the output before the
next expert's turn. Nothing has the size of all slots but the first product, and that only where a backward pass
follows; every expert uses the same buffers, which stay in the cache.

Each product is given to BLAS as several, of some of the columns each: MKL divides one with few rows badly among
threads. Their results lie one after the other, "blocked": (C, n, width / C) instead of (n, width).

Shape letters: T tokens, D hidden, E experts, K chosen experts, I expert width, S = T * K slots (a token at one of its
experts), R rank of an adapter, n slots of one expert, in 32 bits at most MAX_ROWS at a time, C column blocks.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

MAX_ROWS = 512  # on two cores 192 rows reach 0.92 of the speed of a large product, and 384 rows 0.94
# On two cores, with 96 rows, one block reaches 0.61 of the speed of a large product, 2 reach 0.78, 4 reach 0.85.
MAX_COLUMN_BLOCKS = 4
_aten = torch.ops.aten


class Adapter(NamedTuple):
    """A product of low rank beside a projection: `scale * dropout(rows) @ factor_a[i].T @ factor_b[i].T` is added.

    Attributes:
        factor_a (`torch.Tensor` of shape (E, R, in)): in the dtype of the stacks.
        factor_b (`torch.Tensor` of shape (E, out, R)): in the same dtype, with any strides.
        scale (`float`).
        dropout (`float`): the probability with which a number of the rows is left out.
        seed (`torch.LongTensor` of shape ()): of the dropout.
    """

    factor_a: torch.Tensor
    factor_b: torch.Tensor
    scale: float = 1.0
    dropout: float = 0.0
    seed: torch.Tensor | None = None


def factors_of(*adapters: Adapter | None) -> list[torch.Tensor | None]:
    """Both factors of every adapter, two `None` for one that is none."""
    return [factor for adapter in adapters for factor in ((None, None) if adapter is None else adapter[:2])]


class _Block(NamedTuple):
    """Slots of one expert, `permutation[slots]`; `begin` is False where they follow other slots of the same expert."""

    expert: int
    slots: slice
    begin: bool


def _blocks(offsets: torch.Tensor, dtype: torch.dtype) -> list[_Block]:
    """All slots; those of an expert are one block in 16 bits, in which parameters' gradients are not added up."""
    ends = offsets.tolist()
    most = MAX_ROWS if dtype.itemsize > 2 else max(ends[-1], 1)
    return [
        _Block(expert, slice(start, min(start + most, end)), start == begin)
        for expert, (begin, end) in enumerate(itertools.pairwise(ends))
        for start in range(begin, end, most)
    ]


class _Scratch:
    """Buffers for the slots of one block, which the next block uses again."""

    def __init__(self, hidden: torch.Tensor, width: int, blocks: Sequence[_Block]) -> None:
        self.like, self.hidden_size, self.width = hidden, hidden.shape[1], width
        self.total_dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.max_rows = max((block.slots.stop - block.slots.start for block in blocks), default=0)
        self.buffers: dict[str, torch.Tensor] = {}
        self.views: dict[int, _Views] = {}

    def of(self, block: _Block) -> "_Views":
        """The buffers as large as a block needs them."""
        rows = block.slots.stop - block.slots.start
        if rows not in self.views:
            self.views[rows] = _Views(self, rows)
        return self.views[rows]

    def take(self, name: str, rows: int, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(rows, width), contiguous, with any content. A name has one width and one dtype."""
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.max_rows * width, dtype=dtype)
        return self.buffers[name][: rows * width].view(rows, width)


class _Views:
    """The buffers for n slots. Many of them are one buffer in another shape: making a view takes as long as a call."""

    def __init__(self, scratch: _Scratch, rows: int) -> None:
        width, hidden_size = scratch.width, scratch.hidden_size
        parts, hidden_parts = _column_blocks(width), _column_blocks(hidden_size)
        self.rows = scratch.take("rows", rows, hidden_size)  # of the input, or of the output's gradient
        self.rows_for_both = self.rows.expand(2 * parts, rows, hidden_size)
        self.rows_for_act = self.rows.expand(parts, rows, hidden_size)
        self.both = scratch.take("both", rows, 2 * width)  # the first product, or its gradient
        self.both_for_rows = self.both.expand(hidden_parts, rows, 2 * width)
        self.grad_gate, self.grad_up = (_blocked(part) for part in self.both.chunk(2, dim=1))
        self.first_half = self.both[:, :width]
        self.act = scratch.take("act", rows, width)
        self.act_blocked = _blocked(self.act)
        self.act_for_rows = self.act.expand(hidden_parts, rows, width)
        self.silu = scratch.take("silu", rows, width).view(parts, rows, -1)
        self.grad_act = scratch.take("grad_act", rows, width).view(parts, rows, -1)
        self.result = scratch.take("result", rows, hidden_size).view(hidden_parts, rows, -1)
        self.total = scratch.take("total", rows, hidden_size, scratch.total_dtype)
        self.total_blocked = _blocked(self.total)


def experts_forward(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_adapter: Adapter | None,
    down_adapter: Adapter | None,
    permutation: torch.Tensor,
    offsets: torch.Tensor,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the chosen experts' outputs, weighted.

    Args:
        hidden (`torch.Tensor` of shape (T, D)): in the dtype of the stacks.
        expert_ids (`torch.LongTensor` of shape (T, K)): the id E stands for an expert that is elsewhere.
        weights (`torch.Tensor` of shape (T, K)).
        gate_up, down (`torch.Tensor` of shapes (E, 2I, D) and (E, D, I)): contiguous.
        gate_up_adapter, down_adapter ([`Adapter`], *optional*).
        permutation, offsets: of `routing.ExpertGroups`.
        keep: whether a backward pass follows.

    Returns:
        The output (T, D) in the dtype of `hidden`; and the first product of all slots, (S, 2I), if `keep` is set, else
        (0, 2I): the rows of a block hold its gates (n, I) and then its ups (n, I).
    """
    width, blocks = down.shape[-1], _blocks(offsets, hidden.dtype)
    tokens, slot_weights = _by_slot(weights, permutation)
    adapters = [_readable(adapter, blocks) for adapter in (gate_up_adapter, down_adapter)]
    scratch = _Scratch(hidden, width, blocks)
    output = torch.zeros_like(hidden, dtype=scratch.total_dtype)
    kept = hidden.new_empty(len(permutation) if keep else 0, 2 * width)
    parts = 2 * _column_blocks(width)
    gate_up_columns = gate_up.unflatten(1, (parts, -1)).transpose(2, 3)  # (E, 2C, D, I / C)
    down_columns = down.unflatten(1, (_column_blocks(hidden.shape[1]), -1)).transpose(2, 3)  # (E, C, I, D / C)
    for block in blocks:
        own, places = scratch.of(block), tokens[block.slots]
        torch.index_select(hidden, 0, places, out=own.rows)
        both = (kept[block.slots] if keep else own.both).view(parts, len(places), -1)
        torch.bmm(own.rows_for_both, gate_up_columns[block.expert], out=both)
        if adapters[0] is not None:
            _add_adapter(own.rows, adapters[0], block, both)
        gate, up = both.chunk(2)
        torch.mul(_aten.silu.out(gate, out=own.silu), up, out=own.act_blocked)
        torch.bmm(own.act_for_rows, down_columns[block.expert], out=own.result)
        if adapters[1] is not None:
            _add_adapter(own.act, adapters[1], block, own.result)
        # Whole rows of their own are added three times as fast as their parts.
        torch.mul(own.result, slot_weights[block.slots], out=own.total_blocked)
        output.index_add_(0, places, own.total)
    return output.to(hidden.dtype), kept


def experts_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_adapter: Adapter | None,
    down_adapter: Adapter | None,
    permutation: torch.Tensor,
    offsets: torch.Tensor,
    kept: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """The gradients of [`experts_forward`].

    That of the weights is <dA', A> of the activation A and the gradient dA' that it would have with a weight of 1
    (SonicMoE, arXiv 2512.14080), so that the second product's output is never kept.

    Args:
        grad (`torch.Tensor` of shape (T, D)): of the output.
        kept (`torch.Tensor` of shape (S, 2I)): the forward pass's.
        needs: for each of the eight gradients whether it is wanted.

    Returns:
        The gradients of hidden, weights, gate_up, down, the factors of the gate_up adapter, those of the down adapter.
    """
    width, blocks = down.shape[-1], _blocks(offsets, hidden.dtype)
    tokens, slot_weights = _by_slot(weights, permutation)
    adapters = [_readable(adapter, blocks) for adapter in (gate_up_adapter, down_adapter)]
    scratch = _Scratch(hidden, width, blocks)
    grad_hidden = torch.zeros_like(hidden, dtype=scratch.total_dtype) if needs[0] else None
    grad_weights = hidden.new_empty(len(permutation), dtype=scratch.total_dtype)
    grad_weights[offsets[-1] :] = 0  # of slots that are elsewhere
    factors = factors_of(gate_up_adapter, down_adapter)
    stacks = [
        torch.empty_like(stack, memory_format=torch.contiguous_format) if need and stack is not None else None
        for stack, need in zip((gate_up, down, *factors), needs[2:], strict=True)
    ]
    grad_gate_up, grad_down, *grad_factors = stacks
    parts = _column_blocks(width)
    gate_up_columns = gate_up.unflatten(2, (_column_blocks(hidden.shape[1]), -1)).transpose(1, 2)  # (E, C, 2I, D / C)
    down_columns = down.unflatten(2, (parts, -1)).transpose(1, 2)  # (E, C, D, I / C)
    for block in blocks:
        own, places = scratch.of(block), tokens[block.slots]
        # Through the second product, into an activation of weight 1.
        torch.index_select(grad, 0, places, out=own.rows)
        torch.bmm(own.rows_for_act, down_columns[block.expert], out=own.grad_act)
        if adapters[1] is not None:
            _add_adapter_transposed(own.rows, adapters[1], block, own.grad_act)
        gate, up = kept[block.slots].view(2 * parts, len(places), -1).chunk(2)
        torch.mul(_aten.silu.out(gate, out=own.silu), up, out=own.act_blocked)
        torch.mul(own.grad_act, own.act_blocked, out=own.grad_gate)
        torch.sum(own.first_half, 1, dtype=scratch.total_dtype, out=grad_weights[block.slots])
        # With the weights, through the activation.
        grad_act = own.grad_act.mul_(slot_weights[block.slots])
        torch.mul(grad_act, own.silu, out=own.grad_up)
        _aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=own.grad_gate)
        # The parameters of the second product, while its gradient is in the buffer; then those of the first one.
        if any((needs[3], *needs[6:])):
            act = own.act.mul_(slot_weights[block.slots])
            _add_outer(grad_down, block, own.rows, act)
            _add_factor_gradients(grad_factors[2:], adapters[1], block, act, own.rows)
        if any((needs[2], *needs[4:6])):
            torch.index_select(hidden, 0, places, out=own.rows)
            _add_outer(grad_gate_up, block, own.both, own.rows)
            _add_factor_gradients(grad_factors[:2], adapters[0], block, own.rows, own.both)
        if grad_hidden is not None:
            torch.bmm(own.both_for_rows, gate_up_columns[block.expert], out=own.result)
            if adapters[0] is not None:
                _add_adapter_transposed(own.both, adapters[0], block, own.result)
            own.total_blocked.copy_(own.result)
            grad_hidden.index_add_(0, places, own.total)
    without_slots = set(range(len(down))).difference(block.expert for block in blocks)
    for stack in stacks:
        if stack is not None:
            for expert in without_slots:
                stack[expert].zero_()
    by_slot = torch.empty_like(grad_weights).scatter_(0, permutation, grad_weights) if needs[1] else None
    return [
        None if grad_hidden is None else grad_hidden.to(hidden.dtype),
        None if by_slot is None else by_slot.view_as(weights).to(weights.dtype),
        *stacks,
    ]


def _by_slot(weights: torch.Tensor, permutation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and weight (S,) and (S, 1) of every slot, in the order of the experts."""
    return permutation // weights.shape[1], weights.flatten().index_select(0, permutation).unsqueeze(1)


def _column_blocks(width: int) -> int:
    return math.gcd(width, MAX_COLUMN_BLOCKS)


def _blocked(rows: torch.Tensor) -> torch.Tensor:
    """A view of rows (n, width) as (C, n, width / C)."""
    return rows.unflatten(1, (_column_blocks(rows.shape[1]), -1)).transpose(0, 1)


def _add_outer(stack: torch.Tensor | None, block: _Block, left: torch.Tensor, right: torch.Tensor) -> None:
    """left.T (M, n) times right (n, N), into the expert's place in a stack (E, M, N), or onto what is there."""
    if stack is not None and block.begin:
        torch.mm(left.t(), right, out=stack[block.expert])
    elif stack is not None:
        stack[block.expert].addmm_(left.t(), right)


# --------------------------------------------------------------------------------------------------------- adapters
def _readable(adapter: Adapter | None, blocks: Sequence[_Block]) -> Adapter | None:
    """With `factor_b` contiguous: as a whole where most experts are at work, else one by one, when it is used."""
    if adapter is None or 2 * len(blocks) < len(adapter.factor_b):
        return adapter
    return adapter._replace(factor_b=adapter.factor_b.contiguous())


def _dropout(rows: torch.Tensor, adapter: Adapter, block: _Block) -> torch.Tensor:
    """The rows with zeros where the dropout falls, the same in every pass."""
    if adapter.dropout == 0:
        return rows
    assert adapter.seed is not None
    generator = torch.Generator().manual_seed(int(adapter.seed) + block.slots.start)
    mask = torch.empty_like(rows).bernoulli_(1 - adapter.dropout, generator=generator)
    return mask.mul_(rows).mul_(1 / (1 - adapter.dropout) if adapter.dropout < 1 else 0)


def _inner(rows: torch.Tensor, adapter: Adapter, block: _Block) -> torch.Tensor:
    """(n, R): rows with dropout times factor_a, with the scale."""
    return _dropout(rows, adapter, block) @ adapter.factor_a[block.expert].t() * adapter.scale


def _add_adapter(rows: torch.Tensor, adapter: Adapter, block: _Block, out: torch.Tensor) -> None:
    """What the adapter adds to the product of rows (n, in), onto the blocked product."""
    _add_product(_inner(rows, adapter, block), adapter.factor_b[block.expert].contiguous().t(), out)


def _add_adapter_transposed(rows: torch.Tensor, adapter: Adapter, block: _Block, out: torch.Tensor) -> None:
    """The same for the gradient: for rows (n, out) of the product's, onto the blocked one of its input."""
    inner = rows @ adapter.factor_b[block.expert] * adapter.scale
    if adapter.dropout:
        out += _blocked(_dropout(inner @ adapter.factor_a[block.expert], adapter, block))
    else:
        _add_product(inner, adapter.factor_a[block.expert], out)


def _add_product(inner: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
    """(n, R) times (R, width), onto a blocked product."""
    columns = factor.unflatten(1, (len(out), -1)).transpose(0, 1)
    torch.baddbmm(out, inner.expand(len(out), *inner.shape), columns, out=out)


def _add_factor_gradients(
    stacks: Sequence[torch.Tensor | None],
    adapter: Adapter | None,
    block: _Block,
    rows: torch.Tensor,
    grad_rows: torch.Tensor,
) -> None:
    """Of both factors, for rows (n, in) and the gradient (n, out) of the product; one of the two has the weights."""
    if adapter is None:
        return
    inner_grad = grad_rows @ adapter.factor_b[block.expert] * adapter.scale
    _add_outer(stacks[0], block, inner_grad, _dropout(rows, adapter, block))
    _add_outer(stacks[1], block, grad_rows, _inner(rows, adapter, block))


__all__ = ["Adapter", "experts_backward", "experts_forward", "factors_of"]
