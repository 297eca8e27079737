"""`fastlora bench`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import typer

from .common import JsonOption, one_line_errors


def suite() -> Path:
    """bench/run.py of the checkout that this package is imported from. Raises FileNotFoundError."""
    root = Path(__file__).resolve().parents[3]
    run = root / "bench" / "run.py"
    if not run.is_file() or not (root / "pyproject.toml").is_file():
        raise FileNotFoundError(
            "bench: expected fastlora imported from a checkout, which has the benchmarks, got "
            f"an installed package in {Path(__file__).resolve().parents[1]}"
        )
    return run


@one_line_errors
def bench(context: typer.Context, as_json: JsonOption = False) -> None:
    """Run the repository's microbenchmarks with the arguments that follow.

    The suites are in bench/ of the repository and not in the installed
    package. With --json the tables are not shown; the suites' own option
    of that name, which takes a file, goes after --.

    \b
    Examples:
      fastlora bench --quick
      fastlora bench --suite linear --shapes 4096x4096 --rows 1,16
      fastlora bench --quick --json
      fastlora bench -- --help
    """
    command = [sys.executable, str(suite()), *context.args]
    if not as_json:
        raise typer.Exit(subprocess.run(command, check=False).returncode)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        done = subprocess.run([*command, "--json", str(file)], stdout=subprocess.DEVNULL, check=False)
        if file.is_file():  # also of a run in which something failed: what was measured
            typer.echo(file.read_text(), nl=False)
    raise typer.Exit(done.returncode)
