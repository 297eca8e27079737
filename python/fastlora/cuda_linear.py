"""The CUDA half of the layer's ops: ``nf4_linear*``, the thin products of backward, ``lora_dropout``.

Which kernels a call takes is decided in csrc/cuda/nf4_linear.cu, which says how much scratch it wants, or
that it has no kernel for the call (many rows of x, or float32). Then W is dequantised in slabs small enough
to stay in the L2 cache, and torch multiplies:

    y[:, slab]  = u·(s·B[slab])ᵀ + bias[slab] + x·W[slab]ᵀ
    dx[:, slab] = v·A[:, slab] + dy·W[:, slab]

Slabs are rows of W forward and columns of it backward, so that no sum passes from one slab to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from . import cuda
from .checks import DTYPE_CODE, Packed
from .cuda import Device

ROUTES = {"auto": -1, "dense": 0, "decode": 1, "tile": 2, "warpgroup": 3}
_DENSE = -1  # instead of a size of scratch
_SLAB_BYTES = 16 << 20

_route = ROUTES["auto"]


@contextmanager
def use_route(name: str) -> Iterator[None]:
    """For tests and benchmarks: calls inside take this route where it can take them."""
    global _route  # noqa: PLW0603
    previous, _route = _route, ROUTES[name]
    try:
        yield
    finally:
        _route = previous


def _run(
    device: Device,
    kernel: str,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    *numbers: float,
) -> int | None:
    """A kernel with scratch; None: it has no way to do this call."""
    size = device.ask(f"{kernel}_scratch", inputs, (*outputs, None), *numbers)
    if size == _DENSE:
        return None
    scratch = None
    if size:
        first = next(t for t in inputs if t is not None)
        scratch = torch.empty(size, dtype=torch.uint8, device=first.device)
    return device.call(kernel, inputs, (*outputs, scratch), *numbers)


def _weight(weight: Packed) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What kernels read of a weight: its scales at whole addresses, and the dynamic map."""
    packed, scales, nested, _ = weight
    nested = None if nested is None else cuda.whole(nested)
    return packed, cuda.whole(scales), nested, cuda.dynamic_map(packed.device)


def _rows(x: Tensor) -> int:
    return prod(x.shape[:-1])


# --- torch's products ---------------------------------------------------------------------------------------


