"""The operators: ``torch.ops.fastlora.*``, their schemas, checks and fakes.

Every op is defined here once, checked here once (the same checks for real and for traced tensors), and handed
to the kernels as raw addresses. An error is raised before anything is written: ValueError for shapes and
values, TypeError for dtypes, RuntimeError for devices and builds.

Storage conventions shared by all ops (see fastlora/nf4.h):

* ``packed`` uint8 ``(n, ceil(k / 2))``: two 4-bit codes a byte, the even column in the high nibble.
* ``scales`` uint8: with ``nested`` None the bytes of ``ceil(n*k / blocksize)`` float32 absmax values, else
  one 8-bit index a block.
* ``nested`` uint8 or None: the bytes of float32 ``[offset, absmax2 of blocks 0..255, of 256..511, ...]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _C
from .checks import (
    DTYPE_CODE,
    NESTED_BLOCKSIZE,
    block_count,
    check_activation,
    check_blocksize,
    check_float,
    check_linear,
    check_lora,
    check_same_device,
    check_shape,
    check_weight,
)
from .isa import level

_STATUS = {
    1: (ValueError, "the kernel refused its arguments"),
    2: (MemoryError, "no memory for the kernel's scratch buffer"),
    3: (RuntimeError, "this machine cannot run the requested instruction-set level"),
    4: (ValueError, "the weight holds NaN or Inf"),
}


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _raise_status(op: str, status: int) -> None:
    kind, text = _STATUS.get(status, (RuntimeError, f"status {status}"))
    raise kind(f"{op}: {text}")


_lib = torch.library.Library("fastlora", "DEF")


def _no_cuda(op: str) -> Callable[..., Any]:
    def raise_no_cuda(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{op}: expected CPU tensors, got CUDA ones; this build of fastlora holds no CUDA kernels "
            "(`python -m fastlora info` says what was built)"
        )

    return raise_no_cuda


def _register(schema: str, cpu: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(", 1)[0]
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _lib.impl(name, cpu, "CPU")
    _lib.impl(name, _no_cuda(name), "CUDA")
    torch.library.register_fake(f"fastlora::{name}", fake, lib=_lib)


def _quantize_shapes(weight: Tensor, blocksize: int, double_quant: bool) -> tuple[list[int], int, int]:
    check_float("nf4_quantize", "weight", weight)
    check_blocksize("nf4_quantize", blocksize)
    if weight.dim() < 1:
        raise ValueError("nf4_quantize: expected a weight of at least one dimension, got a scalar")
    blocks = block_count(weight.numel(), blocksize)
    nested = 4 * (1 + block_count(blocks, NESTED_BLOCKSIZE)) if double_quant else 0
    return [*weight.shape[:-1], (weight.shape[-1] + 1) // 2], blocks, nested


def _nf4_quantize_cpu(weight: Tensor, blocksize: int, double_quant: bool) -> tuple[Tensor, Tensor, Tensor]:
    packed_shape, blocks, nested_bytes = _quantize_shapes(weight, blocksize, double_quant)
    weight = weight.contiguous()
    cols = weight.shape[-1]
    rows = weight.numel() // cols if cols else 0
    packed = torch.empty(packed_shape, dtype=torch.uint8)
    absmax = torch.empty(blocks, dtype=torch.float32)
    threads = torch.get_num_threads()
    status = _C.nf4_quantize(
        weight.data_ptr(), DTYPE_CODE[weight.dtype], rows, cols, blocksize, packed.data_ptr(),
        absmax.data_ptr(), threads, level(),
    )  # fmt: skip
    if status == 4:
        bad = ~torch.isfinite(weight)
        first = int(bad.reshape(-1).view(torch.uint8).argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), weight.shape))
        raise ValueError(
            f"nf4_quantize: expected finite weights, got {int(bad.sum())} NaN or Inf of {weight.numel()}, "
            f"the first at index {where}"
        )
    if status:
        _raise_status("nf4_quantize", status)
    if not double_quant:
        return packed, absmax.view(torch.uint8), torch.empty(0, dtype=torch.uint8)
    codes = torch.empty(blocks, dtype=torch.uint8)
    nested = torch.empty(nested_bytes, dtype=torch.uint8)
    status = _C.nf4_double_quantize(absmax.data_ptr(), blocks, codes.data_ptr(), nested.data_ptr(), threads)
    if status:
        _raise_status("nf4_quantize", status)
    return packed, codes, nested


def _nf4_quantize_fake(weight: Tensor, blocksize: int, double_quant: bool) -> tuple[Tensor, Tensor, Tensor]:
    packed_shape, blocks, nested_bytes = _quantize_shapes(weight, blocksize, double_quant)

    def new(*shape: int) -> Tensor:
        return weight.new_empty(shape, dtype=torch.uint8)

    return new(*packed_shape), new(blocks if double_quant else 4 * blocks), new(nested_bytes)


_register(
    "nf4_quantize(Tensor weight, int blocksize, bool double_quant) -> "
    "(Tensor packed, Tensor scales, Tensor nested)",
    _nf4_quantize_cpu,
    _nf4_quantize_fake,
)


def _check_scales(scales: Tensor, nested: Tensor | None) -> int:
    """Returns the number of blocks."""
    op = "nf4_decode_absmax"
    for name, t in (("scales", scales), ("nested", nested)):
        if t is None:
            continue
        if t.dtype != torch.uint8:
            raise TypeError(f"{op}: expected {name} in uint8, got {t.dtype}")
        check_same_device(op, name, t, scales.device)
        if t.dim() != 1:
            raise ValueError(f"{op}: expected {name} of one dimension, got shape {tuple(t.shape)}")
    if nested is None:
        if scales.shape[0] % 4:
            raise ValueError(f"{op}: expected scales of 4 bytes a block, got {scales.shape[0]} bytes")
        return scales.shape[0] // 4
    groups = block_count(scales.shape[0], NESTED_BLOCKSIZE)
    check_shape(op, "nested", nested, (4 * (1 + groups),), "an offset and {} scales of 4 bytes", groups)
    return scales.shape[0]


def _nf4_decode_absmax_cpu(scales: Tensor, nested: Tensor | None) -> Tensor:
    blocks = _check_scales(scales, nested)
    scales = scales.contiguous()
    nested = None if nested is None else nested.contiguous()
    absmax = torch.empty(blocks, dtype=torch.float32)
    status = _C.nf4_decode_absmax(
        scales.data_ptr(), _ptr(nested), blocks, absmax.data_ptr(), torch.get_num_threads()
    )
    if status:
        _raise_status("nf4_decode_absmax", status)
    return absmax


def _nf4_decode_absmax_fake(scales: Tensor, nested: Tensor | None) -> Tensor:
    return scales.new_empty(_check_scales(scales, nested), dtype=torch.float32)


_register(
    "nf4_decode_absmax(Tensor scales, Tensor? nested) -> Tensor",
    _nf4_decode_absmax_cpu,
    _nf4_decode_absmax_fake,
)


def nf4_dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit map that double quantisation indexes: float32, ascending."""
    identity = torch.tensor([0.0, 1.0]).view(torch.uint8)  # offset 0, scale 1
    return _nf4_decode_absmax_cpu(torch.arange(256, dtype=torch.uint8), identity)


