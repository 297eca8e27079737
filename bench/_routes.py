"""The routes of fastlora's CUDA kernels: which one serves a call, how to ask for another, and a table of what
each took beside what the library chose. All that bench/ knows of the library's own choice is here."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from _options import ROUTES
from _results import OURS, Row, geometric_mean

from fastlora import cuda_linear
from fastlora.checks import DTYPE_CODE

_NAMES = {code: name for name, code in cuda_linear.ROUTES.items()}


@dataclass(frozen=True)
class Choice:
    """columns: of a tile, or rows of W of a block that decodes, in the kernel's own measure; splits of the
    contraction."""

    route: str
    columns: int
    splits: int

    def __str__(self) -> str:
        return self.route if self.route == "dense" else f"{self.route} {self.columns}/{self.splits}"


def use_route(route: str) -> AbstractContextManager[None]:
    """Calls inside take it where it can take them."""
    return cuda_linear.use_route(route)


def choice(kernels: Any, grad_input: bool, m: int, problem: Any, rank: int, route: str) -> Choice:
    """What a call of m rows takes on the current device when `route` is asked for ("auto": nothing is)."""
    dtype, blocksize = DTYPE_CODE[problem.kind], 64
    code, columns, splits = kernels.nf4_linear_plan(
        grad_input, m, problem.n, problem.k, rank, blocksize, dtype, cuda_linear.ROUTES[route]
    )
    return Choice(_NAMES[code], columns, splits)


# --- what each route took ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One piece of work at one size: microseconds by route, and the route that the library chose."""

    work: str
    n: int
    k: int
    m: int
    times: dict[str, float]
    chosen: str

    @property
    def fastest(self) -> str:
        return min(self.times, key=lambda route: self.times[route])

    @property
    def loss(self) -> float:
        """The chosen route's time over the fastest one's."""
        return self.times[self.chosen] / self.times[self.fastest]


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """Of the sizes at which routes were measured, the chosen one among them."""
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.peer.startswith(OURS) and row.p50_us:
            cases.setdefault((*row.case, row.m), []).append(row)
    found = []
    for group in cases.values():
        first = group[0]
        names = {f"{OURS}, by {route}": route for route in ROUTES}
        times = {names[row.peer]: row.p50_us for row in group if row.peer in names}
        chosen = next((row.route.split(" ")[0] for row in group if row.peer == OURS), "")
        if chosen in times:
            work = f"{first.op}, {first.dtype}, r {first.r}"
            found.append(Comparison(work, first.n, first.k, first.m, times, chosen))
    return found


def table(rows: Iterable[Row]) -> list[str]:
    """The Markdown of it, and how much the choices lose in the mean; nothing where no route was measured."""
    compared = compare(rows)
    if not compared:
        return []
    out = [
        "Microseconds by route, the library's own choice, and its time over the fastest route's.",
        "",
        f"| work | n x k | m | {' | '.join(ROUTES)} | chosen | fastest | loss |",
        "|:--|--:|--:|" + "--:|" * len(ROUTES) + ":--|:--|--:|",
    ]
    for c in compared:
        cells = [f"{c.times[route]:.1f}" if route in c.times else "" for route in ROUTES]
        loss = f"{c.loss:.2f}"
        fastest = c.fastest if c.chosen == c.fastest else f"**{c.fastest}**"
        out.append(
            f"| {c.work} | {c.n}x{c.k} | {c.m} | {' | '.join(cells)} | {c.chosen} | {fastest} | {loss} |"
        )
    for work in dict.fromkeys(c.work for c in compared):
        losses = [c.loss for c in compared if c.work == work]
        missed = sum(loss > 1.02 for loss in losses)
        out += [
            "",
            f"{work}: the choice takes {100 * (geometric_mean(losses) - 1):.1f} % longer than the fastest "
            f"route in the geometric mean over {len(losses)} sizes, over 2 % longer at {missed} of them, "
            f"{100 * (max(losses) - 1):.0f} % at the worst.",
        ]
    return [*out, ""]
