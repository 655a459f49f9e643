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

    @property
    def trial_case(self) -> tuple[str, ...]:
        """What the kernels are tried with: the function, and which of the numbers there are. Of plain SiLU nothing."""
        if self == SILU:
            return ()
        # Words, because these numbers may be symbols in a trace.
        words = ["clamp" if self.limit is not None else ""]
        words += ["slope" if self.slope != 1.0 else "", "offset" if self.offset != 0.0 else ""]
        return (self.function, *words)

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
    form = None if "_apply_gate" in experts.__dict__ else _form_of(type(experts))
    if form is None:
        return None
    function = _function_of(getattr(experts, "act_fn", None)) if form.reads_function else "silu"
    limit, slope = (getattr(experts, name, None) if name else 1.0 for name in (form.limit, form.slope))
    # Numbers that are not above 0 may be asked for by a branch that nothing has tried.
    usual = [isinstance(number, (int, float)) and number > 0 for number in (limit, slope)]
    if function is None or not all(usual):
        return None
    assert limit is not None and slope is not None
    return Gating(function, float(limit) if form.limit else None, float(slope), form.offset)


def _function_of(activation: Any) -> str | None:
    if activation is F.silu or isinstance(activation, (nn.SiLU, SiLUActivation)):
        return "silu"
    is_gelu = isinstance(activation, GELUTanh) or (
        isinstance(activation, nn.GELU) and activation.approximate == "tanh"
    )
    return "gelu_tanh" if is_gelu else None


class _Reader:
    """Stands for a module of experts: every attribute is a number, and it is noted which are read."""

    def __init__(self, scale: float) -> None:
        self.scale, self.reads_function = scale, False
        self.numbers: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "act_fn":
            self.reads_function = True
            return F.silu
        return self.numbers.setdefault(name, self.scale * (0.6 + 0.3 * len(self.numbers)))


@torch.compiler.assume_constant_result
def _form_of(kind: Any) -> _Form | None:
    """Find the formula of a class of experts; `None` if it is another one."""
    return _found_form(gating_of(kind))  # Dynamo would trace the function in a cache


@functools.cache
def _found_form(own: Any) -> _Form | None:
    with ThreadPoolExecutor(1) as thread:  # tracing and default devices are modes of a thread, and none of this one
        first, second = (thread.submit(_try_forms, own, scale).result() for scale in (1.0, 9.0))
    return first if first == second else None


@torch.no_grad()
def _try_forms(own: Any, scale: float) -> _Form | None:
    """Find the formula that gives what a class's own function does, also where a constant in it would be reached."""
    reader, generator = _Reader(scale), torch.Generator().manual_seed(0)
    first = torch.randn(64, 16, generator=generator, dtype=torch.float64) * 2
    first = torch.cat([first, 10 * first, 300 * first])
    try:
        expected = own(reader, first).double().expand(len(first), 8)
    except Exception:  # whatever a function of another package raises on numbers: it is another formula
        return None
    for form in _forms(reader):
        limit, slope = (reader.numbers[name] if name else None for name in (form.limit, form.slope))
        opened, up = Gating("silu", limit, slope or 1.0, form.offset).factors(first)
        # Another attribute may decide what is computed.
        is_all = set(reader.numbers) == {name for name in (form.limit, form.slope) if name}
        if is_all and torch.allclose(opened * up, expected, atol=1e-6, rtol=1e-5):
            return form
    return None


def _forms(reader: _Reader) -> Iterator[_Form]:
    for limit in ("", *reader.numbers):
        for slope in ("", *reader.numbers):
            for offset in (0.0, 1.0):
                yield _Form(reader.reads_function, limit, slope, offset)


__all__ = ["SILU", "Gating", "gating_numbers"]