def nf4_codes() -> Tensor:
    """The 16 values of NF4: float32, ascending."""
    packed = torch.arange(0x01, 0x100, 0x22, dtype=torch.int32).to(torch.uint8)  # 01 23 45 ... ef
    one = torch.ones(1).view(torch.uint8)
    return _nf4_dequantize_cpu(packed.reshape(1, 8), one, None, 16, 32, torch.float32).reshape(16)


def _check_dequantize(
    packed: Tensor, scales: Tensor, nested: Tensor | None, cols: int, blocksize: int, dtype: torch.dtype
) -> int:
    op = "nf4_dequantize"
    if dtype not in DTYPE_CODE:
        raise TypeError(f"{op}: expected dtype float32, bfloat16 or float16, got {dtype}")
    if packed.dim() != 2:
        raise ValueError(f"{op}: expected packed of shape (n, ceil(k / 2)), got {tuple(packed.shape)}")
    check_weight(op, packed, scales, nested, packed.shape[0], cols, blocksize, packed.device)
    return packed.shape[0]


def _nf4_dequantize_cpu(
    packed: Tensor, scales: Tensor, nested: Tensor | None, cols: int, blocksize: int, dtype: torch.dtype
) -> Tensor:
    rows = _check_dequantize(packed, scales, nested, cols, blocksize, dtype)
    packed, scales = packed.contiguous(), scales.contiguous()
    nested = None if nested is None else nested.contiguous()
    out = torch.empty((rows, cols), dtype=dtype)
    status = _C.nf4_dequantize(
        packed.data_ptr(), scales.data_ptr(), _ptr(nested), rows, cols, blocksize, out.data_ptr(),
        DTYPE_CODE[dtype], torch.get_num_threads(), level(),
    )  # fmt: skip
    if status:
        _raise_status("nf4_dequantize", status)
    return out


