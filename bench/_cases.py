"""The cases of a plan, and running them one after the other."""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import _options
from _problem import Problem
from _results import Row
from peers import reason
from suites import (
    Case,
    Context,
    Plan,
    backward,
    linear,
    memory,
    optimizer,
    overhead,
    quantize,
    segmented,
    train,
    trainers,
)
from tqdm import tqdm

SUITES = {
    "overhead": overhead,  # first, as long as the process is small
    "quantize": quantize,
    "linear": linear,
    "backward": backward,
    "train": train,
    "segmented": segmented,
    "trainers": trainers,
    "optimizer": optimizer,
    "memory": memory,
}


def cases_of(plan: Plan) -> list[Case]:
    """All cases, those of one problem together, so that its tensors and contenders are made once."""
    found = [case for name, suite in SUITES.items() if name in plan.suites for case in suite.cases(plan)]
    order = {key: i for i, key in enumerate(dict.fromkeys(case.problem for case in found))}
    return sorted(found, key=lambda case: order[case.problem])


def measure(
    cases: list[Case],
    context: Context,
    limit: float | None = None,
    give_up: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Runs the cases; the bar counts expected seconds, building the contenders included.

    A case that fails is named in the context, and the others go on, unless the device is lost. limit: after
    so many seconds no case is begun. give_up: called, in another thread, with the rows so far when a case
    takes longer than the device's patience: a kernel that hangs cannot be stopped.
    """
    pace, began = context.device.pace, time.monotonic()

    def building(key: tuple[int, int, int, str]) -> float:
        return 0.05 + key[0] * key[1] * pace.building

    rows: list[Row] = []
    done = 0
    total = sum(case.cost(context.effort, pace) for case in cases)
    total += sum(map(building, dict.fromkeys(case.problem for case in cases)))
    form = "{desc:34.34} {percentage:3.0f} %|{bar}| {elapsed} < {remaining}"
    seldom = 0.1 if sys.stderr.isatty() else 10.0  # a log keeps every one
    with tqdm(total=total, bar_format=form, mininterval=seldom) as bar:

        def advance(seconds: float) -> None:
            bar.update(min(seconds, total - bar.n))  # sums in another order need not end at the total

        for key, group in groupby(cases, lambda case: case.problem):
            problem = None
            gc.collect()  # a problem and its contenders hold each other
            for case in group:
                if limit is not None and time.monotonic() - began > limit:
                    break
                bar.set_description(case.title(), refresh=False)
                try:
                    with _watched(case, context, partial(give_up, rows)):
                        if problem is None:
                            problem = Problem(*key, context.device.where)
                            advance(building(key))
                        rows += case.run(case, context, problem)
                except Exception as error:
                    traceback.print_exc()
                    context.failed[case.title()] = reason(error)
                    if not context.device.usable():
                        context.failed["all that comes after"] = "the device is lost"
                        return _in_order(rows)
                done += 1
                advance(case.cost(context.effort, pace))
    if done < len(cases):
        context.absent[f"{len(cases) - done} of {len(cases)} cases"] = f"not begun within {limit:g} s"
    return _in_order(rows)


@contextmanager
def _watched(case: Case, context: Context, give_up: Callable[[], None]) -> Iterator[None]:
    patience = context.device.patience
    if patience is None:
        yield
        return

    def hangs() -> None:
        context.failed[case.title()] = f"had not ended after {patience:g} s"
        give_up()

    timer = threading.Timer(patience, hangs)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _in_order(rows: list[Row]) -> list[Row]:
    position = {name: i for i, name in enumerate(_options.SUITES)}
    return sorted(rows, key=lambda row: position[row.suite])
