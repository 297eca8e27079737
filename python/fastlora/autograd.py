"""The differentiable fused layer.

    y  = x·Wᵀ + s·u·Bᵀ + bias      u = x·Aᵀ                         (one kernel)
    dx = dy·W + v·A                v = s·dy·B                       (one kernel)
    dA = vᵀ·x,  dB = s·dyᵀ·u,  dbias = column sums of dy            (thin GEMMs)

W is a constant: it gets no gradient and is never materialised. What forward keeps for backward is x (when A
learns), u (when B learns) and references to the weight's own tensors; a dropout mask is drawn again from its
seed. The ops know nothing of autograd, and a call in which nothing needs a gradient goes straight to them.

Low-rank adapters: Hu et al., "LoRA", 2021; on a 4-bit base: Dettmers et al., "QLoRA", 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import checks, direct
from .checks import Packed
from .nf4 import NF4Weight
from .ops_linear import product
from .sharded import check_whole, gathered

_linear = torch.ops.fastlora.nf4_linear.default
_linear_with_u = torch.ops.fastlora.nf4_linear_with_u.default
_linear_given_u = torch.ops.fastlora.nf4_linear_given_u.default
_grad_input = torch.ops.fastlora.nf4_linear_grad_input.default
_backward = torch.ops.fastlora.nf4_linear_backward.default
_grad_b = torch.ops.fastlora.lora_grad_b.default
_grad_a = torch.ops.fastlora.lora_grad_a.default
_dropout = torch.ops.fastlora.lora_dropout.default

# One question for all devices, where torch answers it; else each device is asked.
_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_SEED_BOUND = 2**62


def nf4_linear(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """y = x·Wᵀ + scaling · dropout(x)·lora_aᵀ·lora_bᵀ + bias, with W packed in NF4.

    Args:
        x: ``(..., k)``, float32, bfloat16 or float16, of any strides; under autocast it is cast to the
            autocast dtype first.
        weight: a matrix of ``(n, k)``; never gets a gradient.
        bias: ``(n,)`` in x's dtype, or None.
        lora_a, lora_b: ``(r, k)`` and ``(n, r)`` of one floating dtype, which may differ from x's (float32
            adapters under bfloat16 activations need no copies), or both None. DTensors are gathered; their
            gradients are the mean of the ranks', as in FSDP2.
        scaling: the factor of the low-rank term, alpha / r in LoRA.
        dropout: the probability in [0, 1) that an element of x is left out of the low-rank term, as PEFT does
            it. Applied whenever it is not 0: pass it in training only. The mask is a function of a seed drawn
            from torch's generator, so that checkpointing replays it; it is not stored.

    Returns ``(..., n)`` in x's dtype. Differentiable once in x, lora_a, lora_b and bias.

    Raises ValueError for shapes and values, TypeError for dtypes, RuntimeError for devices.
    """
    if len(weight.shape) != 2:
        raise ValueError(f"nf4_linear: expected a weight of shape (n, k), got {tuple(weight.shape)}")
    if x.dim() and x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"nf4_linear: expected x of shape (..., {weight.shape[1]}) to match the weight "
            f"{tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    return linear_from_parts(x, weight.parts, bias, lora_a, lora_b, scaling, dropout)


def linear_from_parts(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    gain: Tensor | None = None,
) -> Tensor:
    """:func:`nf4_linear` over the parts of a weight. gain: ``(n,)`` float32, what each column of y, less the
    bias, is multiplied by before it is rounded; for a call without dropout that wants no gradient."""
    if _any_autocast():
        device_type = x.device.type
        if _autocast_is_on(device_type) and x.dtype in checks.DTYPE_CODE:
            dtype = torch.get_autocast_dtype(device_type)
            x = x.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    if gain is not None:
        check_whole("nf4_linear", weight[0])
        return _linear(x, *weight[:4], bias, gathered(lora_a), gathered(lora_b), scaling, weight[4], gain)
    seed = None
    if dropout:
        if not 0.0 < dropout < 1.0:
            raise ValueError(f"nf4_linear: expected dropout in [0, 1), got {dropout}")
        if lora_a is not None:
            seed = torch.randint(_SEED_BOUND, (1,), dtype=torch.int64, device=x.device)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (lora_a is not None and lora_a.requires_grad)
        or (lora_b is not None and lora_b.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        check_whole("nf4_linear", weight[0])
        lora_a, lora_b = gathered(lora_a), gathered(lora_b)
        # Products, as dynamo cannot give one dynamic float to two functions (torch 2.13, dynamic=True).
        return _Nf4Linear.apply(x, *weight, bias, lora_a, lora_b, scaling * 1.0, seed, dropout * 1.0)
    if seed is None:
        y = direct.linear(x, weight, bias, lora_a, lora_b, scaling)
        if y is not None:
            return y
    check_whole("nf4_linear", weight[0])
    lora_a, lora_b = gathered(lora_a), gathered(lora_b)
    if seed is not None:
        return _forward_dropped(x, weight, bias, lora_a, lora_b, scaling, seed, dropout)[0]
    return _linear(x, *weight[:4], bias, lora_a, lora_b, scaling, weight[4])


def _forward_dropped(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    seed: Tensor,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """(y, u) where only the low-rank term sees the dropped x."""
    # The op below checks again, but the matrix product before it would fail less clearly.
    n, k = checks.check_linear("nf4_linear", x, weight, bias)
    checks.check_lora("nf4_linear", lora_a, lora_b, n, k, x.device)
    assert lora_a is not None
    assert lora_b is not None
    dropped = _dropout(x, seed, dropout)
    u = product(_rows(dropped), lora_a.to(x.dtype).t(), x.dtype).reshape(*x.shape[:-1], lora_a.shape[0])
    return _linear_given_u(x, u, *weight[:4], bias, lora_b, scaling, weight[4]), u


def _autocast_is_on(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch knows no autocast on meta


def _thin_products_are_ours(dy: Tensor) -> bool:
    """On CUDA dA and dB have kernels; on a CPU torch's own are as fast, and v comes with dx."""
    return dy.device.type == "cuda"  # torch 2.6 traces no is_cuda here


