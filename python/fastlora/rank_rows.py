"""Which rows of a pool are taken: first fit, gaps merged."""

from __future__ import annotations


class RankRows:
    """The rows [0, size) of a pool. A run is (first, rows)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._gaps = [(0, size)] if size else []  # ascending, none beside another, none empty

    @property
    def free(self) -> int:
        return sum(rows for _, rows in self._gaps)

    @property
    def largest_gap(self) -> int:
        return max((rows for _, rows in self._gaps), default=0)

    def take(self, rows: int) -> int | None:
        """The first row of the first gap that holds so many, or None."""
        if not rows:
            return 0
        for i, (first, gap) in enumerate(self._gaps):
            if gap >= rows:
                self._gaps[i : i + 1] = [(first + rows, gap - rows)] if gap > rows else []
                return first
        return None

    def give(self, first: int, rows: int) -> None:
        """Give a run back, which was taken."""
        if not rows:
            return
        merged: list[tuple[int, int]] = []
        for begin, gap in sorted([*self._gaps, (first, rows)]):
            if merged and merged[-1][0] + merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + gap)
            else:
                merged.append((begin, gap))
        self._gaps = merged

    def copy(self) -> RankRows:
        new = RankRows(0)
        new.size, new._gaps = self.size, list(self._gaps)
        return new

    def grow(self, size: int) -> None:
        """More rows at the end."""
        old, self.size = self.size, size
        self.give(old, size - old)
