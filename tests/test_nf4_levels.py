"""Quantise and dequantise at every instruction-set level, bit for bit against reference.py."""

from functools import cache

import pytest
import torch
from bits import DTYPES, assert_same_bits, hard_weight, midpoints
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastlora
from fastlora import checks, reference

# Rows that are whole blocks, rows that blocks straddle, odd rows (whose nibbles pad, row by row), one row,
# fewer elements than a block, and more than one work item of 65,536 elements in either direction.
SHAPES = [
    (1, 1),
    (3, 2),
    (1, 33),
    (5, 123),
    (7, 64),
    (33, 129),
    (4, 4304),
    (257, 257),
    (2, 65537),
    (70000,),
    (3, 1),
]


class Expected:
    """What reference.py makes of a weight."""

    def __init__(self, weight, blocksize):
        self.weight, self.blocksize = weight, blocksize
        codes, self.absmax = reference.nf4_quantize(weight, blocksize)
        self.packed = reference.nf4_pack(codes)
        self.codes2, self.second = reference.nf4_double_quantize(self.absmax)
        self.decoded = reference.nf4_decode_absmax(self.codes2, self.second)
        self.dense = {
            (dtype, double_quant): reference.nf4_dequantize(codes, scales, blocksize, dtype)
            for dtype in DTYPES
            for double_quant, scales in ((False, self.absmax), (True, self.decoded))
        }

    def check(self):
        """Everything the format says of one weight, at the level in force."""
        plain = fastlora.quantize_nf4(self.weight, blocksize=self.blocksize, double_quant=False)
        assert_same_bits(plain.packed, self.packed, "packed")
        assert_same_bits(plain.absmax, self.absmax, "absmax")
        nested = fastlora.quantize_nf4(self.weight, blocksize=self.blocksize)
        assert_same_bits(nested.packed, self.packed, "packed, double_quant")
        assert_same_bits(nested.scales, self.codes2, "8-bit scales")
        assert_same_bits(nested.nested.view(torch.float32), self.second, "second-level scales")
        assert_same_bits(nested.absmax, self.decoded, "absmax, decoded")
        for (dtype, double_quant), want in self.dense.items():
            got = (nested if double_quant else plain).dequantize(dtype)
            assert_same_bits(got, want, f"dequantize to {dtype}, double_quant {double_quant}")


@cache
def expected(shape, dtype, blocksize, seed):
    return Expected(hard_weight(shape, dtype, blocksize, seed), blocksize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(format_isa, shape, dtype):
    if format_isa == "cuda_emulated" and torch.Size(shape).numel() > 50_000:
        pytest.skip("so many elements take seconds on the emulated device")
    for blocksize in (64, 4096):
        expected(shape, dtype, blocksize, len(shape) + shape[0]).check()


@pytest.mark.parametrize("blocksize", checks.BLOCKSIZES)
def test_every_block_size(format_isa, blocksize):
    for shape in ((3, blocksize), (blocksize + 1, 31), (1, 3 * blocksize - 2)):
        expected(shape, torch.bfloat16, blocksize, blocksize).check()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=4).filter(
        lambda s: torch.Size(s).numel() < 20000
    ),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from(checks.BLOCKSIZES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(format_isa, shape, dtype, blocksize, seed):
    if format_isa == "cuda_emulated":
        shape = shape[:2]  # small ones: the emulated device is slow
    Expected(hard_weight(shape, dtype, blocksize, seed), blocksize).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["by_magnitude", "shuffled"])
