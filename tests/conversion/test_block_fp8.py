"""DeepSeek-V3's FP8 blocks: the bound of the format on every value, and an independent formula bit for bit."""

import math

import pytest
import torch
from synthetic import dequantized

from modeling_deepseekmoe.conversion.block_fp8 import FP8, block_scales, dequantize, quantize, scale_shape

SHAPES = [(128, 128), (576, 200), (1, 1), (127, 129), (256, 3), (5, 384)]


def weights(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Matrices whose blocks have very different sizes of values."""
    normal = torch.randn(shape)
    return {
        "normal": normal,
        "spread": normal * torch.exp(torch.randn(shape) * 4),
        "tiny": normal * 1e-38,
        "subnormal": normal * 1e-42,
        "huge": normal * 1e36,
        "zeros": torch.zeros(shape),
        "one value": torch.zeros(shape).index_fill_(0, torch.tensor([shape[0] - 1]), 3.0),
        "bfloat16": normal.to(torch.bfloat16),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", weights((1, 1)))
def test_error_is_within_the_bound_of_the_format(shape: tuple[int, int], kind: str) -> None:
    weight = weights(shape)[kind]
    scales = block_scales(weight)
    values = quantize(weight, scales)
    assert scales.shape == scale_shape(shape) == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    assert values.dtype == FP8 and scales.dtype == torch.float32 and bool((scales > 0).all())
    error = (dequantize(values, scales).double() - weight.double()).abs()
    rows, columns = torch.arange(shape[0])[:, None] // 128, torch.arange(shape[1])[None, :] // 128
    scale = scales.double()[rows, columns]
    # Three bits of mantissa: half a unit is 2**-4 of a normal value; subnormals are multiples of 2**-9. Scaling and
    # unscaling round in float32, which has denormals of its own.
    bound = torch.maximum(weight.double().abs() * 2**-4, scale * 2**-10) * (1 + 1e-6) + 2**-149
    assert bool((error <= bound).all())


def test_the_largest_value_of_a_block_becomes_448() -> None:
    weight = torch.randn(300, 300)
    values = quantize(weight, block_scales(weight))
    for row in range(0, 300, 128):
        for column in range(0, 300, 128):
            assert values[row : row + 128, column : column + 128].float().abs().max() == 448


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantising_equals_an_independent_formula(shape: tuple[int, int]) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # all but the two NaNs
    values = codes[torch.randint(len(codes), shape)].view(FP8)
    scales = torch.rand(scale_shape(shape)) * 1e-2
    found = dequantize(values, scales)
    expected = dequantized({"w": values, "w_scale_inv": scales})["w"]
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def test_quantising_what_was_dequantised_gives_the_same_values() -> None:
    """The scales of a block with its largest code are found again, up to the rounding of one product."""
    weight = torch.randn(256, 200)
    scales = block_scales(weight)
    values = quantize(weight, scales)
    again = dequantize(values, scales)
    torch.testing.assert_close(block_scales(again), scales, rtol=2**-23, atol=0)
    assert torch.equal(quantize(again, scales).view(torch.uint8), values.view(torch.uint8))


def test_other_blocks() -> None:
    weight = torch.randn(20, 30)
    scales = block_scales(weight, (8, 16))
    assert scales.shape == (3, 2) == scale_shape((20, 30), (8, 16))
    again = dequantize(quantize(weight, scales, (8, 16)), scales, (8, 16))
    assert (again - weight).abs().max() < 0.2
