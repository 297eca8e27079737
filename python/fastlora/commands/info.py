"""`fastlora info`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .. import info as _info
from .common import JsonOption, print_json


def info(as_json: JsonOption = False) -> None:
    """Say what this installation runs on, and what is missing and why."""
    facts = _info.collect()
    if as_json:
        print_json(facts)
    else:
        _print_table(facts)


def _print_table(facts: dict[str, Any]) -> None:
    forced = f" (forced by {facts['level_forced_by']})" if facts["level_forced_by"] else ""
    rows = {
        "fastlora": facts["fastlora"],
        "python": f"{facts['python']}, {facts['platform']}",
        "torch": facts["torch"],
        "level in force": facts["level"] + forced,
        "levels available": ", ".join(facts["levels_available"]),
        "threads": str(facts["threads"]),
        "CUDA kernels": "built" if facts["cuda_built"] else "not built",
        "CUDA devices": ", ".join(facts["cuda_devices"]) or "none",
        "packages found": ", ".join(f"{k} {v}" for k, v in facts["packages"].items() if v) or "none",
    }
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, value)
    for i, (name, why) in enumerate(facts["missing"].items()):
        table.add_row("missing" if i == 0 else "", f"{name}: {why}")
    Console(highlight=False, markup=False).print(table)
