"""What :func:`fastlora.convert` tells: plain data that prints as an aligned table."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer that became a QLinear, or one projection of experts that became QExperts, whose sizes and
    rank are those of each of `experts`. Bytes are its weight's: dense before, codes, scales and offsets
    after; what it shares with an earlier layer counts there only."""

    name: str
    out_features: int
    in_features: int
    rank: int
    bytes_before: int
    bytes_after: int
    shares_with: str | None = None
    experts: int | None = None


@dataclass(frozen=True)
class SkippedLayer:
    """One layer that stayed as it was."""

    name: str
    reason: str


@dataclass
class ConversionReport:
    """What was converted, what was not and why, and what it changed.

    The model's bytes count every parameter and buffer once, however many modules share it, adapters included.
    `trainable` and `total` count weights: a packed matrix counts its elements, not its bytes.
    """

    converted: list[ConvertedLayer] = field(default_factory=list)
    skipped: list[SkippedLayer] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    trainable: int = 0
    total: int = 0

    def __str__(self) -> str:
        rows = [("layer", "count", "out x in", "rank", "MiB before", "MiB after")]
        for group in _grouped(
            self.converted,
            lambda c: (
                *(_pattern(c.name), c.out_features, c.in_features, c.rank, c.shares_with is None),
                c.experts,
            ),
        ):
            c = group[0]
            rows.append(
                (
                    _pattern(c.name) + ("" if c.shares_with is None else " (shared)"),
                    str(len(group)),
                    ("" if c.experts is None else f"{c.experts} x ") + f"{c.out_features} x {c.in_features}",
                    str(c.rank),
                    _mib(sum(c.bytes_before for c in group)),
                    _mib(sum(c.bytes_after for c in group)),
                )
            )
        rows.append(("the whole model", "", "", "", _mib(self.bytes_before), _mib(self.bytes_after)))
        lines = _aligned(rows, text_columns=1)
        lines.insert(-1, lines[1])  # a rule above the total
        if self.skipped:
            kept = [("left as it was", "why", "count")]
            for skips in _grouped(self.skipped, lambda s: (_pattern(s.name), s.reason)):
                kept.append((_pattern(skips[0].name), skips[0].reason, str(len(skips))))
            lines += ["", *_aligned(kept, text_columns=2)]
        share = 100 * self.trainable / self.total if self.total else 0.0
        lines += [
            "",
            f"{len(self.converted)} layers converted, {len(self.skipped)} left as they were; "
            f"{self.trainable:,} of {self.total:,} weights train ({share:.3f} %)",
        ]
        return "\n".join(lines)


def _pattern(name: str) -> str:
    """layers.7.mlp.up_proj -> layers.*.mlp.up_proj: a row for each kind of layer, not each layer."""
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", name)


def _grouped(items: Iterable[_T], key: Callable[[_T], Hashable]) -> list[list[_T]]:
    groups: dict[Hashable, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _mib(count: int) -> str:
    return f"{count / 2**20:,.2f}"


def _aligned(rows: Sequence[Sequence[str]], text_columns: int) -> list[str]:
    """Lines, the first `text_columns` columns to the left and the rest to the right, with a ruled head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
