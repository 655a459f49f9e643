# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What the kernels of the routed experts consist of: how a program finds its tile, reads, multiplies and activates.

`experts_kernels` has the kernels, and says what the words mean.
"""

from __future__ import annotations

from .experts_decoding import decode_block
from .triton_support import INTERPRETED, jit, tl

_INTERPRETED = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


@jit
def find_tile(tile, offsets, E: tl.constexpr, E_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr):
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
def read_places(place, exists, permutation, TOP_K: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Return the rows that choices are read from."""
    if BY_TOKEN:
        return (tl.load(permutation + place, mask=exists, other=0) // TOP_K).to(tl.int64)
    else:
        return place.to(tl.int64)


@jit
def drop(values, place, column, seed, probability, WIDTH: tl.constexpr):
    """Apply the adapter's dropout to values of choices and columns. It is the same in every pass."""
    cell = place[:, None] * WIDTH + column[None, :]
    return tl.where(tl.rand(seed, cell) >= probability, values / (1.0 - probability), 0.0)


@jit
def dot(left, right, sums, PRECISION: tl.constexpr):
    """Compute sums + left @ right. The interpreter computes in numpy, which has no product of bfloat16."""
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION)


@jit
def load_block(
    matrices,
    expert,
    start,
    k,
    begin,
    column,
    stride_in,
    stride_out,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    scales=None,
    FORMAT: tl.constexpr = "",
    PROJECTION: tl.constexpr = 1,
    FURTHER: tl.constexpr = 0,
):
    """Read a block (BLOCK_IN, BLOCK_COLUMNS) of an expert's matrix (IN, OUT), or of one FURTHER columns behind it.

    The rows `k` begin with `start`, and the columns with `begin`.

    DESCRIBED says what `matrices` is: "" a pointer to the expert's matrix, of any strides, "rows" a descriptor of
    (E, IN, OUT), whose rows are contiguous, and "columns" a descriptor of (E, OUT, IN). There are zeros beyond IN.
    Beyond OUT there are zeros too, but behind gates their ups, of which nothing is stored.

    With a FORMAT, `matrices` and `scales` are pointers to the expert's codes and scales, and DESCRIBED says only how
    the codes lie: as (IN, OUT) or as (OUT, IN). The block is float32.
    """
    if FORMAT != "":
        if DESCRIBED == "rows":
            return decode_block(matrices, scales, k, k < IN, begin, OUT, PROJECTION, BLOCK_IN, BLOCK_COLUMNS, FORMAT)
        else:
            return tl.trans(
                decode_block(
                    matrices, scales, column + FURTHER, column < OUT, start, IN, PROJECTION, BLOCK_COLUMNS, BLOCK_IN,
                    FORMAT,
                )
            )  # fmt: skip
    elif DESCRIBED == "rows":
        return tl.reshape(matrices.load([expert, start, begin + FURTHER]), [BLOCK_IN, BLOCK_COLUMNS])
    elif DESCRIBED == "columns":
        return tl.trans(tl.reshape(matrices.load([expert, begin + FURTHER, start]), [BLOCK_COLUMNS, BLOCK_IN]))
    else:
        there = (k < IN)[:, None] & (column < OUT)[None, :]
        block = matrices + k[:, None] * stride_in + column[None, :] * stride_out
        return tl.load(block + FURTHER * stride_out, mask=there, other=0.0)


@jit
def multiply(
    sums,
    rows,
    row,
    place,
    exists,
    matrices,
    expert,
    stride_e,
    stride_in,
    stride_out,
    begin,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    seed=0,
    probability=0.0,
    DROPOUT: tl.constexpr = False,
    scales=None,
    scale_stride_e=0,
    FORMAT: tl.constexpr = "",
    PROJECTION: tl.constexpr = 1,
):
    """Add rows (BLOCK_ROWS, IN), with dropout or without, times columns of an expert's matrix (IN, OUT)."""
    if FORMAT != "" or DESCRIBED == "":
        matrices += expert.to(tl.int64) * stride_e
    if FORMAT != "":
        scales += expert.to(tl.int64) * scale_stride_e
    inside, column = tl.arange(0, BLOCK_IN), begin + tl.arange(0, BLOCK_COLUMNS)
    for start in range(0, IN, BLOCK_IN):
        k = start + inside
        left = tl.load(rows + row[:, None] * IN + k[None, :], mask=exists[:, None] & (k < IN)[None, :], other=0.0)
        if DROPOUT:
            left = drop(left.to(tl.float32), place, k, seed, probability, IN).to(left.dtype)
        right = load_block(
            matrices, expert, start, k, begin, column, stride_in, stride_out, IN, OUT, BLOCK_IN, BLOCK_COLUMNS,
            DESCRIBED, scales, FORMAT, PROJECTION,
        )  # fmt: skip
        if FORMAT != "":
            right = right.to(left.dtype)
        sums = dot(left, right, sums, PRECISION)
    return sums


