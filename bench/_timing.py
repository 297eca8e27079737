"""Timing in turns: A B C A B C ..., so that whatever disturbs the machine disturbs all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _machine import last_level_cache_bytes

_FLUSH_SECONDS = 3e-3  # about


@dataclass(frozen=True)
class Times:
    """Percentiles of one contender's calls, in seconds, and how many were timed."""

    p20: float
    p50: float
    p80: float
    rounds: int


@dataclass(frozen=True)
class Effort:
    """How long to measure one contender at one size: about `seconds`, within these numbers of rounds."""

    seconds: float = 0.12
    least: int = 3
    most: int = 25

    def rounds(self, call: float) -> int:
        return max(self.least, min(self.most, int(self.seconds / max(call, 1e-7))))

    def cost(self, call: float) -> float:
        """Seconds that a contender of `call` seconds is expected to take, its untimed round included."""
        return call * (1 + self.rounds(call))


class Flush:
    """Empties the caches by reading something else twice their size: lines left clean cost nothing later."""

    def __init__(self) -> None:
        size = min(max(2 * last_level_cache_bytes(), 32 * 2**20), 256 * 2**20)
        self._buffer = torch.ones(size // 4)

    def __call__(self) -> None:
        self._buffer.sum()


def once(call: Callable[[], Any]) -> tuple[Any, float]:
    """What the call returns, and its seconds."""
    begin = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begin


def interleaved(
    calls: list[Callable[[], object]],
    effort: Effort,
    flush: Callable[[], None] | None,
    first: list[float],
) -> list[Times]:
    """Times every call in turns. first: the seconds of a call of each, which say how many rounds it gets.

    A slow contender has fewer rounds than a fast one, spread evenly over the fast one's. flush: called before
    every timed call, as the other layers of a model would; without it each call is preceded by an untimed one
    of its own, so that it finds the caches as it left them.
    """
    rounds = []
    for call, seconds in zip(calls, first, strict=True):
        # A first call pays for what later ones find ready: packed weights, libraries' own choices.
        usual = once(call)[1] if seconds < 0.1 else seconds
        rounds.append(effort.rounds(2 * usual if flush is None else usual + _FLUSH_SECONDS))
    total = max(rounds, default=0)
    kept: list[list[float]] = [[] for _ in calls]
    for turn in range(total):
        for call, times, share in zip(calls, kept, rounds, strict=True):
            if (turn + 1) * share // total == turn * share // total:
                continue
            if flush is not None:
                flush()
            else:
                call()
            times.append(once(call)[1])
    return [percentiles(times) for times in kept]


def percentiles(times: list[float]) -> Times:
    ordered = sorted(times)

    def at(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return Times(at(0.2), at(0.5), at(0.8), len(ordered))
