"""Many adapters in one batch on the emulated device: routing to the bit, products and gradients against
float64, what must not be touched, the same bits on every run, replays of launches on tables that changed in
place."""

from __future__ import annotations

import devices
import pytest
import torch
from cuda_segmented_cases import (
    Result,
    Table,
    expected_expand,
    expected_pools,
    expected_shrink,
    route,
)
from linear_cases import Weight, make_weight
from segmented_cases import ROUTINGS, Case, bounds, make_inputs
from tolerances import TOLERANCES, assert_within, linear_bound
from torch import Tensor

from fastlora import cuda_linear, reference
from fastlora import cuda_segmented as segmented

emulator = pytest.importorskip("fastlora._emulator", reason="this build holds no emulator")
from _launches import listed  # noqa: E402

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MIXED = (1, 3, 8, 0, 16, 17, 64, 5, 16)


@pytest.fixture(autouse=True)
def _usual_device():
    emulator.set_traits()
    yield
    emulator.set_traits()


def device(seed: int = 1) -> devices.EmulatedDevice:
    return devices.EmulatedDevice(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """NaN everywhere: what is not written is seen."""
    return torch.full(shape, torch.nan, dtype=dtype)


def check(name: str, got: Tensor, result: Result, dtype: torch.dtype) -> None:
    error = (got.double() - result.want).abs()
    bound = result.bound + TOLERANCES[dtype].smallest
    outside = ~(error <= bound)
    if bool(outside.any()):
        where = tuple(outside.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(where)} is {got[where].item():.9g}, expected {result.want[where].item():.9g} "
            f"within {bound[where].item():.3g} ({int(outside.sum())} of {got.numel()} are outside)"
        )


# --- lora_route ---------------------------------------------------------------------------------------------


def routed(slots: Tensor, capacity: int, on: devices.EmulatedDevice | None = None) -> tuple[Tensor, Tensor]:
    order = torch.full((slots.numel(),), -7, dtype=torch.int32)
    segments = torch.full((min(slots.numel(), capacity) + 1, 2), -7, dtype=torch.int32)
    assert segmented.route(on or device(), slots, capacity, order, segments) == 0
    return order, segments


