"""Which row of a batch has which adapter: :func:`route`, and :func:`adapters` for a whole model.

Rows are sorted by slot once a batch; the order is shared by all layers whose tables give the names the same
slots, which is all of them where adapters were added to all in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

_route = torch.ops.fastlora.lora_route.default


class Routing(NamedTuple):
    """The rows of a batch, sorted by slot."""

    slots: Tensor  # int32 or int64 (m,): of each row; -1: none
    order: Tensor  # int32 (m,): rows by slot, those without an adapter last
    segments: Tensor  # int32 (min(m, capacity) + 1, 2): {slot, first position in order}
    capacity: int


def route(slots: Tensor | Sequence[int], capacity: int) -> Routing:
    """Sort rows by slot. slots: int32 or int64 of any shape, an element a row, -1 for no adapter.

    Raises ValueError for a slot outside -1 .. capacity - 1, which on CUDA counts as -1 instead: nothing waits
    for the device.
    """
    if not isinstance(slots, Tensor):
        slots = torch.tensor(slots, dtype=torch.int32)
    slots = slots.reshape(-1)
    order, segments = _route(slots, capacity)
    return Routing(slots, order, segments, capacity)


def uniform(m: int, device: torch.device) -> Routing:
    """All of m rows in slot 0 of a table with one slot, made where it is needed."""
    if torch.compiler.is_compiling():
        return _uniform(m, device)
    key = m, device
    made = _UNIFORM.get(key)
    if made is None:
        if len(_UNIFORM) >= _MOST_UNIFORM:
            _UNIFORM.pop(next(iter(_UNIFORM)), None)
        with torch.inference_mode(False):
            made = _UNIFORM[key] = _uniform(m, device)
    return made


_UNIFORM: dict[tuple[int, torch.device], Routing] = {}
_MOST_UNIFORM = 64  # a generation has two counts of rows, a training run one


def _uniform(m: int, device: torch.device) -> Routing:
    return route(torch.zeros(m, dtype=torch.int32, device=device), 1)


class Router:
    """Slots of a batch's prompts, or of its rows, and the routing of whatever rows a layer is given."""

    def __init__(
        self, slots: Sequence[int], capacity: int, device: torch.device, batch_invariant: bool
    ) -> None:
        self.count = len(slots)
        with torch.inference_mode(False):  # it may serve a training step later
            self.routing = route(torch.tensor(slots, dtype=torch.int32, device=device), capacity)
        self.batch_invariant = batch_invariant
        self._by_tokens: dict[int, Routing] = {}

    def of(self, x: Tensor) -> Routing:
        """For x (rows, k) or (prompts, ..., k), each prompt's rows having its adapter."""
        lead, count = x.shape[:-1], self.count
        m = prod(lead)
        if m == count:
            return self.routing
        if len(lead) < 2 or lead[0] != count:
            raise ValueError(
                f"QLinear: expected x of {count} rows or of {count} prompts, as many as adapters were named, "
                f"got x of shape {tuple(x.shape)}"
            )
        tokens = m // count
        if torch.compiler.is_compiling():
            return self._expanded(tokens)
        made = self._by_tokens.get(tokens)
        if made is None:
            with torch.inference_mode(False):
                made = self._by_tokens[tokens] = self._expanded(tokens)
        return made

    def forget(self) -> None:
        """Drop what a later call can make again."""
        self._by_tokens.clear()

    def _expanded(self, tokens: int) -> Routing:
        slots = self.routing.slots
        return route(slots[:, None].expand(slots.shape[0], tokens), self.routing.capacity)
