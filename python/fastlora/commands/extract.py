"""`fastlora extract`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .common import JsonOption, one_line_errors, print_json, stdout


@one_line_errors
def extract(
    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="A dense model's folder: config.json and safetensors.")
    ],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The folder of what was made of it.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The adapter's folder, to be made.")],
    rank: Annotated[int, typer.Option(help="Of each layer's adapter.")] = 16,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A layer, or the end of some layers' names, in place of all but embeddings and lm_head; may "
            "be repeated.",
        ),
    ] = None,
    niter: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Fast and approximate: random vectors passed N times through each difference."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a LoRA adapter of the difference of two dense models.

    Of each layer that changed, the part of the change that is nearest to
    it at the rank; says how much of each change is not in the adapter.
    Files are read weight by weight, so memory holds one pair of weights
    and the adapter. What changed beside linear layers (norms, biases,
    embeddings) is listed: no adapter holds it.

    \b
    Examples:
      fastlora extract path/to/model path/to/tuned path/to/adapter
      fastlora extract path/to/model path/to/tuned out --target q_proj
    """
    from ..methods.extraction import extract_adapter

    for folder in (base, tuned):
        if not folder.is_dir():
            raise FileNotFoundError(f"expected a model's folder, got {folder}, which is no folder")
    bar = Console(stderr=True).is_terminal
    found = extract_adapter(base, tuned, destination, rank, target_modules=target, niter=niter, progress=bar)
    if as_json:
        print_json(
            {
                "base": str(base),
                "tuned": str(tuned),
                "destination": str(destination),
                "layers": [asdict(layer) for layer in found.layers],
                "left": found.left,
            }
        )
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layer", no_wrap=True)
    for title in ("rank", "change / weight", "left / change"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in found.layers:
        table.add_row(layer.name, str(layer.rank), f"{layer.change:.2e}", f"{layer.error:.2e}")
    stdout().print(table)
    count = len(found.layers)
    stdout().print(f"{destination}: an adapter of {count} {'layer' if count == 1 else 'layers'}")
    for key, reason in found.left.items():
        stdout().print(f"  not in it: {key}: {reason}")
