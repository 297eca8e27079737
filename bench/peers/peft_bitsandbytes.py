"""PEFT's LoRA layer over bitsandbytes' Linear4bit: what a QLoRA fine-tune runs today."""

from __future__ import annotations

from torch import Tensor, nn

from peers import Peer, Problem, Unsupported
from peers.bitsandbytes_nf4 import BitsandbytesTraining, quantized_linear
from peers.peft_dense import with_peft


class PeftBitsandbytes(Peer):
    name = "PEFT on bitsandbytes"
    training = True
    has_adapter = True

    def build(self, problem: Problem) -> nn.Module:
        if problem.r == 0:
            raise Unsupported("PEFT has no adapter of rank 0")
        self.base = BitsandbytesTraining(problem)
        holder = with_peft(quantized_linear(problem), problem, is_loaded_in_4bit=True)
        if type(holder.linear).__name__ != "Linear4bit":
            raise Unsupported(f"this PEFT does not know Linear4bit: it made a {type(holder.linear).__name__}")
        return holder

    def represented(self) -> Tensor:
        return self.base.represented()

    def weight_bytes(self) -> int:
        return self.base.weight_bytes()

    def adapter(self) -> tuple[Tensor | None, Tensor | None]:
        layer = self.layer.linear
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight
