"""The adapter that a layer has as its own lora_A and lora_B: its scaling, how it starts, its values, its sum
with the weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .named_adapters import NamedAdapters


class OwnAdapter(NamedAdapters):
    """A layer with ``lora_A`` ``(r, k)`` and ``lora_B`` ``(n, r)``, or None for both at rank 0."""

    lora_A: Tensor | None
    lora_B: Tensor | None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in force, dense (n, k)."""
        raise NotImplementedError

    def set_alpha(self, alpha: float, use_rslora: bool = False) -> None:
        """Set the scaling to alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
        self.alpha, self.use_rslora = alpha, use_rslora
        self.scaling = 0.0 if self.rank == 0 else alpha / (math.sqrt(self.rank) if use_rslora else self.rank)

    def reset_adapter(self, init: str = "default") -> None:
        """lora_A Kaiming-uniform with a = sqrt(5), or normal for ``"gaussian"``, lora_B zero: the layer is
        its base again."""
        if init not in {"default", "gaussian"}:
            raise ValueError(f"reset_adapter: expected init 'default' or 'gaussian', got {init!r}")
        if self.lora_A is not None and self.lora_B is not None:
            if init == "gaussian":
                nn.init.normal_(self.lora_A, std=1 / self.rank)
            else:
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def set_adapter_values(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Copy values (rank, k) and (n, rank) into the layer's own adapter."""
        for name, p, value in (("lora_a", self.lora_A, lora_a), ("lora_b", self.lora_B, lora_b)):
            if p is None or p.shape != value.shape:
                raise ValueError(
                    f"set_adapter_values: expected {name} of shape "
                    f"{None if p is None else tuple(p.shape)}, got {tuple(value.shape)}"
                )
        with torch.no_grad():
            self.lora_A.copy_(lora_a)  # type: ignore[union-attr]
            self.lora_B.copy_(lora_b)  # type: ignore[union-attr]

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W with the active adapter in it, unquantised: float32 (out_features, in_features); of a merged
        layer the weight in force."""
        dense = self.dequantize(torch.float32)
        if self.merged or self.active_adapter is None:
            return dense
        adapter = self.exported(self.active_adapter)
        return dense.addmm_(adapter.lora_B.float(), adapter.lora_A.float(), alpha=adapter.scaling)
