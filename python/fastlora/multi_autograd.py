"""The differentiable layer of many adapters: each row of x has the adapter of its slot, or none.

    y  = x·Wᵀ + s·u·Bᵀ + bias      u = x·Aᵀ          of each row's own adapter
    dx = dy·W + v·A                v = s·dy·B
    dA = vᵀ·x,  dB = s·dyᵀ·u       over the rows of each slot; zero for an adapter without rows

The kernels read the pools of an AdapterTable, and what learns are Parameters over rows of them. So the
Parameters are arguments of the autograd.Function although it computes with the pools: their gradients are
rows of the pools' gradients, views and no copies. Otherwise as in autograd.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, direct_segmented
from .adapter_pairs import LowRank
from .adapter_table import AdapterTable
from .autograd import _SEED_BOUND, _any_autocast, _autocast_is_on, _NoSecondDerivative, _rows
from .checks import Packed
from .nf4 import NF4Weight
from .routing import Routing, route
from .sharded import check_whole

_multi_linear = torch.ops.fastlora.nf4_multi_lora_linear.default
_multi_grad_input = torch.ops.fastlora.nf4_multi_lora_grad_input.default
_segmented = torch.ops.fastlora.segmented_lora.default
_segmented_grad_input = torch.ops.fastlora.segmented_lora_grad_input.default
_grad_pools = torch.ops.fastlora.segmented_lora_grad_pools.default
_linear = torch.ops.fastlora.nf4_linear.default
_grad_input = torch.ops.fastlora.nf4_linear_grad_input.default
_dropout = torch.ops.fastlora.lora_dropout.default


class Dropout(NamedTuple):
    """Probabilities in (0, 1) of the adapters' dropout, and which of them is whose."""

    p: tuple[float, ...] = ()
    kinds: Tensor | None = None  # int32 (capacity,): index into p, len(p) for none; None: all have p[0]


NO_DROPOUT = Dropout()


def segmented_lora(
    x: Tensor, table: AdapterTable, slots: Tensor | Sequence[int] | Routing, y: Tensor
) -> Tensor:
    """Add each row's low-rank term, y[i] += scaling[s]·(x[i]·A[s]ᵀ)·B[s]ᵀ with s = slots[i], and return y.

    Args:
        x: ``(..., k)``, float32, bfloat16 or float16.
        table: the adapters; their dtype may differ from x's.
        slots: a slot a row, -1 for none, int32 or int64; or a :class:`Routing` from :func:`route`, which
            several calls share.
        y: ``(..., n)`` in x's dtype, contiguous; written in place. Rows without an adapter keep their bits.

    Differentiable once, in x, y and the table's parameters. Raises ValueError for shapes and slots, TypeError
    for dtypes, RuntimeError for devices.
    """
    _check_table("segmented_lora", x, table.in_features)
    return add_low_rank(x, table.low_rank(learns=torch.is_grad_enabled()), _routing(slots, table), y)


def add_low_rank(x: Tensor, low: LowRank, routing: Routing, y: Tensor) -> Tensor:
    """:func:`segmented_lora` over the parts of a table; gradients as in :func:`multi_linear`."""
    if torch.is_grad_enabled() and _wants(x, y, *low.parameters, *low.a, *low.b):
        rest = _flat(low, routing, NO_DROPOUT, False)
        # A Function that writes to an argument is nothing for a compiled graph, nor for a view, whose base's
        # gradient autograd would take for its first argument's; and a leaf is to be refused unwritten.
        if torch.compiler.is_compiling() or y._is_view() or (y.is_leaf and y.requires_grad):
            return y.add_(_MultiLora.apply(x, None, None, None, 0, None, None, *rest))
        return _MultiLora.apply(x, None, None, None, 0, None, y, *rest)
    if direct_segmented.segmented_lora(x, low, routing, y) is None:
        _segmented(x, *_arguments(low, routing), y)
    return y


