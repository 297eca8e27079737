"""Write the tables of README.md and docs/performance.md from bench/results/<machine>.csv.

    python bench/readme_table.py                # again, each from the machine named in its marker
    python bench/readme_table.py MACHINE        # README's from another one's results ("none": no table)
    python bench/readme_table.py --check        # exit code 1 if a page differs from the results

The results of `make bench` come first; a table is of their first shape, dtype and rank.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from functools import partial
from pathlib import Path

from _results import BITSANDBYTES, DENSE, OURS, Row, read_csv

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- bench: (?P<machine>\S+) -->\n.*?<!-- /bench -->", re.DOTALL)
PAGES = ("README.md", "docs/performance.md")
SHOWN = {  # op to the rows of x that a table shows of it
    "forward": (1, 4, 16, 64, 128, 1024),
    "dx": (16, 128, 1024),
    "training step": (16, 128, 1024, 4096),
}


def fastest(rows: list[Row], *names: str) -> Row | None:
    """The fastest of the contenders whose names begin so, by the first of `names` that there are any of."""
    for name in names:
        found = [row for row in rows if row.peer.startswith(name)]
        if found:
            return min(found, key=lambda row: row.p50_us or 0.0)
    return None


def _time(row: Row | None, on_cuda: bool) -> str:
    if row is None or row.p50_us is None:
        return ""
    return f"{row.p50_us:.1f}" if on_cuda else f"{row.p50_us / 1e3:.2f}"


def _error(row: Row | None) -> str:
    return "" if row is None or row.arithmetic_error is None else f"{row.arithmetic_error:.1e}"


def _ratio(other: Row | None, ours: Row) -> str:
    if other is None or not other.p50_us or not ours.p50_us:
        return ""
    return f"**{other.p50_us / ours.p50_us:.1f}x**"


def table(machine: str, folder: str = ".") -> str:
    """The Markdown of the first layer in the results at the run's own level: some ops and numbers of rows.
    folder: that of the page, as seen from the repository's root."""
    results = read_csv(ROOT / "bench" / "results" / f"{machine}.csv")
    about = results.about
    rows = [row for row in results.rows if row.op in SHOWN and row.level == about["level"]]
    first = rows[0]
    rows = [row for row in rows if (row.case[2:], row.m in SHOWN[row.op]) == (first.case[2:], True)]
    quantised = next(row for row in rows if row.peer == OURS)
    dense_mib = first.n * first.k * {"float32": 4, "bfloat16": 2, "float16": 2}[first.dtype] / 2**20
    assert quantised.weight_mib is not None
    bare = any(row.peer == DENSE for row in rows)
    on_cuda = about.get("device") == "cuda"
    unit = "us" if on_cuda else "ms"
    others = "without one in `forward` and `dx`, and through PEFT in `training step`" if bare else "too"
    out = [
        f"Median {unit} of one {first.n} x {first.k} layer, {first.dtype}. fastlora runs with a "
        f"rank-{first.r} adapter; the others {others}:",
        "",
        "| | rows | dense | bitsandbytes | fastlora | over dense | over bitsandbytes "
        "| error: dense | bitsandbytes | fastlora |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for op, m in dict.fromkeys((row.op, row.m) for row in rows):
        here = [row for row in rows if (row.op, row.m) == (op, m)]
        dense = fastest([row for row in here if row.peer == DENSE] or here, DENSE)
        bnb = fastest(here, BITSANDBYTES, f"PEFT on {BITSANDBYTES}")
        ours = next(row for row in here if row.peer == OURS)
        three = (dense, bnb, ours)
        times = [_time(row, on_cuda) for row in three]
        cells = [op, str(m), *times, _ratio(dense, ours), _ratio(bnb, ours), *map(_error, three)]
        out.append(f"| {' | '.join(cells)} |")
    caches = "emptied before every call" if first.cache == "cold" else "warm"
    page = f"bench/results/{machine}.md"
    threads = "" if on_cuda else f", {about['threads']} threads"
    modes = "" if on_cuda else " (the faster of its two modes)"
    out += [
        "",
        f"{about['machine']}{threads}, level `{about['level']}`, torch {about['torch']}, "
        f"bitsandbytes {about['bitsandbytes']}{modes}, caches {caches}. Error: "
        f"relative distance to float64 arithmetic on the same stored weight. Rounding the weight to NF4 "
        f"costs both 4-bit layers {quantised.total_error:.1e}, in {dense_mib / quantised.weight_mib:.1f} "
        f"times less memory than {first.dtype}. "
        f"Everything measured, and the targets: [{page}]({os.path.relpath(page, folder)}).",
    ]
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("machine", nargs="?", help="a file name in bench/results/, without its ending")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for name in PAGES:
        page = ROOT / name
        text = page.read_text()
        if not BLOCK.search(text):
            print(
                f"{name}: expected a <!-- bench: MACHINE --> ... <!-- /bench --> block, found none",
                file=sys.stderr,
            )
            return 1
        other = options.machine if name == "README.md" else None
        fresh = BLOCK.sub(partial(_block, os.path.dirname(name) or ".", other), text)
        if fresh != text:
            stale.append(name)
            if not options.check:
                page.write_text(fresh)
    return 1 if options.check and stale else 0


def _block(folder: str, other: str | None, found: re.Match[str]) -> str:
    machine = other or found["machine"]
    body = "" if machine == "none" else table(machine, folder) + "\n"
    return f"<!-- bench: {machine} -->\n{body}<!-- /bench -->"


if __name__ == "__main__":
    sys.exit(main())
