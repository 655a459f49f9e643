"""The kernels with quantised stacks, in Triton's interpreter: as with what these decode to, and without a copy."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from tolerances import EXPERTS_LOW_PRECISION, SAME_COMPUTATION
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_deepseekmoe import experts, experts_grouped
from modeling_deepseekmoe.experts import choose_backend
from modeling_deepseekmoe.experts_decoding import decode_block
from modeling_deepseekmoe.experts_gating import SILU
from modeling_deepseekmoe.experts_grouped import runs_of
from modeling_deepseekmoe.experts_operands import Adapter, ExpertGradients, ExpertOperands, factors_of
from modeling_deepseekmoe.experts_operator import run_operator
from modeling_deepseekmoe.experts_quantized import QuantizedStack
from modeling_deepseekmoe.experts_sources import IN_PRODUCTS, fit
from modeling_deepseekmoe.experts_tiles import Tile, use_tiles
from modeling_deepseekmoe.experts_triton import experts_backward_triton, experts_forward_triton
from modeling_deepseekmoe.grouping import group_by_expert
from modeling_deepseekmoe.triton_support import INTERPRETED, kernel, tl

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is on where there is no GPU")
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
EXPERTS, RANK = 4, 3
LARGE, SMALL = Tile(16, 128, 128, 4, 1), Tile(16, 16, 16, 4, 1)


def stack_of(kind: str, projections: int, rows: int, columns: int, dtype: torch.dtype = FLOAT32) -> QuantizedStack:
    """All codes but NaN, with scales that differ from block to block."""
    sizes = EXPERTS, projections * rows, columns
    codes = torch.randint(0, 256, (*sizes[:2], columns if kind == "fp8" else columns // 2), dtype=torch.uint8)
    if kind == "fp8":
        codes[codes & 127 == 127] = 1
        scales = torch.rand(EXPERTS, projections, -(-rows // 128), -(-columns // 128)) / 100 / columns**0.5
    elif kind == "mxfp4":
        scales = torch.randint(121, 125, (*sizes[:2], columns // 32), dtype=torch.uint8)
    else:
        scales = (0.5 + torch.rand(EXPERTS, sizes[1] * columns // 64)) / columns**0.5
    return QuantizedStack(kind, codes, scales, None, dtype)


@dataclass
class Inputs:
    """Operands, and the gradient of the output."""

    operands: ExpertOperands
    grad: torch.Tensor

    def results(self, implementation: str) -> list[torch.Tensor]:
        """The output, and the gradients of hidden states, weights and factors."""
        leaves = [t.detach().clone().requires_grad_() for t in self.leaves]
        adapters = (self.operands.gate_up_adapter, self.operands.down_adapter)
        rest = iter(leaves[2:])
        adapters = [adapter and adapter._replace(factor_a=next(rest), factor_b=next(rest)) for adapter in adapters]
        output = run_operator(
            self.operands._replace(
                hidden=leaves[0], weights=leaves[1], gate_up_adapter=adapters[0], down_adapter=adapters[1]
            ),
            implementation,
        )
        output.backward(self.grad)
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    @property
    def leaves(self) -> list[torch.Tensor]:
        adapters = (self.operands.gate_up_adapter, self.operands.down_adapter)
        return [self.operands.hidden, self.operands.weights, *(f for f in factors_of(*adapters) if f is not None)]

    def decoded(self) -> "Inputs":
        """The same with dense stacks."""
        stacks = {name: getattr(self.operands, name).decode(slice(None)) for name in ("gate_up", "down")}
        return replace(self, operands=self.operands._replace(**stacks))

    def widened(self) -> "Inputs":
        """The same in float32."""

        def wide(value: object) -> object:
            if isinstance(value, Adapter):
                return value._replace(factor_a=value.factor_a.float(), factor_b=value.factor_b.float())
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.float() if floating else value

        return Inputs(ExpertOperands(*map(wide, self.operands)), self.grad.float())


def inputs_of(
    kind: str, hidden: int, width: int, tokens: int, dtype: torch.dtype, rank: int = 0, dropout: float = 0.0
) -> Inputs:
    """Choices of two of four experts, and one of an expert that is on another rank."""
    torch.manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape) * scale).to(dtype)

    ids = torch.stack([1 + torch.randperm(2) for _ in range(tokens)])
    ids[0, 0] = EXPERTS
    adapters = []
    for outside, inside in ((2 * width, hidden), (hidden, width)):
        factors = draw(EXPERTS, rank, inside, scale=inside**-0.5), draw(EXPERTS, outside, rank)
        adapters.append(Adapter(*factors, 0.5, dropout, torch.tensor(7)) if rank else None)
    stacks = stack_of(kind, 2, width, hidden, dtype), stack_of(kind, 1, hidden, width, dtype)
    operands = ExpertOperands(draw(tokens, hidden), ids, torch.rand(tokens, 2), *stacks, SILU, *adapters)
    return Inputs(operands, draw(tokens, hidden))


def check(found: list[torch.Tensor], wanted: list[torch.Tensor], dtype: torch.dtype) -> None:
    tolerance = {FLOAT32: SAME_COMPUTATION, **EXPERTS_LOW_PRECISION}[dtype]
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        difference = (one.float() - other.float()).abs().max()
        assert difference <= tolerance * max(1.0, float(other.abs().max())), number


@pytest.mark.parametrize(
    ("kind", "hidden", "width", "tokens", "dtype", "rank", "tile"),
    [
        # Widths that are no powers of two; blocks of scales that end within gates, rows or tiles.
        ("fp8", 140, 20, 5, BFLOAT16, RANK, LARGE),
        ("fp8", 20, 140, 5, FLOAT32, RANK, LARGE),
        ("fp8", 37, 21, 17, FLOAT32, 0, SMALL),
        ("fp8", 136, 130, 1, BFLOAT16, 0, None),
        ("mxfp4", 96, 32, 5, FLOAT32, RANK, LARGE),
        ("mxfp4", 32, 96, 5, BFLOAT16, RANK, LARGE),
        ("mxfp4", 32, 64, 17, FLOAT32, 0, SMALL),
        ("mxfp4", 96, 160, 1, BFLOAT16, 0, None),
    ],
)
def test_outputs_and_gradients(
    kind: str, hidden: int, width: int, tokens: int, dtype: torch.dtype, rank: int, tile: Tile | None
) -> None:
    inputs = inputs_of(kind, hidden, width, tokens, dtype, rank)
    with use_tiles(lambda _: tile):
        found = inputs.results("triton")
    check(found, inputs.decoded().widened().results("eager"), dtype)


@pytest.mark.parametrize("kind", IN_PRODUCTS)
def test_dropout_is_that_of_dense_stacks(kind: str) -> None:
    inputs = inputs_of(kind, 32, 32, 3, FLOAT32, RANK, 0.4)
    with use_tiles(lambda _: LARGE):
        check(inputs.results("triton"), inputs.decoded().results("triton"), FLOAT32)


class LargestFloatingTensor(TorchDispatchMode):
    """The most elements of any floating tensor that an operation makes. The interpreter copies bytes."""

    elements = 0

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point() and not func.is_view:
            self.elements = max(self.elements, result.numel())
        return result


def largest_tensor(inputs: Inputs) -> tuple[list[torch.Tensor], int]:
    """Run both passes apart from the operator, which hides what it does from a dispatch mode."""
    operands, seen = inputs.operands, LargestFloatingTensor()
    permutation, _, offsets = group_by_expert(operands.expert_ids, EXPERTS, implementation="eager")
    order, wanted = (permutation.int(), offsets), ExpertGradients(True, True, False, False, *[True] * 4)
    with use_tiles(lambda _: LARGE), seen:
        output, kept = experts_forward_triton(operands, *order, True)
        gradients = experts_backward_triton(inputs.grad, operands, *order, kept, wanted)
    return [output, *(gradient for gradient in gradients if gradient is not None)], seen.elements


@pytest.mark.parametrize(("number", "dtype"), [(1, BFLOAT16), (2, FLOAT32)])
def test_experts_in_nf4_are_decoded_some_at_a_time(
    number: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of one and one of two, with one expert between them that has no choices, or each expert alone."""
    inputs = inputs_of("nf4", 64, 64, 5, dtype, RANK)
    inputs.operands.expert_ids[:2, 0] = 3
    inputs.operands.expert_ids[inputs.operands.expert_ids == 2] = 0
    wanted = inputs.decoded().widened().results("eager")
    monkeypatch.setattr(experts_grouped, "WORKSPACE", number * dtype.itemsize * 128 * 64)
    found, elements = largest_tensor(inputs)
    check(found, wanted, dtype)
    assert elements == number * 128 * 64


