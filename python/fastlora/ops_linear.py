"""The fused layer's operators: ``torch.ops.fastlora.nf4_linear*`` and ``lora_*``; as in ops.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C, checks, cuda_linear
from .checks import DTYPE_CODE, Packed
from .cuda import Device
from .isa import level
from .ops import Outputs, define, ptr


def _run_linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    u: Tensor | None,
    scaling: float,
    y: Tensor,
    gain: Tensor | None = None,
) -> int:
    """lora_a None: u is an input."""
    packed, scales, nested, blocksize, offsets = weight
    offsets = checks.whole(offsets)
    m, n, k = x.shape[:-1].numel(), packed.shape[0], x.shape[-1]
    r = 0 if lora_b is None else lora_b.shape[1]
    lora_dtype = x.dtype if lora_b is None else lora_b.dtype
    return _C.nf4_linear(
        x.data_ptr(), packed.data_ptr(), scales.data_ptr(), ptr(nested), ptr(bias), ptr(lora_a),
        ptr(lora_b), ptr(gain), ptr(u), y.data_ptr(), m, n, k, r, blocksize, ptr(offsets),
        checks.group_count(offsets), scaling, DTYPE_CODE[x.dtype], DTYPE_CODE[lora_dtype],
        torch.get_num_threads(), level(),
    )  # fmt: skip


def _linear_with_u_outputs(
    x: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, blocksize: int, bias: Tensor | None,
    lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, offsets: Tensor | None,
    gain: Tensor | None,
) -> Outputs:  # fmt: skip
    n, k = checks.check_linear("nf4_linear", x, (packed, scales, nested, blocksize, offsets), bias)
    r = checks.check_lora("nf4_linear", lora_a, lora_b, n, k, x.device)
    if gain is not None:
        checks.check_gain("nf4_linear", gain, n, x.device)
    lead = x.shape[:-1]
    return [((*lead, n), x.dtype), ((*lead, r), x.dtype)]


def _linear_with_u(
    x: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, blocksize: int, bias: Tensor | None,
    lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, offsets: Tensor | None,
    gain: Tensor | None, y: Tensor, u: Tensor | None,
) -> int:  # fmt: skip
    if u is not None and not x.shape[-1]:
        u.zero_()  # an empty lora_a has no address, and the kernel takes u for an input
    weight = (packed, scales, nested, blocksize, offsets)
    return _run_linear(x, weight, bias, lora_a, lora_b, u, scaling, y, gain)


def _linear_outputs(*args: Any) -> Outputs:
    return _linear_with_u_outputs(*args)[:1]


def _linear(*args: Any) -> int:
    x, lora_a = args[0], args[6]
    u = None if lora_a is None else torch.empty(*x.shape[:-1], lora_a.shape[0], dtype=x.dtype)
    args = (*args, u)
    return _linear_with_u(*args)


_LINEAR_ARGS = (
    "(Tensor x, Tensor packed, Tensor scales, Tensor? nested, int blocksize, Tensor? bias, Tensor? lora_a, "
    "Tensor? lora_b, float scaling, Tensor? offsets=None, Tensor? gain=None)"
)


def _cuda_linear_with_u(
    device: Device, x: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, blocksize: int,
    bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float,
    offsets: Tensor | None, gain: Tensor | None, y: Tensor, u: Tensor | None = None,
) -> int:  # fmt: skip
    weight = (packed, scales, nested, blocksize, offsets)
    return cuda_linear.linear(device, x, weight, bias, lora_a, lora_b, u, scaling, y, gain)


define(f"nf4_linear{_LINEAR_ARGS} -> Tensor", _linear_outputs, _linear, _cuda_linear_with_u)
define(
    f"nf4_linear_with_u{_LINEAR_ARGS} -> (Tensor y, Tensor u)",
    _linear_with_u_outputs,
    _linear_with_u,
    _cuda_linear_with_u,
)


def _given_u_outputs(
    x: Tensor, u: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, blocksize: int,
    bias: Tensor | None, lora_b: Tensor, scaling: float, offsets: Tensor | None,
) -> Outputs:  # fmt: skip
    op = "nf4_linear_given_u"
    n, _ = checks.check_linear(op, x, (packed, scales, nested, blocksize, offsets), bias)
    checks.check_given_u(op, x, u, lora_b, n)
    return [((*x.shape[:-1], n), x.dtype)]


def _given_u(
    x: Tensor, u: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, blocksize: int,
    bias: Tensor | None, lora_b: Tensor, scaling: float, offsets: Tensor | None, y: Tensor,
) -> int:  # fmt: skip
    weight = (packed, scales, nested, blocksize, offsets)
    return _run_linear(x, weight, bias, None, lora_b, u, scaling, y)


def _cuda_given_u(
    device: Device, x: Tensor, u: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None,
    blocksize: int, bias: Tensor | None, lora_b: Tensor, scaling: float, offsets: Tensor | None, y: Tensor,
) -> int:  # fmt: skip
    weight = (packed, scales, nested, blocksize, offsets)
    return cuda_linear.linear(device, x, weight, bias, None, lora_b, u, scaling, y)


define(
    "nf4_linear_given_u(Tensor x, Tensor u, Tensor packed, Tensor scales, Tensor? nested, int blocksize, "
    "Tensor? bias, Tensor lora_b, float scaling, Tensor? offsets=None) -> Tensor",
    _given_u_outputs,
    _given_u,
    _cuda_given_u,
)


def _grad_input_outputs(
    dy: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, in_features: int, blocksize: int,
    lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, offsets: Tensor | None,
) -> Outputs:  # fmt: skip
    op = "nf4_linear_grad_input"
    n = checks.check_matrix(op, packed)
    checks.check_activation(op, "dy", dy, n, "the weight's out_features")
    checks.check_weight(op, (packed, scales, nested, blocksize, offsets), n, in_features, dy.device)
    r = checks.check_lora(op, lora_a, lora_b, n, in_features, dy.device)
    lead = dy.shape[:-1]
    return [((*lead, in_features), dy.dtype), ((*lead, r), dy.dtype)]


def _grad_input(
    dy: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, in_features: int, blocksize: int,
    lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, offsets: Tensor | None, dx: Tensor,
    v: Tensor,
) -> int:  # fmt: skip
    offsets = checks.whole(offsets)
    n, r = packed.shape[0], v.shape[-1]
    lora_dtype = dy.dtype if lora_a is None else lora_a.dtype
    return _C.nf4_linear_grad_input(
        dy.data_ptr(), packed.data_ptr(), scales.data_ptr(), ptr(nested), ptr(lora_a), ptr(lora_b),
        v.data_ptr(), dx.data_ptr(), dy.shape[:-1].numel(), n, in_features, r, blocksize, ptr(offsets),
        checks.group_count(offsets), scaling, DTYPE_CODE[dy.dtype], DTYPE_CODE[lora_dtype],
        torch.get_num_threads(), level(),
    )  # fmt: skip


def _cuda_grad_input(
    device: Device, dy: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, in_features: int,
    blocksize: int, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, offsets: Tensor | None,
    dx: Tensor, v: Tensor,
) -> int:  # fmt: skip
    weight = (packed, scales, nested, blocksize, offsets)
    return cuda_linear.grad_input(device, dy, None, weight, in_features, lora_a, lora_b, scaling, dx, v, None)


define(
    "nf4_linear_grad_input(Tensor dy, Tensor packed, Tensor scales, Tensor? nested, int in_features, "
    "int blocksize, Tensor? lora_a, Tensor? lora_b, float scaling, Tensor? offsets=None) "
    "-> (Tensor dx, Tensor v)",
    _grad_input_outputs,
    _grad_input,
    _cuda_grad_input,
)


def _backward_outputs(
    dy: Tensor, u: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, in_features: int,
    blocksize: int, lora_a: Tensor, lora_b: Tensor, scaling: float, offsets: Tensor | None,
) -> Outputs:  # fmt: skip
    op = "nf4_linear_backward"
    n = checks.check_matrix(op, packed)
    checks.check_activation(op, "dy", dy, n, "the weight's out_features")
    checks.check_weight(op, (packed, scales, nested, blocksize, offsets), n, in_features, dy.device)
    r = checks.check_lora(op, lora_a, lora_b, n, in_features, dy.device)
    checks.check_narrow(op, "u", u, "dy", dy)
    checks.check_shape(op, "u", u, (*dy.shape[:-1], r), "dy's rows, rank")
    lead = dy.shape[:-1]
    return [((*lead, in_features), dy.dtype), ((*lead, r), dy.dtype), ((n, r), lora_b.dtype)]


def _backward(
    dy: Tensor, u: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None, in_features: int,
    blocksize: int, lora_a: Tensor, lora_b: Tensor, scaling: float, offsets: Tensor | None, dx: Tensor,
    v: Tensor, db: Tensor,
) -> int:  # fmt: skip
    _fill_grad_b(dy, u, scaling, db)
    return _grad_input(
        dy, packed, scales, nested, in_features, blocksize, lora_a, lora_b, scaling, offsets, dx, v
    )


def _cuda_backward(
    device: Device, dy: Tensor, u: Tensor, packed: Tensor, scales: Tensor, nested: Tensor | None,
    in_features: int, blocksize: int, lora_a: Tensor, lora_b: Tensor, scaling: float,
    offsets: Tensor | None, dx: Tensor, v: Tensor, db: Tensor,
) -> int:  # fmt: skip
    weight = (packed, scales, nested, blocksize, offsets)
    return cuda_linear.grad_input(device, dy, u, weight, in_features, lora_a, lora_b, scaling, dx, v, db)


define(
    "nf4_linear_backward(Tensor dy, Tensor u, Tensor packed, Tensor scales, Tensor? nested, int in_features, "
    "int blocksize, Tensor lora_a, Tensor lora_b, float scaling, Tensor? offsets=None) "
    "-> (Tensor dx, Tensor v, Tensor db)",
    _backward_outputs,
    _backward,
    _cuda_backward,
)


# --- the adapter's own gradients ----------------------------------------------------------------------------


def product(a: Tensor, b: Tensor, out: torch.dtype) -> Tensor:
    """a·b as `out`, accumulated in float32 at least, also where autocast is on."""
    if a.dtype is torch.float16 and a.device.type == "cpu":
        a, b = a.float(), b.float()  # torch's float16 product on a CPU takes six times longer than both casts
    if a.device.type != "meta" and torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return torch.mm(a, b).to(out)
    return torch.mm(a, b).to(out)


def _grad_b_outputs(dy: Tensor, u: Tensor, lora_b: Tensor, scaling: float) -> Outputs:
    op = "lora_grad_b"
    checks.check_float(op, "dy", dy)
    if not dy.dim():
        raise ValueError(f"{op}: expected dy of shape (..., out_features), got a 0-dimensional tensor")
    r = checks.check_narrow(op, "u", u, "dy", dy)
    checks.check_float(op, "lora_b", lora_b)
    checks.check_device(op, "lora_b", lora_b, dy.device)
    n = dy.shape[-1]
    checks.check_shape(op, "lora_b", lora_b, (n, r), "{} out_features, rank {}", n, r)
    return [((*dy.shape[:-1], r), dy.dtype), ((n, r), lora_b.dtype)]


def _fill_grad_b(dy: Tensor, u: Tensor, scaling: float, db: Tensor) -> None:
    m, (n, r) = dy.shape[:-1].numel(), db.shape
    db.copy_(product(dy.reshape(m, n).t(), u.reshape(m, r), db.dtype).mul_(scaling))


def _grad_b(dy: Tensor, u: Tensor, lora_b: Tensor, scaling: float, v: Tensor, db: Tensor) -> int:
    rows = dy.reshape(dy.shape[:-1].numel(), dy.shape[-1])
    v.copy_(product(rows, lora_b.to(dy.dtype), dy.dtype).mul_(scaling).view(v.shape))
    _fill_grad_b(dy, u, scaling, db)
    return 0


define(
    "lora_grad_b(Tensor dy, Tensor u, Tensor lora_b, float scaling) -> (Tensor v, Tensor db)",
    _grad_b_outputs,
    _grad_b,
    cuda_linear.grad_b,
)


def _grad_a_outputs(v: Tensor, x: Tensor, dtype: torch.dtype) -> Outputs:
    op = "lora_grad_a"
    checks.check_float(op, "x", x)
    if not x.dim():
        raise ValueError(f"{op}: expected x of shape (..., in_features), got a 0-dimensional tensor")
    if dtype not in DTYPE_CODE:
        raise TypeError(f"{op}: expected dtype float32, bfloat16 or float16, got {dtype}")
    r = checks.check_narrow(op, "v", v, "x", x)
    return [((r, x.shape[-1]), dtype)]


def _grad_a(v: Tensor, x: Tensor, dtype: torch.dtype, da: Tensor) -> int:
    m = x.shape[:-1].numel()
    da.copy_(product(v.reshape(m, v.shape[-1]).t(), x.reshape(m, x.shape[-1]), dtype))
    return 0


define(
    "lora_grad_a(Tensor v, Tensor x, ScalarType dtype) -> Tensor",
    _grad_a_outputs,
    _grad_a,
    cuda_linear.grad_a,
)


def _dropout_outputs(x: Tensor, seed: Tensor, p: float) -> Outputs:
    checks.check_float("lora_dropout", "x", x)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(
            f"lora_dropout: expected seed as one int64, got {seed.dtype} of shape {tuple(seed.shape)}"
        )
    checks.check_device("lora_dropout", "seed", seed, x.device)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"lora_dropout: expected p in [0, 1), got {p}")
    return [(x.shape, x.dtype)]


def _dropout(x: Tensor, seed: Tensor, p: float, out: Tensor) -> int:
    return _C.lora_dropout(
        x.data_ptr(), out.data_ptr(), x.numel(), int(seed.item()) & 0xFFFFFFFFFFFFFFFF, p,
        DTYPE_CODE[x.dtype], torch.get_num_threads(),
    )  # fmt: skip


define(
    "lora_dropout(Tensor x, Tensor seed, float p) -> Tensor", _dropout_outputs, _dropout, cuda_linear.dropout
)
