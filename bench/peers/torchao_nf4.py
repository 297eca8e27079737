"""torchao's NF4Tensor (blocks of 64, scales quantised over 256): it dequantises and calls
the dense product."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4

from peers import Peer, Problem, Unsupported

BLOCK, SCALER_BLOCK = 64, 256


class _Layer(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.quantized = weight

    def forward(self, x: Tensor) -> Tensor:
        return linear_nf4(x, self.quantized)


class TorchaoNf4(Peer):
    name = "torchao NF4"
    operations = frozenset({"forward", "grad_input", "step", "quantize", "dequantize"})
    training = True

    def build(self, problem: Problem) -> nn.Module:
        if problem.n * problem.k % (BLOCK * SCALER_BLOCK):
            raise Unsupported(f"expected a multiple of {BLOCK * SCALER_BLOCK} weights")
        return _Layer(self.quantize())

    def represented(self) -> Tensor:
        return self.layer.quantized.get_original_weight().float()

    def weight_bytes(self) -> int:
        w = self.layer.quantized
        return sum(t.nbytes for t in (w.quantized_data, w.quantized_scalers, w.quantization_factor))

    def quantize(self) -> Tensor:
        with torch.no_grad():
            return to_nf4(self.problem.dense(), BLOCK, SCALER_BLOCK)

    def dequantize(self) -> Tensor:
        return self.layer.quantized.get_original_weight()
