"""nf4_multi_lora_linear and nf4_multi_lora_grad_input against a float64 loop over rows, at every level."""

from __future__ import annotations

import functools

import pytest
import torch
from bits import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from segmented_cases import CAPACITY, ROUTINGS, Case, bounds, make_inputs, zipf
from tolerances import TOLERANCES, assert_within, linear_bound
from torch import Tensor

from fastlora import isa as levels
from fastlora import reference

op = torch.ops.fastlora
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

CASES = [
    *(Case(slots, k=128, ns=(96,)) for slots in ROUTINGS.values()),
    *(Case(ROUTINGS["shuffled"], ns=(33,), dtype=dtype, pools=dtype) for dtype in (bf16, fp16, fp32)),
    *(Case(ROUTINGS["large"], k=130, ns=(65,), dtype=dtype, pools=fp32) for dtype in (bf16, fp16, fp32)),
    Case(ROUTINGS["zipf"], k=200, ns=(33, 7)),
    Case(ROUTINGS["large"], k=96, ns=(64, 32, 40)),
    Case(ROUTINGS["zipf"], k=320, ns=(5, 1, 70), dtype=fp32, pools=fp32),
    Case((0, 1, 2, 0, 2), k=2049, ns=(342,), ranks=(128, 256, 1)),
    Case(zipf(140, 3, 5), k=342, ns=(2049,), ranks=(128, 256, 1)),
    Case(zipf(97, 3, 7), k=4700, ns=(200,), ranks=(16, 5, 1)),
    Case(zipf(600, 7, 8), k=192, ns=(130,), ranks=(8, 16, 0, 64, 3, 1, 100)),
    Case((1, 0, -1, 1, 1, 1), k=342, ns=(257,), ranks=(17, 8), dtype=fp32, pools=fp32),
    Case(tuple(range(64)), k=256, ns=(192,), ranks=(16,) * 64),
    Case(ROUTINGS["zipf"], k=200, ns=(33, 7), offsets=True),
    Case(ROUTINGS["one_each"], k=128, ns=(96,), dtype=fp16, pools=fp32, offsets=True),
    Case(ROUTINGS["large"], k=96, ns=(64, 32, 40), offsets=True),
    Case(zipf(97, 3, 7), k=4700, ns=(200,), ranks=(16, 5, 1), dtype=fp32, pools=fp32, offsets=True),
    Case((0, 1, 1), k=1, ns=(1,), ranks=(1, 2)),
    Case((1, 1, 0, -1) * 3, k=0, ns=(5,), ranks=(1, 2)),
]


class Expected:
    def __init__(self, case: Case):
        self.inputs = i = make_inputs(case, weight=True)
        dense = i.weight.dense
        self.y, self.u = reference.nf4_multi_lora_linear(i.x, dense, i.bias, *i.adapters)
        self.dx, self.v = reference.nf4_multi_lora_grad_input(i.dy, dense, *i.adapters)
        low, self.u_bound = bounds(i, False, torch.zeros_like(self.y))
        self.y_bound = low + linear_bound(i.x, i.weight.magnitudes, None, None, 1.0, self.y, case.dtype)
        low, self.v_bound = bounds(i, True, torch.zeros_like(self.dx))
        self.dx_bound = low + linear_bound(i.dy, i.weight.magnitudes.T, None, None, 1.0, self.dx, case.dtype)


expected = functools.cache(Expected)


def check(want: Expected, batch_invariant: bool = False) -> None:
    inputs, dtype = want.inputs, want.inputs.case.dtype
    y, u = op.nf4_multi_lora_linear(*inputs.linear(batch_invariant))
    dx, v = op.nf4_multi_lora_grad_input(*inputs.grad_input(batch_invariant))
    assert (y.dtype, u.dtype, dx.dtype, v.dtype) == (dtype,) * 4
    frobenius = TOLERANCES[dtype].frobenius
    assert_within("u", u, want.u, want.u_bound, frobenius)
    assert_within("y", y, want.y, want.y_bound, frobenius)
    assert_within("v", v, want.v, want.v_bound, frobenius)
    assert_within("dx", dx, want.dx, want.dx_bound, frobenius)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
def test_matches_reference(isa: str, case: Case, batch_invariant: bool) -> None:
    check(expected(case), batch_invariant)


@settings(max_examples=25, deadline=None)
@given(
    case=st.builds(
        Case,
        slots=st.lists(st.integers(-1, 3), max_size=60).map(tuple),
        k=st.integers(1, 200),
        ns=st.lists(st.integers(1, 90), min_size=1, max_size=3).map(tuple),
        ranks=st.lists(st.integers(0, 40), min_size=4, max_size=4).map(tuple),
        dtype=st.sampled_from([bf16, fp16, fp32]),
        pools=st.sampled_from([bf16, fp16, fp32]),
        blocksize=st.sampled_from([32, 64, 256]),
        seed=st.integers(0, 3),
    ),
    batch_invariant=st.booleans(),
)
def test_matches_reference_on_any_table(case: Case, batch_invariant: bool) -> None:
    want = Expected(case)
    for name in levels.available_isas():
        with levels.use_isa(name):
            check(want, batch_invariant)


