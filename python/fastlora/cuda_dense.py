"""The layer's products by torch, over W dequantised in slabs: for many rows of x, and where no kernel of ours
takes the call. A slab is small enough to stay in the L2 cache from the launch that writes it to the product
that reads it. It is some rows of W forward and some columns of it backward, so that no sum passes from one
slab to the next:

    y[:, slab]  = x·W[slab]ᵀ + u·(s·B[slab])ᵀ + bias[slab]
    dx[:, slab] = dy·W[:, slab] + v·A[:, slab]

In bfloat16 and float16 the low-rank term and the bias are part of the contraction, so that a result is
rounded once and written once:

    y[:, slab]  = [x | 0 | u | 1 | 0] · [W[slab] | 0 | s·B[slab] | bias[slab] | 0]ᵀ
    dx[:, slab] = [dy | 0 | v | 0] · [W[:, slab] ; 0 ; A[:, slab] ; 0]

The widened x and dy are written by the thin products that read them anyway (cuda_linear.py), a widened slab
by the launch that dequantises it. In float32 the term is a product of its own, which the large one is added
to: there its rounding is small.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from . import cuda
from .checks import DTYPE_CODE, Packed
from .cuda import Device

# About so much of W at a time: little enough that a slab, and the tiles of x beside it, stay in the L2 cache
# of a large device (50 MB); and at most so much, where less would be a product that leaves processors idle.
# Guesses, not yet measured.
_SLAB_BYTES, _MOST_BYTES = 16 << 20, 48 << 20
_TILE_ROWS, _TILE_COLUMNS = 128, 256  # of a library's product, that a processor takes at a time


@contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """Torch's operators as they are: no gradients, no autocast."""
    with torch.no_grad(), no_autocast(device):
        yield


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Not a generator: torch 2.6 traces none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def wide_room(device: Device, t: Tensor, r: int, *, ones: bool = False) -> Tensor | None:
    """Room for the rows of `t`, widened by r ranks and a column of ones as csrc/include/fastlora/cuda.h has
    it. None: the low-rank term is no part of the contraction."""
    if t.dtype is torch.float32 or not (r and t.numel()):
        return None
    size = device.kernels.wide_size(t.shape[-1], r, ones)
    return torch.empty(cuda.rows(t), size, dtype=t.dtype, device=t.device)


def widen(device: Device, x: Tensor, u: Tensor, ones: bool, wide: Tensor) -> None:
    """x widened by a u that was given: with dropout, where no product of ours reads x."""
    k, r = x.shape[-1], u.shape[-1]
    at = device.kernels.wide_rank_at(k)
    with plain_torch(x.device):
        wide[:, :k].copy_(x.reshape(-1, k))
        wide[:, k:].zero_()
        wide[:, at : at + r].copy_(u.reshape(-1, r))
        if ones:
            wide[:, at + r].fill_(1.0)


