"""fastlora.AdapterTable, route, segmented_lora and nf4_multi_lora_linear: storage, values, gradients,
errors."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import AdapterTable
from fastlora.rank_rows import RankRows

K, N = 72, 40
RANKS = {"a": 3, "b": 8, "c": 1, "d": 17, "idle": 5}
ROWS = ["b", None, "a", "d", "a", "c", None, "b", "d", "d", "a"]
# A gradient passes through one rounding more than an output does, v's.
GRADIENT = {dtype: 2 * t.frobenius for dtype, t in TOLERANCES.items()}
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def draw(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def make_table(ranks=RANKS, *, k=K, n=N, learns=True, **kwargs):
    """A table of adapters that do something, each with a scaling of its own."""
    table = AdapterTable(k, n, **kwargs)
    slices = (n,) if isinstance(n, int) else n
    for i, (name, rank) in enumerate(ranks.items()):
        each = rank if isinstance(rank, tuple) else (rank,) * len(slices)
        a = [draw(r, k, seed=10 * i + j, scale=k**-0.5) if r else None for j, r in enumerate(each)]
        b = [
            draw(m, r, seed=99 + 10 * i + j, scale=0.3) if r else None
            for j, (r, m) in enumerate(zip(each, slices, strict=True))
        ]
        table.register(name, a, b, [0.5 + 0.25 * i + j for j in range(len(slices))])
        for p in parameters(table, name):
            p.requires_grad_(learns)
    return table


def parameters(table, *names):
    return [p for name in names or table.names for pair in table.parameters(name) if pair for p in pair]


def exact(x, table, rows):
    """The low-rank term in float64, row by row, and the float64 leaves that it is a function of."""
    leaves = {
        name: [
            pair and tuple(p.detach().double().requires_grad_() for p in pair)
            for pair in table.parameters(name)
        ]
        for name in table.names
    }
    out = []
    for xi, name in zip(x.reshape(-1, x.shape[-1]), rows, strict=True):
        pieces = []
        for j, n in enumerate(table.slices):
            pair = None if name is None else leaves[name][j]
            piece = (
                xi.new_zeros(n) if pair is None else table.scaling_of(name)[j] * (pair[1] @ (pair[0] @ xi))
            )
            pieces.append(piece)
        out.append(torch.cat(pieces))
    flat = [p for name in table.names for pair in leaves[name] if pair for p in pair]
    return torch.stack(out).reshape(*x.shape[:-1], -1), flat


def is_view_of(p, pool):
    begin, end = pool.data_ptr(), pool.data_ptr() + pool.nbytes
    return p.numel() == 0 or begin <= p.data_ptr() < end


# --- storage --------------------------------------------------------------------------------------------


def test_parameters_are_rows_of_the_pools():
    table = make_table()
    assert table.names == tuple(RANKS)
    assert table.ranks == {name: (rank,) for name, rank in RANKS.items()}
    entries = table.entries[0].tolist()
    for slot, (name, rank) in enumerate(RANKS.items()):
        ((a, b),) = table.parameters(name)
        first, found = entries[slot]
        assert (table.slot(name), found) == (slot, rank)
        assert (a.shape, b.shape) == ((rank, K), (N, rank))
        assert (a.stride(), b.stride()) == ((K, 1), (1, N))
        assert torch.equal(table.a[0][first : first + rank], a)
        assert torch.equal(table.b[0][first : first + rank], b.t())
        with torch.no_grad():
            a[0, 0], b[1, -1] = 7.0, 8.0
        assert table.a[0][first, 0] == 7
        assert table.b[0][first + rank - 1, 1] == 8
    assert table.slots(ROWS).tolist() == [-1 if n is None else table.slot(n) for n in ROWS]
    assert table.slots([]).dtype == torch.int32
    assert "a" in table
    assert "AdapterTable(72 -> 40, 5 of 8 slots" in repr(table)


def test_a_growing_table_keeps_parameters_slots_and_values():
    table = AdapterTable(K, N, capacity=1, rank_rows=2)
    held, values = {}, {}
    for i in range(9):
        name, rank = f"{i}", 1 + i % 4
        table.register(name, draw(rank, K, seed=i), draw(N, rank, seed=50 + i), i + 1.0)
        held[name] = parameters(table, name)
        values[name] = [p.clone() for p in held[name]]
    assert table.capacity >= 9
    for i, name in enumerate(table.names):
        assert table.slot(name) == i
        assert table.scaling[0, i] == i + 1
        for before, p, want, pool in zip(
            held[name], parameters(table, name), values[name], (table.a, table.b), strict=True
        ):
            assert p is before
            assert torch.equal(p, want)
            assert is_view_of(p, pool[0])
    x = draw(9, K)
    y = fastlora.segmented_lora(x, table, table.slots(table.names), torch.zeros(9, N))
    assert relative_error(y, exact(x.double(), table, table.names)[0]) < 1e-5


def test_an_optimiser_goes_on_over_growth():
    """Its state is by Parameter, which stays the object that it was."""

    def run(grow):
        table = make_table({"a": 4}, rank_rows=4)
        optimizer = torch.optim.AdamW(parameters(table, "a"), lr=0.05, fused=True)
        for step in range(4):
            if grow and step == 2:
                table.register("more", draw(9, K), draw(N, 9))
            y = fastlora.segmented_lora(
                draw(3, K), table, torch.zeros(3, dtype=torch.int32), torch.zeros(3, N)
            )
            optimizer.zero_grad()
            (y - 1).square().sum().backward()
            optimizer.step()
        return [p.detach().clone() for p in parameters(table, "a")]

    for p, q in zip(run(False), run(True), strict=True):
        assert torch.equal(p, q)


def test_a_given_parameter_becomes_the_rows():
    a, b = nn.Parameter(draw(3, K)), nn.Parameter(draw(N, 3))
    wanted = a.detach().clone(), b.detach().clone()
    table = AdapterTable(K, N)
    table.register("x", a, b)
    assert all(p is q for p, q in zip(parameters(table), (a, b), strict=True))
    assert torch.equal(a, wanted[0])
    assert torch.equal(b, wanted[1])
    assert is_view_of(a, table.a[0])
    assert a.requires_grad
    plain = draw(3, K)
    table.register("y", plain, draw(N, 3))
    assert not parameters(table, "y")[0].requires_grad
    assert not is_view_of(plain, table.a[0])


def test_evicted_rows_are_taken_again_first_fit():
    table = make_table({"a": 4, "b": 6, "c": 2}, rank_rows=12, fixed=True)
    first = {name: table.entries[0, table.slot(name), 0].item() for name in "abc"}
    kept = parameters(table, "b")
    values = [p.clone() for p in kept]
    table.evict("b")
    assert table.names == ("a", "c")
    assert table.entries[0, 1].tolist() == [0, 0]
    table.register("d", draw(5, K), draw(N, 5))
    table.register("e", draw(1, K), draw(N, 1))
    assert (table.slot("d"), table.slot("e")) == (1, 3)
    assert table.entries[0, 1].tolist() == [first["b"], 5]
    assert table.entries[0, 3].tolist() == [first["b"] + 5, 1]
    assert all(torch.equal(p, v) for p, v in zip(kept, values, strict=True))
    assert not is_view_of(kept[0], table.a[0])


def test_replacing_keeps_the_addresses_where_the_rank_fits():
    table = make_table({"a": 4, "b": 6})
    pools = table.a[0].data_ptr(), table.b[0].data_ptr(), table.entries.data_ptr(), table.scaling.data_ptr()
    first = table.entries[0, 0, 0].item()
    for rank in (4, 2, 4):
        held = parameters(table, "a")
        a, b = draw(rank, K, seed=rank), draw(N, rank, seed=1)
        table.replace("a", a, b, 3.0)
        assert table.entries[0, 0].tolist() == [first, rank]
        assert table.scaling[0, 0] == 3.0
        assert all(p is q for p, q in zip(held, parameters(table, "a"), strict=True))
        assert torch.equal(parameters(table, "a")[0], a)
        assert torch.equal(parameters(table, "a")[1], b)
    table.replace("a", draw(20, K), draw(N, 20))
    assert table.ranks["a"] == (20,)
    assert table.scaling[0, 0] == 3.0
    assert table.widths[0] >= 20
    assert table.a[0].data_ptr() == pools[0]  # 128 rows have room for it, elsewhere
    own = parameters(table, "a")
    table.replace("a", own[0][5:9], own[1][:, 5:9])  # of its own rows, which it overwrites
    assert torch.equal(parameters(table, "a")[0], draw(20, K)[5:9])
    assert (table.b[0].data_ptr(), table.entries.data_ptr(), table.scaling.data_ptr()) == pools[1:]


def test_a_fixed_table_refuses_what_does_not_fit_and_changes_nothing():
    table = make_table({"a": 4, "b": 4}, capacity=3, rank_rows=10, max_rank=8, fixed=True)
    before = [t.clone() for t in (table.a[0], table.b[0], table.entries, table.scaling)]
    with pytest.raises(
        ValueError, match=r"register: expected ranks of at most \[8\] in a fixed table, got \[9\]"
    ):
        table.register("c", draw(9, K), draw(N, 9))
    message = r"expected a gap of {} rows in a fixed table, got {} free of 10, {} of them together"
    with pytest.raises(ValueError, match="register: " + message.format(3, 2, 2)):
        table.register("c", draw(3, K), draw(N, 3))
    with pytest.raises(ValueError, match="replace: " + message.format(8, 6, 4)):
        table.replace("a", draw(8, K), draw(N, 8))
    for now, then in zip((table.a[0], table.b[0], table.entries, table.scaling), before, strict=True):
        assert torch.equal(now, then)
    table.register("c", draw(2, K), draw(N, 2))
    with pytest.raises(ValueError, match="register: expected a free slot in a fixed table, got 3 taken"):
        table.register("d", draw(1, K), draw(N, 1))
    assert table.widths == [8]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=40), st.randoms(use_true_random=False))
def test_runs_of_rows_never_overlap(sizes, random):
    rows, taken = RankRows(24), []
    for size in sizes:
        if taken and random.random() < 0.4:
            rows.give(*taken.pop(random.randrange(len(taken))))
        first = rows.take(size)
        if first is None:
            assert size > rows.largest_gap
            rows.grow(rows.size + size)
            first = rows.take(size)
        taken.append((first, size))
        used = [row for first, size in taken for row in range(first, first + size)]
        assert len(used) == len(set(used))
        assert all(0 <= row < rows.size for row in used)
        assert rows.free == rows.size - len(used)
    for run in taken:
        rows.give(*run)
    assert rows.largest_gap == rows.size


def test_copies_and_files_are_small_and_their_own():
    table = make_table(rank_rows=4096)
    x, slots = draw(len(ROWS), K), table.slots(ROWS)
    want = fastlora.segmented_lora(x, table, slots, torch.zeros(len(ROWS), N)).detach()
    file = io.BytesIO()
    torch.save(table, file)
    assert file.tell() < 100_000  # the pools are 1.8 MB
    file.seek(0)
    for other in (
        copy.deepcopy(table),
        pickle.loads(pickle.dumps(table)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(fastlora.segmented_lora(x, other, slots, torch.zeros(len(ROWS), N)), want)
        assert is_view_of(parameters(other, "d")[1], other.b[0])
        assert parameters(other)[0].requires_grad
        with torch.no_grad():
            parameters(other, "a")[0].zero_()
    assert torch.equal(fastlora.segmented_lora(x, table, slots, torch.zeros(len(ROWS), N)), want)


@dtypes
def test_casts_and_moves(dtype):
    table = make_table({"a": 3, "b": 2})
    held = parameters(table)
    want = [p.detach().to(dtype) for p in held]
    assert table.to(dtype=dtype) is table
    assert (table.a[0].dtype, table.dtype) == (dtype, dtype)
    for p, before, value in zip(parameters(table), held, want, strict=True):
        assert p is before
        assert torch.equal(p, value)
    meta = copy.deepcopy(table).to("meta")
    assert all(p.is_meta and p.requires_grad for p in parameters(meta))
    y = fastlora.segmented_lora(
        torch.empty(4, K, device="meta"), meta, torch.empty(4, dtype=torch.int32, device="meta"),
        torch.empty(4, N, device="meta"),
    )  # fmt: skip
    assert y.is_meta


# --- values and gradients -------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("table_dtype", TOLERANCES, ids=str)
def test_the_term_and_its_gradients_are_those_of_a_loop(layer_device, dtype, table_dtype):
    table = make_table(dtype=table_dtype)
    x = draw(len(ROWS), K, seed=3, dtype=dtype).requires_grad_()
    base = draw(len(ROWS), N, seed=4, dtype=dtype)
    dy = draw(len(ROWS), N, seed=5, dtype=dtype)
    y = fastlora.segmented_lora(x, table, table.slots(ROWS), base.clone())
    got = torch.autograd.grad(y, (x, *parameters(table)), dy)

    x64 = x.detach().double().requires_grad_()
    term, leaves = exact(x64, table, ROWS)
    want = torch.autograd.grad(term, (x64, *leaves), dy.double(), materialize_grads=True)
    assert relative_error(y, base.double() + term) < TOLERANCES[dtype].frobenius
    idle = [i for i, name in enumerate(ROWS) if name is None]
    assert torch.equal(y[idle], base[idle])
    # Where the pools are narrower than x, their own gradients are rounded to them.
    bound = max(GRADIENT[dtype], GRADIENT[table_dtype])
    for g, w, p in zip(got, want, (x, *parameters(table)), strict=True):
        assert (g.shape, g.dtype, g.stride()) == (p.shape, p.dtype, p.stride())
        assert relative_error(g, w) < bound
    assert all(not g.any() for g in got[-2:])  # "idle" has no rows: zeros, not None


@pytest.mark.parametrize("place", ["whole", "a view"])
def test_the_gradient_of_what_the_term_is_added_to(layer_device, place):
    table = make_table()
    x, start = (draw(len(ROWS), size, seed=3).requires_grad_() for size in (K, N))
    dy = draw(len(ROWS), N, seed=5)
    y = 2 * start if place == "whole" else torch.stack([start, 2 * start])[1]
    added = fastlora.segmented_lora(x, table, table.slots(ROWS), y)
    assert added.data_ptr() == y.data_ptr()
    wanted = (start, x, *parameters(table))
    got = torch.autograd.grad(added * added, wanted, dy)

    start64, x64 = (t.detach().double().requires_grad_() for t in (start, x))
    term, leaves = exact(x64, table, ROWS)
    want = torch.autograd.grad(
        (2 * start64 + term) ** 2, (start64, x64, *leaves), dy.double(), materialize_grads=True
    )
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < GRADIENT[torch.float32]


def test_a_leaf_that_learns_is_not_written_to():
    table = make_table()
    y = torch.zeros(len(ROWS), N, requires_grad=True)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        fastlora.segmented_lora(draw(len(ROWS), K, seed=3), table, table.slots(ROWS), y)
    assert not y.any()


@dtypes
@pytest.mark.parametrize("lead", [(11,), (1, 11), (0,), (1,)], ids=str)
def test_the_layer_and_its_gradients_are_those_of_a_loop(layer_device, dtype, lead):
    rows = ROWS[: torch.Size(lead).numel()]
    table, weight = make_table(), fastlora.quantize_nf4(draw(N, K, seed=1, scale=0.1))
    x = draw(*lead, K, seed=3, dtype=dtype).requires_grad_()
    bias = draw(N, seed=4, dtype=dtype).requires_grad_()
    dy = draw(*lead, N, seed=5, dtype=dtype)
    y = fastlora.nf4_multi_lora_linear(x, weight, table, table.slots(rows), bias)
    got = torch.autograd.grad(y, (x, bias, *parameters(table)), dy)
    if not rows:
        assert [g.shape for g in got] == [t.shape for t in (x, bias, *parameters(table))]
        assert not any(g.any() for g in got)
        return
    x64, bias64 = (t.detach().double().requires_grad_() for t in (x, bias))
    term, leaves = exact(x64, table, rows)
    whole = x64 @ weight.dequantize(torch.float32).double().t() + bias64 + term
    want = torch.autograd.grad(whole, (x64, bias64, *leaves), dy.double(), materialize_grads=True)
    assert (y.dtype, y.shape) == (dtype, (*lead, N))
    assert relative_error(y, whole) < TOLERANCES[dtype].frobenius
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < GRADIENT[dtype]


def test_slices_of_a_packed_layer(layer_device):
    """q, k and v of unequal widths; one adapter is in q and v alone, one has another rank in each."""
    ranks = {"qv": (4, 0, 2), "all": (1, 5, 9), "k": (0, 3, 0)}
    table = make_table(ranks, n=(32, 8, 8))
    rows = ["all", "qv", None, "k", "all", "qv"]
    x = draw(len(rows), K, seed=3).requires_grad_()
    y = fastlora.segmented_lora(x, table, table.slots(rows), torch.zeros(len(rows), 48))
    x64 = x.detach().double().requires_grad_()
    term, leaves = exact(x64, table, rows)
    assert relative_error(y, term) < 1e-5
    assert not y[3, :32].any()
    dy = draw(len(rows), 48, seed=5)
    got = torch.autograd.grad(y, (x, *parameters(table)), dy)
    for g, w in zip(got, torch.autograd.grad(term, (x64, *leaves), dy.double()), strict=True):
        assert relative_error(g, w) < 1e-5
    assert table.parameters("k")[0] is None
    table.replace("k", [None, draw(1, K), draw(2, K)], [None, draw(8, 1), draw(8, 2)])
    assert table.ranks["k"] == (0, 1, 2)
    assert relative_error(
        fastlora.segmented_lora(x.detach(), table, table.slots(rows), torch.zeros(len(rows), 48)),
        exact(x.detach().double(), table, rows)[0],
    ) < 1e-5  # fmt: skip


def test_slots_may_be_a_list_a_tensor_or_a_routing():
    table, weight = make_table(learns=False), fastlora.quantize_nf4(draw(N, K))
    x, slots = draw(len(ROWS), K), table.slots(ROWS)
    routing = fastlora.route(slots, table.capacity)
    assert routing.order.tolist() == sorted(range(len(ROWS)), key=lambda i: slots[i] if slots[i] >= 0 else 99)
    forms = (slots, slots.long(), slots.tolist(), routing)
    results = [fastlora.nf4_multi_lora_linear(x, weight, table, form) for form in forms]
    assert all(torch.equal(r, results[0]) for r in results[1:])
    assert not results[0].requires_grad


def test_only_the_gradients_asked_for():
    x, rows = draw(len(ROWS), K, seed=3), ROWS
    full = make_table()
    weight = fastlora.quantize_nf4(draw(N, K, scale=0.1))

    def grads(table, x):
        fastlora.nf4_multi_lora_linear(x, weight, table, table.slots(rows)).square().sum().backward()
        return [p.grad for p in parameters(table)]

    want = grads(full, x)
    for learning in itertools.chain.from_iterable(itertools.combinations("abd", n) for n in (1, 2)):
        table = make_table(learns=False)
        for p in parameters(table, *learning):
            p.requires_grad_()
        got = grads(table, x)
        for p, g, w in zip(parameters(table), got, want, strict=True):
            assert (g is not None) == p.requires_grad
            assert g is None or relative_error(g, w) < 1e-5
            # A few rows do not keep the whole pool's gradient in memory.
            assert g is None or g.untyped_storage().nbytes() <= max(g.nbytes, table.a[0].nbytes)
    one = make_table({"a": 2, "b": 40}, learns=False)
    parameters(one, "a")[0].requires_grad_()
    fastlora.segmented_lora(x[:1], one, [0], torch.zeros(1, N)).sum().backward()
    grad = parameters(one, "a")[0].grad
    assert grad.untyped_storage().nbytes() == grad.nbytes


def test_gradients_accumulate_and_steps_are_what_the_kernel_reads():
    table = make_table({"a": 3, "b": 5})
    optimizer = torch.optim.SGD(parameters(table), lr=0.1)
    x = draw(4, K)
    for rows in (["a", "b", "b", None], ["b", "b", "a", "a"]):
        fastlora.segmented_lora(x, table, table.slots(rows), torch.zeros(4, N)).square().sum().backward()
    want = []
    for rows in (["a", "b", "b", None], ["b", "b", "a", "a"]):
        term, leaves = exact(x.double(), table, rows)
        want.append(torch.autograd.grad(term.square().sum(), leaves))
    for p, first, second in zip(parameters(table), *want, strict=True):
        assert relative_error(p.grad, first + second) < 1e-5
    before = table.a[0].clone()
    optimizer.step()
    assert not torch.equal(before, table.a[0])
    assert relative_error(
        fastlora.segmented_lora(x, table, [0, 1, 1, 0], torch.zeros(4, N)).detach(),
        exact(x.double(), table, ["a", "b", "b", "a"])[0],
    ) < 1e-5  # fmt: skip


def test_a_graph_notices_what_its_adapters_have_become():
    x = draw(2, K)

    def loss(table):
        return fastlora.segmented_lora(x, table, [0, 1], torch.zeros(2, N)).square().sum()

    for change in (
        lambda table: table.replace("a", draw(3, K), draw(N, 3)),
        lambda table: table.evict("a"),
        lambda table: table.set_scaling("a", 9.0),
        lambda table: parameters(table, "b")[0].detach().add_(1.0),
    ):
        table = make_table({"a": 3, "b": 5})
        value = loss(table)
        change(table)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


def test_growth_between_forward_and_backward_is_harmless():
    table, again = make_table({"a": 3}, rank_rows=3), make_table({"a": 3}, rank_rows=3)
    x = draw(2, K)
    for one in (table, again):
        value = fastlora.segmented_lora(x, one, [0, 0], torch.zeros(2, N)).square().sum()
        if one is again:
            one.register("b", draw(30, K), draw(N, 30))
        value.backward()
    for p, q in zip(parameters(table), parameters(again, "a"), strict=True):
        assert torch.equal(p.grad, q.grad)


# --- the ways torch runs a function ---------------------------------------------------------------------


def test_autocast_casts_x_and_keeps_the_parameters_gradients():
    table, weight = make_table(), fastlora.quantize_nf4(draw(N, K, scale=0.1))
    x, bias = draw(len(ROWS), K).requires_grad_(), draw(N)
    wanted = (x, *parameters(table))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fastlora.nf4_multi_lora_linear(x, weight, table, table.slots(ROWS), bias)
        got = torch.autograd.grad(y.float().square().sum(), wanted)
    assert y.dtype == torch.bfloat16
    plain = fastlora.nf4_multi_lora_linear(x, weight, table, table.slots(ROWS), bias)
    for g, w in zip(got, torch.autograd.grad(plain.square().sum(), wanted), strict=True):
        assert g.dtype == torch.float32
        assert relative_error(g, w) < 2 * GRADIENT[torch.bfloat16]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(reentrant):
    table, weight = make_table(), fastlora.quantize_nf4(draw(N, K, scale=0.1))

    def run(wrap):
        x = draw(len(ROWS), K).requires_grad_()
        for p in parameters(table):
            p.grad = None
        y = wrap(lambda x: fastlora.nf4_multi_lora_linear(x, weight, table, table.slots(ROWS)), x)
        y.square().sum().backward()
        return [y, x.grad, *(p.grad for p in parameters(table))]

    plain = run(lambda f, x: f(x))
    again = run(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    assert all(torch.equal(p, c) for p, c in zip(plain, again, strict=True))


def test_in_one_compiled_graph():
    torch._dynamo.reset()
    table, weight = make_table(), fastlora.quantize_nf4(draw(N, K, scale=0.1))

    def f(x, slots, y):
        return fastlora.segmented_lora(
            fastlora.nf4_multi_lora_linear(x, weight, table, slots) @ square, table, slots, y
        )

    square = draw(N, K, scale=0.1)
    compiled = torch.compile(f, fullgraph=True)
    x, slots = draw(len(ROWS), K).requires_grad_(), table.slots(ROWS)
    wanted = (x, *parameters(table))
    want = f(x, slots, torch.zeros(len(ROWS), N))
    got = compiled(x, slots, torch.zeros(len(ROWS), N))
    torch.testing.assert_close(got, want)
    pairs = zip(torch.autograd.grad(got.sum(), wanted), torch.autograd.grad(want.sum(), wanted), strict=True)
    for g, w in pairs:
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, slots, torch.zeros(len(ROWS), N)), want)
    torch._dynamo.reset()


def test_a_second_differentiation_is_a_clear_error():
    table, x = make_table(), draw(len(ROWS), K).requires_grad_()
    y = fastlora.segmented_lora(x, table, table.slots(ROWS), torch.zeros(len(ROWS), N))
    first = torch.autograd.grad(y.square().sum(), parameters(table), create_graph=True)
    with pytest.raises(RuntimeError, match="expected one differentiation, got a second one"):
        first[0].sum().backward()


def test_a_table_made_in_inference_mode_trains():
    with torch.inference_mode():
        table = make_table({"a": 3})
        fastlora.segmented_lora(draw(2, K), table, [0, -1], torch.zeros(2, N))
    fastlora.segmented_lora(draw(2, K), table, [0, -1], torch.zeros(2, N)).sum().backward()
    assert parameters(table)[0].grad.any()


def test_the_same_bits_for_any_number_of_threads(keep_threads):
    table, x = make_table(k=512, n=384), draw(len(ROWS), 512, dtype=torch.bfloat16)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = fastlora.segmented_lora(
            x, table, table.slots(ROWS), torch.zeros(len(ROWS), 384, dtype=torch.bfloat16)
        )
        found.append([y, *torch.autograd.grad(y.float().square().sum(), parameters(table))])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AdapterTable(0, 4), ValueError, "AdapterTable: expected in_features >= 1, got 0"),
        (lambda: AdapterTable(4, 4, capacity=0), ValueError, "AdapterTable: expected capacity >= 1, got 0"),
        (lambda: AdapterTable(4, [1] * 9), ValueError, "expected 1 to 8 slices of out_features, got 9"),
        (lambda: AdapterTable(4.0, 4), TypeError, "expected in_features as an int, got 4.0"),
        (
            lambda: AdapterTable(4, 4, dtype=torch.float64),
            TypeError,
            "expected dtype float32, bfloat16 or float16",
        ),
    ],
)
def test_bad_sizes(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t: t.register("a", draw(2, K), draw(N, 2)),
            ValueError,
            "register: expected a new name, got 'a'",
        ),
        (lambda t: t.register("", draw(2, K), draw(N, 2)), TypeError, "register: expected a name, got ''"),
        (
            lambda t: t.register("x", draw(2, K + 1), draw(N, 2)),
            ValueError,
            r"lora_a of shape \(r >= 1, 72\), got \(2, 73\)",
        ),
        (
            lambda t: t.register("x", draw(0, K), draw(N, 0)),
            ValueError,
            r"lora_a of shape \(r >= 1, 72\), got \(0, 72\)",
        ),
        (
            lambda t: t.register("x", draw(2, K), draw(N, 3)),
            ValueError,
            r"lora_b of shape \(40, 2\), got \(40, 3\)",
        ),
        (
            lambda t: t.register("x", [draw(2, K)] * 2, [draw(N, 2)] * 2),
            ValueError,
            "expected 1 lora_a and lora_b, one a slice, got 2 and 2",
        ),
        (
            lambda t: t.register("x", [None], [None]),
            ValueError,
            "expected an adapter in at least one slice, got none",
        ),
        (
            lambda t: t.register("x", [draw(2, K)], [None]),
            ValueError,
            "lora_a and lora_b of a slice together",
        ),
        (
            lambda t: t.register("x", draw(2, K).int(), draw(N, 2)),
            TypeError,
            "expected lora_a of a floating dtype, got torch.int32",
        ),
        (
            lambda t: t.register("x", draw(2, K), draw(N, 2), float("nan")),
            ValueError,
            "expected a finite scaling",
        ),
        (
            lambda t: t.replace("x", draw(2, K), draw(N, 2)),
            ValueError,
            r"expected the name .*, got 'x'; there are \['a', 'b'\]",
        ),
        (lambda t: t.evict("x"), ValueError, "expected the name of an adapter, got 'x'"),
        (lambda t: t.slots(["a", "x"]), ValueError, "expected the name of an adapter, got 'x'"),
        (lambda t: t.to(dtype=torch.int8), TypeError, "AdapterTable.to: expected dtype float32"),
        (
            lambda t: fastlora.route([0, 8], t.capacity),
            ValueError,
            r"lora_route: .* in -1 \.\. 7, got 8 at position 1",
        ),
        (
            lambda t: fastlora.segmented_lora(draw(1, K), t, fastlora.route([0], 9), torch.zeros(1, N)),
            ValueError,
            "expected a routing for the table's 8 slots, got one for 9",
        ),
        (
            lambda t: fastlora.segmented_lora(draw(1, K + 1), t, [0], torch.zeros(1, N)),
            ValueError,
            r"segmented_lora: expected x of shape \(\.\.\., 72\), got \(1, 73\)",
        ),
        (
            lambda t: fastlora.segmented_lora(draw(2, K), t, [0], torch.zeros(2, N)),
            ValueError,
            r"expected order of shape \(2,\)",
        ),
        (
            lambda t: fastlora.nf4_multi_lora_linear(
                draw(1, K), fastlora.quantize_nf4(draw(2, 4, 8)), t, [0]
            ),
            ValueError,
            r"expected a weight of shape \(n, k\), got \(2, 4, 8\)",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    table = make_table({"a": 3, "b": 2})
    before = [t.clone() for t in (table.a[0], table.b[0], table.entries, table.scaling)]
    with pytest.raises(error, match=message):
        change(table)
    assert table.names == ("a", "b")
    for now, then in zip((table.a[0], table.b[0], table.entries, table.scaling), before, strict=True):
        assert torch.equal(now, then)
