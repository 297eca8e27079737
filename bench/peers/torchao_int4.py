"""torchao's int4 weight-only tensor for CPUs (groups of 64 along k, asymmetric) over torch's own int4 kernel.
Another format than NF4: its quantisation error is its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import Int4OpaqueTensor

from peers import Peer, Problem, Unsupported

GROUP = 64


class TorchaoInt4(Peer):
    name = "torchao int4"
    operations = frozenset({"forward", "quantize"})

    def build(self, problem: Problem) -> nn.Module:
        if problem.device != "cpu":
            raise Unsupported("this tensor is packed for torch's CPU kernel")
        if problem.k % GROUP or problem.n % 64:
            raise Unsupported(f"expected k of whole groups of {GROUP} and n of whole 64 rows")
        linear = nn.Linear(problem.k, problem.n, bias=False, device="meta")
        linear.weight = nn.Parameter(self.quantize(), requires_grad=False)
        return linear

    def represented(self) -> Tensor:
        """Read back through the product, the packed form being the kernel's own."""
        identity = torch.eye(self.problem.k, dtype=self.problem.kind)
        return self.forward(identity).float().t()

    def weight_bytes(self) -> int:
        w = self.layer.weight
        return w.qdata.nbytes + w.scale_and_zero.nbytes

    def quantize(self) -> Tensor:
        with torch.no_grad():
            return Int4OpaqueTensor.from_hp(self.problem.dense(), [1, GROUP])
