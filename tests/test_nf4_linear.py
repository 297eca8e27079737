"""nf4_linear, nf4_linear_with_u and nf4_linear_given_u against the float64 reference, at every level."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import FLOATS, Case, Inputs, cases, make_inputs
from tolerances import DENSE_FACTOR, TOLERANCES, assert_within, linear_bound, relative_error
from torch import Tensor

from fastlora import checks, quantize_nf4, reference
from fastlora import isa as levels

op = torch.ops.fastlora


@dataclass
class Prepared:
    """The inputs of a case, what they should give and how far off a kernel may be."""

    inputs: Inputs
    y: Tensor
    u: Tensor
    y_bound: Tensor
    u_bound: Tensor


def prepare(case: Case, seed: int) -> Prepared:
    inputs = make_inputs(case, seed)
    dense, scaling = inputs.weight.dense, inputs.scaling
    y, u = reference.nf4_linear(
        inputs.x, dense, inputs.bias, inputs.lora_a, inputs.lora_b, scaling, inputs.gain
    )
    y_bound = linear_bound(
        inputs.x, inputs.weight.magnitudes, inputs.lora_a, inputs.lora_b, scaling, y, case.dtype, inputs.gain
    )
    u_bound = torch.zeros_like(u)
    if inputs.lora_a is not None:
        magnitudes = inputs.x.double().abs() @ inputs.lora_a.double().abs().T
        u_bound = TOLERANCES[case.dtype].low_rank * magnitudes
    return Prepared(inputs, y, u, y_bound, u_bound)


prepared = functools.cache(prepare)  # once for all levels


def check(case: Case, expected: Prepared) -> None:
    y, u = op.nf4_linear_with_u(*expected.inputs.linear)
    assert (y.dtype, u.dtype) == (case.dtype, case.dtype)
    assert_within("y", y, expected.y, expected.y_bound, TOLERANCES[case.dtype].frobenius)
    assert_within("u", u, expected.u, expected.u_bound, TOLERANCES[case.dtype].frobenius)
    assert torch.equal(op.nf4_linear(*expected.inputs.linear), y)


@pytest.mark.parametrize("case", cases(seed=1), ids=str)
def test_matches_reference(linear_isa: str, case: Case) -> None:
    check(case, prepared(case, case.m + case.n))


@pytest.mark.parametrize(
    "case",
    [
        Case(144, 960, 1400, 3, 64, torch.float32),
        Case(97, 1376, 4700, 3, 64, torch.bfloat16),
        Case(3, 0, 0, 0, 64, torch.float32),
        Case(3, 5, 0, 0, 64, torch.bfloat16),
    ],
    ids=str,
)
def test_chunks_and_empty_contractions(linear_isa: str, case: Case) -> None:
    """k too long to pack at once, n too wide for one group of accumulators; and k = 0 with rank 0."""
    if linear_isa == "scalar" and case.m > 3:
        pytest.skip("the scalar level packs nothing")
    check(case, prepared(case, 13))


@pytest.mark.parametrize("m", [5, 12, 24, 50, 90])
@pytest.mark.parametrize(("blocksize", "rank"), [(64, 24), (32, 40)])
def test_every_width_of_a_tile(linear_isa: str, m: int, blocksize: int, rank: int) -> None:
    case = Case(m, 72, 256, rank, blocksize, torch.bfloat16)
    check(case, prepared(case, 17))


@settings(max_examples=40, deadline=None)
@given(
    case=st.builds(
        Case,
        m=st.integers(0, 40),
        n=st.integers(1, 140),
        k=st.integers(1, 300),
        r=st.integers(0, 40),
        blocksize=st.sampled_from(checks.BLOCKSIZES),
        dtype=st.sampled_from(FLOATS),
        float32_adapters=st.booleans(),
        double_quant=st.booleans(),
        bias=st.booleans(),
        scaling=st.sampled_from([0.5, 1.0]),
    )
)
def test_matches_reference_on_any_shape(case: Case) -> None:
    expected = prepare(case, 3)
    for name in levels.available_isas():
        with levels.use_isa(name):
            check(case, expected)


@pytest.mark.parametrize("m", [1, 4, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_dense(linear_isa: str, dtype: torch.dtype, m: int) -> None:
    """No worse than dequantising to x's dtype and multiplying with float32 accumulation, the low-rank term
    and the bias included; whatever route the level takes."""
    inputs = make_inputs(Case(m, 192, 1024, 16, 64, dtype, float32_adapters=False), seed=5)
    want, _ = reference.nf4_linear(
        inputs.x, inputs.weight.dense, inputs.bias, inputs.lora_a, inputs.lora_b, inputs.scaling
    )
    weight = inputs.weight.dense.to(dtype).float()
    u = (inputs.x.float() @ inputs.lora_a.float().T).to(dtype)
    dense = inputs.x.float() @ weight.T + u.float() @ inputs.lora_b.float().T + inputs.bias.float()
    theirs = relative_error(dense.to(dtype), want)
    ours = relative_error(op.nf4_linear(*inputs.linear), want)
    assert ours <= DENSE_FACTOR * theirs, f"relative error {ours:.3g}, dense {theirs:.3g}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_given_u_gives_the_same_bits(linear_isa: str, dtype: torch.dtype, m: int) -> None:
    inputs = make_inputs(Case(m, 70, 130, 9, 64, dtype, scaling=0.5), seed=7)
    y, u = op.nf4_linear_with_u(*inputs.linear)
    w = inputs.weight
    given_u = op.nf4_linear_given_u(inputs.x, u, *w.tensors, w.blocksize, inputs.bias, inputs.lora_b, 0.5)
    assert torch.equal(given_u, y)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k", [128, 123])
@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("rank", [0, 3])
def test_nan_and_inf_stay_in_their_rows(
    linear_isa: str, dtype: torch.dtype, k: int, rows: int, rank: int
) -> None:
    inputs = make_inputs(Case(rows, 40, k, rank, 64, dtype, double_quant=False), seed=11)
    clean = op.nf4_linear(*inputs.linear)
    inputs.x[0, 5] = torch.nan
    inputs.x[1, k - 1] = torch.inf
    inputs.x[3, 7], inputs.x[3, 90] = torch.inf, -torch.inf
    y = op.nf4_linear(*inputs.linear)
    want, _ = reference.nf4_linear(
        inputs.x, inputs.weight.dense, inputs.bias, inputs.lora_a, inputs.lora_b, inputs.scaling
    )
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isposinf(), want.isposinf())
    assert torch.equal(y.isneginf(), want.isneginf())
    untouched = [i for i in range(rows) if i not in (0, 1, 3)]
    assert torch.equal(y[untouched], clean[untouched])


@pytest.mark.parametrize("scale", [1e-33, 1e-20, 1e20, 1e34])
@pytest.mark.parametrize("m", [2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_magnitudes(linear_isa: str, dtype: torch.dtype, m: int, scale: float) -> None:
    """Rows far from 1 keep their relative accuracy, beside a row of ordinary size and a row of zeros."""
    inputs = make_inputs(Case(m, 96, 256, 0, 64, dtype, bias=False), seed=13)
    inputs.x[0] *= scale
    if m > 2:
        inputs.x[2] = 0
    y = op.nf4_linear(*inputs.linear)
    want, _ = reference.nf4_linear(inputs.x, inputs.weight.dense)
    for row in range(2):
        assert relative_error(y[row], want[row]) <= TOLERANCES[dtype].frobenius
    assert m == 2 or not y[2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [1, 6, 20])
def test_outliers_in_x(linear_isa: str, dtype: torch.dtype, m: int) -> None:
    """A few columns a thousand times larger than the rest, as language models have them."""
    inputs = make_inputs(Case(m, 64, 1024, 0, 64, dtype, bias=False), seed=17)
    inputs.x[:, [3, 700]] *= 1000
    y = op.nf4_linear(*inputs.linear)
    want, _ = reference.nf4_linear(inputs.x, inputs.weight.dense)
    bound = linear_bound(inputs.x, inputs.weight.dense, None, None, 1.0, want, dtype)
    assert_within("y", y, want, bound, TOLERANCES[dtype].frobenius)


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("outlier", [1e3, 3e4])
def test_outlier_on_a_column_that_hardly_counts(linear_isa: str, outlier: float, m: int) -> None:
    # The outlier's column of W is zero: what is left is how well its neighbours survived beside it.
    torch.manual_seed(m)
    x = torch.randn(m, 256, dtype=torch.bfloat16)
    x[:, 70] = outlier
    weight = torch.randn(96, 256)
    weight[:, 70] = 0
    quantized = quantize_nf4(weight)
    dense = quantized.dequantize(torch.float32)
    assert not dense[:, 70].any()
    y = op.nf4_linear(x, quantized.packed, quantized.scales, quantized.nested, 64, None, None, None, 1.0)
    want = x.double() @ dense.double().T
    rounded = (x.float() @ dense.to(x.dtype).float().T).to(x.dtype)
    assert relative_error(y, want) < 1.2 * relative_error(rounded, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("code", [0, 15])
@pytest.mark.parametrize("m", [1, 8, 20])
def test_largest_sums(linear_isa: str, dtype: torch.dtype, m: int, code: int) -> None:
    """Every weight at ±absmax and every x at one magnitude: the largest integer sums there are."""
    n, k, blocksize = 5, 1024, 64
    packed = torch.full((n, k // 2), code << 4 | code, dtype=torch.uint8)
    scales = torch.ones(n * k // blocksize).view(torch.uint8)
    for x in (1.0, -1.0):
        y = op.nf4_linear(
            torch.full((m, k), x, dtype=dtype), packed, scales, None, blocksize, None, None, None, 1.0
        )
        want = (k if code == 15 else -k) * x
        torch.testing.assert_close(y, torch.full((m, n), want, dtype=dtype), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 5, 50])
@pytest.mark.parametrize("k", [320, 193])
def test_same_bits_on_every_run_and_thread_count(
    linear_isa: str, dtype: torch.dtype, m: int, k: int, keep_threads: None
) -> None:
    if linear_isa.startswith("cuda_emulated") and dtype is torch.float32:
        pytest.skip("torch's product, whose bits depend on its threads on a CPU")
    inputs = make_inputs(Case(m, 200, k, 16, 64, dtype), seed=19)
    torch.set_num_threads(1)
    y, u = op.nf4_linear_with_u(*inputs.linear)
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        again, u_again = op.nf4_linear_with_u(*inputs.linear)
        assert torch.equal(again, y)
        assert torch.equal(u_again, u)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_leading_dimensions_and_strides(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(12, 33, 70, 4, 64, dtype), seed=23)
    y, u = op.nf4_linear_with_u(*inputs.linear)
    rest = inputs.linear[1:]
    for x in (
        inputs.x.reshape(3, 2, 2, 70),
        inputs.x.T.contiguous().T,
        inputs.x.reshape(3, 4, 70).transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat((inputs.x, inputs.x), dim=1)[:, :70],
    ):
        got, got_u = op.nf4_linear_with_u(x, *rest)
        assert (got.shape, got_u.shape) == ((*x.shape[:-1], 33), (*x.shape[:-1], 4))
        assert got.is_contiguous()
        assert torch.equal(got.reshape(12, 33), y)
        assert torch.equal(got_u.reshape(12, 4), u)
    assert op.nf4_linear(inputs.x[0], *rest).shape == (33,)
    strided = [
        inputs.weight.packed.T.contiguous().T,
        inputs.lora_a.T.contiguous().T,
        inputs.lora_b.T.contiguous().T,
    ]
    got = op.nf4_linear(
        inputs.x, strided[0], inputs.weight.scales, inputs.weight.nested, 64, inputs.bias, *strided[1:], 1.0
    )
    assert torch.equal(got, y)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rank", [0, 2])
def test_no_columns(linear_isa: str, dtype: torch.dtype, rank: int) -> None:
    """A contraction of length 0: y is the bias, u is 0."""
    empty = torch.empty(0, dtype=torch.uint8)
    bias = torch.arange(5).to(dtype)
    adapters = (None, None) if rank == 0 else (torch.empty(rank, 0), torch.ones(5, rank))
    args = (torch.empty(3, 0, dtype=dtype), torch.empty(5, 0, dtype=torch.uint8), empty, None, 64, bias)
    y, u = op.nf4_linear_with_u(*args, *adapters, 1.0)
    assert torch.equal(y, bias.expand(3, 5))
    assert torch.equal(u, torch.zeros(3, rank, dtype=dtype))


@pytest.mark.parametrize("shape", [(0, 70), (3, 0, 70)], ids=str)
def test_no_rows(linear_isa: str, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(Case(1, 33, 70, 4, 64, torch.bfloat16), seed=29)
    y, u = op.nf4_linear_with_u(torch.empty(shape, dtype=torch.bfloat16), *inputs.linear[1:])
    assert (y.shape, u.shape) == ((*shape[:-1], 33), (*shape[:-1], 4))


@pytest.mark.parametrize("m", [1, 8, 9])
def test_every_code_of_a_double_quantised_absmax(linear_isa: str, m: int) -> None:
    """Codes of 1 and rows of x that pick one block each: y is the absmax itself, to the bit."""
    n, blocks = 96, 8  # in a row; three groups of second-level scales in all
    codes = (torch.arange(n * blocks) * 5 % 256).to(torch.uint8)
    nested = torch.tensor([0.3, 0.01, 0.2, 7e-5])
    absmax = reference.nf4_decode_absmax(codes, nested).reshape(n, blocks)
    x = torch.zeros(m, blocks, 64)
    picked = torch.arange(m) % blocks
    x[torch.arange(m), picked, 63] = 1.0
    packed = torch.full((n, 32 * blocks), 0xFF, dtype=torch.uint8)
    args = (packed, codes, nested.view(torch.uint8), 64, None, None, None, 1.0)
    y = op.nf4_linear(x.flatten(1), *args)
    assert torch.equal(y, absmax.T[picked])


def test_inputs_are_left_alone(linear_isa: str) -> None:
    inputs = make_inputs(Case(3, 33, 70, 4, 64, torch.bfloat16), seed=31)
    tensors = [t for t in inputs.linear if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    op.nf4_linear_with_u(*inputs.linear)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
