"""A batch whose prompts have adapters of their own, from adapters that lie where PEFT keeps them.

The kernels read pools of rows (see adapter_table.py), so each call gathers the adapters that its batch names:
r·(k + n) values each, which is nothing beside a prompt's product and may be a tenth of a token's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter_pairs import LowRank
from ..routing import Routing, route

BASE = "__base__"  # PEFT's name for no adapter
_MOST = 64  # routings that are remembered: all layers of a model share one a step


class Member(NamedTuple):
    """An adapter that the batch names."""

    a: Tensor  # (r, k)
    b: Tensor  # (n, r)
    scaling: float | Tensor


def low_rank(members: Sequence[Member]) -> LowRank:
    """The pools of these adapters, a slot each. Gradients go through them to the adapters."""
    a = torch.cat([one.a for one in members])
    b = torch.cat([one.b.t() for one in members]).to(a.dtype)
    ranks = tuple(one.a.shape[0] for one in members)
    entries = (_make if torch.compiler.is_compiling() else _remembered_entries)(ranks, a.device)
    scaling = torch.stack(
        [torch.as_tensor(one.scaling, dtype=torch.float32, device=a.device) for one in members]
    )
    return LowRank([a], [b], entries, scaling[None], [max(ranks)], [], ())


def routing(slots: Sequence[int], capacity: int, x: Tensor) -> Routing:
    """For x (rows, k), or (prompts, ..., k) with all rows of a prompt alike: a slot a row or prompt, -1 for
    none."""
    tokens = x.shape[1:-1].numel()
    make = _route if torch.compiler.is_compiling() else _remembered_route
    return make(tuple(slots), tokens, capacity, x.device)


def _route(slots: tuple[int, ...], tokens: int, capacity: int, device: torch.device) -> Routing:
    each = torch.tensor(slots, dtype=torch.int32, device=device)
    return route(each[:, None].expand(len(slots), tokens), capacity)


def _make(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    firsts = [sum(ranks[:i]) for i in range(len(ranks))]
    return torch.tensor(
        [[[f, r] for f, r in zip(firsts, ranks, strict=True)]], dtype=torch.int32, device=device
    )


@lru_cache(_MOST)
def _remembered_route(slots: tuple[int, ...], tokens: int, capacity: int, device: torch.device) -> Routing:
    with torch.inference_mode(False):
        return _route(slots, tokens, capacity, device)


@lru_cache(_MOST)
def _remembered_entries(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _make(ranks, device)
