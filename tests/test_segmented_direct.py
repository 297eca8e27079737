"""The short way to the kernels of many adapters (fastlora/direct_segmented.py): the ops' bits where nothing
watches, else the ops; and pages of 2 MiB under what they read."""

from __future__ import annotations

import copy

import pytest
import torch
from test_nf4_linear_direct import Called, Dispatched, Subclass
from torch import Tensor, nn

import fastlora
from fastlora import _C, direct, multi_autograd
from fastlora.huge_pages import prefer

K, N = 70, 33
needs_direct = pytest.mark.skipif(not direct.AVAILABLE, reason="this torch does not let its state be asked")
generator = torch.Generator().manual_seed(2)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def table_of(
    *ranks: int, n: int | tuple[int, ...] = N, dtype: torch.dtype = torch.bfloat16
) -> fastlora.AdapterTable:
    table = fastlora.AdapterTable(K, n, capacity=4, dtype=dtype)
    for i, r in enumerate(ranks):
        widths = n if isinstance(n, tuple) else (n,)
        table.register(
            f"{i}",
            [normal(r, K, dtype=dtype) for _ in widths],
            [normal(w, r, dtype=dtype) for w in widths],
            0.5,
        )
    return table


@pytest.fixture
def problem():
    weight = fastlora.quantize_nf4(normal(N, K, dtype=torch.float32))
    return normal(5, K), weight, table_of(3, 8, 1), torch.tensor([1, -1, 0, 2, 1], dtype=torch.int32)


def both(x: Tensor, weight, table, slots) -> tuple[Tensor, Tensor]:
    y = torch.ones(*x.shape[:-1], table.out_features, dtype=x.dtype)
    fastlora.segmented_lora(x, table, slots, y)
    return y, fastlora.nf4_multi_lora_linear(x, weight, table, slots, torch.ones(N, dtype=x.dtype))


def through_the_ops(*args) -> tuple[Tensor, Tensor]:
    with Dispatched() as watching:  # whatever watches meets the op
        result = both(*args)
    assert {
        torch.ops.fastlora.segmented_lora.default,
        torch.ops.fastlora.nf4_multi_lora_linear.default,
    } <= set(watching.seen)
    return result


@pytest.fixture
def ops_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("the call went through torch's dispatcher")

    monkeypatch.setattr(multi_autograd, "_segmented", fail)
    monkeypatch.setattr(multi_autograd, "_multi_linear", fail)


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
        assert (g.dtype, g.shape, g.stride()) == (w.dtype, w.shape, w.stride())


# --- a plain call -----------------------------------------------------------------------------------------


