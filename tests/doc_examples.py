"""The runnable examples of the documentation: fences that open with ```python run.

Those of one page are run in order, in one namespace and in an empty folder, as a reader would paste them.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_OPENS, _CLOSES = re.compile(r"^```python run\s*$"), re.compile(r"^```\s*$")


@dataclass(frozen=True)
class Example:
    """A fence: its code, and the line of the page that it starts on, from 1."""

    code: str
    line: int


def examples(page: Path) -> list[Example]:
    """The runnable fences of a page. Raises ValueError for one that is not closed."""
    found: list[Example] = []
    opened: int | None = None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if opened is None and _OPENS.match(line):
            opened = number
        elif opened is not None and _CLOSES.match(line):
            found.append(Example("\n".join(lines[opened : number - 1]), opened + 1))
            opened = None
    if opened is not None:
        raise ValueError(f"{page}: expected the fence of line {opened} to be closed, got the end of the page")
    return found


def pages() -> list[Path]:
    """Those of docs/ with runnable examples."""
    return [page for page in sorted((ROOT / "docs").glob("**/*.md")) if examples(page)]


def missing(page: Path) -> list[str]:
    """The libraries that a page's examples import and that are not installed."""
    names = set()
    for example in examples(page):
        for node in ast.walk(ast.parse(example.code, str(page))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return sorted(name for name in names if importlib.util.find_spec(name) is None)


def run(page: Path) -> dict[str, Any]:
    """Run a page's examples in the current folder; returns the names that they leave. A traceback points into
    the page."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for example in examples(page):
        exec(compile("\n" * (example.line - 1) + example.code, str(page), "exec"), names)
    return names