def _nf4_dequantize_fake(
    packed: Tensor, scales: Tensor, nested: Tensor | None, cols: int, blocksize: int, dtype: torch.dtype
) -> Tensor:
    rows = _check_dequantize(packed, scales, nested, cols, blocksize, dtype)
    return packed.new_empty((rows, cols), dtype=dtype)


_register(
    "nf4_dequantize(Tensor packed, Tensor scales, Tensor? nested, int cols, int blocksize, ScalarType dtype) "
    "-> Tensor",
    _nf4_dequantize_cpu,
    _nf4_dequantize_fake,
)


def _run_linear(
    op: str,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    blocksize: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor | None]:
    """(y, u), u None at rank 0."""
    n, k, r = check_linear(op, x, packed, scales, nested, blocksize, bias, lora_a, lora_b)
    # Contiguous copies are bound to names so that they outlive the call: an address keeps nothing alive.
    x, packed, scales = x.contiguous(), packed.contiguous(), scales.contiguous()
    nested = None if nested is None else nested.contiguous()
    bias = None if bias is None else bias.contiguous()
    lora_a = None if lora_a is None else lora_a.contiguous()
    lora_b = None if lora_b is None else lora_b.contiguous()
    lead = x.shape[:-1]
    m = lead.numel()
    y = torch.empty(
        *lead, n, dtype=x.dtype
    )  # sizes as separate arguments: parsed in half the time of a tuple
    # An empty lora_a has no address, and the kernel would take u for an input: have it be zeros.
    u = (torch.empty if k else torch.zeros)(*lead, r, dtype=x.dtype) if r else None
    status = _C.nf4_linear(
        x.data_ptr(), packed.data_ptr(), scales.data_ptr(), _ptr(nested), _ptr(bias), _ptr(lora_a),
        _ptr(lora_b), _ptr(u), y.data_ptr(), m, n, k, r, blocksize, scaling, DTYPE_CODE[x.dtype],
        DTYPE_CODE[x.dtype if lora_a is None else lora_a.dtype], torch.get_num_threads(), level(),
    )  # fmt: skip
    if status:
        _raise_status(op, status)
    return y, u