@pytest.mark.parametrize("kind", IN_PRODUCTS)
def test_no_matrix_is_decoded_outside(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is not written, and the experts without choices, are NaN."""
    inputs = inputs_of(kind, 64, 64, 2, FLOAT32, RANK)
    for stack in (inputs.operands.gate_up, inputs.operands.down):
        stack.codes[[0, 3]] = 127
        stack.scales[[0, 3]] = torch.nan if kind == "fp8" else 255
    empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *size: object, **kwargs: object) -> torch.Tensor:
        made = empty(self, *size, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(QuantizedStack, "decode", lambda *_: pytest.fail("decoded"))
    results, elements = largest_tensor(inputs)
    assert len(results) == 7 and all(result.isfinite().all() for result in results)
    assert elements < 64 * 64


def decode_kernel(
    codes, scales, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PROJECTION: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    row, first = tl.program_id(0) * 32 + tl.arange(0, 32), tl.program_id(1) * 128
    block = decode_block(codes, scales, row, row < ROWS, first, COLUMNS, PROJECTION, 32, 128, FORMAT)
    column = first + tl.arange(0, 128)
    exists = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    tl.store(out + row[:, None] * COLUMNS + column[None, :], block, mask=exists)


@pytest.mark.parametrize("kind", IN_PRODUCTS)
def test_values_are_those_of_the_decoder(kind: str) -> None:
    """Bit by bit: all codes, with scales of all sizes, subnormal numbers and NaN."""
    if kind == "fp8":
        codes = torch.arange(256, dtype=torch.uint8).repeat(1, 60, 1)[:, :, :200]
        codes = torch.cat([codes[:, :30], 255 - codes[:, 30:]], dim=1).contiguous()
        scales = torch.tensor([1.0, 3e-7, 1e-42, 1e36, -0.3, torch.nan, torch.inf, 0.0]).view(1, 4, 1, 2)
    else:
        codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).repeat(1, 16, 1)
        scales = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    stack = QuantizedStack(kind, codes, scales, None, FLOAT32)
    _, rows, columns = stack.shape
    found = torch.empty(rows, columns)
    launch = kernel(decode_kernel)[(-(-rows // 32), -(-columns // 128))]
    launch(codes, scales, found, rows, columns, 15 if kind == "fp8" else rows, kind)
    wanted = stack.decode(slice(None))[0]
    assert torch.equal(found.isnan(), wanted.isnan()) and wanted.isnan().any()
    assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_runs_of_experts_with_choices() -> None:
    ends = [0, 2, 2, 3, 5, 6, 6, 6, 9]
    assert [(run.start, run.stop) for run in runs_of(ends, 2)] == [(0, 1), (2, 4), (4, 5), (7, 8)]
    assert [(run.start, run.stop) for run in runs_of(ends, 8)] == [(0, 1), (2, 5), (7, 8)]
    assert runs_of([0, 0, 0], 2) == []


def test_tiles_fit_to_the_blocks_of_scales() -> None:
    options = {"BLOCK_COLUMNS": 256, "BLOCK_IN": 16, "descriptors": 1, "maxnreg": 128}
    fp8, mxfp4 = stack_of("fp8", 1, 8, 8), stack_of("mxfp4", 1, 8, 32)
    assert fit(options, torch.zeros(1, 8, 8), True) == fit(options, stack_of("nf4", 1, 8, 64), True) == options
    assert fit(options, fp8, True) == {"BLOCK_COLUMNS": 256, "BLOCK_IN": 16, "descriptors": 0}
    assert fit(options, fp8, False) == {"BLOCK_COLUMNS": 128, "BLOCK_IN": 16, "descriptors": 0}
    assert fit(options, mxfp4, True) == {"BLOCK_COLUMNS": 256, "BLOCK_IN": 32, "descriptors": 0}
    assert fit(options, mxfp4, False) == {"BLOCK_COLUMNS": 256, "BLOCK_IN": 16, "descriptors": 0}


@pytest.mark.parametrize("kind", [*IN_PRODUCTS, "nf4"])
def test_on_a_gpu_the_kernels_are_chosen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the trial is that of the format where the products decode."""
    module = torch.nn.Module()
    module.gate_up_proj, module.down_proj = torch.zeros(0), torch.zeros(0)
    stacks = stack_of(kind, 2, 32, 64), stack_of(kind, 1, 64, 64)
    monkeypatch.setattr(experts, "gating_numbers", lambda _: SILU)
    monkeypatch.setattr(experts, "stack_of", lambda _, name: stacks[name == "down_proj"])
    monkeypatch.setattr(experts, "why_not_fused", lambda *_: "")
    tried: list[tuple] = []
    monkeypatch.setattr(experts, "why_failed", lambda name, device, case=(): tried.append((name, case)) or "")

    class Rows:
        device = torch.device("cuda")

    assert choose_backend(module, Rows(), top_k=2) == ("triton", "")
    assert tried[-1] == ("experts", ("silu", kind) if kind in IN_PRODUCTS else ())
    monkeypatch.setattr(experts, "why_not_fused", lambda *_: "no")
    assert choose_backend(module, Rows(), top_k=2) == ("grouped", "no")


def test_the_operator_without_gradients_and_tokens() -> None:
    inputs = inputs_of("fp8", 24, 20, 2, BFLOAT16)
    operands = inputs.operands
    with use_tiles(lambda _: LARGE), torch.no_grad():
        output = run_operator(operands, "triton")
        none = run_operator(
            operands._replace(hidden=operands.hidden[:0], expert_ids=operands.expert_ids[:0],
                              weights=operands.weights[:0]), "triton",
        )  # fmt: skip
    assert output.isfinite().all() and none.shape == (0, 24)


@pytest.mark.parametrize("kind", ["nf4", *IN_PRODUCTS])
@pytest.mark.parametrize("rank", [0, RANK])
def test_a_correction_is_beside_the_adapters(kind: str, rank: int) -> None:
    inputs = inputs_of(kind, 64, 64, 5, FLOAT32, rank)
    stacks = {}
    for name in ("gate_up", "down"):
        stack = getattr(inputs.operands, name)
        factors = torch.randn(EXPERTS, 2, stack.shape[2]) / 8, torch.randn(EXPERTS, stack.shape[1], 2)
        stacks[name] = replace(stack, correction=factors)
    corrected = replace(inputs, operands=inputs.operands._replace(**stacks))
    wanted = corrected.decoded().results("eager")
    for implementation in ("eager", "triton"):
        check(corrected.results(implementation), wanted, FLOAT32)
    assert (wanted[0] - inputs.results("eager")[0]).norm() > 0.1 * wanted[0].norm()
