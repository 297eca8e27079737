"""`fastlora bench`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

from .common import one_line_errors


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
def bench(context: typer.Context) -> None:
    """Run the repository's microbenchmarks with the arguments that follow.

    The suites are in bench/ of the repository and not in the installed
    package.

    \b
    Examples:
      fastlora bench --quick
      fastlora bench --suite linear --shapes 4096x4096 --rows 1,16
      fastlora bench -- --help
    """
    done = subprocess.run([sys.executable, str(suite()), *context.args], check=False)
    raise typer.Exit(done.returncode)
