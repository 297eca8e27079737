"""How every kernel is launched, on a device of any architecture: asked of the host code itself.

The emulated device can list launches instead of running them, so the calls below cost nothing, whatever their
size; names, threads and shared memory are those that csrc/cuda passes to a real launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import devices
import torch
from torch import Tensor

from fastlora import _emulator, checks, cuda, cuda_dense, cuda_linear, ops
from fastlora.checks import DTYPE_CODE, Packed


@dataclass(frozen=True)
class Launch:
    kernel: str  # with its template's arguments
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes
    cooperative: bool
    overlaps: bool


@contextmanager
def listed(*, run: bool) -> Iterator[list[Launch]]:
    """Fills the list, when the block ends, with what was launched in it."""
    launches: list[Launch] = []
    _emulator.list_launches(run)
    try:
        yield launches
    finally:
        launches += [Launch(*it) for it in _emulator.take_launches()]


def blank_weight(n: int, k: int, blocksize: int = 64) -> Packed:
    """Storage of the sizes that a weight has, double quantisation included."""
    blocks = checks.block_count(n * k, blocksize)
    groups = checks.block_count(blocks, checks.NESTED_BLOCKSIZE)

    def made(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.uint8)

    return made(n, (k + 1) // 2), made(blocks), made(4 * (1 + groups)), blocksize


def _call_format(device: cuda.Device, dtype: torch.dtype) -> None:
    for rows, cols, start in ((4, 64, 0), (4, 64, 1), (3, 33, 0)):  # 1: not at a vector
        weight = torch.zeros(rows * cols + start, dtype=dtype)[start:].reshape(rows, cols)
        ops.CUDA_OPS["nf4_quantize"](device, weight, 64, True, False)
    for cols, wanted in ((64, 64), (128, 64), (33, 33)):
        out, weight = torch.zeros(4, wanted, dtype=dtype), blank_weight(4, cols)
        window = (4, cols, 64, 0, 4, 0, wanted)
        device.call("nf4_dequantize", cuda.parts(weight), (out,), DTYPE_CODE[dtype], *window)
        cuda_dense._fill_slab(device, weight, cols, (0, 4), (0, wanted), out, None, None, 1.0, below=False)


def _call_dropout(device: cuda.Device, dtype: torch.dtype) -> None:
    for count in (64, 63):
        ops.CUDA_OPS["lora_dropout"](device, torch.zeros(count, dtype=dtype), torch.tensor(1), 0.5)


def _call_adamw(device: cuda.Device, dtype: torch.dtype) -> None:
    p, numbers = torch.zeros(300, dtype=dtype), (0.1, 0.9, 0.99, 1e-8, 0.1, 1)
    ops.CUDA_OPS["adamw"](device, p, p.clone(), *torch.zeros(2, 300), *numbers)
    codes, scales = torch.zeros(2, 300, dtype=torch.uint8), torch.zeros(2, 2)
    ops.CUDA_OPS["adamw_8bit"](device, p, p.clone(), *codes, *scales, *numbers)


def _call_layer(device: cuda.Device, dtype: torch.dtype) -> None:
    """Every width of a tile and every rank that has a kernel of its own, in both directions."""
    op = ops.CUDA_OPS
    widths = {"decode": (1,), "tile": (8, 16, 32, 64, 96), "warpgroup": (16, 32, 64, 128, 256)}
    for route, rows in widths.items():
        with cuda_linear.use_route(route):
            # Whole blocks, blocks of 32, blocks that straddle rows; sums that are split, in vectors or not.
            for n, k, blocksize in (
                (16, 128, 64), (256, 128, 64), (256, 128, 32), (40, 72, 64), (40, 80, 32), (128, 1024, 64),
                (126, 1024, 64),
            ):  # fmt: skip
                packed, scales, nested, _ = blank_weight(n, k, blocksize)
                for m in rows:
                    x, dy = torch.zeros(m, k, dtype=dtype), torch.zeros(m, n, dtype=dtype)
                    op["nf4_linear"](device, x, packed, scales, nested, blocksize, None, None, None, 1.0)
                    op["nf4_linear_grad_input"](
                        device, dy, packed, scales, nested, k, blocksize, None, None, 1.0
                    )
    packed, scales, nested, _ = blank_weight(256, 128)
    for r in (16, 32, 64):
        for m in (1, 64):
            x, dy = torch.zeros(m, 128, dtype=dtype), torch.zeros(m, 256, dtype=dtype)
            a, b, u = torch.zeros(r, 128), torch.zeros(256, r), torch.zeros(m, r, dtype=dtype)
            op["nf4_linear"](device, x, packed, scales, nested, 64, None, a, b, 1.0)
            op["nf4_linear_grad_input"](device, dy, packed, scales, nested, 128, 64, a, b, 1.0)
            op["lora_grad_b"](device, dy, u, b, 1.0)
            op["lora_grad_a"](device, u, x, torch.float32)


def _table(k: int, n: int, rank: int, dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    """A pair of pools of one slice with two slots."""
    return [torch.zeros(2 * rank, k, dtype=dtype)], [torch.zeros(2 * rank, n, dtype=dtype)]


def _call_adapters(device: cuda.Device, dtype: torch.dtype) -> None:
    """Every kernel of many adapters: few and many rows, narrow and wide ranks, contractions and segments that
    are split; beside weights by every kernel that takes adapters."""
    op = ops.CUDA_OPS
    entries, scaling = torch.tensor([[0, 1], [1, 1]], dtype=torch.int32), torch.ones(2)

    def routed(m: int) -> tuple[Tensor, Tensor]:
        op["lora_route"](device, torch.zeros(m, dtype=torch.int32), 2)
        return torch.zeros(m, dtype=torch.int32), torch.zeros(min(m, 2) + 1, 2, dtype=torch.int32)

    for m, k in ((4, 128), (4, 2048), (4096, 64)):
        for rank in (16, 64):
            a, b = _table(k, 64, rank, dtype)
            adapters = (a, b, entries, scaling, *routed(m), [rank])
            x, dy = torch.zeros(m, k, dtype=dtype), torch.zeros(m, 64, dtype=dtype)
            u, v = (torch.zeros(m, rank, dtype=dtype) for _ in range(2))
            op["segmented_lora"](device, x, *adapters, dy)
            op["segmented_lora_grad_input"](device, dy, *adapters, x)
            op["segmented_lora_grad_pools"](device, x, dy, u, v, *adapters)
    if dtype is torch.float32:
        return
    for route, rows in {"decode": (1,), "tile": (8, 16, 32, 64)}.items():
        with cuda_linear.use_route(route):
            for n, k, blocksize in (
                (16, 128, 64),
                (8192, 128, 64),
                (256, 128, 32),
                (40, 72, 64),
                (40, 80, 32),
            ):
                packed, scales, nested, _ = blank_weight(n, k, blocksize)
                for m, invariant in itertools.product(rows, (False, True)):
                    a, b = _table(k, n, 16, dtype)
                    adapters = (a, b, entries, scaling, *routed(m), [16], invariant)
                    x, dy = torch.zeros(m, k, dtype=dtype), torch.zeros(m, n, dtype=dtype)
                    op["nf4_multi_lora_linear"](device, x, packed, scales, nested, blocksize, None, *adapters)
                    op["nf4_multi_lora_grad_input"](
                        device, dy, packed, scales, nested, k, blocksize, *adapters
                    )


def launches_on(arch: str) -> dict[str, set[Launch]]:
    """Kernel by name -> how it is launched on a device of an architecture, 90a, say: once for every size of
    its shared memory. Kernels that are never chosen there are left out."""
    device = devices.EmulatedDevice(seed=1)
    _emulator.set_traits(capability=int(arch.rstrip("af")))
    try:
        with listed(run=False) as launches:
            for dtype in DTYPE_CODE:
                _call_format(device, dtype)
                _call_dropout(device, dtype)
                _call_adamw(device, dtype)
                if dtype is not torch.float32:  # whose products are torch's
                    _call_layer(device, dtype)
            _emulator.set_traits(capability=int(arch.rstrip("af")), processors=8)  # to split segments for
            for dtype in DTYPE_CODE:
                _call_adapters(device, dtype)
    finally:
        _emulator.set_traits()  # as at first
    sizes = {(launch.kernel, launch.shared): launch for launch in launches}
    return {name: {it for (kernel, _), it in sizes.items() if kernel == name} for name, _ in sizes}
