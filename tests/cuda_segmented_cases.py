"""Tables, routings and their float64 meaning, for the tests of many adapters in one batch on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import devices
import torch
from tolerances import TOLERANCES
from torch import Tensor


@dataclass
class Table:
    """Slices of adapters of mixed ranks in pools, and where each lies."""

    k: int
    outs: tuple[int, ...]  # columns of y that each slice has
    ranks: tuple[int, ...]  # of each slot; 0: empty
    dtype: torch.dtype = torch.float32
    seed: int = 0
    a: list[Tensor] = field(init=False)
    b: list[Tensor] = field(init=False)
    entries: Tensor = field(init=False)
    scaling: Tensor = field(init=False)
    widths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(rows: int, width: int, scale: float) -> Tensor:
            return (torch.randn(rows, width, generator=generator) * scale).to(self.dtype)

        self.a, self.b, entries, self.widths = [], [], [], []
        for j, n in enumerate(self.outs):
            # Every slice has its own ranks; slots lie in another order than their numbers, with gaps.
            ranks = [max(0, r - j) if r > 1 else r for r in self.ranks]
            first, place = 3, {}
            for slot in reversed(range(len(ranks))):
                place[slot] = first
                first += ranks[slot] + slot % 2
            entries.append([[place[slot], rank] for slot, rank in enumerate(ranks)])
            rows = first + 2
            self.a.append(normal(rows, self.k, self.k**-0.5))
            self.b.append(normal(rows, n, 0.2))
            self.widths.append(max([1, *ranks]) + j)  # a little more than the largest rank
        self.entries = torch.tensor(entries, dtype=torch.int32).reshape(len(self.outs), -1, 2)
        self.scaling = 0.25 + torch.rand(self.entries.shape[:2], generator=generator)

    @property
    def n(self) -> int:
        return sum(self.outs)

    @property
    def capacity(self) -> int:
        return self.entries.shape[1]

    def columns(self, j: int) -> slice:
        return slice(sum(self.outs[:j]), sum(self.outs[: j + 1]))

    def rank_columns(self, j: int, slot: int) -> slice:
        first = sum(self.widths[:j])
        return slice(first, first + int(self.entries[j, slot, 1]))

    def rows(self, j: int, slot: int) -> slice:
        """Of the pools, none for an entry that leaves them."""
        first, rank = self.entries[j, slot].tolist()
        inside = 0 <= first <= self.a[j].shape[0] - rank and 0 < rank <= self.widths[j]
        return slice(first, first + rank) if inside else slice(0, 0)


def route(slots: Sequence[int], capacity: int) -> tuple[Tensor, Tensor]:
    """What lora_route says of slots, where those out of range count as none."""
    keys = [s if 0 <= s < capacity else capacity for s in slots]
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    length = min(len(keys), capacity) + 1
    segments, last = [], None
    for position, row in enumerate(order):
        if keys[row] != last and keys[row] < capacity:
            segments.append([keys[row], position])
        last = keys[row]
    routed = sum(key < capacity for key in keys)
    segments += [[-1, routed]] * (length - len(segments))
    return torch.tensor(order, dtype=torch.int32), torch.tensor(segments, dtype=torch.int32)


@dataclass
class Result:
    want: Tensor  # float64
    bound: Tensor  # elementwise


def _like(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def positions(order: Tensor) -> dict[int, int]:
    return {row: position for position, row in enumerate(order.tolist())}


def expected_shrink(t: Table, x: Tensor, slots: Sequence[int], order: Tensor, *, grad: bool) -> Result:
    """u of x, or v of dy, in the order of `order`."""
    at = positions(order)
    u, bound = _like(len(slots), sum(t.widths)), _like(len(slots), sum(t.widths))
    low_rank = TOLERANCES[x.dtype].low_rank
    for i, slot in enumerate(slots):
        if not 0 <= slot < t.capacity:
            continue
        for j in range(len(t.outs)):
            rows = t.rows(j, slot)
            if rows.stop == rows.start:
                continue
            pool = (t.b if grad else t.a)[j][rows].double()
            part = x[i].double()[t.columns(j)] if grad else x[i].double()
            scale = float(t.scaling[j, slot]) if grad else 1.0
            u[at[i], t.rank_columns(j, slot)] = scale * (pool @ part)
            bound[at[i], t.rank_columns(j, slot)] = low_rank * abs(scale) * (pool.abs() @ part.abs())
    return Result(u, bound)


def expected_expand(
    t: Table, y: Tensor, u: Result, slots: Sequence[int], order: Tensor, dtype: torch.dtype, *, grad: bool
) -> Result:
    """y, or dx, with the term added; u as it is bounded."""
    at = positions(order)
    out, bound = y.double().clone(), _like(*y.shape)
    tolerance = TOLERANCES[dtype]
    for i, slot in enumerate(slots):
        if not 0 <= slot < t.capacity:
            continue
        for j in range(len(t.outs)):
            rows, ranks = t.rows(j, slot), t.rank_columns(j, slot)
            if rows.stop == rows.start:
                continue
            pool = (t.a if grad else t.b)[j][rows].double()
            scale = 1.0 if grad else float(t.scaling[j, slot])
            columns = slice(None) if grad else t.columns(j)
            inner, inner_bound = u.want[at[i], ranks], u.bound[at[i], ranks]
            out[i, columns] += scale * (inner @ pool)
            rounding = inner_bound + tolerance.low_rank * inner.abs()
            bound[i, columns] += abs(scale) * (rounding @ pool.abs())
    return Result(out, bound + tolerance.output * (out.abs() + y.double().abs()))


def expected_pools(
    t: Table, x: Tensor, dy: Tensor, u: Tensor, v: Tensor, slots: Sequence[int], order: Tensor
) -> tuple[list[Result], list[Result]]:
    """da and db of given u and v."""
    at = positions(order)
    sides: tuple[list[Result], list[Result]] = ([], [])
    for side, (tall, small, pools) in enumerate(((x, v, t.a), (dy, u, t.b))):
        for j, pool in enumerate(pools):
            want, magnitudes = _like(*pool.shape), _like(*pool.shape)
            for slot in range(t.capacity):
                rows = [i for i, s in enumerate(slots) if s == slot]
                where = t.rows(j, slot)
                if not rows or where.stop == where.start:
                    continue
                scale = float(t.scaling[j, slot]) if side else 1.0
                left = small[[at[i] for i in rows]][:, t.rank_columns(j, slot)].double()
                right = tall[rows].double()
                right = right[:, t.columns(j)] if side else right
                want[where] = scale * left.T @ right
                magnitudes[where] = scale * left.abs().T @ right.abs()
            rounding = max(TOLERANCES[pool.dtype].output, TOLERANCES[torch.float32].output)
            bound = TOLERANCES[torch.float32].products * magnitudes + 2 * rounding * want.abs()
            sides[side].append(Result(want, bound))
    return sides


# --- what the tests share -----------------------------------------------------------------------------------

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MIXED = (1, 3, 8, 0, 16, 17, 64, 5, 16)


def device(seed: int = 1) -> devices.EmulatedDevice:
    return devices.EmulatedDevice(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """NaN everywhere: what is not written is seen."""
    return torch.full(shape, torch.nan, dtype=dtype)


def check(name: str, got: Tensor, result: Result, dtype: torch.dtype) -> None:
    error = (got.double() - result.want).abs()
    bound = result.bound + TOLERANCES[dtype].smallest
    outside = ~(error <= bound)
    if bool(outside.any()):
        where = tuple(outside.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(where)} is {got[where].item():.9g}, expected {result.want[where].item():.9g} "
            f"within {bound[where].item():.3g} ({int(outside.sum())} of {got.numel()} are outside)"
        )


def some_slots(m: int, capacity: int, seed: int = 0, low: int = -1) -> list[int]:
    return torch.randint(low, capacity, (m,), generator=torch.Generator().manual_seed(seed)).tolist()


SLOTS = {
    "empty": [],
    "none": [-1] * 20,
    "one_each": [4, 0, 8, 2, 6, 1, 7, 5, 3],
    "one_row": [6],
    "skewed": [6] * 40 + [0] + [-1] + [2] * 2 + [6] * 9,
    "unsorted": some_slots(45, 9),
    "outside": [99, 6, -5, 9, 1, 2**20, 6],
}
