"""PNG plots of a run: speed over rows, and per cent of the roof."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from _results import BITSANDBYTES, DENSE, OURS, Results, Row, geometric_mean
from _sizes import targeted

_COLORS = {
    DENSE: "#555555",
    "dense + LoRA (PEFT)": "#9a9a9a",
    "bitsandbytes, training mode": "#e07b39",
    "bitsandbytes, eval mode": "#f2b134",
    BITSANDBYTES: "#f2b134",
    "PEFT on bitsandbytes": "#a84f1d",
    "torchao NF4": "#8e6bbf",
    "torchao int4": "#c39bd3",
    OURS: "#1368ce",
}


def plot(folder: Path, name: str, results: Results) -> list[Path]:
    """Writes `<name>-speed.png` and `<name>-roof.png` where there are rows for them; returns the paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    with plt.rc_context(style):
        for kind, draw in (("speed", _draw_speed), ("roof", _draw_roof)):
            figure = draw(plt, results)
            if figure is not None:
                figure.suptitle(_title(results), fontsize=10)
                written.append(folder / f"{name}-{kind}.png")
                figure.savefig(written[-1])
                plt.close(figure)
    return written


def _title(results: Results) -> str:
    about = results.about
    threads = f", {about['threads']} threads" if "threads" in about else ""
    caches = "/".join(dict.fromkeys(row.cache for row in results.rows if row.op == "forward"))
    return f"{about.get('machine', '')}{threads}, level {about.get('level', '')}, {caches} caches"


def _main_rows(results: Results, op: str, dtype: str = "bfloat16") -> list[Row]:
    """An op's timed rows at the run's own level."""
    level = results.about.get("level")
    rows = [row for row in results.rows if row.op == op and row.p50_us and row.level == level]
    return [row for row in rows if row.dtype == dtype] or rows


def _first_shape(rows: list[Row]) -> list[Row]:
    return [row for row in rows if (row.n, row.k, row.r) == (rows[0].n, rows[0].k, rows[0].r)] if rows else []


def _over(rows: list[Row], base: str, peer: str) -> tuple[list[int], list[float]]:
    """(rows of x, how many times as fast as `base`) of one contender at one shape."""
    at = {row.m: row for row in rows if row.peer == base}
    points = [(row.m, at[row.m].p50_us / row.p50_us) for row in rows if row.peer == peer and row.m in at]
    return [m for m, _ in points], [ratio for _, ratio in points]


def _finish(axis: Any, ms: list[int], title: str, label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ms, [str(m) for m in ms])
    axis.minorticks_off()
    axis.set(xlabel="rows of x", ylabel=label, title=title)
    axis.grid(alpha=0.25)


def _ratio_ticks(axis: Any) -> None:
    """A logarithmic axis of ratios, marked at every doubling, or at every half of one on a short axis."""
    low, high = axis.get_ylim()
    low, high = max(low, 1 / 64) * 0.93, high * 1.07
    axis.set_yscale("log", base=2)
    axis.set_ylim(low, high)
    halves = 2 if math.log2(high / low) < 4 else 1
    steps = [round(2.0 ** (i / halves), 2 if i < 0 else 1) for i in range(-6 * halves, 6 * halves)]
    axis.set_yticks(steps, [f"{step:g}x" for step in steps])
    axis.set_ylim(low, high)


def _panels(plt: Any, count: int, **more: Any) -> tuple[Any, list[Any]]:
    """A figure of up to three panels in a row, or four in a square."""
    wide = 2 if count == 4 else count
    high = -(-count // wide)
    size = (5.2 * wide, 3.9 * high + 0.5)
    figure, axes = plt.subplots(
        high, wide, figsize=size, dpi=130, layout="constrained", squeeze=False, **more
    )
    return figure, list(axes.flat)


def _lines(axis: Any, rows: list[Row], base: str) -> None:
    for peer, color in _COLORS.items():
        ms, ratios = _over(rows, base, peer)
        if ms:
            ours = peer == OURS
            axis.plot(
                ms,
                ratios,
                color=color,
                marker="o",
                markersize=4 if ours else 3,
                linewidth=2.4 if ours else 1.3,
                zorder=3 if ours else 2,
                label=peer,
            )
    _ratio_ticks(axis)


def _draw_speed(plt: Any, results: Results) -> Any:
    """Multiples of dense: all contenders at the first shape, and fastlora over the targets' shapes."""
    forward, dx, train = (_main_rows(results, op) for op in ("forward", "dx", "training step"))
    panels: list[Any] = []
    if forward:
        panels.append(("forward", _first_shape(forward), DENSE))
    if dx:
        panels.append(("dx", _first_shape(dx), DENSE))
    if train:
        panels.append(("training step", _first_shape(train), "dense + LoRA (PEFT)"))
    if not panels:
        return None
    means = [(op, rows) for op, rows in (("forward", forward), ("dx", dx)) if rows]
    figure, axes = _panels(plt, len(panels) + bool(means))
    for axis, (op, rows, base) in zip(axes, panels, strict=False):
        _lines(axis, rows, base)
        first = rows[0]
        _finish(
            axis,
            sorted({row.m for row in rows}),
            f"{op}, {first.n} x {first.k}, rank {first.r}, {first.dtype}",
            f"speed over {base}",
        )
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if means:
        axis = axes[-1]
        for (op, rows), color in zip(means, ("#1368ce", "#2a9d63"), strict=False):
            _mean_line(axis, rows, op, color, targeted(results.about.get("device", "cpu")))
        axis.axhline(1, color=_COLORS[DENSE], linewidth=1.3)
        _ratio_ticks(axis)
        ms = sorted({row.m for _, rows in means for row in rows if row.peer == OURS})
        _finish(axis, ms, "fastlora, each shape (thin) and the mean", "speed over dense")
        axis.legend(frameon=False)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _mean_line(axis: Any, rows: list[Row], op: str, color: str, over: tuple[tuple[int, int], ...]) -> None:
    by_row: dict[int, list[float]] = {}
    shapes = [shape for shape in over if any((row.n, row.k) == shape for row in rows)]
    shapes = shapes or [(rows[0].n, rows[0].k)]
    for shape in shapes:
        ms, ratios = _over([row for row in rows if (row.n, row.k) == shape], DENSE, OURS)
        axis.plot(ms, ratios, color=color, linewidth=0.8, alpha=0.45)
        for m, ratio in zip(ms, ratios, strict=True):
            by_row.setdefault(m, []).append(ratio)
    whole = [m for m in sorted(by_row) if len(by_row[m]) == len(shapes)]
    means = [geometric_mean(by_row[m]) for m in whole]
    axis.plot(whole, means, color=color, linewidth=2.4, marker="o", markersize=4, label=op)


def _draw_roof(plt: Any, results: Results) -> Any:
    """Per cent of the roof that the run measured: memory for a few rows, arithmetic for many."""
    panels = [(op, _first_shape(_main_rows(results, op))) for op in ("forward", "dx", "training step")]
    panels = [(op, rows) for op, rows in panels if any(row.roof_percent is not None for row in rows)]
    if not panels:
        return None
    figure, axes = _panels(plt, len(panels), sharey=True)
    for axis, (op, rows) in zip(axes, panels, strict=True):
        for peer, color in _COLORS.items():
            ours = peer == OURS
            for memory in (True, False):
                line = [row for row in rows if row.peer == peer and row.roof_percent is not None]
                line = [row for row in line if _is_memory(row) == memory]
                axis.plot(
                    [row.m for row in line],
                    [row.roof_percent for row in line],
                    color=color,
                    marker="o",
                    markersize=4 if ours else 3,
                    linewidth=2.4 if ours else 1.3,
                    zorder=3 if ours else 2,
                    label=peer if line and not (memory and _has_product(rows, peer)) else None,
                )
        _mark_roofs(axis, rows)
        first = rows[0]
        _finish(
            axis,
            sorted({row.m for row in rows}),
            f"{op}, {first.n} x {first.k}, rank {first.r}, {first.dtype}",
            "per cent of the roof",
        )
        axis.set_ylim(0, max(100.0, axis.get_ylim()[1]))
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _is_memory(row: Row) -> bool:
    return row.roof.startswith(("read", "copy"))


def _has_product(rows: list[Row], peer: str) -> bool:
    return any(row.roof and not _is_memory(row) for row in rows if row.peer == peer)


def _mark_roofs(axis: Any, rows: list[Row]) -> None:
    """A dotted line between fastlora's rows held against one roof and those held against the other."""
    rows = [row for row in rows if row.peer == OURS]
    memory = [row for row in rows if _is_memory(row)]
    product = [row for row in rows if row.roof and not _is_memory(row)]
    if not memory or not product:
        return
    border = math.sqrt(max(row.m for row in memory) * min(row.m for row in product))
    axis.axvline(border, color="#888888", linewidth=1, linestyle=":")
    for x, side, text in ((border, "right", f"{memory[0].roof} "), (border, "left", f" {product[0].roof}")):
        axis.text(x, 0.99, text, transform=axis.get_xaxis_transform(), ha=side, va="top", color="#666666")
