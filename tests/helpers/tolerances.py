"""The one table of tolerances. Nothing else in the tests decides how equal is equal."""

import torch

GOLDEN_LOGITS = 1e-4
GOLDEN_WEIGHTS = 1e-5
GOLDEN_TASK_LOSS = 1e-5
GOLDEN_AUX_LOSS = 1e-6
GOLDEN_GRADIENT = 1e-3  # relative, by norm
CACHED_LOGITS = 1e-4
SAME_COMPUTATION = 1e-5  # float32, the same sums in another order
ACCUMULATED = 1e-7  # float64, micro-batches against the whole batch: a gate scores in float32
DOUBLE = 1e-10  # float64 against an independent loop
ROUTED_IN_DOUBLE = 1e-12  # gate weights in float64 against an independent loop
KERNEL_WEIGHTS = 1e-6  # gate weights of a kernel against the reference, times the scaling factor
KERNEL_GRADIENT = 1e-5  # gradients of float32 logits; for lower precision, what its rounding is
UPCYCLED_LOGITS = 1e-3
MERGED_LOGITS = 1e-4
LOW_PRECISION_CHANGE = 0.1  # of what an adapter changes, by norm: bfloat16 against float32
LOW_PRECISION_LOSS = 0.1  # bfloat16 or float16 against float32
PLANNED_COMMUNICATION = 0.15  # relative: bytes that a rank sends, against those that were counted
BITS_OF_LARGE_MATRIX = 2e-3  # relative: stored bytes against bytes a weight, which leave tables and headers out
ROUNDING_SHARE = 0.06  # of what an adapter changes: how far rounding is off, against the figures of the documentation
EXPERTS_LOW_PRECISION = {torch.bfloat16: 4e-2, torch.float16: 5e-3}  # of the largest value, against float64


def assert_same(found: torch.Tensor, expected: torch.Tensor, name: str = "tensor") -> None:
    """The same computation in another order: SAME_COMPUTATION, absolute, and relative to the largest value."""
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        found, expected, atol=SAME_COMPUTATION * scale, rtol=0, msg=lambda message: f"{name}: {message}"
    )
