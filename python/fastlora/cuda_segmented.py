"""The CUDA half of many adapters in one batch: ``lora_route``, ``segmented_lora*``, ``nf4_multi_lora_*``.

What is routed where is known on the device only; sizes of launches come from m and the capacity, so that
nothing waits, and a captured graph follows slots, entries, scales and pools that are rewritten in place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import cuda, cuda_linear
from .checks import DTYPE_CODE, Packed
from .cuda import Device


class Table(NamedTuple):
    """The adapters of a call and its routing, as the ops take them; pools may be the outputs da, db."""

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    entries: Tensor
    scaling: Tensor
    order: Tensor
    segments: Tensor
    widths: Sequence[int]


def _pools(device: Device, pools: Sequence[Tensor]) -> list[Tensor | None]:
    return [*pools, *[None] * (device.kernels.most_slices - len(pools))]


def _routing(t: Table) -> tuple[Tensor, ...]:
    return t.entries, t.scaling, t.order, t.segments


def _sizes(t: Table) -> list[int]:
    """As bindings_cuda.cpp reads them."""
    sizes = [t.order.shape[0], t.segments.shape[0], t.entries.shape[-2], len(t.a), DTYPE_CODE[t.a[0].dtype]]
    for b, width in zip(t.b, t.widths, strict=True):
        sizes += [b.shape[0], b.shape[1], width]
    return sizes


def _run(
    device: Device, kernel: str, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None],
    *numbers: float,
) -> int:  # fmt: skip
    status = cuda_linear.run_with_scratch(device, kernel, inputs, outputs, *numbers)
    assert status is not None
    return status


def route(device: Device, slots: Tensor, capacity: int, order: Tensor, segments: Tensor) -> int:
    """With FASTLORA_DEBUG=1 slots are checked, which waits for the device."""
    if os.environ.get("FASTLORA_DEBUG") == "1" and not device.capturing():
        flat = slots.reshape(-1)
        outside = (flat < -1) | (flat >= capacity)
        if bool(outside.any()):
            where = int(outside.int().argmax())
            raise ValueError(
                f"lora_route: expected slots in -1 .. {capacity - 1}, got {int(flat[where])} "
                f"at position {where} of {flat.numel()}"
            )
    return _run(
        device, "lora_route", (slots,), (order, segments), slots.dtype is torch.int64, slots.numel(), capacity
    )


def _products(
    device: Device, kernel: str, x: Tensor, table: Table, y: Tensor, u: Tensor, k: int, n: int,
    batch_invariant: bool,
) -> int:  # fmt: skip
    if not cuda.rows(x):
        return 0
    return _run(
        device, kernel, (x, *_pools(device, table.a), *_pools(device, table.b), *_routing(table)), (y, u),
        *_sizes(table), k, n, DTYPE_CODE[x.dtype], batch_invariant,
    )  # fmt: skip


def segmented_lora(
    device: Device, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], entries: Tensor, scaling: Tensor,
    order: Tensor, segments: Tensor, widths: Sequence[int], y: Tensor, u: Tensor,
    *, batch_invariant: bool = False,
) -> int:  # fmt: skip
    """u; and y, which its term is added to."""
    table = Table(a, b, entries, scaling, order, segments, widths)
    k, n = x.shape[-1], y.shape[-1]
    return _products(device, "segmented_lora", x, table, y, u, k, n, batch_invariant)


def segmented_lora_grad_input(
    device: Device, dy: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], entries: Tensor, scaling: Tensor,
    order: Tensor, segments: Tensor, widths: Sequence[int], dx: Tensor, v: Tensor,
    *, batch_invariant: bool = False,
) -> int:  # fmt: skip
    """v; and dx, which its term is added to."""
    table = Table(a, b, entries, scaling, order, segments, widths)
    k, n = dx.shape[-1], dy.shape[-1]
    return _products(device, "segmented_lora_grad_input", dy, table, dx, v, k, n, batch_invariant)


def segmented_lora_grad_pools(
    device: Device, x: Tensor, dy: Tensor, u: Tensor, v: Tensor, a: Sequence[Tensor], b: Sequence[Tensor],
    entries: Tensor, scaling: Tensor, order: Tensor, segments: Tensor, widths: Sequence[int],
    da: Sequence[Tensor], db: Sequence[Tensor],
) -> int:  # fmt: skip
    table = Table(a, b, entries, scaling, order, segments, widths)
    return _run(
        device, "segmented_lora_grad_pools", (x, dy, u, v, *_routing(table)),
        (*_pools(device, da), *_pools(device, db)), *_sizes(table), x.shape[-1], dy.shape[-1],
        DTYPE_CODE[x.dtype],
    )  # fmt: skip


# --- beside the base product --------------------------------------------------------------------------------


def _fused(
    device: Device, kernel: str, inputs: Sequence[Tensor | None], table: Table, outputs: Sequence[Tensor],
    k: int, n: int, blocksize: int, batch_invariant: bool, *, apart: bool,
) -> int | None:  # fmt: skip
    """None: no kernel takes the call."""
    x = inputs[0]
    assert x is not None
    if batch_invariant and x.dtype is torch.float32:
        raise TypeError(
            f"{kernel}: expected bfloat16 or float16 with batch_invariant on CUDA, got {x.dtype}, whose "
            "product is torch's"
        )
    if apart or not (cuda.rows(x) and k and n):
        return None
    return cuda_linear.run_with_scratch(
        device, kernel, (*inputs, *_pools(device, table.a), *_pools(device, table.b), *_routing(table)),
        outputs, *_sizes(table), k, n, blocksize, DTYPE_CODE[x.dtype], batch_invariant,
        cuda_linear.current_route(),
    )  # fmt: skip


def multi_linear(
    device: Device, x: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, blocksize: int,
    bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor], entries: Tensor, scaling: Tensor,
    order: Tensor, segments: Tensor, widths: Sequence[int], batch_invariant: bool, offsets: Tensor | None,
    y: Tensor, u: Tensor,
) -> int:  # fmt: skip
    """y and u. Where no kernel is fused, y is rounded once more, between the product and the term."""
    weight: Packed = (packed, scales, nested, blocksize, offsets)
    table = Table(a, b, entries, scaling, order, segments, widths)
    status = _fused(
        device, "nf4_multi_lora_linear", (x, *cuda.parts(weight), bias), table, (y, u), x.shape[-1],
        packed.shape[0], blocksize, batch_invariant, apart=offsets is not None,
    )  # fmt: skip
    if status is not None:
        return status
    status = cuda_linear.linear(device, x, weight, bias, None, None, None, 1.0, y)
    if status:
        return status
    return segmented_lora(
        device, x, a, b, entries, scaling, order, segments, widths, y, u, batch_invariant=batch_invariant
    )


def multi_grad_input(
    device: Device, dy: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, in_features: int,
    blocksize: int, a: Sequence[Tensor], b: Sequence[Tensor], entries: Tensor, scaling: Tensor, order: Tensor,
    segments: Tensor, widths: Sequence[int], batch_invariant: bool, offsets: Tensor | None, dx: Tensor,
    v: Tensor,
) -> int:  # fmt: skip
    """dx and v, as multi_linear has y and u."""
    weight: Packed = (packed, scales, nested, blocksize, offsets)
    table = Table(a, b, entries, scaling, order, segments, widths)
    status = _fused(
        device, "nf4_multi_lora_grad_input", (dy, *cuda.parts(weight)), table, (dx, v), in_features,
        packed.shape[0], blocksize, batch_invariant, apart=offsets is not None,
    )  # fmt: skip
    if status is not None:
        return status
    status = cuda_linear.grad_input(device, dy, None, weight, in_features, None, None, 1.0, dx, None, None)
    if status:
        return status
    return segmented_lora_grad_input(
        device, dy, a, b, entries, scaling, order, segments, widths, dx, v, batch_invariant=batch_invariant
    )
