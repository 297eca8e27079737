"""The demo's tables and its plot."""

from __future__ import annotations

from pathlib import Path

from _layer_timing import LayerTimes
from _training import History
from rich.console import Console
from rich.table import Table
from torch import nn

import fastlora

console = Console(highlight=False)


def _mib(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"


def memory_table(model: nn.Module) -> Table:
    """What the converted layers' weights take in three formats, and what learns."""
    layers = [m for m in model.modules() if isinstance(m, fastlora.QLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(layer.quantized_weight.nbytes for layer in layers)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rest = sum(p.numel() for p in model.parameters() if p.dtype.is_floating_point and not p.requires_grad)
    table = Table(title=f"Weight memory of the {len(layers)} converted layers ({weights:,} weights)")
    for column in ("format", "bytes", "bits a weight", "of float32"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for name, count in (
        ("float32", 4 * weights),
        ("bfloat16", 2 * weights),
        ("NF4 (double quantised)", stored),
    ):
        table.add_row(name, _mib(count), f"{8 * count / weights:.2f}", f"{count / (4 * weights):.1%}")
    total = weights + rest + trainable
    table.caption = (
        f"trainable: {trainable:,} of {total:,} weights ({trainable / total:.2%}), all in adapters"
    )
    return table


def loss_table(rows: list[tuple[str, dict[str, float]]]) -> Table:
    """rows: (which model, held-out loss by domain); the best of a column is bold."""
    domains = list(rows[0][1])
    table = Table(title="Held-out loss, nats a token (lower is better)")
    table.add_column("model")
    for domain in domains:
        table.add_column(domain, justify="right")
    best = {domain: min(losses[domain] for _, losses in rows) for domain in domains}
    for name, losses in rows:
        cells = [f"{losses[d]:.3f}" for d in domains]
        cells = [
            f"[bold]{cell}[/bold]" if losses[d] == best[d] else cell
            for cell, d in zip(cells, domains, strict=True)
        ]
        table.add_row(name, *cells)
    return table


def layer_table(times: list[LayerTimes], *, size: int, rows: int, threads: int) -> Table:
    """Milliseconds of one layer, each with its ratio to the first row."""
    table = Table(title=f"One {size} x {size} bfloat16 layer with a rank-16 adapter, {threads} threads")
    for column in ("median ms", "forward m=1", f"forward m={rows}", f"step m={rows}", "weight"):
        table.add_column(column, justify="left" if column == "median ms" else "right")
    dense = times[0]
    for t in times:
        pairs = (
            (t.forward_one, dense.forward_one),
            (t.forward_many, dense.forward_many),
            (t.step, dense.step),
        )
        cells = [f"{ms:.2f} ({base / ms:.1f}x)" for ms, base in pairs]
        table.add_row(t.name, *cells, _mib(t.weight_bytes))
    table.caption = "m rows of x; step: forward and backward; in brackets: times as fast as dense"
    return table


def _smooth(values: list[float], keep: float = 0.9) -> list[float]:
    out: list[float] = []
    for value in values:
        out.append(value if not out else keep * out[-1] + (1 - keep) * value)
    return out


def plot_losses(histories: list[History], path: Path) -> None:
    """One panel a training run: every step's loss, its running mean, and the held-out losses. A PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            1,
            len(histories),
            figsize=(4.4 * len(histories), 3.6),
            dpi=150,
            layout="constrained",
            squeeze=False,
        )
        for axis, history, color in zip(axes[0], histories, ("#4c5b70", "#1f77b4", "#c2571a"), strict=False):
            steps = range(1, len(history.train) + 1)
            axis.plot(steps, history.train, color=color, alpha=0.25, linewidth=0.8)
            axis.plot(steps, _smooth(history.train), color=color, linewidth=1.8, label="training")
            at, losses = zip(*history.held_out, strict=True)
            axis.plot(at, losses, color="black", linestyle="none", marker="o", markersize=5, label="held out")
            axis.annotate(
                f"{losses[-1]:.2f}",
                (at[-1], losses[-1]),
                textcoords="offset points",
                xytext=(0, 8),
                ha="right",
            )
            axis.set_title(f"{history.label}, {losses[0]:.2f} → {losses[-1]:.2f}", fontsize=11)
            axis.set_xlabel("step")
            axis.grid(alpha=0.2)
        axes[0][0].set_ylabel("loss (nats a token)")
        axes[0][0].legend(frameon=False)
        figure.savefig(path)
        plt.close(figure)
