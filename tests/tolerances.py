"""The one table of tolerances. Nothing else in the tests decides how equal is equal."""

GOLDEN_LOGITS = 1e-4
GOLDEN_WEIGHTS = 1e-5
GOLDEN_TASK_LOSS = 1e-5
GOLDEN_AUX_LOSS = 1e-6
GOLDEN_GRADIENT = 1e-3  # relative, by norm
CACHED_LOGITS = 1e-4
SAME_COMPUTATION = 1e-5  # float32, the same sums in another order
DOUBLE = 1e-10  # float64 against an independent loop
UPCYCLED_LOGITS = 1e-3
