"""Matrices in fewer bits: NF4 equals bitsandbytes bit for bit, FP8 and MXFP4 equal formulas that stand here."""

import bitsandbytes
import pytest
import torch
from synthetic import same_bytes
from tolerances import BITS_OF_LARGE_MATRIX

from modeling_deepseekmoe.conversion import plan_conversion
from modeling_deepseekmoe.conversion.block_fp8 import SCALE_SUFFIX
from modeling_deepseekmoe.conversion.matrix_formats import (
    NF4_STATE,
    Parts,
    bytes_a_weight,
    check_width,
    decode,
    encode,
    fill_state,
    is_encoded,
    kind_of,
    layout_of,
    matrix_of,
    nested_scales,
    parts_of,
)
from modeling_deepseekmoe.experts_quantized import FORMATS

SHAPE = (96, 192)  # one block of FP8 and a half, three of NF4, six of MXFP4
# QLoRA (arXiv 2305.14314), appendix E.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
E2M1_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # Microscaling Formats 1.0, table 5


def weights() -> dict[str, torch.Tensor]:
    """Matrices whose blocks have very different sizes of values."""
    torch.manual_seed(3)
    normal = torch.randn(SHAPE)
    return {
        "normal": normal,
        "spread": normal * torch.exp(torch.randn(SHAPE) * 4),
        "tiny": normal * 1e-38,
        "subnormal": normal * 1e-42,
        "huge": normal * 1e35,
        "zeros": torch.zeros(SHAPE),
        "zeros of both signs": torch.zeros(SHAPE) * torch.where(normal > 0, 1.0, -1.0),
        "one value": torch.zeros(SHAPE).index_fill_(0, torch.tensor([95]), -3.0),
        "bfloat16": normal.to(torch.bfloat16),
        "float16": normal.to(torch.float16),
    }


WEIGHTS = weights()


# --------------------------------------------------------------------------------------------------------------- nf4
def of_linear4bit(weight: torch.Tensor, double_quantisation: bool) -> Parts:
    """What bitsandbytes itself writes of a layer."""
    layer = bitsandbytes.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double_quantisation
    )
    state = layer.to("cpu").state_dict()
    return {name.removeprefix("weight"): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("double_quantisation", [True, False])
def test_nf4_is_what_bitsandbytes_writes(name: str, double_quantisation: bool) -> None:
    weight = WEIGHTS[name]
    parts = encode(weight, "nf4", double_quantisation=double_quantisation)
    theirs = of_linear4bit(weight, double_quantisation)
    assert same_bytes(parts, theirs)
    if double_quantisation:
        assert torch.equal(nested_scales(weight), theirs[".nested_absmax"])
    assert kind_of(parts, "w") == "nf4" and matrix_of(parts, "w").shape == SHAPE


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nf4_is_decoded_as_bitsandbytes_does_and_as_the_paper_says(name: str, dtype: torch.dtype) -> None:
    parts = encode(WEIGHTS[name], "nf4")
    state = bitsandbytes.functional.QuantState.from_dict(
        {f"weight{suffix}": tensor.clone() for suffix, tensor in parts.items() if suffix}, torch.device("cpu")
    )
    state.dtype = dtype
    found = decode(parts, "w", dtype)
    assert found.dtype == dtype
    assert torch.equal(found, bitsandbytes.functional.dequantize_4bit(parts[""], state))
    scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([parts[""] >> 4, parts[""] & 15], dim=-1).long().view(*SHAPE)
    exact = torch.tensor(NF4_VALUES)[codes] * scales.view(96, 3).repeat_interleave(64, dim=1)
    # bitsandbytes may take what is subnormal for zero.
    exact = torch.where((found == 0) & (exact.abs() < torch.finfo(torch.float32).tiny), 0.0, exact)
    assert torch.equal(found, exact.to(dtype))


def test_nf4_with_another_table_other_blocks_or_another_shape_is_refused() -> None:
    parts = encode(WEIGHTS["normal"], "nf4")
    with pytest.raises(ValueError, match=r"w has another table of values than bitsandbytes' nf4"):
        matrix_of({**parts, ".quant_map": parts[".quant_map"] * 1.01}, "w")
    with pytest.raises(ValueError, match=r"w has another table of values"):
        matrix_of({**parts, ".nested_quant_map": parts[".nested_quant_map"] + 0.01}, "w")
    weight = WEIGHTS["normal"].reshape(48, 384)
    for size in (32, 128):
        codes, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=size, quant_type="nf4")
        own = {f".{key}": value for key, value in state.as_dict(packed=True).items()}
        with pytest.raises(ValueError, match=rf"w has blocksize={size}, which is not allowed: it must be 64"):
            matrix_of({"": codes, **own}, "w")
    codes, state = bitsandbytes.functional.quantize_4bit(weight.reshape(576, 32), blocksize=64, quant_type="nf4")
    own = {f".{key}": value for key, value in state.as_dict(packed=True).items()}
    with pytest.raises(ValueError, match=r"'nf4' is not allowed for w of shape \(576, 32\): its blocks of 64"):
        matrix_of({"": codes, **own}, "w")


