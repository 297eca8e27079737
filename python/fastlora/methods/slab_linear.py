"""The layer of :mod:`modulora` in plain torch, over a weight that is dequantised a slab of rows at a time.

    forward     y[:, slab] = x·W[slab]ᵀ + s·u·B[slab]ᵀ + bias[slab]        u = dropout(x)·Aᵀ
    backward    dx = dropout'(v·A) + Σ over slabs of dy[:, slab]·W[slab]   v = s·dy·B
                dA = vᵀ·dropout(x),  dB = s·dyᵀ·u,  dbias = column sums of dy

Kept for backward: x where A learns, u where B learns, and the quantised tensors themselves, so that W is
never there in full. The mask of dropout is drawn again from its seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..autograd import _SEED_BOUND, _any_autocast, _autocast_is_on, _NoSecondDerivative, _rows
from ..cuda_dense import no_autocast
from ..ops_linear import product
from ..tiles import TILE
from .quantizers import QuantizedWeight

_grad_b = torch.ops.fastlora.lora_grad_b.default
_grad_a = torch.ops.fastlora.lora_grad_a.default
_dropout = torch.ops.fastlora.lora_dropout.default


def slab_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    elements: int = TILE,
) -> Tensor:
    """x·Wᵀ + scaling · dropout(x)·lora_aᵀ·lora_bᵀ + bias, as :func:`fastlora.nf4_linear` of any weight.

    elements: of W that are dequantised at a time, about. Differentiable once in x, bias, lora_a and lora_b.
    Raises TypeError for dtypes, ValueError for shapes and values, RuntimeError for devices.
    """
    if _any_autocast() and _autocast_is_on(x.device.type) and x.dtype in checks.DTYPE_CODE:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    n, k = weight.shape
    checks.check_activation("slab_linear", "x", x, k, "the weight's in_features")
    for name, part in weight.parts.items():
        checks.check_device("slab_linear", name, part, x.device)
    checks.check_lora("slab_linear", lora_a, lora_b, n, k, x.device)
    if bias is not None:
        bias = bias.to(x.dtype)
        checks.check_shape("slab_linear", "bias", bias, (n,), "out_features")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"slab_linear: expected dropout in [0, 1), got {dropout}")
    seed = None
    if dropout and lora_a is not None:
        seed = torch.randint(_SEED_BOUND, (1,), dtype=torch.int64, device=x.device)
    arguments = (x, bias, lora_a, lora_b, scaling * 1.0, seed, dropout * 1.0)  # as in autograd.py
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, lora_a, lora_b)):
        parts = weight.parts
        y = _SlabLinear.apply(
            *arguments, weight.quantizer, weight.shape, elements, tuple(parts), *parts.values()
        )
    else:
        y = _forward(*arguments, weight, elements)[0]
    return y


def _forward(
    x: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    seed: Tensor | None,
    dropout: float,
    weight: QuantizedWeight,
    elements: int,
) -> tuple[Tensor, Tensor | None]:
    """(y, u)"""
    dtype = x.dtype
    u = b = None
    with torch.no_grad(), no_autocast(x.device):
        if lora_a is not None and lora_b is not None:
            seen = _rows(x if seed is None else _dropout(x, seed, dropout))
            u = product(seen, lora_a.to(dtype).t(), dtype)
            b = (lora_b * scaling).to(dtype)
        left = _rows(x).to(_kind(x))
        y = x.new_empty(len(left), weight.shape[0])
        for rows, slab in weight.slabs(left.dtype, elements):
            part = product(left, slab.t(), torch.float32)
            if u is not None and b is not None:
                part += product(u, b[rows].t(), torch.float32)
            if bias is not None:
                part += bias[rows]
            y[:, rows] = part
    return y.view(*x.shape[:-1], weight.shape[0]), u


def _kind(x: Tensor) -> torch.dtype:
    """In which slabs are dequantised and multiplied: float16 on a CPU in float32, as `product` would anyway,
    but with x cast once and W rounded once less."""
    return torch.float32 if x.dtype is torch.float16 and x.device.type == "cpu" else x.dtype


class _SlabLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
        seed: Tensor | None,
        dropout: float,
        quantizer: Any,
        shape: tuple[int, int],
        elements: int,
        names: tuple[str, ...],
        *parts: Tensor,
    ) -> Tensor:
        weight = QuantizedWeight(quantizer, dict(zip(names, parts, strict=True)), shape)
        y, u = _forward(x, bias, lora_a, lora_b, scaling, seed, dropout, weight, elements)
        learns_a, learns_b = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        ctx.save_for_backward(x if learns_a else None, u if learns_b else None, lora_a, lora_b, seed, *parts)
        ctx.weight_is = quantizer, shape, elements, names
        ctx.numbers = scaling, dropout, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        args = (dy, ctx.needs_input_grad[:4], *ctx.weight_is, *ctx.numbers, *ctx.saved_tensors)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = _NoSecondDerivative.apply(_gradients, *args)
        else:
            gradients = _gradients(*args)
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - 4))


def _gradients(
    dy: Tensor,
    needs: tuple[bool, bool, bool, bool],
    quantizer: Any,
    shape: tuple[int, int],
    elements: int,
    names: tuple[str, ...],
    scaling: float,
    dropout: float,
    x_shape: torch.Size,
    x: Tensor | None,
    u: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    seed: Tensor | None,
    *parts: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dbias, dA, dB), None where not needed."""
    needs_x, needs_bias, needs_a, needs_b = needs
    dy = _rows(dy).contiguous()
    dtype = dy.dtype
    dx = dbias = da = db = v = None
    with torch.no_grad(), no_autocast(dy.device):
        if needs_b:
            v, db = _grad_b(dy, u, lora_b, scaling)
        elif lora_b is not None and (needs_a or needs_x):
            v = product(dy, lora_b.to(dtype), dtype).mul_(scaling)
        if needs_a:
            assert x is not None
            assert lora_a is not None
            seen = _rows(x if seed is None else _dropout(x, seed, dropout))
            da = _grad_a(v, seen, lora_a.dtype)
        if needs_bias:
            dbias = dy.sum(0)
        if needs_x:
            weight = QuantizedWeight(quantizer, dict(zip(names, parts, strict=True)), shape)
            # In float32: in 16 bits each slab would round the sum anew.
            total = dy.new_zeros(len(dy), shape[1], dtype=torch.float32)
            if v is not None and lora_a is not None:
                low = product(v, lora_a.to(dtype), dtype)
                total += low if seed is None else _dropout(low, seed, dropout)
            left = dy.to(_kind(dy))
            for rows, slab in weight.slabs(left.dtype, elements):
                total += product(left[:, rows], slab, torch.float32)
            dx = total.to(dtype).reshape(x_shape)
    return dx, dbias, da, db
