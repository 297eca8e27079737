"""What the ops of many adapters demand of a table and a routing; as checks.py."""

from __future__ import annotations

from math import prod
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .checks import check_device, check_float, check_shape

MAX_SLICES = 8


class Adapters(NamedTuple):
    """A table and a routing as the ops take them."""

    a: list[Tensor]  # (R_j, k)
    b: list[Tensor]  # (R_j, n_j)
    entries: Tensor  # (S, capacity, 2) int32; (capacity, 2) of one slice
    scaling: Tensor  # (S, capacity) float32; (capacity,) of one slice
    order: Tensor  # (m,) int32
    segments: Tensor  # (min(m, capacity) + 1, 2) int32
    widths: list[int]

    @property
    def capacity(self) -> int:
        return self.entries.shape[-2]

    @property
    def out_features(self) -> int:
        return sum(t.shape[1] for t in self.b)


def check_dtype(op: str, name: str, t: Tensor, dtype: torch.dtype) -> None:
    if t.dtype is not dtype:
        raise TypeError(f"{op}: expected {name} in {str(dtype)[6:]}, got {t.dtype}")


def check_slots(op: str, slots: Tensor, capacity: int) -> None:
    if slots.dtype not in {torch.int32, torch.int64}:
        raise TypeError(f"{op}: expected slots in int32 or int64, got {slots.dtype}")
    if not 0 <= capacity < 2**31:
        raise ValueError(f"{op}: expected a capacity in [0, 2^31), got {capacity}")
    if slots.numel() >= 2**31:
        raise ValueError(f"{op}: expected fewer than 2^31 slots, got {slots.numel()}")


def segment_rows(m: int, capacity: int) -> int:
    return torch.sym_min(m, capacity) + 1


def _check_pools(op: str, table: Adapters, k: int, device: torch.device) -> None:
    slices = len(table.widths)
    if not 1 <= slices <= MAX_SLICES:
        raise ValueError(f"{op}: expected 1 to {MAX_SLICES} widths, one a slice, got {slices}")
    for name, pools in (("a", table.a), ("b", table.b)):
        if len(pools) != slices:
            raise ValueError(f"{op}: expected {slices} pools {name}, one a width, got {len(pools)}")
    check_float(op, "a[0]", table.a[0])
    for j, (a, b, width) in enumerate(zip(table.a, table.b, table.widths, strict=True)):
        for name, pool in ((f"a[{j}]", a), (f"b[{j}]", b)):
            if pool.dtype is not table.a[0].dtype:
                raise TypeError(f"{op}: expected {name} in a[0]'s dtype {table.a[0].dtype}, got {pool.dtype}")
            check_device(op, name, pool, device)
        if a.dim() != 2 or a.shape[1] != k:
            raise ValueError(f"{op}: expected a[{j}] of shape (rows, {k}), got {tuple(a.shape)}")
        if b.dim() != 2 or b.shape[0] != a.shape[0]:
            raise ValueError(
                f"{op}: expected b[{j}] of shape ({a.shape[0]}, out_features of the slice), "
                f"got {tuple(b.shape)}"
            )
        if width < 0:
            raise ValueError(f"{op}: expected widths of 0 or more, got {width}")


def check_adapters(op: str, table: Adapters, m: int, k: int, n: int, device: torch.device) -> int:
    """All of them beside m rows, k in_features, n out_features. Returns the columns of u and v."""
    _check_pools(op, table, k, device)
    slices = len(table.widths)
    if table.out_features != n:
        raise ValueError(
            f"{op}: expected pools b of {n} columns together, got {[t.shape[1] for t in table.b]}"
        )
    check_dtype(op, "entries", table.entries, torch.int32)
    check_dtype(op, "scaling", table.scaling, torch.float32)
    check_dtype(op, "order", table.order, torch.int32)
    check_dtype(op, "segments", table.segments, torch.int32)
    for name in ("entries", "scaling", "order", "segments"):
        check_device(op, name, getattr(table, name), device)
    if table.entries.dim() != 2 or slices != 1:
        if table.entries.dim() != 3:
            raise ValueError(
                f"{op}: expected entries of shape ({slices}, capacity, 2), got {tuple(table.entries.shape)}"
            )
        shape: tuple[int, ...] = (slices, table.capacity, 2)
    else:
        shape = (table.capacity, 2)
    check_shape(op, "entries", table.entries, shape, "slices, capacity, {{first row, rank}}")
    check_shape(op, "scaling", table.scaling, shape[:-1], "as entries")
    check_shape(op, "order", table.order, (m,), "one a row")
    rows = segment_rows(m, table.capacity)
    check_shape(op, "segments", table.segments, (rows, 2), "min(rows, capacity) + 1 of {{slot, first}}")
    return sum(table.widths)


