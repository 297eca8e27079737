"""bitsandbytes' 4-bit operators by our kernels: what they compute, and putting that in their place.

Each keeps its schema and its meaning. What is not NF4 in float32, bfloat16 or float16 goes to the kernel that
bitsandbytes registered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .bitsandbytes_weight import Stored, dequantize, packed

_NAMESPACE = "bitsandbytes::"


def takes(quant_type: str, blocksize: int, dtype: torch.dtype) -> bool:
    return quant_type == "nf4" and blocksize in checks.BLOCKSIZES and dtype in checks.DTYPE_CODE


def linear(x: Tensor, stored: Stored, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + bias in x's dtype, whatever autocast says."""
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    if stored.shape[1] % 2:  # rows begin within bytes
        with torch.autocast(x.device.type, enabled=False):
            return torch.nn.functional.linear(x, dequantize(stored, x.dtype), bias)
    return torch.ops.fastlora.nf4_linear.default(x, *packed(stored)[:4], bias, None, None, 1.0)


# --- the gradient ------------------------------------------------------------------------------------------

# An operator of its own, so that a compiled graph holds one node that reads the weight when it runs.
_lib = torch.library.Library("fastlora", "FRAGMENT")
_lib.define(
    "bitsandbytes_grad_input(Tensor dy, Tensor data, int[] shape, Tensor absmax, int blocksize, "
    "Tensor? codes, Tensor? map, Tensor? offset) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _grad_input(dy: Tensor, *weight: Any) -> Tensor:
    """dy·W in dy's dtype."""
    stored = Stored(*weight)
    k = stored.shape[1]
    if k % 2:
        with torch.autocast(dy.device.type, enabled=False):
            return dy @ dequantize(stored, dy.dtype)
    op = torch.ops.fastlora.nf4_linear_grad_input.default
    data, scales, nested, blocksize, _ = packed(stored)
    return op(dy, data, scales, nested, k, blocksize, None, None, 1.0)[0]


_lib.impl("bitsandbytes_grad_input", _grad_input, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastlora::bitsandbytes_grad_input",
    lambda dy, data, shape, *_: dy.new_empty((*dy.shape[:-1], shape[1])),
    lib=_lib,
)


def _keep_weight(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, data, ctx.shape, absmax, ctx.blocksize, *second = inputs
    ctx.save_for_backward(data, absmax, *second)


def _kept_weight(ctx: Any) -> Stored:
    data, absmax, *second = ctx.saved_tensors
    return Stored(data, ctx.shape, absmax, ctx.blocksize, *second)


def _second_gradient(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    return _gemm_of(ddx, _kept_weight(ctx), None), *(None,) * 7


torch.library.register_autograd(
    "fastlora::bitsandbytes_grad_input", _second_gradient, setup_context=_keep_weight, lib=_lib
)


def grad_input(dy: Tensor, stored: Stored) -> Tensor:
    """dy·W, differentiable in dy."""
    return torch.ops.fastlora.bitsandbytes_grad_input.default(dy, *stored)


def _gemm_of(x: Tensor, stored: Stored, bias: Tensor | None) -> Tensor:
    data, shape, absmax, blocksize, *second = stored
    op = torch.ops.bitsandbytes.gemm_4bit.default
    return op(x, data, shape, absmax, blocksize, "nf4", bias, *second)


class _Gemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
        _keep_weight(ctx, (x, *weight), x)
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch._C._AutoDispatchBelowAutograd():
            return _gemm_of(x, Stored(*weight), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_bias, *_ = ctx.needs_input_grad
        dx = grad_input(dy, _kept_weight(ctx)) if needs_x else None
        dbias = bias_gradient(dy, ctx.bias_dtype) if needs_bias else None
        return dx, dbias, *(None,) * 7


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.sum(dim=tuple(range(dy.dim() - 1)), dtype=dtype) if dy.dim() > 1 else dy.to(dtype)


# --- bitsandbytes' operators -------------------------------------------------------------------------------


class Operators:
    """Our kernels in the place of bitsandbytes' on one device type, until :meth:`remove`."""

    def __init__(self, device_type: str) -> None:
        key = device_type.upper()
        self._lib = torch.library.Library("bitsandbytes", "IMPL")
        self._stock: dict[str, Any] = {}
        try:
            self._put("gemm_4bit", self.gemm, key)
            self._put("gemm_4bit", self.differentiable_gemm, f"Autograd{key}")
            self._put("gemv_4bit", self.gemv, key)
            self._put("quantize_4bit", self.quantize, key)
            self._put("dequantize_4bit", self.dequantize, key)
            self._put("dequantize_4bit.out", self.dequantize_out, key)
        except BaseException:
            self.remove()
            raise

    def _put(self, op: str, kernel: Callable[..., Any], key: str) -> None:
        try:
            self._stock[kernel.__name__] = torch.library.get_kernel(_NAMESPACE + op, key)
        except RuntimeError:  # bitsandbytes has none
            self._stock[kernel.__name__] = None
        with warnings.catch_warnings():  # torch warns of every kernel that replaces one
            warnings.simplefilter("ignore")
            self._lib.impl(op, kernel, key, with_keyset=True, allow_override=True)

    def remove(self) -> None:
        self._lib._destroy()

    def _theirs(self, name: str, keys: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = self._stock[name]
        if kernel is None:
            raise NotImplementedError(f"bitsandbytes: expected NF4, which alone has a kernel for {name}")
        return kernel.call_boxed(keys, *args, **kwargs)

    def gemm(
        self, keys: Any, x: Tensor, data: Tensor, shape: Sequence[int], absmax: Tensor, blocksize: int,
        quant_type: str, bias: Tensor | None = None, *second: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if takes(quant_type, blocksize, x.dtype):
            return linear(x, Stored(data, shape, absmax, blocksize, *second), bias)
        return self._theirs("gemm", keys, x, data, shape, absmax, blocksize, quant_type, bias, *second)

    def differentiable_gemm(
        self, keys: Any, x: Tensor, data: Tensor, shape: Sequence[int], absmax: Tensor, blocksize: int,
        quant_type: str, bias: Tensor | None = None, *second: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if not takes(quant_type, blocksize, x.dtype):
            args = (x, data, shape, absmax, blocksize, quant_type, bias, *second)
            return self._theirs("differentiable_gemm", keys, *args)
        stored = Stored(data, shape, absmax, blocksize, *second)
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _Gemm.apply(x, bias, *stored)
        with torch._C._AutoDispatchBelowAutograd():
            return _gemm_of(x, stored, bias)

    def gemv(
        self, keys: Any, x: Tensor, data: Tensor, shape: Sequence[int], absmax: Tensor, code: Tensor,
        blocksize: int,
    ) -> Tensor:  # fmt: skip
        """Of a weight in its own layout too, which bitsandbytes' kernel for CPUs takes for a repacked one."""
        if not takes("fp4" if code[1] > 0 else "nf4", blocksize, x.dtype):
            return self._theirs("gemv", keys, x, data, shape, absmax, code, blocksize)
        if absmax.dim() == 1:
            return linear(x, Stored(data, shape, absmax, blocksize), None)
        if not x.numel():  # the kernel divides by the number of rows
            return x.new_empty((*x.shape[:-1], shape[0]))
        return self._theirs("gemv", keys, x.contiguous(), data, shape, absmax, code, blocksize)

    def quantize(
        self, keys: Any, weight: Tensor, blocksize: int, quant_type: str, storage: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The same bits, whatever the weight's layout in memory."""
        count = weight.numel()
        whole = (count + 1) // 2 % storage.itemsize == 0
        if count and whole and takes(quant_type, blocksize, weight.dtype):
            flat = weight.detach().reshape(1, count)
            try:
                codes, scales, _ = torch.ops.fastlora.nf4_quantize.default(flat, blocksize, False, True)
            except ValueError:  # not finite: as bitsandbytes has it
                return self._theirs("quantize", keys, weight, blocksize, quant_type, storage)
            absmax = scales.view(torch.float32)
            if count % blocksize:
                absmax[-1:].clamp_(min=1e-38)
            return codes.view(-1).view(storage).unsqueeze(1), absmax
        return self._theirs("quantize", keys, weight, blocksize, quant_type, storage)

    def dequantize(
        self, keys: Any, data: Tensor, absmax: Tensor, blocksize: int, quant_type: str,
        shape: Sequence[int], dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        if takes(quant_type, blocksize, dtype):
            return dequantize(Stored(data, shape, absmax, blocksize), dtype)
        return self._theirs("dequantize", keys, data, absmax, blocksize, quant_type, shape, dtype)

    def dequantize_out(
        self, keys: Any, data: Tensor, absmax: Tensor, blocksize: int, quant_type: str,
        shape: Sequence[int], dtype: torch.dtype, out: Tensor,
    ) -> None:  # fmt: skip
        if takes(quant_type, blocksize, dtype):
            out.copy_(dequantize(Stored(data, shape, absmax, blocksize), dtype))
            return
        self._theirs("dequantize_out", keys, data, absmax, blocksize, quant_type, shape, dtype, out=out)
