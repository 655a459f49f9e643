# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The backend `"loop"` of the routed experts: plain torch, one expert after the other, for the CPU.

An expert's tokens are brought together in a buffer, go through its two products, and are added to the output. Then
comes the next expert. Only the first product is kept for all choices, and only if a backward pass follows. Every
expert uses the same buffers, which stay in the cache.

Each product is given to BLAS as several products, of some of the columns each: MKL divides a product with few rows
badly among threads. Their results lie one after the other, "blocked": (C, n, width / C) instead of (n, width).

Shape letters: T tokens, D hidden, E experts, K chosen experts, I expert width, S = T * K choices (a token at one of
its experts), R rank of an adapter, n choices of one expert (in 32 bits at most MAX_ROWS at a time), C column blocks.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

MAX_ROWS = 512  # on two cores 192 rows reach 0.92 of the speed of a large product, and 384 rows 0.94
# On two cores, with 96 rows, one block reaches 0.61 of the speed of a large product, 2 reach 0.78, 4 reach 0.85.
MAX_COLUMN_BLOCKS = 4
_aten = torch.ops.aten


class Adapter(NamedTuple):
    """A product of low rank beside a projection. It adds `scale * dropout(rows) @ factor_a[i].T @ factor_b[i].T`.

    Attributes:
        factor_a (`torch.Tensor` of shape (E, R, in)): in the dtype of the stacks.
        factor_b (`torch.Tensor` of shape (E, out, R)): in the same dtype, with any strides.
        scale (`float`).
        dropout (`float`): the probability with which a number of the rows is left out.
        seed (`torch.LongTensor` of shape ()): the seed of the dropout.
    """

    factor_a: torch.Tensor
    factor_b: torch.Tensor
    scale: float = 1.0
    dropout: float = 0.0
    seed: torch.Tensor | None = None


class ExpertOperands(NamedTuple):
    """The tensors that the routed experts are computed from.

    Attributes:
        hidden (`torch.Tensor` of shape (T, D)): in the dtype of the stacks.
        expert_ids (`torch.LongTensor` of shape (T, K)): the id E stands for an expert that is elsewhere.
        weights (`torch.Tensor` of shape (T, K)): the gate's.
        gate_up, down (`torch.Tensor` of shapes (E, 2I, D) and (E, D, I)): the stacks.
        gate_up_adapter, down_adapter ([`Adapter`], *optional*): the adapters beside the stacks.
    """

    hidden: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_adapter: Adapter | None = None
    down_adapter: Adapter | None = None

    def differentiable(self) -> "ExpertGradients":
        """Collect what can have a gradient. The factors of an absent adapter are `None`."""
        factors = factors_of(self.gate_up_adapter, self.down_adapter)
        return ExpertGradients(self.hidden, self.weights, self.gate_up, self.down, *factors)


class ExpertGradients(NamedTuple):
    """One value for every tensor that can have a gradient: the gradient, whether it is wanted, or the tensor."""

    hidden: Any
    weights: Any
    gate_up: Any
    down: Any
    gate_up_a: Any
    gate_up_b: Any
    down_a: Any
    down_b: Any

    @property
    def of_first_product(self) -> tuple[Any, Any, Any]:
        """Values of the first product's parameters: the stack and both factors."""
        return self.gate_up, self.gate_up_a, self.gate_up_b

    @property
    def of_second_product(self) -> tuple[Any, Any, Any]:
        """Values of the second product's parameters: the stack and both factors."""
        return self.down, self.down_a, self.down_b


def factors_of(*adapters: Adapter | None) -> list[torch.Tensor | None]:
    """Return both factors of every adapter, and two `None` for an absent one."""
    return [factor for adapter in adapters for factor in ((None, None) if adapter is None else adapter[:2])]


class _Block(NamedTuple):
    """Choices of one expert, `permutation[choices]`. `begin` is False if they follow others of the same expert."""

    expert: int
    choices: slice
    begin: bool


def _blocks(offsets: torch.Tensor, dtype: torch.dtype) -> list[_Block]:
    """Divide all choices into blocks.

    In 16 bits an expert has one block, because gradients of parameters are not added up there.
    """
    ends = offsets.tolist()
    most = MAX_ROWS if dtype.itemsize > 2 else max(ends[-1], 1)
    return [
        _Block(expert, slice(start, min(start + most, end)), start == begin)
        for expert, (begin, end) in enumerate(itertools.pairwise(ends))
        for start in range(begin, end, most)
    ]


