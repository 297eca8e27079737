"""Results on disk: CSV for programs, Markdown for readers, PNG for eyes; one set a machine."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path

DENSE, BITSANDBYTES = "dense", "bitsandbytes"


@dataclass
class Row:
    """One contender at one size. Times in microseconds; rates follow from the median.

    gbps counts the bytes of the stored weight, of x and of the result, once a pass; tflops the operations
    of the dense product and the adapter. A training step is two passes: forward, and the gradients of x and
    of the adapter. Errors are relative Frobenius distances to float64: arithmetic_error to the product with
    the weight as the layer stores it, total_error to that with the weight before quantisation.
    """

    op: str
    n: int
    k: int
    r: int
    m: int
    dtype: str
    cache: str
    peer: str
    p20_us: float
    p50_us: float
    p80_us: float
    gbps: float
    tflops: float
    arithmetic_error: float
    total_error: float
    weight_mib: float

    @property
    def case(self) -> tuple:
        return (self.op, self.n, self.k, self.r, self.dtype, self.cache)


def speed_over(rows: list[Row], row: Row, peer: str) -> float | None:
    """How many times as fast `row` is as the fastest contender called `peer...` at the same size."""
    times = [o.p50_us for o in rows if o.case == row.case and o.m == row.m and o.peer.startswith(peer)]
    return min(times) / row.p50_us if times else None


def write_csv(path: Path, about: dict[str, str], rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        for key, value in about.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = asdict(row)
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in cells.items()})


def read_csv(path: Path) -> tuple[dict[str, str], list[Row]]:
    lines = path.read_text().splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    kinds = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(Row)}
    table = csv.DictReader(line for line in lines if not line.startswith("# "))
    return about, [Row(**{k: kinds[k](v) for k, v in cells.items()}) for cells in table]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def write_markdown(path: Path, about: dict[str, str], rows: list[Row]) -> None:
    out = [f"# {about['machine']}", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    for (op, n, k, r, dtype, cache), group in groupby(rows, lambda row: row.case):
        out += [f"## {op}: n {n}, k {k}, r {r}, {dtype}, {cache} caches", ""]
        out += [
            "| m | layer | us p50 (p20-p80) | GB/s | TFLOP/s | x dense | x bitsandbytes "
            "| arithmetic error | total error |",
            "|--:|:--|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in group:
            out.append(
                f"| {row.m} | {row.peer} | {row.p50_us:.0f} ({row.p20_us:.0f}-{row.p80_us:.0f}) "
                f"| {row.gbps:.1f} | {row.tflops:.3f} | {_times(speed_over(rows, row, DENSE))} "
                f"| {_times(speed_over(rows, row, BITSANDBYTES))} "
                f"| {row.arithmetic_error:.1e} | {row.total_error:.1e} |"
            )
        out.append("")
    path.write_text("\n".join(out))


def plot(path: Path, about: dict[str, str], rows: list[Row]) -> None:
    """Time over rows, a panel a case, a band from p20 to p80."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cases = {case: list(group) for case, group in groupby(rows, lambda row: row.case)}
    colors = dict(zip(dict.fromkeys(row.peer for row in rows), plt.get_cmap("tab10").colors, strict=False))
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            1, len(cases), figsize=(4.8 * len(cases), 3.8), dpi=150, layout="constrained", squeeze=False
        )
        for axis, ((op, n, k, r, dtype, _), group) in zip(axes[0], cases.items(), strict=True):
            for peer, color in colors.items():
                line = [row for row in group if row.peer == peer]
                if not line:
                    continue
                m = [row.m for row in line]
                axis.fill_between(
                    m, [x.p20_us for x in line], [x.p80_us for x in line], color=color, alpha=0.15
                )
                axis.plot(m, [x.p50_us for x in line], color=color, marker="o", markersize=3.5, label=peer)
            axis.set(xscale="log", yscale="log", xlabel="rows of x", ylabel="microseconds")
            axis.set_xticks(
                sorted({row.m for row in group}), [str(m) for m in sorted({row.m for row in group})]
            )
            axis.minorticks_off()
            axis.set_title(f"{op}, {n} x {k}, rank {r}, {dtype}", fontsize=10)
            axis.grid(alpha=0.25)
        axes[0][0].legend(frameon=False)
        figure.suptitle(f"{about['machine']}, {about['threads']} threads, {about['level']}", fontsize=10)
        figure.savefig(path)
        plt.close(figure)
