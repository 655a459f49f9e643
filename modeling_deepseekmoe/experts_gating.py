# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What an expert makes of its gates and ups, and which of these formulas a class of experts has.

SwiGLU (arXiv 2002.05202) with what families add to it: a clamp (DeepSeek-V4, GLM-5-next), a steeper sigmoid and an
offset of the ups (MiniMax-M3), or GELU in place of SiLU (Gemma 4). The formula of a class is found by trying: its own
function is called with random numbers, and the attributes that it reads are numbers too.

Shape letters: n choices, I expert width.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .transformers_support import GELUTanh, SiLUActivation, gating_of

_aten = torch.ops.aten
# sigmoid(a * x + b * x**3) * x for both; that of GELU is its tanh form (arXiv 1606.08415), a = 2 * sqrt(2 / pi).
SIGMOIDS = {"silu": (1.0, 0.0), "gelu_tanh": (1.5957691216057308, 1.5957691216057308 * 0.044715)}


class Gating(NamedTuple):
    """The activation of an expert: `function(slope * g) / slope * (u + offset)`.

    g is the gate, at most `limit`. u is the up, clamped to [-limit, limit].

    Attributes:
        function (`str`): `"silu"` or `"gelu_tanh"`.
        limit (`float`, *optional*): `None` clamps nothing.
        slope, offset (`float`): 1.702 and 1 in MiniMax-M3.
    """

    function: str = "silu"
    limit: float | None = None
    slope: float = 1.0
    offset: float = 0.0

    @property
    def sigmoid(self) -> tuple[float, float]:
        """The numbers a and b of sigmoid(a * g + b * g**3) * g, which is `function(slope * g) / slope`."""
        linear, cubic = SIGMOIDS[self.function]
        return linear * self.slope, cubic * self.slope**3

    def factors(self, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the two factors (n, I) of the activation from the first product (n, 2I)."""
        gate, up = first.chunk(2, dim=1)
        if self.limit is not None:
            up = up.clamp(-self.limit, self.limit)
        if self.offset:
            up = up + self.offset
        gate = self._inside(gate)
        opened = F.silu(gate) if self.function == "silu" else F.gelu(gate, approximate="tanh")
        return opened if self.slope == 1 else opened.div_(self.slope), up

    def backward(
        self, first: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], grad: torch.Tensor
    ) -> torch.Tensor:
        """Compute the gradient of the first product (n, 2I).

        Args:
            first: the first product.
            factors: what [`Gating.factors`] has made of it.
            grad: the gradient of the activation (n, I), which is overwritten.
        """
        (gate, up), (opened, shifted) = first.chunk(2, dim=1), factors
        grad_first = torch.empty_like(first)
        grad_gate, grad_up = grad_first.chunk(2, dim=1)
        torch.mul(grad, opened, out=grad_up)
        grad.mul_(shifted)
        if self.function == "silu":
            _aten.silu_backward.grad_input(grad, self._inside(gate), grad_input=grad_gate)
        else:
            _aten.gelu_backward.grad_input(grad, self._inside(gate), approximate="tanh", grad_input=grad_gate)
        if self.limit is not None:
            grad_gate.masked_fill_(gate > self.limit, 0)
            grad_up.masked_fill_(up.abs() > self.limit, 0)
        return grad_first

    def _inside(self, gate: torch.Tensor) -> torch.Tensor:
        """Return what the function is applied to."""
        gate = gate if self.limit is None else gate.clamp(max=self.limit)
        return gate if self.slope == 1 else gate * self.slope


SILU = Gating()


class _Form(NamedTuple):
    """The formula of a class of experts, whose numbers are attributes of each module.

    Attributes:
        reads_function: whether the function is the attribute `act_fn`; else it is SiLU.
        limit, slope: the names of the attributes with these numbers, or "".
        offset (`float`).
    """

    reads_function: bool
    limit: str = ""
    slope: str = ""
    offset: float = 0.0


def gating_numbers(experts: nn.Module) -> Gating | None:
    """Return the formula by which experts make their activation, or `None` if it is another one."""
    form = _form_of(type(experts))
    function = _function_of(experts.act_fn) if form is not None and form.reads_function else "silu"
    if form is None or function is None:
        return None
    limit, slope = (getattr(experts, name) if name else None for name in (form.limit, form.slope))
    if not all(number is None or isinstance(number, (int, float)) for number in (limit, slope)):
        return None
    return Gating(
        function, None if limit is None else float(limit), 1.0 if slope is None else float(slope), form.offset
    )


def _function_of(activation: Any) -> str | None:
    if activation is F.silu or isinstance(activation, (nn.SiLU, SiLUActivation)):
        return "silu"
    is_gelu = isinstance(activation, GELUTanh) or (
        isinstance(activation, nn.GELU) and activation.approximate == "tanh"
    )
    return "gelu_tanh" if is_gelu else None


class _Reader:
    """Stands for a module of experts: every attribute is a number, and it is noted which are read."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}
        self.reads_function = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "act_fn":
            self.reads_function = True
            return F.silu
        return self.numbers.setdefault(name, 0.6 + 0.3 * len(self.numbers))


@torch.compiler.assume_constant_result
def _form_of(kind: Any) -> _Form | None:
    """Find the formula of a class of experts; `None` if it is another one."""
    return _found_form(kind)  # Dynamo would trace the function in a cache


@functools.cache
def _found_form(kind: Any) -> _Form | None:
    with ThreadPoolExecutor(1) as thread:  # tracing and default devices are modes of a thread, and none of this one
        return thread.submit(_try_forms, gating_of(kind)).result()


@torch.no_grad()
def _try_forms(own: Any) -> _Form | None:
    reader, generator = _Reader(), torch.Generator().manual_seed(0)
    first = torch.randn(64, 16, generator=generator, dtype=torch.float64) * 2
    try:
        expected = own(reader, first).double().expand(64, 8)
    except Exception:  # whatever a function of another package raises on numbers: it is another formula
        return None
    for form in _forms(reader):
        limit, slope = (reader.numbers[name] if name else None for name in (form.limit, form.slope))
        opened, up = Gating("silu", limit, slope or 1.0, form.offset).factors(first)
        if torch.allclose(opened * up, expected, atol=1e-6, rtol=1e-5):
            return form
    return None


def _forms(reader: _Reader) -> Iterator[_Form]:
    for limit in ("", *reader.numbers):
        for slope in ("", *reader.numbers):
            for offset in (0.0, 1.0):
                yield _Form(reader.reads_function, limit, slope, offset)


__all__ = ["SILU", "Gating", "gating_numbers"]
