"""The two tables that `make cuda-check ARGS=--write` puts into docs/cuda_kernels.md, and what they hold a
later build to."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs" / "cuda_kernels.md"
BEGIN, END = "<!-- make cuda-check: begin -->", "<!-- make cuda-check: end -->"
NEVER = "-"  # instead of blocks: never chosen on that architecture
ALIKE = 0.05


@dataclass(frozen=True)
class Row:
    name: str
    arch: str
    registers: int
    blocks: int | None  # that a processor holds at once; None: never chosen there
    loop: float | None = None  # instructions in the main loop for each product, or each weight of a lane
    per_weight: bool = False


def _alike(one: Row, other: Row | None) -> bool:
    if other is None or one.blocks != other.blocks or (one.loop is None) != (other.loop is None):
        return False
    pairs = [(one.registers, other.registers), (one.loop or 1, other.loop or 1)]
    return all(abs(a - b) <= ALIKE * max(a, b) for a, b in pairs)


def _worth_a_row(rows: list[Row]) -> list[Row]:
    """Without the float16 kernels that are like their bfloat16 twins everywhere."""
    known = {(row.name, row.arch): row for row in rows}
    differ = {
        row.name
        for row in rows
        if "kFloat16" not in row.name
        or not _alike(row, known.get((row.name.replace("kFloat16", "kBFloat16"), row.arch)))
    }
    return [row for row in rows if row.name in differ]


def _table(head: list[str], cells: dict[tuple[str, ...], dict[str, str]], archs: list[str]) -> list[str]:
    lines = [f"| {' | '.join([*head, *('sm_' + arch for arch in archs)])} |"]
    lines.append("|---" * len(head) + "|" + "--:|" * len(archs))
    for first, by_arch in cells.items():
        lines.append(f"| {' | '.join([*first, *(by_arch.get(arch, '') for arch in archs)])} |")
    return lines


def text_of(rows: list[Row]) -> str:
    """Both tables: registers and blocks of every kernel, and the main loops of those that have one."""
    archs = list(dict.fromkeys(row.arch for row in rows))
    usage: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    loops: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for row in _worth_a_row(rows):
        blocks = NEVER if row.blocks is None else row.blocks
        usage[f"`{row.name}`",][row.arch] = f"{row.registers}, {blocks}"
        if row.loop is not None:
            each = "weight" if row.per_weight else "product"
            loops[f"`{row.name}`", each][row.arch] = f"{row.loop:.2f}"
    return "\n".join(
        [*_table(["kernel"], usage, archs), "", *_table(["main loop of", "for each"], loops, archs)]
    )


@dataclass
class Record:
    blocks: dict[tuple[str, str], int] = field(default_factory=dict)  # by kernel and architecture
    loops: dict[tuple[str, str], float] = field(default_factory=dict)


def recorded(text: str | None = None) -> Record:
    """What the tables of docs/cuda_kernels.md, or of this text, say."""
    text = DOCS.read_text(encoding="utf-8") if text is None else text
    record = Record()
    archs: list[str] = []
    for line in text[text.index(BEGIN) : text.index(END)].splitlines():
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if any(cell.startswith("sm_") for cell in cells):
            archs = [cell.removeprefix("sm_") for cell in cells if cell.startswith("sm_")]
        elif first.startswith("`"):
            for arch, cell in zip(archs, cells[len(cells) - len(archs) :], strict=True):
                if usage := re.fullmatch(r"\d+, (\d+)", cell):
                    record.blocks[first.strip("`"), arch] = int(usage[1])
                elif re.fullmatch(r"[\d.]+", cell):
                    record.loops[first.strip("`"), arch] = float(cell)
    return record


def losses(rows: list[Row], record: Record, slack: float) -> list[str]:
    """Kernels that fit a processor fewer times than recorded, or whose loops are longer than `slack` times
    what is recorded."""
    found = []
    advice = f"{DOCS.name} has"
    for row in rows:
        blocks, loop = record.blocks.get((row.name, row.arch)), record.loops.get((row.name, row.arch))
        if blocks is not None and row.blocks is not None and row.blocks < blocks:
            found.append(f"{row.name} sm_{row.arch}: {row.blocks} blocks a processor, {advice} {blocks}")
        if loop is not None and row.loop is not None and row.loop > slack * loop:
            found.append(
                f"{row.name} sm_{row.arch}: {row.loop:.2f} instructions in the main loop for each product or "
                f"weight, {advice} {loop:.2f}"
            )
    if found:
        found.append("where that is meant: make cuda-check ARGS=--write")
    return found


def replace(begin: str, end: str, new: str) -> None:
    """What stands between two lines of docs/cuda_kernels.md."""
    text = DOCS.read_text(encoding="utf-8")
    head, rest = text.split(begin)
    temporary = DOCS.with_suffix(".tmp")
    temporary.write_text(f"{head}{begin}\n{new}\n{end}{rest.split(end)[1]}", encoding="utf-8")
    temporary.replace(DOCS)


def write(rows: list[Row]) -> None:
    replace(BEGIN, END, text_of(rows))
