"""bitsandbytes' Linear4bit (NF4, double quantised), the adapter beside it as PEFT has it.

In eval mode bitsandbytes repacks the weight for its fused CPU kernel at the first call, and cannot train
afterwards; in training mode it dequantises the weight and calls the dense product. Both are peers.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from peers import Peer, WithLora

logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it advises optional downloads
import bitsandbytes  # noqa: E402


class BitsandbytesTraining(Peer):
    name = "bitsandbytes, training mode"

    def build(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> nn.Module:
        n, k = weight.shape
        linear = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type="nf4")
        linear.weight = bitsandbytes.nn.Params4bit(weight.to(dtype), requires_grad=False, quant_type="nf4")
        linear = linear.to("cpu")  # quantises
        state = linear.weight.quant_state
        self.stored = linear.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        self.dense = bitsandbytes.functional.dequantize_4bit(linear.weight, state).double()
        return WithLora(linear, lora_a, lora_b, dtype)

    def represented(self) -> Tensor:
        return self.dense

    def weight_bytes(self) -> int:
        return self.stored


class BitsandbytesEval(BitsandbytesTraining):
    name = "bitsandbytes, eval mode"
    training = False