class _Scratch:
    """Buffers for the choices of one block, which the next block uses again."""

    def __init__(self, hidden: torch.Tensor, width: int, blocks: Sequence[_Block]) -> None:
        self.like, self.hidden_size, self.width = hidden, hidden.shape[1], width
        self.total_dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.max_rows = max((block.choices.stop - block.choices.start for block in blocks), default=0)
        self.buffers: dict[str, torch.Tensor] = {}
        self.views: dict[int, _Views] = {}

    def of(self, block: _Block) -> "_Views":
        """Return the buffers in the size that a block needs."""
        rows = block.choices.stop - block.choices.start
        if rows not in self.views:
            self.views[rows] = _Views(self, rows)
        return self.views[rows]

    def take(self, name: str, rows: int, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a contiguous buffer (rows, width) with any content. A name has one width and one dtype."""
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.max_rows * width, dtype=dtype)
        return self.buffers[name][: rows * width].view(rows, width)


class _Views:
    """The buffers for n choices. Many are one buffer in another shape: making a view takes as long as a call."""

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


def experts_forward_loop(
    operands: ExpertOperands, permutation: torch.Tensor, offsets: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the weighted sum of the chosen experts' outputs.

    Args:
        operands ([`ExpertOperands`]): contiguous.
        permutation, offsets: those of `grouping.ExpertGroups`.
        keep: whether a backward pass follows.

    Returns:
        The output (T, D) in the dtype of `hidden`, and the first product of all choices: (S, 2I) if `keep` is set,
        else (0, 2I). The rows of a block hold its gates (n, I) and then its ups (n, I).
    """
    hidden, down = operands.hidden, operands.down
    width, blocks = down.shape[-1], _blocks(offsets, hidden.dtype)
    tokens, choice_weights = _by_choice(operands.weights, permutation)
    gate_up_adapter, down_adapter = _readable_adapters(operands, blocks)
    scratch = _Scratch(hidden, width, blocks)
    output = torch.zeros_like(hidden, dtype=scratch.total_dtype)
    kept = hidden.new_empty(len(permutation) if keep else 0, 2 * width)
    parts = 2 * _column_blocks(width)
    gate_up_columns = operands.gate_up.unflatten(1, (parts, -1)).transpose(2, 3)  # (E, 2C, D, I / C)
    down_columns = down.unflatten(1, (_column_blocks(hidden.shape[1]), -1)).transpose(2, 3)  # (E, C, I, D / C)
    for block in blocks:
        own, places = scratch.of(block), tokens[block.choices]
        torch.index_select(hidden, 0, places, out=own.rows)
        both = (kept[block.choices] if keep else own.both).view(parts, len(places), -1)
        torch.bmm(own.rows_for_both, gate_up_columns[block.expert], out=both)
        if gate_up_adapter is not None:
            _add_adapter(own.rows, gate_up_adapter, block, both)
        gate, up = both.chunk(2)
        torch.mul(_aten.silu.out(gate, out=own.silu), up, out=own.act_blocked)
        torch.bmm(own.act_for_rows, down_columns[block.expert], out=own.result)
        if down_adapter is not None:
            _add_adapter(own.act, down_adapter, block, own.result)
        # Whole rows of their own are added three times as fast as their parts.
        torch.mul(own.result, choice_weights[block.choices], out=own.total_blocked)
        output.index_add_(0, places, own.total)
    return output.to(hidden.dtype), kept


def experts_backward_loop(
    grad: torch.Tensor,
    operands: ExpertOperands,
    permutation: torch.Tensor,
    offsets: torch.Tensor,
    kept: torch.Tensor,
    needs: ExpertGradients,
) -> ExpertGradients:
    """Compute the gradients of [`experts_forward_loop`].

    The gradient of the weights is <dA', A>. A is the activation, and dA' is the gradient that it would have with a
    weight of 1 (SonicMoE, arXiv 2512.14080). So the second product's output is never kept.

    Args:
        grad (`torch.Tensor` of shape (T, D)): the gradient of the output.
        operands, permutation, offsets: as for the forward pass.
        kept (`torch.Tensor` of shape (S, 2I)): what the forward pass has kept.
        needs ([`ExpertGradients`]): which gradients are wanted.

    Returns:
        The gradients; `None` for those that are not wanted.
    """
    return _BackwardPass(grad, operands, permutation, offsets, kept, needs).run()


class _BackwardPass:
    """The backward pass of all experts, one block after the other."""

    def __init__(
        self,
        grad: torch.Tensor,
        operands: ExpertOperands,
        permutation: torch.Tensor,
        offsets: torch.Tensor,
        kept: torch.Tensor,
        needs: ExpertGradients,
    ) -> None:
        hidden, down = operands.hidden, operands.down
        self.grad, self.operands, self.kept, self.needs, self.permutation = grad, operands, kept, needs, permutation
        self.blocks, self.parts = _blocks(offsets, hidden.dtype), _column_blocks(down.shape[-1])
        self.tokens, self.choice_weights = _by_choice(operands.weights, permutation)
        self.gate_up_adapter, self.down_adapter = _readable_adapters(operands, self.blocks)
        self.scratch = _Scratch(hidden, down.shape[-1], self.blocks)
        self.grad_hidden = torch.zeros_like(hidden, dtype=self.scratch.total_dtype) if needs.hidden else None
        self.grad_weights = hidden.new_empty(len(permutation), dtype=self.scratch.total_dtype)
        self.grad_weights[offsets[-1] :] = 0  # of choices that are elsewhere

        def like(parameter: torch.Tensor | None, needed: bool) -> torch.Tensor | None:
            wanted = needed and parameter is not None
            return torch.empty_like(parameter, memory_format=torch.contiguous_format) if wanted else None

        of_parameters = needs._replace(hidden=False, weights=False)  # these two have sums of their own
        self.results = ExpertGradients(*map(like, operands.differentiable(), of_parameters))
        columns = _column_blocks(hidden.shape[1])
        self.gate_up_columns = operands.gate_up.unflatten(2, (columns, -1)).transpose(1, 2)  # (E, C, 2I, D / C)
        self.down_columns = down.unflatten(2, (self.parts, -1)).transpose(1, 2)  # (E, C, D, I / C)

    def run(self) -> ExpertGradients:
        """Compute the gradients of all blocks, and add them up."""
        for block in self.blocks:
            own, places = self.scratch.of(block), self.tokens[block.choices]
            self._pass_second_product(block, own, places)
            self._add_parameters(block, own, places)
            if self.grad_hidden is not None:
                torch.bmm(own.both_for_rows, self.gate_up_columns[block.expert], out=own.result)
                if self.gate_up_adapter is not None:
                    _add_adapter_transposed(own.both, self.gate_up_adapter, block, own.result)
                own.total_blocked.copy_(own.result)
                self.grad_hidden.index_add_(0, places, own.total)
        without_choices = set(range(len(self.operands.down))).difference(block.expert for block in self.blocks)
        for stack in self.results:
            if stack is not None:
                for expert in without_choices:
                    stack[expert].zero_()
        hidden, weights = self.operands.hidden, self.operands.weights
        results = self.results
        if self.needs.weights:
            by_choice = torch.empty_like(self.grad_weights).scatter_(0, self.permutation, self.grad_weights)
            results = results._replace(weights=by_choice.view_as(weights).to(weights.dtype))
        return results._replace(hidden=None if self.grad_hidden is None else self.grad_hidden.to(hidden.dtype))

    def _pass_second_product(self, block: "_Block", own: "_Views", places: torch.Tensor) -> None:
        """Go back through the second product and the activation. `own.both` is then the first product's gradient."""
        # Into an activation of weight 1.
        torch.index_select(self.grad, 0, places, out=own.rows)
        torch.bmm(own.rows_for_act, self.down_columns[block.expert], out=own.grad_act)
        if self.down_adapter is not None:
            _add_adapter_transposed(own.rows, self.down_adapter, block, own.grad_act)
        gate, up = self.kept[block.choices].view(2 * self.parts, len(places), -1).chunk(2)
        torch.mul(_aten.silu.out(gate, out=own.silu), up, out=own.act_blocked)
        torch.mul(own.grad_act, own.act_blocked, out=own.grad_gate)
        torch.sum(own.first_half, 1, dtype=self.scratch.total_dtype, out=self.grad_weights[block.choices])
        # With the weights, through the activation.
        grad_act = own.grad_act.mul_(self.choice_weights[block.choices])
        torch.mul(grad_act, own.silu, out=own.grad_up)
        _aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=own.grad_gate)

    def _add_parameters(self, block: "_Block", own: "_Views", places: torch.Tensor) -> None:
        """Add the gradients of the parameters: the second product's first, while its gradient is in the buffer."""
        results = self.results
        if any(self.needs.of_second_product):
            act = own.act.mul_(self.choice_weights[block.choices])
            _add_outer(results.down, block, own.rows, act)
            _add_factor_gradients((results.down_a, results.down_b), self.down_adapter, block, act, own.rows)
        if any(self.needs.of_first_product):
            torch.index_select(self.operands.hidden, 0, places, out=own.rows)
            _add_outer(results.gate_up, block, own.both, own.rows)
            factors = (results.gate_up_a, results.gate_up_b)
            _add_factor_gradients(factors, self.gate_up_adapter, block, own.rows, own.both)


