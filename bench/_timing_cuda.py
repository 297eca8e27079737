"""Timing by the device's own clock.

Python needs tens of microseconds to launch what the device may do in five. So the device is given something
else to do first, for longer than the launches take: the call's kernels then wait in the queue, start one
after the other, and the events around them tell what the device needed. What a call costs the host is
measured by the suite `overhead`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from _timing import Watch, percentiles

FLUSH_BYTES = 256 * 2**20  # some five times the L2 cache of an H100
_LEAST_BUSY = 150e-6
_TRIES = 4


class CudaClock:
    """Events on the current stream.

    The L2 cache is emptied by reading a large buffer, not by writing it: what a write leaves would have to go
    to memory while the timed call reads its own operands, and be charged to it.
    """

    def __init__(self, cold: bool) -> None:
        self.cold = cold
        self._buffer = torch.ones(FLUSH_BYTES // 4, device="cuda") if cold else None
        self._cycles_a_second = _cycles_a_second()

    def prepare(self, call: Callable[[], object]) -> None:
        if self._buffer is None:
            call()
        else:
            self._buffer.sum()

    def keep_busy(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * self._cycles_a_second))

    def once(self, call: Callable[[], Any]) -> tuple[Any, float]:
        begin = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        return result, time.perf_counter() - begin

    def watch(self, call: Callable[[], object], first: float) -> Watch:
        return _CudaWatch(self, call)

    def describe(self) -> dict[str, str]:
        watch = _CudaWatch(self, lambda: None)
        for _ in range(20):
            watch.sample()
        nothing = 1e6 * percentiles(watch.times()).p50
        return {"clock": f"CUDA events; around a call of nothing they are {nothing:.1f} us apart"}


class _CudaWatch:
    def __init__(self, clock: CudaClock, call: Callable[[], object]) -> None:
        self._clock, self._call = clock, call
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        clock.once(call)  # kernels are loaded, and libraries choose theirs, in the first calls
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        launched = time.perf_counter() - begin
        torch.cuda.synchronize()
        whole = time.perf_counter() - begin
        self._busy = max(_LEAST_BUSY, 2 * launched)
        self._tries = _TRIES
        self.expected = self._busy + (whole + 100e-6 if clock.cold else 2 * whole)

    def sample(self) -> None:
        """The sample is taken again, with more time, if the launches took the host longer than the device was
        busy: it may have waited for them. A call that waits for the device itself ends no sooner for that."""
        busy = self._busy
        for _ in range(self._tries):
            torch.cuda.synchronize()
            self._clock.prepare(self._call)
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin = time.perf_counter()
            self._clock.keep_busy(busy)
            before.record()
            self._call()
            after.record()
            spent = time.perf_counter() - begin
            if spent < busy:
                self._busy = busy
                break
            busy = 2 * spent
        else:
            self._tries = 1
        self._pairs.append((before, after))

    def times(self) -> list[float]:
        torch.cuda.synchronize()
        return [1e-3 * before.elapsed_time(after) for before, after in self._pairs]


def _cycles_a_second() -> float:
    """Of the clock that torch.cuda._sleep counts by, once the device runs at its usual one."""
    cycles, seconds = 20_000_000, 0.0
    for _ in range(3):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        torch.cuda._sleep(cycles)
        after.record()
        torch.cuda.synchronize()
        seconds = 1e-3 * before.elapsed_time(after)
    return cycles / seconds