@pytest.mark.parametrize(
    ("m", "capacity", "low", "high"),
    [
        (0, 8, -1, 8), (1, 1, 0, 1), (64, 64, -1, 64), (64, 64, 0, 1), (33, 5, -1, 0), (100, 255, -1, 255),
        (100, 256, -1, 256), (300, 5000, -1, 5000), (300, 70000, -1, 70000), (9, 0, -1, 1), (700, 3, -1, 3),
        (50, 8, -40, 90), (2500, 40, -1, 40), (2500, 3000, -1, 3000), (1025, 7, 6, 7),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_are_sorted_stably_by_slot(
    m: int, capacity: int, low: int, high: int, dtype: torch.dtype
) -> None:
    slots = torch.randint(low, high, (m,), generator=torch.Generator().manual_seed(m + capacity)).to(dtype)
    order, segments = routed(slots, capacity)
    want_order, want_segments = route(slots.tolist(), capacity)
    assert torch.equal(order, want_order)
    assert torch.equal(segments, want_segments)


def test_slots_too_wide_for_32_bits_count_as_none() -> None:
    slots = torch.tensor([2**40, 1, -(2**33), 2**32 + 1, 1, 2**31])
    order, segments = routed(slots, 4)
    assert order.tolist() == [1, 4, 0, 2, 3, 5]
    assert segments.tolist() == [[1, 0], [-1, 2], [-1, 2], [-1, 2], [-1, 2]]


def test_a_routing_is_one_launch() -> None:
    with listed(run=True) as launches:
        routed(torch.arange(64), 64)
        routed(torch.arange(2000) % 50, 64)
    assert [it.kernel for it in launches] == ["lora_route", "lora_route"]
    assert [it.grid[0] for it in launches] == [1, 2]
    assert [it.cooperative for it in launches] == [False, True]


def test_debugging_names_a_slot_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_DEBUG", "1")
    with pytest.raises(ValueError, match=r"expected slots in -1 \.\. 3, got 4 at position 2 of 4"):
        routed(torch.tensor([0, -1, 4, 9]), 4)


# --- u and y, v and dx --------------------------------------------------------------------------------------


def run_forward(t: Table, x: Tensor, slots: list[int], y: Tensor, seed: int = 1, **kwargs: bool):
    order, segments = route(slots, t.capacity)
    u, out = poisoned(len(slots), sum(t.widths), dtype=x.dtype), y.clone()
    status = segmented.segmented_lora(
        device(seed), x, t.a, t.b, t.entries, t.scaling, order, segments, t.widths, out, u, **kwargs
    )
    assert status == 0
    return out, u


def run_backward(t: Table, dy: Tensor, slots: list[int], dx: Tensor, seed: int = 1):
    order, segments = route(slots, t.capacity)
    v, out = poisoned(len(slots), sum(t.widths), dtype=dy.dtype), dx.clone()
    status = segmented.segmented_lora_grad_input(
        device(seed), dy, t.a, t.b, t.entries, t.scaling, order, segments, t.widths, out, v
    )
    assert status == 0
    return out, v


def check_products(t: Table, slots: list[int], dtype: torch.dtype) -> None:
    m = len(slots)
    order, _ = route(slots, t.capacity)
    for grad in (False, True):
        x = normal(1, m, t.n if grad else t.k, dtype=dtype)
        y = normal(2, m, t.k if grad else t.n, dtype=dtype)
        out, u = (run_backward if grad else run_forward)(t, x, slots, y)
        want_u = expected_shrink(t, x, slots, order, grad=grad)
        check("v" if grad else "u", u, want_u, dtype)
        assert bool((u[want_u.bound == 0] == 0).all())  # zeros past the ranks, and where there is no adapter
        check(
            "dx" if grad else "y", out, expected_expand(t, y, want_u, slots, order, dtype, grad=grad), dtype
        )
        for i, slot in enumerate(slots):
            if not 0 <= slot < t.capacity or not int(t.entries[:, slot, 1].sum()):
                assert torch.equal(out[i].view(torch.uint8), y[i].view(torch.uint8)), f"row {i} was touched"


def some_slots(m: int, capacity: int, seed: int = 0, low: int = -1) -> list[int]:
    return torch.randint(low, capacity, (m,), generator=torch.Generator().manual_seed(seed)).tolist()


SLOTS = {
    "empty": [],
    "none": [-1] * 20,
    "one_each": [4, 0, 8, 2, 6, 1, 7, 5, 3],
    "one_row": [6],
    "skewed": [6] * 40 + [0] + [-1] + [2] * 2 + [6] * 9,
    "unsorted": some_slots(45, 9),
    "outside": [99, 6, -5, 9, 1, 2**20, 6],
}


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
def test_products_of_mixed_ranks(dtype: torch.dtype, slots: list[int]) -> None:
    check_products(Table(k=136, outs=(72,), ranks=MIXED), slots, dtype)


@pytest.mark.parametrize("pools", FLOATS, ids=lambda d: "pools_" + str(d)[6:])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("k", "outs"), [(129, (67,)), (76, (40, 24, 8)), (64, (1, 33)), (1, (5,)), (200, (136, 64))], ids=str
)
def test_products_of_odd_sizes_and_slices(
    k: int, outs: tuple[int, ...], dtype: torch.dtype, pools: torch.dtype
) -> None:
    check_products(Table(k, outs, ranks=(2, 0, 17, 5, 1), dtype=pools), some_slots(19, 5), dtype)


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64, 128])
def test_one_adapter_of_any_rank(rank: int) -> None:
    check_products(Table(72, (80,), ranks=(rank,)), some_slots(12, 1), torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=lambda d: str(d)[6:])
def test_many_rows_take_wide_tiles(dtype: torch.dtype) -> None:
    slots = [0] * 200 + [3] * 40 + [2] * 300 + [1] + [-1] * 9
    check_products(Table(64, (64,), ranks=(16, 4, 20, 33), dtype=torch.bfloat16), slots, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_a_long_contraction_of_few_rows_is_split(dtype: torch.dtype) -> None:
    emulator.set_traits(processors=16)
    t = Table(1100, (1088,), ranks=(16, 3), dtype=torch.bfloat16)
    with listed(run=True) as launches:
        check_products(t, [0, -1, 1, 1], dtype)
    sums = [it.kernel for it in launches if it.kernel == "lora_sum"]
    assert len(sums) == 2
    shrinks = [it for it in launches if it.kernel.startswith("segmented_shrink")]
    assert all(it.grid[2] == 2 for it in shrinks)


def test_entries_that_leave_their_pool_make_no_work() -> None:
    t = Table(72, (40, 24), ranks=(4, 4, 4, 4, 4))
    rows = t.a[0].shape[0]
    for slot, entry in enumerate(((-1, 4), (rows - 3, 4), (2**31 - 1, 2**31 - 1), (0, -5))):
        t.entries[0, slot] = torch.tensor(entry)
    slots = [0, 1, 2, 3, 4, 0, -1]
    order, _ = route(slots, t.capacity)
    x, y = normal(1, 7, 72, dtype=torch.bfloat16), normal(2, 7, 64, dtype=torch.bfloat16)
    out, u = run_forward(t, x, slots, y)
    want = expected_shrink(t, x, slots, order, grad=False)
    check("u", u, want, x.dtype)
    check("y", out, expected_expand(t, y, want, slots, order, x.dtype, grad=False), x.dtype)
    assert torch.equal(out[:4, :40], y[:4, :40])


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=lambda d: str(d)[6:])
def test_a_spoilt_routing_stays_within_the_tensors(dtype: torch.dtype) -> None:
    """The emulated device knows every tensor's bounds: nothing outside is read or written."""
    t = Table(72, (40,), ranks=(4, 20, 4))
    m = 12
    x, y = normal(1, m, 72, dtype=dtype), normal(2, m, 40, dtype=dtype)
    u = poisoned(m, sum(t.widths), dtype=dtype)
    orders = (torch.full((m,), m), torch.full((m,), -1), torch.arange(m) * 2**27, torch.arange(m))
    lists = (
        [[0, 0], [1, 4], [2, 8], [-1, 12]], [[7, 0], [-9, 4], [2, 2**30], [-1, 12]],
        [[0, -8], [1, 500], [2, 8], [3, 1]], [[0, 0], [1, 1], [2, 2], [0, 3]],
    )  # fmt: skip
    for order in orders:
        for segments in lists:
            tables = (t.a, t.b, t.entries, t.scaling, order.int(), torch.tensor(segments, dtype=torch.int32))
            assert segmented.segmented_lora(device(), x, *tables, t.widths, y.clone(), u) == 0
            if len({slot for slot, _ in segments}) < len(segments):
                continue  # two blocks would write one gradient
            da, db = [torch.empty_like(p) for p in t.a], [torch.empty_like(p) for p in t.b]
            grads = segmented.segmented_lora_grad_pools(device(), x, y, u, u, *tables, t.widths, da, db)
            assert grads == 0


