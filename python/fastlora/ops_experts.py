"""Operators over the stacked weights of experts: ``nf4_experts_*``, ``lora_experts_grads``; as in ops.py.

The rows of x lie by expert, as lora_route has sorted them; ``segments`` is what it says of the order. Expert
e's weight is an NF4 tensor by itself, slice e of ``packed`` (experts, n, ceil(k / 2)), ``scales`` (experts,
bytes) and ``nested``: the same bits as a layer's, and a view of them is what the layer's kernel is given. An
op calls that kernel once for each expert that has rows, on these rows in place; other experts are not read.
Rows behind the last segment have no expert: their results are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import checks, cuda_linear, ops_linear
from . import checks_experts as check
from .checks import Packed
from .checks_experts import Stack
from .ops import Outputs, define
from .ops_linear import product

_dropout = torch.ops.fastlora.lora_dropout.default
_STACK = "Tensor segments, Tensor packed, Tensor scales, Tensor? nested"
_LORA = "Tensor? lora_a, Tensor? lora_b, float scaling, Tensor? seed, float dropout"


def _expert(weight: Stack, e: int) -> Packed:
    packed, scales, nested, blocksize = weight
    return packed[e], scales[e], None if nested is None else nested[e], blocksize, None


def _of(t: Tensor | None, e: int) -> Tensor | None:
    return None if t is None else t[e]


# --- forward ------------------------------------------------------------------------------------------------


def _linear_outputs(
    x: Tensor, segments: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, blocksize: int,
    bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, seed: Tensor | None,
    dropout: float,
) -> Outputs:  # fmt: skip
    op = "nf4_experts_linear"
    m = check.check_rows(op, "x", x)
    k = x.shape[1]
    experts, n = check.check_stack(op, (packed, scales, nested, blocksize), k, x.device)
    check.check_segments(op, segments, m, experts, x.device)
    r = check.check_adapters(op, lora_a, lora_b, experts, n, k, x.device)
    check.check_dropout(op, seed, dropout, x.device)
    if bias is not None:
        if bias.dtype is not x.dtype:
            raise TypeError(f"{op}: expected bias in x's dtype {x.dtype}, got {bias.dtype}")
        checks.check_device(op, "bias", bias, x.device)
        checks.check_shape(op, "bias", bias, (experts, n), "experts, out_features")
    return [((m, n), x.dtype), ((m, r), x.dtype)]


def _linear(
    one: Callable[..., int], x: Tensor, segments: Tensor, packed: Tensor, scales: Tensor,
    nested: Tensor | None, blocksize: int, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    scaling: float, seed: Tensor | None, dropout: float, y: Tensor, u: Tensor,
) -> int:  # fmt: skip
    weight = (packed, scales, nested, blocksize)
    seen = None if seed is None or lora_a is None else _dropout(x, seed, dropout)
    tail = 0
    for e, begin, end in check.spans("nf4_experts_linear", segments, x.shape[0], packed.shape[0]):
        a, b = _of(lora_a, e), _of(lora_b, e)
        narrow = None if b is None else u[begin:end]
        if seen is not None and a is not None:
            u[begin:end] = product(seen[begin:end], a.to(x.dtype).t(), x.dtype)
            a = None
        rows = x[begin:end]
        status = one(rows, _expert(weight, e), _of(bias, e), a, b, narrow, scaling, y[begin:end])
        if status:
            return status
        tail = end
    y[tail:].zero_()
    u[tail:].zero_()
    return 0


define(
    f"nf4_experts_linear(Tensor x, {_STACK}, int blocksize, Tensor? bias, {_LORA}) -> (Tensor y, Tensor u)",
    _linear_outputs,
    partial(_linear, ops_linear._run_linear),
    lambda device, *args: _linear(partial(cuda_linear.linear, device), *args),
)


# --- backward -----------------------------------------------------------------------------------------------


def _grad_input_outputs(
    dy: Tensor, segments: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, in_features: int,
    blocksize: int, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, seed: Tensor | None,
    dropout: float,
) -> Outputs:  # fmt: skip
    op, k = "nf4_experts_grad_input", in_features
    experts, n = check.check_stack(op, (packed, scales, nested, blocksize), k, dy.device)
    m = check.check_rows(op, "dy", dy, n)
    check.check_segments(op, segments, m, experts, dy.device)
    r = check.check_adapters(op, lora_a, lora_b, experts, n, k, dy.device)
    check.check_dropout(op, seed, dropout, dy.device)
    return [((m, k), dy.dtype), ((m, r), dy.dtype)]


def _grad_input(
    one: Callable[..., int], dy: Tensor, segments: Tensor, packed: Tensor, scales: Tensor,
    nested: Tensor | None, in_features: int, blocksize: int, lora_a: Tensor | None, lora_b: Tensor | None,
    scaling: float, seed: Tensor | None, dropout: float, dx: Tensor, v: Tensor,
) -> int:  # fmt: skip
    weight = (packed, scales, nested, blocksize)
    low = None if seed is None or lora_a is None else torch.zeros_like(dx)  # dropout's half of dx
    tail = 0
    for e, begin, end in check.spans("nf4_experts_grad_input", segments, dy.shape[0], packed.shape[0]):
        rows, a, b, narrow = dy[begin:end], _of(lora_a, e), _of(lora_b, e), v[begin:end]
        if low is not None and a is not None and b is not None:
            narrow.copy_(product(rows, b.to(dy.dtype), dy.dtype).mul_(scaling))
            low[begin:end] = product(narrow, a.to(dy.dtype), dy.dtype)
            a, b, narrow = None, None, dy.new_empty(end - begin, 0)
        status = one(rows, _expert(weight, e), in_features, a, b, scaling, dx[begin:end], narrow)
        if status:
            return status
        tail = end
    dx[tail:].zero_()
    v[tail:].zero_()
    if low is not None and seed is not None:
        dx.add_(_dropout(low, seed, dropout))
    return 0


def _grad_input_of_one(
    dy: Tensor, weight: Packed, k: int, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float,
    dx: Tensor, v: Tensor,
) -> int:  # fmt: skip
    packed, scales, nested, blocksize, offsets = weight
    return ops_linear._grad_input(
        dy, packed, scales, nested, k, blocksize, lora_a, lora_b, scaling, offsets, dx, v
    )


def _cuda_grad_input(device: cuda_linear.Device, *args: object) -> int:
    def one(
        dy: Tensor, weight: Packed, k: int, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float,
        dx: Tensor, v: Tensor,
    ) -> int:  # fmt: skip
        return cuda_linear.grad_input(device, dy, None, weight, k, lora_a, lora_b, scaling, dx, v, None)

    return _grad_input(one, *args)  # type: ignore[arg-type]


define(
    f"nf4_experts_grad_input(Tensor dy, {_STACK}, int in_features, int blocksize, {_LORA}) "
    "-> (Tensor dx, Tensor v)",
    _grad_input_outputs,
    partial(_grad_input, _grad_input_of_one),
    _cuda_grad_input,
)


def _grads_outputs(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor, segments: Tensor, lora_a: Tensor, lora_b: Tensor,
    scaling: float, seed: Tensor | None, dropout: float,
) -> Outputs:  # fmt: skip
    op = "lora_experts_grads"
    if lora_b.dim() != 3:
        raise ValueError(f"{op}: expected lora_b of shape (experts, n, r), got {tuple(lora_b.shape)}")
    experts, n, _ = lora_b.shape
    m, k = check.check_rows(op, "dy", dy, n), x.shape[-1]
    r = check.check_adapters(op, lora_a, lora_b, experts, n, k, dy.device)
    for name, t, features in (("x", x, k), ("u", u, r), ("v", v, r)):
        check.check_rows(op, name, t)
        if t.dtype is not dy.dtype:
            raise TypeError(f"{op}: expected {name} in dy's dtype {dy.dtype}, got {t.dtype}")
        checks.check_device(op, name, t, dy.device)
        checks.check_shape(op, name, t, (m, features), "dy's rows")
    check.check_segments(op, segments, m, experts, dy.device)
    check.check_dropout(op, seed, dropout, dy.device)
    return [(lora_a.shape, lora_a.dtype), (lora_b.shape, lora_b.dtype)]


def _grads(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor, segments: Tensor, lora_a: Tensor, lora_b: Tensor,
    scaling: float, seed: Tensor | None, dropout: float, da: Tensor, db: Tensor,
) -> int:  # fmt: skip
    seen = x if seed is None else _dropout(x, seed, dropout)
    da.zero_()
    db.zero_()
    for e, begin, end in check.spans("lora_experts_grads", segments, dy.shape[0], lora_a.shape[0]):
        da[e] = product(v[begin:end].t(), seen[begin:end], da.dtype)
        db[e] = product(dy[begin:end].t(), u[begin:end], db.dtype).mul_(scaling)
    return 0


define(
    "lora_experts_grads(Tensor dy, Tensor x, Tensor u, Tensor v, Tensor segments, Tensor lora_a, "
    "Tensor lora_b, float scaling, Tensor? seed, float dropout) -> (Tensor da, Tensor db)",
    _grads_outputs,
    _grads,
    lambda device, *args: _grads(*args),
)


def _grad_bias_outputs(dy: Tensor, segments: Tensor, experts: int) -> Outputs:
    op = "nf4_experts_grad_bias"
    m = check.check_rows(op, "dy", dy)
    if experts < 1:
        raise ValueError(f"{op}: expected 1 expert or more, got {experts}")
    check.check_segments(op, segments, m, experts, dy.device)
    return [((experts, dy.shape[1]), dy.dtype)]


def _grad_bias(dy: Tensor, segments: Tensor, experts: int, dbias: Tensor) -> int:
    dbias.zero_()
    for e, begin, end in check.spans("nf4_experts_grad_bias", segments, dy.shape[0], experts):
        dbias[e] = dy[begin:end].sum(0)
    return 0


define(
    "nf4_experts_grad_bias(Tensor dy, Tensor segments, int experts) -> Tensor",
    _grad_bias_outputs,
    _grad_bias,
    lambda device, *args: _grad_bias(*args),
)
