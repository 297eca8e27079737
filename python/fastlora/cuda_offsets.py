"""A weight with offsets on CUDA: they are a low-rank term, and run as one in the kernels of cuda_linear.py.

    y  = x·Wᵀ + [u | sums]·[s·B | O]ᵀ + bias       sums (m, groups): those of x over each group of columns
    dx = dy·W + [v | dy·O]·[A ; P]                 P (groups, k): 1 where a column is of a group, else 0

B and O (n, groups) are joined at each call: an adapter that learns is another at the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda, cuda_linear
from .checks import Packed, group_count, whole
from .cuda import Device
from .cuda_dense import plain_torch


def _values(weight: Packed) -> Tensor:
    assert weight[4] is not None
    return whole(weight[4]).view(torch.float32)


def _joined(scaling: float, lora_b: Tensor | None, offsets: Tensor) -> Tensor:
    return offsets if lora_b is None else torch.cat((lora_b.float() * scaling, offsets), dim=1)


def linear(
    device: Device, x: Tensor, weight: Packed, bias: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, u: Tensor | None, scaling: float, y: Tensor, gain: Tensor | None,
) -> int:  # fmt: skip
    """As cuda_linear.linear."""
    m, k, groups = cuda.rows(x), x.shape[-1], group_count(weight[4])
    if lora_a is not None and lora_a.shape[0]:
        if u is None:
            u = torch.empty(*x.shape[:-1], lora_a.shape[0], dtype=x.dtype, device=x.device)
        status = cuda_linear.project(device, x, lora_a, u, None, ones=False)
        if status:
            return status
    with plain_torch(x.device):
        sums = x.reshape(m, groups, k // groups).sum(2, dtype=torch.float32).to(x.dtype)
        if lora_b is not None and lora_b.shape[1]:
            assert u is not None
            sums = torch.cat((u.reshape(m, lora_b.shape[1]), sums), dim=1)
        else:
            lora_b = None
        factor = _joined(scaling, lora_b, _values(weight))
    return cuda_linear.linear(device, x, (*weight[:4], None), bias, None, factor, sums, 1.0, y, gain)


def grad_input(
    device: Device, dy: Tensor, u: Tensor | None, weight: Packed, k: int, lora_a: Tensor | None,
    lora_b: Tensor | None, scaling: float, dx: Tensor, v: Tensor | None, db: Tensor | None,
) -> int:  # fmt: skip
    """As cuda_linear.grad_input."""
    m, groups = cuda.rows(dy), group_count(weight[4])
    r = 0 if lora_a is None else lora_a.shape[0]
    with plain_torch(dy.device):
        spread = torch.eye(groups, dtype=torch.float32, device=dy.device).repeat_interleave(k // groups, 1)
        if r and lora_a is not None:
            spread = torch.cat((lora_a.float(), spread))
        factor = _joined(scaling, lora_b if r else None, _values(weight))
        both = torch.empty(m, r + groups, dtype=dy.dtype, device=dy.device)
    status = cuda_linear.grad_input(
        device, dy, None, (*weight[:4], None), k, spread, factor, 1.0, dx, both, None
    )  # fmt: skip
    if status:
        return status
    if r and v is not None:
        v.view(m, r).copy_(both[:, :r])
    if r and db is not None and u is not None and lora_b is not None:
        return cuda_linear.gradients(device, dy, u, None, None, db, scaling)
    return 0
