"""fastlora.QLinear: the fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastlora
from peers import SCALING, Peer


class Fastlora(Peer):
    name = "fastlora"

    def build(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> nn.Module:
        rank = lora_a.shape[0]
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        dense.weight = nn.Parameter(weight.to(dtype))
        layer = fastlora.QLinear.from_linear(dense, rank=rank, alpha=SCALING * rank, adapter_dtype=dtype)
        if rank:
            with torch.no_grad():
                layer.lora_A.copy_(lora_a)
                layer.lora_B.copy_(lora_b)
        return layer

    def represented(self) -> Tensor:
        return self.layer.dequantize(torch.float32).double()

    def weight_bytes(self) -> int:
        return self.layer.quantized_weight.nbytes
