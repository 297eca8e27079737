"""The adapter's gradients (lora_grad_a, lora_grad_b, and nf4_linear_backward, which makes dB on its way)
against the float64 reference, and to the same bits on every run."""

from __future__ import annotations

from dataclasses import dataclass

import devices
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import FLOATS, Case, make_inputs, pairwise
from tolerances import TOLERANCES, assert_within, linear_bound
from torch import Tensor

from fastlora import reference

op = torch.ops.fastlora
SCALING = 0.375
# Rows, columns and ranks around those of a tile of 64 x 128 x 16, and none, and one.
AXES = {
    "m": (0, 1, 70),
    "width": (1, 33, 128, 200),
    "r": (1, 3, 16, 17, 64, 70),
    "dtype": FLOATS,
    "float32_adapters": (False, True),
}
SEEDS = (1, 200, 3000)


@dataclass(frozen=True)
class Thin:
    m: int
    width: int
    r: int
    dtype: torch.dtype
    float32_adapters: bool

    def __str__(self) -> str:
        adapters = "-float32_adapters" if self.float32_adapters else ""
        return f"m{self.m}-width{self.width}-r{self.r}-{str(self.dtype)[6:]}{adapters}"

    @property
    def adapters(self) -> torch.dtype:
        return torch.float32 if self.float32_adapters else self.dtype


CASES = [Thin(**chosen) for chosen in pairwise(AXES, seed=7)]


def normal(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gram_bound(tall: Tensor, small: Tensor, scaling: float, want: Tensor, adapters: torch.dtype) -> Tensor:
    """Of scaling·tallᵀ·small: sums of float32, and two roundings, to the dtype of tall at worst."""
    magnitudes = abs(scaling) * (tall.double().abs().T @ small.double().abs())
    rounding = max(TOLERANCES[adapters].output, TOLERANCES[tall.dtype].output)
    return TOLERANCES[torch.float32].products * magnitudes + 2 * rounding * want.abs()


def frobenius(*dtypes: torch.dtype) -> float:
    return max(TOLERANCES[dtype].frobenius for dtype in dtypes)


def check_grad_b(case: Thin) -> None:
    dy, u = normal(1, case.m, case.width, dtype=case.dtype), normal(2, case.m, case.r, dtype=case.dtype)
    b = normal(3, case.width, case.r, dtype=case.adapters)
    v, db = op.lora_grad_b(dy, u, b, SCALING)
    assert (v.dtype, db.dtype) == (case.dtype, case.adapters)
    want = reference.lora_grad_b(dy, u, SCALING)
    bound = gram_bound(dy, u, SCALING, want, case.adapters)
    assert_within("db", db, want, bound, frobenius(case.dtype, case.adapters))
    magnitudes = SCALING * (dy.double().abs() @ b.double().abs())
    want = SCALING * (dy.double() @ b.double())
    bound = TOLERANCES[case.dtype].low_rank * magnitudes
    assert_within("v", v, want, bound, TOLERANCES[case.dtype].frobenius)


def check_grad_a(case: Thin) -> None:
    x, v = normal(4, case.m, case.width, dtype=case.dtype), normal(5, case.m, case.r, dtype=case.dtype)
    da = op.lora_grad_a(v, x, case.adapters)
    assert da.dtype == case.adapters
    want = reference.lora_grad_a(v, x)
    bound = gram_bound(v, x, 1.0, want, case.adapters)
    assert_within("da", da, want, bound, frobenius(case.dtype, case.adapters))


def check_backward(case: Case, seed: int) -> None:
    inputs = make_inputs(case, seed)
    dense, a, b, scaling = inputs.weight.dense, inputs.lora_a, inputs.lora_b, inputs.scaling
    u = normal(6, case.m, case.r, dtype=case.dtype)
    dx, v, db = op.nf4_linear_backward(inputs.dy, u, *inputs.grad_input[1:])
    assert (dx.dtype, v.dtype, db.dtype) == (case.dtype, case.dtype, b.dtype)
    want_x, want_v = reference.nf4_linear_grad_input(inputs.dy, dense, a, b, scaling)
    tolerance = TOLERANCES[case.dtype]
    bound = linear_bound(inputs.dy, inputs.weight.magnitudes.T, b.T, a.T, scaling, want_x, case.dtype)
    assert_within("dx", dx, want_x, bound, tolerance.frobenius)
    bound = tolerance.low_rank * scaling * (inputs.dy.double().abs() @ b.double().abs())
    assert_within("v", v, want_v, bound, tolerance.frobenius)
    want_b = reference.lora_grad_b(inputs.dy, u, scaling)
    bound = gram_bound(inputs.dy, u, scaling, want_b, b.dtype)
    assert_within("db", db, want_b, bound, frobenius(case.dtype, b.dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grad_b_and_its_v_match_the_reference(op_device: str, case: Thin) -> None:
    check_grad_b(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grad_a_matches_the_reference(op_device: str, case: Thin) -> None:
    check_grad_a(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(0, 33, 70, 4, 64, torch.bfloat16),
        Case(1, 128, 192, 16, 64, torch.bfloat16),
        Case(1, 33, 70, 1, 64, torch.float16, float32_adapters=False),
        Case(70, 130, 128, 17, 64, torch.bfloat16, float32_adapters=False, scaling=0.5),
        Case(70, 200, 192, 64, 128, torch.float16, scaling=2.0),
        Case(70, 33, 123, 70, 64, torch.bfloat16),
        Case(70, 64, 256, 16, 64, torch.bfloat16, double_quant=False),
        Case(20, 65, 64, 3, 32, torch.float16),
        Case(9, 48, 96, 16, 64, torch.float32),
    ],
    ids=str,
)
def test_backward_matches_the_reference(layer_device: str, case: Case) -> None:
    check_backward(case, case.m + case.n)


ranks, rows = st.integers(1, 80), st.integers(0, 80)
dtypes = st.sampled_from(FLOATS)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(Thin, m=rows, width=st.integers(0, 300), r=ranks, dtype=dtypes, float32_adapters=st.booleans())
)
def test_any_shape(case: Thin) -> None:
    check_grad_b(case)
    check_grad_a(case)


@settings(max_examples=30, deadline=None)
@given(
    st.builds(
        Case,
        m=rows,
        n=st.integers(1, 140),
        k=st.integers(1, 300),
        r=ranks,
        blocksize=st.sampled_from([32, 64, 1024]),
        dtype=dtypes,
        float32_adapters=st.booleans(),
        scaling=st.sampled_from([0.5, 1.0]),
    )
)
def test_backward_on_any_shape(case: Case) -> None:
    check_backward(case, 3)


@pytest.mark.parametrize(
    "case",
    [
        Case(5, 130, 1024, 24, 64, torch.bfloat16),  # k is split over blocks in tiles
        Case(130, 130, 192, 24, 64, torch.float16),  # m over those of the thin products
    ],
    ids=str,
)
@pytest.mark.parametrize("device", [*devices.EMULATED, "cuda"])
def test_the_same_bits_in_any_order_of_execution(device: str, case: Case) -> None:
    """Every sum has one order: none depends on which block of threads, or which warp, comes first."""
    inputs = make_inputs(case, seed=19)
    seed = torch.tensor(5)

    def everything() -> list[Tensor]:
        y, u = op.nf4_linear_with_u(*inputs.linear)
        dx, v, db = op.nf4_linear_backward(inputs.dy, u, *inputs.grad_input[1:])
        again_v, again_db = op.lora_grad_b(inputs.dy, u, inputs.lora_b, inputs.scaling)
        return [
            y, u, dx, v, db, again_v, again_db,
            op.lora_grad_a(v, inputs.x, torch.float32),
            op.lora_dropout(inputs.x, seed, 0.3),
        ]  # fmt: skip

    runs = []
    for start in SEEDS:
        with devices.device(device, start):
            runs.append(everything())
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))
    # Alone or on the way to dx, v and dB are one kernel's.
    assert torch.equal(runs[0][3], runs[0][5])
    assert torch.equal(runs[0][4], runs[0][6])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_leading_dimensions_and_strides(op_device: str, dtype: torch.dtype) -> None:
    dy, u = normal(1, 12, 33, dtype=dtype), normal(2, 12, 4, dtype=dtype)
    b = normal(3, 33, 4, dtype=torch.float32)
    v, db = op.lora_grad_b(dy, u, b, SCALING)
    da = op.lora_grad_a(v, dy, torch.float32)
    assert op.lora_grad_b(dy.reshape(3, 4, 33), u.reshape(3, 4, 4), b, SCALING)[0].shape == (3, 4, 4)
    for tall, small in (
        (dy.reshape(3, 4, 33), u.reshape(3, 4, 4)),
        (dy.T.contiguous().T, torch.cat((u, u), 1)[:, :4]),
    ):
        got_v, got_db = op.lora_grad_b(tall, small, b.T.contiguous().T, SCALING)
        assert torch.equal(got_v.reshape(12, 4), v)
        assert torch.equal(got_db, db)
        assert torch.equal(op.lora_grad_a(got_v, tall, torch.float32), da)
