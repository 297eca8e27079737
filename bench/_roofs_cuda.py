"""A device's own speeds, by torch's calls: how fast it copies, reads and multiplies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from _timing_cuda import CudaClock

_BYTES, _SIDE = 2**30, 8192
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class CudaRoofs:
    """GB/s and, by dtype, TFLOP/s. A layer is held against the slower of moving its bytes at the copy's rate
    and multiplying at that of a square dense product."""

    copy_gbps: float
    sum_gbps: float
    product_tflops: dict[str, float]

    def of_layer(self, m: int, moved: int, flops: float, dtype: str, cold: bool) -> tuple[str, float]:
        product = (f"{dtype} mm", flops / self.product_tflops[dtype] / 1e12)
        return max(self.of_copy(moved), product, key=lambda roof: roof[1])

    def of_quantize(self, read: int, written: int, cold: bool) -> tuple[str, float]:
        return self.of_copy(read + written)

    def of_copy(self, moved: int) -> tuple[str, float]:
        return "copy", moved / self.copy_gbps / 1e9

    def describe(self) -> dict[str, str]:
        """One line each of the results' header."""
        gib = _BYTES / 2**30
        products = ", ".join(f"{rate:.1f} in {dtype}" for dtype, rate in self.product_tflops.items())
        return {
            "copy roof": f"{self.copy_gbps:.0f} GB/s, read and written, {gib:g} GiB on the device",
            "read rate": f"{self.sum_gbps:.0f} GB/s, the sum of {gib:g} GiB of float32",
            "product roof": f"{products} TFLOP/s, torch.mm of {_SIDE} x {_SIDE} x {_SIDE}, no TF32",
        }


def measure(clock: CudaClock, *, quick: bool = False) -> CudaRoofs:
    """The best of some repeats of each."""
    rounds = 3 if quick else 10
    torch.manual_seed(0)
    source = torch.rand(_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    copy = _fastest(clock, partial(target.copy_, source), rounds)
    read = _fastest(clock, source.sum, rounds)
    del source, target
    rates = {}
    for name, dtype in _DTYPES.items():
        a, b = (torch.randn(_SIDE, _SIDE, device="cuda", dtype=dtype) for _ in range(2))
        seconds = _fastest(clock, partial(torch.mm, a, b.t()), rounds)
        rates[name] = 2 * _SIDE**3 / seconds / 1e12
    return CudaRoofs(2 * _BYTES / copy / 1e9, _BYTES / read / 1e9, rates)


def _fastest(clock: CudaClock, call: Callable[[], object], rounds: int) -> float:
    watch = clock.watch(call, 0.0)
    for _ in range(rounds):
        watch.sample()
    return min(watch.times())