def _nf4_linear_cpu(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    blocksize: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> Tensor:
    return _run_linear("nf4_linear", x, packed, scales, nested, blocksize, bias, lora_a, lora_b, scaling)[0]


def _nf4_linear_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    blocksize: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> Tensor:
    n, _, _ = check_linear("nf4_linear", x, packed, scales, nested, blocksize, bias, lora_a, lora_b)
    return x.new_empty((*x.shape[:-1], n))


_LINEAR_ARGS = (
    "(Tensor x, Tensor packed, Tensor scales, Tensor? nested, int blocksize, Tensor? bias, Tensor? lora_a, "
    "Tensor? lora_b, float scaling)"
)
_register(f"nf4_linear{_LINEAR_ARGS} -> Tensor", _nf4_linear_cpu, _nf4_linear_fake)


def _nf4_linear_with_u_cpu(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    blocksize: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    y, u = _run_linear("nf4_linear", x, packed, scales, nested, blocksize, bias, lora_a, lora_b, scaling)
    return y, x.new_empty((*x.shape[:-1], 0)) if u is None else u


def _nf4_linear_with_u_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    blocksize: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    n, _, r = check_linear("nf4_linear", x, packed, scales, nested, blocksize, bias, lora_a, lora_b)
    return x.new_empty((*x.shape[:-1], n)), x.new_empty((*x.shape[:-1], r))


_register(
    f"nf4_linear_with_u{_LINEAR_ARGS} -> (Tensor y, Tensor u)",
    _nf4_linear_with_u_cpu,
    _nf4_linear_with_u_fake,
)


def _check_given_u(
    op: str,
    x: Tensor,
    u: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    blocksize: int,
    bias: Tensor | None,
    lora_b: Tensor,
) -> tuple[int, int, int]:
    n, k, _ = check_linear(op, x, packed, scales, nested, blocksize, bias, None, None)
    check_float(op, "lora_b", lora_b)
    if u.dtype != x.dtype:
        raise TypeError(f"{op}: expected u in x's dtype {x.dtype}, got {u.dtype}")
    check_same_device(op, "u", u, x.device)
    check_same_device(op, "lora_b", lora_b, x.device)
    if u.dim() < 1:
        raise ValueError(f"{op}: expected u of shape (..., rank), got a 0-dimensional tensor")
    r = u.shape[-1]
    check_shape(op, "u", u, (*x.shape[:-1], r), "x's rows, rank")
    check_shape(op, "lora_b", lora_b, (n, r), "{} out_features, rank {}", n, r)
    return n, k, r


def _nf4_linear_given_u_cpu(
    x: Tensor,
    u: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    blocksize: int,
    bias: Tensor | None,
    lora_b: Tensor,
    scaling: float,
) -> Tensor:
    op = "nf4_linear_given_u"
    n, k, r = _check_given_u(op, x, u, packed, scales, nested, blocksize, bias, lora_b)
    x, u, packed, scales = x.contiguous(), u.contiguous(), packed.contiguous(), scales.contiguous()
    nested = None if nested is None else nested.contiguous()
    bias = None if bias is None else bias.contiguous()
    lora_b = lora_b.contiguous()
    lead = x.shape[:-1]
    y = torch.empty((*lead, n), dtype=x.dtype)
    status = _C.nf4_linear(
        x.data_ptr(), packed.data_ptr(), scales.data_ptr(), _ptr(nested), _ptr(bias), 0, lora_b.data_ptr(),
        u.data_ptr(), y.data_ptr(), lead.numel(), n, k, r, blocksize, scaling, DTYPE_CODE[x.dtype],
        DTYPE_CODE[lora_b.dtype], torch.get_num_threads(), level(),
    )  # fmt: skip
    if status:
        _raise_status(op, status)
    return y


def _nf4_linear_given_u_fake(
    x: Tensor,
    u: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    blocksize: int,
    bias: Tensor | None,
    lora_b: Tensor,
    scaling: float,
) -> Tensor:
    n, _, _ = _check_given_u("nf4_linear_given_u", x, u, packed, scales, nested, blocksize, bias, lora_b)
    return x.new_empty((*x.shape[:-1], n))


_register(
    "nf4_linear_given_u(Tensor x, Tensor u, Tensor packed, Tensor scales, Tensor? nested, int blocksize, "
    "Tensor? bias, Tensor lora_b, float scaling) -> Tensor",
    _nf4_linear_given_u_cpu,
    _nf4_linear_given_u_fake,
)


def _check_grad_input(
    dy: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    in_features: int,
    blocksize: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
) -> tuple[int, int]:
    """Returns (n, r)."""
    op = "nf4_linear_grad_input"
    if packed.dim() != 2:
        raise ValueError(f"{op}: expected packed of shape (n, ceil(k / 2)), got {tuple(packed.shape)}")
    n = packed.shape[0]
    check_activation(op, "dy", dy, n, "the weight's out_features")
    check_weight(op, packed, scales, nested, n, in_features, blocksize, dy.device)
    return n, check_lora(op, lora_a, lora_b, n, in_features, dy.device)


def _nf4_linear_grad_input_cpu(
    dy: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    in_features: int,
    blocksize: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    n, r = _check_grad_input(dy, packed, scales, nested, in_features, blocksize, lora_a, lora_b)
    dy, packed, scales = dy.contiguous(), packed.contiguous(), scales.contiguous()
    nested = None if nested is None else nested.contiguous()
    lora_a = None if lora_a is None else lora_a.contiguous()
    lora_b = None if lora_b is None else lora_b.contiguous()
    lead = dy.shape[:-1]
    dx = torch.empty((*lead, in_features), dtype=dy.dtype)
    v = torch.empty((*lead, r), dtype=dy.dtype)
    status = _C.nf4_linear_grad_input(
        dy.data_ptr(), packed.data_ptr(), scales.data_ptr(), _ptr(nested), _ptr(lora_a), _ptr(lora_b),
        v.data_ptr(), dx.data_ptr(), lead.numel(), n, in_features, r, blocksize, scaling,
        DTYPE_CODE[dy.dtype], DTYPE_CODE[dy.dtype if lora_a is None else lora_a.dtype],
        torch.get_num_threads(), level(),
    )  # fmt: skip
    if status:
        _raise_status("nf4_linear_grad_input", status)
    return dx, v


def _nf4_linear_grad_input_fake(
    dy: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    in_features: int,
    blocksize: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    _, r = _check_grad_input(dy, packed, scales, nested, in_features, blocksize, lora_a, lora_b)
    return dy.new_empty((*dy.shape[:-1], in_features)), dy.new_empty((*dy.shape[:-1], r))


_register(
    "nf4_linear_grad_input(Tensor dy, Tensor packed, Tensor scales, Tensor? nested, int in_features, "
    "int blocksize, Tensor? lora_a, Tensor? lora_b, float scaling) -> (Tensor dx, Tensor v)",
    _nf4_linear_grad_input_cpu,
    _nf4_linear_grad_input_fake,
)


def _check_dropout(x: Tensor, seed: Tensor, p: float) -> None:
    check_float("lora_dropout", "x", x)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(
            f"lora_dropout: expected seed as one int64, got {seed.dtype} of shape {tuple(seed.shape)}"
        )
    check_same_device("lora_dropout", "seed", seed, x.device)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"lora_dropout: expected p in [0, 1), got {p}")


def _lora_dropout_cpu(x: Tensor, seed: Tensor, p: float) -> Tensor:
    _check_dropout(x, seed, p)
    x = x.contiguous()
    out = torch.empty_like(x)
    status = _C.lora_dropout(
        x.data_ptr(), out.data_ptr(), x.numel(), int(seed.item()) & 0xFFFFFFFFFFFFFFFF, p,
        DTYPE_CODE[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    if status:
        _raise_status("lora_dropout", status)
    return out


def _lora_dropout_fake(x: Tensor, seed: Tensor, p: float) -> Tensor:
    _check_dropout(x, seed, p)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_register("lora_dropout(Tensor x, Tensor seed, float p) -> Tensor", _lora_dropout_cpu, _lora_dropout_fake)
