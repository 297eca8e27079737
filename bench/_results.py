"""Results on disk: rows as CSV and JSON for programs, Markdown for readers."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

DENSE, BITSANDBYTES, OURS = "dense", "bitsandbytes", "fastlora"


@dataclass
class Row:
    """One contender at one size. Times in microseconds; rates follow from the median.

    gbps counts the bytes of the stored weight, of x and of the result, once a pass; tflops the operations of
    the dense product and of the adapter. roof names what bounds the work and roof_percent is the time that
    roof allows over the median. arithmetic_error is the relative Frobenius distance to the float64 product
    with the weight as the contender stores it, total_error to that with the weight before quantisation,
    composite_error that of dequantising to bfloat16, a dense product summed in float32 and one rounding, to
    the first: what arithmetic_error must not exceed. route is the kernel that served it, where there is a
    choice of them. Fields that a row has no use for are None.

    A row of the suite "memory", or of a peak, holds mib, MiB of what op says, instead of times.
    """

    suite: str
    op: str
    n: int
    k: int
    r: int
    m: int
    dtype: str
    level: str
    threads: int
    cache: str
    peer: str
    rounds: int | None = None
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    gbps: float | None = None
    tflops: float | None = None
    roof: str = ""
    roof_percent: float | None = None
    arithmetic_error: float | None = None
    total_error: float | None = None
    composite_error: float | None = None
    weight_mib: float | None = None
    mib: float | None = None
    route: str = ""

    @property
    def case(self) -> tuple:
        """What rows that are compared with each other agree in, but for m."""
        return (self.suite, self.op, self.n, self.k, self.r, self.dtype, self.level, self.cache)


@dataclass
class Results:
    """about: the machine and the run, one line each; absent: contender to why it was not measured."""

    about: dict[str, str]
    absent: dict[str, str]
    rows: list[Row]


def geometric_mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def speed_over(rows: list[Row], row: Row, peer: str) -> float | None:
    """How many times as fast `row` is as the contender called `peer` at the same size."""
    for other in rows:
        if other.peer == peer and other.m == row.m and other.case == row.case:
            return other.p50_us / row.p50_us if other.p50_us and row.p50_us else None
    return None


def fastest(rows: list[Row], row: Row, prefix: str) -> str:
    """The name of the fastest contender called `prefix...` at row's size ("" if there is none)."""
    found = [
        o for o in rows if o.case == row.case and o.m == row.m and o.peer.startswith(prefix) and o.p50_us
    ]
    return min(found, key=lambda o: o.p50_us or math.inf).peer if found else ""


# --- CSV and JSON ----------------------------------------------------------------------------------------


def _rounded(row: Row) -> dict[str, object]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(row).items()}


def write_csv(path: Path, results: Results) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        for key, value in results.about.items():
            file.write(f"# {key}: {value}\n")
        for key, value in results.absent.items():
            file.write(f"# absent, {key}: {value}\n")
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in results.rows:
            writer.writerow({k: "" if v is None else v for k, v in _rounded(row).items()})


def read_csv(path: Path) -> Results:
    lines = path.read_text().splitlines()
    notes = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    absent = {key.split(", ", 1)[1]: value for key, value in notes.items() if key.startswith("absent, ")}
    about = {key: value for key, value in notes.items() if not key.startswith("absent, ")}
    table = csv.DictReader(line for line in lines if not line.startswith("# "))
    return Results(about, absent, [_row(cells) for cells in table])


def _row(cells: dict[str, str]) -> Row:
    parsed: dict[str, object] = {}
    for f in fields(Row):
        text = cells.get(f.name, "")  # of results older than the field
        kind = str(f.type).split(" ")[0]
        parsed[f.name] = (
            text if kind == "str" else None if text == "" else {"int": int, "float": float}[kind](text)
        )
    return Row(**parsed)  # type: ignore[arg-type]


def write_json(path: Path, results: Results) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": results.about, "absent": results.absent, "rows": [_rounded(r) for r in results.rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Results:
    content = json.loads(path.read_text())
    return Results(content["about"], content["absent"], [Row(**row) for row in content["rows"]])


