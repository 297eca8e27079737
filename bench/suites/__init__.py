"""What is measured, a file a suite. A suite turns the plan into cases; a case measures its contenders at one
size and returns rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import _options
import _routes
import peers
from _device import Device, Pace
from _problem import Errors, Problem
from _results import OURS, Row
from _timing import AnyClock, Effort, Times, interleaved
from peers import Peer


@dataclass(frozen=True)
class Plan:
    """What was asked for; None where the default selection applies, which each suite makes for itself."""

    suites: tuple[str, ...] = _options.SUITES
    shapes: tuple[tuple[int, int], ...] | None = None
    rows: tuple[int, ...] | None = None
    ranks: tuple[int, ...] = (16,)
    dtypes: tuple[str, ...] | None = None
    quick: bool = False
    device: str = "cpu"
    routes: tuple[str, ...] = ()  # of fastlora's CUDA kernels: each, beside the library's choice of them

    @property
    def default(self) -> bool:
        return self.shapes is None and self.rows is None and not self.quick

    def sizes(self, default: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        return self.shapes or (((1024, 4096),) if self.quick else tuple(default))

    def counts(self, default: Iterable[int]) -> tuple[int, ...]:
        return self.rows or ((1, 16, 128) if self.quick else tuple(default))

    def by_route(self) -> tuple[str, ...]:
        """The contenders where routes are to be compared."""
        return (OURS, *(name for name in peers.ROUTES if name.rpartition(" ")[2] in self.routes))

    def kinds(self, default: Iterable[str]) -> tuple[str, ...]:
        return self.dtypes or (("bfloat16",) if self.quick else tuple(default))


@dataclass
class Context:
    """What every case needs of the run, and where it says what it could not measure."""

    device: Device
    clock: AnyClock
    roofs: Any
    effort: Effort
    threads: int
    level: str
    wanted: frozenset[str]
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # what should have worked

    @property
    def cache(self) -> str:
        return "cold" if self.clock.cold else "warm"

    def peers(self, case: Case, operation: str, problem: Problem) -> list[Peer]:
        """Those of the case's that are wanted, installed and able to."""
        found, missing = peers.find(self.wanted & set(case.peers))
        built, unable = peers.build((kind for kind in found if operation in kind.operations), problem)
        self.absent.update(missing)
        self.absent.update({f"{k} at {problem.n}x{problem.k}": v for k, v in unable.items()})
        return [peer for peer in built if self.takes(peer, case)]

    def takes(self, peer: Peer, case: Case) -> bool:
        """Whether a contender that is made to take a route can take it here."""
        if peer.route in ("", "auto"):
            return True
        choice = _routes.choice(
            self.device.kernels, case.op == "dx", case.m, peer.problem, peer.rank, peer.route
        )
        return choice.route == peer.route

    def route(self, peer: Peer, case: Case) -> str:
        """Which of fastlora's kernels serve the case; "" where there is no choice."""
        kernels = self.device.kernels
        if not peer.route or kernels is None or not case.m:
            return ""
        passes = {"forward": (False,), "dx": (True,)}.get(case.op, (False, True))
        return " + ".join(
            str(_routes.choice(kernels, grad, case.m, peer.problem, peer.rank, peer.route)) for grad in passes
        )

    def attempt(
        self, case: Case, contenders: list[Peer], make: Callable[[Peer], Callable[[], Any]]
    ) -> tuple[list[Peer], list[Any], Callable[[], list[Times]]]:
        """Calls make(peer)() of each once. Returns the contenders that could, what they returned, and a
        function that times them. An error takes its contender out: another library's names it as absent, one
        of ours as failed."""
        able, calls, results, seconds = [], [], [], []
        for peer in contenders:
            call = make(peer)
            try:
                result, first = self.clock.once(call)
            except Exception as error:
                if peer.name.startswith(OURS):
                    self.failed[f"{peer.name}, {case.title()}"] = peers.reason(error)
                else:
                    self.absent[f"{peer.name} at {case.n}x{case.k}"] = peers.reason(error)
                continue
            able.append(peer)
            calls.append(call)
            results.append(result)
            seconds.append(first)
        return able, results, lambda: interleaved(calls, self.effort, self.clock, seconds)

    def roof_of_layer(self, m: int, moved: int, flops: float, dtype: str) -> tuple[str, float] | None:
        """(name, seconds) of what bounds it."""
        return self.roofs and self.roofs.of_layer(m, moved, flops, dtype, self.clock.cold)

    def row(
        self,
        case: Case,
        peer: Peer,
        times: Times,
        *,
        moved: int,
        flops: float,
        roof: tuple[str, float] | None,
        errors: Errors,
    ) -> Row:
        """moved: bytes that the work must read and write; flops: its floating-point operations."""
        return Row(
            **case.labels(),
            level=self.level,
            threads=self.threads,
            cache=self.cache,
            peer=peer.name,
            rounds=times.rounds,
            p20_us=1e6 * times.p20,
            p50_us=1e6 * times.p50,
            p80_us=1e6 * times.p80,
            gbps=moved / times.p50 / 1e9,
            tflops=flops / times.p50 / 1e12 if flops else None,
            roof=roof[0] if roof else "",
            roof_percent=100 * roof[1] / times.p50 if roof else None,
            arithmetic_error=errors.arithmetic,
            total_error=errors.total,
            composite_error=errors.composite,
            weight_mib=peer.weight_bytes() / 2**20,
            route=self.route(peer, case),
        )

    def memory_row(self, case: Case, peer: Peer, size: float, weight_bytes: int | None = None) -> Row:
        """A row of bytes instead of times."""
        return Row(
            **case.labels(),
            level=self.level,
            threads=self.threads,
            cache="",
            peer=peer.name,
            route=self.route(peer, case),
            weight_mib=None if weight_bytes is None else weight_bytes / 2**20,
            mib=size / 2**20,
        )

    def peaks(self, case: Case, calls: Iterable[tuple[Peer, Callable[[], Any]]]) -> list[Row]:
        """How far each call's memory grows, after a first call of it."""
        rows = []
        for peer, call in calls:
            grown = self.device.peak_growth(call)
            if grown is None:
                self.absent[case.op] = "this system does not reset a process's peak (/proc/self/clear_refs)"
                break
            rows.append(self.memory_row(case, peer, grown, peer.weight_bytes()))
        return rows


@dataclass(frozen=True)
class Case:
    """One op at one size. peers: the names of those to measure; run: does it; passes: over the weight."""

    suite: str
    op: str
    n: int
    k: int
    r: int
    m: int
    dtype: str
    peers: tuple[str, ...]
    run: Callable[[Case, Context, Problem], list[Row]]
    passes: int = 1

    @property
    def problem(self) -> tuple[int, int, int, str]:
        return self.n, self.k, self.r, self.dtype

    def labels(self) -> dict:
        return {name: getattr(self, name) for name in ("suite", "op", "n", "k", "r", "m", "dtype")}

    def title(self) -> str:
        return f"{self.op} {self.n}x{self.k} m {self.m}"

    def cost(self, effort: Effort, pace: Pace) -> float:
        """The seconds it is expected to take, for the progress bar."""
        base = pace.seconds(2.0 * self.m * self.n * self.k, self.n * self.k, self.dtype)
        slow = sum(pace.slow.get(peer, 0.0) * self.n * self.k for peer in self.peers)
        each = effort.cost(self.passes * base + pace.sample)
        return len(self.peers) * each + (1 + effort.least) * self.passes * slow