@pytest.mark.parametrize("dtype", [bf16, fp32], ids=str)
@pytest.mark.parametrize("m", [5, 150])
def test_same_bits_on_every_run_and_thread_count(
    isa: str, dtype: torch.dtype, m: int, keep_threads: None
) -> None:
    case = Case(zipf(m, CAPACITY, 5), k=520, ns=(300, 70), dtype=dtype, pools=dtype)
    inputs = make_inputs(case, weight=True)

    def run() -> list[Tensor]:
        return [
            *op.nf4_multi_lora_linear(*inputs.linear()), *op.nf4_multi_lora_grad_input(*inputs.grad_input()),
        ]  # fmt: skip

    torch.set_num_threads(1)
    first = run()
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        for got, want in zip(run(), first, strict=True):
            assert_same_bits(got, want, f"{threads} threads")


@pytest.mark.parametrize("dtype", [bf16, fp32], ids=str)
def test_a_row_does_not_depend_on_its_batch(isa: str, dtype: torch.dtype) -> None:
    """batch_invariant: every row of a batch alone, and in halves, gives the bits it had in the whole."""
    slots = zipf(90, CAPACITY, 6)
    case = Case(slots, k=260, ns=(130, 40), dtype=dtype, pools=dtype)
    inputs = make_inputs(case, weight=True)
    y, u = op.nf4_multi_lora_linear(*inputs.linear(batch_invariant=True))
    dx, v = op.nf4_multi_lora_grad_input(*inputs.grad_input(batch_invariant=True))
    where = torch.empty(90, dtype=torch.long)
    where[inputs.order.long()] = torch.arange(90)  # a row's position in u and v
    for rows in (*([i] for i in range(0, 90, 7)), list(range(40)), list(range(89, 29, -1))):
        order, segments = op.lora_route(inputs.slots[rows], CAPACITY)
        w, table = inputs.weight, (*inputs.adapters[:4], order, segments, inputs.widths)
        got, got_u = op.nf4_multi_lora_linear(
            inputs.x[rows], *w.tensors, w.blocksize, inputs.bias, *table, True
        )
        assert_same_bits(got, y[rows], "y")
        assert_same_bits(got_u, u[where[rows]][order.long()], "u")
        got, got_v = op.nf4_multi_lora_grad_input(
            inputs.dy[rows], *w.tensors, case.k, w.blocksize, *table, True
        )
        assert_same_bits(got, dx[rows], "dx")
        assert_same_bits(got_v, v[where[rows]][order.long()], "v")


@pytest.mark.parametrize("m", [6, 40])
def test_a_row_keeps_to_its_own_adapter(isa: str, m: int) -> None:
    """Inf and NaN of one adapter, and of a row that has it, stay in its rows."""
    inputs = make_inputs(Case((0, 1, -1) * (m // 3 + 1), k=128, ns=(96,), ranks=(16, 16)), weight=True)
    clean, _ = op.nf4_multi_lora_linear(*inputs.linear())
    clean_dx, _ = op.nf4_multi_lora_grad_input(*inputs.grad_input())
    first = int(inputs.entries[1, 0])
    inputs.a[0][first] = torch.inf
    inputs.b[0][first + 1] = torch.nan
    y, _ = op.nf4_multi_lora_linear(*inputs.linear())
    dx, _ = op.nf4_multi_lora_grad_input(*inputs.grad_input())
    for got, want in ((y, clean), (dx, clean_dx)):
        assert_same_bits(got[0::3], want[0::3], "rows of the other adapter")
        assert_same_bits(got[2::3], want[2::3], "rows without an adapter")
        assert got[1::3].isnan().all()


def test_without_adapters_it_is_the_layer(isa: str) -> None:
    inputs = make_inputs(Case((-1,) * 20, k=192, ns=(96,)), weight=True)
    w = inputs.weight
    want = reference.nf4_linear(inputs.x, w.dense, inputs.bias)[0]
    y, u = op.nf4_multi_lora_linear(*inputs.linear())
    bound = linear_bound(inputs.x, w.dense, None, None, 1.0, want, bf16)
    assert_within("y", y, want, bound, TOLERANCES[bf16].frobenius)
    assert not u.any()


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize("m", [3, 40])
def test_rounded_once(isa: str, m: int, batch_invariant: bool) -> None:
    """1 + 2^-9 and a low-rank term of 1.25 * 2^-9: in bfloat16 their sum is 1 + 2^-7, but 1 if the first were
    rounded before the second is added."""
    codes = torch.full((64, 64), reference.ZERO_CODE, dtype=torch.uint8)
    codes[:2] = codes[:, :2] = 15
    weight = (reference.nf4_pack(codes), torch.ones(64).view(torch.uint8), None)
    wide = torch.zeros(m, 64, dtype=bf16)
    wide[:, 0], wide[:, 1] = 1.0, 2**-9
    first = torch.zeros(1, 64, dtype=bf16)
    first[0, 0] = 1.0  # u and v are 1
    second = torch.full((1, 64), 1.25 * 2**-9, dtype=bf16)
    order, segments = op.lora_route(torch.zeros(m, dtype=torch.int32), 1)
    rest = (torch.tensor([[0, 1]], dtype=torch.int32), torch.ones(1), order, segments, [1], batch_invariant)
    y, _ = op.nf4_multi_lora_linear(wide, *weight, 64, None, [first], [second], *rest)
    dx, _ = op.nf4_multi_lora_grad_input(wide, *weight, 64, 64, [second], [first], *rest)
    want = torch.full((m, 64), 1 + 2**-7, dtype=bf16)
    assert_same_bits(y, want, "y")
    assert_same_bits(dx, want, "dx")
