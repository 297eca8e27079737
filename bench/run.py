"""Measure fastlora and its peers on this machine.

    python bench/run.py --quick
    python bench/run.py --suite linear --shapes 4096x4096,14336x4096 --rows 1,16,128 --warm
    make bench    # everything, into bench/results/

Every contender gets the same tensors and threads, its results are checked against float64, and all are timed
in turns. docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import _options

if __name__ == "__main__":  # before torch is imported
    OPTIONS = _options.parse(__doc__ or "")
    _options.set_environment(OPTIONS)

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import _roofs
import peers
import targets
import torch
from _machine import default_name, describe
from _plots import plot
from _problem import Problem
from _results import COLUMNS, Results, Row, bench_line, markdown, mean_table, read_json, write_csv, write_json
from _timing import Effort, Flush
from rich.console import Console
from rich.table import Table
from suites import FIVE, Case, Context, Plan, backward, linear, memory, overhead, quantize, train
from tqdm import tqdm

import fastlora

SUITES = {
    "overhead": overhead,  # first, as long as the process is small
    "quantize": quantize,
    "linear": linear,
    "backward": backward,
    "train": train,
    "memory": memory,
}


def plan_of(options: argparse.Namespace) -> Plan:
    def many(values: Iterable | None) -> tuple | None:
        return None if values is None else tuple(dict.fromkeys(values))

    return Plan(
        options.suite,
        many(options.shapes),
        many(options.rows),
        many(options.ranks) or (),
        many(options.dtype),
        options.quick,
    )


def effort_of(options: argparse.Namespace) -> Effort:
    default = Effort(seconds=0.02, least=1, most=3) if options.quick else Effort()
    most = options.rounds or default.most
    return Effort(options.seconds or default.seconds, min(default.least, most), most)


def cases_of(plan: Plan) -> list[Case]:
    """All cases, those of one problem together, so that its tensors and contenders are made once."""
    found = [case for name, suite in SUITES.items() if name in plan.suites for case in suite.cases(plan)]
    order = {key: i for i, key in enumerate(dict.fromkeys(case.problem for case in found))}
    return sorted(found, key=lambda case: order[case.problem])


def refuse_device(device: str) -> str | None:
    """Why `device` cannot be measured."""
    if device == "cuda" and not torch.cuda.is_available():
        return "run.py: expected a CUDA device for --device cuda, found none"
    if device == "cuda" and not fastlora._C.cuda_built:
        return "run.py: expected a build with CUDA kernels for --device cuda, this one holds none"
    return None


def wanted_peers(names: list[str] | None) -> frozenset[str]:
    if names is None:
        return frozenset(peers.REGISTRY)
    return frozenset(
        peer for peer in peers.REGISTRY if peer in names or any(peer.startswith(f"{n},") for n in names)
    )


def measure(cases: list[Case], context: Context) -> list[Row]:
    """Runs the cases; the bar counts expected seconds, building the contenders included."""

    def building(key: tuple[int, int, int, str]) -> float:
        return 0.05 + key[0] * key[1] * 60e-9

    rows: list[Row] = []
    keys = dict.fromkeys(case.problem for case in cases)
    total = sum(case.cost(context.effort) for case in cases) + sum(map(building, keys))
    form = "{desc:34.34} {percentage:3.0f} %|{bar}| {elapsed} < {remaining}"
    with tqdm(total=total, bar_format=form) as bar:

        def advance(seconds: float) -> None:
            bar.update(min(seconds, total - bar.n))  # sums in another order need not end at the total

        for key, group in groupby(cases, lambda case: case.problem):
            problem = Problem(*key)
            advance(building(key))
            for case in group:
                bar.set_description(f"{case.op} {case.n}x{case.k} m {case.m}")
                rows += case.run(case, context, problem)
                advance(case.cost(context.effort))
    position = {name: i for i, name in enumerate(_options.SUITES)}
    return sorted(rows, key=lambda row: position[row.suite])


def at_avx2(options: argparse.Namespace) -> Results | None:
    """The rows of the target at the AVX2 level, from a process of its own with the dense libraries capped."""
    if "avx2" not in fastlora.available_isas() or fastlora.current_isa() == "avx2":
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        shapes = ",".join(f"{n}x{k}" for n, k in FIVE)
        command = [sys.executable, str(Path(__file__).resolve()), "--isa", "avx2", "--suite", "linear"]
        command += ["--shapes", shapes, "--rows", "1", "--dtype", "bfloat16", "--peers", "dense,fastlora"]
        command += ["--threads", str(torch.get_num_threads()), "--json", str(file)]
        command += ["--warm"] if options.warm else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return read_json(file)


def show(results: Results, console: Console) -> None:
    """The bench lines, the geometric means and the targets, on the terminal."""
    for key, value in results.about.items():
        console.print(f"{key}: {value}")
    groups: dict[tuple, list[Row]] = {}
    for row in results.rows:
        groups.setdefault(row.case, []).append(row)
    for (suite, op, n, k, r, dtype, level, cache), rows in groups.items():
        table = Table(box=None)
        for i, name in enumerate(COLUMNS):
            table.add_column(name, justify="left" if i == 1 else "right", no_wrap=True, min_width=len(name))
        for row in rows:
            table.add_row(*bench_line(row, results.rows))
        console.print(f"\n{suite}: {op}, n {n}, k {k}, r {r}, {dtype}, {level} {cache}")
        console.print(table)
    for lines in (mean_table(results.rows), targets.report(results, unmeasured=False)):
        console.print("\n".join(["", *lines]), soft_wrap=True)
    for name, reason in results.absent.items():
        console.print(f"not measured, {name}: {reason}", soft_wrap=True)


def main(options: argparse.Namespace) -> int:
    refused = refuse_device(options.device)
    if refused:
        print(refused, file=sys.stderr)
        return 2
    began = time.time()
    if options.threads:
        torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        if options.isa:
            try:
                stack.enter_context(fastlora.use_isa(options.isa))
            except RuntimeError as error:
                print(f"run.py: {error}", file=sys.stderr)
                return 2
        about = describe() | {"load when it began": f"{os.getloadavg()[0]:.2f}"}
        if options.isa == "avx2":
            about["dense libraries"] = f"ONEDNN_MAX_CPU_ISA={os.environ.get('ONEDNN_MAX_CPU_ISA')}"
        roofs, why = _roofs.measure(torch.get_num_threads(), quick=options.quick)
        about |= roofs.describe() if roofs else {}
        context = Context(
            roofs,
            effort_of(options),
            None if options.warm else Flush(),
            torch.get_num_threads(),
            fastlora.current_isa(),
            wanted_peers(options.peers),
            {} if roofs else {"roofs": why},
        )
        plan = plan_of(options)
        rows = measure(cases_of(plan), context)
        if plan.default and "linear" in plan.suites and not options.isa and not options.peers:
            capped = at_avx2(options)
            rows += capped.rows if capped else []
    about["took"] = f"{time.time() - began:.0f} s"
    results = Results(about, context.absent, rows)
    show(results, Console(highlight=False, markup=False, width=max(170, Console().width)))
    write(results, options)
    return 0


def write(results: Results, options: argparse.Namespace) -> None:
    if options.csv:
        write_csv(options.csv, results)
    if options.json:
        write_json(options.json, results)
    name = options.machine or default_name()
    if options.plot:
        plot(options.plot, name, results)
    if options.save:
        base = options.save / name
        write_csv(Path(f"{base}.csv"), results)
        Path(f"{base}.md").write_text(markdown(results, targets.report(results)))
        plot(options.save, name, results)
        print(f"wrote {base}.csv, .md and plots; python bench/readme_table.py {name} puts them into README")


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