def _slab_size(m: int, total: int, other: int, itemsize: int, processors: int) -> int:
    """Rows, or columns, of `other` elements each, for a slab: multiples of 128, or all. As many as give every
    processor a tile of the m rows of x, or a multiple of that; and slabs are about equal, for a small one at
    the end would not fill the device."""
    bytes_of_one = max(1, other * itemsize)
    most = max(128, _SLAB_BYTES // bytes_of_one // 128 * 128)
    filled = _TILE_COLUMNS * max(1, processors // max(1, -(-m // _TILE_ROWS)))
    if filled * bytes_of_one <= _MOST_BYTES:
        most = filled * max(1, most // filled)
    slabs = max(1, -(-total // most))
    return min(total, -(-total // (128 * slabs)) * 128)


def _fill_slab(
    device: Device, weight: Packed, k: int, rows: tuple[int, int], columns: tuple[int, int], slab: Tensor,
    factor: Tensor | None, bias: Tensor | None, scaling: float, *, below: bool,
) -> int:  # fmt: skip
    """(first, count) rows and columns of W; beside them the factor and the bias, if there are any."""
    shape = (weight[0].shape[0], k, weight[3])
    if slab.dtype is torch.float32:
        assert factor is None
        return device.call(
            "nf4_dequantize", cuda.parts(weight), (slab,), DTYPE_CODE[slab.dtype], *shape, *rows, *columns
        )
    r = 0 if factor is None else factor.shape[0 if below else 1]
    lora_dtype = slab.dtype if factor is None else factor.dtype
    return device.call(
        "nf4_slab", (*cuda.parts(weight), factor, bias), (slab,), DTYPE_CODE[slab.dtype],
        DTYPE_CODE[lora_dtype], *shape, *rows, *columns, slab.stride(0), r, scaling, below,
    )  # fmt: skip


def _multiply(base: Tensor | None, left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = base + left·right. `out` may be some columns of a matrix, and `base` be `out`."""
    if base is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(base, left, right, out=out)


def linear(
    device: Device, x: Tensor, weight: Packed, bias: Tensor | None, lora_b: Tensor | None, u: Tensor | None,
    scaling: float, wide: Tensor | None, y: Tensor,
) -> int:  # fmt: skip
    """y, of u or of a widened x, which holds it."""
    m, n, k = cuda.rows(x), weight[0].shape[0], x.shape[-1]
    y = y.view(m, n)
    left, factor, beside = (x.reshape(m, k), None, None) if wide is None else (wide, lora_b, bias)
    apart = wide is None and u is not None and lora_b is not None
    with plain_torch(x.device):
        if apart:
            assert lora_b is not None
            assert u is not None
            _multiply(bias, u.reshape(m, lora_b.shape[1]), (lora_b * scaling).to(x.dtype).t(), y)
        step = _slab_size(m, n, k, x.element_size(), device.kernels.processors())
        room = torch.empty(step, left.shape[1], dtype=x.dtype, device=x.device)  # one for all: it is in L2
        for first in range(0, n, step or 1):
            count = min(step, n - first)
            slab, part = room[:count], y[:, first : first + count]
            status = _fill_slab(
                device, weight, k, (first, count), (0, k), slab, factor, beside, scaling, below=False
            )
            if status:
                return status
            base = None if bias is None or wide is not None else bias[first : first + count]
            _multiply(part if apart else base, left, slab.t(), part)
    return 0


def grad_input(
    device: Device, dy: Tensor, weight: Packed, k: int, lora_a: Tensor | None, v: Tensor | None,
    wide: Tensor | None, dx: Tensor,
) -> int:  # fmt: skip
    """dx, of v or of a widened dy, which holds it."""
    m, n = cuda.rows(dy), weight[0].shape[0]
    dx = dx.view(m, k)
    left, factor = (dy.reshape(m, n), None) if wide is None else (wide, lora_a)
    apart = wide is None and v is not None and lora_a is not None
    inner, aligned = left.shape[1], 1 if dy.dtype is torch.float32 else 8
    with plain_torch(dy.device):
        if apart:
            assert lora_a is not None
            assert v is not None
            _multiply(None, v.reshape(m, lora_a.shape[0]), lora_a.to(dy.dtype), dx)
        step = _slab_size(m, k, n, dy.element_size(), device.kernels.processors())
        room = torch.empty(inner * -(-step // aligned) * aligned, dtype=dy.dtype, device=dy.device)
        for first in range(0, k, step or 1):
            count = min(step, k - first)
            stride = -(-count // aligned) * aligned  # rows of whole vectors, however many columns are in them
            slab, part = room[: inner * stride].view(inner, stride), dx[:, first : first + count]
            status = _fill_slab(
                device, weight, k, (0, n), (first, count), slab, factor, None, 1.0, below=True
            )
            if status:
                return status
            _multiply(part if apart else None, left, slab[:, :count], part)
    return 0
