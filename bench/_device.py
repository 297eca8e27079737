"""What is measured: the processor, or a CUDA device. Nothing else asks torch which of them it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import _memory
import _roofs
import _roofs_cuda
import torch
from _machine import ask, last_level_cache_bytes, processor, slug, software
from _timing import AnyClock, Clock, Effort
from _timing_cuda import CudaClock

import fastlora


@dataclass(frozen=True)
class Pace:
    """What is expected, for the progress bar: operations a second in float32 and in 16 bits, bytes a second,
    seconds of a sample beside its call, and of building the contenders, a weight; and what some contenders
    spend a weight beyond the product, whatever m is."""

    float32: float
    half: float
    bytes: float
    sample: float
    building: float
    slow: dict[str, float] = field(default_factory=dict)

    def seconds(self, flops: float, weights: int, dtype: str) -> float:
        return flops / (self.float32 if dtype == "float32" else self.half) + 2 * weights / self.bytes


_SLOW_ON_A_CPU = {
    "bitsandbytes, training mode": 0.8e-9,
    "PEFT on bitsandbytes": 0.8e-9,
    "torchao NF4": 6e-9,
    "torchao int4": 1e-9,
}


class Device:
    """The processor. where: torch's name for it; kernels: what can say which kernel serves a call."""

    kind = where = "cpu"
    kernels: Any = None
    effort = Effort()
    pace = Pace(0.15e12, 0.35e12, 20e9, 1e-5, 60e-9, _SLOW_ON_A_CPU)
    patience: float | None = None  # seconds after which a case is taken to hang

    def refuse(self) -> str | None:
        """Why it cannot be measured."""
        return None

    def clock(self, cold: bool) -> AnyClock:
        return Clock(cold)

    def host_clock(self) -> AnyClock:
        """For what a call costs the processor, whatever the device does meanwhile."""
        return Clock(cold=False)

    def roofs(self, *, quick: bool) -> tuple[Any, str]:
        """The device's own speeds, or None and why not."""
        return _roofs.measure(torch.get_num_threads(), quick=quick)

    def level(self) -> str:
        return fastlora.current_isa()

    def describe(self) -> dict[str, str]:
        """One line each of the results' header."""
        return {
            "machine": processor(),
            "threads": str(torch.get_num_threads()),
            "last-level cache": f"{last_level_cache_bytes() / 2**20:.0f} MiB",
            "level": self.level(),
            **software(),
        }

    def name(self) -> str:
        """For the result files, e.g. amd-epyc-2-threads."""
        name = re.sub(r"\(.*?\)|@.*|CPU|Processor", " ", processor())
        return slug(f"{name} {torch.get_num_threads()} threads")

    def peak_growth(self, call: Callable[[], object]) -> int | None:
        return _memory.peak_growth(call)

    def usable(self) -> bool:
        """Whether it can go on after an error."""
        return True


class Cuda(Device):
    """The current CUDA device."""

    kind = where = "cuda"
    kernels = getattr(fastlora._C, "cuda", None)
    effort = Effort(seconds=0.2, least=5, most=100)
    pace = Pace(40e12, 400e12, 2e12, 5e-4, 3e-9)
    patience = 60.0

    def __init__(self) -> None:
        torch.set_float32_matmul_precision("highest")  # whatever the environment says of TF32

    def refuse(self) -> str | None:
        if not torch.cuda.is_available():
            return "expected a CUDA device for --device cuda, found none"
        if not fastlora._C.cuda_built:
            return "expected a build with CUDA kernels for --device cuda, this one holds none"
        return None

    def clock(self, cold: bool) -> AnyClock:
        return CudaClock(cold)

    def host_clock(self) -> AnyClock:
        return Clock(cold=False, wait=torch.cuda.synchronize)

    def roofs(self, *, quick: bool) -> tuple[Any, str]:
        return _roofs_cuda.measure(CudaClock(cold=False), quick=quick), ""

    def level(self) -> str:
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"

    def describe(self) -> dict[str, str]:
        device = torch.cuda.get_device_properties()
        return {
            "machine": device.name,
            "device": self.kind,
            "multiprocessors": str(device.multi_processor_count),
            "memory": f"{device.total_memory / 2**30:.0f} GiB",
            "last-level cache": f"{device.L2_cache_size / 2**20:.0f} MiB",
            "level": self.level(),
            "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "CUDA of torch": str(torch.version.cuda),
            "host": processor(),
            **software(),
        }

    def name(self) -> str:
        return slug(torch.cuda.get_device_name())

    def peak_growth(self, call: Callable[[], object]) -> int | None:
        return _memory.peak_growth_cuda(call)

    def usable(self) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


KINDS: dict[str, type[Device]] = {"cpu": Device, "cuda": Cuda}
