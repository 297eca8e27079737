"""A device for PinnedStore where there is none: streams that run late, in an order drawn from a seed, and a
check that who touches bytes comes after those who wrote them and, to write, after those who read them.

Order is known by vector clocks: an event carries its stream's clock, and who waits for it takes it over. So a
wait that is missing is found in every run, and not only where the order was unlucky.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Clock = dict[str, int]


@dataclass
class Event:
    clock: Clock
    happened: bool = False


@dataclass
class Stream:
    name: str
    clock: Clock = field(default_factory=dict)
    queue: list[tuple[Event | None, Callable[[], None]]] = field(default_factory=list)


@dataclass
class Access:
    begin: int
    end: int
    stream: str
    tick: int
    writes: bool


def _span(t: Tensor) -> tuple[int, int]:
    begin = t.data_ptr()
    return begin, begin + t.nbytes


def _merge(into: Clock, other: Clock) -> None:
    for name, tick in other.items():
        into[name] = max(into.get(name, 0), tick)


class FakeDevice:
    """What pinned_store.Cuda has. `deaf`: the stream that does not hear what it is told to wait for."""

    def __init__(self, seed: int = 0, deaf: str = "") -> None:
        self.main, self.incoming, self.outgoing = (Stream(it) for it in ("main", "incoming", "outgoing"))
        self.host = Stream("host")
        self.free, self.total = 1 << 40, 1 << 40
        self.refusals = 0  # of allocations to come
        self.given_back = 0
        self.staged = 0  # bytes that came in
        self._random, self._deaf = random.Random(seed), deaf
        self._accesses: dict[int, list[Access]] = defaultdict(list)  # by storage
        self._kept: list[Tensor] = []  # so that no address is used twice
        self._on_host: set[int] = set()

    # --- what a store asks for ----------------------------------------------------------------------------

    def current(self) -> Stream:
        return self.main

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.refusals:
            self.refusals -= 1
            raise torch.OutOfMemoryError("none left")
        return self._made(shape, dtype)

    def zero(self, t: Tensor) -> None:
        """At once: nobody else has this memory yet, and what is loaded into it is not copied in a stream."""
        self._check(self.main, [], [t])
        t.zero_()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        t = self._made(shape, dtype)
        self._on_host.add(t.untyped_storage().data_ptr())
        return t

    def copy(self, to: Tensor, source: Tensor, stream: Stream) -> None:
        assert self.is_on_host(to) != self.is_on_host(source), "a copy between two places of one kind"
        self.staged += source.nbytes if stream is self.incoming else 0
        self.run(stream, lambda: to.copy_(source), reads=[source], writes=[to])

    def record(self, stream: Stream) -> Event:
        event = Event(dict(stream.clock))

        def happen() -> None:
            event.happened = True

        stream.queue.append((None, happen))
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        if stream.name != self._deaf:
            _merge(stream.clock, event.clock)
            stream.queue.append((event, lambda: None))

    def wait_host(self, event: Event) -> None:
        while not event.happened:
            self._run_one()
        _merge(self.host.clock, event.clock)

    def memory(self) -> tuple[int, int]:
        return self.free, self.total

    def give_back(self) -> None:
        self.given_back += 1

    # --- what a test asks for -----------------------------------------------------------------------------

    def run(
        self,
        stream: Stream,
        work: Callable[[], object],
        reads: Iterable[Tensor] = (),
        writes: Iterable[Tensor] = (),
    ) -> None:
        """Put work into a stream. AssertionError where something that it touches may still be under way."""
        _merge(stream.clock, self.host.clock)
        self._check(stream, reads, writes)
        stream.queue.append((None, lambda: (work(), None)[1]))
        for _ in range(self._random.randrange(3)):
            self._run_one()

    def host_reads(self, t: Tensor) -> Tensor:
        self._check(self.host, [t], [])
        return t.detach().clone()

    def finish(self) -> None:
        while self._run_one():
            pass
        assert not any(it.queue for it in self._streams()), "streams wait for each other"
        for stream in self._streams():
            _merge(self.host.clock, stream.clock)

    def is_on_host(self, t: Tensor) -> bool:
        return t.untyped_storage().data_ptr() in self._on_host

    # --- how ----------------------------------------------------------------------------------------------

    def _streams(self) -> tuple[Stream, ...]:
        return self.main, self.incoming, self.outgoing

    def _made(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        t = torch.empty(shape, dtype=dtype)
        t.view(-1).view(torch.uint8).fill_(0xFF)
        self._kept.append(t.detach())
        return t

    def _check(self, stream: Stream, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        tick = stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
        for tensors, writing in ((reads, False), (writes, True)):
            for t in tensors:
                begin, end = _span(t)
                known = self._accesses[t.untyped_storage().data_ptr()]
                for it in known:
                    touches = it.begin < end and begin < it.end and (writing or it.writes)
                    mine, its = ("writes" if writing else "reads"), ("writing" if it.writes else "reading")
                    assert not touches or it.tick <= stream.clock.get(it.stream, 0), (
                        f"{stream.name} {mine} bytes that {it.stream} may still be {its}"
                    )
                known.append(Access(begin, end, stream.name, tick, writing))

    def _run_one(self) -> bool:
        able = [
            it for it in self._streams() if it.queue and (it.queue[0][0] is None or it.queue[0][0].happened)
        ]
        if not able:
            return False
        self._random.choice(able).queue.pop(0)[1]()
        return True