def _by_choice(weights: torch.Tensor, permutation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token (S,) and the weight (S, 1) of every choice, in the order of the experts."""
    return permutation // weights.shape[1], weights.flatten().index_select(0, permutation).unsqueeze(1)


def _column_blocks(width: int) -> int:
    return math.gcd(width, MAX_COLUMN_BLOCKS)


def _blocked(rows: torch.Tensor) -> torch.Tensor:
    """View rows (n, width) as (C, n, width / C)."""
    return rows.unflatten(1, (_column_blocks(rows.shape[1]), -1)).transpose(0, 1)


def _add_outer(stack: torch.Tensor | None, block: _Block, left: torch.Tensor, right: torch.Tensor) -> None:
    """Write left.T (M, n) times right (n, N) to an expert's part of a stack (E, M, N), or add it to what is there."""
    if stack is not None and block.begin:
        torch.mm(left.t(), right, out=stack[block.expert])
    elif stack is not None:
        stack[block.expert].addmm_(left.t(), right)


# --------------------------------------------------------------------------------------------------------- adapters
def _readable_adapters(operands: ExpertOperands, blocks: Sequence[_Block]) -> tuple[Adapter | None, Adapter | None]:
    return _readable(operands.gate_up_adapter, blocks), _readable(operands.down_adapter, blocks)


def _readable(adapter: Adapter | None, blocks: Sequence[_Block]) -> Adapter | None:
    """Make `factor_b` contiguous as a whole, if most experts are at work.

    Otherwise each expert's part is copied when it is used.
    """
    if adapter is None or 2 * len(blocks) < len(adapter.factor_b):
        return adapter
    return adapter._replace(factor_b=adapter.factor_b.contiguous())


def _dropout(rows: torch.Tensor, adapter: Adapter, block: _Block) -> torch.Tensor:
    """Apply the adapter's dropout to the rows. Its zeros are the same in every pass."""
    if adapter.dropout == 0:
        return rows
    assert adapter.seed is not None
    generator = torch.Generator().manual_seed(int(adapter.seed) + block.choices.start)
    mask = torch.empty_like(rows).bernoulli_(1 - adapter.dropout, generator=generator)
    return mask.mul_(rows).mul_(1 / (1 - adapter.dropout) if adapter.dropout < 1 else 0)


def _inner(rows: torch.Tensor, adapter: Adapter, block: _Block) -> torch.Tensor:
    """Compute the inner rows (n, R): rows with dropout, times factor_a, with the scale."""
    return _dropout(rows, adapter, block) @ adapter.factor_a[block.expert].t() * adapter.scale


def _add_adapter(rows: torch.Tensor, adapter: Adapter, block: _Block, out: torch.Tensor) -> None:
    """Add what the adapter makes of rows (n, in) to the blocked product."""
    _add_product(_inner(rows, adapter, block), adapter.factor_b[block.expert].contiguous().t(), out)


def _add_adapter_transposed(rows: torch.Tensor, adapter: Adapter, block: _Block, out: torch.Tensor) -> None:
    """Add what the adapter makes of rows (n, out) of the product's gradient to the blocked gradient of its input."""
    inner = rows @ adapter.factor_b[block.expert] * adapter.scale
    if adapter.dropout:
        out += _blocked(_dropout(inner @ adapter.factor_a[block.expert], adapter, block))
    else:
        _add_product(inner, adapter.factor_a[block.expert], out)


def _add_product(inner: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
    """Add (n, R) times (R, width) to a blocked product."""
    columns = factor.unflatten(1, (len(out), -1)).transpose(0, 1)
    torch.baddbmm(out, inner.expand(len(out), *inner.shape), columns, out=out)


def _add_factor_gradients(
    stacks: Sequence[torch.Tensor | None],
    adapter: Adapter | None,
    block: _Block,
    rows: torch.Tensor,
    grad_rows: torch.Tensor,
) -> None:
    """Add the gradients of both factors, from rows (n, in) and the gradient (n, out) of the product.

    One of these two is multiplied by the choices' weights.
    """
    if adapter is None:
        return
    inner_grad = grad_rows @ adapter.factor_b[block.expert] * adapter.scale
    _add_outer(stacks[0], block, inner_grad, _dropout(rows, adapter, block))
    _add_outer(stacks[1], block, grad_rows, _inner(rows, adapter, block))


__all__ = [
    "Adapter",
    "ExpertGradients",
    "ExpertOperands",
    "experts_backward_loop",
    "experts_forward_loop",
    "factors_of",
]
