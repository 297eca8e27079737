"""What is to be reached, as data, and whether a run's rows reach it.

The targets were set for two threads of a machine with AMX, NF4 with double-quantised absmax and an adapter of
rank 16, bfloat16, as ratios within one run; on another machine they are yardsticks all the same.

    python bench/targets.py bench/results/MACHINE.csv
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from _results import DENSE, OURS, Results, Row, geometric_mean, read_csv

FIVE = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (11008, 4096))
EVAL, TRAINING = "bitsandbytes, eval mode", "bitsandbytes, training mode"
NO_ADAPTER, PLAIN = "fastlora, no adapter", "fastlora, plain absmax"
PEFT_BNB, PEFT_DENSE = "PEFT on bitsandbytes", "dense + LoRA (PEFT)"

# The unit says how the figure comes out of rows, and which way is better.
SPEED = "x"  # another contender's time over ours; more is better
ROOF = "% of the roof"  # more is better
FLOOR = "x the floor"  # our time over what the roof allows; less is better
EXTRA = "% more time"  # than another contender; less is better
MICROSECONDS = "us"  # less is better
MIB = "MiB at most"  # the largest; less is better
WORST_ERROR = "x its error"  # the largest error over the composite's; less is better


@dataclass(frozen=True)
class Target:
    """`least` is what is asked for, `reach` what is hoped for, in `unit`; peer is who it is compared with."""

    work: str
    suite: str
    op: str
    unit: str
    least: float
    reach: float | None = None
    peer: str = ""
    m: int | None = None
    dtype: str = "bfloat16"
    level: str = ""  # "" is the run's own
    ours: str = OURS

    @property
    def more_is_better(self) -> bool:
        return self.unit in (SPEED, ROOF)


def _forward(m: int, least: float, reach: float, peer: str = DENSE, dtype: str = "bfloat16") -> Target:
    name = {DENSE: f"dense {dtype}", EVAL: "bitsandbytes eval"}[peer]
    return Target(
        f"forward, {dtype} x, m={m}, over {name}", "linear", "forward", SPEED, least, reach, peer, m, dtype
    )


def _dx(m: int, least: float, reach: float) -> Target:
    return Target(f"dx, m={m}, over dense dy·W", "backward", "dx", SPEED, least, reach, DENSE, m)


_DENSE_FROM_16 = (
    (16, 2.0, 3.0),
    (32, 2.0, 3.0),
    (64, 1.5, 2.0),
    (128, 1.5, 2.0),
    (512, 1.3, 1.7),
    (1024, 1.3, 1.7),
    (2048, 1.3, 1.7),
)

TARGETS = (
    _forward(1, 3.6, 5.0),
    _forward(1, 1.6, 1.6, EVAL),
    Target("forward, m=1, of the read roof", "linear", "forward", ROOF, 70, 90, m=1),
    _forward(4, 2.5, 3.0),
    _forward(8, 2.0, 3.0),
    *(_forward(*numbers) for numbers in _DENSE_FROM_16),
    *(_dx(*numbers) for numbers in _DENSE_FROM_16),
    Target(
        "training step, m=1024, over PEFT on bitsandbytes",
        "train", "training step", SPEED, 2.0, 3.3, PEFT_BNB, 1024,
    ),
    Target(
        "training step, m=1024, over PEFT on dense",
        "train", "training step", SPEED, 1.6, 2.5, PEFT_DENSE, 1024,
    ),
    _forward(1, 3.0, 5.0, dtype="float32"),
    _forward(128, 1.0, 1.2, dtype="float32"),
    _forward(512, 1.0, 1.2, dtype="float32"),
    Target("quantise, over bitsandbytes", "quantize", "quantize", SPEED, 40, None, TRAINING),
    Target("quantise, over one read of the weight", "quantize", "quantize", FLOOR, 3.0, 1.5),
    Target(
        "dequantise to bfloat16, memory given, of the copy roof",
        "quantize", "dequantize, memory given", ROOF, 80, 90,
    ),
    *(
        Target(
            f"adapter of rank 16 on top of the base, m={m}",
            "linear", "forward", EXTRA, least, 2, NO_ADAPTER, m,
        )
        for m, least in ((1, 10), (16, 5), (128, 5), (1024, 5))
    ),
    *(
        Target(
            f"double quantisation on top of plain absmax, m={m}", "linear", "forward", EXTRA, 3, 0, PLAIN, m
        )
        for m in (1, 16, 128, 1024)
    ),
    Target(
        "forward at the AVX2 level, m=1, over dense capped to AVX2",
        "linear", "forward", SPEED, 2.0, 3.0, DENSE, 1, level="avx2",
    ),
    Target("call of a 64 x 64 layer, inference", "overhead", "call", MICROSECONDS, 8, 5, ours="QLinear"),
    Target("scratch memory a thread, any shape", "memory", "scratch a thread", MIB, 4),
    Target("error of forward, over dequantise + dense", "linear", "forward", WORST_ERROR, 1.0),
    Target("error of dx, over dequantise + dense", "backward", "dx", WORST_ERROR, 1.0),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    target: Target
    figure: float | None  # None: the rows it needs were not measured
    points: int  # shapes, or rows, that the figure is of

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not measured"
        better = (lambda a, b: a >= b) if self.target.more_is_better else (lambda a, b: a <= b)
        # Rounded as it is printed, so that what reads as reached is.
        figure = round(self.figure, 2)
        if self.target.reach is not None and better(figure, self.target.reach):
            return "hit, and what it reached for"
        return "hit" if better(figure, self.target.least) else "missed"


def evaluate(target: Target, rows: list[Row], level: str) -> Outcome:
    """level: the run's own, which a target without one means. Layers count at the five shapes only, if the
    rows have any of them."""
    level = target.level or level
    near = [r for r in rows if (r.suite, r.op, r.level) == (target.suite, target.op, level)]
    near = [
        r
        for r in near
        if target.m in (None, r.m) and (target.unit in (MIB, WORST_ERROR) or r.dtype == target.dtype)
    ]
    if target.suite in ("linear", "backward", "train") and target.unit != WORST_ERROR:
        near = [r for r in near if (r.n, r.k) in FIVE] or near
    ours = [r for r in near if r.peer == target.ours]
    values = [v for v in (_value(target, row, near) for row in ours) if v is not None]
    if not values:
        return Outcome(target, None, 0)
    if target.unit in (MIB, WORST_ERROR):
        return Outcome(target, max(values), len(values))
    mean = geometric_mean(values)
    return Outcome(target, 100 * (mean - 1) if target.unit == EXTRA else mean, len(values))


def _value(target: Target, row: Row, rows: list[Row]) -> float | None:
    if target.unit == MIB:
        return row.mib
    if target.unit == WORST_ERROR:
        return (
            row.arithmetic_error / row.composite_error
            if row.arithmetic_error and row.composite_error
            else None
        )
    if target.unit == MICROSECONDS:
        return row.p50_us
    if target.unit in (ROOF, FLOOR):
        return row.roof_percent and (row.roof_percent if target.unit == ROOF else 100 / row.roof_percent)
    other = next((o for o in rows if o.peer == target.peer and o.case == row.case and o.m == row.m), None)
    if other is None or not other.p50_us or not row.p50_us:
        return None
    return other.p50_us / row.p50_us if target.unit == SPEED else row.p50_us / other.p50_us


def evaluate_all(results: Results) -> list[Outcome]:
    return [evaluate(target, results.rows, results.about.get("level", "")) for target in TARGETS]


def report(results: Results, *, unmeasured: bool = True) -> list[str]:
    """The Markdown of the targets, a line each, and how many are hit. unmeasured: show those lines too."""
    outcomes = evaluate_all(results)
    out = ["| work | at least | reach for | measured | points | |", "|:--|--:|--:|--:|--:|:--|"]
    for o in outcomes:
        if o.figure is None and not unmeasured:
            continue
        t, sign = o.target, "" if o.target.more_is_better else "<= "
        reach = "" if t.reach is None else f"{sign}{t.reach:g}"
        figure = "" if o.figure is None else f"{o.figure:.2f}"
        verdict = f"**{o.verdict}**" if o.verdict == "missed" else o.verdict
        out.append(
            f"| {t.work} | {sign}{t.least:g} {t.unit} | {reach} | {figure} | {o.points or ''} | {verdict} |"
        )
    hit = sum(o.verdict.startswith("hit") for o in outcomes)
    measured = sum(o.figure is not None for o in outcomes)
    return [
        *out,
        "",
        f"{hit} of {measured} measured targets hit, {len(outcomes) - measured} not measured.",
        "",
    ]


def main(show: Callable[[str], None] = print) -> int:
    if len(sys.argv) != 2:
        show(f"usage: {sys.argv[0]} RESULTS.csv")
        return 2
    show("\n".join(report(read_csv(Path(sys.argv[1])))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
