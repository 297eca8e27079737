"""The command line: `fastlora`, also `python -m fastlora`."""

from __future__ import annotations

import typer

from .commands.bench import bench
from .commands.estimate import estimate
from .commands.extract import extract
from .commands.info import info
from .commands.merge import merge
from .commands.quantize import quantize

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fused 4-bit NormalFloat layers with low-rank adapters.",
)
for command in (info, quantize, merge, extract, estimate):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


@app.callback()
def _root() -> None:
    """A callback, so that a command is one by name however many there are."""


def main() -> None:
    """The `fastlora` script."""
    app(prog_name="fastlora")
