"""Many adapters in one batch on the emulated device: routing to the bit, products and gradients against
float64, what must not be touched, the same bits on every run, replays of launches on tables that changed in
place."""

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
    expected_pools,
    expected_shrink,
    normal,
    poisoned,
    route,
    some_slots,
)  # fmt: skip
from torch import Tensor

from fastlora import cuda_segmented as segmented

emulator = pytest.importorskip("fastlora._emulator", reason="this build holds no emulator")
from _launches import listed  # noqa: E402


@pytest.fixture(autouse=True)
def _usual_device():
    emulator.set_traits()
    yield
    emulator.set_traits()


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
