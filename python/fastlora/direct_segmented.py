"""The short way to the kernels of many adapters, as in direct.py.

The ops take fifteen arguments, lists of tensors among them: the dispatcher, the checks and the hand-over
to C++ are 25 us a call, as long as the low-rank term of a few rows. What an AdapterTable holds needs no
check, and the kernels' own view of it is kept (:meth:`AdapterTable.view`); what is left is to look at x, y
and the routing. Every call that is not plain is left to the op: these answer None, having done nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _C, checks, isa
from .adapter_pairs import LowRank
from .checks import DTYPE_CODE, Packed
from .direct import unwatched
from .ops import ptr
from .routing import Routing

_PLAIN = (Tensor, nn.Parameter)


def _readable(t: Tensor | None, dtype: torch.dtype | None = None) -> bool:
    """Whether a kernel can read it where it is: contiguous, on a CPU, of no subclass, and with data."""
    if t is None:
        return True
    if type(t) not in _PLAIN or t.device.type != "cpu" or t.layout is not torch.strided:
        return False
    if (t.dtype not in DTYPE_CODE) if dtype is None else (t.dtype is not dtype):
        return False
    return t.is_contiguous() and not t.is_neg() and (t.data_ptr() != 0 or not t.numel())


def _batch(x: Tensor, low: LowRank, routing: Routing) -> tuple[Any, int, tuple[int, int, int]] | None:
    """The table as the kernels take it, the rows of x and the routing, where all of these are plain."""
    if low.view is None or not unwatched() or not _readable(x) or not x.dim() or not x.shape[-1]:
        return None
    _, order, segments, _ = routing
    m = x.numel() // x.shape[-1]
    if not _readable(order, torch.int32) or not _readable(segments, torch.int32) or order.shape != (m,):
        return None
    if (
        segments.dim() != 2
        or segments.shape[0] != min(m, low.entries.shape[-2]) + 1
        or segments.shape[1] != 2
    ):
        return None
    view = low.view()
    return None if view is None else (view, m, (order.data_ptr(), segments.data_ptr(), segments.shape[0]))


def segmented_lora(x: Tensor, low: LowRank, routing: Routing, y: Tensor) -> Tensor | None:
    """``segmented_lora``, where no gradient is wanted: y."""
    batch = _batch(x, low, routing)
    if batch is None or not _readable(y, x.dtype) or y.shape[:-1] != x.shape[:-1]:
        return None
    view, m, routed = batch
    if x.shape[-1] != low.a[0].shape[1] or y.shape[-1] != sum([t.shape[1] for t in low.b]):
        return None
    u = torch.empty(m, sum(low.widths), dtype=x.dtype)
    status = _C.segmented_lora(
        x.data_ptr(), y.data_ptr(), u.data_ptr(), m, x.shape[-1], view, *routed, DTYPE_CODE[x.dtype],
        torch.get_num_threads(), isa._current,
    )  # fmt: skip
    if status:
        return None
    torch.autograd.graph.increment_version(y)
    return y


def multi_linear(
    x: Tensor, weight: Packed, bias: Tensor | None, low: LowRank, routing: Routing, batch_invariant: bool
) -> Tensor | None:
    """``nf4_multi_lora_linear``, where no gradient is wanted."""
    batch = _batch(x, low, routing)
    packed, scales, nested, blocksize, offsets = weight
    parts = (packed, scales, nested, offsets)
    if batch is None or not all(_readable(t, torch.uint8) for t in parts) or not _readable(bias, x.dtype):
        return None
    view, m, routed = batch
    n, k = packed.shape[0], x.shape[-1]
    if (
        k != low.a[0].shape[1]
        or n != sum([t.shape[1] for t in low.b])
        or (bias is not None and bias.shape != (n,))
    ):
        return None
    checks.check_matrix("nf4_multi_lora_linear", packed)
    checks.check_weight("nf4_multi_lora_linear", weight, n, k, x.device)
    offsets = checks.whole(offsets)
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
    u = torch.empty(m, sum(low.widths), dtype=x.dtype)
    status = _C.nf4_multi_lora_linear(
        x.data_ptr(), packed.data_ptr(), scales.data_ptr(), ptr(nested), blocksize, ptr(offsets),
        checks.group_count(offsets), ptr(bias), y.data_ptr(), u.data_ptr(), m, n, k, view,
        *routed, batch_invariant, DTYPE_CODE[x.dtype], torch.get_num_threads(), isa._current,
    )  # fmt: skip
    return None if status else y
