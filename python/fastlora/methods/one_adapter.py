"""What layers share whose adapter is more than a pair A, B: they have that one, and none by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import Packed
from ..linear import QLinear
from ..named_adapters import DEFAULT
from ..own_adapter import OwnAdapter


class OnlyOwn(OwnAdapter):
    """A layer with one adapter, on and off by ``set_adapter("default")`` and ``set_adapter(None)``. Adapters
    by name, and blocks of :func:`fastlora.adapters`, are refused with a RuntimeError: a batch of several
    computes plain pairs on NF4 only."""

    def _pooled(self, op: str, *, more: int = 0, dtype: torch.dtype | None = None) -> Any:
        self._refuse(op)

    def join_table(self, names: Any = ()) -> Any:
        self._refuse("adapters")

    def can_load(self, name: str) -> bool:
        return name == DEFAULT

    def lay_apart(self) -> None:
        """Nothing: the adapter has memory of its own."""

    def _refuse(self, op: str) -> None:
        raise RuntimeError(
            f"{op}: expected a layer with plain LoRA, got {type(self).__name__}, which has the adapter "
            f"{DEFAULT!r} alone"
        )


class OneAdapter(OnlyOwn, QLinear):
    """A QLinear with one adapter of its own kind."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features), in x's dtype (autocast's where that is on)."""
        if self._unmerged is not None or self._active is None or self.lora_A is None:
            return super().forward(x)
        if not x.dim() or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{type(self).__name__}: expected x of shape (..., {self.in_features}), got {tuple(x.shape)}"
            )
        weight = self.packed_weight()
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        return self.adapted(x, weight, bias)

    def adapted(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """What forward computes with the adapter."""
        raise NotImplementedError
