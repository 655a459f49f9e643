# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels of routing, for CUDA and ROCm from one source.

`routing` says what they compute, and `routing_triton` calls them.

A row of logits lies in the registers of one warp: E experts in lanes, each group padded to a power of two. Each warp
of a program has rows of its own, and what is counted is added up at the end. Scores are compared as integers that have
the order of the numbers, and leave room for marks. Where several programs add to the same number, they add integers:
counts as they are, and affinities in units of 2^-36. So every run gives the same bits, in whichever order the programs
arrive.
"""

from __future__ import annotations

from .triton_support import jit, kernel, tl


# -------------------------------------------------------------------------------------------------- inside a kernel
@jit
def _order(value):
    """Return int32 numbers in the order of float32 numbers, none of which is -0.0."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def _number(order):
    """Return the float32 number of an `_order`."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@jit
def _finite(logit):
    """Replace infinities by the largest finite numbers."""
    return tl.minimum(tl.maximum(logit, -3.4028234663852886e38), 3.4028234663852886e38)


@jit
def _softplus(x):
    """Compute log(1 + exp(x)) to float32's relative precision.

    It uses log(1 + e) = 2 artanh(z) with z = e / (2 + e), which is at most 1/3.
    """
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)
    s = z * z
    series = 1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13))))))
    return tl.maximum(x, 0.0) + 2.0 * z * series


@jit
def _softmax_of_rows(logit, exists, BLOCK: tl.constexpr, SCORE_FUNCTION: tl.constexpr):
    """Compute what `_affinity` needs of each row of a block for its softmax. Other functions do not read it."""
    highest = tl.zeros([BLOCK], tl.float32)
    total = tl.full([BLOCK], 1.0, tl.float32)
    if SCORE_FUNCTION == "softmax":
        highest = tl.max(logit, axis=1)
        total = tl.sum(tl.where(exists[None, :], tl.exp(logit - highest[:, None]), 0.0), axis=1)
    return highest, total


@jit
def _affinity(logit, highest, total, SCORE_FUNCTION: tl.constexpr):
    """Compute affinities of finite logits. `highest` and `total` belong to the softmax of their row."""
    if SCORE_FUNCTION == "softmax":
        return tl.exp(logit - highest) / total
    elif SCORE_FUNCTION == "sigmoid":
        e = tl.exp(-tl.abs(logit))  # never overflows
        return tl.where(logit < 0, e, 1.0) / (1.0 + e)
    else:
        return tl.where(logit < -20.0, tl.exp(0.5 * logit), tl.sqrt(_softplus(logit)))


@jit
def _experts_of(lane, E: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, GROUP_WIDTH: tl.constexpr):
    """Return the expert that every lane of a row stands for, and whether there is one.

    A group of E / GROUPS experts has GROUP_WIDTH lanes.
    """
    if WIDTH == E:
        return lane, lane >= 0
    else:
        member = lane % GROUP_WIDTH
        expert = lane // GROUP_WIDTH * (E // GROUPS) + member
        return expert, (member < E // GROUPS) & (lane // GROUP_WIDTH < GROUPS)


@jit
def _load_rows(
    logits,
    start,
    end,
    row_stride,
    E: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Read rows of logits (BLOCK, WIDTH) as float32, each of them into one warp, LANES experts at a time.

    Triton would lay one axis of WIDTH experts across all warps. It lays the first of these two axes across them, which
    holds the first LANES of all rows, then the next of all rows. Of three axes, versions differ in which is laid.
    """
    line = tl.arange(0, BLOCK * (WIDTH // LANES))
    lane = (line // BLOCK * LANES)[:, None] + tl.arange(0, LANES)[None, :]
    expert, exists = _experts_of(lane, E, GROUPS, WIDTH, GROUP_WIDTH)
    token = start + (line % BLOCK).to(tl.int64)
    at = (token * row_stride)[:, None] + expert
    parts = tl.load(logits + at, mask=(token < end)[:, None] & exists, other=0.0)
    parts = tl.permute(tl.reshape(parts, [WIDTH // LANES, BLOCK, LANES]), [1, 0, 2])
    return tl.reshape(parts, [BLOCK, WIDTH]).to(tl.float32)


@jit
def _keep_best_groups(
    order,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    TOP2_SUM: tl.constexpr,
    NOWHERE: tl.constexpr,
):
    """Return the `_order`s of a block (BLOCK, WIDTH), with NOWHERE outside each row's best groups."""
    LANES_OF_GROUPS: tl.constexpr = WIDTH // GROUP_WIDTH
    grouped = tl.reshape(order, [BLOCK, LANES_OF_GROUPS, GROUP_WIDTH])
    # What follows from a group is in every thread of its row. The groups are ranked with a lane for each.
    group = tl.arange(0, LANES_OF_GROUPS)
    of_group = ((group[:, None] == group[None, :]) & (group < GROUPS)[None, :])[None, :, :]
    first = tl.max(grouped, axis=2)
    rank = tl.max(tl.where(of_group, first[:, :, None], NOWHERE), axis=1)
    if TOP2_SUM:
        member = tl.arange(0, GROUP_WIDTH)[None, None, :]
        place = tl.min(tl.where(grouped == first[:, :, None], member, GROUP_WIDTH), axis=2)
        second = tl.max(tl.where(member == place[:, :, None], NOWHERE, grouped), axis=2)
        second = tl.max(tl.where(of_group, second[:, :, None], NOWHERE), axis=1)
        rank = tl.where((group < GROUPS)[None, :], _order(_number(rank) + _number(second) + 0.0), NOWHERE)
    kept = tl.zeros([BLOCK, LANES_OF_GROUPS], tl.int1)
    for _ in range(KEPT_GROUPS):
        best = tl.max(rank, axis=1)
        taken = tl.min(tl.where(rank == best[:, None], group[None, :], LANES_OF_GROUPS), axis=1)
        is_taken = group[None, :] == taken[:, None]
        rank = tl.where(is_taken, NOWHERE, rank)
        kept |= is_taken
    return tl.reshape(tl.where(kept[:, :, None], grouped, NOWHERE), [BLOCK, WIDTH])


@jit
def _histogram(chosen, num_experts, WIDTH: tl.constexpr):
    """Count how often each expert was chosen. Ids of E and above are not counted."""
    is_here = chosen < num_experts
    return tl.histogram(tl.where(is_here, chosen, 0), WIDTH, mask=is_here)


# ------------------------------------------------------------------------------------------------------ the kernels
@kernel
def route_kernel(
    logits,  # (T, E)
    bias,  # (E,) or None
    token_mask,  # (T,) or None
    expert_ids,  # (T, K) int64, out
    weights,  # (T, K) float32, out
    counts,  # (N, E) int64, zeros, out
    fixed_sums,  # (N, E) int64, zeros
    nan_rows,  # (N,) int64, zeros
    arrivals,  # (N,) int64, zeros
    score_sums,  # (N, E) float32, out
    row_stride,
    sequence_length,
    programs_per_sequence,
    tokens_per_program,
    scaling_factor,
    epsilon,
    E: tl.constexpr,
    K: tl.constexpr,
    K_WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORE_FUNCTION: tl.constexpr,
    TOP2_SUM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BIAS_ON_LOGITS: tl.constexpr,
    STATISTICS: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Route up to `tokens_per_program` tokens of one sequence in each program, BLOCK at a time."""
    NOWHERE: tl.constexpr = -(2**31)  # below the order of every number: no expert, or one of a dropped group
    CHOSEN: tl.constexpr = 1 - 2**31
    lane = tl.arange(0, WIDTH)
    expert, exists = _experts_of(lane, E, GROUPS, WIDTH, GROUP_WIDTH)
    place = tl.arange(0, K_WIDTH)
    sequence = (tl.program_id(0) // programs_per_sequence).to(tl.int64)
    first = (tl.program_id(0) % programs_per_sequence).to(tl.int64) * tokens_per_program
    end = sequence * sequence_length + tl.minimum(first + tokens_per_program, sequence_length)
    if bias is not None:
        added = tl.load(bias + expert, mask=exists, other=0.0).to(tl.float32)[None, :]
    if STATISTICS:
        counts_of_rows = tl.zeros([BLOCK, WIDTH], tl.int32)
        sums_of_rows = tl.zeros([BLOCK, WIDTH], tl.float32)
        nans_of_rows = tl.zeros([BLOCK], tl.int32)

    for start in range(sequence * sequence_length + first, end, BLOCK):
        token = start + tl.arange(0, BLOCK).to(tl.int64)
        there = token < end
        row = logits + token * row_stride
        raw = _load_rows(logits, start, end, row_stride, E, GROUPS, BLOCK, WIDTH, GROUP_WIDTH, LANES)
        has_nan = tl.max((raw != raw).to(tl.int32), axis=1) != 0
        logit = tl.where(exists[None, :], _finite(raw), -3.4028234663852886e38)
        highest, total = _softmax_of_rows(logit, exists, BLOCK, SCORE_FUNCTION)

        if (bias is not None and not BIAS_ON_LOGITS) or (TOP2_SUM and KEPT_GROUPS < GROUPS):
            choice = _affinity(logit, highest[:, None], total[:, None], SCORE_FUNCTION)
            if SCORE_FUNCTION == "softmax":
                choice = tl.where(has_nan[:, None], 3.4028234663852886e38, choice)
            if bias is not None:
                choice += added
        else:  # -0.0 becomes 0.0, and all numbers are below NaN, which is made the largest one
            choice = logit + 0.0
            if bias is not None:
                choice = tl.maximum(choice + added, -3.4028234663852886e38)
            choice = tl.minimum(choice, 3.4028232635611926e38)
        choice = tl.where(raw != raw, 3.4028234663852886e38, choice)
        order = tl.where(exists[None, :], _order(choice), NOWHERE)
        if KEPT_GROUPS < GROUPS:
            order = _keep_best_groups(order, BLOCK, GROUPS, WIDTH, GROUP_WIDTH, KEPT_GROUPS, TOP2_SUM, NOWHERE)

        ids = tl.zeros([BLOCK, K_WIDTH], tl.int32)
        for k in range(K):
            best = tl.max(order, axis=1)
            chosen_lane = tl.min(tl.where(order == best[:, None], lane[None, :], WIDTH), axis=1)
            order = tl.where(lane[None, :] == chosen_lane[:, None], CHOSEN, order)
            chosen = chosen_lane
            if WIDTH != E:
                chosen = chosen_lane // GROUP_WIDTH * (E // GROUPS) + chosen_lane % GROUP_WIDTH
            ids = tl.where(place[None, :] == k, chosen[:, None], ids)

        # The chosen logits are read again, out of the cache: cheaper than picking them out of the lanes.
        is_choice = there[:, None] & (place < K)[None, :]
        picked = _finite(tl.load(row[:, None] + ids, mask=is_choice, other=0.0).to(tl.float32))
        weight = _affinity(picked, highest[:, None], total[:, None], SCORE_FUNCTION)
        if NORMALIZE:
            weight /= tl.sum(tl.where(is_choice, weight, 0.0), axis=1)[:, None] + epsilon
        weight = tl.where(has_nan[:, None], float("nan"), weight * scaling_factor)
        out = token[:, None] * K + place[None, :]
        tl.store(expert_ids + out, ids.to(tl.int64), mask=is_choice)
        tl.store(weights + out, weight, mask=is_choice)

        if STATISTICS:
            real = there
            if token_mask is not None:
                real = there & (tl.load(token_mask + token, mask=there, other=0) != 0)
            counted = (order == CHOSEN) & real[:, None]
            counts_of_rows += counted.to(tl.int32)
            share = tl.where(exists[None, :], _affinity(logit, highest[:, None], total[:, None], SCORE_FUNCTION), 0.0)
            factor = (real & ~has_nan).to(tl.float32)
            if SCORE_FUNCTION != "softmax":
                factor /= tl.maximum(tl.sum(share, axis=1), 1e-20)
            sums_of_rows += share * factor[:, None]
            nans_of_rows += (real & has_nan).to(tl.int32)

    if STATISTICS:
        # Integers, so that the order in which programs arrive does not matter; the last one turns them into numbers.
        at = sequence * E + expert
        program_counts, program_sums = tl.sum(counts_of_rows, axis=0), tl.sum(sums_of_rows, axis=0)
        fixed = (program_sums * 68719476736.0 + 0.5).to(tl.int64)
        tl.atomic_add(counts + at, program_counts.to(tl.int64), mask=exists & (program_counts > 0), sem="relaxed")
        tl.atomic_add(fixed_sums + at, fixed, mask=exists & (fixed > 0), sem=ORDER)
        tl.atomic_add(nan_rows + sequence, tl.sum(nans_of_rows, axis=0).to(tl.int64), sem="relaxed")
        tl.debug_barrier()
        if tl.atomic_add(arrivals + sequence, 1, sem="acq_rel") == programs_per_sequence - 1:
            fixed = tl.load(fixed_sums + at, mask=exists, other=0, cache_modifier=".cg")
            nans = tl.load(nan_rows + sequence, cache_modifier=".cg")
            sums = tl.where(nans > 0, float("nan"), fixed.to(tl.float32) * (1.0 / 68719476736.0))
            tl.store(score_sums + at, sums, mask=exists)


@kernel
def route_backward_kernel(
    logits,  # (T, E)
    token_mask,  # (T,) or None
    expert_ids,  # (T, K) int64
    grad_weights,  # (T, K) float32 or None
    grad_sums,  # (N, E) float32 or None
    grad_logits,  # (T, E), out
    num_tokens,
    row_stride,
    grad_stride_t,
    grad_stride_k,
    sequence_length,
    scaling_factor,
    epsilon,
    E: tl.constexpr,
    K: tl.constexpr,
    K_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORE_FUNCTION: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Compute the gradient of BLOCK tokens' logits in each program. Groups and bias have no part in it."""
    expert = tl.arange(0, WIDTH)
    exists = expert < E
    place = tl.arange(0, K_WIDTH)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = token < num_tokens
    rows = logits + token[:, None] * row_stride
    is_logit = there[:, None] & exists[None, :]
    raw = tl.load(rows + expert[None, :], mask=is_logit, other=0.0).to(tl.float32)
    logit = tl.where(exists[None, :], _finite(raw), -3.4028234663852886e38)
    highest, total = _softmax_of_rows(logit, exists, BLOCK, SCORE_FUNCTION)
    score = tl.where(exists[None, :], _affinity(logit, highest[:, None], total[:, None], SCORE_FUNCTION), 0.0)

    # A row with a NaN has no gradient but NaN, if anything depends on the row.
    has_nan = tl.max((raw != raw).to(tl.int32), axis=1) != 0
    poison = tl.zeros([BLOCK], tl.int1)
    # With respect to the scores: first of the weights, which only the chosen ones have, then of the sums.
    grad = tl.zeros([BLOCK, WIDTH], tl.float32)
    if grad_weights is not None:
        choices = token * K
        poison = has_nan
        factor = tl.full([BLOCK], 1.0, tl.float32) * scaling_factor
        shift = tl.zeros([BLOCK], tl.float32)
        if NORMALIZE:
            is_choice = there[:, None] & (place < K)[None, :]
            ids = tl.load(expert_ids + choices[:, None] + place[None, :], mask=is_choice, other=0)
            picked = _finite(tl.load(rows + ids, mask=is_choice, other=0.0).to(tl.float32))
            picked = _affinity(picked, highest[:, None], total[:, None], SCORE_FUNCTION)
            picked = tl.where(is_choice, picked, 0.0)
            at = token[:, None] * grad_stride_t + place[None, :] * grad_stride_k
            dots = picked * tl.load(grad_weights + at, mask=is_choice, other=0.0)
            divisor = tl.sum(picked, axis=1) + epsilon
            factor /= divisor
            shift = tl.sum(dots, axis=1) / divisor
        for k in range(K):
            chosen = tl.load(expert_ids + choices + k, mask=there, other=0)
            of_weight = tl.load(grad_weights + token * grad_stride_t + k * grad_stride_k, mask=there, other=0.0)
            of_score = (of_weight - shift) * factor
            grad += tl.where(expert[None, :] == chosen[:, None], of_score[:, None], 0.0)
    if grad_sums is not None:
        real = there
        if token_mask is not None:
            real = there & (tl.load(token_mask + token, mask=there, other=0) != 0)
        poison |= has_nan & real
        at = (token // sequence_length)[:, None] * E + expert[None, :]
        of_share = tl.load(grad_sums + at, mask=real[:, None] & exists[None, :], other=0.0)
        if SCORE_FUNCTION != "softmax":
            sum_of_scores = tl.sum(score, axis=1)
            sum_or_least = tl.maximum(sum_of_scores, 1e-20)[:, None]
            mean = tl.sum(of_share * score, axis=1)[:, None] / sum_or_least
            of_share = (of_share - tl.where((sum_of_scores >= 1e-20)[:, None], mean, 0.0)) / sum_or_least
            of_share = tl.where(real[:, None], of_share, 0.0)
        grad += of_share

    if SCORE_FUNCTION == "softmax":
        grad = score * (grad - tl.sum(grad * score, axis=1)[:, None])
    elif SCORE_FUNCTION == "sigmoid":
        grad = grad * score * (1.0 - score)
    else:
        slope = _affinity(logit, highest[:, None], total[:, None], "sigmoid") / (2.0 * score)
        grad = grad * tl.where(logit < -20.0, 0.5 * score, slope)
    grad = tl.where(raw == logit, grad, 0.0)  # none for infinite logits
    grad = tl.where(poison[:, None], float("nan"), grad)
    tl.store(grad_logits + token[:, None] * E + expert[None, :], grad, mask=is_logit)


@kernel
def count_kernel(
    ids, histograms, num_choices, choices_per_program, num_experts, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Count in each program the experts of its run of choices: a row of `histograms` (programs, E), int32."""
    expert = tl.arange(0, WIDTH)
    begin = tl.program_id(0) * choices_per_program
    counts = tl.zeros([WIDTH], tl.int32)
    for start in range(begin, tl.minimum(begin + choices_per_program, num_choices), BLOCK):
        choice = start + tl.arange(0, BLOCK)
        chosen = tl.load(ids + choice, mask=choice < num_choices, other=num_experts).to(tl.int32)
        counts += _histogram(chosen, num_experts, WIDTH)
    tl.store(histograms + tl.program_id(0) * num_experts + expert, counts, mask=expert < num_experts)


@kernel
def group_kernel(
    ids,  # (T * K,)
    histograms,  # (programs, E) int32
    permutation,  # (T * K,) int64 or int32, out
    inverse,  # (T * K,) of the same dtype, out, or None
    offsets,  # (E + 1,) int32, out
    num_choices,
    choices_per_program,
    num_programs,
    num_experts,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Put the run of choices of each program into their places.

    A choice comes behind all choices of lower experts, and behind those of the same expert in earlier runs. Choices of
    one run and expert keep their order. Choices of the id E come last.
    """
    expert = tl.arange(0, WIDTH)
    totals = tl.zeros([WIDTH], tl.int32)
    before = tl.zeros([WIDTH], tl.int32)
    for first in range(0, num_programs, ROWS):
        program = first + tl.arange(0, ROWS)[:, None]
        is_count = (program < num_programs) & (expert < num_experts)[None, :]
        counts = tl.load(histograms + program * num_experts + expert[None, :], mask=is_count, other=0)
        totals += tl.sum(counts, axis=0)
        before += tl.sum(tl.where(program < tl.program_id(0), counts, 0), axis=0)
    starts = tl.cumsum(totals, axis=0) - totals
    here = tl.sum(totals, axis=0)
    if tl.program_id(0) == 0:
        tl.store(offsets + expert, starts, mask=expert < num_experts)
        tl.store(offsets + num_experts, here)

    begin = tl.program_id(0) * choices_per_program
    next_place = starts + before
    next_elsewhere = here + begin - tl.sum(before, axis=0)
    position = tl.arange(0, BLOCK)
    for start in range(begin, tl.minimum(begin + choices_per_program, num_choices), BLOCK):
        choice = start + position
        there = choice < num_choices
        chosen = tl.load(ids + choice, mask=there, other=num_experts).to(tl.int32)
        # Read once more across, so that every choice meets all earlier ones of its block.
        across = tl.load(ids + choice[None, :], mask=there[None, :], other=num_experts).to(tl.int32)
        earlier = (across == chosen[:, None]) & (position[None, :] < position[:, None])
        rank = tl.sum(earlier.to(tl.int32), axis=1)
        is_here = chosen < num_experts
        base = tl.gather(next_place, tl.where(is_here, chosen, 0), axis=0)
        place = tl.where(is_here, base, next_elsewhere) + rank
        if inverse is not None:
            tl.store(inverse + choice, place, mask=there)
        tl.store(permutation + place, choice, mask=there)
        next_place += _histogram(chosen, num_experts, WIDTH)
        next_elsewhere += tl.sum((there & ~is_here).to(tl.int32), axis=0)


__all__ = ["count_kernel", "group_kernel", "route_backward_kernel", "route_kernel"]
