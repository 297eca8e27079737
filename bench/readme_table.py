"""Write README's table from bench/results/<machine>.csv.

    python bench/readme_table.py                # again, from the machine named in README's marker
    python bench/readme_table.py MACHINE        # from another one's results ("none": no table)
    python bench/readme_table.py --check        # exit code 1 if README differs from the results

The results of `make bench` come first; README's table is their first shape, dtype and rank.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from _results import BITSANDBYTES, DENSE, Row, read_csv

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- bench: (?P<machine>\S+) -->\n.*?<!-- /bench -->", re.DOTALL)
OURS = "fastlora"


def fastest(rows: list[Row], peer: str) -> Row | None:
    found = [row for row in rows if row.peer.startswith(peer)]
    return min(found, key=lambda row: row.p50_us) if found else None


def _ms(row: Row | None) -> str:
    return "" if row is None else f"{row.p50_us / 1e3:.2f}"


def _error(row: Row | None) -> str:
    return "" if row is None else f"{row.arithmetic_error:.1e}"


def _ratio(other: Row | None, ours: Row) -> str:
    return "" if other is None else f"**{other.p50_us / ours.p50_us:.1f}x**"


def table(machine: str) -> str:
    """The Markdown of the first shape, dtype and rank in the results: every op and number of rows."""
    about, rows = read_csv(ROOT / "bench" / "results" / f"{machine}.csv")
    first = rows[0]
    rows = [row for row in rows if row.case[1:] == first.case[1:]]
    quantised = next(row for row in rows if row.peer == OURS)
    saved = next(row for row in rows if row.peer == DENSE).weight_mib / quantised.weight_mib
    out = [
        f"Median ms of one {first.n} x {first.k} layer with a rank-{first.r} adapter, {first.dtype}:",
        "",
        "| | rows | dense | bitsandbytes | fastlora | over dense | over bitsandbytes "
        "| error: dense | bitsandbytes | fastlora |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for op, m in dict.fromkeys((row.op, row.m) for row in rows):
        here = [row for row in rows if (row.op, row.m) == (op, m)]
        three = [fastest(here, peer) for peer in (DENSE, BITSANDBYTES, OURS)]
        dense, bnb, ours = three
        assert ours is not None
        cells = [op, str(m), *map(_ms, three), _ratio(dense, ours), _ratio(bnb, ours), *map(_error, three)]
        out.append(f"| {' | '.join(cells)} |")
    caches = "flushed before every call" if first.cache == "cold" else "warm"
    page = f"bench/results/{machine}.md"
    out += [
        "",
        f"{about['machine']}, {about['threads']} threads, level `{about['level']}`, torch {about['torch']}, "
        f"bitsandbytes {about['bitsandbytes']} (the faster of its two modes), caches {caches}. Error: "
        f"relative distance to float64 arithmetic on the same stored weight. Rounding the weight to NF4 "
        f"costs both 4-bit layers {quantised.total_error:.1e}, in {saved:.1f} times less memory than "
        f"{first.dtype}. "
        f"Everything measured: [{page}]({page}).",
    ]
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("machine", nargs="?", help="a file name in bench/results/, without its ending")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    marker = BLOCK.search(text)
    if marker is None:
        print(
            "README.md: expected a <!-- bench: MACHINE --> ... <!-- /bench --> block, found none",
            file=sys.stderr,
        )
        return 1
    machine = options.machine or marker["machine"]
    body = "" if machine == "none" else table(machine) + "\n"
    block = f"<!-- bench: {machine} -->\n{body}<!-- /bench -->"
    fresh = text[: marker.start()] + block + text[marker.end() :]
    if options.check:
        return 0 if fresh == text else 1
    readme.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
