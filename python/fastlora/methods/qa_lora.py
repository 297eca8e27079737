"""QA-LoRA: an adapter that sees the mean of each group of inputs.

    y = W·x + s·B·A·pool(x) + bias       pool(x)_j = the mean of x over group j of g inputs      A (r, k/g)

It is LoRA with A' = repeat(A, g) / g, each column of A g times over: exactly, since A·pool(x) = A'·x. So the
layer is the fused kernel with A', and what is exported is A' and B, plain LoRA. A has g times fewer weights,
and s·B·A' is constant over each group of a row. That is what the paper is after: with a zero point for each
group of a quantised weight, the adapter is an exact change of the zero points. NF4 has none, so merging into
this layer's weight rounds, as any merging into NF4 does.

PEFT has the method for GPTQ's layers and multiplies s by k/g. Dropout is of x, before the mean.

Xu et al., "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models", 2023.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..named_adapters import DEFAULT
from .reparametrised import Reparametrised


class QALoraQLinear(Reparametrised):
    """QLinear with QA-LoRA: lora_A is ``(r, in_features / group_size)``.

    Arguments as for :class:`QLinear`, and group_size: g, which divides in_features. Made also by
    ``QALoraQLinear.from_linear`` and by ``convert(model, layer_class=QALoraQLinear)``, both with a
    `group_size` too. It starts equal to its base; ``init`` is "default" or "gaussian". Files hold A' and B as
    plain LoRA, and are read back. Raises ValueError for a group size that does not divide in_features.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, group_size: int = 32, **options: Any
    ) -> None:
        if not isinstance(group_size, int) or group_size < 1 or in_features % group_size:
            raise ValueError(
                f"QALoraQLinear: expected a group_size that divides in_features {in_features}, got "
                f"{group_size!r}"
            )
        super().__init__(in_features, out_features, bias, **options)
        self.group_size = group_size
        if self.lora_A is not None:
            self.lora_A = nn.Parameter(self.lora_A.new_empty(self.rank, in_features // group_size))
            if not self.weight.is_meta:
                self.reset_adapter()

    def pair_in_force(self) -> tuple[Tensor, Tensor]:
        assert self.lora_A is not None
        assert self.lora_B is not None
        return self.lora_A.repeat_interleave(self.group_size, 1) / self.group_size, self.lora_B

    def can_load(self, name: str) -> bool:
        return name == DEFAULT

    def imported(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """A of an A' = repeat(A, g) / g, which is what files of these layers hold: exactly where g is a power
        of two, else rounded once. ValueError for another A'."""
        groups = lora_a.unflatten(1, (-1, self.group_size))
        if not torch.equal(groups, groups[..., :1].expand_as(groups)):
            raise ValueError(
                f"expected a lora_A that is constant over each group of {self.group_size} inputs, got another"
            )
        return groups[..., 0] * self.group_size, lora_b

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"