@needs_direct
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bits_of_the_ops(isa: str, problem, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, table, slots = problem
    x = x.to(dtype)
    with torch.no_grad():
        want = through_the_ops(x, weight, table, slots)
        monkeypatch.setattr(multi_autograd, "_segmented", None)
        monkeypatch.setattr(multi_autograd, "_multi_linear", None)
        assert_same(both(x, weight, table, slots), want)
        assert_same(both(x[None, :, None], weight, table, slots), tuple(t[None, :, None] for t in want))
    with torch.inference_mode():
        got = both(x, weight, table, slots)
        assert got[1].is_inference()
        assert_same(got, want)


@needs_direct
@pytest.mark.usefixtures("ops_forbidden")
def test_a_layer_with_named_adapters_takes_it() -> None:
    layer = fastlora.QLinear(K, N, rank=2, dtype=torch.bfloat16).eval()
    layer.add_adapter("one", rank=3, alpha=6)
    with torch.no_grad(), fastlora.adapters(layer, ["one", None, "default"]):
        layer(normal(3, K))


@needs_direct
def test_y_is_known_to_have_changed(problem) -> None:
    x, _, table, slots = problem
    y = torch.zeros(5, N, dtype=x.dtype)
    before = y._version
    with torch.no_grad():
        fastlora.segmented_lora(x, table, slots, y)
    assert y._version == before + 1


@needs_direct
def test_slices(problem, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, _, slots = problem
    table = table_of(3, 8, 1, n=(20, 13))
    with torch.no_grad():
        with Dispatched():
            want = fastlora.segmented_lora(x, table, slots, torch.zeros(5, N, dtype=x.dtype))
        monkeypatch.setattr(multi_autograd, "_segmented", None)
        assert torch.equal(fastlora.segmented_lora(x, table, slots, torch.zeros(5, N, dtype=x.dtype)), want)


# --- a table that changes ---------------------------------------------------------------------------------


CHANGES = {
    "grown": lambda t: [t.register(f"new {i}", normal(40, K), normal(N, 40), 2.0) for i in range(9)],
    "another rank": lambda t: t.replace("1", normal(30, K), normal(N, 30), 1.0),
    "in place": lambda t: t.replace("1", normal(8, K), normal(N, 8), 1.0),
    "cast": lambda t: t.to(dtype=torch.float32),
    "evicted and registered": lambda t: (t.evict("1"), t.register("1", normal(60, K), normal(N, 60), 1.0)),
}


@needs_direct
@pytest.mark.parametrize("change", CHANGES)
def test_a_table_that_changed_is_read_as_it_is(problem, change: str) -> None:
    x, weight, table, slots = problem
    with torch.no_grad():
        before = both(x, weight, table, slots)
        CHANGES[change](table)
        after = both(x, weight, table, slots)
        assert_same(after, through_the_ops(x, weight, table, slots))
        assert torch.equal(after[0], before[0]) == (change in ("grown", "cast"))


@needs_direct
def test_a_copy_has_a_view_of_its_own(problem) -> None:
    x, weight, table, slots = problem
    with torch.no_grad():
        want = both(x, weight, table, slots)
        copied = copy.deepcopy(table)
        table.replace("1", normal(8, K), normal(N, 8), 1.0)
        assert_same(both(x, weight, copied, slots), want)
        assert copied.view() is not table.view()
        assert copied.view() is copied.view()


# --- what is not plain is left to the ops -----------------------------------------------------------------


def odd(x: Tensor) -> dict[str, Tensor]:
    return {
        "strided": torch.stack([x, x], -1)[..., 0],
        "negated view": torch._neg_view(x),
        "subclass": x.as_subclass(Subclass),
    }


@pytest.mark.parametrize("which", odd(torch.zeros(1, 1)))
def test_odd_inputs(problem, which: str) -> None:
    x, weight, table, slots = problem
    with torch.no_grad():
        got = both(odd(x)[which], weight, table, slots)
        assert_same(
            tuple(t.as_subclass(Tensor) for t in got),
            both(-x if "negated" in which else x, weight, table, slots),
        )


@pytest.mark.parametrize("mode", [Dispatched, Called])
def test_modes(problem, mode: type) -> None:
    with torch.no_grad(), mode() as watching:
        both(*problem)
    assert torch.ops.fastlora.nf4_multi_lora_linear.default in watching.seen


def test_profiler(problem) -> None:
    with torch.no_grad(), torch.profiler.profile() as profiler:
        both(*problem)
    assert {"fastlora::segmented_lora", "fastlora::nf4_multi_lora_linear"} <= {
        e.key for e in profiler.key_averages()
    }


def test_errors_are_the_ops(problem) -> None:
    x, weight, table, slots = problem
    y = torch.zeros(5, N, dtype=x.dtype)
    routing = fastlora.route(slots, table.capacity)
    cases = [
        (
            lambda: fastlora.segmented_lora(x[:4], table, routing, y[:4]),
            ValueError,
            "expected order of shape",
        ),
        (lambda: fastlora.segmented_lora(x, table, routing, y.float()), TypeError, "expected y in x's dtype"),
        (
            lambda: fastlora.segmented_lora(x, table, routing, y[:, :-1].clone()),
            ValueError,
            "columns together",
        ),
        (
            lambda: fastlora.segmented_lora(x, table, routing._replace(order=routing.order.long()), y),
            TypeError,
            "order",
        ),
        (
            lambda: fastlora.segmented_lora(x, table, routing._replace(order=routing.order + 1), y),
            ValueError,
            "permutation",
        ),
        (
            lambda: fastlora.segmented_lora(x, table, routing._replace(segments=routing.segments[:-1]), y),
            ValueError,
            "seg",
        ),
        (lambda: fastlora.nf4_multi_lora_linear(x, weight, table, routing, y[0, :-1]), ValueError, "bias"),
    ]
    with torch.no_grad():
        for call, error, message in cases:
            with pytest.raises(error, match=message):
                call()
    assert not y.any()


# --- huge pages -------------------------------------------------------------------------------------------


def given(t: Tensor) -> int:
    """The bytes under it that may lie in huge pages: whole pages of 2 MiB, inside."""
    page = 2 << 20
    return max(0, (t.data_ptr() + t.nbytes) // page * page - -(-t.data_ptr() // page) * page)


def test_huge_pages_change_no_bit() -> None:
    model = nn.Sequential(fastlora.QLinear(4096, 2048, bias=False, rank=2), fastlora.QLinear(64, 64))
    model[0].add_adapter("a", rank=3, alpha=6)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    places = {name: t.data_ptr() for name, t in model.state_dict().items()}
    moved = fastlora.use_huge_pages(model)
    assert moved in (0, given(model[0].weight))  # 0: a system without
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert places == {name: t.data_ptr() for name, t in after.items()}


def test_huge_pages_where_there_can_be_none() -> None:
    small, meta = torch.zeros(100, dtype=torch.uint8), torch.zeros(1 << 23, device="meta")
    assert prefer(small) is small
    assert prefer(meta) is meta
    assert _C.prefer_huge_pages(small.data_ptr(), small.nbytes, True) == 0
    assert _C.prefer_huge_pages(0, 0, True) == 0
    assert _C.prefer_huge_pages(small.data_ptr(), -1, True) == 0
    with torch.device("meta"):
        assert fastlora.use_huge_pages(fastlora.QLinear(4096, 4096)) == 0