def test_every_finite_16_bit_value(format_isa, dtype, order):
    """All of them in blocks of like magnitude (each block its own scale), and mixed (one scale for all)."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    if format_isa == "cuda_emulated":
        values = values[torch.randperm(len(values))[:8000]]  # the real device takes them all
    key = values.float().abs() if order == "by_magnitude" else torch.rand(len(values))
    Expected(values[key.argsort()], 64).check()


def test_ties_take_the_lower_code(format_isa):
    """float32 midpoints and their neighbours, in a block of absmax 1."""
    ties = midpoints()
    above = torch.nextafter(ties, torch.tensor(2.0))
    below = torch.nextafter(ties, torch.tensor(-2.0))
    weight = torch.cat((ties, above, below, torch.tensor([1.0]), torch.zeros(18)))
    codes = reference.nf4_unpack(fastlora.quantize_nf4(weight, double_quant=False).packed, 64)
    expected = torch.cat(
        (torch.arange(15), torch.arange(1, 16), torch.arange(15), torch.tensor([15] + [7] * 18))
    )
    assert_same_bits(codes, expected.to(torch.uint8), "codes at the midpoints")


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_blocks_stay_zero(format_isa, dtype):
    weight = torch.zeros(5, 77, dtype=dtype)
    weight[0, 0] = -0.0
    q = fastlora.quantize_nf4(weight, double_quant=False)
    assert (reference.nf4_unpack(q.packed, 77) == 7).all()
    assert (q.absmax == 0).all()
    assert (q.dequantize() == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_whose_inverse_is_infinite_or_subnormal(format_isa, dtype):
    """Zeros stay zeros beside a subnormal absmax, and the largest numbers come back as themselves."""
    tiny = torch.zeros(64, dtype=dtype)
    tiny[5] = 1e-40
    assert (fastlora.quantize_nf4(tiny, double_quant=False).dequantize()[:5] == 0).all()
    top = torch.finfo(dtype).max
    huge = torch.tensor([top, -top, 0.0] * 40, dtype=dtype)
    q = fastlora.quantize_nf4(huge, double_quant=False)
    assert_same_bits(q.dequantize(), huge, "the largest numbers")
    Expected(tiny, 64).check()
    Expected(huge, 64).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 64), (5, 123), (3, 70001)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_values_are_counted_and_located(format_isa, shape, dtype, bad):
    if format_isa == "cuda_emulated" and torch.Size(shape).numel() > 50_000:
        pytest.skip("so many elements take seconds on the emulated device")
    weight = torch.randn(shape).to(dtype)
    weight[-1, -1] = bad
    weight[2, 7] = bad
    message = (
        rf"nf4_quantize: expected finite weights, got 2 NaN or Inf of {weight.numel()}, .* index \(2, 7\)"
    )
    with pytest.raises(ValueError, match=message):
        fastlora.quantize_nf4(weight)


@pytest.mark.parametrize("shape", [(97, 320), (97, 321)], ids=str)
def test_any_number_of_threads(format_level, shape, keep_threads):
    weight = hard_weight((*shape[:-1], shape[-1] * 9), torch.bfloat16, 64, seed=3)
    results = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        q = fastlora.quantize_nf4(weight)
        results.append((q, q.dequantize()))
    for q, dense in results[1:]:
        assert q == results[0][0]
        assert_same_bits(dense, results[0][1], "dequantize")


def test_infinite_scales_of_a_file_decode_as_the_reference(format_isa):
    """A file may hold them; quantize_nf4 never writes them."""
    absmax = torch.tensor([float("inf"), float("nan"), 2.0, 3e38])
    for cols in (64, 63):
        rows = 256 // 64
        q = fastlora.quantize_nf4(torch.randn(rows, cols), double_quant=False)
        q = fastlora.NF4Weight(q.packed, absmax.view(torch.uint8), None, q.shape, q.dtype)
        codes = reference.nf4_unpack(q.packed, cols)
        for dtype in DTYPES:
            want = reference.nf4_dequantize(codes, absmax, 64, dtype)
            assert torch.equal(q.dequantize(dtype).nan_to_num(nan=123.0), want.nan_to_num(nan=123.0))


def test_every_level_of_the_dispatch_table(isa):
    """format_isa leaves out the levels that share a kernel; here they are."""
    for shape in ((5, 123), (7, 64)):
        expected(shape, torch.bfloat16, 64, 5).check()