def nf4_multi_lora_linear(
    x: Tensor,
    weight: NF4Weight,
    table: AdapterTable,
    slots: Tensor | Sequence[int] | Routing,
    bias: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """y = x·Wᵀ + bias, W packed in NF4, and each row's low-rank term as in :func:`segmented_lora`, fused.

    x, bias and weight are as in :func:`nf4_linear`, table and slots as in :func:`segmented_lora`. Under
    autocast x is cast first. batch_invariant: a row's bits do not depend on the rows that share its batch.

    Returns ``(..., n)`` in x's dtype. Differentiable once in x, bias and the table's parameters. Raises as
    those two do.
    """
    if len(weight.shape) != 2:
        raise ValueError(
            f"nf4_multi_lora_linear: expected a weight of shape (n, k), got {tuple(weight.shape)}"
        )
    _check_table("nf4_multi_lora_linear", x, weight.shape[1])
    low = table.low_rank(learns=torch.is_grad_enabled())
    return multi_linear(x, weight.parts, bias, low, _routing(slots, table), NO_DROPOUT, batch_invariant)


def multi_linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    low: LowRank,
    routing: Routing,
    dropout: Dropout,
    batch_invariant: bool,
) -> Tensor:
    """:func:`nf4_multi_lora_linear` over the parts of a weight and of a table. Gradients go to
    `low.parameters`, or to the pools where they themselves ask for them."""
    if _any_autocast():
        device_type = x.device.type
        if _autocast_is_on(device_type) and x.dtype in checks.DTYPE_CODE:
            dtype = torch.get_autocast_dtype(device_type)
            x = x.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    check_whole("nf4_multi_lora_linear", weight[0])
    if torch.is_grad_enabled() and _wants(x, bias, *low.parameters, *low.a, *low.b):
        return _MultiLora.apply(x, *weight, bias, *_flat(low, routing, dropout, batch_invariant))
    if dropout.p:
        table, seed, kinds = _arguments(low, routing), _seed(x), _kinds(dropout, routing)
        return _forward_dropped(x, weight, bias, table, dropout.p, kinds, seed)[0]
    y = direct_segmented.multi_linear(x, weight, bias, low, routing, batch_invariant)
    if y is None:
        table = _arguments(low, routing)
        y = _multi_linear(x, *weight[:4], bias, *table, batch_invariant, weight[4])[0]
    return y


def _wants(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _check_table(op: str, x: Tensor, k: int) -> None:
    if x.dim() and x.shape[-1] != k:
        raise ValueError(f"{op}: expected x of shape (..., {k}), got {tuple(x.shape)}")


def _routing(slots: Tensor | Sequence[int] | Routing, table: AdapterTable) -> Routing:
    if not isinstance(slots, Routing):
        return route(slots, table.capacity)
    if slots.capacity != table.capacity:
        raise ValueError(
            f"route: expected a routing for the table's {table.capacity} slots, got one for {slots.capacity}"
        )
    return slots


def _seed(x: Tensor) -> Tensor:
    return torch.randint(_SEED_BOUND, (1,), dtype=torch.int64, device=x.device)


def _arguments(low: LowRank, routing: Routing) -> tuple[Any, ...]:
    return low.a, low.b, low.entries, low.scaling, routing.order, routing.segments, low.widths


def _flat(low: LowRank, routing: Routing, dropout: Dropout, batch_invariant: bool) -> tuple[Any, ...]:
    """The rest of the Function's arguments: tensors one by one, as autograd looks into no tuple."""
    seed = _seed(low.entries) if dropout.p else None
    plan = (tuple(low.widths), low.places, dropout.p, batch_invariant)
    tensors = (low.entries, low.scaling, routing.order, routing.segments, seed, _kinds(dropout, routing))
    return (*tensors, plan, *low.a, *low.b, *low.parameters)


def _kinds(dropout: Dropout, routing: Routing) -> Tensor | None:
    """Which of the probabilities is each row's; rows without an adapter have any."""
    return None if dropout.kinds is None else dropout.kinds[routing.slots.clamp(min=0).long()]


def _dropped(x: Tensor, p: tuple[float, ...], kinds: Tensor | None, seed: Tensor | None) -> Tensor:
    """x as the adapters see it: each row with its adapter's probability, the mask a function of seed and
    place."""
    assert seed is not None
    if kinds is None:
        return _dropout(x, seed, p[0])
    out, mine = x, kinds.reshape(*x.shape[:-1], 1)
    for i, one in enumerate(p):
        out = torch.where(mine == i, _dropout(x, seed, one), out)
    return out


def _forward_dropped(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    table: tuple[Any, ...],
    p: tuple[float, ...],
    kinds: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, u) where only the low-rank term sees the dropped x."""
    y = _linear(x, *weight[:4], bias, None, None, 0.0, weight[4])
    return y, _segmented(_dropped(x, p, kinds, seed), *table, y)


class _MultiLora(torch.autograd.Function):
    """packed None: the low-rank term alone, added to what stands for the bias, in place, or to zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor | None,
        scales: Tensor | None,
        nested: Tensor | None,
        blocksize: int,
        offsets: Tensor | None,
        bias: Tensor | None,
        entries: Tensor,
        scaling: Tensor,
        order: Tensor,
        segments: Tensor,
        seed: Tensor | None,
        kinds: Tensor | None,
        plan: tuple[Any, ...],
        *tensors: Tensor,
    ) -> Tensor:
        widths, _, p, batch_invariant = plan
        a, b = _pools(tensors, len(widths))
        table = (a, b, entries, scaling, order, segments, list(widths))
        if packed is None or scales is None:
            y = x.new_zeros(*x.shape[:-1], sum(t.shape[1] for t in b)) if bias is None else bias
            u = _segmented(x, *table, y)
            if bias is not None:
                ctx.mark_dirty(y)
        elif p:
            weight = (packed, scales, nested, blocksize, offsets)
            y, u = _forward_dropped(x, weight, bias, table, p, kinds, seed)
        else:
            y, u = _multi_linear(x, packed, scales, nested, blocksize, bias, *table, batch_invariant, offsets)
        learns = any(ctx.needs_input_grad[_TENSORS:])
        # The parameters too, although the pools are read: they count the writes to their own rows.
        ctx.save_for_backward(
            x if learns else None, u if learns else None, packed, scales, nested, offsets, entries, scaling,
            order, segments, seed, kinds, *tensors,
        )  # fmt: skip
        ctx.plan, ctx.blocksize, ctx.in_features = plan, blocksize, x.shape[-1]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        needs = (needed[0], needed[6], *needed[_TENSORS:])
        args = (dy, ctx.plan, ctx.in_features, ctx.blocksize, needs, *ctx.saved_tensors)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dx, dbias, *rest = _NoSecondDerivative.apply(_gradients, *args)
        else:
            dx, dbias, *rest = _gradients(*args)
        return (dx, None, None, None, None, None, dbias, *[None] * 7, *rest)


