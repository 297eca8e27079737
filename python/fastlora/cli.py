"""The command line: `fastlora`, also `python -m fastlora`."""

from __future__ import annotations

import typer

from .commands.estimate import estimate
from .commands.info import info

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fused 4-bit NormalFloat layers with low-rank adapters.",
)
for command in (info, estimate):
    app.command()(command)


@app.callback()
def _root() -> None:
    """A callback, so that a command is one by name however many there are."""


def main() -> None:
    """The `fastlora` script."""
    app(prog_name="fastlora")
