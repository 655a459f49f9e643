# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The backend `"loop"` of the routed experts: plain torch, one expert after the other, for the CPU.

An expert's tokens are brought together, go through its two products, and are added to the output. Then comes the next
expert. Only the first product is kept for all choices, and only if a backward pass follows. The rest is small, and the
next expert gets the same memory again: it stays in the cache. Each of torch's threads computes experts of its own
(`experts_workers`).

Shape letters: T tokens, D hidden, E experts, K chosen experts, I expert width, S = T * K choices (a token at one of
its experts), R rank of an adapter, n choices of one expert (in 32 bits at most MAX_ROWS at a time).
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .experts_operands import Adapter, ExpertGradients, ExpertOperands
from .experts_products import Products
from .experts_quantized import QuantizedStack
from .experts_workers import OrderedSum, run_in_workers

MAX_ROWS = 512  # on two cores 192 rows reach 0.92 of the speed of a large product, and 384 rows 0.94
DIVISIBLE_FROM = 8  # rows from which torch divides a product among threads


class _Block(NamedTuple):
    """Choices of one expert, `permutation[choices]`. `begin` is False if they follow others of the same expert."""

    expert: int
    choices: slice
    begin: bool

    @property
    def size(self) -> int:
        """Number of choices."""
        return self.choices.stop - self.choices.start


def _blocks(offsets: torch.Tensor, dtype: torch.dtype) -> list[_Block]:
    """Divide all choices into blocks, those of an expert one after the other.

    In 16 bits an expert has one block, because gradients of parameters are not added up there.
    """
    ends = offsets.tolist()
    most = MAX_ROWS if dtype.itemsize > 2 else max(ends[-1], 1)
    return [
        _Block(expert, slice(start, min(start + most, end)), start == begin)
        for expert, (begin, end) in enumerate(itertools.pairwise(ends))
        for start in range(begin, end, most)
    ]