def test_the_state_of_nf4_may_have_spaces_behind_it() -> None:
    parts = encode(WEIGHTS["normal"], "nf4")
    length = len(layout_of("nf4", SHAPE, torch.float32)[NF4_STATE])
    filled = fill_state(parts[NF4_STATE], length)
    assert len(filled) == length > len(parts[NF4_STATE]) and bytes(filled.numpy()).endswith(b"}" + b" " * (
        length - len(parts[NF4_STATE])
    ))  # fmt: skip
    assert torch.equal(decode({**parts, NF4_STATE: filled}, "w"), decode(parts, "w"))
    layer = bitsandbytes.nn.Linear4bit(SHAPE[1], SHAPE[0], bias=False, quant_type="nf4")
    stats = {suffix.removeprefix("."): tensor for suffix, tensor in {**parts, NF4_STATE: filled}.items() if suffix}
    layer.weight = bitsandbytes.nn.Params4bit.from_prequantized(parts[""], stats, device="cpu")
    assert torch.equal(
        bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state), decode(parts, "w")
    )


# --------------------------------------------------------------------------------------------------------------- fp8
def nearest_e4m3(value: float) -> tuple[int, float]:
    """The code of the nearest value of float8_e4m3: 1 sign, 4 exponent (bias 7), 3 fraction bits; ties to even."""
    sign, size = (128, -value) if value < 0 or str(value) == "-0.0" else (0, value)
    decoded = {
        code: (code % 8 / 8 + (code >= 8)) * 2.0 ** (max(code // 8, 1) - 7) for code in range(127)
    }  # code 127 is NaN
    code = min(decoded, key=lambda own: (abs(decoded[own] - size), own % 2))
    return sign + code, -decoded[code] if sign else decoded[code]


@pytest.mark.parametrize("name", ["normal", "spread", "tiny", "zeros", "bfloat16"])
def test_fp8_equals_an_independent_formula(name: str) -> None:
    weight = WEIGHTS[name][:3]
    parts = encode(weight, "fp8")
    assert parts.keys() == {"", SCALE_SUFFIX} and kind_of(parts, "w") == "fp8"
    for column in (0, 128):  # the second block is ragged
        block, scale = weight[:, column : column + 128].float(), parts[SCALE_SUFFIX][0, column // 128]
        largest = block.abs().max()
        assert scale == (max(largest / 448, 2.0**-126) if largest else 1.0)
        scaled = (block / scale).flatten().tolist()
        wanted = [nearest_e4m3(value) for value in scaled]
        codes = parts[""][:, column : column + 128].flatten().view(torch.uint8).tolist()
        assert codes == [code for code, _ in wanted]
        values = torch.tensor([value for _, value in wanted]).view(block.shape) * scale
        assert torch.equal(decode(parts, "w")[:, column : column + 128], values)


def test_fp8_ties_and_subnormals() -> None:
    """The largest value of the block makes the scale 1."""
    weight = torch.zeros(1, 8)
    weight[0] = torch.tensor([448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, 2.0**-9, 432.0])
    assert decode(encode(weight, "fp8"), "w").tolist() == [[448, 16, 20, -16, 0, 2.0**-8, 2.0**-9, 448.0]]


# -------------------------------------------------------------------------------------------------------------- mxfp4
def of_microscaling(weight: torch.Tensor) -> tuple[list[list[int]], list[list[int]], torch.Tensor]:
    """Codes, exponents (plus 127) and values of a matrix, value by value, by the standard's section 6.3."""
    codes, exponents, values = [], [], torch.zeros(weight.shape)
    for row, numbers in enumerate(weight.double()):
        codes.append([])
        exponents.append([])
        for first in range(0, len(numbers), 32):
            block = numbers[first : first + 32]
            largest = float(block.abs().max())
            exponent = int(torch.tensor(largest, dtype=torch.float64).log2().floor()) - 2 if largest else -127
            exponent = max(-127, min(127, exponent))
            exponents[-1].append(exponent + 127)
            for column, value in enumerate(block.tolist()):
                size = abs(value) / 2.0**exponent
                code = min(range(8), key=lambda own: (abs(E2M1_SIZES[own] - size), own % 2))
                negative = str(value).startswith("-")
                codes[-1].append(code + 8 * negative)
                values[row, first + column] = (-1 if negative else 1) * E2M1_SIZES[code] * 2.0**exponent
    return codes, exponents, values


@pytest.mark.parametrize("name", WEIGHTS)
def test_mxfp4_equals_an_independent_formula(name: str) -> None:
    weight = WEIGHTS[name][-3:]
    parts = encode(weight, "mxfp4")
    codes, exponents, values = of_microscaling(weight)
    assert parts[""].dtype == torch.int8 and parts[SCALE_SUFFIX].dtype == torch.float8_e8m0fnu
    assert parts[SCALE_SUFFIX].view(torch.uint8).tolist() == exponents
    pairs = parts[""].view(torch.uint8)
    assert torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1).tolist() == codes
    found = decode(parts, "w")
    assert torch.equal(found.view(torch.int32), values.view(torch.int32))  # the signs of zeros too
    assert torch.equal(decode(parts, "w", torch.bfloat16), values.to(torch.bfloat16))
    assert kind_of(parts, "w") == "mxfp4"


def test_mxfp4_ties_and_what_is_too_large() -> None:
    """Of a largest value of 7 the scale is 1. Halves go to the value with an even last bit, and 7 to 6."""
    weight = torch.zeros(1, 32)
    weight[0, :10] = torch.tensor([7.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0])
    assert decode(encode(weight, "mxfp4"), "w")[0, :10].tolist() == [6, 0, 1, 1, 2, 2, 4, 4, -0.0, -4]
    weight[0, :2] = torch.tensor([7.0, 0.2500001])
    assert decode(encode(weight, "mxfp4"), "w")[0, 1] == 0.5


def test_mxfp4_as_others_store_it() -> None:
    parts = encode(WEIGHTS["normal"], "mxfp4")
    as_bytes = {"": parts[""].view(torch.uint8), SCALE_SUFFIX: parts[SCALE_SUFFIX].view(torch.uint8)}
    assert torch.equal(decode(as_bytes, "w"), decode(parts, "w"))
    with pytest.raises(ValueError, match=r"w_scale_inv is stored as torch\.float32, .*: E8M0 or uint8"):
        matrix_of({**parts, SCALE_SUFFIX: parts[SCALE_SUFFIX].float()}, "w")
    with pytest.raises(ValueError, match=r"w_scale_inv has the shape \(96, 5\), .*blocks of 1 x 32 have \(96, 6\)"):
        matrix_of({**parts, SCALE_SUFFIX: parts[SCALE_SUFFIX][:, :5]}, "w")
    parts[SCALE_SUFFIX].view(torch.uint8)[3, 2] = 255
    assert decode(parts, "w")[3].isnan().nonzero().flatten().tolist() == list(range(64, 96))


# ---------------------------------------------------------------------------------------------------------------- all
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("double_quantisation", [True, False])
def test_tensors_of_a_file_there_and_back(kind: str, double_quantisation: bool) -> None:
    for weight in WEIGHTS.values():
        parts = encode(weight, kind, double_quantisation=double_quantisation)
        assert same_bytes(parts_of(matrix_of(parts, "w"), weight.dtype), parts)
        layout = layout_of(kind, SHAPE, weight.dtype, double_quantisation)
        assert layout.keys() == parts.keys()
        for suffix, tensor in parts.items():
            assert layout[suffix].dtype == tensor.dtype
            assert layout[suffix].shape == tensor.shape or (
                suffix == NF4_STATE and 0 <= len(layout[suffix]) - len(tensor) < 24
            )


@pytest.mark.parametrize("kind", FORMATS)
def test_a_large_matrix_has_the_stated_bytes_a_weight(kind: str) -> None:
    weight = torch.randn(1024, 2048).to(torch.bfloat16)
    for double_quantisation in (True, False):
        parts = encode(weight, kind, double_quantisation=double_quantisation)
        found = sum(tensor.nbytes for suffix, tensor in parts.items() if suffix not in (NF4_STATE, ".quant_map"))
        wanted = bytes_a_weight(kind, double_quantisation)
        assert found / weight.numel() == pytest.approx(wanted, rel=BITS_OF_LARGE_MATRIX)
        assert wanted < 0.6 or kind == "fp8"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(kind: str, value: float) -> None:
    weight = WEIGHTS["normal"].clone()
    weight[5, 70] = value
    with pytest.raises(ValueError, match="the matrix holds values that are not finite"):
        encode(weight, kind)


def test_scales_without_a_mean_are_refused() -> None:
    weight = torch.full(SHAPE, 3e38)
    with pytest.raises(ValueError, match=r"the matrix holds values up to 3e\+38: their scales have no mean"):
        encode(weight, "nf4")
    assert torch.equal(decode(encode(weight, "nf4", double_quantisation=False), "w"), weight)


@pytest.mark.parametrize(("kind", "width", "block"), [("nf4", 96, 64), ("nf4", 65, 64), ("mxfp4", 48, 32)])
def test_odd_widths_are_refused(kind: str, width: int, block: int) -> None:
    message = rf"format='{kind}' is not allowed for up of shape \(4, {width}\): its blocks of {block} .*Choose 'fp8'"
    with pytest.raises(ValueError, match=message):
        encode(torch.randn(4, width), kind, "up")
    with pytest.raises(ValueError, match=message):
        check_width(kind, "up", (4, width))
    assert decode(encode(torch.ones(4, width), "fp8"), "up").shape == (4, width)
    with pytest.raises(ValueError, match="format='int4' is not allowed: one of nf4, fp8, mxfp4"):
        encode(torch.randn(4, 64), "int4")


def test_tensors_of_no_known_format_are_refused() -> None:
    assert kind_of({"": torch.ones(2, 2)}, "w") is None
    assert torch.equal(decode({"": torch.ones(2, 2)}, "w", torch.bfloat16), torch.ones(2, 2).to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"w is stored as torch\.int8 without scales, which is not allowed"):
        kind_of({"": torch.ones(2, 2, dtype=torch.int8)}, "w")
    with pytest.raises(ValueError, match=r"w is stored as torch\.uint8 with w\.absmax, which is not allowed"):
        decode({"": torch.ones(2, 2, dtype=torch.uint8), ".absmax": torch.ones(2)}, "w")
    with pytest.raises(ValueError, match=r"w_scale_inv has the shape \(2, 2\), .*blocks of 128 x 128 have \(1, 2\)"):
        matrix_of({**encode(WEIGHTS["normal"], "fp8"), SCALE_SUFFIX: torch.ones(2, 2)}, "w")


@pytest.mark.parametrize("kind", ["nf4", "mxfp4"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_what_was_encoded_is_known_again_and_nothing_else(kind: str, name: str) -> None:
    weight = WEIGHTS[name]
    for double_quantisation in (True, False):
        parts = encode(weight, kind, double_quantisation=double_quantisation)
        assert is_encoded(parts, weight, "w")
        for suffix in parts.keys() & {"", ".absmax", ".nested_absmax", SCALE_SUFFIX}:
            wrong = parts[suffix].clone()
            wrong.view(torch.uint8).view(-1)[-1] ^= 1
            assert not is_encoded({**parts, suffix: wrong}, weight, "w"), suffix


def test_an_offset_that_is_rounded_otherwise_is_known_again() -> None:
    """As it is where another number of threads adds up the mean."""
    weight = WEIGHTS["spread"]
    functional = bitsandbytes.functional
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    mean = state.absmax.mean()
    for factor, same in ((1 + 2.0**-22, True), (1.001, False)):
        scales, state2 = functional.quantize_blockwise(state.absmax - mean * factor, blocksize=256)
        other = functional.QuantState(
            scales, weight.shape, state.code, 64, "nf4", weight.dtype, offset=mean * factor, state2=state2
        )
        parts = {"": codes, **{f".{key}": value for key, value in other.as_dict(packed=True).items()}}
        assert is_encoded(parts, weight, "w") == same


@pytest.mark.parametrize("kind", ["nf4", "mxfp4"])
def test_a_plan_of_a_released_model(kind: str) -> None:
    """DeepSeekMoE 16B: 14.9 billion weights of routed experts, and 1.4 billion others in bfloat16."""
    plan = plan_conversion("deepseek-moe-16b", dtype=kind, without_weights=True)
    experts = 27 * 64 * 3 * 2048 * 1408
    wanted = experts * bytes_a_weight(kind) + 2 * (16_375_728_128 - experts)
    assert plan.nbytes == pytest.approx(wanted, rel=BITS_OF_LARGE_MATRIX)
    assert plan.to_dict()["tensors_by_dtype"]["uint8" if kind == "nf4" else "int8"] == 27 * 64 * 3 * (
        3 if kind == "nf4" else 1
    )
