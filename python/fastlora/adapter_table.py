""":class:`AdapterTable`: the adapters of one layer as rows of two pools, in slots that rows of x name.

Row ``first + i`` of pool ``a`` is row i of a slot's A, the same row of pool ``b`` is column i of its B;
nothing is padded. What learns are Parameters over those very rows: an optimiser's step in place is what the
kernels read. Swapping rewrites rows, an entry and a scale in place, so that a captured CUDA graph follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .adapter_pairs import (
    Given,
    LowRank,
    Pair,
    check_pairs,
    check_scalings,
    compact,
    flat,
    is_over,
    parameter_for,
    refuse,
)
from .checks import DTYPE_CODE
from .huge_pages import prefer
from .ops_segmented import kernel_table
from .rank_rows import RankRows
from .sharded import is_sharded

MAX_SLICES = 8
ROWS_A_SLOT = 16  # of a pool that is made without saying how many


@dataclass
class _Adapter:
    name: str
    ranks: list[int]  # 0 where a slice has none
    scaling: list[float]
    pairs: list[Pair]
    runs: list[tuple[int, int]] = field(default_factory=list)  # (first row, rows kept for it)


class AdapterTable:
    """Adapters of one linear layer, of any ranks, in slots.

    Args:
        in_features: k.
        out_features: n, or the parts of it that a packed layer (qkv, gate and up) gives adapters of their
            own: 1 to 8 slices, which lie side by side in y.
        capacity: slots.
        rank_rows: rows of each slice's pools, the sum of ranks that they hold; 16 a slot by default.
        max_rank: the largest rank that u has columns for from the start. A new adapter of a larger one makes
            u wider, which a captured graph would not notice.
        dtype: of the pools: float32, bfloat16 or float16, whatever x's is.
        fixed: never allocate anew: what does not fit is an error. By default the table grows, which moves the
            pools (and the parameters with them); with `fixed`, max_rank is 64 unless given.

    Changing a table while another thread computes with it is the caller's to prevent. A graph of autograd
    that was recorded before a change of an adapter it used cannot be walked after it: torch says so.

    Raises ValueError for sizes, values and unknown names, TypeError for dtypes.
    """

    _view: tuple[tuple[int, ...], Any] = ((), None)  # what `view` keeps, and what it was made of

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        *,
        capacity: int = 8,
        rank_rows: int | None = None,
        max_rank: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | int | None = None,
        fixed: bool = False,
    ) -> None:
        op = "AdapterTable"
        slices = (out_features,) if isinstance(out_features, int) else tuple(out_features)
        rank_rows = ROWS_A_SLOT * capacity if rank_rows is None else rank_rows
        max_rank = (64 if fixed else 0) if max_rank is None else max_rank
        for name, value, least in (
            ("in_features", in_features, 1),
            *(("out_features", n, 1) for n in slices),
            ("capacity", capacity, 1),
            ("rank_rows", rank_rows, 0),
            ("max_rank", max_rank, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{op}: expected {name} as an int, got {value!r}")
            if value < least:
                raise ValueError(f"{op}: expected {name} >= {least}, got {value}")
        if not 1 <= len(slices) <= MAX_SLICES:
            raise ValueError(f"{op}: expected 1 to {MAX_SLICES} slices of out_features, got {len(slices)}")
        if dtype not in DTYPE_CODE:
            raise TypeError(f"{op}: expected dtype float32, bfloat16 or float16, got {dtype}")
        self.in_features, self.slices, self.fixed = in_features, slices, fixed
        self.dtype = dtype
        self.device = torch.empty(0, device=device).device
        self.widths = [max_rank] * len(slices)
        self.generation = 0  # counts what changes which slot a name has
        self._slots: list[_Adapter | None] = [None] * capacity
        self._index: dict[str, int] = {}
        self._rows = [RankRows(rank_rows) for _ in slices]
        self._allocate()

    @property
    def out_features(self) -> int:
        return sum(self.slices)

    @property
    def capacity(self) -> int:
        return len(self._slots)

    @property
    def names(self) -> tuple[str, ...]:
        """Those registered, by slot."""
        return tuple(one.name for one in self._slots if one is not None)

    @property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """By name, a rank for each slice (0: it has no adapter there)."""
        return {one.name: tuple(one.ranks) for one in self._slots if one is not None}

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __repr__(self) -> str:
        held = ", ".join(f"{name}: {'+'.join(map(str, ranks))}" for name, ranks in self.ranks.items())
        return (
            f"AdapterTable({self.in_features} -> {'+'.join(map(str, self.slices))}, {len(self)} of "
            f"{self.capacity} slots, {'+'.join(str(rows.size) for rows in self._rows)} rows, {self.dtype}, "
            f"{self.device}{', fixed' if self.fixed else ''}{f'; ranks {held}' if held else ''})"
        )

    # --- names and slots ----------------------------------------------------------------------------------

    def slot(self, name: str | None) -> int:
        """The slot that a row names for this adapter; None is no adapter, -1."""
        if name is None:
            return -1
        try:
            return self._index[name]
        except KeyError:
            raise ValueError(
                f"AdapterTable: expected the name of an adapter, got {name!r}; there are {list(self._index)}"
            ) from None

    def slots(self, names: Sequence[str | None]) -> Tensor:
        """int32 (len(names),) on the table's device: the slot of each name."""
        return torch.tensor([self.slot(name) for name in names], dtype=torch.int32, device=self.device)

    def parameters(self, name: str) -> tuple[Pair, ...]:
        """(lora_A (r, k), lora_B (n_j, r)) of each slice: Parameters over the table's own rows."""
        return tuple(self._of(name).pairs)

    def scaling_of(self, name: str) -> tuple[float, ...]:
        return tuple(self._of(name).scaling)

    def set_scaling(self, name: str, scaling: float | Sequence[float]) -> None:
        one = self._of(name)
        one.scaling = check_scalings("set_scaling", scaling, len(self.slices))
        self._write(self._index[name])

    def _of(self, name: str) -> _Adapter:
        one = self._slots[self.slot(name)]
        if name is None or one is None:
            raise ValueError(f"AdapterTable: expected the name of an adapter, got {name!r}")
        return one

    # --- changing it --------------------------------------------------------------------------------------

    def register(
        self,
        name: str,
        lora_a: Tensor | Sequence[Tensor | None],
        lora_b: Tensor | Sequence[Tensor | None],
        scaling: float | Sequence[float] = 1.0,
    ) -> int:
        """Give an adapter a slot, which is returned, and copy its values into the pools.

        lora_a ``(r, k)`` and lora_b ``(n, r)`` of any floating dtype, with r >= 1; of a table with slices a
        sequence of them, None where a slice has none. A tensor that is a Parameter becomes the one over the
        pool's rows, so that whoever holds it (an optimiser, a module) goes on holding what is computed with;
        for others Parameters are made, which do not learn until told to: see :meth:`parameters`.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"AdapterTable.register: expected a name, got {name!r}")
        if name in self._index:
            raise ValueError(f"AdapterTable.register: expected a new name, got {name!r}; replace() swaps it")
        given = check_pairs("register", lora_a, lora_b, self.in_features, self.slices)
        scales = check_scalings("register", scaling, len(self.slices))
        ranks = [0 if pair is None else pair[0].shape[0] for pair in given]
        self._check_ranks("register", ranks)
        slot = next((i for i, one in enumerate(self._slots) if one is None), None)
        if slot is None and self.fixed:
            raise ValueError(
                f"AdapterTable.register: expected a free slot in a fixed table, got {self.capacity} taken"
            )
        one = _Adapter(name, ranks, scales, [None] * len(ranks))
        one.runs = self._place("register", ranks)
        if slot is None:
            slot = self.capacity
            self._slots += [None] * self.capacity
            self._allocate()
        self._slots[slot], self._index[name] = one, slot
        self.generation += 1
        self._fill(one, given)
        self._write(slot)
        return slot

    def replace(
        self,
        name: str,
        lora_a: Tensor | Sequence[Tensor | None],
        lora_b: Tensor | Sequence[Tensor | None],
        scaling: float | Sequence[float] | None = None,
    ) -> None:
        """Swap an adapter's values, and its ranks, in its slot. Where a rank is not larger than the one that
        the slot was first given, its rows stay where they are."""
        one = self._of(name)
        given = check_pairs("replace", lora_a, lora_b, self.in_features, self.slices)
        scales = one.scaling if scaling is None else check_scalings("replace", scaling, len(self.slices))
        ranks = [0 if pair is None else pair[0].shape[0] for pair in given]
        self._check_ranks("replace", ranks)
        given = [pair and (pair[0].detach().clone(), pair[1].detach().clone()) for pair in given]
        if any(rank > kept for rank, (_, kept) in zip(ranks, one.runs, strict=True)):
            before = [rows.copy() for rows in self._rows]
            self._free(one)
            try:
                one.runs = self._place("replace", ranks)
            except ValueError:
                self._rows = before
                raise
        one.ranks, one.scaling = ranks, scales
        self._fill(one, given)
        self._write(self._index[name])

    def evict(self, name: str) -> None:
        """Empty an adapter's slot; rows that name it have no adapter from now on. Who holds its parameters
        keeps their values."""
        one = self._of(name)
        slot = self._index.pop(name)
        self._slots[slot] = None
        self.generation += 1
        self._free(one)
        self._write(slot)
        with torch.inference_mode(False), torch.no_grad():
            for p in flat(one.pairs):
                p.data = p.detach().clone()
                torch.autograd.graph.increment_version(p)  # a graph that is still to be walked reads the rows

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AdapterTable:
        """Move or cast it, in place. Parameters on another kind of device are new ones, as in
        torch.nn.Module."""
        dtype = self.dtype if dtype is None else dtype
        if dtype not in DTYPE_CODE:
            raise TypeError(f"AdapterTable.to: expected dtype float32, bfloat16 or float16, got {dtype}")
        self.device = self.device if device is None else torch.empty(0, device=device).device
        self.dtype = dtype
        self._allocate()
        return self

    def holds(self, name: str, slice_: int, lora_a: Tensor, lora_b: Tensor) -> bool:
        """Whether these very Parameters are an adapter's rows."""
        one = self._of(name)
        first, end = one.runs[slice_][0], one.runs[slice_][0] + one.ranks[slice_]
        a, b = self.a[slice_][first:end], self.b[slice_][first:end].t()
        pair = one.pairs[slice_]
        same = pair is not None and pair[0] is lora_a and pair[1] is lora_b
        return same and is_over(lora_a, a) and is_over(lora_b, b)

    def follow(self, pairs: Mapping[str, Sequence[Pair]]) -> None:
        """Take `pairs` for the parameters of the adapters of these names, with the values, dtype and device
        that they have now, and make them rows of the pools again where they are not."""
        parameters = [p for name in pairs for p in flat(pairs[name])]
        if any(map(is_sharded, parameters)):
            raise RuntimeError("AdapterTable: expected whole parameters, got sharded ones")
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) > 1:
            raise TypeError(
                f"AdapterTable: expected adapters of one dtype and device, got {sorted(map(str, kinds))}"
            )
        for name, new in pairs.items():
            one = self._of(name)
            for j, (pair, rank) in enumerate(zip(new, one.ranks, strict=True)):
                shape = (rank, self.in_features), (self.slices[j], rank)
                if pair is not None and (pair[0].shape, pair[1].shape) != shape:
                    raise ValueError(
                        f"AdapterTable: expected parameters of {name!r} of shapes {shape[0]} and {shape[1]}, "
                        f"got {tuple(pair[0].shape)} and {tuple(pair[1].shape)}"
                    )
            one.pairs = list(new)
        if kinds:
            self.dtype, self.device = kinds.pop()
        pools = self.__dict__.get("a")  # a skeleton has none
        if pools is None or pools[0].dtype != self.dtype or pools[0].device != self.device:
            self._allocate()
            return
        for name in pairs:
            self._fill(self._of(name), self._of(name).pairs)

    # --- as the ops take it -------------------------------------------------------------------------------

    def low_rank(self, *, learns: bool) -> LowRank:
        """learns: name the parameters that want gradients."""
        parameters: list[Tensor] = []
        places: list[tuple[int, int, int]] = []
        for one in self._slots if learns else ():
            if one is not None:
                for j, pair in enumerate(one.pairs):
                    if pair is not None and (pair[0].requires_grad or pair[1].requires_grad):
                        parameters += pair
                        places.append((j, one.runs[j][0], one.ranks[j]))
        return LowRank(
            self.a, self.b, self.entries, self.scaling, self.widths, parameters, tuple(places), self.view
        )

    def view(self) -> Any:
        """The table as the CPU kernels take it (_C.AdapterTable), kept while it lies where it lies; None of a
        table on another device."""
        if self.device.type != "cpu":
            return None
        tensors = (*self.a, *self.b, self.entries, self.scaling)
        key = (*[t.data_ptr() for t in tensors], *[t.shape[0] for t in self.a], *self.widths)
        if key != self._view[0]:
            self._view = key, kernel_table(self.a, self.b, self.entries, self.scaling, self.widths)
        return self._view[1]

    # --- storage ------------------------------------------------------------------------------------------

    def _allocate(self) -> None:
        """New pools, entries and scales of the sizes that the table is to have, filled with what it holds."""
        self._view = AdapterTable._view
        with torch.inference_mode(False), torch.no_grad():
            kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device}

            def pool(rows: int, columns: int) -> Tensor:
                return prefer(torch.empty(rows, columns, **kind)).zero_()

            self.a = [pool(rows.size, self.in_features) for rows in self._rows]
            self.b = [pool(rows.size, n) for rows, n in zip(self._rows, self.slices, strict=True)]
            shape = (len(self.slices), self.capacity)
            self.entries = torch.zeros(*shape, 2, dtype=torch.int32, device=self.device)
            self.scaling = torch.zeros(shape, dtype=torch.float32, device=self.device)
        for slot, one in enumerate(self._slots):
            if one is not None:
                self._fill(one, one.pairs, moved=True)
                self._write(slot)

    def _fill(self, one: _Adapter, values: Sequence[Given], *, moved: bool = False) -> None:
        """Write values, (lora_A, lora_B) of each slice, into an adapter's rows, and make its parameters views
        of them. The parameters' own versions count the write, not the pool's: a graph that used other
        adapters does not mind. moved: into new pools, which is no change of the parameters."""
        with torch.inference_mode(False), torch.no_grad():
            for j, (value, rank, (first, _)) in enumerate(zip(values, one.ranks, one.runs, strict=True)):
                if value is None:
                    one.pairs[j] = None
                    continue
                rows_of_a, rows_of_b = (pool[j][first : first + rank] for pool in (self.a, self.b))
                views = rows_of_a, rows_of_b.t()
                held = one.pairs[j] or value
                a, b = (parameter_for(p, view) for p, view in zip(held, views, strict=True))
                one.pairs[j] = a, b
                for p, view, source in zip((a, b), views, value, strict=True):
                    old = source.detach()  # keeps the memory that p is taken from
                    if moved:
                        view.copy_(old)
                    if not is_over(p, view):
                        p.data = view
                    if not is_over(old, view) and not moved:
                        p.copy_(old)

    def _write(self, slot: int) -> None:
        """A slot's entry and scale, in place."""
        one = self._slots[slot]
        slices = range(len(self.slices))
        entries = [[0, 0] if one is None else [one.runs[j][0], one.ranks[j]] for j in slices]
        scaling = [0.0 if one is None else one.scaling[j] for j in slices]
        with torch.inference_mode(False), torch.no_grad():
            self.entries[:, slot].copy_(torch.tensor(entries, dtype=torch.int32))
            self.scaling[:, slot].copy_(torch.tensor(scaling, dtype=torch.float32))

    def _place(self, op: str, ranks: list[int]) -> list[tuple[int, int]]:
        """Rows for an adapter, in each slice; the table grows where it may. All or none."""
        runs: list[tuple[int, int]] = []
        grown = False
        for rows, rank in zip(self._rows, ranks, strict=True):
            first = rows.take(rank)
            if first is None and not self.fixed:
                rows.grow(max(2 * rows.size, rows.size + rank))
                first, grown = rows.take(rank), True
            if first is None:
                for taken, run in zip(self._rows, runs, strict=False):
                    taken.give(*run)
                raise ValueError(
                    f"AdapterTable.{op}: expected a gap of {rank} rows in a fixed table, got {rows.free} "
                    f"free of {rows.size}, {rows.largest_gap} of them together"
                )
            runs.append((first, rank))
        self.widths = [max(pair) for pair in zip(self.widths, ranks, strict=True)]
        if grown:
            self._allocate()
        return runs

    def _free(self, one: _Adapter) -> None:
        for rows, run in zip(self._rows, one.runs, strict=True):
            rows.give(*run)

    def _check_ranks(self, op: str, ranks: list[int]) -> None:
        if self.fixed and any(rank > width for rank, width in zip(ranks, self.widths, strict=True)):
            refuse(op, f"ranks of at most {self.widths} in a fixed table", ranks)

    # --- copies -------------------------------------------------------------------------------------------

    def skeleton(self) -> AdapterTable:
        """A copy without tensors and parameters, for :meth:`follow` to fill: what a layer, which has the
        parameters, keeps when it is copied."""
        new = object.__new__(AdapterTable)
        new.__dict__.update(self.__dict__)
        new.widths, new._index = list(self.widths), dict(self._index)
        new._rows = [rows.copy() for rows in self._rows]
        new._slots = [
            one
            and _Adapter(
                one.name, list(one.ranks), list(one.scaling), [None] * len(one.pairs), list(one.runs)
            )
            for one in self._slots
        ]
        for name in ("a", "b", "entries", "scaling", "_view"):
            new.__dict__.pop(name, None)
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = self.skeleton().__dict__
        pairs = {one.name: one.pairs for one in self._slots if one is not None}
        state["pairs"] = {
            name: [pair and (compact(pair[0]), compact(pair[1])) for pair in many]
            for name, many in pairs.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        pairs = state.pop("pairs")
        self.__dict__.update(state)
        if any(pair for many in pairs.values() for pair in many) or not pairs:
            self.follow(pairs)
