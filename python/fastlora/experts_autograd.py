"""The differentiable products of experts: rows to their experts and back, and the fused layer over them.

What forward keeps for backward is what autograd.py's layer keeps: x and u where the adapters learn. The
weights are constants. Rows move by permutations, whose backward is the gather by the inverse: no two rows
are added by whoever comes first, so results are the same bits on every run, on CUDA too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, ops_experts  # noqa: F401  (registers its ops)
from .autograd import _SEED_BOUND, _any_autocast, _autocast_is_on, _NoSecondDerivative
from .checks_experts import Stack
from .routing import route

_linear = torch.ops.fastlora.nf4_experts_linear.default
_grad_input = torch.ops.fastlora.nf4_experts_grad_input.default
_grads = torch.ops.fastlora.lora_experts_grads.default
_grad_bias = torch.ops.fastlora.nf4_experts_grad_bias.default


class Dispatch:
    """Where the rows of a batch go: `experts` (tokens, top_k) of each token, an index in 0 .. count - 1, or
    `count` for none (what expert parallelism gives a token of another rank)."""

    def __init__(self, experts: Tensor, count: int) -> None:
        self.tokens, self.top_k = experts.shape
        slots = experts.reshape(-1)
        _, order, self.segments, _ = route(torch.where(slots == count, -1, slots), count)
        self._order = order.long()
        self._inverse = torch.empty_like(self._order)
        self._inverse[self._order] = torch.arange(len(order), device=order.device)

    def to_experts(self, x: Tensor) -> Tensor:
        """(tokens, k) to (tokens * top_k, k), by expert."""
        rows = torch.div(self._order, self.top_k, rounding_mode="floor")
        return _gather(x, rows, self._inverse, self.top_k)

    def to_tokens(self, y: Tensor) -> Tensor:
        """(tokens * top_k, n) by expert to (tokens, top_k, n)."""
        y = _gather(y, self._inverse, self._order, 1)
        return y.reshape(self.tokens, self.top_k, y.shape[1])


def _gather(x: Tensor, rows: Tensor, inverse: Tensor, copies: int) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gather.apply(x, rows, inverse, copies)
    return x.index_select(0, rows)


class _Gather(torch.autograd.Function):
    """x[rows], every row of x `copies` times; inverse[i * copies + j] is where copy j of row i went."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies, ctx.shape = copies, x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dy.index_select(0, ctx.saved_tensors[0])
        if ctx.copies != 1:
            dx = dx.reshape(ctx.shape[0], ctx.copies, ctx.shape[1]).sum(1)
        return dx, None, None, None


def experts_linear(
    x: Tensor,
    segments: Tensor,
    weight: Stack,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """y = x·Wᵀ + scaling · dropout(x)·lora_aᵀ·lora_bᵀ + bias, of the expert of each row.

    Args:
        x: ``(rows, k)`` by expert, float32, bfloat16 or float16; under autocast it is cast first.
        segments: of the routing that sorted them.
        weight: stacked parts, as ops_experts.py has them.
        bias: ``(experts, n)`` or None.
        lora_a, lora_b: ``(experts, r, k)`` and ``(experts, n, r)`` of one floating dtype, or both None.
        dropout: as for :func:`fastlora.nf4_linear`.

    Returns ``(rows, n)`` in x's dtype. Differentiable once in x, bias, lora_a and lora_b.
    """
    if _any_autocast() and _autocast_is_on(x.device.type) and x.dtype in checks.DTYPE_CODE:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None:
        bias = bias.to(x.dtype)
    seed = None
    if dropout and lora_a is not None:
        seed = torch.randint(_SEED_BOUND, (1,), dtype=torch.int64, device=x.device)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, lora_a, lora_b)):
        return _ExpertsLinear.apply(x, segments, *weight, bias, lora_a, lora_b, scaling, seed, dropout)
    return _linear(x, segments, *weight, bias, lora_a, lora_b, scaling, seed, dropout)[0]


class _ExpertsLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        segments: Tensor,
        packed: Tensor,
        scales: Tensor,
        nested: Tensor | None,
        blocksize: int,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
        seed: Tensor | None,
        dropout: float,
    ) -> Tensor:
        lora = (lora_a, lora_b, scaling, seed, dropout)
        y, u = _linear(x, segments, packed, scales, nested, blocksize, bias, *lora)
        learns = ctx.needs_input_grad[7] or ctx.needs_input_grad[8]
        saved = (segments, packed, scales, nested, lora_a, lora_b, seed)
        ctx.save_for_backward(x if learns else None, u if learns else None, *saved)
        ctx.blocksize, ctx.scaling, ctx.dropout, ctx.in_features = blocksize, scaling, dropout, x.shape[1]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[6:9])
        args = (dy, *ctx.saved_tensors, ctx.in_features, ctx.blocksize, ctx.scaling, ctx.dropout, needs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            dx, dbias, da, db = _NoSecondDerivative.apply(_gradients, *args)
        else:
            dx, dbias, da, db = _gradients(*args)
        return dx, None, None, None, None, None, dbias, da, db, None, None, None


def _gradients(
    dy: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    segments: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    seed: Tensor | None,
    in_features: int,
    blocksize: int,
    scaling: float,
    dropout: float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dbias, dA, dB), None where not needed."""
    needs_x, needs_bias, needs_a, needs_b = needs
    dx = dbias = da = db = None
    dy = dy.contiguous()
    if needs_x or needs_a or needs_b:  # v comes with dx
        weight = (packed, scales, nested, in_features, blocksize)
        dx, v = _grad_input(dy, segments, *weight, lora_a, lora_b, scaling, seed, dropout)
    if needs_a or needs_b:
        da, db = _grads(dy, x, u, v, segments, lora_a, lora_b, scaling, seed, dropout)
    if needs_bias:
        dbias = _grad_bias(dy, segments, packed.shape[0])
    return dx if needs_x else None, dbias, da if needs_a else None, db if needs_b else None
