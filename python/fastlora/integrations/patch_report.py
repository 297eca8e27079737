"""What :func:`fastlora.patch` tells: plain data that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..conversion_report import SkippedLayer, _grouped, _pattern

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_WIDTH = 110  # of the table as a string


@dataclass(frozen=True)
class PatchedLayer:
    """One layer that computes another way now.

    Attributes:
        name: its path in the model.
        base: what its frozen weight is: "bitsandbytes" (its NF4) or "dense".
        out_features, in_features: n and k.
        adapters: a rank by each adapter's name; empty for a 4-bit layer without any.
        does: how it computes from now on.
    """

    name: str
    base: str
    out_features: int
    in_features: int
    adapters: dict[str, int]
    does: str


@dataclass
class PatchReport:
    """What was patched, and what was left as it was and why."""

    patched: list[PatchedLayer] = field(default_factory=list)
    skipped: list[SkippedLayer] = field(default_factory=list)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich import box
        from rich.table import Column, Table

        def name(title: str) -> Column:
            return Column(title, no_wrap=True, overflow="fold", min_width=26)

        look: dict[str, Any] = {"box": box.SIMPLE, "padding": (0, 1, 0, 0), "pad_edge": False}
        right = [Column(title, justify="right", no_wrap=True) for title in ("count", "out x in")]
        table = Table(name("layer"), right[0], "base", right[1], "rank", "computes", **look)
        for group in _grouped(
            self.patched,
            lambda p: (_pattern(p.name), p.base, p.out_features, p.in_features, _ranks(p), p.does),
        ):
            p = group[0]
            size = f"{p.out_features} x {p.in_features}"
            table.add_row(_short(p.name), str(len(group)), p.base, size, _ranks(p), p.does)
        if self.patched:
            yield table
        left = Table(name("left as it was"), Column("count", justify="right"), "why", **look)
        for skips in _grouped(self.skipped, lambda s: (_pattern(s.name), s.reason)):
            left.add_row(_short(skips[0].name), str(len(skips)), skips[0].reason)
        if self.skipped:
            yield left
        yield f"{len(self.patched)} layers patched, {len(self.skipped)} left as they were"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=_WIDTH, color_system=None, force_terminal=False)
        with console.capture() as got:
            console.print(self)
        return got.get().rstrip()


def _short(name: str) -> str:
    """A row's name: of all layers of a kind, without what PEFT puts before every path."""
    return _pattern(name.removeprefix("base_model.model."))


def _ranks(layer: PatchedLayer) -> str:
    if list(layer.adapters) == ["default"]:  # PEFT's name for the only one
        return str(layer.adapters["default"])
    return ", ".join(f"{name}: {rank}" for name, rank in layer.adapters.items())
