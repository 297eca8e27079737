"""Operators of many adapters in one batch, as in ops.py: ``lora_route``, ``segmented_lora*``,
``nf4_multi_lora_*``.

Row i of x uses the adapter of slot ``slots[i]``, or none (-1). The adapters of a table lie in two pools,
rows of ``a`` (R, k) and of ``b`` (R, n), which is B transposed; ``entries`` says which rows are a slot's.
A packed layer has a pair of pools for each slice of its out_features. See fastlora/segmented_lora.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C, checks, cuda_segmented
from . import checks_segmented as seg
from .checks import DTYPE_CODE
from .checks_segmented import Adapters
from .isa import level
from .ops import Outputs, define, ptr

_BAD_ARGUMENT = 1
_ADAPTERS = (
    "Tensor[] a, Tensor[] b, Tensor entries, Tensor scaling, Tensor order, Tensor segments, int[] widths"
)


def kernel_table(
    a: list[Tensor], b: list[Tensor], entries: Tensor, scaling: Tensor, widths: list[int]
) -> _C.AdapterTable:
    """A table's addresses and sizes: good as long as the tensors are where they are."""
    return _C.AdapterTable(
        [t.data_ptr() for t in a], [t.data_ptr() for t in b], [t.shape[0] for t in a],
        [t.shape[1] for t in b], list(widths), entries.shape[-2], entries.data_ptr(), scaling.data_ptr(),
        DTYPE_CODE[a[0].dtype],
    )  # fmt: skip


def _table(t: Adapters) -> _C.AdapterTable:
    return kernel_table(t.a, t.b, t.entries, t.scaling, t.widths)


def _routing(t: Adapters) -> tuple[int, int, int]:
    return t.order.data_ptr(), t.segments.data_ptr(), t.segments.shape[0]


def _told(op: str, status: int, table: Adapters) -> int:
    if status == _BAD_ARGUMENT:
        seg.raise_bad_adapters(op, table)
    return status


# --- the routing ------------------------------------------------------------------------------------------


def _route_outputs(slots: Tensor, capacity: int) -> Outputs:
    seg.check_slots("lora_route", slots, capacity)
    m = slots.numel()
    return [((m,), torch.int32), ((seg.segment_rows(m, capacity), 2), torch.int32)]


def _route(slots: Tensor, capacity: int, order: Tensor, segments: Tensor) -> int:
    status = _C.lora_route(
        slots.data_ptr(), slots.dtype is torch.int64, slots.numel(), capacity, order.data_ptr(),
        segments.data_ptr(),
    )  # fmt: skip
    if status == _BAD_ARGUMENT:
        seg.raise_bad_slot("lora_route", slots, capacity)
    return status


define(
    "lora_route(Tensor slots, int capacity) -> (Tensor order, Tensor segments)",
    _route_outputs,
    _route,
    cuda_segmented.route,
)


# --- the low-rank term alone ------------------------------------------------------------------------------


def _lora_outputs(
    x: Tensor, a: list[Tensor], b: list[Tensor], entries: Tensor, scaling: Tensor, order: Tensor,
    segments: Tensor, widths: list[int], y: Tensor,
) -> Outputs:  # fmt: skip
    op, table = "segmented_lora", Adapters(a, b, entries, scaling, order, segments, widths)
    m, k = seg.check_wide(op, "x", x)
    _, n = seg.check_beside(op, "y", y, "x", x)
    width = seg.check_adapters(op, table, m, k, n, x.device)
    seg.check_written(op, "y", y)
    return [((m, width), x.dtype)]


def _lora(
    x: Tensor, a: list[Tensor], b: list[Tensor], entries: Tensor, scaling: Tensor, order: Tensor,
    segments: Tensor, widths: list[int], y: Tensor, u: Tensor,
) -> int:  # fmt: skip
    table = Adapters(a, b, entries, scaling, order, segments, widths)
    status = _C.segmented_lora(
        x.data_ptr(), y.data_ptr(), u.data_ptr(), u.shape[0], x.shape[-1], _table(table), *_routing(table),
        DTYPE_CODE[x.dtype], torch.get_num_threads(), level(),
    )  # fmt: skip
    return _told("segmented_lora", status, table)


define(
    f"segmented_lora(Tensor x, {_ADAPTERS}, Tensor(a!) y) -> Tensor u",
    _lora_outputs,
    _lora,
    cuda_segmented.segmented_lora,
)


def _lora_grad_input_outputs(
    dy: Tensor, a: list[Tensor], b: list[Tensor], entries: Tensor, scaling: Tensor, order: Tensor,
    segments: Tensor, widths: list[int], dx: Tensor,
) -> Outputs:  # fmt: skip
    op, table = "segmented_lora_grad_input", Adapters(a, b, entries, scaling, order, segments, widths)
    m, n = seg.check_wide(op, "dy", dy)
    _, k = seg.check_beside(op, "dx", dx, "dy", dy)
    width = seg.check_adapters(op, table, m, k, n, dy.device)
    seg.check_written(op, "dx", dx)
    return [((m, width), dy.dtype)]


def _lora_grad_input(
    dy: Tensor, a: list[Tensor], b: list[Tensor], entries: Tensor, scaling: Tensor, order: Tensor,
    segments: Tensor, widths: list[int], dx: Tensor, v: Tensor,
) -> int:  # fmt: skip
    table = Adapters(a, b, entries, scaling, order, segments, widths)
    status = _C.segmented_lora_grad_input(
        dy.data_ptr(), dx.data_ptr(), v.data_ptr(), v.shape[0], dx.shape[-1], _table(table), *_routing(table),
        DTYPE_CODE[dy.dtype], torch.get_num_threads(), level(),
    )  # fmt: skip
    return _told("segmented_lora_grad_input", status, table)


define(
    f"segmented_lora_grad_input(Tensor dy, {_ADAPTERS}, Tensor(a!) dx) -> Tensor v",
    _lora_grad_input_outputs,
    _lora_grad_input,
    cuda_segmented.segmented_lora_grad_input,
)


def _grad_pools_outputs(
    x: Tensor, dy: Tensor, u: Tensor, v: Tensor, a: list[Tensor], b: list[Tensor], entries: Tensor,
    scaling: Tensor, order: Tensor, segments: Tensor, widths: list[int],
) -> Outputs:  # fmt: skip
    op, table = "segmented_lora_grad_pools", Adapters(a, b, entries, scaling, order, segments, widths)
    m, k = seg.check_wide(op, "x", x)
    _, n = seg.check_beside(op, "dy", dy, "x", x)
    width = seg.check_adapters(op, table, m, k, n, x.device)
    seg.check_narrow_rows(op, "u", u, "x", x, m, width)
    seg.check_narrow_rows(op, "v", v, "x", x, m, width)
    return [[(t.shape, t.dtype) for t in a], [(t.shape, t.dtype) for t in b]]


def _grad_pools(
    x: Tensor, dy: Tensor, u: Tensor, v: Tensor, a: list[Tensor], b: list[Tensor], entries: Tensor,
    scaling: Tensor, order: Tensor, segments: Tensor, widths: list[int], da: list[Tensor], db: list[Tensor],
) -> int:  # fmt: skip
    table = Adapters(a, b, entries, scaling, order, segments, widths)
    status = _C.segmented_lora_grad_pools(
        x.data_ptr(), dy.data_ptr(), u.data_ptr(), v.data_ptr(), [t.data_ptr() for t in da],
        [t.data_ptr() for t in db], u.shape[0], x.shape[-1], _table(table), *_routing(table),
        DTYPE_CODE[x.dtype], torch.get_num_threads(), level(),
    )  # fmt: skip
    return _told("segmented_lora_grad_pools", status, table)


define(
    f"segmented_lora_grad_pools(Tensor x, Tensor dy, Tensor u, Tensor v, {_ADAPTERS}) -> "
    "(Tensor[] da, Tensor[] db)",
    _grad_pools_outputs,
    _grad_pools,
    cuda_segmented.segmented_lora_grad_pools,
)


# --- in the layer's own product ---------------------------------------------------------------------------


