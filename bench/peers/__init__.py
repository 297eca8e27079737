"""What is measured: one adapter class a file, all of one shape (see :class:`Peer`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

SCALING = 2.0  # of the low-rank term, everywhere


class Peer(ABC):
    """A linear layer with a low-rank adapter, built from dense float32 tensors.

    weight (n, k), lora_a (r, k), lora_b (n, r); r may be 0. `dtype` is that of x and of the result.
    """

    name: str
    training: bool = True  # the mode the layer is put in, where that changes what it does

    def __init__(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype):
        self.dtype, self.n = dtype, weight.shape[0]
        self.layer = self.build(weight, lora_a, lora_b, dtype).train(self.training)

    @abstractmethod
    def build(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> nn.Module: ...

    @abstractmethod
    def represented(self) -> Tensor:
        """The weight that the layer stands for, (n, k) float64: what its arithmetic is checked against."""

    @abstractmethod
    def weight_bytes(self) -> int: ...

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(x)

    def step(self, x: Tensor) -> Tensor | None:
        """Forward and backward: gradients of x and of the adapter. Returns x's gradient."""
        self.layer(x).backward(torch.ones((), dtype=x.dtype).expand(*x.shape[:-1], self.n))
        grad, x.grad = x.grad, None
        for parameter in self.layer.parameters():
            parameter.grad = None
        return grad


class WithLora(nn.Module):
    """y = base(x) + SCALING · (x·Aᵀ)·Bᵀ, the adapter written out: what peers without a fused one run."""

    def __init__(self, base: Callable[[Tensor], Tensor], lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype):
        super().__init__()
        self.base = base
        self.rank = lora_a.shape[0]
        self.lora_a = nn.Parameter(lora_a.to(dtype))
        self.lora_b = nn.Parameter(lora_b.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.rank:
            y = y + SCALING * functional.linear(functional.linear(x, self.lora_a), self.lora_b)
        return y
