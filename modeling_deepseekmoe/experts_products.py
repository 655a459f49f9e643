# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Products of some rows with one expert's matrix, on the CPU.

A CPU without matrix instructions for bfloat16 or float16 multiplies them a number at a time, many times slower than
float32. There a matrix becomes float32 piece by piece, in a buffer that stays in the cache. The rows, and everything
else that belongs to one expert, are float32. A quantised matrix is decoded in the same way on every CPU.
"""

import functools
import platform
from collections.abc import Callable

import torch

from .experts_quantized import QuantizedMatrix, Reader

# Bytes of the buffer. On a core with 1 MB of cache, 2 and 4 MB are the fastest; 1 MB takes 5 to 20 percent longer.
PIECE = 2**22
# For quantised matrices and so few rows that decoding is what takes the time: all of it stays in the cache.
SMALL_PIECE, SMALL_UNTIL = 2**20, 32
# With fewer rows a forward product is the fastest as the matrix is stored: reading it is what takes the time.
WIDEN_FROM = 5


@functools.cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Tell whether this CPU has instructions that multiply matrices of a floating dtype."""
    if dtype.itemsize > 2:
        return True
    found = torch.cpu.get_capabilities()
    if found.get("architecture", platform.machine()) in ("x86_64", "AMD64"):
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
        return any(found.get(f"{unit}_{name}", False) for unit in ("amx", "avx512"))
    return bool(found.get({torch.bfloat16: "bf16", torch.float16: "fp16_arith"}.get(dtype), False))


class Products:
    """Products with matrices of one dtype. They hold a buffer: each thread needs its own.

    Args:
        dtype: that of the rows as they come and go, and of matrices that are not quantised.
        decoded: whether the matrices are quantised.

    Attributes:
        dtype (`torch.dtype`): that of the matrices.
        computes_in (`torch.dtype`): that of the rows and of the results: the same, or float32.
    """

    def __init__(self, dtype: torch.dtype, decoded: bool = False) -> None:
        self.dtype = dtype
        # What is decoded is float32 already. And what 16 bits take for each number of rows, oneDNN keeps: 0.5 GB.
        as_stored = dtype.itemsize > 2 or (has_instructions(dtype) and not decoded)
        self.computes_in = dtype if as_stored else torch.float32
        self.buffer: torch.Tensor | None = None

    @property
    def widens(self) -> bool:
        """Whether the matrices are made float32."""
        return self.computes_in != self.dtype

    def linear(
        self, rows: torch.Tensor, matrix: torch.Tensor | QuantizedMatrix, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute rows (n, in) @ matrix.T of a matrix (out, in)."""
        if isinstance(matrix, torch.Tensor):
            if not self.widens:
                return torch.mm(rows, matrix.t(), out=out)
            if len(rows) < WIDEN_FROM:
                return torch.mm(rows.to(self.dtype), matrix.t()).to(self.computes_in)
        read = self._reader(matrix)
        out = rows.new_empty(len(rows), len(matrix)) if out is None else out
        for part in self._parts(matrix, len(rows)):
            torch.mm(rows, read(part).t(), out=out[:, part])
        return out

    def linear_backward(self, grad: torch.Tensor, matrix: torch.Tensor | QuantizedMatrix) -> torch.Tensor:
        """Compute grad (n, out) @ matrix (out, in)."""
        if isinstance(matrix, torch.Tensor) and not self.widens:
            return torch.mm(grad, matrix)
        read = self._reader(matrix)
        out = grad.new_empty(len(grad), matrix.shape[1])
        for part in self._parts(matrix, len(grad)):
            torch.addmm(out, grad[:, part], read(part), beta=int(part.start > 0), out=out)
        return out

    def outer(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, add: bool) -> None:
        """Compute left.T (M, n) @ right (n, N) into a matrix (M, N), or add it to what is there."""
        if not self.widens:
            torch.addmm(out, left.t(), right, beta=int(add), out=out)
            return
        for part in self._parts(out):
            wide = self._wide(out[part], copy=add)
            out[part] = torch.addmm(wide, left[:, part].t(), right, beta=int(add), out=wide)

    def _reader(self, matrix: torch.Tensor | QuantizedMatrix) -> Callable[[slice], torch.Tensor]:
        """Return a function that reads some rows of a matrix in the dtype of the products, into the buffer."""
        if isinstance(matrix, torch.Tensor):
            return lambda part: self._wide(matrix[part])
        read: Reader = matrix.reader()
        columns = matrix.shape[1]
        return lambda part: read(part, self._memory(part.stop - part.start, columns))

    def _parts(self, matrix: torch.Tensor | QuantizedMatrix, num_rows: int = PIECE) -> list[slice]:
        """Divide the rows of a matrix, which are multiplied by some rows (n, in or out)."""
        small = isinstance(matrix, QuantizedMatrix) and num_rows < SMALL_UNTIL
        step = max((SMALL_PIECE if small else PIECE) // (4 * max(matrix.shape[1], 1)) // 16 * 16, 16)
        return [slice(start, min(start + step, len(matrix))) for start in range(0, len(matrix), step)]

    def _memory(self, rows: int, columns: int) -> torch.Tensor:
        """Return a matrix (rows, columns) of any content, in the buffer."""
        if self.buffer is None or self.buffer.numel() < rows * columns:
            self.buffer = torch.empty(rows * columns, dtype=self.computes_in)
        return self.buffer[: rows * columns].view(rows, columns)

    def _wide(self, part: torch.Tensor, copy: bool = True) -> torch.Tensor:
        """Return rows of a matrix in float32, in the buffer; with any content if they are not to be copied."""
        wide = self._memory(*part.shape)
        return wide.copy_(part) if copy else wide


__all__ = ["Products", "has_instructions"]
