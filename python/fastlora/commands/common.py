"""What the commands share: errors as one line, sizes as text, `--json`."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from safetensors import SafetensorError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
_Command = TypeVar("_Command", bound=Callable[..., Any])
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def one_line_errors(command: _Command) -> _Command:
    """What a user can mend (a path, a value, a library) is one line on stderr and exit code 2; anything else
    is a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (OSError, ValueError, TypeError, ImportError, SafetensorError) as error:
            typer.echo(f"fastlora: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error

    return run  # type: ignore[return-value]


def stdout() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Infinities and NaN, which JSON has not, are null."""
    typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size_text(count: float) -> str:
    """Bytes for people, in powers of ten: ``48.0 GB``."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"


def parse_size(text: str, name: str) -> int:
    """Bytes of ``48GB`` (powers of ten) or ``48GiB`` (of two). Raises ValueError."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]I?)?B?\s*", text.upper())
    try:
        return round(float(found[1]) * _UNITS[found[2] or ""])  # type: ignore[index]
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a size as 48GB or 48GiB, got {text!r}") from None


def parse_count(text: str, name: str) -> int:
    """A number of weights: ``65B``, ``350M``, ``7e9``. Raises ValueError."""
    found = re.fullmatch(r"\s*([\d.]+(?:E\d+)?)\s*([KMBT])?\s*", text.upper())
    try:
        count = float(found[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[found[2] or ""]  # type: ignore[index]
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise ValueError(f"{name}: expected a number of weights as 65B or 350M, got {text!r}")
    return round(count)