class _Pass:
    """What all workers of a forward or a backward pass share.

    A thread of Python lets another one in with each call of torch, and then waits for its turn: views are made here,
    all of a kind with one call, and not by the workers.

    Attributes:
        tokens (tensors (n,) by blocks), weights (tensors (n, 1) by blocks): of the choices.
        gate_up, down (matrices (2I, D) and (D, I) by experts).
        tasks: what a worker computes at a time, the most choices first, so that all workers end together: indices of
            blocks. It is one block or, where blocks of an expert add up gradients of its parameters, all of an expert.
        total_dtype (`torch.dtype`): that of the sums over a token's choices.
    """

    def __init__(
        self, operands: ExpertOperands, permutation: torch.Tensor, offsets: torch.Tensor, by_expert: bool = False
    ) -> None:
        dtype = operands.hidden.dtype
        self.operands = operands
        self.total_dtype = torch.promote_types(dtype, torch.float32)
        self.blocks = _blocks(offsets, dtype)
        self.tokens = self.split(permutation // operands.weights.shape[1])
        self.weights = self.split(operands.weights.flatten().index_select(0, permutation).unsqueeze(1))
        self.gate_up, self.down = operands.gate_up.unbind(), operands.down.unbind()
        adapters = (operands.gate_up_adapter, operands.down_adapter)
        self.gate_up_adapter, self.down_adapter = (_readable(adapter, self.blocks) for adapter in adapters)
        tasks = [[number] for number in range(len(self.blocks))]
        if by_expert:
            by = itertools.groupby(range(len(self.blocks)), lambda number: self.blocks[number].expert)
            tasks = [list(numbers) for _, numbers in by]
        tasks.sort(key=lambda task: -sum(self.blocks[number].size for number in task))
        places = itertools.count()
        self.tasks = [[(next(places), number) for number in task] for task in tasks]

    def split(self, choices: torch.Tensor) -> Sequence[torch.Tensor]:
        """Divide values of all choices (S, ...), in the order of the experts, into those of the blocks."""
        elsewhere = len(choices) - sum(block.size for block in self.blocks)
        return choices.split([*(block.size for block in self.blocks), elsewhere])

    def run(self, new_worker: Callable[[], "_Worker"], total: OrderedSum | None) -> None:
        """Let workers compute all tasks, and add to a sum."""
        # Products of few rows are not divided among threads.
        divisible = max((block.size for block in self.blocks), default=0) >= DIVISIBLE_FROM
        stop = None if total is None else total.close
        run_in_workers(self.tasks, lambda: new_worker().run, divisible=divisible, stop=stop)

    def new_sum(self) -> OrderedSum:
        """Return an empty sum (T, D)."""
        return OrderedSum(torch.zeros_like(self.operands.hidden, dtype=self.total_dtype))


class _Worker(ABC):
    """Computes blocks in one thread."""

    def __init__(self, shared: _Pass) -> None:
        self.shared = shared
        operands = shared.operands
        self.products = Products(operands.hidden.dtype, isinstance(operands.down, QuantizedStack))

    def run(self, task: Sequence[tuple[int, int]]) -> None:
        """Compute the blocks of a task, by their places in the order of all tasks and their indices."""
        for place, number in task:
            self.compute(place, number)

    @abstractmethod
    def compute(self, place: int, number: int) -> None:
        """Compute a block."""

    def gather(self, source: torch.Tensor, number: int) -> torch.Tensor:
        """Return the rows (n, D) of a block's tokens."""
        return source.index_select(0, self.shared.tokens[number]).to(self.products.computes_in)


# ----------------------------------------------------------------------------------------------------- the two passes
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
        else (0, 2I).
    """
    hidden = operands.hidden
    shared = _Pass(operands, permutation, offsets)
    output = shared.new_sum()
    kept = hidden.new_empty(len(permutation) if keep else 0, operands.gate_up.shape[1])
    of_blocks = shared.split(kept) if keep else None
    shared.run(lambda: _Forward(shared, output, of_blocks), output)
    return output.total.to(hidden.dtype), kept


class _Forward(_Worker):
    """A worker of the forward pass."""

    def __init__(self, shared: _Pass, output: OrderedSum, kept: Sequence[torch.Tensor] | None) -> None:
        super().__init__(shared)
        self.output, self.kept = output, kept

    def compute(self, place: int, number: int) -> None:
        """Add a block's choices to the output."""
        shared = self.shared
        block = shared.blocks[number]
        opened, up = shared.operands.gating.factors(self._first_product(number, block))
        act = opened.mul_(up)
        result = self.products.linear(act, shared.down[block.expert])
        if shared.down_adapter is not None:
            _add_adapter(act, shared.down_adapter, block, result)
        result = result.to(shared.total_dtype).mul_(shared.weights[number])
        self.output.add(place, shared.tokens[number], result)

    def _first_product(self, number: int, block: _Block) -> torch.Tensor:
        """Compute gates and ups (n, 2I), as the backward pass will read them."""
        shared, products = self.shared, self.products
        stored = None if self.kept is None else self.kept[number]
        rows = self.gather(shared.operands.hidden, number)
        both = products.linear(rows, shared.gate_up[block.expert], None if products.widens else stored)
        if shared.gate_up_adapter is not None:
            _add_adapter(rows, shared.gate_up_adapter, block, both)
        if products.widens:  # rounded in the same way where no backward pass follows
            both.copy_(both.to(products.dtype) if stored is None else stored.copy_(both))
        return both


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
    hidden, weights = operands.hidden, operands.weights
    of_parameters = needs._replace(hidden=False, weights=False)
    shared = _Pass(operands, permutation, offsets, by_expert=any(of_parameters))
    grad_hidden = shared.new_sum() if needs.hidden else None
    grad_weights = hidden.new_empty(len(permutation), dtype=shared.total_dtype)
    grad_weights[offsets[-1] :] = 0  # of choices that are elsewhere
    results = _new_gradients(operands, of_parameters, shared)
    given = (grad, shared.split(kept), grad_hidden, shared.split(grad_weights), results)
    shared.run(lambda: _Backward(shared, *given), grad_hidden)
    if needs.weights:
        by_choice = torch.empty_like(grad_weights).scatter_(0, permutation, grad_weights)
        results = results._replace(weights=by_choice.view_as(weights).to(weights.dtype))
    return results._replace(hidden=None if grad_hidden is None else grad_hidden.total.to(hidden.dtype))


def _new_gradients(operands: ExpertOperands, wanted: ExpertGradients, shared: _Pass) -> ExpertGradients:
    """Make the gradients that are wanted: zero for experts without choices, else with any content."""
    results = ExpertGradients(*[
        torch.empty_like(value, memory_format=torch.contiguous_format) if want and value is not None else None
        for value, want in zip(operands.differentiable(), wanted, strict=True)
    ])  # fmt: skip
    without_choices = set(range(len(operands.down))) - {block.expert for block in shared.blocks}
    for stack in results:
        if stack is not None:
            for expert in without_choices:
                stack[expert].zero_()
    return results


class _Backward(_Worker):
    """A worker of the backward pass."""

    def __init__(
        self,
        shared: _Pass,
        grad: torch.Tensor,
        kept: Sequence[torch.Tensor],
        grad_hidden: OrderedSum | None,
        grad_weights: Sequence[torch.Tensor],
        results: ExpertGradients,
    ) -> None:
        super().__init__(shared)
        self.grad, self.kept = grad, kept
        self.grad_hidden, self.grad_weights, self.results = grad_hidden, grad_weights, results

    def compute(self, place: int, number: int) -> None:
        """Add a block's choices to the gradients."""
        shared, results = self.shared, self.results
        block = shared.blocks[number]
        grad_rows = self.gather(self.grad, number)
        act, grad_both = self._pass_second_product(number, block, grad_rows)
        act.mul_(shared.weights[number])
        self._add_gradients(results.of_second_product, shared.down_adapter, block, act, grad_rows)
        if any(result is not None for result in results.of_first_product):
            rows = self.gather(shared.operands.hidden, number)
            self._add_gradients(results.of_first_product, shared.gate_up_adapter, block, rows, grad_both)
        if self.grad_hidden is not None:
            result = self.products.linear_backward(grad_both, shared.gate_up[block.expert])
            if shared.gate_up_adapter is not None:
                _add_adapter_backward(grad_both, shared.gate_up_adapter, block, result)
            self.grad_hidden.add(place, shared.tokens[number], result.to(shared.total_dtype))

    def _pass_second_product(
        self, number: int, block: _Block, grad_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Go back through the second product and the activation.

        Returns:
            The activation (n, I), and the gradient of the first product (n, 2I).
        """
        shared = self.shared
        grad_act = self.products.linear_backward(grad_rows, shared.down[block.expert])  # of an activation of weight 1
        if shared.down_adapter is not None:
            _add_adapter_backward(grad_rows, shared.down_adapter, block, grad_act)
        first = self.kept[number].to(grad_act.dtype)
        factors = shared.operands.gating.factors(first)
        act = factors[0] * factors[1]
        torch.sum(grad_act * act, 1, dtype=shared.total_dtype, out=self.grad_weights[number])
        # With the weights, through the activation.
        return act, shared.operands.gating.backward(first, factors, grad_act.mul_(shared.weights[number]))

    def _add_gradients(
        self,
        results: Sequence[torch.Tensor | None],
        adapter: Adapter | None,
        block: _Block,
        rows: torch.Tensor,
        grad_rows: torch.Tensor,
    ) -> None:
        """Add to the gradients of a stack and its factors, from rows (n, in) and the product's gradient (n, out).

        One of these two is multiplied by the choices' weights.
        """
        of_stack, *of_factors = results
        sides = [(of_stack, grad_rows, rows)]
        if adapter is not None and any(result is not None for result in of_factors):
            inner_grad = grad_rows @ _factor_b(adapter, block, rows) * adapter.scale
            sides.append((of_factors[0], inner_grad, _dropout(rows, adapter, block)))
            sides.append((of_factors[1], grad_rows, _inner(rows, adapter, block)))
        for result, left, right in sides:
            if result is not None:
                self.products.outer(left, right, result[block.expert], add=not block.begin)


# ----------------------------------------------------------------------------------------------------------- adapters
def _readable(adapter: Adapter | None, blocks: Sequence[_Block]) -> Adapter | None:
    """Make `factor_b` contiguous as a whole, if most experts are at work.

    Otherwise each expert's part is copied when it is used.
    """
    if adapter is None or 2 * len(blocks) < len(adapter.factor_b):
        return adapter
    return adapter._replace(factor_b=adapter.factor_b.contiguous())


def _factor_a(adapter: Adapter, block: _Block, rows: torch.Tensor) -> torch.Tensor:
    return adapter.factor_a[block.expert].to(rows.dtype)


def _factor_b(adapter: Adapter, block: _Block, rows: torch.Tensor) -> torch.Tensor:
    return adapter.factor_b[block.expert].to(rows.dtype).contiguous()


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
    return _dropout(rows, adapter, block) @ _factor_a(adapter, block, rows).t() * adapter.scale


def _add_adapter(rows: torch.Tensor, adapter: Adapter, block: _Block, out: torch.Tensor) -> None:
    """Add what the adapter makes of rows (n, in) to the product (n, out)."""
    out.addmm_(_inner(rows, adapter, block), _factor_b(adapter, block, rows).t())


def _add_adapter_backward(grad: torch.Tensor, adapter: Adapter, block: _Block, out: torch.Tensor) -> None:
    """Add what the adapter makes of the product's gradient (n, out) to the gradient of its input (n, in)."""
    inner = grad @ _factor_b(adapter, block, grad) * adapter.scale
    factor = _factor_a(adapter, block, grad)
    if adapter.dropout:
        out += _dropout(inner @ factor, adapter, block)
    else:
        out.addmm_(inner, factor)


__all__ = ["experts_backward_loop", "experts_forward_loop"]
