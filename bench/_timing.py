"""Timing in turns: A B C A B C ..., so that whatever disturbs the machine disturbs all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 128 * 2**20  # more than the last-level cache of the machines this runs on


@dataclass(frozen=True)
class Times:
    """Percentiles of one contender's calls, in seconds."""

    p20: float
    p50: float
    p80: float


def interleaved(calls: list[Callable[[], object]], *, rounds: int, cold: bool) -> list[Times]:
    """Each round times every call once, after one untimed round.

    cold: before each call the caches are filled with something else, as the other layers of a model do.
    Otherwise each call is preceded by an untimed one of its own.
    """
    flush = torch.zeros(_FLUSH_BYTES // 4 if cold else 0)
    kept: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, times in zip(calls, kept, strict=True):
            if cold:
                flush.add_(1.0)
            else:
                call()
            begin = time.perf_counter()
            call()
            elapsed = time.perf_counter() - begin
            if turn:
                times.append(elapsed)
    return [percentiles(times) for times in kept]


def percentiles(times: list[float]) -> Times:
    ordered = sorted(times)

    def at(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return Times(at(0.2), at(0.5), at(0.8))