def _multi_linear_outputs(
    x: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, blocksize: int, bias: Tensor | None,
    a: list[Tensor], b: list[Tensor], entries: Tensor, scaling: Tensor, order: Tensor, segments: Tensor,
    widths: list[int], batch_invariant: bool, offsets: Tensor | None,
) -> Outputs:  # fmt: skip
    op, table = "nf4_multi_lora_linear", Adapters(a, b, entries, scaling, order, segments, widths)
    n, k = checks.check_linear(op, x, (packed, scales, nested, blocksize, offsets), bias)
    m, _ = seg.check_wide(op, "x", x)
    width = seg.check_adapters(op, table, m, k, n, x.device)
    return [((*x.shape[:-1], n), x.dtype), ((m, width), x.dtype)]


def _multi_linear(
    x: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, blocksize: int, bias: Tensor | None,
    a: list[Tensor], b: list[Tensor], entries: Tensor, scaling: Tensor, order: Tensor, segments: Tensor,
    widths: list[int], batch_invariant: bool, offsets: Tensor | None, y: Tensor, u: Tensor,
) -> int:  # fmt: skip
    offsets = checks.whole(offsets)
    table = Adapters(a, b, entries, scaling, order, segments, widths)
    status = _C.nf4_multi_lora_linear(
        x.data_ptr(), packed.data_ptr(), scales.data_ptr(), ptr(nested), blocksize, ptr(offsets),
        checks.group_count(offsets), ptr(bias), y.data_ptr(), u.data_ptr(), u.shape[0],
        packed.shape[0], x.shape[-1], _table(table), *_routing(table), batch_invariant,
        DTYPE_CODE[x.dtype], torch.get_num_threads(), level(),
    )  # fmt: skip
    return _told("nf4_multi_lora_linear", status, table)


define(
    "nf4_multi_lora_linear(Tensor x, Tensor packed, Tensor scales, Tensor? nested, int blocksize, "
    f"Tensor? bias, {_ADAPTERS}, bool batch_invariant, Tensor? offsets=None) -> (Tensor y, Tensor u)",
    _multi_linear_outputs,
    _multi_linear,
    cuda_segmented.multi_linear,
)


def _multi_grad_input_outputs(
    dy: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, in_features: int, blocksize: int,
    a: list[Tensor], b: list[Tensor], entries: Tensor, scaling: Tensor, order: Tensor, segments: Tensor,
    widths: list[int], batch_invariant: bool, offsets: Tensor | None,
) -> Outputs:  # fmt: skip
    op, table = "nf4_multi_lora_grad_input", Adapters(a, b, entries, scaling, order, segments, widths)
    n = checks.check_matrix(op, packed)
    checks.check_activation(op, "dy", dy, n, "the weight's out_features")
    checks.check_weight(op, (packed, scales, nested, blocksize, offsets), n, in_features, dy.device)
    m, _ = seg.check_wide(op, "dy", dy)
    width = seg.check_adapters(op, table, m, in_features, n, dy.device)
    return [((*dy.shape[:-1], in_features), dy.dtype), ((m, width), dy.dtype)]


def _multi_grad_input(
    dy: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, in_features: int, blocksize: int,
    a: list[Tensor], b: list[Tensor], entries: Tensor, scaling: Tensor, order: Tensor, segments: Tensor,
    widths: list[int], batch_invariant: bool, offsets: Tensor | None, dx: Tensor, v: Tensor,
) -> int:  # fmt: skip
    offsets = checks.whole(offsets)
    table = Adapters(a, b, entries, scaling, order, segments, widths)
    status = _C.nf4_multi_lora_grad_input(
        dy.data_ptr(), packed.data_ptr(), scales.data_ptr(), ptr(nested), blocksize, ptr(offsets),
        checks.group_count(offsets), dx.data_ptr(), v.data_ptr(), v.shape[0],
        packed.shape[0], in_features, _table(table), *_routing(table), batch_invariant,
        DTYPE_CODE[dy.dtype], torch.get_num_threads(), level(),
    )  # fmt: skip
    return _told("nf4_multi_lora_grad_input", status, table)


define(
    "nf4_multi_lora_grad_input(Tensor dy, Tensor packed, Tensor scales, Tensor? nested, int in_features, "
    f"int blocksize, {_ADAPTERS}, bool batch_invariant, Tensor? offsets=None) -> (Tensor dx, Tensor v)",
    _multi_grad_input_outputs,
    _multi_grad_input,
    cuda_segmented.multi_grad_input,
)
