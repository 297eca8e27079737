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
from pathlib import Path

import _device
import _routes
import peers
import targets
import torch
from _cases import cases_of, measure
from _plots import plot
from _results import (
    Results,
    Row,
    bench_line,
    by_case,
    columns,
    markdown,
    mean_table,
    read_json,
    write_csv,
    write_json,
)
from _sizes import FIVE
from _timing import Effort
from rich.console import Console
from rich.table import Table
from suites import Context, Plan

import fastlora


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
        options.device,
        options.routes,
    )


def effort_of(options: argparse.Namespace, default: Effort) -> Effort:
    default = Effort(seconds=0.02, least=1, most=3) if options.quick else default
    most = options.rounds or default.most
    return Effort(options.seconds or default.seconds, min(default.least, most), most)


def wanted_peers(names: list[str] | None) -> frozenset[str]:
    if names is None:
        return frozenset(peers.REGISTRY)
    return frozenset(
        peer for peer in peers.REGISTRY if peer in names or any(peer.startswith(f"{n},") for n in names)
    )


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
    for title, rows in by_case(results.rows):
        table = Table(box=None)
        for i, name in enumerate(columns(rows)):
            table.add_column(name, justify="left" if i == 1 else "right", no_wrap=True, min_width=len(name))
        for row in rows:
            table.add_row(*bench_line(row, rows))
        console.print(f"\n{title}")
        console.print(table)
    means, reached = mean_table(results.rows), targets.report(results, unmeasured=False)
    for lines in filter(None, (means, reached, _routes.table(results.rows))):
        console.print("\n".join(["", *lines]), soft_wrap=True)
    for name, reason in results.absent.items():
        console.print(f"not measured, {name}: {reason}", soft_wrap=True)


def main(options: argparse.Namespace) -> int:
    device = _device.KINDS[options.device]()
    refused = device.refuse()
    if refused:
        print(f"run.py: {refused}", file=sys.stderr)
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
        about = device.describe() | {"load when it began": f"{os.getloadavg()[0]:.2f}"}
        if options.isa == "avx2":
            about["dense libraries"] = f"ONEDNN_MAX_CPU_ISA={os.environ.get('ONEDNN_MAX_CPU_ISA')}"
        roofs, why = device.roofs(quick=options.quick)
        clock = device.clock(cold=not options.warm)
        about |= (roofs.describe() if roofs else {}) | clock.describe()
        context = Context(
            device,
            clock,
            roofs,
            effort_of(options, device.effort),
            torch.get_num_threads(),
            device.level(),
            wanted_peers(options.peers),
            {} if roofs else {"roofs": why},
        )
        name = options.machine or device.name() + ("-routes" if options.routes else "")

        def finish(rows: list[Row]) -> int:
            about["took"] = f"{time.time() - began:.0f} s"
            failed = {f"{case} (failed)": why for case, why in context.failed.items()}
            results = Results(about, context.absent | failed, rows)
            show(results, Console(highlight=False, markup=False, width=max(220, Console().width)))
            write(results, options, name)
            return 1 if failed else 0

        def give_up(rows: list[Row]) -> None:
            try:
                finish(list(rows))
                sys.stdout.flush()
            finally:
                os._exit(1)

        plan = plan_of(options)
        rows = measure(cases_of(plan), context, options.limit, give_up)
        if plan.default and "linear" in plan.suites and not (options.isa or options.peers or options.routes):
            capped = at_avx2(options) if device.kind == "cpu" else None
            rows += capped.rows if capped else []
    return finish(rows)


def write(results: Results, options: argparse.Namespace, name: str) -> None:
    if options.csv:
        write_csv(options.csv, results)
    if options.json:
        write_json(options.json, results)
    if options.save:
        base = options.save / name
        write_csv(Path(f"{base}.csv"), results)
        page = markdown(results, targets.report(results), _routes.table(results.rows))
        Path(f"{base}.md").write_text(page)
        print(f"wrote {base}.csv and .md; python bench/readme_table.py {name} puts them into README")
    if not options.routes:
        for folder in {options.plot, options.save} - {None}:
            plot(folder, name, results)


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
