"""Many adapters in one batch, the low-rank term alone: routing, product, gradients, against a float64 loop
over rows, at every level."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import torch
from bits import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from segmented_cases import CAPACITY, RANKS, ROUTINGS, Case, bounds, make_inputs, zipf
from tolerances import TOLERANCES, assert_within
from torch import Tensor

from fastlora import isa as levels
from fastlora import reference

op = torch.ops.fastlora
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

CASES = [
    *(Case(slots) for slots in ROUTINGS.values()),
    *(Case(ROUTINGS[name], dtype=fp32, pools=fp32) for name in ("shuffled", "zipf", "large")),
    *(Case(ROUTINGS[name], pools=fp32) for name in ("shuffled", "one_each", "large")),
    *(Case(ROUTINGS[name], dtype=fp16, pools=fp16) for name in ("shuffled", "zipf", "large")),
    Case(ROUTINGS["zipf"], dtype=fp16, pools=fp32),
    Case(ROUTINGS["zipf"], dtype=fp32, pools=bf16),
    Case(ROUTINGS["zipf"], ns=(33, 7)),
    Case(ROUTINGS["large"], k=96, ns=(64, 32, 40)),
    Case(ROUTINGS["zipf"], ns=(5, 1, 70), dtype=fp32, pools=fp32),
    Case((0, 1, 2, 0, 2) * 5, k=2049, ns=(3420,), ranks=(128, 256, 1)),
    Case((1, 0, -1), k=3420, ns=(2049,), ranks=(17, 8), dtype=fp32, pools=fp32),
    Case((0,) * 33, k=9000, ns=(600,), ranks=(4,)),
    Case((0, 1, 1), k=1, ns=(1,), ranks=(1, 2)),
    Case((1, 1, 0, -1) * 3, k=0, ns=(5,), ranks=(1, 2)),
]


class Expected:
    """The inputs of a case and what they should give."""

    def __init__(self, case: Case):
        self.inputs = i = make_inputs(case)
        self.y, self.u = reference.segmented_lora(i.x, *i.adapters, i.y)
        self.dx, self.v = reference.segmented_lora_grad_input(i.dy, *i.adapters, i.dx)
        self.y_bound, self.u_bound = bounds(i, False, self.y)
        self.dx_bound, self.v_bound = bounds(i, True, self.dx)
        u, v = self.u.to(case.dtype), self.v.to(case.dtype)
        self.pools = reference.segmented_lora_grad_pools(i.x, i.dy, u, v, *i.adapters)
        self.sizes = reference.segmented_lora_grad_pools(
            i.x.abs(), i.dy.abs(), u.abs(), v.abs(), *i.magnitudes
        )
        self.narrow = (u, v)


expected = functools.cache(Expected)


def check(want: Expected) -> None:
    inputs, dtype = want.inputs, want.inputs.case.dtype
    frobenius = TOLERANCES[dtype].frobenius
    y, dx = inputs.y.clone(), inputs.dx.clone()
    u = op.segmented_lora(inputs.x, *inputs.adapters, y)
    v = op.segmented_lora_grad_input(inputs.dy, *inputs.adapters, dx)
    assert_within("u", u, want.u, want.u_bound, frobenius)
    assert_within("y", y, want.y, want.y_bound, frobenius)
    assert_within("v", v, want.v, want.v_bound, frobenius)
    assert_within("dx", dx, want.dx, want.dx_bound, frobenius)
    without = inputs.order[int(inputs.segments[-1, 1]) :].long()
    assert_same_bits(y[without], inputs.y[without], "rows of y without an adapter")
    assert_same_bits(dx[without], inputs.dx[without], "rows of dx without an adapter")
    got = op.segmented_lora_grad_pools(inputs.x, inputs.dy, *want.narrow, *inputs.adapters)
    # Rounded once, to the coarser of both dtypes where a level multiplies in x's.
    t = TOLERANCES[max(dtype, inputs.case.pools, key=lambda d: TOLERANCES[d].output)]
    for name, side, sums, sizes in zip(("da", "db"), got, want.pools, want.sizes, strict=True):
        for j, pool in enumerate(side):
            assert_within(
                f"{name}[{j}]", pool, sums[j], t.output * sums[j].abs() + 4e-6 * sizes[j], t.frobenius
            )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(isa: str, case: Case) -> None:
    check(expected(case))


@settings(max_examples=25, deadline=None)
@given(
    case=st.builds(
        Case,
        slots=st.lists(st.integers(-1, 3), max_size=40).map(tuple),
        k=st.integers(1, 200),
        ns=st.lists(st.integers(1, 90), min_size=1, max_size=3).map(tuple),
        ranks=st.lists(st.integers(0, 40), min_size=4, max_size=4).map(tuple),
        dtype=st.sampled_from([bf16, fp16, fp32]),
        pools=st.sampled_from([bf16, fp16, fp32]),
        seed=st.integers(0, 3),
    )
)
def test_matches_reference_on_any_table(case: Case) -> None:
    want = Expected(case)
    for name in levels.available_isas():
        with levels.use_isa(name):
            check(want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("capacity", [CAPACITY, 5000])
def test_routing(name: str, capacity: int, dtype: torch.dtype) -> None:
    slots = torch.tensor(ROUTINGS[name], dtype=dtype)
    order, segments = op.lora_route(slots, capacity)
    want_order, want_segments = reference.lora_route(slots, capacity)
    assert torch.equal(order, want_order)
    assert torch.equal(segments, want_segments)
    assert (order.dtype, segments.dtype) == (torch.int32, torch.int32)


def test_routing_is_stable_over_many_rows() -> None:
    slots = torch.tensor(zipf(5000, 40, 3)).reshape(50, 100)
    order, segments = op.lora_route(slots, 64)
    flat = slots.reshape(-1)
    for (slot, begin), (_, end) in pairwise(segments.tolist()):
        assert torch.equal(order[begin:end].long(), (flat == slot).nonzero()[:, 0]) or slot == -1
    assert (flat[order[int(segments[-1, 1]) :].long()] == -1).all()


@pytest.mark.parametrize("dtype", [bf16, fp32], ids=str)
def test_same_bits_on_every_run_and_thread_count(isa: str, dtype: torch.dtype, keep_threads: None) -> None:
    inputs = make_inputs(Case(zipf(150, CAPACITY, 5), k=1100, ns=(300, 1030), dtype=dtype, pools=dtype))

    def run() -> list[Tensor]:
        y, dx = inputs.y.clone(), inputs.dx.clone()
        u = op.segmented_lora(inputs.x, *inputs.adapters, y)
        v = op.segmented_lora_grad_input(inputs.dy, *inputs.adapters, dx)
        da, db = op.segmented_lora_grad_pools(inputs.x, inputs.dy, u, v, *inputs.adapters)
        return [u, v, y, dx, *(t.nan_to_num() for t in (*da, *db))]

    torch.set_num_threads(1)
    first = run()
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        for got, want in zip(run(), first, strict=True):
            assert_same_bits(got, want, f"{threads} threads")


def test_one_adapter_is_the_layers_own(isa: str) -> None:
    """All rows on one slot: what nf4_linear's reference gives for its A and B."""
    inputs = make_inputs(Case((3,) * 20, k=128, ns=(96,)))
    y = torch.zeros(20, 96, dtype=bf16)
    u = op.segmented_lora(inputs.x, *inputs.adapters, y)
    first, rank = inputs.entries[3].tolist()
    lora_a, lora_b = inputs.a[0][first : first + rank], inputs.b[0][first : first + rank].T
    want, want_u = reference.nf4_linear(
        inputs.x, torch.zeros(96, 128), None, lora_a, lora_b, float(inputs.scaling[3])
    )
    torch.testing.assert_close(y.double(), want, rtol=0.03, atol=0.03)
    torch.testing.assert_close(u[:, :rank].double(), want_u, rtol=0.03, atol=0.03)


