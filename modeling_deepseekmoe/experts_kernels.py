# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels of the routed experts, for CUDA and ROCm from one source.

`experts_loop` says what they compute, and `experts_triton` calls them.

A program of a product has a tile: some choices of one expert, and some columns. The number of tiles depends on the
routing, which the host does not know. So as many programs are started as there can be tiles at most. Each finds its
tile from the experts' offsets, and those without a tile end. A kernel of its own adds up the choices of each token, in
the order of the token's choices. It needs no atomics, and gives the same bits in every run.

A choice is one token at one of its experts, numbered as in the flattened (T, K). Its place is where it stands in the
order of the experts.

"Rows" lie in the order of the experts, (S, width). If a flag says so, they are the tokens' rows (T, width), read
through the permutation. Sums are float32.
"""

from __future__ import annotations

from .triton_support import INTERPRETED, jit, kernel, tl

_INTERPRETED = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


# -------------------------------------------------------------------------------------------------- inside a kernel
@jit
def _tile(tile, offsets, E: tl.constexpr, E_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Find the expert of a block of rows, the block's first place, and the end of the expert's choices.

    If the expert is E or above, there is no such block.
    """
    lane = tl.arange(0, E_WIDTH)
    begins = tl.load(offsets + lane, mask=lane < E, other=0)
    ends = tl.load(offsets + lane + 1, mask=lane < E, other=0)
    tiles = (ends - begins + BLOCK_ROWS - 1) // BLOCK_ROWS
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    before = tl.sum(tl.where(lane < expert, tiles, 0), axis=0)
    begin = tl.sum(tl.where(lane == expert, begins, 0), axis=0)
    end = tl.sum(tl.where(lane == expert, ends, 0), axis=0)
    return expert, begin + (tile - before) * BLOCK_ROWS, end


@jit
def _places(place, exists, permutation, TOP_K: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Return the rows that choices are read from."""
    if BY_TOKEN:
        return (tl.load(permutation + place, mask=exists, other=0) // TOP_K).to(tl.int64)
    else:
        return place.to(tl.int64)


@jit
def _dropped(values, place, column, seed, probability, WIDTH: tl.constexpr):
    """Apply the adapter's dropout to values of choices and columns. It is the same in every pass."""
    cell = place[:, None] * WIDTH + column[None, :]
    return tl.where(tl.rand(seed, cell) >= probability, values / (1.0 - probability), 0.0)


@jit
def _dot(left, right, sums, PRECISION: tl.constexpr):
    """Compute sums + left @ right. The interpreter computes in numpy, which has no product of bfloat16."""
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION)


@jit
def _multiply(
    sums,
    rows,
    row,
    place,
    exists,
    matrix,
    stride_in,
    stride_out,
    column,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr,
    seed=0,
    probability=0.0,
    DROPOUT: tl.constexpr = False,
):
    """Add rows (BLOCK_ROWS, IN), with dropout or without, times columns of a matrix (IN, OUT)."""
    inside = tl.arange(0, BLOCK_IN)
    for start in range(0, IN, BLOCK_IN):
        k = start + inside
        left = tl.load(rows + row[:, None] * IN + k[None, :], mask=exists[:, None] & (k < IN)[None, :], other=0.0)
        if DROPOUT:
            left = _dropped(left.to(tl.float32), place, k, seed, probability, IN).to(left.dtype)
        there = (k < IN)[:, None] & (column < OUT)[None, :]
        right = tl.load(matrix + k[:, None] * stride_in + column[None, :] * stride_out, mask=there, other=0.0)
        sums = _dot(left, right, sums, PRECISION)
    return sums


@jit
def _add_adapter(
    sums,
    inner,
    place,
    exists,
    factor,
    stride_r,
    stride_out,
    column,
    R: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    seed,
    probability,
):
    """Add inner rows (BLOCK_ROWS, R) times columns of a factor (R, OUT), or what the dropout leaves of that."""
    row = place.to(tl.int64)
    added = tl.zeros_like(sums) if seed is not None else sums
    added = _multiply(
        added, inner, row, place, exists, factor, stride_r, stride_out, column, R, OUT, BLOCK_R, PRECISION
    )
    if seed is not None:
        added = sums + _dropped(added, place, column, tl.load(seed), probability, OUT)
    return added


