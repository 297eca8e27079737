"""`fastlora estimate`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .common import JsonOption, one_line_errors, parse_count, parse_size, print_json, size_text, stdout
from .memory_model import Memory, adapter_weights, methods
from .model_sizes import ModelSizes, of_config, of_count, one_layer

_PARTS = {"weights": "blue", "gradients": "yellow", "optimizer": "red", "activations": "green"}
_PLOTTED = {
    "weights": "tab:blue", "gradients": "tab:orange", "optimizer": "tab:red", "activations": "tab:green",
}  # fmt: skip
_NAMES, _WIDTH = 18, 50  # characters of a name and of the longest bar


@one_line_errors
def estimate(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL_CONFIG", help="A config.json, or a folder with one.")
    ] = None,
    params: Annotated[
        str | None, typer.Option(metavar="65B", help="A number of weights, in place of a config.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="8192x8192", help="One linear layer, out x in, in place of a config."),
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="48GB", help="Say what fits: GB are powers of ten, GiB of two.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 16,
    targets: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Layers with adapters; all linear ones by default.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=0, help="In one step, to count activations; 0 leaves them out.")
    ] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the bars with matplotlib too.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate the memory of full fine-tuning, LoRA, and QLoRA with and without a paged optimiser.

    Counted are weights, gradients and AdamW's states: 16-bit weights and
    gradients where everything is trained, float32 adapters, 32-bit states;
    and activations, by a formula, where --tokens is given. Not counted is
    what a framework keeps for itself.

    \b
    Examples:
      fastlora estimate path/to/model --gpu-memory 24GB --tokens 4096
      fastlora estimate --params 65B --gpu-memory 48GB
      fastlora estimate --params 175B --rank 4 --targets q_proj,v_proj
      fastlora estimate --shape 8192x8192 --rank 8
    """
    if sum(given is not None for given in (model, params, shape)) != 1:
        raise ValueError("estimate: expected one of MODEL_CONFIG, --params and --shape")
    memory = None if gpu_memory is None else parse_size(gpu_memory, "--gpu-memory")
    if model is not None:
        sizes = of_config(model)
    elif params is not None:
        sizes = of_count(parse_count(params, "--params"))
    else:
        sizes = _parse_shape(shape or "")
    names = None if targets is None else [name.strip() for name in targets.split(",") if name.strip()]
    rows = methods(sizes, rank, names, tokens)
    if plot is not None:
        _draw(plot, rows, memory, sizes.source)
    trainable = adapter_weights(sizes, rank, names)
    if as_json:
        print_json(_as_json(sizes, rank, trainable, tokens, rows, memory))
    else:
        _print(sizes, rank, trainable, tokens, rows, memory)


def _parse_shape(text: str) -> ModelSizes:
    n, _, k = text.lower().partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise ValueError(f"--shape: expected out x in as 8192x8192, got {text!r}")
    return one_layer(int(n), int(k))


def _as_json(
    sizes: ModelSizes, rank: int, trainable: int, tokens: int, rows: list[Memory], memory: int | None
) -> dict[str, Any]:
    return {
        "model": sizes.source,
        "weights": sizes.weights,
        "linear_weights": sizes.linear_weights,
        "rank": rank,
        "trainable": trainable,
        "fewer_trainable": sizes.weights / trainable,
        "tokens": tokens,
        "activations_counted": tokens > 0,
        "gpu_memory": memory,
        "methods": [
            {**asdict(row), "total": row.total, "fits": None if memory is None else row.total <= memory}
            for row in rows
        ],
    }


def _print(
    sizes: ModelSizes, rank: int, trainable: int, tokens: int, rows: list[Memory], memory: int | None
) -> None:
    console = stdout()
    console.print(f"{sizes.source}: {sizes.weights:,} weights")
    fewer = f"{sizes.weights / trainable:,.0f} times fewer"
    console.print(f"adapters of rank {rank}: {trainable:,} trainable weights, {fewer}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True)
    table.add_column("", no_wrap=True)
    for name in ("weights", "gradients", "optimiser", "activations", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    if memory is not None:
        table.add_column(size_text(memory), no_wrap=True)
    for row in rows:
        cells = [row.weights, row.gradients, row.optimizer, row.activations if tokens else None, row.total]
        texts = ["-" if cell is None else size_text(cell) for cell in cells]
        if memory is not None:
            texts.append("fits" if row.total <= memory else "no")
        table.add_row(row.method, *texts)
    console.print()
    console.print(table)
    console.print()
    longest = max(row.total for row in rows)
    for row in rows:
        console.print(_bar(row, longest))
    console.print(Text(" " * _NAMES).append_text(_legend()))
    console.print()
    if tokens:
        console.print(f"Activations are those of {tokens:,} tokens, each block computed again in backward.")
    else:
        console.print("Activations are not counted; --tokens counts those of a step.")
    if rows[-1].host:
        console.print(f"Paged, {size_text(rows[-1].host)} of the optimiser's states may lie in host memory.")


def _bar(row: Memory, longest: int) -> Text:
    """One bar, each part in its colour and, for a terminal without any, by its own character."""
    text = Text(f"{row.method:<{_NAMES}}")
    end, drawn = 0, 0
    for part, colour in _PARTS.items():
        end += getattr(row, part)
        cells = round(_WIDTH * end / longest) - drawn
        text.append(_mark(part) * cells, style=colour)
        drawn += cells
    return text.append(f" {size_text(row.total)}")


def _mark(part: str) -> str:
    return {"weights": "█", "gradients": "▓", "optimizer": "▒", "activations": "░"}[part]


def _label(part: str) -> str:
    return {"optimizer": "optimiser"}.get(part, part)


def _legend() -> Text:
    text = Text()
    for part, colour in _PARTS.items():
        text.append(_mark(part), style=colour).append(f" {_label(part)}  ")
    return text


def _draw(path: Path, rows: list[Memory], memory: int | None, title: str) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--plot: expected a file in a folder that exists, got {path}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--plot: expected matplotlib, got none; pip install 'matplotlib>=3.8'") from None
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    names = [row.method for row in rows]
    left = [0.0] * len(rows)
    for part in _PARTS:
        sizes = [getattr(row, part) / 1e9 for row in rows]
        axes.barh(names, sizes, left=left, color=_PLOTTED[part], label=_label(part))
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    if memory is not None:
        axes.axvline(memory / 1e9, color="black", linestyle="--", label=size_text(memory))
    axes.invert_yaxis()
    axes.set_xlabel("GB")
    axes.set_title(title)
    axes.legend()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
