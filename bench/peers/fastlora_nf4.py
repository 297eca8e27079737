"""fastlora.QLinear: the fused kernel, and two variants that show what its parts cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastlora
from fastlora import _C, isa, quantize_nf4
from fastlora.checks import DTYPE_CODE
from peers import SCALING, Peer, Problem


class Fastlora(Peer):
    name = "fastlora"
    operations = frozenset({"forward", "grad_input", "step", "quantize", "dequantize", "dequantize_into"})
    has_adapter = True
    double_quant = True
    route = "auto"

    def build(self, problem: Problem) -> nn.Module:
        return problem.once(f"QLinear {self.rank} {self.double_quant}", lambda: self.make(problem))

    def make(self, problem: Problem) -> nn.Module:
        dense = nn.Linear(problem.k, problem.n, bias=False, device="meta")
        dense.weight = nn.Parameter(problem.dense())
        layer = fastlora.QLinear.from_linear(
            dense,
            rank=self.rank,
            alpha=SCALING * self.rank,
            double_quant=self.double_quant,
            adapter_dtype=problem.kind,
        )
        if self.rank:
            with torch.no_grad():
                layer.lora_A.copy_(problem.lora_a)
                layer.lora_B.copy_(problem.lora_b)
        return layer

    def represented(self) -> Tensor:
        return self.layer.dequantize(torch.float32)

    def weight_bytes(self) -> int:
        return self.layer.quantized_weight.nbytes

    def adapter(self) -> tuple[Tensor | None, Tensor | None]:
        return self.layer.lora_A, self.layer.lora_B

    def grad_input(self, dy: Tensor) -> Tensor:
        layer, p = self.layer, self.layer._parameters
        with torch.no_grad():
            return torch.ops.fastlora.nf4_linear_grad_input(
                dy, p["weight"], p["weight_scales"], p["weight_nested"], layer.in_features, layer.blocksize,
                p["lora_A"], p["lora_B"], layer.scaling,
            )[0]  # fmt: skip

    def quantize(self) -> Tensor:
        # The check waits for a device; a CPU's kernel makes it on the way.
        check = self.problem.device == "cpu"
        return quantize_nf4(self.problem.dense(), double_quant=self.double_quant, check_finite=check).packed

    def dequantize(self) -> Tensor:
        return self.layer.dequantize(self.problem.kind)

    def dequantize_into(self, out: Tensor) -> Tensor:
        w = self.layer.quantized_weight
        status = _C.nf4_dequantize(
            w.packed.data_ptr(), w.scales.data_ptr(), 0 if w.nested is None else w.nested.data_ptr(),
            *w.shape, w.blocksize, 0, 0, out.data_ptr(), DTYPE_CODE[out.dtype], torch.get_num_threads(),
            isa.level(),
        )  # fmt: skip
        assert status == 0, f"nf4_dequantize: status {status}"
        return out


class FastloraNoAdapter(Fastlora):
    name = "fastlora, no adapter"
    has_adapter = False


class FastloraPlainAbsmax(Fastlora):
    name = "fastlora, plain absmax"
    double_quant = False
