"""The CUDA half of the layer's ops: ``nf4_linear*``, the thin products of backward, ``lora_dropout``.

Which kernels a call takes is decided in csrc/cuda/nf4_linear_plan.cu; nf4_linear.cu says how much scratch
it wants, or that it has no kernel for the call (many rows of x, or float32): then torch multiplies
(cuda_dense.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import cuda, cuda_dense, cuda_offsets
from .checks import DTYPE_CODE, Packed
from .cuda import Device
from .cuda_dense import plain_torch

ROUTES = {"auto": -1, "dense": 0, "decode": 1, "tile": 2, "warpgroup": 3}
_DENSE = -1  # instead of a size of scratch

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


def current_route() -> int:
    return _route


def run_with_scratch(
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


# --- the thin products --------------------------------------------------------------------------------------


def project(
    device: Device, x: Tensor, lora_a: Tensor, u: Tensor | None, wide: Tensor | None, ones: bool
) -> int:
    """u = x·lora_aᵀ; and x widened by it, for which u need not be kept."""
    m, k, r = cuda.rows(x), x.shape[-1], lora_a.shape[0]
    if wide is None and (x.dtype is torch.float32 or not (x.numel() and r)):
        assert u is not None
        with plain_torch(x.device):
            torch.mm(x.reshape(m, k), lora_a.to(x.dtype).t(), out=u.view(m, r))
        return 0
    return device.call(
        "lora_project", (x, lora_a), (u, wide), ones, m, k, r, DTYPE_CODE[x.dtype], DTYPE_CODE[lora_a.dtype]
    )


def gradients(
    device: Device,
    tall: Tensor,
    small: Tensor | None,
    factor: Tensor | None,
    product: Tensor | None,
    gram: Tensor | None,
    scaling: float,
    *,
    wide: Tensor | None = None,
    rank_major: bool = False,
) -> int:
    """product = scaling·tall·factor and gram = scaling·tallᵀ·small (its transpose with `rank_major`), either
    or both, in one pass over tall (..., width); and tall widened by the product."""
    width, m = tall.shape[-1], cuda.rows(tall)
    lora_dtype = (gram if factor is None else factor).dtype  # type: ignore[union-attr]
    r = (small if factor is None else factor).shape[-1]  # type: ignore[union-attr]
    if tall.dtype is torch.float32 or not (m and width and r):
        with plain_torch(tall.device):
            rows = tall.reshape(m, width)
            if product is not None and factor is not None:
                torch.mm(rows, factor.to(tall.dtype), out=product.view(m, r)).mul_(scaling)
            if gram is not None and small is not None:
                result = torch.mm(rows.t(), small.reshape(m, r)).mul_(scaling)
                gram.copy_(result.t() if rank_major else result)
        return 0
    status = run_with_scratch(
        device, "lora_gradients", (tall, small, factor), (product, gram, wide), m, width, r, scaling,
        rank_major, DTYPE_CODE[tall.dtype], DTYPE_CODE[lora_dtype],
    )  # fmt: skip
    assert status is not None
    return status


def grad_b(
    device: Device, dy: Tensor, u: Tensor, lora_b: Tensor, scaling: float, v: Tensor, db: Tensor
) -> int:
    return gradients(device, dy, u, lora_b, v, db, scaling)


def grad_a(device: Device, v: Tensor, x: Tensor, dtype: torch.dtype, da: Tensor) -> int:
    return gradients(device, x, v, None, None, da, 1.0, rank_major=True)


# --- the fused products -------------------------------------------------------------------------------------


def linear(
    device: Device, x: Tensor, weight: Packed, bias: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, u: Tensor | None, scaling: float, y: Tensor, gain: Tensor | None = None,
) -> int:  # fmt: skip
    """y. lora_a None, lora_b given: u is an input; else u, if it is given, is written too."""
    if weight[4] is not None:
        return cuda_offsets.linear(device, x, weight, bias, lora_a, lora_b, u, scaling, y, gain)
    m, n, k = cuda.rows(x), weight[0].shape[0], x.shape[-1]
    r = 0 if lora_b is None else lora_b.shape[1]
    if not r:
        lora_a = lora_b = u = None
    if not m:
        return 0
    status = None
    if n and k:
        status = run_with_scratch(
            device, "nf4_linear", (x, *cuda.parts(weight), bias, lora_a, lora_b, gain), (u, y), m, n, k, r,
            weight[3], scaling, DTYPE_CODE[x.dtype],
            DTYPE_CODE[x.dtype if lora_b is None else lora_b.dtype], _route,
        )  # fmt: skip
    if status is not None:
        return status
    if gain is not None:  # which torch's product knows nothing of
        status = linear(device, x, weight, None, lora_a, lora_b, u, scaling, y)
        y.mul_(gain)
        if bias is not None:
            y.add_(bias)
        return status
    ones = bias is not None
    wide = cuda_dense.wide_room(device, x, r, ones=ones)
    if lora_a is not None:
        if u is None and wide is None:
            u = torch.empty(*x.shape[:-1], r, dtype=x.dtype, device=x.device)
        status = project(device, x, lora_a, u, wide, ones)
        if status:
            return status
    elif wide is not None:
        assert u is not None
        cuda_dense.widen(device, x, u, ones, wide)
    return cuda_dense.linear(device, x, weight, bias, lora_b, u, scaling, wide, y)


def grad_input(
    device: Device, dy: Tensor, u: Tensor | None, weight: Packed, k: int, lora_a: Tensor | None,
    lora_b: Tensor | None, scaling: float, dx: Tensor, v: Tensor | None, db: Tensor | None,
) -> int:  # fmt: skip
    """dx and v; and db, with u."""
    if weight[4] is not None:
        return cuda_offsets.grad_input(device, dy, u, weight, k, lora_a, lora_b, scaling, dx, v, db)
    m, n = cuda.rows(dy), weight[0].shape[0]
    r = 0 if lora_a is None else lora_a.shape[0]
    if not r:
        lora_a = lora_b = v = u = db = None
    status = None
    if m and n and k:
        status = run_with_scratch(
            device, "nf4_linear_grad_input", (dy, *cuda.parts(weight), lora_a, lora_b, u), (v, db, dx),
            m, n, k, r, weight[3], scaling, DTYPE_CODE[dy.dtype],
            DTYPE_CODE[dy.dtype if lora_a is None else lora_a.dtype], _route,
        )  # fmt: skip
    if status is not None:
        return status
    wide = cuda_dense.wide_room(device, dy, r)
    if lora_b is not None:
        status = gradients(device, dy, u, lora_b, v, db, scaling, wide=wide)
        if status:
            return status
    return cuda_dense.grad_input(device, dy, weight, k, lora_a, v, wide, dx)


def dropout(device: Device, x: Tensor, seed: Tensor, p: float, out: Tensor) -> int:
    return device.call("lora_dropout", (x, seed), (out,), x.numel(), p, DTYPE_CODE[x.dtype])