@jit
def add_adapter(
    sums,
    inner,
    place,
    exists,
    factors,
    expert,
    stride_e,
    stride_r,
    stride_out,
    begin,
    R: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    seed,
    probability,
):
    """Add inner rows (BLOCK_ROWS, R) times columns of a factor (R, OUT), or what the dropout leaves of that."""
    row = place.to(tl.int64)
    added = tl.zeros_like(sums) if seed is not None else sums
    added = multiply(
        added, inner, row, place, exists, factors, expert, stride_e, stride_r, stride_out, begin, R, OUT, BLOCK_R,
        BLOCK_COLUMNS, PRECISION, "",
    )  # fmt: skip
    if seed is not None:
        column = begin + tl.arange(0, BLOCK_COLUMNS)
        added = sums + drop(added, place, column, tl.load(seed), probability, OUT)
    return added


@jit
def split_columns(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Divide values (ROWS, COLUMNS) into those of the first and of the second half of the columns."""
    return tl.split(tl.permute(tl.reshape(values, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@jit
def multiply_twice(
    gate,
    up,
    rows,
    row,
    exists,
    matrices,
    expert,
    stride_e,
    stride_in,
    stride_out,
    begin,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    scales=None,
    scale_stride_e=0,
    FORMAT: tl.constexpr = "",
    PROJECTION: tl.constexpr = 1,
):
    """Add rows times columns of an expert's gates (IN, OUT), and of its ups, which are OUT columns further."""
    if FORMAT != "" or DESCRIBED == "":
        matrices += expert.to(tl.int64) * stride_e
    if FORMAT != "":
        scales += expert.to(tl.int64) * scale_stride_e
    inside, column = tl.arange(0, BLOCK_IN), begin + tl.arange(0, BLOCK_COLUMNS)
    for start in range(0, IN, BLOCK_IN):
        k = start + inside
        left = tl.load(rows + row[:, None] * IN + k[None, :], mask=exists[:, None] & (k < IN)[None, :], other=0.0)
        right = load_block(
            matrices, expert, start, k, begin, column, stride_in, stride_out, IN, OUT, BLOCK_IN, BLOCK_COLUMNS,
            DESCRIBED, scales, FORMAT, PROJECTION,
        )  # fmt: skip
        if FORMAT != "":
            right = right.to(left.dtype)
        gate = dot(left, right, gate, PRECISION)
        right = load_block(
            matrices, expert, start, k, begin, column, stride_in, stride_out, IN, OUT, BLOCK_IN, BLOCK_COLUMNS,
            DESCRIBED, scales, FORMAT, PROJECTION, OUT,
        )  # fmt: skip
        if FORMAT != "":
            right = right.to(left.dtype)
        up = dot(left, right, up, PRECISION)
    return gate, up


@jit
def clamp(gate, up, LIMIT: tl.constexpr):
    """Clamp gates above, and ups on both sides. A NaN stays."""
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate, up


@jit
def exponent(gate, LINEAR: tl.constexpr, CUBIC: tl.constexpr):
    """Compute what the sigmoid is taken of: LINEAR * gate + CUBIC * gate**3."""
    if CUBIC != 0.0:
        return gate * (LINEAR + CUBIC * gate * gate)
    elif LINEAR != 1.0:
        return gate * LINEAR
    else:
        return gate


@jit
def activate(
    gate,
    up,
    kept,
    act,
    row,
    exists,
    begin,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    LIMIT: tl.constexpr,
    LINEAR: tl.constexpr,
    CUBIC: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Store the activation of some columns, PART at a time, and, if they are kept, gates and ups."""
    if COLUMNS > PART:
        HALF: tl.constexpr = COLUMNS // 2
        left_gate, right_gate = split_columns(gate, ROWS, COLUMNS)
        left_up, right_up = split_columns(up, ROWS, COLUMNS)
        activate(
            left_gate, left_up, kept, act, row, exists, begin, WIDTH, ROWS, HALF, PART, LIMIT, LINEAR, CUBIC, OFFSET
        )
        activate(
            right_gate, right_up, kept, act, row, exists, begin + HALF, WIDTH, ROWS, HALF, PART, LIMIT, LINEAR, CUBIC,
            OFFSET,
        )  # fmt: skip
        return
    column = begin + tl.arange(0, COLUMNS)
    there = exists[:, None] & (column < WIDTH)[None, :]
    if kept is not None:
        target = kept + row[:, None] * (2 * WIDTH) + column[None, :]
        tl.store(target, gate, mask=there)
        tl.store(target + WIDTH, up, mask=there)
    # What the backward pass reads, and the same where none follows.
    gate = gate.to(act.dtype.element_ty).to(tl.float32)
    up = up.to(act.dtype.element_ty).to(tl.float32)
    gate, up = clamp(gate, up, LIMIT)
    if OFFSET != 0.0:
        up += OFFSET
    opened = gate / (1.0 + tl.exp(-exponent(gate, LINEAR, CUBIC)))
    tl.store(act + row[:, None] * WIDTH + column[None, :], opened * up, mask=there)


@jit
def pass_activation(
    grad_act,
    kept,
    weight,
    grad_both,
    weighted_act,
    place,
    exists,
    begin,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    LIMIT: tl.constexpr,
    LINEAR: tl.constexpr,
    CUBIC: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Store the gradients of some columns' gates and ups, and what `down` needs.

    Five numbers for each element: PART columns at a time fit into the registers. Returns the parts of the weights'
    gradient.
    """
    if COLUMNS > PART:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = split_columns(grad_act, ROWS, COLUMNS)
        of_left = pass_activation(
            left, kept, weight, grad_both, weighted_act, place, exists, begin, WIDTH, ROWS, HALF, PART, LIMIT, LINEAR,
            CUBIC, OFFSET,
        )  # fmt: skip
        of_right = pass_activation(
            right, kept, weight, grad_both, weighted_act, place, exists, begin + HALF, WIDTH, ROWS, HALF, PART, LIMIT,
            LINEAR, CUBIC, OFFSET,
        )  # fmt: skip
        return of_left + of_right
    column = begin + tl.arange(0, COLUMNS)
    row = place.to(tl.int64)
    there = exists[:, None] & (column < WIDTH)[None, :]
    source = kept + row[:, None] * (2 * WIDTH) + column[None, :]
    stored_gate = tl.load(source, mask=there, other=0.0).to(tl.float32)
    stored_up = tl.load(source + WIDTH, mask=there, other=0.0).to(tl.float32)
    gate, up = clamp(stored_gate, stored_up, LIMIT)
    if OFFSET != 0.0:
        up += OFFSET
    sigmoid = 1.0 / (1.0 + tl.exp(-exponent(gate, LINEAR, CUBIC)))
    opened = gate * sigmoid
    if weighted_act is not None:
        act = weighted_act + row[:, None] * WIDTH + column[None, :]
        tl.store(act, opened * up * weight[:, None], mask=there)
    target = grad_both + row[:, None] * (2 * WIDTH) + column[None, :]
    weighted = grad_act * weight[:, None]
    curve = opened * (1.0 - sigmoid)  # times the slope of the exponent
    if CUBIC != 0.0:
        curve *= LINEAR + 3.0 * CUBIC * gate * gate
    elif LINEAR != 1.0:
        curve *= LINEAR
    of_gate, of_up = weighted * up * (sigmoid + curve), weighted * opened
    if LIMIT is not None:
        of_gate = tl.where(stored_gate > LIMIT, 0.0, of_gate)
        of_up = tl.where(tl.abs(stored_up) > LIMIT, 0.0, of_up)
    tl.store(target, of_gate, mask=there)
    tl.store(target + WIDTH, of_up, mask=there)
    return tl.sum(grad_act * opened * up, axis=1)


__all__ = [
    "activate",
    "add_adapter",
    "clamp",
    "dot",
    "drop",
    "exponent",
    "find_tile",
    "load_block",
    "multiply",
    "multiply_twice",
    "pass_activation",
    "read_places",
    "split_columns",
]