def test_the_same_bits_on_every_run_and_in_any_order_of_threads() -> None:
    t = Table(136, (72,), ranks=MIXED)
    slots = some_slots(45, 9)
    x, y = normal(1, 45, 136, dtype=torch.bfloat16), normal(2, 45, 72, dtype=torch.bfloat16)
    first = run_forward(t, x, slots, y)
    for seed in (200, 3000):
        again = run_forward(t, x, slots, y, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_row_has_the_bits_that_it_has_alone() -> None:
    t = Table(136, (72,), ranks=MIXED)
    slots = some_slots(45, 9) + [6] * 560  # tiles of 32 rows, where one row takes a tile of 8
    m = len(slots)
    x, y = normal(1, m, 136, dtype=torch.bfloat16), normal(2, m, 72, dtype=torch.bfloat16)
    out, _ = run_forward(t, x, slots, y, batch_invariant=True)
    for i in (0, 3, 11, 44, 600):
        alone, _ = run_forward(t, x[i : i + 1], slots[i : i + 1], y[i : i + 1], batch_invariant=True)
        assert torch.equal(alone[0], out[i])


# --- gradients of the pools ---------------------------------------------------------------------------------


def run_pools(t: Table, x: Tensor, dy: Tensor, u: Tensor, v: Tensor, slots: list[int], seed: int = 1):
    order, segments = route(slots, t.capacity)
    da = [poisoned(*p.shape, dtype=p.dtype) for p in t.a]
    db = [poisoned(*p.shape, dtype=p.dtype) for p in t.b]
    status = segmented.segmented_lora_grad_pools(
        device(seed), x, dy, u, v, t.a, t.b, t.entries, t.scaling, order, segments, t.widths, da, db
    )
    assert status == 0
    return da, db


def check_pools(t: Table, slots: list[int], dtype: torch.dtype) -> None:
    m = len(slots)
    order, _ = route(slots, t.capacity)
    x, dy = normal(1, m, t.k, dtype=dtype), normal(2, m, t.n, dtype=dtype)
    # NaN past the ranks, and for rows without an adapter: they belong to nobody.
    u, v = (poisoned(m, sum(t.widths), dtype=dtype) for _ in range(2))
    for position, row in enumerate(order.tolist()):
        slot = slots[row]
        for j in range(len(t.outs)):
            if 0 <= slot < t.capacity:
                columns = t.rank_columns(j, slot)
                count = columns.stop - columns.start
                u[position, columns] = normal(3 + position, count, dtype=dtype)
                v[position, columns] = normal(4000 + position, count, dtype=dtype)
    got = run_pools(t, x, dy, u, v, slots)
    for name, pools, wants in zip(
        ("da", "db"), got, expected_pools(t, x, dy, u, v, slots, order), strict=True
    ):
        for j, (pool, want) in enumerate(zip(pools, wants, strict=True)):
            check(f"{name}[{j}]", pool, want, pool.dtype)
            assert bool((pool[want.bound == 0] == 0).all())  # where nothing was routed to
    again = run_pools(t, x, dy, u, v, slots, seed=77)
    for before, after in zip(got, again, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
def test_gradients_of_mixed_ranks(dtype: torch.dtype, slots: list[int]) -> None:
    check_pools(Table(k=136, outs=(72,), ranks=MIXED), slots, dtype)


@pytest.mark.parametrize("pools", FLOATS, ids=lambda d: "pools_" + str(d)[6:])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("k", "outs"), [(129, (67,)), (76, (40, 24, 8)), (200, (136, 64))], ids=str)
def test_gradients_of_odd_sizes_and_slices(
    k: int, outs: tuple[int, ...], dtype: torch.dtype, pools: torch.dtype
) -> None:
    check_pools(Table(k, outs, ranks=(2, 0, 17, 5, 1), dtype=pools), some_slots(19, 5), dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("k", [64, 65])
def test_gradients_of_long_segments_are_sums_of_parts(dtype: torch.dtype, k: int) -> None:
    emulator.set_traits(processors=8)
    slots = [1] * 300 + [0] * 250 + [2] * 700 + [-1] * 30 + [3]
    with listed(run=True) as launches:
        check_pools(Table(k, (24,), ranks=(5, 16, 3, 9)), slots, dtype)
    assert [it.kernel.split("<")[0] for it in launches[:3]] == [
        "segmented_zero",
        "segmented_gradients" + ("_float" if dtype is torch.float32 else ""),
        "segmented_sum",
    ]


# --- a graph, without a device ------------------------------------------------------------------------------


def test_a_replay_follows_slots_entries_scales_and_pools() -> None:
    """The same launches over memory that was rewritten in place, as a captured graph has them."""
    t = Table(72, (40, 24), ranks=(4, 17, 3, 8))
    m = 20
    x, y = normal(1, m, 72, dtype=torch.bfloat16), normal(2, m, 64, dtype=torch.bfloat16)
    slots = torch.tensor(some_slots(m, 4, seed=1))
    order, segments = torch.empty(m, dtype=torch.int32), torch.empty(5, 2, dtype=torch.int32)
    u, out = poisoned(m, sum(t.widths), dtype=x.dtype), y.clone()
    calls: list[tuple] = []

    class Recorder(devices.EmulatedDevice):
        def call(self, *args):
            calls.append(args)
            return super().call(*args)

    recorder = Recorder(1)
    segmented.route(recorder, slots, 4, order, segments)
    tables = (t.a, t.b, t.entries, t.scaling, order, segments)
    segmented.segmented_lora(recorder, x, *tables, t.widths, out, u)
    other = Table(72, (40, 24), ranks=(3, 8, 4, 17), seed=5)
    assert [p.shape for p in t.a] == [p.shape for p in other.a]
    new_slots = some_slots(m, 4, seed=2)
    slots.copy_(torch.tensor(new_slots))
    for mine, its in zip((*t.a, *t.b), (*other.a, *other.b), strict=True):
        mine.copy_(its)
    t.entries.copy_(other.entries)
    t.scaling.copy_(other.scaling)
    out.copy_(y)
    for call in calls:
        devices.EmulatedDevice(9).call(*call)
    want_order, want_segments = route(new_slots, 4)
    assert torch.equal(order, want_order)
    assert torch.equal(segments, want_segments)
    want, want_u = run_forward(t, x, new_slots, y)
    assert torch.equal(out, want)
    assert torch.equal(u, want_u)


# --- beside NF4 weights -------------------------------------------------------------------------------------

ROUTES = {"decode": "decode", "tile": "tile", "dense": "dense", "auto": "auto"}


def run_multi(
    t: Table, weight: Weight, x: Tensor, bias: Tensor | None, slots: list[int], *, grad: bool,
    batch_invariant: bool = False, seed: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and u, or dx and v."""
    order, segments = route(slots, t.capacity)
    out = poisoned(len(slots), t.k if grad else t.n, dtype=x.dtype)
    inner = poisoned(len(slots), sum(t.widths), dtype=x.dtype)
    tables = (t.a, t.b, t.entries, t.scaling, order, segments, t.widths, batch_invariant)
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


def test_more_adapters_than_blocks() -> None:
    """Blocks are fewer than tiles where few of the slots are expected to have rows."""
    ranks = tuple(1 + slot % 2 for slot in range(1200))
    t = Table(8, (16,), ranks=ranks, dtype=torch.bfloat16)
    slots = [(i * 7) % 1200 for i in range(1200)] + [-1] * 3 + [5] * 40
    for dtype in FLOATS[:2]:
        with listed(run=True) as launches:
            check_products(t, slots, dtype)
        assert max(it.grid[0] for it in launches) < 1200
    check_pools(t, slots, torch.bfloat16)


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
