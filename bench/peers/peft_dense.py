"""PEFT's LoRA layer over a frozen dense one: what a bf16 fine-tune runs."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn

from peers import SCALING, Peer, Problem, Unsupported
from peers.dense import dense_linear


class Holder(nn.Module):
    """PEFT replaces a child of a module, so the layer needs a parent."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def with_peft(linear: nn.Module, problem: Problem, **marks: bool) -> Holder:
    """`linear` under PEFT's adapter with the problem's A and B in the problem's dtype. marks: attributes by
    which PEFT recognises a quantised model."""
    holder = Holder(linear)
    for name, value in marks.items():
        setattr(holder, name, value)
    config = peft.LoraConfig(r=problem.r, lora_alpha=SCALING * problem.r, target_modules=["linear"])
    peft.inject_adapter_in_model(config, holder)
    layer = holder.linear
    with torch.no_grad():
        for parts, value in ((layer.lora_A, problem.lora_a), (layer.lora_B, problem.lora_b)):
            parts["default"].weight = nn.Parameter(value.to(problem.kind))
    return holder


class PeftDense(Peer):
    name = "dense + LoRA (PEFT)"
    training = True
    coded = False
    has_adapter = True

    def build(self, problem: Problem) -> nn.Module:
        if problem.r == 0:
            raise Unsupported("PEFT has no adapter of rank 0")
        return with_peft(dense_linear(problem), problem)

    def represented(self) -> Tensor:
        return dense_linear(self.problem).weight.float()

    def weight_bytes(self) -> int:
        return dense_linear(self.problem).weight.nbytes

    def adapter(self) -> tuple[Tensor | None, Tensor | None]:
        layer = self.layer.linear
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight
