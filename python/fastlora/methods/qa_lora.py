"""QA-LoRA: an adapter that sees the mean of each group of inputs.

    y = W·x + s·B·A·pool(x) + bias       pool(x)_j = the mean of x over group j of g inputs      A (r, k/g)

It is LoRA with A' = repeat(A, g) / g, each column of A g times over: exactly, since A·pool(x) = A'·x. So the
layer is the fused kernel with A', and what is exported is A' and B, plain LoRA. A has g times fewer weights,
and s·B·A' is constant over each group of a row. That is what the paper is after: with an offset for each
group of a quantised weight (there, a zero point), the adapter is an exact change of the offsets,

    offsets (n, k/g) += s·B·A / g          codes and scales stay the bits they are

where any other merging into NF4 rounds to its codes again. :func:`fold` makes that the weight for good.

PEFT has the method for GPTQ's layers and multiplies s by k/g. Dropout is of x, before the mean.

Xu et al., "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models", 2023.
"""

from __future__ import annotations

from math import lcm
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import QLinear
from ..named_adapters import DEFAULT
from ..nf4 import NF4Weight
from .reparametrised import Reparametrised, swapped


class QALoraQLinear(Reparametrised):
    """QLinear with QA-LoRA: lora_A is ``(r, in_features / group_size)``.

    Arguments as for :class:`QLinear`, and group_size: g, which divides in_features. Made also by
    ``QALoraQLinear.from_linear`` and by ``convert(model, layer_class=QALoraQLinear)``, both with a
    `group_size` too. It starts equal to its base; ``init`` is "default" or "gaussian". Files hold A' and B as
    plain LoRA, and are read back. :meth:`merge` is exact: it changes the weight's offsets and no code. Raises
    ValueError for a group size that does not divide in_features.
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

    def quantized_again(self, dense: Tensor) -> NF4Weight:
        """What :meth:`merge` puts in the weight's place, without looking at `dense`: the same codes and
        scales, and the adapter in offsets of in_features / group_size groups; where the weight has offsets of
        other groups, of the least common multiple of both. Raises ValueError if the adapter holds NaN or
        Inf."""
        return self._with_adapter_in_offsets()

    def _with_adapter_in_offsets(self) -> NF4Weight:
        base = self.quantized_weight
        if self.active_adapter is None:
            return base
        assert self.lora_A is not None
        assert self.lora_B is not None
        a, b = self.lora_A.detach().float(), self.lora_B.detach().float()
        change = a.new_zeros(b.shape[0], a.shape[1]).addmm_(b, a, alpha=self.scaling / self.group_size)
        if not torch.isfinite(change).all():
            raise ValueError("merge: expected a finite adapter, got one whose product holds NaN or Inf")
        return base.with_offsets(_sum(base.offset_values, change))

    def folded(self) -> QLinear:
        """A QLinear of rank 0 that computes the same: this layer's own Parameters, but for the offsets, which
        have the active adapter in them. Raises RuntimeError on a layer that is merged or sharded."""
        self._check_unmerged("folded")
        if self.sharded:
            raise RuntimeError("folded: expected a layer whose parameters are whole, got a sharded one")
        layer = self._without_adapter()
        offsets = self._with_adapter_in_offsets().offsets
        if self.active_adapter is not None and offsets is not None:
            layer.weight_offsets = nn.Parameter(offsets, requires_grad=False)
        return layer

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


def fold(model: nn.Module) -> int:
    """Swap every QALoraQLinear in `model` for its :meth:`QALoraQLinear.folded`, under all its names; how
    many. The adapters end here: to go on with them, keep the model's ``state_dict`` from before. Raises
    ValueError for a model that is such a layer itself and, with nothing changed, what folded does."""
    if isinstance(model, QALoraQLinear):
        raise ValueError("fold: expected a module that holds layers, got a layer; call its folded()")
    return swapped(model, {m: m.folded() for m in model.modules() if isinstance(m, QALoraQLinear)})


def _sum(offsets: Tensor | None, change: Tensor) -> Tensor:
    """Of two sets of offsets (n, groups), whose groups may differ in size."""
    if offsets is None:
        return change
    groups = lcm(offsets.shape[1], change.shape[1])
    a, b = (t.repeat_interleave(groups // t.shape[1], 1) for t in (offsets, change))
    return a + b