def test_leading_dimensions_and_strides() -> None:
    inputs = make_inputs(Case(ROUTINGS["shuffled"]))
    y, again = inputs.y.clone(), inputs.y.clone().reshape(7, 2, 33)
    u = op.segmented_lora(inputs.x, *inputs.adapters, y)
    transposed = [t.T.contiguous().T for t in inputs.a]
    u_again = op.segmented_lora(inputs.x.reshape(7, 2, 70), transposed, *inputs.adapters[1:], again)
    assert torch.equal(u, u_again)
    assert torch.equal(y, again.reshape(14, 33))


def test_y_is_known_to_have_changed() -> None:
    inputs = make_inputs(Case(ROUTINGS["shuffled"]))
    before = inputs.y._version
    op.segmented_lora(inputs.x, *inputs.adapters, inputs.y)
    assert inputs.y._version > before


def test_nothing_is_written_before_an_error() -> None:
    inputs = make_inputs(Case(ROUTINGS["shuffled"]))
    y, dx = inputs.y.clone(), inputs.dx.clone()
    inputs.entries[5, 0] = 10**6
    with pytest.raises(ValueError, match="expected entries inside a pool"):
        op.segmented_lora(inputs.x, *inputs.adapters, y)
    with pytest.raises(ValueError, match="expected entries inside a pool"):
        op.segmented_lora_grad_input(inputs.dy, *inputs.adapters, dx)
    assert_same_bits(y, inputs.y, "y")
    assert_same_bits(dx, inputs.dx, "dx")


def test_a_row_keeps_to_its_own_adapter(isa: str) -> None:
    """NaN in one adapter and in one row stay in its rows."""
    inputs = make_inputs(Case((0, 1, 0, 1) * 10, ranks=(16, 16)))
    clean = inputs.y.clone()
    op.segmented_lora(inputs.x, *inputs.adapters, clean)
    inputs.a[0][int(inputs.entries[1, 0])] = torch.inf
    inputs.b[0][int(inputs.entries[1, 0])] = torch.nan
    y = inputs.y.clone()
    op.segmented_lora(inputs.x, *inputs.adapters, y)
    assert torch.equal(y[0::2], clean[0::2])
    assert y[1::2].isnan().all()


assert set(RANKS) >= {1, 3, 8, 16, 17, 64}