def check_wide(op: str, name: str, t: Tensor) -> tuple[int, int]:
    """x, dy or y: (..., features). Returns (rows, features)."""
    check_float(op, name, t)
    if t.dim() < 1:
        raise ValueError(f"{op}: expected {name} of shape (..., features), got a 0-dimensional tensor")
    return prod(t.shape[:-1]), t.shape[-1]


def check_beside(op: str, name: str, t: Tensor, x_name: str, x: Tensor) -> tuple[int, int]:
    """Another one with the rows, dtype and device of `x`."""
    rows, features = check_wide(op, name, t)
    if t.dtype is not x.dtype:
        raise TypeError(f"{op}: expected {name} in {x_name}'s dtype {x.dtype}, got {t.dtype}")
    check_device(op, name, t, x.device)
    check_shape(op, name, t, (*x.shape[:-1], features), "{}'s rows", x_name)
    return rows, features


def check_written(op: str, name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise ValueError(
            f"{op}: expected {name} contiguous, as it is written in place, got strides {t.stride()}"
        )


def check_narrow_rows(op: str, name: str, t: Tensor, x_name: str, x: Tensor, rows: int, width: int) -> None:
    if t.dtype is not x.dtype:
        raise TypeError(f"{op}: expected {name} in {x_name}'s dtype {x.dtype}, got {t.dtype}")
    check_device(op, name, t, x.device)
    check_shape(op, name, t, (rows, width), "{}'s rows, the sum of widths", x_name)


# --- what a kernel has refused ----------------------------------------------------------------------------


def raise_bad_slot(op: str, slots: Tensor, capacity: int) -> NoReturn:
    flat = slots.reshape(-1)
    bad = int(((flat < -1) | (flat >= capacity)).to(torch.uint8).argmax())
    raise ValueError(
        f"{op}: expected slots in -1 .. {capacity - 1}, got {int(flat[bad])} at position {bad} "
        f"of {flat.numel()}"
    )


def raise_bad_adapters(op: str, table: Adapters) -> NoReturn:
    """Names what in the values of a table or a routing would lead a kernel astray."""
    entries = table.entries.reshape(len(table.widths), table.capacity, 2).tolist()
    for j, width in enumerate(table.widths):
        rows = table.a[j].shape[0]
        for slot, (first, rank) in enumerate(entries[j]):
            if rank < 0 or rank > width:
                raise ValueError(
                    f"{op}: expected entries of a rank in 0 .. {width}, got {rank} for slot {slot}"
                )
            if rank and not 0 <= first <= rows - rank:
                raise ValueError(
                    f"{op}: expected entries inside a pool of {rows} rows, got first {first}, rank {rank} "
                    f"for slot {slot}"
                )
    order = table.order.tolist()
    seen: set[int] = set()
    for position, row in enumerate(order):
        if not 0 <= row < len(order) or row in seen:
            raise ValueError(
                f"{op}: expected order to be a permutation of {len(order)} rows, got {row} "
                f"at position {position}"
            )
        seen.add(row)
    raise ValueError(
        f"{op}: expected segments as lora_route makes them, slots and first positions ascending, then "
        f"{{-1, routed rows}} to the end, got {table.segments.tolist()[:16]}"
    )
