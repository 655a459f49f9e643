# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Products of some rows with one expert's matrix, on the CPU.

A CPU without matrix instructions for bfloat16 or float16 multiplies them a number at a time, many times slower than
float32. There a matrix becomes float32 piece by piece, in a buffer that stays in the cache. The rows, and everything
else that belongs to one expert, are float32.
"""

import functools
import platform

import torch

# Bytes of the buffer. On a core with 1 MB of cache, 2 and 4 MB are the fastest; 1 MB takes 5 to 20 percent longer.
PIECE = 2**22
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

    Attributes:
        dtype (`torch.dtype`): that of the matrices.
        computes_in (`torch.dtype`): that of the rows and of the results: the same, or float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.computes_in = dtype if has_instructions(dtype) else torch.float32
        self.buffer: torch.Tensor | None = None

    @property
    def widens(self) -> bool:
        """Whether the matrices are made float32."""
        return self.computes_in != self.dtype

    def linear(self, rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Compute rows (n, in) @ matrix.T of a matrix (out, in)."""
        if not self.widens:
            return torch.mm(rows, matrix.t(), out=out)
        if len(rows) < WIDEN_FROM:
            return torch.mm(rows.to(self.dtype), matrix.t()).to(self.computes_in)
        out = rows.new_empty(len(rows), len(matrix))
        for part in self._parts(matrix):
            torch.mm(rows, self._wide(matrix[part]).t(), out=out[:, part])
        return out

    def linear_backward(self, grad: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Compute grad (n, out) @ matrix (out, in)."""
        if not self.widens:
            return torch.mm(grad, matrix)
        out = grad.new_empty(len(grad), matrix.shape[1])
        for part in self._parts(matrix):
            torch.addmm(out, grad[:, part], self._wide(matrix[part]), beta=int(part.start > 0), out=out)
        return out

    def outer(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, add: bool) -> None:
        """Compute left.T (M, n) @ right (n, N) into a matrix (M, N), or add it to what is there."""
        if not self.widens:
            torch.addmm(out, left.t(), right, beta=int(add), out=out)
            return
        for part in self._parts(out):
            wide = self._wide(out[part], copy=add)
            out[part] = torch.addmm(wide, left[:, part].t(), right, beta=int(add), out=wide)

    def _parts(self, matrix: torch.Tensor) -> list[slice]:
        step = max(PIECE // (4 * max(matrix.shape[1], 1)) // 16 * 16, 16)
        return [slice(start, min(start + step, len(matrix))) for start in range(0, len(matrix), step)]

    def _wide(self, part: torch.Tensor, copy: bool = True) -> torch.Tensor:
        """Return rows of a matrix in float32, in the buffer; with any content if they are not to be copied."""
        if self.buffer is None or self.buffer.numel() < part.numel():
            self.buffer = part.new_empty(part.numel(), dtype=torch.float32)
        wide = self.buffer[: part.numel()].view(part.shape)
        return wide.copy_(part) if copy else wide


__all__ = ["Products", "has_instructions"]
