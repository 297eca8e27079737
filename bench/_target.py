"""What a target is, and how a run's rows are held against it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from _results import OURS, Row, geometric_mean

# The unit says how the figure comes out of rows, and which way is better.
SPEED = "x"  # another contender's time over ours; more is better
ROOF = "% of the roof"  # more is better
FLOOR = "x the floor"  # our time over what the roof allows; less is better
EXTRA = "% more time"  # than another contender; less is better
MICROSECONDS = "us"  # less is better
MIB = "MiB at most"  # the largest; less is better
MEMORY = "x its memory"  # ours over another contender's; less is better
WORST_ERROR = "x its error"  # the largest error over the composite's; less is better
_MORE = (SPEED, ROOF)
_LARGEST = (MIB, WORST_ERROR)  # the figure is the largest value, not the mean


@dataclass(frozen=True)
class Target:
    """`least` is what is asked for, `reach` what is hoped for, in `unit`; peer is who it is compared with.
    m: the rows of x that it speaks of; "" of level is the run's own; least_weights: of smaller layers it says
    nothing."""

    work: str
    suite: str
    op: str
    unit: str
    least: float
    reach: float | None = None
    peer: str = ""
    m: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    level: str = ""
    ours: str = OURS
    least_weights: int = 0

    @property
    def more_is_better(self) -> bool:
        return self.unit in _MORE

    def is_better(self, a: float, b: float) -> bool:
        """No worse, that is; and nothing is worse than what is no number."""
        return a >= b if self.more_is_better else a <= b


@dataclass(frozen=True)
class Outcome:
    """figure: None where the rows it needs were not measured; points: how many values it is of; worst: the
    worst of them, and where it was met."""

    target: Target
    figure: float | None
    points: int
    worst: float | None = None
    where: str = ""

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not measured"
        # Rounded as it is printed, so that what reads as reached is.
        figure, target = round(self.figure, 2), self.target
        if target.reach is not None and target.is_better(figure, target.reach):
            return "hit, and what it reached for"
        return "hit" if target.is_better(figure, target.least) else "missed"


def evaluate(target: Target, rows: list[Row], level: str, shapes: tuple[tuple[int, int], ...]) -> Outcome:
    """level: the run's own, which a target without one means. Layers count at `shapes` only, if the rows have
    any of them."""
    level = target.level or level
    near = [r for r in rows if (r.suite, r.op, r.level) == (target.suite, target.op, level)]
    near = [r for r in near if not target.m or r.m in target.m]
    if target.unit not in _LARGEST:
        near = [r for r in near if r.dtype == target.dtype]
    if target.suite in ("linear", "backward", "train") and target.unit != WORST_ERROR:
        near = [r for r in near if (r.n, r.k) in shapes] or near
    near = [r for r in near if r.n * r.k >= target.least_weights]
    found = [(_value(target, row, near), row) for row in near if row.peer == target.ours]
    values = [(_shown(target, value), row) for value, row in found if value is not None]
    if not values:
        return Outcome(target, None, 0)
    worst, row = max(values, key=lambda one: _badness(target, one[0]))
    figure = worst
    if target.unit not in _LARGEST:
        figure = _shown(target, geometric_mean(value for value, _ in found if value is not None))
    where = f"{row.n}x{row.k}" + (f", m {row.m}" if row.m else "")
    return Outcome(target, figure, len(values), worst, where)


def _shown(target: Target, value: float) -> float:
    return 100 * (value - 1) if target.unit == EXTRA else value


def _badness(target: Target, value: float) -> float:
    if math.isnan(value):
        return math.inf
    return -value if target.more_is_better else value


def _value(target: Target, row: Row, rows: list[Row]) -> float | None:
    """Of one row; a ratio where the mean is to be taken of ratios."""
    if target.unit == MIB:
        return row.mib
    if target.unit == WORST_ERROR:
        if row.arithmetic_error is None or not row.composite_error:
            return None
        return row.arithmetic_error / row.composite_error
    if target.unit == MICROSECONDS:
        return row.p50_us
    if target.unit in (ROOF, FLOOR):
        return row.roof_percent and (row.roof_percent if target.unit == ROOF else 100 / row.roof_percent)
    other = next((o for o in rows if o.peer == target.peer and o.case == row.case and o.m == row.m), None)
    if other is None:
        return None
    if target.unit == MEMORY:
        return row.mib / other.mib if row.mib and other.mib else None
    if not other.p50_us or not row.p50_us:
        return None
    return other.p50_us / row.p50_us if target.unit == SPEED else row.p50_us / other.p50_us
