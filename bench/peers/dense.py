"""torch.nn.functional.linear on a dense weight in x's dtype (oneDNN or MKL), the adapter beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from peers import Peer, WithLora


class Dense(Peer):
    name = "dense"

    def build(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> nn.Module:
        self.weight = weight.to(dtype)
        return WithLora(lambda x: functional.linear(x, self.weight), lora_a, lora_b, dtype)

    def represented(self) -> Tensor:
        return self.weight.double()

    def weight_bytes(self) -> int:
        return self.weight.nbytes
