"""The CUDA half of the ops: how tensors on a device reach `_C.cuda`, and the format's kernels.

Kernels run on torch's current stream of the tensors' device and never wait for it. Tests run the same
functions on an emulated device: see :class:`Device`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import _C
from .checks import (
    DTYPE_CODE,
    NESTED_BLOCKSIZE,
    Packed,
    block_count,
    group_count,
    raise_not_finite,
    whole,
)

_DEVICE_ERROR = 5


class Device:
    """A CUDA device: hands addresses to its kernels. tests/ has another, which is emulated on CPU tensors."""

    kernels: Any = getattr(_C, "cuda", None)

    def call(
        self, kernel: str, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None], *numbers: float
    ) -> int:
        """Launch a kernel on the current device and stream. Returns a status; RuntimeError where the device
        reports an error."""
        status = self.ask(kernel, inputs, outputs, *numbers)
        if status == _DEVICE_ERROR:
            raise RuntimeError(f"{kernel}: the device reports: {self.kernels.error()}")
        return status

    def ask(
        self, kernel: str, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None], *numbers: float
    ) -> int:
        """What the function of that name says of a call, as it is."""
        tensors = [0 if t is None else t.data_ptr() for t in (*inputs, *outputs)]
        return getattr(self.kernels, kernel)(*tensors, *numbers, self.stream())

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream

    def capturing(self) -> bool:
        """Whether launches go into a CUDA graph instead of running."""
        return torch.cuda.is_current_stream_capturing()


def parts(weight: Packed) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What kernels read of a weight: its scales at whole addresses, and the dynamic map."""
    packed, scales, nested, *_ = weight
    return packed, whole(scales), whole(nested), dynamic_map(packed.device)


def rows(x: Tensor) -> int:
    return prod(x.shape[:-1])


@cache
def dynamic_map(device: torch.device) -> Tensor:
    from .ops import nf4_dynamic_map

    return nf4_dynamic_map().to(device)


def quantize(
    device: Device, weight: Tensor, blocksize: int, double_quant: bool, check_finite: bool, packed: Tensor,
    scales: Tensor, nested: Tensor,
) -> int:  # fmt: skip
    """`check_finite` waits for the device."""
    if check_finite and device.capturing():
        raise RuntimeError(
            "nf4_quantize: expected check_finite=False while a CUDA graph is captured, for the check waits"
        )
    if not weight.numel():
        nested.zero_()
        return 0
    where = weight.device
    cols, blocks = weight.shape[-1], block_count(weight.numel(), blocksize)
    absmax = torch.empty(blocks, dtype=torch.float32, device=where) if double_quant else scales
    partials = (
        torch.empty(2 * device.kernels.quantize_partials, dtype=torch.float64, device=where)
        if double_quant
        else None
    )
    not_finite = torch.zeros(1, dtype=torch.int32, device=where)
    status = device.call(
        "nf4_quantize",
        (weight, dynamic_map(where)),
        (packed, absmax, scales if double_quant else None, nested, partials, not_finite),
        DTYPE_CODE[weight.dtype], weight.numel() // cols, cols, blocksize,
    )  # fmt: skip
    if not status and check_finite and not_finite.item():
        raise_not_finite("nf4_quantize", weight)
    return status


def dequantize(
    device: Device, packed: Tensor, scales: Tensor, nested: Tensor | None, cols: int, blocksize: int,
    dtype: torch.dtype, offsets: Tensor | None, out: Tensor,
) -> int:  # fmt: skip
    rows = packed.shape[0]
    if offsets is not None:
        exact = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        status = dequantize(device, packed, scales, nested, cols, blocksize, exact.dtype, None, exact)
        exact.view(rows, group_count(offsets), -1).add_(whole(offsets).view(torch.float32).unsqueeze(2))
        out.copy_(exact)
        return status
    return device.call(
        "nf4_dequantize",
        (packed, whole(scales), whole(nested), dynamic_map(packed.device)),
        (out,),
        DTYPE_CODE[dtype], rows, cols, blocksize, 0, rows, 0, cols,
    )  # fmt: skip


def decode_absmax(device: Device, scales: Tensor, nested: Tensor | None, absmax: Tensor) -> int:
    """By torch's own operators: nothing on a fast path needs the decoded values."""
    if nested is None:
        absmax.copy_(scales.view(torch.float32))
        return 0
    values = nested.view(torch.float32)
    scale = values[1:].repeat_interleave(NESTED_BLOCKSIZE)[: scales.numel()]
    torch.mul(dynamic_map(scales.device)[scales.long()], scale, out=absmax)
    absmax.add_(values[0])  # apart from the product: two roundings
    return 0
