# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels of the routed experts, for CUDA and ROCm from one source.

`experts_loop` says what they compute, and `experts_triton` calls them.

A program of a product has a tile: some choices of one expert, and some columns. The number of tiles depends on the
routing, which the host does not know. So as many programs are started as there can be tiles at most. Each finds its
tile from the experts' offsets, and those without a tile end. A kernel of its own adds up the choices of each token, in
the order of the token's choices. It needs no atomics, and gives the same bits in every run.

A choice is one token at one of its experts, numbered as in the flattened (T, K). Its place is where it stands in the
order of the experts.

An activation is sigmoid(LINEAR * g + CUBIC * g**3) * g * (u + OFFSET), of a gate g and an up u that LIMIT clamps, or
that are as they are where it is None (`experts_gating`).

"Rows" lie in the order of the experts, (S, width). If a flag says so, they are the tokens' rows (T, width), read
through the permutation. Sums are float32.
"""

from __future__ import annotations

from .experts_blocks import (
    activate,
    add_adapter,
    dot,
    drop,
    find_tile,
    multiply,
    multiply_twice,
    pass_activation,
    read_places,
)
from .triton_support import kernel, tl


@kernel
def first_product_kernel(
    hidden,  # (T, D)
    gate_up,  # (E, 2I, D), or its descriptor
    scales,  # of quantised ones, or None
    inner,  # (S, R): the adapter's, or None
    factor_b,  # (E, 2I, R), any strides, or None
    permutation,  # (S,) int32
    offsets,  # (E + 1,) int32
    kept,  # (S, 2I), out, or None
    act,  # (S, I), out
    stride_e,
    stride_out,
    stride_in,
    scale_stride_e,
    factor_stride_e,
    factor_stride_out,
    factor_stride_r,
    E: tl.constexpr,
    E_WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    FORMAT: tl.constexpr,
    PROJECTION: tl.constexpr,
    PART: tl.constexpr,
    LIMIT: tl.constexpr,
    LINEAR: tl.constexpr,
    CUBIC: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Compute the tokens' first product at their experts, and its activation."""
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    expert, first, end = find_tile(tl.program_id(0) // COLUMN_TILES, offsets, E, E_WIDTH, BLOCK_ROWS)
    if expert >= E:
        return
    place = first + tl.arange(0, BLOCK_ROWS)
    exists = place < end
    begin = tl.program_id(0) % COLUMN_TILES * BLOCK_COLUMNS
    token = read_places(place, exists, permutation, TOP_K, True)
    gate = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    up = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    gate, up = multiply_twice(
        gate, up, hidden, token, exists, gate_up, expert, stride_e, stride_in, stride_out, begin, D, WIDTH, BLOCK_IN,
        BLOCK_COLUMNS, PRECISION, DESCRIBED, scales, scale_stride_e, FORMAT, PROJECTION,
    )  # fmt: skip
    row = place.to(tl.int64)
    if inner is not None:
        gate, up = multiply_twice(
            gate, up, inner, row, exists, factor_b, expert, factor_stride_e, factor_stride_r, factor_stride_out, begin,
            R, WIDTH, BLOCK_R, BLOCK_COLUMNS, PRECISION, "",
        )  # fmt: skip
    activate(
        gate, up, kept, act, row, exists, begin, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, PART, LIMIT, LINEAR, CUBIC, OFFSET
    )


@kernel
def product_kernel(
    rows,  # (S, IN), or (T, IN) BY_TOKEN
    matrices,  # (E, IN, OUT), any strides, or a descriptor
    scales,  # of quantised ones, or None
    inner,  # (S, R): what an adapter adds, or None
    factors,  # (E, R, OUT), any strides, or None
    weights,  # (T * K,): of the choices, or None
    permutation,  # (S,) int32
    offsets,  # (E + 1,) int32
    out,  # (S, OUT), out; TO_CHOICES in the order of the choices
    seed,  # () int64, or None
    scale,
    probability,
    stride_e,
    stride_in,
    stride_out,
    scale_stride_e,
    factor_stride_e,
    factor_stride_r,
    factor_stride_out,
    E: tl.constexpr,
    E_WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    FORMAT: tl.constexpr,
    PROJECTION: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    TO_CHOICES: tl.constexpr,
):
    """Multiply rows by their experts' matrices, and by a scale or by the choices' weights.

    With a seed there is dropout: on what the adapter adds or, without an adapter, on the rows.
    """
    COLUMN_TILES: tl.constexpr = (OUT + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    expert, first, end = find_tile(tl.program_id(0) // COLUMN_TILES, offsets, E, E_WIDTH, BLOCK_ROWS)
    if expert >= E:
        return
    place = first + tl.arange(0, BLOCK_ROWS)
    exists = place < end
    begin = tl.program_id(0) % COLUMN_TILES * BLOCK_COLUMNS
    row = read_places(place, exists, permutation, TOP_K, BY_TOKEN)
    noise = 0
    if seed is not None:
        noise = tl.load(seed)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    sums = multiply(
        sums, rows, row, place, exists, matrices, expert, stride_e, stride_in, stride_out, begin, IN, OUT, BLOCK_IN,
        BLOCK_COLUMNS, PRECISION, DESCRIBED, noise, probability, seed is not None and inner is None, scales,
        scale_stride_e, FORMAT, PROJECTION,
    )  # fmt: skip
    if inner is not None:
        sums = add_adapter(
            sums, inner, place, exists, factors, expert, factor_stride_e, factor_stride_r, factor_stride_out, begin, R,
            OUT, BLOCK_R, BLOCK_COLUMNS, PRECISION, seed, probability,
        )  # fmt: skip
    target = place.to(tl.int64)
    if TO_CHOICES:
        target = tl.load(permutation + place, mask=exists, other=0).to(tl.int64)
    if weights is not None:
        sums = sums * tl.load(weights + target, mask=exists, other=0.0).to(tl.float32)[:, None]
    else:
        sums = sums * scale
    column = begin + tl.arange(0, BLOCK_COLUMNS)
    tl.store(out + target[:, None] * OUT + column[None, :], sums, mask=exists[:, None] & (column < OUT)[None, :])


@kernel
def activation_gradient_kernel(
    grad,  # (T, D): of the output
    down,  # (E, D, I), or its descriptor
    scales,  # of quantised ones, or None
    inner,  # (S, R): the adapter's, of the gradient, or None
    factor_a,  # (E, R, I), or None
    kept,  # (S, 2I)
    weights,  # (T * K,)
    permutation,  # (S,) int32
    offsets,  # (E + 1,) int32
    grad_both,  # (S, 2I), out
    weighted_act,  # (S, I), out, or None
    weight_parts,  # (S, column tiles) float32, out, in the order of the choices
    seed,  # () int64, or None
    probability,
    stride_e,
    stride_in,
    stride_out,
    scale_stride_e,
    factor_stride_e,
    factor_stride_r,
    factor_stride_out,
    E: tl.constexpr,
    E_WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    FORMAT: tl.constexpr,
    PROJECTION: tl.constexpr,
    PART: tl.constexpr,
    LIMIT: tl.constexpr,
    LINEAR: tl.constexpr,
    CUBIC: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Compute the gradient through the second product and the activation, and the parts of the weights' gradient."""
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    expert, first, end = find_tile(tl.program_id(0) // COLUMN_TILES, offsets, E, E_WIDTH, BLOCK_ROWS)
    if expert >= E:
        return
    place = first + tl.arange(0, BLOCK_ROWS)
    exists = place < end
    column_tile = tl.program_id(0) % COLUMN_TILES
    begin = column_tile * BLOCK_COLUMNS
    choice = tl.load(permutation + place, mask=exists, other=0).to(tl.int64)
    grad_act = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    grad_act = multiply(
        grad_act, grad, choice // TOP_K, place, exists, down, expert, stride_e, stride_in, stride_out, begin, D, WIDTH,
        BLOCK_IN, BLOCK_COLUMNS, PRECISION, DESCRIBED, 0, 0.0, False, scales, scale_stride_e, FORMAT,
        PROJECTION,
    )  # fmt: skip
    if inner is not None:
        grad_act = add_adapter(
            grad_act, inner, place, exists, factor_a, expert, factor_stride_e, factor_stride_r, factor_stride_out,
            begin, R, WIDTH, BLOCK_R, BLOCK_COLUMNS, PRECISION, seed, probability,
        )  # fmt: skip
    weight = tl.load(weights + choice, mask=exists, other=0.0).to(tl.float32)
    part = pass_activation(
        grad_act, kept, weight, grad_both, weighted_act, place, exists, begin, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, PART,
        LIMIT, LINEAR, CUBIC, OFFSET,
    )  # fmt: skip
    tl.store(weight_parts + choice * COLUMN_TILES + column_tile, part, mask=exists)


@kernel
def outer_kernel(
    left,  # (S, M), or (T, M) LEFT_BY_TOKEN
    right,  # (S, N), or (T, N) RIGHT_BY_TOKEN
    permutation,  # (S,) int32
    offsets,  # (E + 1,) int32
    out,  # (E, M, N), out
    seed,  # () int64, or None: with dropout on the right rows
    probability,
    TOP_K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr,
    RIGHT_BY_TOKEN: tl.constexpr,
):
    """Sum for each expert the outer products of its rows, left.T @ right: gradients of parameters."""
    M_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(0) // (M_TILES * N_TILES)
    tile = tl.program_id(0) % (M_TILES * N_TILES)
    m = tile // N_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    noise = 0
    if seed is not None:
        noise = tl.load(seed)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_ROWS):
        place = start + tl.arange(0, BLOCK_ROWS)
        exists = place < end
        row = read_places(place, exists, permutation, TOP_K, LEFT_BY_TOKEN)
        across = tl.load(left + row[None, :] * M + m[:, None], mask=exists[None, :] & (m < M)[:, None], other=0.0)
        row = read_places(place, exists, permutation, TOP_K, RIGHT_BY_TOKEN)
        values = tl.load(right + row[:, None] * N + n[None, :], mask=exists[:, None] & (n < N)[None, :], other=0.0)
        if seed is not None:
            values = drop(values.to(tl.float32), place, n, noise, probability, N).to(values.dtype)
        sums = dot(across, values, sums, PRECISION)
    target = out + expert.to(tl.int64) * (M * N) + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(target, sums, mask=(m < M)[:, None] & (n < N)[None, :])


@kernel
def combine_kernel(
    by_choice,  # (S, D), in the order of the choices
    expert_ids,  # (S,): the id E stands for an expert that is elsewhere, whose rows are not read
    out,  # (T, D), out
    num_tokens,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sum the rows of each token's choices, in the order of the choices."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    there = (token < num_tokens)[:, None] & (column < D)[None, :]
    first = token.to(tl.int64) * TOP_K
    sums = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], tl.float32)
    for choice in range(TOP_K):
        here = tl.load(expert_ids + first + choice, mask=token < num_tokens, other=E) < E
        source = by_choice + (first + choice)[:, None] * D + column[None, :]
        sums += tl.load(source, mask=there & here[:, None], other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64)[:, None] * D + column[None, :], sums, mask=there)


__all__ = [
    "activation_gradient_kernel",
    "combine_kernel",
    "first_product_kernel",
    "outer_kernel",
    "product_kernel",
]
