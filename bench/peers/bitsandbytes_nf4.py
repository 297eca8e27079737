"""bitsandbytes' Linear4bit (NF4, double quantised). It has no adapter of its own.

On a CPU it dequantises the weight and calls the dense product in training mode, and repacks the weight for a
fused kernel in eval mode (bitsandbytes_eval.py). On a CUDA device the mode changes nothing: forward, with
gradients or without, takes its fused kernel wherever its own table of shapes and rows says so, and else
dequantises; backward always dequantises."""

from __future__ import annotations

import copy

import bitsandbytes
import torch
from torch import Tensor, nn

from peers import Peer, Problem


def quantized_linear(problem: Problem) -> nn.Module:
    """A Linear4bit over the problem's weight. The problem keeps one, and every caller gets a copy: eval mode
    repacks the weight in place."""

    def make() -> nn.Module:
        linear = bitsandbytes.nn.Linear4bit(
            problem.k, problem.n, bias=False, compute_dtype=problem.kind, quant_type="nf4", device="meta"
        )
        linear.weight = bitsandbytes.nn.Params4bit(problem.dense(), requires_grad=False, quant_type="nf4")
        return linear.to(problem.device)  # quantises

    return copy.deepcopy(problem.once("Linear4bit", make))


class BitsandbytesTraining(Peer):
    name = "bitsandbytes, training mode"
    operations = frozenset({"forward", "grad_input", "step", "quantize", "dequantize"})
    training = True

    def build(self, problem: Problem) -> nn.Module:
        linear = quantized_linear(problem)
        state = linear.weight.quant_state
        self.bytes = linear.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        self.packed, self.state = linear.weight.data, state
        return linear

    def represented(self) -> Tensor:
        linear = self.problem.shared["Linear4bit"]
        state = copy.copy(linear.weight.quant_state)
        state.dtype = torch.float32
        return bitsandbytes.functional.dequantize_4bit(linear.weight.data, state)

    def weight_bytes(self) -> int:
        return self.bytes

    def quantize(self) -> Tensor:
        return bitsandbytes.functional.quantize_4bit(
            self.problem.dense(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )[0]

    def dequantize(self) -> Tensor:  # its `out` argument has no CPU kernel
        return bitsandbytes.functional.dequantize_4bit(self.packed, self.state)


class BitsandbytesCuda(BitsandbytesTraining):
    name = "bitsandbytes"
