"""nf4_linear_grad_input (dx = dy·W + v·A, v = s·dy·B) against the float64 reference, at every level."""

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

from fastlora import checks, reference
from fastlora import isa as levels

op = torch.ops.fastlora


@dataclass
class Prepared:
    """The inputs of a case, what they should give and how far off a kernel may be."""

    inputs: Inputs
    dx: Tensor
    v: Tensor
    dx_bound: Tensor
    v_bound: Tensor


def prepare(case: Case, seed: int) -> Prepared:
    inputs = make_inputs(case, seed)
    dense, scaling = inputs.weight.dense, inputs.scaling
    dx, v = reference.nf4_linear_grad_input(inputs.dy, dense, inputs.lora_a, inputs.lora_b, scaling)
    # The transpose is a linear too: of dy, with Wᵀ, A := Bᵀ and B := Aᵀ.
    a, b = (None, None) if inputs.lora_a is None else (inputs.lora_b.T, inputs.lora_a.T)
    dx_bound = linear_bound(inputs.dy, inputs.weight.magnitudes.T, a, b, scaling, dx, case.dtype)
    v_bound = torch.zeros_like(v)
    if inputs.lora_b is not None:
        magnitudes = abs(scaling) * (inputs.dy.double().abs() @ inputs.lora_b.double().abs())
        v_bound = TOLERANCES[case.dtype].low_rank * magnitudes
    return Prepared(inputs, dx, v, dx_bound, v_bound)


prepared = functools.cache(prepare)  # once for all levels


def check(case: Case, expected: Prepared) -> None:
    dx, v = op.nf4_linear_grad_input(*expected.inputs.grad_input)
    assert (dx.dtype, v.dtype) == (case.dtype, case.dtype)
    assert_within("dx", dx, expected.dx, expected.dx_bound, TOLERANCES[case.dtype].frobenius)
    assert_within("v", v, expected.v, expected.v_bound, TOLERANCES[case.dtype].frobenius)


@pytest.mark.parametrize("case", cases(seed=2), ids=str)
def test_matches_reference(linear_isa: str, case: Case) -> None:
    check(case, prepared(case, case.m + case.k))


@pytest.mark.parametrize(
    "case",
    [Case(120, 1600, 1100, 3, 64, torch.float32), Case(97, 4200, 1100, 3, 64, torch.bfloat16)],
    ids=str,
)
def test_chunks_of_the_contraction(linear_isa: str, case: Case) -> None:
    """n too long to pack at once, k too wide for one group of accumulators."""
    if linear_isa == "scalar":
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
        scaling=st.sampled_from([0.5, 1.0]),
    )
)
def test_matches_reference_on_any_shape(case: Case) -> None:
    expected = prepare(case, 3)
    for name in levels.available_isas():
        with levels.use_isa(name):
            check(case, expected)


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_dense(linear_isa: str, dtype: torch.dtype, m: int) -> None:
    inputs = make_inputs(Case(m, 512, 200, 16, 64, dtype, float32_adapters=False), seed=5)
    want, _ = reference.nf4_linear_grad_input(
        inputs.dy, inputs.weight.dense, inputs.lora_a, inputs.lora_b, inputs.scaling
    )
    weight = inputs.weight.dense.to(dtype).float()
    v = (inputs.dy.float() @ inputs.lora_b.float()).to(dtype)
    dense = inputs.dy.float() @ weight + v.float() @ inputs.lora_a.float()
    theirs = relative_error(dense.to(dtype), want)
    ours = relative_error(op.nf4_linear_grad_input(*inputs.grad_input)[0], want)
    assert ours <= DENSE_FACTOR * theirs, f"relative error {ours:.3g}, dense {theirs:.3g}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [128, 101])
@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("rank", [0, 3])
def test_nan_and_inf_stay_in_their_rows(
    linear_isa: str, dtype: torch.dtype, n: int, rows: int, rank: int
) -> None:
    inputs = make_inputs(Case(rows, n, 70, rank, 64, dtype, double_quant=False), seed=11)
    clean, _ = op.nf4_linear_grad_input(*inputs.grad_input)
    inputs.dy[0, 5] = torch.nan
    inputs.dy[1, n - 1] = torch.inf
    inputs.dy[3, 7], inputs.dy[3, 90] = torch.inf, -torch.inf
    dx, _ = op.nf4_linear_grad_input(*inputs.grad_input)
    want, _ = reference.nf4_linear_grad_input(
        inputs.dy, inputs.weight.dense, inputs.lora_a, inputs.lora_b, inputs.scaling
    )
    assert torch.equal(dx.isnan(), want.isnan())
    assert torch.equal(dx.isposinf(), want.isposinf())
    assert torch.equal(dx.isneginf(), want.isneginf())
    untouched = [i for i in range(rows) if i not in (0, 1, 3)]
    assert torch.equal(dx[untouched], clean[untouched])


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
    dx, v = op.nf4_linear_grad_input(*inputs.grad_input)
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        again, v_again = op.nf4_linear_grad_input(*inputs.grad_input)
        assert torch.equal(again, dx)
        assert torch.equal(v_again, v)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_leading_dimensions_and_strides(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(12, 33, 70, 4, 64, dtype), seed=23)
    dx, v = op.nf4_linear_grad_input(*inputs.grad_input)
    for dy in (
        inputs.dy.reshape(3, 2, 2, 33),
        inputs.dy.T.contiguous().T,
        torch.cat((inputs.dy, inputs.dy), 1)[:, :33],
    ):
        got, got_v = op.nf4_linear_grad_input(dy, *inputs.grad_input[1:])
        assert (got.shape, got_v.shape) == ((*dy.shape[:-1], 70), (*dy.shape[:-1], 4))
        assert torch.equal(got.reshape(12, 70), dx)
        assert torch.equal(got_v.reshape(12, 4), v)
    empty, _ = op.nf4_linear_grad_input(inputs.dy[:0], *inputs.grad_input[1:])
    assert empty.shape == (0, 70)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rank", [0, 2])
def test_no_outputs(linear_isa: str, dtype: torch.dtype, rank: int) -> None:
    """A contraction of length 0: dx and v are 0."""
    empty = torch.empty(0, dtype=torch.uint8)
    adapters = (None, None) if rank == 0 else (torch.ones(rank, 70), torch.empty(0, rank))
    weight = (torch.empty(0, 35, dtype=torch.uint8), empty, None, 70, 64)
    dx, v = op.nf4_linear_grad_input(torch.empty(3, 0, dtype=dtype), *weight, *adapters, 1.0)
    assert torch.equal(dx, torch.zeros(3, 70, dtype=dtype))
    assert torch.equal(v, torch.zeros(3, rank, dtype=dtype))


def test_adjoint_of_nf4_linear(linear_isa: str) -> None:
    """<dy, f(x)> = <f'(dy), x> for the linear map of the forward op, in float32."""
    inputs = make_inputs(Case(9, 77, 133, 5, 64, torch.float32, bias=False, scaling=2.0), seed=29)
    y = op.nf4_linear(*inputs.linear)
    dx, _ = op.nf4_linear_grad_input(*inputs.grad_input)
    left = (inputs.dy.double() * y.double()).sum()
    right = (inputs.x.double() * dx.double()).sum()
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)
