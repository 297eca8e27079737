"""What is measured, a file a suite. A suite turns the plan into cases; a case measures its contenders at one
size and returns rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import peers
from _problem import Errors, Problem
from _results import OURS, Row
from _roofs import READ_ROWS, Roofs
from _timing import Effort, Flush, Times, interleaved, once
from peers import Peer

NAMES = ("quantize", "linear", "backward", "train", "memory", "overhead")

# n x k: attention and MLP of common models; the targets' mean goes over the first five.
SHAPES = (
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (11008, 4096),
    (3584, 3584),
    (4304, 1152),
    (1152, 4304),
)
FIVE = SHAPES[:5]


@dataclass(frozen=True)
class Plan:
    """What was asked for; None where the default selection applies, which each suite makes for itself."""

    suites: tuple[str, ...] = NAMES
    shapes: tuple[tuple[int, int], ...] | None = None
    rows: tuple[int, ...] | None = None
    ranks: tuple[int, ...] = (16,)
    dtypes: tuple[str, ...] | None = None
    quick: bool = False

    @property
    def default(self) -> bool:
        return self.shapes is None and self.rows is None and not self.quick

    def sizes(self, default: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        return self.shapes or (((1024, 4096),) if self.quick else tuple(default))

    def counts(self, default: Iterable[int]) -> tuple[int, ...]:
        return self.rows or ((1, 16, 128) if self.quick else tuple(default))

    def kinds(self, default: Iterable[str]) -> tuple[str, ...]:
        return self.dtypes or (("bfloat16",) if self.quick else tuple(default))


@dataclass
class Context:
    """What every case needs of the run, and where it says what it could not measure."""

    roofs: Roofs | None
    effort: Effort
    flush: Flush | None
    threads: int
    level: str
    wanted: frozenset[str]
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def cache(self) -> str:
        return "warm" if self.flush is None else "cold"

    def peers(self, names: Iterable[str], operation: str, problem: Problem) -> list[Peer]:
        """Those of `names` that are wanted, installed and able to."""
        found, missing = peers.find(self.wanted & set(names))
        built, unable = peers.build((kind for kind in found if operation in kind.operations), problem)
        self.absent.update(missing)
        self.absent.update({f"{k} at {problem.n}x{problem.k}": v for k, v in unable.items()})
        return built

    def attempt(
        self, contenders: list[Peer], make: Callable[[Peer], Callable[[], Any]]
    ) -> tuple[list[Peer], list[Any], Callable[[], list[Times]]]:
        """Calls make(peer)() of each once. Returns the contenders that could, what they returned, and a
        function that times them. Another library's error takes that contender out, named as absent."""
        able, calls, results, seconds = [], [], [], []
        for peer in contenders:
            call = make(peer)
            try:
                result, first = once(call)
            except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
                if peer.name.startswith(OURS):
                    raise
                problem = peer.problem
                self.absent[f"{peer.name} at {problem.n}x{problem.k}"] = str(error).partition("\n")[0]
                continue
            able.append(peer)
            calls.append(call)
            results.append(result)
            seconds.append(first)
        return able, results, lambda: interleaved(calls, self.effort, self.flush, seconds)

    def roof_of_layer(self, m: int, moved: int, flops: float, dtype: str) -> tuple[str, float] | None:
        """(name, seconds): reading for a few rows, arithmetic for many."""
        if self.roofs is None:
            return None
        if m <= READ_ROWS:
            return self.roofs.of_read(moved, self.flush is not None)
        return self.roofs.of_product(flops, dtype)

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
        )


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

    def cost(self, effort: Effort) -> float:
        """The seconds it is expected to take, for the progress bar."""
        flops = 2.0 * self.m * self.n * self.k
        base = flops / (0.15e12 if self.dtype == "float32" else 0.35e12) + self.n * self.k / 10e9 + 1e-5
        slow = sum(_NANOSECONDS_A_WEIGHT.get(peer, 0.0) * 1e-9 * self.n * self.k for peer in self.peers)
        each = [self.passes * base] * len(self.peers)
        return sum(effort.cost(seconds) for seconds in each) + (1 + effort.least) * self.passes * slow


# What some contenders spend a weight beyond the product, whatever m is: for the progress bar only.
_NANOSECONDS_A_WEIGHT = {
    "bitsandbytes, training mode": 0.8,
    "PEFT on bitsandbytes": 0.8,
    "torchao NF4": 6.0,
    "torchao int4": 1.0,
}
