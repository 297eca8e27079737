""":class:`ApartAdapters`: what stands for an AdapterTable where a layer's adapters cannot be rows of pools.

Whoever shards parameters needs each in memory of its own, and puts others in their place while a layer runs:
FSDP2 the gathered ones, tensor parallelism a rank's part. So the pools are made of whatever parameters the
call finds, one copy of the adapters a call, and gradients go through that copy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter_pairs import LowRank


class ApartAdapters:
    """Names, slots and numbers of a layer's adapters; slot i is the i-th name's."""

    generation = 0  # as an AdapterTable's: which slot a name has never changes here

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._ranks: tuple[int, ...] = ()
        self._scaling: tuple[float, ...] = ()
        self.device = torch.device("cpu")
        self.entries = self.scaling = torch.empty(0)

    @property
    def capacity(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def slot(self, name: str) -> int:
        return self.names.index(name)

    def set(self, ranks: Sequence[int], scaling: Sequence[float], device: torch.device) -> None:
        """The adapters' present numbers, in the order of their names."""
        now = tuple(ranks), tuple(scaling), device
        if now == (self._ranks, self._scaling, self.device):
            return
        self._ranks, self._scaling, self.device = now
        firsts = [sum(ranks[:i]) for i in range(len(ranks))]
        with torch.inference_mode(False):
            entries = [list(pair) for pair in zip(firsts, ranks, strict=True)]
            self.entries = torch.tensor([entries], dtype=torch.int32, device=device)
            self.scaling = torch.tensor([list(scaling)], dtype=torch.float32, device=device)

    def low_rank(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> LowRank:
        """Pools of these (lora_A (r, k), lora_B (n, r)), in the order of the names; they want the gradients
        that their parts want."""
        a = torch.cat([one for one, _ in pairs])
        b = torch.cat([one.t() for _, one in pairs])
        return LowRank([a], [b], self.entries, self.scaling, [max(self._ranks)], [], ())

    def skeleton(self) -> ApartAdapters:
        return copy.copy(self)