@contextmanager
def _plain_torch(device: torch.device) -> Iterator[None]:
    """Torch's operators as they are: no gradients, no autocast."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _slabs(total: int, other: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """(first, count) of as many rows, or columns, as a slab has room for: whole multiples of 128."""
    step = max(128, _SLAB_BYTES // max(1, other * itemsize) // 128 * 128)
    for first in range(0, total, step):
        yield first, min(step, total - first)


def _dequantize(
    device: Device, weight: Packed, k: int, rows: tuple[int, int], columns: tuple[int, int], out: Tensor
) -> int:
    return device.call(
        "nf4_dequantize", _weight(weight), (out,), DTYPE_CODE[out.dtype], weight[0].shape[0], k, weight[3],
        *rows, *columns,
    )  # fmt: skip


def _add_product(out: Tensor, started: bool, a: Tensor, b: Tensor) -> None:
    """out = a·b, added to what is there if `started`. `out` may be some columns of a matrix."""
    if started:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def _dense_linear(
    device: Device, x: Tensor, weight: Packed, bias: Tensor | None, lora_b: Tensor | None, u: Tensor | None,
    scaling: float, y: Tensor,
) -> int:  # fmt: skip
    n, k, dtype = weight[0].shape[0], x.shape[-1], x.dtype
    x, y = x.reshape(_rows(x), k), y.view(_rows(y), n)
    started = True
    if u is not None and lora_b is not None:
        small = u.reshape(x.shape[0], lora_b.shape[1])
        factor = (lora_b * scaling).to(dtype).t()
        if bias is None:
            torch.mm(small, factor, out=y)
        else:
            torch.addmm(bias, small, factor, out=y)
    elif bias is not None:
        y.copy_(bias.expand_as(y))
    else:
        started = False
    for first, count in _slabs(n, k, x.element_size()):
        slab = torch.empty(count, k, dtype=dtype, device=x.device)
        status = _dequantize(device, weight, k, (first, count), (0, k), slab)
        if status:
            return status
        _add_product(y[:, first : first + count], started, x, slab.t())
    return 0


def _dense_grad_input(
    device: Device, dy: Tensor, weight: Packed, k: int, lora_a: Tensor | None, v: Tensor | None, dx: Tensor
) -> int:
    n, dtype = weight[0].shape[0], dy.dtype
    dy, dx = dy.reshape(_rows(dy), n), dx.view(_rows(dx), k)
    low_rank = lora_a is not None and v is not None
    if low_rank:
        assert lora_a is not None
        assert v is not None
        torch.mm(v.reshape(dy.shape[0], lora_a.shape[0]), lora_a.to(dtype), out=dx)
    for first, count in _slabs(k, n, dy.element_size()):
        slab = torch.empty(n, count, dtype=dtype, device=dy.device)
        status = _dequantize(device, weight, k, (0, n), (first, count), slab)
        if status:
            return status
        _add_product(dx[:, first : first + count], low_rank, dy, slab)
    return 0


# --- the thin products --------------------------------------------------------------------------------------


def project(device: Device, x: Tensor, lora_a: Tensor, u: Tensor) -> int:
    """u = x·lora_aᵀ"""
    k, r = x.shape[-1], lora_a.shape[0]
    if x.dtype is torch.float32 or not k or not u.numel():
        with _plain_torch(x.device):
            torch.mm(x.reshape(_rows(x), k), lora_a.to(x.dtype).t(), out=u.view(_rows(x), r))
        return 0
    return device.call(
        "lora_project", (x, lora_a), (u,), _rows(x), k, r, DTYPE_CODE[x.dtype], DTYPE_CODE[lora_a.dtype]
    )


def _gradients(
    device: Device,
    tall: Tensor,
    small: Tensor | None,
    factor: Tensor | None,
    product: Tensor | None,
    gram: Tensor | None,
    scaling: float,
    *,
    rank_major: bool = False,
) -> int:
    """product = scaling·tall·factor and gram = scaling·tallᵀ·small (its transpose with `rank_major`), either
    or both, in one pass over tall (..., width)."""
    width, m = tall.shape[-1], _rows(tall)
    lora_dtype = (gram if factor is None else factor).dtype  # type: ignore[union-attr]
    r = (small if factor is None else factor).shape[-1]  # type: ignore[union-attr]
    if tall.dtype is torch.float32 or not (m and width and r):
        with _plain_torch(tall.device):
            rows = tall.reshape(m, width)
            if product is not None and factor is not None:
                torch.mm(rows, factor.to(tall.dtype), out=product.view(m, r)).mul_(scaling)
            if gram is not None and small is not None:
                result = torch.mm(rows.t(), small.reshape(m, r)).mul_(scaling)
                gram.copy_(result.t() if rank_major else result)
        return 0
    status = _run(
        device, "lora_gradients", (tall, small, factor), (product, gram), m, width, r, scaling, rank_major,
        DTYPE_CODE[tall.dtype], DTYPE_CODE[lora_dtype],
    )  # fmt: skip
    assert status is not None
    return status


def grad_b(
    device: Device, dy: Tensor, u: Tensor, lora_b: Tensor, scaling: float, v: Tensor, db: Tensor
) -> int:
    return _gradients(device, dy, u, lora_b, v, db, scaling)


def grad_a(device: Device, v: Tensor, x: Tensor, dtype: torch.dtype, da: Tensor) -> int:
    return _gradients(device, x, v, None, None, da, 1.0, rank_major=True)


# --- the fused products -------------------------------------------------------------------------------------


def linear(
    device: Device, x: Tensor, weight: Packed, bias: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, u: Tensor | None, scaling: float, y: Tensor,
) -> int:  # fmt: skip
    """y. lora_a None, lora_b given: u is an input; else u, if it is given, is written too."""
    m, n, k = _rows(x), weight[0].shape[0], x.shape[-1]
    r = 0 if lora_b is None else lora_b.shape[1]
    if not r:
        lora_a = lora_b = u = None
    if not m:
        return 0
    status = None
    if n and k:
        status = _run(
            device, "nf4_linear", (x, *_weight(weight), bias, lora_a, lora_b), (u, y), m, n, k, r, weight[3],
            scaling, DTYPE_CODE[x.dtype], DTYPE_CODE[x.dtype if lora_b is None else lora_b.dtype], _route,
        )  # fmt: skip
    if status is not None:
        return status
    if lora_a is not None:
        if u is None:
            u = torch.empty(*x.shape[:-1], r, dtype=x.dtype, device=x.device)
        status = project(device, x, lora_a, u)
        if status:
            return status
    with _plain_torch(x.device):
        return _dense_linear(device, x, weight, bias, lora_b, u, scaling, y)


def grad_input(
    device: Device, dy: Tensor, u: Tensor | None, weight: Packed, k: int, lora_a: Tensor | None,
    lora_b: Tensor | None, scaling: float, dx: Tensor, v: Tensor | None, db: Tensor | None,
) -> int:  # fmt: skip
    """dx and v; and db, with u."""
    m, n = _rows(dy), weight[0].shape[0]
    r = 0 if lora_a is None else lora_a.shape[0]
    if not r:
        lora_a = lora_b = v = u = db = None
    status = None
    if m and n and k:
        status = _run(
            device, "nf4_linear_grad_input", (dy, *_weight(weight), lora_a, lora_b, u), (v, db, dx),
            m, n, k, r, weight[3], scaling, DTYPE_CODE[dy.dtype],
            DTYPE_CODE[dy.dtype if lora_a is None else lora_a.dtype], _route,
        )  # fmt: skip
    if status is not None:
        return status
    if lora_b is not None:
        status = _gradients(device, dy, u, lora_b, v, db, scaling)
        if status:
            return status
    with _plain_torch(dy.device):
        return _dense_grad_input(device, dy, weight, k, lora_a, v, dx)


def dropout(device: Device, x: Tensor, seed: Tensor, p: float, out: Tensor) -> int:
    return device.call("lora_dropout", (x, seed), (out,), x.numel(), p, DTYPE_CODE[x.dtype])
