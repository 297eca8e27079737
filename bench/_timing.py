"""Timing in turns: A B C A B C ..., so that whatever disturbs the machine disturbs all alike.

A clock says how a call is timed; :class:`Clock` by the processor's own, _timing_cuda.CudaClock by the
device's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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

    def each_of(self, parts: int) -> Times:
        """Of one of the equal parts that a call consists of."""
        return Times(self.p20 / parts, self.p50 / parts, self.p80 / parts, self.rounds)


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


class Watch(Protocol):
    """Times one call, again and again. expected: the seconds of a sample, what goes before it included."""

    expected: float

    def sample(self) -> None: ...

    def times(self) -> list[float]: ...


class AnyClock(Protocol):
    """cold: the caches are emptied before every timed call, as the other layers of a model would; without it
    each is preceded by an untimed one of its own, so that it finds the caches as it left them."""

    cold: bool

    def once(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What the call returns, done, and its seconds."""
        ...

    def watch(self, call: Callable[[], object], first: float) -> Watch:
        """first: the seconds of the call that `once` made."""
        ...

    def describe(self) -> dict[str, str]:
        """What of it belongs into the results' header."""
        ...


class Clock:
    """The processor's. wait: what to wait for after every call, outside the time."""

    def __init__(self, cold: bool, wait: Callable[[], None] = lambda: None) -> None:
        self.cold, self.wait = cold, wait
        self._flush = Flush() if cold else None

    def prepare(self, call: Callable[[], object]) -> None:
        (self._flush or call)()
        self.wait()

    def once(self, call: Callable[[], Any]) -> tuple[Any, float]:
        begin = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - begin
        self.wait()
        return result, seconds

    def watch(self, call: Callable[[], object], first: float) -> Watch:
        # A first call pays for what later ones find ready: packed weights, libraries' own choices.
        usual = self.once(call)[1] if first < 0.1 else first
        return _Watch(self, call, usual + _FLUSH_SECONDS if self.cold else 2 * usual)

    def describe(self) -> dict[str, str]:
        return {}


class _Watch:
    def __init__(self, clock: Clock, call: Callable[[], object], expected: float) -> None:
        self._clock, self._call, self.expected = clock, call, expected
        self._times: list[float] = []

    def sample(self) -> None:
        self._clock.prepare(self._call)
        self._times.append(self._clock.once(self._call)[1])

    def times(self) -> list[float]:
        return self._times


def interleaved(
    calls: list[Callable[[], object]], effort: Effort, clock: AnyClock, first: list[float]
) -> list[Times]:
    """Times every call in turns. first: the seconds of a call of each."""
    watches = [clock.watch(call, seconds) for call, seconds in zip(calls, first, strict=True)]
    for i in turns([effort.rounds(watch.expected) for watch in watches]):
        watches[i].sample()
    return [percentiles(watch.times()) for watch in watches]


def turns(rounds: Sequence[int]) -> Iterator[int]:
    """Whose turn it is, again and again: A B C A B C. Who has fewer rounds has them spread evenly over the
    others'."""
    total = max(rounds, default=0)
    for turn in range(total):
        for i, share in enumerate(rounds):
            if (turn + 1) * share // total > turn * share // total:
                yield i


def percentiles(times: list[float]) -> Times:
    ordered = sorted(times)

    def at(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return Times(at(0.2), at(0.5), at(0.8), len(ordered))