_TENSORS = 14  # the place of the pools among the Function's arguments; then come the parameters


def _pools(tensors: Sequence[Tensor], slices: int) -> tuple[list[Tensor], list[Tensor]]:
    return list(tensors[:slices]), list(tensors[slices : 2 * slices])


def _gradients(
    dy: Tensor,
    plan: tuple[Any, ...],
    in_features: int,
    blocksize: int,
    needs: tuple[bool, ...],
    x: Tensor | None,
    u: Tensor | None,
    packed: Tensor | None,
    scales: Tensor | None,
    nested: Tensor | None,
    offsets: Tensor | None,
    entries: Tensor,
    scaling: Tensor,
    order: Tensor,
    segments: Tensor,
    seed: Tensor | None,
    kinds: Tensor | None,
    *tensors: Tensor,
) -> tuple[Tensor | None, ...]:
    """dx, dbias, and those of the tensors; None where not needed."""
    widths, places, p, batch_invariant = plan
    needs_x, needs_bias, *needs_rest = needs
    learns, slices = any(needs_rest), len(widths)
    a, b = _pools(tensors, slices)
    table = (a, b, entries, scaling, order, segments, list(widths))
    dy = dy.contiguous()  # autograd often hands over an expanded scalar
    dx = v = None
    if needs_x and packed is not None and not p:
        dx, v = _multi_grad_input(
            dy, packed, scales, nested, in_features, blocksize, *table, batch_invariant, offsets
        )
    elif needs_x or learns:
        low = dy.new_zeros(*dy.shape[:-1], in_features)
        v = _segmented_grad_input(dy, *table, low)
        if needs_x:  # with dropout the low-rank half passes through the mask
            dx = _dropped(low, p, kinds, seed) if p else low
            if packed is not None:
                base = (packed, scales, nested, in_features, blocksize, None, None, 0.0, offsets)
                dx = dx + _grad_input(dy, *base)[0]
    found: list[Tensor | None] = [None] * len(tensors)
    if learns:
        assert x is not None
        seen = _dropped(x, p, kinds, seed) if p else x
        da, db = _grad_pools(seen, dy, u, v, *table)
        for j in range(slices):
            found[j] = da[j] if needs_rest[j] else None
            found[slices + j] = db[j] if needs_rest[slices + j] else None
        # A gradient that is a few rows of a large pool would keep all of it.
        few = [2 * sum(rank for j, _, rank in places if j == one) < a[one].shape[0] for one in range(slices)]
        for i, (j, first, rank) in enumerate(places):
            rows = [pool[j][first : first + rank] for pool in (da, db)]
            rows = [t.clone() for t in rows] if few[j] else rows
            found[2 * slices + 2 * i : 2 * slices + 2 * i + 2] = [rows[0], rows[1].t()]
    dbias = None
    if needs_bias:
        dbias = _rows(dy).sum(0) if packed is not None else dy
    return (dx, dbias, *found)