@jit
def _halves(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Divide values (ROWS, COLUMNS) into those of the first and of the second half of the columns."""
    return tl.split(tl.permute(tl.reshape(values, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@jit
def _multiply_twice(
    gate,
    up,
    rows,
    row,
    exists,
    matrix,
    stride_in,
    stride_out,
    column,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add rows times columns of the gates (IN, OUT), and of the ups, which are OUT columns further."""
    inside = tl.arange(0, BLOCK_IN)
    for start in range(0, IN, BLOCK_IN):
        k = start + inside
        left = tl.load(rows + row[:, None] * IN + k[None, :], mask=exists[:, None] & (k < IN)[None, :], other=0.0)
        there = (k < IN)[:, None] & (column < OUT)[None, :]
        right = matrix + k[:, None] * stride_in + column[None, :] * stride_out
        gate = _dot(left, tl.load(right, mask=there, other=0.0), gate, PRECISION)
        right += OUT * stride_out
        up = _dot(left, tl.load(right, mask=there, other=0.0), up, PRECISION)
    return gate, up


@jit
def _activate(gate, up, kept, act, row, exists, begin, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Store silu(gate) * up of some columns and, if they are kept, gates and ups."""
    column = begin + tl.arange(0, COLUMNS)
    there = exists[:, None] & (column < WIDTH)[None, :]
    if kept is not None:
        target = kept + row[:, None] * (2 * WIDTH) + column[None, :]
        tl.store(target, gate, mask=there)
        tl.store(target + WIDTH, up, mask=there)
    # What the backward pass reads, and the same where none follows.
    gate = gate.to(act.dtype.element_ty).to(tl.float32)
    up = up.to(act.dtype.element_ty).to(tl.float32)
    tl.store(act + row[:, None] * WIDTH + column[None, :], gate / (1.0 + tl.exp(-gate)) * up, mask=there)


@jit
def _pass_activation(
    grad_act,
    kept,
    weight,
    grad_both,
    weighted_act,
    place,
    exists,
    begin,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store the gradients of some columns' gates and ups, and what `down` needs.

    Returns the parts of the weights' gradient.
    """
    column = begin + tl.arange(0, COLUMNS)
    row = place.to(tl.int64)
    there = exists[:, None] & (column < WIDTH)[None, :]
    source = kept + row[:, None] * (2 * WIDTH) + column[None, :]
    gate = tl.load(source, mask=there, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=there, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    if weighted_act is not None:
        act = weighted_act + row[:, None] * WIDTH + column[None, :]
        tl.store(act, silu * up * weight[:, None], mask=there)
    target = grad_both + row[:, None] * (2 * WIDTH) + column[None, :]
    weighted = grad_act * weight[:, None]
    tl.store(target, weighted * up * (sigmoid + silu * (1.0 - sigmoid)), mask=there)
    tl.store(target + WIDTH, weighted * silu, mask=there)
    return tl.sum(grad_act * silu * up, axis=1)


# ------------------------------------------------------------------------------------------------------ the kernels
@kernel
def first_product_kernel(
    hidden,  # (T, D)
    gate_up,  # (E, 2I, D)
    inner,  # (S, R): the adapter's, or None
    factor_b,  # (E, 2I, R), any strides, or None
    permutation,  # (S,) int32
    offsets,  # (E + 1,) int32
    kept,  # (S, 2I), out, or None
    act,  # (S, I), out
    stride_e,
    stride_out,
    stride_in,
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
    IN_HALVES: tl.constexpr,
):
    """Compute the tokens' first product at their experts, and its activation silu(gate) * up.

    IN_HALVES stores a half of the columns at a time, for which Hopper needs fewer registers, and Ampere more.
    """
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    expert, first, end = _tile(tl.program_id(0) // COLUMN_TILES, offsets, E, E_WIDTH, BLOCK_ROWS)
    if expert >= E:
        return
    place = first + tl.arange(0, BLOCK_ROWS)
    exists = place < end
    begin = tl.program_id(0) % COLUMN_TILES * BLOCK_COLUMNS
    column = begin + tl.arange(0, BLOCK_COLUMNS)
    token = _places(place, exists, permutation, TOP_K, True)
    gate = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    up = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    matrix = gate_up + expert.to(tl.int64) * stride_e
    gate, up = _multiply_twice(
        gate, up, hidden, token, exists, matrix, stride_in, stride_out, column, D, WIDTH, BLOCK_IN, PRECISION
    )
    row = place.to(tl.int64)
    if inner is not None:
        matrix = factor_b + expert.to(tl.int64) * factor_stride_e
        gate, up = _multiply_twice(
            gate, up, inner, row, exists, matrix, factor_stride_r, factor_stride_out, column, R, WIDTH, BLOCK_R,
            PRECISION,
        )  # fmt: skip
    if IN_HALVES:
        first_gate, second_gate = _halves(gate, BLOCK_ROWS, BLOCK_COLUMNS)
        first_up, second_up = _halves(up, BLOCK_ROWS, BLOCK_COLUMNS)
        _activate(first_gate, first_up, kept, act, row, exists, begin, WIDTH, BLOCK_COLUMNS // 2)
        begin += BLOCK_COLUMNS // 2
        _activate(second_gate, second_up, kept, act, row, exists, begin, WIDTH, BLOCK_COLUMNS // 2)
    else:
        _activate(gate, up, kept, act, row, exists, begin, WIDTH, BLOCK_COLUMNS)


@kernel
def product_kernel(
    rows,  # (S, IN), or (T, IN) BY_TOKEN
    matrices,  # (E, IN, OUT), any strides
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
    BY_TOKEN: tl.constexpr,
    TO_CHOICES: tl.constexpr,
):
    """Multiply rows by their experts' matrices, and by a scale or by the choices' weights.

    With a seed there is dropout: on what the adapter adds or, without an adapter, on the rows.
    """
    COLUMN_TILES: tl.constexpr = (OUT + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    expert, first, end = _tile(tl.program_id(0) // COLUMN_TILES, offsets, E, E_WIDTH, BLOCK_ROWS)
    if expert >= E:
        return
    place = first + tl.arange(0, BLOCK_ROWS)
    exists = place < end
    column = tl.program_id(0) % COLUMN_TILES * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = _places(place, exists, permutation, TOP_K, BY_TOKEN)
    noise = 0
    if seed is not None:
        noise = tl.load(seed)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    matrix = matrices + expert.to(tl.int64) * stride_e
    sums = _multiply(
        sums, rows, row, place, exists, matrix, stride_in, stride_out, column, IN, OUT, BLOCK_IN, PRECISION,
        noise, probability, seed is not None and inner is None,
    )  # fmt: skip
    if inner is not None:
        matrix = factors + expert.to(tl.int64) * factor_stride_e
        sums = _add_adapter(
            sums, inner, place, exists, matrix, factor_stride_r, factor_stride_out, column, R, OUT, BLOCK_R, PRECISION,
            seed, probability,
        )  # fmt: skip
    target = place.to(tl.int64)
    if TO_CHOICES:
        target = tl.load(permutation + place, mask=exists, other=0).to(tl.int64)
    if weights is not None:
        sums = sums * tl.load(weights + target, mask=exists, other=0.0).to(tl.float32)[:, None]
    else:
        sums = sums * scale
    tl.store(out + target[:, None] * OUT + column[None, :], sums, mask=exists[:, None] & (column < OUT)[None, :])


@kernel
def activation_gradient_kernel(
    grad,  # (T, D): of the output
    down,  # (E, D, I)
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
):
    """Compute the gradient through the second product and the activation, and the parts of the weights' gradient."""
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    expert, first, end = _tile(tl.program_id(0) // COLUMN_TILES, offsets, E, E_WIDTH, BLOCK_ROWS)
    if expert >= E:
        return
    place = first + tl.arange(0, BLOCK_ROWS)
    exists = place < end
    column_tile = tl.program_id(0) % COLUMN_TILES
    column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    choice = tl.load(permutation + place, mask=exists, other=0).to(tl.int64)
    grad_act = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    matrix = down + expert.to(tl.int64) * stride_e
    grad_act = _multiply(
        grad_act, grad, choice // TOP_K, place, exists, matrix, stride_in, stride_out, column, D, WIDTH, BLOCK_IN,
        PRECISION,
    )  # fmt: skip
    if inner is not None:
        matrix = factor_a + expert.to(tl.int64) * factor_stride_e
        grad_act = _add_adapter(
            grad_act, inner, place, exists, matrix, factor_stride_r, factor_stride_out, column, R, WIDTH, BLOCK_R,
            PRECISION, seed, probability,
        )  # fmt: skip
    weight = tl.load(weights + choice, mask=exists, other=0.0).to(tl.float32)
    # Five numbers for each element: of a quarter of the columns at a time they fit into the registers.
    begin = column_tile * BLOCK_COLUMNS
    first, second = _halves(grad_act, BLOCK_ROWS, BLOCK_COLUMNS)
    part = tl.zeros([BLOCK_ROWS], tl.float32)
    for half in tl.static_range(2):
        values = first if half == 0 else second
        left, right = _halves(values, BLOCK_ROWS, BLOCK_COLUMNS // 2)
        for quarter in tl.static_range(2):
            part += _pass_activation(
                left if quarter == 0 else right, kept, weight, grad_both, weighted_act, place, exists,
                begin + (2 * half + quarter) * (BLOCK_COLUMNS // 4), WIDTH, BLOCK_COLUMNS // 4,
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
        row = _places(place, exists, permutation, TOP_K, LEFT_BY_TOKEN)
        across = tl.load(left + row[None, :] * M + m[:, None], mask=exists[None, :] & (m < M)[:, None], other=0.0)
        row = _places(place, exists, permutation, TOP_K, RIGHT_BY_TOKEN)
        values = tl.load(right + row[:, None] * N + n[None, :], mask=exists[:, None] & (n < N)[None, :], other=0.0)
        if seed is not None:
            values = _dropped(values.to(tl.float32), place, n, noise, probability, N).to(values.dtype)
        sums = _dot(across, values, sums, PRECISION)
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
