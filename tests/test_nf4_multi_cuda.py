"""Many adapters beside NF4 weights on the emulated device: every kernel that takes them, and the routes whose
result they are added to; the bits of a row whatever is beside it; the ops themselves."""

from __future__ import annotations

import devices
import pytest
import torch
from cuda_segmented_cases import (
    FLOATS,
    MIXED,
    SLOTS,
    Table,
    check,
    device,
    expected_expand,
    expected_shrink,
    normal,
    poisoned,
    route,
    some_slots,
)  # fmt: skip
from linear_cases import Weight, make_weight
from segmented_cases import ROUTINGS, Case, bounds, make_inputs
from tolerances import TOLERANCES, assert_within, linear_bound
from torch import Tensor

from fastlora import cuda_linear, reference
from fastlora import cuda_segmented as segmented

emulator = pytest.importorskip("fastlora._emulator", reason="this build holds no emulator")
from _launches import listed  # noqa: E402


@pytest.fixture(autouse=True)
def _usual_device():
    emulator.set_traits()
    yield
    emulator.set_traits()


ROUTES = {"decode": "decode", "tile": "tile", "dense": "dense", "auto": "auto"}


def run_multi(
    t: Table, weight: Weight, x: Tensor, bias: Tensor | None, slots: list[int], *, grad: bool,
    batch_invariant: bool = False, seed: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and u, or dx and v."""
    order, segments = route(slots, t.capacity)
    out = poisoned(len(slots), t.k if grad else t.n, dtype=x.dtype)
    inner = poisoned(len(slots), sum(t.widths), dtype=x.dtype)
    tables = (t.a, t.b, t.entries, t.scaling, order, segments, t.widths, batch_invariant, weight.offsets)
    if grad:
        status = segmented.multi_grad_input(
            device(seed), x, *weight.tensors, t.k, weight.blocksize, *tables, out, inner
        )
    else:
        status = segmented.multi_linear(
            device(seed), x, *weight.tensors, weight.blocksize, bias, *tables, out, inner
        )
    assert status == 0
    return out, inner


def check_multi(
    t: Table, slots: list[int], dtype: torch.dtype, blocksize: int = 64, *, batch_invariant: bool = False,
    grads: tuple[bool, ...] = (False, True),
) -> list[str]:  # fmt: skip
    """Returns the kernels that were launched."""
    m, kernels = len(slots), []
    order, _ = route(slots, t.capacity)
    weight = make_weight(t.n, t.k, blocksize)
    for grad in grads:
        x = normal(1, m, t.n if grad else t.k, dtype=dtype)
        bias = None if grad else normal(5, t.n, dtype=dtype)
        dense = weight.dense.T if grad else weight.dense
        base = x.double() @ dense.double().T + (0 if bias is None else bias.double())
        with listed(run=True) as launches:
            out, inner = run_multi(t, weight, x, bias, slots, grad=grad, batch_invariant=batch_invariant)
        kernels += [it.kernel for it in launches]
        want_inner = expected_shrink(t, x, slots, order, grad=grad)
        check("v" if grad else "u", inner, want_inner, dtype)
        want = expected_expand(t, base, want_inner, slots, order, dtype, grad=grad)
        want.bound += linear_bound(x, dense, None, None, 1.0, base, dtype)
        check("dx" if grad else "y", out, want, dtype)
    return kernels


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "slots",
    [[6], SLOTS["one_each"][:8], SLOTS["unsorted"], SLOTS["skewed"], SLOTS["none"], SLOTS["outside"]],
    ids=("one", "each", "unsorted", "skewed", "none", "outside"),
)  # fmt: skip
def test_adapters_beside_a_weight(name: str, dtype: torch.dtype, slots: list[int]) -> None:
    with cuda_linear.use_route(name):
        kernels = check_multi(Table(k=128, outs=(144,), ranks=MIXED, dtype=dtype), slots, dtype)
    fused = [it for it in kernels if it.startswith("nf4_multi")]
    if name in {"tile", "decode"}:
        assert len(fused) == 2
    if name == "decode" and len(slots) <= 8:
        assert fused[0].startswith("nf4_multi_decode")
    if name == "dense":
        assert not fused


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("k", "outs", "blocksize"),
    [
        (129, (67,), 64),
        (64, (40, 24, 8), 32),
        (128, (120, 72), 32),
        (256, (20, 108), 128),
        (75, (66, 67), 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("m", [5, 19, 70])
def test_slices_and_odd_sizes_beside_a_weight(
    k: int, outs: tuple[int, ...], blocksize: int, dtype: torch.dtype, m: int
) -> None:
    check_multi(Table(k, outs, ranks=(2, 0, 17, 5, 40)), some_slots(m, 5), dtype, blocksize)


def test_a_split_product_with_adapters_is_summed_in_the_end() -> None:
    emulator.set_traits(processors=40)
    t = Table(1024, (96,), ranks=(16, 3), dtype=torch.bfloat16)
    with cuda_linear.use_route("tile"):
        kernels = check_multi(t, [0, 1, -1, 1, 0, 0] * 4, torch.bfloat16, grads=(False,))
    assert kernels[-2:] == ["nf4_multi_tile<kBFloat16, 2, kSums>", "split_sum<kBFloat16, 4>"]


def test_warpgroups_take_the_product_and_the_term_is_added() -> None:
    emulator.set_traits(capability=90)
    t = Table(128, (128,), ranks=(16, 3), dtype=torch.bfloat16)
    with cuda_linear.use_route("warpgroup"):
        kernels = check_multi(t, [0, 1, -1, 1, 0, 0] * 4, torch.bfloat16, grads=(False,))
    names = [it.split("<")[0] for it in kernels]
    assert [it for it in names if it != "split_sum"] == [
        "nf4_linear_sm90", "segmented_shrink", "segmented_expand",
    ]  # fmt: skip


def test_no_rows_beside_a_weight() -> None:
    t = Table(64, (48,), ranks=(4, 2))
    weight = make_weight(48, 64)
    for grad in (False, True):
        x = torch.zeros(0, 48 if grad else 64, dtype=torch.bfloat16)
        out, inner = run_multi(t, weight, x, None, [], grad=grad)
        assert (out.shape, inner.shape) == ((0, 64 if grad else 48), (0, sum(t.widths)))


@pytest.mark.parametrize("blocksize", [32, 64])
@pytest.mark.parametrize(("k", "n"), [(128, 96), (75, 96)])
def test_batch_invariance_holds_to_the_bit(k: int, n: int, blocksize: int) -> None:
    """Whatever the route of a call like it, and whatever rows are beside it."""
    t = Table(k, (n,), ranks=MIXED)
    slots = some_slots(70, 9)
    weight = make_weight(n, k, blocksize)
    kernels = check_multi(t, slots, torch.bfloat16, blocksize, batch_invariant=True)
    assert not [it for it in kernels if it.startswith(("nf4_linear", "segmented_expand", "split_sum"))]
    for grad in (False, True):
        x = normal(1, 70, n if grad else k, dtype=torch.bfloat16)
        all_at_once, _ = run_multi(t, weight, x, None, slots, grad=grad, batch_invariant=True)
        for rows in ([3], [69, 5], list(range(20, 50))):
            few = [slots[i] for i in rows]
            got, _ = run_multi(t, weight, x[rows], None, few, grad=grad, batch_invariant=True)
            assert torch.equal(got, all_at_once[rows])


def test_batch_invariance_in_float32_is_refused() -> None:
    t = Table(64, (48,), ranks=(4, 2))
    with pytest.raises(
        TypeError, match=r"expected bfloat16 or float16 with batch_invariant on CUDA, got torch\.float32"
    ):
        run_multi(t, make_weight(48, 64), torch.zeros(1, 64), None, [0], grad=False, batch_invariant=True)


# --- the ops themselves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", devices.EMULATED)
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=lambda d: str(d)[6:])
def test_ops_on_a_device_match_the_reference(name: str, dtype: torch.dtype) -> None:
    """Past the dispatcher's checks, y in place; rows of the pools that no slot owns are NaN."""
    inputs = make_inputs(Case(ROUTINGS["zipf"], k=80, ns=(40, 24), dtype=dtype), weight=True)
    op, dense = torch.ops.fastlora, inputs.weight.dense
    y, dx = inputs.y.clone(), inputs.dx.clone()
    with devices.device(name):
        order, segments = op.lora_route(inputs.slots, len(inputs.case.ranks))
        u = op.segmented_lora(inputs.x, *inputs.adapters, y)
        v = op.segmented_lora_grad_input(inputs.dy, *inputs.adapters, dx)
        da, db = op.segmented_lora_grad_pools(inputs.x, inputs.dy, u, v, *inputs.adapters)
        multi_y, multi_u = op.nf4_multi_lora_linear(*inputs.linear())
        multi_dx, multi_v = op.nf4_multi_lora_grad_input(*inputs.grad_input())
    assert torch.equal(order, inputs.order)
    assert torch.equal(segments, inputs.segments)
    assert torch.equal(u, multi_u)
    assert torch.equal(v, multi_v)
    frobenius = TOLERANCES[dtype].frobenius
    want, want_u = reference.segmented_lora(inputs.x, *inputs.adapters, inputs.y)
    bound, u_bound = bounds(inputs, False, want)
    assert_within("u", u, want_u, u_bound, frobenius)
    assert_within("y", y, want, bound, frobenius)
    want, want_v = reference.segmented_lora_grad_input(inputs.dy, *inputs.adapters, inputs.dx)
    bound, v_bound = bounds(inputs, True, want)
    assert_within("v", v, want_v, v_bound, frobenius)
    assert_within("dx", dx, want, bound, frobenius)
    wants = reference.segmented_lora_grad_pools(inputs.x, inputs.dy, u, v, *inputs.adapters)
    for got, side in zip((*da, *db), (*wants[0], *wants[1]), strict=True):
        assert_within("a gradient", got, side, 2**-7 * side.abs() + 1e-4, TOLERANCES[got.dtype].frobenius)
    want, _ = reference.nf4_multi_lora_linear(inputs.x, dense, inputs.bias, *inputs.adapters)
    bound, _ = bounds(inputs, False, want)
    bound = bound + linear_bound(inputs.x, dense, None, None, 1.0, want, dtype)
    assert_within("y beside a weight", multi_y, want, bound, frobenius)
    want, _ = reference.nf4_multi_lora_grad_input(inputs.dy, dense, *inputs.adapters)
    bound, _ = bounds(inputs, True, want)
    bound = bound + linear_bound(inputs.dy, dense.T, None, None, 1.0, want, dtype)
    assert_within("dx beside a weight", multi_dx, want, bound, frobenius)
