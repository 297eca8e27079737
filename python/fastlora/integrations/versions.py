"""Versions of other libraries, to be compared."""

from __future__ import annotations

import re


def numbers(version: str) -> tuple[int, ...]:
    """(0, 50, 2) of "0.50.2", "0.50.2+cpu" or "0.50.2.dev0": what leads in it."""
    leading = re.findall(r"^[\d.]*", version)[0]
    return tuple(int(part) for part in leading.split(".") if part)


def text(version: tuple[int, ...]) -> str:
    """Back again."""
    return ".".join(map(str, version))
