"""Tables, routings and inputs that the tests of many adapters share."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from linear_cases import Weight, make_weight
from tolerances import TOLERANCES
from torch import Tensor

from fastlora import reference

Slots = tuple[int, ...]


def zipf(m: int, slots: int, seed: int) -> Slots:
    """Unsorted and skewed: slot s with weight 1 / (s + 1), and some rows without one."""
    rng = random.Random(seed)
    weights = [1 / (s + 1) for s in range(slots)]
    return tuple(-1 if rng.random() < 0.1 else rng.choices(range(slots), weights)[0] for _ in range(m))


#: Rows to slots, by name; CAPACITY slots, of which RANKS gives the ranks and some are empty.
CAPACITY = 12
RANKS = (1, 3, 8, 16, 17, 64, 0, 5, 32, 33, 2, 16)
ROUTINGS: dict[str, Slots] = {
    "empty": (),
    "none": (-1,) * 5,
    "one": (4,),
    "one_each": tuple(range(CAPACITY)),
    "one_slot": (3,) * 40,
    "empty_slot": (6,) * 9 + (2,) * 3,
    "shuffled": (5, -1, 0, 5, 3, -1, 2, 3, 3, 0, 5, 11, 6, 5),
    "zipf": zipf(70, CAPACITY, 1),
    "large": zipf(300, 6, 2),
}


@dataclass(frozen=True)
class Case:
    slots: Slots
    k: int = 70
    ns: tuple[int, ...] = (33,)
    ranks: tuple[int, ...] = RANKS
    dtype: torch.dtype = torch.bfloat16
    pools: torch.dtype = torch.bfloat16
    blocksize: int = 64
    seed: int = 0
    offsets: bool = False

    def __str__(self) -> str:
        names = [name for name, slots in ROUTINGS.items() if slots == self.slots]
        routing = names[0] if names else f"m{len(self.slots)}"
        dtypes = f"{str(self.dtype)[6:]}-{str(self.pools)[6:]}"
        return f"{routing}-k{self.k}-n{'+'.join(map(str, self.ns))}-r{max(self.ranks)}-{dtypes}" + (
            "-offsets" if self.offsets else ""
        )


@dataclass
class Inputs:
    case: Case
    a: list[Tensor]
    b: list[Tensor]
    entries: Tensor
    scaling: Tensor
    order: Tensor
    segments: Tensor
    widths: list[int]
    x: Tensor
    dy: Tensor
    y: Tensor
    dx: Tensor
    weight: Weight | None = None
    bias: Tensor | None = None
    slots: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def adapters(self) -> tuple:
        return (self.a, self.b, self.entries, self.scaling, self.order, self.segments, self.widths)

    @property
    def magnitudes(self) -> tuple:
        return (
            [t.abs() for t in self.a], [t.abs() for t in self.b], self.entries, self.scaling.abs(),
            self.order, self.segments, self.widths,
        )  # fmt: skip

    def linear(self, batch_invariant: bool = False) -> tuple:
        """What nf4_multi_lora_linear takes."""
        w = self.weight
        return (self.x, *w.tensors, w.blocksize, self.bias, *self.adapters, batch_invariant, w.offsets)

    def grad_input(self, batch_invariant: bool = False) -> tuple:
        """What nf4_multi_lora_grad_input takes."""
        w = self.weight
        return (self.dy, *w.tensors, self.case.k, w.blocksize, *self.adapters, batch_invariant, w.offsets)


def make_inputs(case: Case, weight: bool = False) -> Inputs:
    """Adapters in pools, between them rows that no slot owns (NaN: nothing may read them); a slice's ranks
    are turned by one from the slice before."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    m, n, capacity = len(case.slots), sum(case.ns), len(case.ranks)
    a, b, entries, widths = [], [], [], []
    for j, n_j in enumerate(case.ns):
        ranks = [*case.ranks[j:], *case.ranks[:j]]
        rows = sum(ranks) + capacity
        a.append(torch.full((rows, case.k), torch.nan, dtype=case.pools))
        b.append(torch.full((rows, n_j), torch.nan, dtype=case.pools))
        first, pairs = 1, []
        for rank in ranks:
            pairs.append([first, rank])
            a[j][first : first + rank] = normal(rank, case.k, scale=max(case.k, 1) ** -0.5, dtype=case.pools)
            b[j][first : first + rank] = normal(rank, n_j, scale=0.1, dtype=case.pools)
            first += rank + (rank > 1)
        entries.append(pairs)
        widths.append(max(ranks) + j)
    slots = torch.tensor(case.slots, dtype=torch.int32)
    order, segments = reference.lora_route(slots, capacity)
    shape = (len(case.ns), capacity) if len(case.ns) > 1 else (capacity,)
    return Inputs(
        case=case, a=a, b=b, entries=torch.tensor(entries, dtype=torch.int32).reshape(*shape, 2),
        scaling=0.25 + torch.rand(shape, generator=generator), order=order, segments=segments, widths=widths,
        x=normal(m, case.k), dy=normal(m, n), y=normal(m, n), dx=normal(m, case.k), slots=slots,
        weight=make_weight(n, case.k, case.blocksize, offsets=case.offsets) if weight else None,
        bias=normal(n) if weight else None,
    )  # fmt: skip


def bounds(inputs: Inputs, backward: bool, out: Tensor) -> tuple[Tensor, Tensor]:
    """Elementwise, of the low-rank term in `out` (float64) and of u (or v); tolerances.py has the terms."""
    t = TOLERANCES[inputs.case.dtype]
    # Adapters are rounded to x's dtype, or x to float32: float32 pools beside 16-bit x cost a rounding.
    op = reference.segmented_lora_grad_input if backward else reference.segmented_lora
    wide = inputs.dy if backward else inputs.x
    size, narrow = op(wide.abs(), *inputs.magnitudes, torch.zeros_like(out, dtype=torch.float64))
    return t.low_rank * size + t.output * out.abs(), t.low_rank * narrow