# --- Markdown --------------------------------------------------------------------------------------------


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def bench_line(row: Row, rows: list[Row]) -> list[str]:
    """The cells of one row, as the tables and the terminal show it; rows: those of its case."""
    route = [row.route] if _routed(rows) else []
    if row.p50_us is None:
        return [str(row.m), row.peer, f"{_cell(row.mib, '.2f')} MiB", *[""] * 8, *route]
    bitsandbytes = fastest(rows, row, BITSANDBYTES) or f"PEFT on {BITSANDBYTES}"
    digits = 1 if row.p50_us < 100 else 0
    return [
        str(row.m),
        row.peer,
        f"{row.p50_us:.{digits}f} ({row.p20_us:.{digits}f}-{row.p80_us:.{digits}f})",
        _cell(row.gbps, ".1f"),
        _cell(row.tflops, ".3f"),
        f"{row.roof_percent:.0f} % {row.roof}" if row.roof_percent is not None else "",
        _cell(speed_over(rows, row, DENSE) or speed_over(rows, row, fastest(rows, row, DENSE)), ".2f"),
        _cell(speed_over(rows, row, bitsandbytes), ".2f"),
        _cell(row.arithmetic_error, ".1e"),
        _cell(row.composite_error, ".1e"),
        _cell(row.total_error, ".1e"),
        *route,
    ]


def _routed(rows: list[Row]) -> bool:
    return any(row.route for row in rows)


def columns(rows: list[Row]) -> tuple[str, ...]:
    """The names of the cells."""
    return (*_COLUMNS, "route") if _routed(rows) else _COLUMNS


_COLUMNS = (
    "m",
    "layer",
    "us p50 (p20-p80)",
    "GB/s",
    "TFLOP/s",
    "of the roof",
    "x dense",
    "x bitsandbytes",
    "error",
    "composite's error",
    "total error",
)


def by_case(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """(title, rows) of every case."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append(row)
    out = []
    for (suite, op, n, k, r, dtype, level, cache), group in groups.items():
        caches = f", {cache} caches" if cache else ""
        out.append((f"{suite}: {op}, n {n}, k {k}, r {r}, {dtype}, {level}{caches}", group))
    return out


def markdown_tables(rows: list[Row]) -> list[str]:
    """A heading and a table for every case."""
    out = []
    for title, group in by_case(rows):
        names = columns(group)
        out += [f"### {title}", "", f"| {' | '.join(names)} |", "|--:|:--|" + "--:|" * (len(names) - 2)]
        out += [f"| {' | '.join(bench_line(row, group))} |" for row in group]
        out.append("")
    return out


def mean_table(rows: list[Row]) -> list[str]:
    """Geometric means over the shapes: how many times as fast fastlora is as each contender."""
    ratios: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        if row.peer == OURS and row.p50_us:
            key = (
                row.suite,
                row.op,
                row.dtype,
                row.level,
                row.cache,
                row.m if row.suite != "quantize" else 0,
            )
            for other in rows:
                if other.case == row.case and other.m == row.m and other.peer != OURS and other.p50_us:
                    ratios.setdefault(key, {}).setdefault(other.peer, []).append(other.p50_us / row.p50_us)
    out = [
        "Other layers' median time over fastlora's, geometric mean over the shapes measured (how many).",
        "",
        "| work | m | layer | ratio | shapes |",
        "|:--|--:|:--|--:|--:|",
    ]
    for (suite, op, dtype, level, cache, m), peers in ratios.items():
        for peer, values in peers.items():
            work = op if suite == "overhead" else f"{op}, {dtype}, {level}, {cache}"
            out.append(f"| {work} | {m or ''} | {peer} | {geometric_mean(values):.2f} | {len(values)} |")
    return [*out, ""]


def markdown(results: Results, report: list[str], routes: list[str]) -> str:
    """The page of a machine; report: the targets' lines; routes: those of the table of routes."""
    about = results.about
    out = [f"# {about.get('machine', 'results')}", "", *(f"- {key}: {value}" for key, value in about.items())]
    out += [f"- not measured, {key}: {value}" for key, value in results.absent.items()]
    out += ["", "## Targets", "", *report]
    out += ["## Routes", "", *routes] if routes else []
    out += ["## Geometric means", "", *mean_table(results.rows)]
    return "\n".join([*out, "## Everything measured", "", *markdown_tables(results.rows)]).rstrip() + "\n"