def _rows(t: Tensor) -> Tensor:
    """(..., c) as (m, c); -1 would be ambiguous where a size is 0."""
    return t.reshape(prod(t.shape[:-1]), t.shape[-1])


class _Nf4Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        scales: Tensor,
        nested: Tensor | None,
        blocksize: int,
        offsets: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
        seed: Tensor | None,
        dropout: float,
    ) -> Tensor:
        weight = (packed, scales, nested, blocksize, offsets)
        u: Tensor | None = None
        if lora_a is None:
            y = _linear(x, *weight[:4], bias, None, lora_b, scaling, offsets)  # refuses a lone lora_b
        elif seed is None:
            y, u = _linear_with_u(x, *weight[:4], bias, lora_a, lora_b, scaling, offsets)
        else:
            y, u = _forward_dropped(x, weight, bias, lora_a, lora_b, scaling, seed, dropout)
        learns_a, learns_b = ctx.needs_input_grad[7], ctx.needs_input_grad[8]
        ctx.save_for_backward(
            x if learns_a else None, u if learns_b else None, packed, scales, nested, offsets, lora_a, lora_b,
            seed,
        )  # fmt: skip
        ctx.blocksize, ctx.scaling, ctx.dropout, ctx.x_shape = blocksize, scaling, dropout, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[6:9])
        args = (dy, *ctx.saved_tensors, ctx.blocksize, ctx.scaling, ctx.dropout, ctx.x_shape, needs)
        # Only create_graph=True runs backward with gradients enabled.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dx, dbias, da, db = _NoSecondDerivative.apply(_gradients, *args)
        else:
            dx, dbias, da, db = _gradients(*args)
        return dx, None, None, None, None, None, dbias, da, db, None, None, None


def _gradients(
    dy: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    offsets: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    seed: Tensor | None,
    blocksize: int,
    scaling: float,
    dropout: float,
    x_shape: torch.Size,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dbias, dA, dB), None where not needed."""
    needs_x, needs_bias, needs_a, needs_b = needs
    k = x_shape[-1]
    dy = _rows(dy).contiguous()  # autograd often hands over an expanded scalar
    dx = dbias = da = db = v = None
    if needs_b and _thin_products_are_ours(dy):  # v and dB in one pass over dy
        assert lora_a is not None
        assert lora_b is not None
        assert u is not None
        u = _rows(u)
        if needs_x and seed is None:
            dx, v, db = _backward(
                dy, u, packed, scales, nested, k, blocksize, lora_a, lora_b, scaling, offsets
            )
        else:
            v, db = _grad_b(dy, u, lora_b, scaling)
    if needs_x and seed is None and dx is None:
        dx, v = _grad_input(dy, packed, scales, nested, k, blocksize, lora_a, lora_b, scaling, offsets)
    elif v is None and lora_a is not None and lora_b is not None and (needs_a or needs_x):
        v = product(dy, lora_b.to(dy.dtype), dy.dtype).mul_(scaling)
    if needs_x and dx is None:  # with dropout the low-rank half of dx passes through the mask
        assert lora_a is not None
        assert v is not None
        assert seed is not None
        dx, _ = _grad_input(dy, packed, scales, nested, k, blocksize, None, None, scaling, offsets)
        dx = dx + _dropout(product(v, lora_a.to(dy.dtype), dy.dtype), seed, dropout)
    if needs_a:
        assert lora_a is not None
        assert x is not None
        assert v is not None
        seen = _rows(x if seed is None else _dropout(x, seed, dropout))
        if _thin_products_are_ours(dy):
            da = _grad_a(v, seen, lora_a.dtype)
        else:
            da = product(v.t(), seen, lora_a.dtype)
    if needs_b and db is None:
        assert lora_b is not None
        assert u is not None
        db = product(dy.t(), _rows(u), lora_b.dtype).mul_(scaling)
    if needs_bias:
        dbias = dy.sum(0)
    return None if dx is None else dx.reshape(x_shape), dbias, da, db


class _NoSecondDerivative(torch.autograd.Function):
    """Lets backward run under create_graph=True and refuses only when its graph is walked."""

    @staticmethod
    def forward(ctx: Any, gradients: Callable[..., Any], *args: Any) -> Any:
        return gradients(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "nf4_linear: expected one differentiation, got a second one (it has first derivatives only)"
        )
