"""Whether a run's rows reach the targets, which are data in targets_cpu.py and targets_cuda.py.

python bench/targets.py bench/results/MACHINE.csv
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import targets_cpu
import targets_cuda
from _results import Results, read_csv
from _sizes import targeted
from _target import Outcome, Target, evaluate


def of_device(device: str) -> tuple[Target, ...]:
    return targets_cuda.TARGETS if device == "cuda" else targets_cpu.TARGETS


def evaluate_all(results: Results) -> list[Outcome]:
    device, level = results.about.get("device", "cpu"), results.about.get("level", "")
    return [evaluate(target, results.rows, level, targeted(device)) for target in of_device(device)]


def report(results: Results, *, unmeasured: bool = True) -> list[str]:
    """The Markdown of the targets, a line each, and how many are hit. unmeasured: show those lines too."""
    outcomes = evaluate_all(results)
    out = [
        "| work | at least | reach for | measured | worst | points | |",
        "|:--|--:|--:|--:|--:|--:|:--|",
    ]
    for o in outcomes:
        if o.figure is None and not unmeasured:
            continue
        t, sign = o.target, "" if o.target.more_is_better else "<= "
        reach = "" if t.reach is None else f"{sign}{t.reach:g}"
        figure = "" if o.figure is None else f"{o.figure:.2f}"
        worst = "" if o.worst is None else f"{o.worst:.2f} ({o.where})"
        verdict = f"**{o.verdict}**" if o.verdict == "missed" else o.verdict
        cells = (t.work, f"{sign}{t.least:g} {t.unit}", reach, figure, worst, str(o.points or ""), verdict)
        out.append(f"| {' | '.join(cells)} |")
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
